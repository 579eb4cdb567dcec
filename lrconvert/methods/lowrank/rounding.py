"""The rounding of scaled singular vectors with one step: coded integers, models and bits, and what they capture.

All components of an adapter are rounded with one step; the functions here work on all rows of one length at once. For
planning on large adapters a sample of every row's numbers is enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lrconvert.core.dtypes import F32, F64, Array
from lrconvert.kernels import jit
from lrconvert.lora import svd
from lrconvert.lora.adapter import LoraAdapter, LoraTarget
from lrconvert.lora.coded.choice import CLASSES, best_models
from lrconvert.lora.coded.stream import LARGEST_INTEGER
from lrconvert.lora.packing import coded_values
from lrconvert.lora.svd import Factors
from lrconvert.methods.base import FitContext
from lrconvert.methods.lowrank.coordinates import PLAIN, Coordinates

DEAD_ZONE = 0.6  # of a step; numbers up to it become 0
SIDE_BITS = 28  # of a component beside its numbers: a gain and two models
_AT_ONCE = 1 << 20  # numbers that are rounded at once
_SAVED = 5e-8  # seconds that a compiled loop saves in a plan, which rounds all numbers a few times, for each


@dataclass(frozen=True, eq=False)
class Side:
    """One side of some components: `rows` (n, length), whose numbers stand for `every` numbers each, and `places` (n,),
    the numbers of their components in the adapter."""

    rows: F32
    places: Array
    every: float

    def slices(self) -> Iterator[Side]:
        """Yield the rows some at a time, so that what is made of them stays small."""
        count = max(1, _AT_ONCE // self.rows.shape[1])
        for first in range(0, len(self.rows), count):
            some = slice(first, first + count)
            yield Side(self.rows[some], self.places[some], self.every)


@dataclass(frozen=True, eq=False)
class Components:
    """All components of an adapter, by target, then largest first: their target (n,), their energy (n,), and their A
    and B rows by length."""

    owners: Array
    energy: F64
    sides: tuple[tuple[Side, ...], tuple[Side, ...]]

    @property
    def numel(self) -> int:
        """All numbers of all rows."""
        return round(sum(side.rows.size * side.every for sides in self.sides for side in sides))

    def steps(self) -> tuple[float, float]:
        """Return the finest step that the models are made for, and the coarsest that leaves a number that is not 0."""
        largest = max((float(np.abs(side.rows).max()) for sides in self.sides for side in sides), default=0.0)
        coarsest = (largest or 1.0) / DEAD_ZONE
        return coarsest * 2.0**-17, coarsest

    def only(self, places: Array) -> Components:
        """Return the components `places`, in rising order, numbered anew."""
        number = np.full(len(self.energy), -1)
        number[places] = np.arange(len(places))

        def some(sides: tuple[Side, ...]) -> tuple[Side, ...]:
            masks = [number[side.places] >= 0 for side in sides]
            return tuple(
                Side(side.rows[mask], number[side.places[mask]], side.every)
                for side, mask in zip(sides, masks, strict=True)
                if mask.any()
            )

        a, b = (some(sides) for sides in self.sides)
        return Components(self.owners[places], self.energy[places], (a, b))

    def sampled(self, numbers: int) -> Components:
        """Return the components with some `numbers` of all their numbers."""
        stride = max(1, self.numel // numbers)
        if stride == 1:
            return self

        def thin(side: Side) -> Side:
            rows = np.ascontiguousarray(side.rows[:, :: min(stride, max(1, side.rows.shape[1] // 32))])
            return Side(rows, side.places, side.rows.shape[1] / rows.shape[1])

        a, b = (tuple(thin(side) for side in sides) for sides in self.sides)
        return Components(self.owners, self.energy, (a, b))


@dataclass(frozen=True, eq=False)
class Rounded:
    """The outcome of a step for `Components`: for every component the share of its energy that is left (n,), bits (n,)
    without those beside its numbers, and models (n, 2) of A and B."""

    share: F64
    bits: F64
    models: Array

    def only(self, places: Array) -> Rounded:
        """Return those of some components."""
        return Rounded(self.share[places], self.bits[places], self.models[places])


class _Rows:
    """The rows of one side of components, by length: room for those of `counts` components of every target, whose rows
    have `lengths` numbers, which is filled some at a time."""

    def __init__(self, lengths: Array, counts: Array) -> None:
        totals = {int(length): int(counts[lengths == length].sum()) for length in np.unique(lengths[counts > 0])}
        self._sides = {
            length: Side(np.empty((total, length), np.float32), np.empty(total, np.int64), 1.0)
            for length, total in totals.items()
        }
        self._filled = dict.fromkeys(totals, 0)

    def add(self, places: Array, scales: F64, rows: F64, role: str, coordinates: Coordinates) -> None:
        """Add ``scales * rows``, scales (n, 1) and rows (n, length), in other coordinates."""
        start = self._filled[rows.shape[1]]
        self._filled[rows.shape[1]] = stop = start + len(rows)
        side = self._sides[rows.shape[1]]
        side.places[start:stop] = places
        coordinates.fill(side.rows[start:stop], scales, rows, role)

    def sides(self) -> tuple[Side, ...]:
        return tuple(self._sides.values())


def components(
    lora: LoraAdapter, ranks: Sequence[int], context: FitContext, coordinates: Coordinates = PLAIN
) -> Components:
    """Return the components of an adapter, at most `ranks` of each target."""
    shapes = np.array([pair.target.matrix_shape for pair in lora.targets], np.int64)
    counts = np.minimum(ranks, np.minimum([pair.rank for pair in lora.targets], shapes.min(axis=1)))
    starts, energy = np.cumsum(counts) - counts, np.empty(int(counts.sum()))
    a, b = _Rows(shapes[:, 1], counts), _Rows(shapes[:, 0], counts)
    finished = 0
    for which, factors, factor in _scaled(lora.targets, context):
        kept = np.arange(factors.s.shape[1]) < counts[which][:, None]
        places, s = (starts[which][:, None] + np.arange(kept.shape[1]))[kept], factors.s[kept]
        energy[places] = s**2
        if len(places):
            a.add(places, factor * s[:, None], _chosen(factors.Vt, kept), "A", coordinates)
            b.add(places, s[:, None], _chosen(factors.U.mT, kept), "B", coordinates)
        finished += len(which)
        context.progress(0.5 * finished / len(lora.targets), lora.targets[which[-1]].target.name)
    return Components(np.repeat(np.arange(len(counts)), counts), energy, (a.sides(), b.sides()))


def _scaled(pairs: Sequence[LoraTarget], context: FitContext) -> Iterator[tuple[Array, Factors, float]]:
    """Yield the SVDs of some targets, in their metric, which targets these are, and the factor of their A rows ``factor
    * s_j v_j``: the root of the mean square of an input, so that one step means the same error on both sides."""
    for numbers in svd.stacks(pairs):
        metric = context.metric(pairs[numbers[0]])
        if metric is None:
            yield np.array(numbers), svd.svds([pairs[n] for n in numbers]), 1.0
            continue
        for n in numbers:
            metric = metric if n == numbers[0] else context.metric(pairs[n])
            assert metric is not None
            whole = svd.svd(pairs[n], metric)
            factor = float(metric.squares.mean(dtype=np.float64)) ** 0.5
            yield np.array([n]), Factors(whole.U[None], whole.s[None], whole.Vt[None]), factor


def _chosen(rows: F64, kept: Array) -> F64:
    """Those of rows (n, k, length) that are `kept` (n, k); no copy of all."""
    return rows.reshape(-1, rows.shape[-1]) if kept.all() else rows[kept]


def integers(rows: Array, step: float) -> Array:
    """Return the coded integers of rows, int32: ``sign(x) floor(|x| / step + 1 - dead zone)``."""
    sizes = np.abs(rows) * np.float32(1 / step) + np.float32(1 - DEAD_ZONE)
    whole: Array = np.minimum(sizes, np.float32(LARGEST_INTEGER)).astype(np.int32)
    return np.where(rows < 0, -whole, whole)


def round_all(parts: Components, step: float) -> Rounded:
    """Return what `step` makes of components."""
    count = len(parts.energy)
    share, bits, models = np.ones(count), np.zeros(count), np.zeros((count, 2), np.int64)
    loops = jit.load("rounding", _SAVED * sum(side.rows.size for sides in parts.sides for side in sides))
    for number, sides in enumerate(parts.sides):
        for side in (part for whole in sides for part in whole.slices()):
            kept, best, length = _rounded(side.rows, step) if loops is None else _rounded_by(loops, side.rows, step)
            share[side.places] *= kept
            bits[side.places] += length * side.every
            models[side.places, number] = best
    return Rounded(share, bits, models)


def _rounded(rows: F32, step: float) -> tuple[F64, Array, F64]:
    """Return what each row keeps of its direction, its model, and its bits."""
    codes = integers(rows, step)
    values = coded_values(codes)
    dots = np.einsum("nd,nd->n", values, rows, dtype=np.float64)
    sizes = [np.einsum("nd,nd->n", x, x, dtype=np.float64) for x in (values, rows)]
    return _share(dots, sizes[0] * sizes[1]), *best_models(codes)


def _rounded_by(loops: Any, rows: F32, step: float) -> tuple[F64, Array, F64]:
    """The same by compiled `loops`."""
    counts, sums = np.empty((len(rows), CLASSES), np.int64), np.empty((len(rows), 4))
    limits = np.array([1 / step, 1 - DEAD_ZONE, LARGEST_INTEGER], np.float32)
    codes = loops.round_rows(rows, limits, counts, sums)
    dots, sizes, squares, whole = sums.T
    return _share(dots, sizes * squares), *best_models(codes, counts.astype(np.float64), whole)


def _share(dots: F64, product: F64) -> F64:
    return np.divide(dots**2, product, out=np.zeros_like(dots), where=product > 0)
