"""The page about one LoRA and the files that were made from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lrconvert.formats.fidelity import Answers, Fidelity
from lrconvert.report.html import layers, lines, plots
from lrconvert.report.html.measures import MEASURES, File, Measure
from lrconvert.report.html.templates import rendered
from lrconvert.report.html.verdict import verdict

_COLOURS = 8


@dataclass(frozen=True)
class About:
    """The sources of the numbers of a page: base, data, versions and command as text, `dates` of the files in their
    order, the singular values of the LoRA by target, and the refinements whose logs were given."""

    base: str = ""
    data: tuple[str, ...] = ()
    dates: tuple[str, ...] = ()
    versions: str = ""
    command: str = ""
    spectra: tuple[tuple[str, tuple[float, ...]], ...] = ()
    curves: tuple[lines.Curve, ...] = ()


def page(title: str, source: str, rows: Sequence[tuple[str, Fidelity]], about: About | None = None) -> str:
    """Return one HTML document about `rows`, each the name of a file and its measurement against the LoRA `source`.

    The files are numbered from the best on: by answers where these were measured, else by what they capture.
    """
    about = about or About()
    measured = [m for m in MEASURES if any(m.of(kept) is not None for _, kept in rows)]
    best = measured[-1] if measured else MEASURES[0]
    files = _files(rows, about.dates, best)
    plot = plots.answers_plot(files) or plots.measure_plot(files, best, plots.LARGE)
    panels = measured if plots.answers_plot(files) else measured[:-1]
    return rendered(
        "page.html",
        title=title,
        source=source,
        about=about,
        verdict=verdict(files),
        files=files,
        by_method=len(files) > _COLOURS,
        measures=measured,
        columns=[f"{m.column}, %" for m in measured],
        best=best,
        plot=plot,
        panels=[p for m in panels if (p := plots.measure_plot(files, m, plots.SMALL))],
        answers=_answer_groups(files),
        ranks=lines.rank_plots(files),
        same_ranks=lines.same_ranks(files),
        spectrum=lines.spectrum_plot(about.spectra),
        refinements=lines.curve_plot(about.curves),
        shades=[f"{100 * low:.0f} to {100 * high:.0f}" for low, high in pairwise((0.0, *layers.EDGES, 1.0))],
        maps=[layers.layer_map(f.kept.targets, measured) for f in files],
        worst_first=[sorted(f.kept.targets, key=lambda t: _or_infinite(best.of(t))) for f in files],
    )


def _files(rows: Sequence[tuple[str, Fidelity]], dates: Sequence[str], best: Measure) -> list[File]:
    """The files, the best first; colours tell them apart, or where there are too many, their methods."""
    methods = sorted({kept.method for _, kept in rows})

    def rank(n: int) -> tuple[float, float, int]:
        kept = rows[n][1]
        closed = -math.inf if kept.answers is None else kept.answers.closed
        captured = best.of(kept)
        return -closed, -(captured if captured is not None else -math.inf), kept.adapter_bytes

    return [
        File(
            place,
            rows[n][0],
            rows[n][1],
            place - 1 if len(rows) <= _COLOURS else methods.index(rows[n][1].method),
            dates[n] if n < len(dates) else "",
        )
        for place, n in enumerate(sorted(range(len(rows)), key=rank), 1)
    ]


def _answer_groups(files: Sequence[File]) -> list[list[tuple[File, Answers]]]:
    """The files whose answers were measured together: they share the items and the distance of the base."""
    groups: dict[tuple[str, int, float, float | None], list[tuple[File, Answers]]] = {}
    for f in files:
        if (a := f.kept.answers) is not None:
            groups.setdefault((a.kind, a.items, a.base_distance, a.base_agreement), []).append((f, a))
    return list(groups.values())


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else value
