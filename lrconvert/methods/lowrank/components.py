"""The components of an adapter: scaled singular vectors, of which a plan rounds all and a file keeps some.

All of an adapter are rounded with one step; what works on them does so on all rows of one length at once. Rows of a
large adapter are as many bytes as the adapter itself: they are made when they are looked at, some targets at a time, on
as many threads as there are cores, and only those that a plan has chosen are kept. For the search of a step a sample of
every row's numbers is enough.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from lrconvert.core.dtypes import F32, F64, Array
from lrconvert.lora import svd
from lrconvert.lora.adapter import LoraAdapter, LoraTarget
from lrconvert.lora.svd import Decomposition, Factors
from lrconvert.methods.base import FitContext
from lrconvert.methods.lowrank.coordinates import PLAIN, Coordinates

DEAD_ZONE = 0.6  # of a step; numbers up to it become 0
_AT_ONCE = 1 << 20  # numbers that are rounded at once
_IN_MEMORY = 1 << 25  # numbers of rows that are kept, 128 MiB; more are made again at every look
_LEAST_SAMPLED = 32  # numbers of a row
_MOST_THREADS = 4

Item = TypeVar("Item")
Result = TypeVar("Result")
Work = Callable[[Array, "Components"], None]  # on components in memory, whose numbers among all are the places (n,)


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
            part = slice(first, first + count)
            yield Side(self.rows[part], self.places[part], self.every)


@dataclass(frozen=True, eq=False)
class Components:
    """Components in memory, by target, then largest first: their target (n,), their energy (n,), and their A and B rows
    by length."""

    owners: Array
    energy: F64
    sides: tuple[tuple[Side, ...], tuple[Side, ...]]

    @property
    def stored(self) -> int:
        """The numbers of all rows that are rounded."""
        return sum(side.rows.size for sides in self.sides for side in sides)

    @property
    def numel(self) -> int:
        """All numbers of all rows, also of those that a sample stands for."""
        return round(sum(side.rows.size * side.every for sides in self.sides for side in sides))

    def steps(self) -> tuple[float, float]:
        """Return the finest step that the models are made for, and the coarsest that leaves a number that is not 0."""
        largest = max((float(np.abs(side.rows).max()) for sides in self.sides for side in sides), default=0.0)
        coarsest = (largest or 1.0) / DEAD_ZONE
        return coarsest * 2.0**-17, coarsest

    def each(self, work: Work) -> None:
        """Do some `work` on all components, on those at a time that are in memory together."""
        work(np.arange(len(self.energy)), self)

    def only(self, places: Array) -> Components:
        """Return the components `places`, in rising order, numbered anew."""
        number = np.full(len(self.energy), -1)
        number[places] = np.arange(len(places))

        def chosen(sides: tuple[Side, ...]) -> tuple[Side, ...]:
            masks = [number[side.places] >= 0 for side in sides]
            return tuple(
                Side(side.rows[mask], number[side.places[mask]], side.every)
                for side, mask in zip(sides, masks, strict=True)
                if mask.any()
            )

        a, b = map(chosen, self.sides)
        return Components(self.owners[places], self.energy[places], (a, b))

    def sampled(self, numbers: int) -> Components:
        """Return the components with some `numbers` of all their numbers."""
        stride = max(1, self.numel // numbers)
        if stride == 1:
            return self

        def thin(side: Side) -> Side:
            rows = np.ascontiguousarray(side.rows[:, :: _stride_of(side.rows.shape[1], stride)])
            return Side(rows, side.places, side.rows.shape[1] / rows.shape[1])

        a, b = (tuple(thin(side) for side in sides) for sides in self.sides)
        return Components(self.owners, self.energy, (a, b))


def _stride_of(length: int, stride: int) -> int:
    """The stride of a sample of a row, of which some numbers are taken in any case."""
    return min(stride, max(1, length // _LEAST_SAMPLED))


@dataclass(frozen=True, eq=False)
class _Stack:
    """Components of targets of equal shapes and ranks: which of each are `kept` (n, k), and their numbers `places` in
    the adapter."""

    pairs: Sequence[LoraTarget]
    whole: Decomposition
    kept: Array
    places: Array

    @property
    def lengths(self) -> tuple[int, int]:
        """Those of an A row and of a B row."""
        out, inner = self.pairs[0].target.matrix_shape
        return inner, out


@dataclass(frozen=True, eq=False)
class StreamedComponents:
    """`Components` whose rows are made anew for every look at them, in the plain norm."""

    owners: Array
    energy: F64
    stacks: tuple[_Stack, ...]
    coordinates: Coordinates

    @classmethod
    def of(
        cls, pairs: Sequence[LoraTarget], counts: Array, context: FitContext, coordinates: Coordinates
    ) -> StreamedComponents:
        """Decompose targets, of which each has `counts` components."""
        starts, energy = np.cumsum(counts) - counts, np.empty(int(counts.sum()))
        numbers = list(svd.stacks(pairs))
        stacks, finished = [], 0
        for which, whole in zip(
            numbers, _on_threads(lambda which: Decomposition.of([pairs[n] for n in which]), numbers), strict=True
        ):
            kept = np.arange(whole.s.shape[1]) < counts[which][:, None]
            places = (starts[which][:, None] + np.arange(kept.shape[1]))[kept]
            energy[places] = whole.s[kept] ** 2
            stacks.append(_Stack([pairs[n] for n in which], whole, kept, places))
            finished += len(which)
            context.progress(0.5 * finished / len(pairs), pairs[which[-1]].target.name)
        return cls(np.repeat(np.arange(len(counts)), counts), energy, tuple(stacks), coordinates)

    @property
    def numel(self) -> int:
        """The numbers of all rows."""
        return sum(len(stack.places) * sum(stack.lengths) for stack in self.stacks)

    stored = numel

    def each(self, work: Work) -> None:
        """Do some `work` on all components, on those at a time that are in memory together, on several threads."""

        def block(stack: _Stack) -> None:
            rows = [np.empty((len(stack.places), length), np.float32) for length in stack.lengths]
            self._fill(stack, rows)
            a, b = ((Side(side, np.arange(len(stack.places)), 1.0),) for side in rows)
            work(stack.places, Components(self.owners[stack.places], self.energy[stack.places], (a, b)))

        for _ in _on_threads(block, self.stacks):
            pass

    def only(self, places: Array) -> AnyComponents:
        """Return the components `places`, in rising order, numbered anew: in memory, if they are not too many."""
        number = np.full(len(self.energy), -1)
        number[places] = np.arange(len(places))
        stacks = []
        for stack in self.stacks:
            numbers = number[stack.places]
            if (numbers >= 0).any():
                kept = stack.kept.copy()
                kept[stack.kept] = numbers >= 0
                stacks.append(replace(stack, kept=kept, places=numbers[numbers >= 0]))
        fewer = replace(self, owners=self.owners[places], energy=self.energy[places], stacks=tuple(stacks))
        return fewer if fewer.numel > _IN_MEMORY else fewer._gathered()

    def sampled(self, numbers: int) -> Components:
        """Return the components with some `numbers` of all their numbers."""
        stride = max(1, self.numel // numbers)

        def thin(rows: F64, role: str) -> F64:
            return self.coordinates.sampled(rows, _stride_of(rows.shape[-1], stride), role)

        def sample(stack: _Stack) -> list[Side]:
            scales, sides = stack.whole.s[stack.kept][:, None], []
            for rows, length in zip(stack.whole.vectors(stack.pairs, thin), stack.lengths, strict=True):
                numbers = (scales * _chosen(rows, stack.kept)).astype(np.float32)
                sides.append(Side(numbers, stack.places, length / numbers.shape[1]))
            return sides

        a, b = zip(*_on_threads(sample, self.stacks), strict=True)
        return Components(self.owners, self.energy, (_joined(a), _joined(b)))

    def _gathered(self) -> Components:
        """The same in memory."""
        lengths = np.array([stack.lengths for stack in self.stacks], np.int64).reshape(-1, 2)
        counts = np.array([len(stack.places) for stack in self.stacks], np.int64)
        sides = [_Rows(column, counts) for column in lengths.T]
        rooms = [
            [side.room(stack.places, n) for side, n in zip(sides, stack.lengths, strict=True)] for stack in self.stacks
        ]
        for _ in _on_threads(lambda both: self._fill(*both), list(zip(self.stacks, rooms, strict=True))):
            pass
        a, b = (side.sides() for side in sides)
        return Components(self.owners, self.energy, (a, b))

    def _fill(self, stack: _Stack, rooms: Sequence[F32]) -> None:
        """Fill the A rows and the B rows of some components."""
        scales = stack.whole.s[stack.kept][:, None]
        for room, rows, role in zip(rooms, stack.whole.vectors(stack.pairs), "AB", strict=True):
            self.coordinates.fill(room, scales, _chosen(rows, stack.kept), role)


AnyComponents = Components | StreamedComponents


def _on_threads(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Yield what `work` makes of each item, in their order, on as many threads as OpenBLAS would take."""
    with ThreadPoolExecutor(_threads()) as pool:
        yield from pool.map(work, items)


def _threads() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(allowed) if allowed.isdecimal() and int(allowed) else cores, _MOST_THREADS)


def _joined(sides: Sequence[Side]) -> tuple[Side, ...]:
    """The same rows in one side for each length."""
    alike: dict[tuple[int, float], list[Side]] = {}
    for side in sides:
        alike.setdefault((side.rows.shape[1], side.every), []).append(side)
    return tuple(
        Side(np.concatenate([side.rows for side in same]), np.concatenate([side.places for side in same]), every)
        for (_, every), same in alike.items()
    )


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

    def room(self, places: Array, length: int) -> F32:
        """Return the rows that are next to be filled, those of the components `places`."""
        start = self._filled[length]
        self._filled[length] = stop = start + len(places)
        side = self._sides[length]
        side.places[start:stop] = places
        return side.rows[start:stop]

    def sides(self) -> tuple[Side, ...]:
        return tuple(self._sides.values())


def components(
    lora: LoraAdapter, ranks: Sequence[int], context: FitContext, coordinates: Coordinates = PLAIN
) -> AnyComponents:
    """Return the components of an adapter, at most `ranks` of each target."""
    shapes = np.array([pair.target.matrix_shape for pair in lora.targets], np.int64)
    counts = np.minimum(ranks, np.minimum([pair.rank for pair in lora.targets], shapes.min(axis=1)))
    if int(counts @ shapes.sum(axis=1)) > _IN_MEMORY and context.metric(lora.targets[0]) is None:
        return StreamedComponents.of(lora.targets, counts, context, coordinates)
    starts, energy = np.cumsum(counts) - counts, np.empty(int(counts.sum()))
    a, b = _Rows(shapes[:, 1], counts), _Rows(shapes[:, 0], counts)
    finished = 0
    for which, factors, factor in _scaled(lora.targets, context):
        kept = np.arange(factors.s.shape[1]) < counts[which][:, None]
        places, s = (starts[which][:, None] + np.arange(kept.shape[1]))[kept], factors.s[kept]
        energy[places] = s**2
        if len(places):
            for side, scales, rows, role in ((a, factor * s, factors.Vt, "A"), (b, s, factors.U.mT, "B")):
                room = side.room(places, rows.shape[-1])
                coordinates.fill(room, scales[:, None], _chosen(rows, kept), role)
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
