"""The map of a file's layers: captured energy by layer and kind of module."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lrconvert.core.errors import printable
from lrconvert.formats.fidelity import TargetFidelity
from lrconvert.report.html.measures import Measure, percent, short

EDGES = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)  # between two shades; finer where files differ
_COLUMNS = 48  # a wider map pools experts, blocks and slices of one kind


@dataclass(frozen=True)
class Cell:
    """One cell: its label, what hovering says, and for each measure its key, shade and share."""

    label: str
    hover: str
    values: list[tuple[str, str, float | None]]


@dataclass(frozen=True)
class LayerMap:
    """A table: columns as (kind, label), rows as (layer, cells), and the targets whose names have no number."""

    columns: list[tuple[str, str]]
    rows: list[tuple[int, list[Cell | None]]]
    others: list[Cell]


def layer_map(targets: Sequence[TargetFidelity], measures: Sequence[Measure]) -> LayerMap:
    """Return the targets by layer, the first number in a name, and kind, the rest of it.

    The other numbers and the parts of one name (slices, experts) make kinds of their own as long as the map is narrow.
    """
    cells = by_layer(targets, pooled=False)
    if len({kind for _, kind in cells}) > _COLUMNS:
        cells = by_layer(targets, pooled=True)
    others = [_cell([t], measures) for t in cells.pop((-1, ""), [])]
    kinds = sorted({kind for _, kind in cells})
    rows = [
        (layer, [_cell(cells[layer, kind], measures) if (layer, kind) in cells else None for kind in kinds])
        for layer in sorted({layer for layer, _ in cells})
    ]
    return LayerMap(list(zip(kinds, kind_labels(kinds), strict=True)), rows, others)


def by_layer(targets: Sequence[TargetFidelity], pooled: bool) -> dict[tuple[int, str], list[TargetFidelity]]:
    """Return the targets by (layer, kind); those whose names have no number are at (-1, "")."""
    cells: dict[tuple[int, str], list[TargetFidelity]] = {}
    count: dict[str, int] = {}
    for target in targets:
        parts = target.name.split(".")
        numbers = [n for n, part in enumerate(parts) if part.isascii() and part.isdigit() and len(part) < 10]
        layer = int(parts[numbers[0]]) if numbers else -1
        for n in numbers if pooled else numbers[:1]:
            parts[n] = "*"
        count[target.name] = count.get(target.name, 0) + 1
        part = f" part {count[target.name]}" if count[target.name] > 1 and not pooled else ""
        cells.setdefault((layer, f"{'.'.join(parts)}{part}" if numbers else ""), []).append(target)
    return cells


def kind_labels(kinds: Sequence[str]) -> list[str]:
    """Return the kinds without what all of them begin with, and without the last `weight`."""
    split = [[part for part in kind.split(".") if part not in ("*", "")] or [kind] for kind in kinds]
    split = [parts[:-1] if parts[-1] == "weight" and len(parts) > 1 else parts for parts in split]
    shared = 0
    while all(len(parts) > shared + 1 for parts in split) and len({parts[shared] for parts in split}) == 1:
        shared += 1
    return [short(".".join(parts[shared:]), 28) for parts in split]


def _cell(targets: Sequence[TargetFidelity], measures: Sequence[Measure]) -> Cell:
    name = targets[0].name
    values = [(m, m.pooled(targets)) for m in measures]
    more = f" and {len(targets) - 1:,} more" if len(targets) > 1 else ""
    ranks = f"rank {_span(t.rank_before for t in targets)} before, {_span(t.rank_after for t in targets)} after"
    shares = "".join(f", {m.column} {percent(value)} %" for m, value in values)
    label = short(name.removesuffix(".weight"), 36)
    return Cell(label, f"{printable(name)}{more}: {ranks}{shares}", [(m.key, _shade(v), v) for m, v in values])


def _span(numbers: Iterable[int]) -> str:
    ordered = sorted(numbers)
    return str(ordered[0]) if ordered[0] == ordered[-1] else f"{ordered[0]} to {ordered[-1]}"


def _shade(value: float | None) -> str:
    if value is None:
        return "un"
    return "neg" if value < 0 else f"c{sum(value >= edge for edge in EDGES)}"
