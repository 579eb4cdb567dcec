"""A comparison as one HTML page: no script, nothing from outside, the same bytes for the same input.

`page.html` is the template and `page.css` its style sheet; `measures` writes the numbers, `plots` places the marks of
the plots, and `layers` arranges the targets of a file as a map. Names come from strangers' files: jinja2 escapes each,
and a content security policy forbids scripts and loads besides. The page is well-formed XML, so that any parser can
check it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from lrconvert.core.errors import printable
from lrconvert.formats.fidelity import Answers, Fidelity
from lrconvert.report.html import layers, measures, plots
from lrconvert.report.html.measures import MEASURES, File
from lrconvert.report.tables import count_bytes

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["page"]


def page(title: str, source: str, rows: Sequence[tuple[str, Fidelity]]) -> str:
    """Return one HTML document about `rows`, each the name of a file and its measurement against the LoRA `source`."""
    files = [File(n, name, kept) for n, (name, kept) in enumerate(rows, 1)]
    measured = [m for m in MEASURES if any(m.of(f.kept) is not None for f in files)]
    best = measured[-1] if measured else MEASURES[0]
    methods = sorted({f.kept.method for f in files})
    return _template().render(
        title=title,
        source=source,
        files=files,
        measures=measured,
        columns=[f"{m.column}, %" for m in measured],
        best=best,
        colours={method: n for n, method in enumerate(methods)},
        plots=plots.plots(files, measured),
        answers=_answer_groups(files),
        shades=[f"{100 * low:.0f} to {100 * high:.0f}" for low, high in pairwise((0.0, *layers.EDGES, 1.0))],
        maps=[layers.layer_map(f.kept.targets, measured) for f in files],
        worst_first=[sorted(f.kept.targets, key=lambda t: _or_infinite(best.of(t))) for f in files],
    )


@cache
def _template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        bytes=count_bytes,
        printable=printable,
        brief=measures.brief,
        percent=measures.percent,
        times=measures.times,
        root=lambda energy: f"{math.sqrt(energy) if energy >= 0 else math.nan:.4g}",
    )
    return environment.get_template("page.html")


def _answer_groups(files: Sequence[File]) -> list[list[tuple[File, Answers]]]:
    """The files whose answers were measured together: they share the items and the distance of the base."""
    groups: dict[tuple[str, int, float, float | None], list[tuple[File, Answers]]] = {}
    for f in files:
        if (a := f.kept.answers) is not None:
            groups.setdefault((a.kind, a.items, a.base_distance, a.base_agreement), []).append((f, a))
    return list(groups.values())


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else value
