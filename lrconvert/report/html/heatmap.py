"""The layers: for each file a table of captured energy, layers by kinds of modules, shaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from lrconvert.formats.fidelity import TargetFidelity
from lrconvert.report.html.markup import (
    File,
    Measure,
    best_measure,
    brief,
    name,
    percent,
    row_name,
    scrolling,
    section,
    short,
    text,
    times,
)
from lrconvert.report.text_and_json import count_bytes

_COLUMNS = 48  # a wider map pools experts, blocks and slices of one kind
_EDGES = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)  # finer where files differ


def section_of(files: Sequence[File], measures: Sequence[Measure]) -> str:
    said = (
        "Percent of each target's energy. The first number in a target's name is its layer. Hovering shows the whole "
        "name and the ranks, which are also in the tables below."
    )
    parts = [f"<p>{said}</p>", *_switch(measures), _legend(), '<div class="maps">']
    for f in files:
        facts = [name(f.kept.method), count_bytes(f.kept.adapter_bytes), times(f.kept.ratio)]
        facts += [f"{m.column} {percent(m.of(f.kept))} %" for m in measures]
        heat = _heat(f, measures) if f.kept.targets else "<p>No targets.</p>"
        parts += [f"<article><h3>{row_name(f)}</h3><p>{', '.join(facts)}</p>", heat, "</article>"]
    return section("Layers", [*parts, "</div>"])


def _switch(measures: Sequence[Measure]) -> list[str]:
    if len(measures) < 2:
        return [f"<p>Shown is what is captured {measures[0].title}.</p>"] if measures else []
    lines = ['<fieldset class="switch"><legend>Show what is captured</legend>']
    for m in measures:
        checked = ' checked="checked"' if m is best_measure(measures) else ""
        box = f'<input type="radio" name="measure" id="show-{m.key}"{checked}/>'
        lines.append(f"<label>{box} {m.title}</label>")
    return [*lines, "</fieldset>"]


def _legend() -> str:
    shades = [("neg", "below 0")]
    shades += [(f"c{n}", f"{100 * a:.0f} to {100 * b:.0f}") for n, (a, b) in enumerate(pairwise((0.0, *_EDGES, 1.0)))]
    items = "".join(f'<li><b class="{shade}" aria-hidden="true"></b>{what}</li>' for shade, what in shades)
    return f'<ul class="key" aria-label="Colours, in percent">{items}</ul>'


# --- names into layers and kinds ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Grid:
    """Targets by layer and kind; those whose name has no number are `loose`."""

    layers: tuple[int, ...]
    kinds: tuple[str, ...]
    cells: dict[tuple[int, str], list[TargetFidelity]]
    loose: tuple[TargetFidelity, ...]


def _grid(targets: Sequence[TargetFidelity]) -> _Grid:
    """The first number in a name is the layer, the rest the kind. The other numbers and the parts of one name (slices,
    experts) make kinds of their own as long as the map stays narrow."""
    grid = _by_layer(targets, pooled=False)
    return grid if len(grid.kinds) <= _COLUMNS else _by_layer(targets, pooled=True)


def _by_layer(targets: Sequence[TargetFidelity], pooled: bool) -> _Grid:
    cells: dict[tuple[int, str], list[TargetFidelity]] = {}
    loose = []
    seen: dict[str, int] = {}
    for target in targets:
        parts = target.name.split(".")
        numbers = [n for n, part in enumerate(parts) if part.isascii() and part.isdigit() and len(part) < 10]
        if not numbers:
            loose.append(target)
            continue
        layer = int(parts[numbers[0]])
        for n in numbers if pooled else numbers[:1]:
            parts[n] = "*"
        kind = ".".join(parts)
        seen[target.name] = seen.get(target.name, 0) + 1
        if seen[target.name] > 1 and not pooled:
            kind += f" part {seen[target.name]}"
        cells.setdefault((layer, kind), []).append(target)
    layers, kinds = {layer for layer, _ in cells}, {kind for _, kind in cells}
    return _Grid(tuple(sorted(layers)), tuple(sorted(kinds)), cells, tuple(loose))


def _labels(kinds: Sequence[str]) -> list[str]:
    """Kinds without what all of them begin with, and without the last `weight`."""
    split = [[part for part in kind.split(".") if part not in ("*", "")] or [kind] for kind in kinds]
    split = [parts[:-1] if parts[-1] == "weight" and len(parts) > 1 else parts for parts in split]
    shared = 0
    while all(len(parts) > shared + 1 for parts in split) and len({parts[shared] for parts in split}) == 1:
        shared += 1
    return [short(".".join(parts[shared:]), 28) for parts in split]


# --- cells ----------------------------------------------------------------------------------------------------------


def _shade(value: float | None) -> str:
    if value is None:
        return "un"
    return "neg" if value < 0 else f"c{sum(value >= edge for edge in _EDGES)}"


def _cell(targets: Sequence[TargetFidelity], measures: Sequence[Measure]) -> tuple[str, str]:
    """What hovering says, and a shaded number for each measure; the style shows one of them."""
    values = [(m, m.pooled(targets)) for m in measures]
    told = [text(targets[0].name) + (f" and {len(targets) - 1:,} more" if len(targets) > 1 else "")]
    told.append(f"rank {_span(t.rank_before for t in targets)} before, {_span(t.rank_after for t in targets)} after")
    told.append(", ".join(f"{m.column} {percent(value)} %" for m, value in values))
    shaded = "".join(f'<b class="{m.key} {_shade(value)}">{brief(value)}</b>' for m, value in values)
    return "&#10;".join(told), shaded


def _span(numbers: Iterable[int]) -> str:
    found = sorted(numbers)
    return str(found[0]) if found[0] == found[-1] else f"{found[0]} to {found[-1]}"


def _heat(f: File, measures: Sequence[Measure]) -> str:
    grid = _grid(f.kept.targets)
    lines = [f'<table class="heat"><caption>Captured energy by layer and kind of module, {name(f.name)}</caption>']
    if grid.layers:
        heads = "".join(
            f'<th scope="col" title="{text(kind)}"><span>{escape(label)}</span></th>'
            for kind, label in zip(grid.kinds, _labels(grid.kinds), strict=True)
        )
        lines.append(f'<thead><tr><th scope="col">layer</th>{heads}</tr></thead>')
    lines.append("<tbody>")
    for layer in grid.layers:
        row = []
        for kind in grid.kinds:
            if targets := grid.cells.get((layer, kind)):
                hover, shaded = _cell(targets, measures)
                row.append(f'<td title="{hover}">{shaded}</td>')
            else:
                row.append("<td></td>")
        lines.append(f'<tr><th scope="row">{layer}</th>{"".join(row)}</tr>')
    if grid.loose:
        items = []
        for target in grid.loose:
            hover, shaded = _cell([target], measures)
            label = escape(short(target.name.removesuffix(".weight"), 36))
            items.append(f'<li title="{hover}">{shaded}<bdi>{label}</bdi></li>')
        cell = f'<td colspan="{max(len(grid.kinds), 1)}" class="loose"><ul>{"".join(items)}</ul></td>'
        lines.append(f'<tr><th scope="row">no layer</th>{cell}</tr>')
    return scrolling(f"Heat map of file {f.number}", [*lines, "</tbody></table>"])
