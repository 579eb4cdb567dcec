"""Forms whose rows (components, lines) have widths of their own: how many of each width, tensors and quantizing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import numpy as np

from lrconvert.core.dtypes import F32, F64, Array
from lrconvert.core.errors import LimitError
from lrconvert.core.limits import MAX_RANK
from lrconvert.io.fields import Check, between
from lrconvert.lora import packing
from lrconvert.lora.adapter import Target
from lrconvert.lora.packing import TensorSpec
from lrconvert.methods.shared.widths import WIDTHS, groups_of, spread_scales

MAX_LEVELS = 3  # widths in one file: each costs a tensor's header and digest, a fourth buys next to nothing


def _falling(levels: Sequence[int]) -> bool:
    return bool(levels) and list(levels) == [q for q in WIDTHS if q in levels]


Levels = Annotated[tuple[int, ...], Check(_falling, f"some of {', '.join(map(str, WIDTHS))}, widest first")]
MaxCount = Annotated[int, between(1, MAX_RANK)]


@dataclass(frozen=True)
class MixedWidths:
    """`levels`: widths in use, widest first. `counts[t][l]`: rows of target t at width levels[l]."""

    levels: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...]

    @cached_property
    def table(self) -> Array:
        """The counts, int64 (targets, levels)."""
        return np.array(self.counts, np.int64).reshape(len(self.counts), len(self.levels))

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        return tuple(self.table.sum(axis=1).tolist())

    @cached_property
    def max_count(self) -> int:
        """The largest count."""
        return int(self.table.max(initial=0))

    def widths(self, which: int) -> tuple[int, ...]:
        """Return the width of each row of a target, widest first."""
        return tuple(q for q, n in zip(self.levels, self.counts[which], strict=True) for _ in range(n))

    def commonest(self) -> list[int]:
        """Return the `MAX_LEVELS` widths that most rows have, widest first."""
        rows = self.table.sum(axis=0)
        return [self.levels[n] for n in sorted(np.argsort(-rows, kind="stable")[:MAX_LEVELS])]


def counts_spec(targets: Sequence[Target], levels: Sequence[int], max_count: int) -> TensorSpec:
    """Return the layout tensor ``counts`` (targets, levels)."""
    return packing.index("counts", (len(targets), len(levels)), max_count + 1)


def read_counts(counts: Array, max_count: int) -> tuple[tuple[int, ...], ...]:
    """Return the ``counts`` of a file. Raise E-LIMIT if its header does not fit them."""
    if int(counts.max()) != max_count or not counts.any(axis=0).all():
        raise LimitError("method.config names a width that no row has, or max_count is not the largest count")
    return tuple(map(tuple, counts.tolist()))


def numbers_name(q: int) -> str:
    """Return the name of the tensor that holds the numbers of width q."""
    return "half" if q == 16 else f"codes.{q}"


def numbers_specs(totals: Mapping[int, int], scales: int) -> list[TensorSpec]:
    """Return the tensors of the numbers, of which ``totals[q]`` have width q, and of their scales."""
    numbers = [
        packing.half("half", (n,)) if q == 16 else packing.code(numbers_name(q), (n,), q)
        for q, n in totals.items()
        if n
    ]
    return [*numbers, *([packing.half("scales", (scales,))] if scales else [])]


def quantize(rows: F64, q: int, group_size: int = 0, weights: Array | None = None) -> tuple[Array, F32, F64]:
    """Return (codes or numbers (n, d), scales (n, groups), the numbers they stand for) of rows at width q; `weights`
    (d,) say how much each column counts."""
    n, d = rows.shape
    if q == 16:
        numbers = rows.astype(np.float32)
        return numbers, np.zeros((n, 0), np.float32), numbers.astype(np.float64)
    groups, size = groups_of(d, group_size), group_size or d
    padded = np.empty((n, groups * size))
    padded[:, :d], padded[:, d:] = rows, rows[:, -1:]  # the row's end again, so that it does not pull the scale down
    if weights is not None:
        filled = np.pad(weights, (0, groups * size - d), constant_values=1e-30)
        weights = np.tile(filled.reshape(groups, size), (n, 1))
    codes, scales = packing.quantize_rows(padded.reshape(n * groups, size), q, weights)
    codes, scales = codes.reshape(n, -1)[:, :d], scales.reshape(n, groups)
    return codes, scales, packing.code_values(codes, q).astype(np.float64) * spread_scales(scales, d, size)


def masks(widths: Sequence[int]) -> dict[int, Array]:
    """Return which rows have each width, (rows,) booleans, in the order in which the widths appear."""
    return {q: np.array(widths) == q for q in dict.fromkeys(widths)}
