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
_SAVED = 5e-7  # seconds that a compiled loop saves in a plan, which rounds all numbers some twenty times, for each


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


def scaled_rows(pair: LoraTarget, context: FitContext) -> tuple[Factors, float]:
    """Return the SVD of a target, in its metric, and the factor of its A rows ``factor * s_j v_j``: the root of the
    mean square of an input, so that one step means the same error on both sides."""
    metric = context.metric(pair)
    factor = 1.0 if metric is None else float(metric.squares.mean(dtype=np.float64)) ** 0.5
    return svd.svd(pair, metric), factor


def rows_of(factors: Factors, factor: float, rank: int, coordinates: Coordinates = PLAIN) -> tuple[F32, F32]:
    """Return the rows (k, in) and (k, out) that are rounded, of the largest `rank` components, in `coordinates` in
    which they are as long as before."""
    s = factors.s[:rank, None]

    def turned(rows: Array, role: str) -> F32:
        return np.asarray(coordinates.numbers(rows, role) * coordinates.unit(rows.shape[1]), np.float32)

    return turned(factor * s * factors.Vt[:rank], "A"), turned(s * factors.U[:, :rank].T, "B")


def components(
    lora: LoraAdapter, ranks: Sequence[int], context: FitContext, coordinates: Coordinates = PLAIN
) -> Components:
    """Return the components of an adapter, at most `ranks` of each target."""
    owners, energy = [], []
    sides: tuple[dict[int, list[tuple[F32, Array]]], ...] = ({}, {})
    start = 0
    for which, (pair, rank) in enumerate(zip(lora.targets, ranks, strict=True)):
        factors, factor = scaled_rows(pair, context)
        both = rows_of(factors, factor, rank, coordinates)
        places = np.arange(start, start + len(both[0]))
        start += len(places)
        owners.append(np.full(len(places), which))
        energy.append(factors.s[:rank] ** 2)
        for side, rows in zip(sides, both, strict=True):
            if len(rows):
                side.setdefault(rows.shape[1], []).append((rows, places))
        context.progress(0.5 * (which + 1) / len(lora.targets), pair.target.name)
    a, b = (tuple(_joined(parts) for parts in side.values()) for side in sides)
    return Components(np.concatenate(owners), np.concatenate(energy), (a, b))


def _joined(parts: Sequence[tuple[F32, Array]]) -> Side:
    return Side(np.concatenate([rows for rows, _ in parts]), np.concatenate([places for _, places in parts]), 1.0)


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
