"""The rate of components in training: how many bits their rounded numbers take, and what a step of a number costs.

Latents are in steps. What is coded are integers, so that bits are exact for the models of `rounding.best_models`; their
slope is that of the model's length between the integers, which pulls numbers towards zero where nothing else holds
them, most of all where a row is sparse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from lrconvert.core.dtypes import F32, F64, Array
from lrconvert.kernels import jit
from lrconvert.lora import fake_quant
from lrconvert.lora.adapter import Target
from lrconvert.lora.coded.choice import CLASSES, best_models, bits_of_classes
from lrconvert.lora.coded.models import LARGEST, shifts
from lrconvert.lora.coded.stream import LARGEST_INTEGER
from lrconvert.methods.lowrank import rounding
from lrconvert.methods.lowrank.components import DEAD_ZONE
from lrconvert.methods.lowrank.rounding import SIDE_BITS

_CELL = 1 - DEAD_ZONE  # a number of this much less than an integer is rounded to it
_EDGE, _OFFSET = 1.1, 0.1  # where the slope of a number becomes that between integers, and by how much it then shifts
_SAVED = 3e-6  # seconds that compiled loops save in a training of some hundred steps, for each number


def numbers_of(x: Tensor) -> Tensor:
    """Return the numbers of the integers of x, in sixteenths of a step, with the gradient of ``16 x``."""
    with torch.no_grad():
        value = numbers(rounded(x))
    return fake_quant.through(x, value, 16.0)


def rounded(x: Tensor) -> Tensor:
    """Return the integers of numbers in steps, as `rounding.integers` rounds."""
    return x.abs().add_(_CELL).floor_().clamp_(max=LARGEST_INTEGER).mul_(x.sign())


def numbers(integers: Tensor) -> Tensor:
    """Return the numbers of integers (floats), in sixteenths of a step."""
    return (integers * 16).sub_(integers.sign())


@dataclass(frozen=True)
class Block:
    """The numbers of the components of one target in a flat tensor: `count` components of an A row and a B column, the
    first number at `start`, the first component is number `first`."""

    start: int
    first: int
    count: int
    inner: int
    out: int

    @property
    def stop(self) -> int:
        return self.start + self.count * (self.inner + self.out)

    @property
    def components(self) -> slice:
        return slice(self.first, self.first + self.count)

    def rows(self, side: int) -> Array:
        """Return the numbers of the rows of A (0) or B (1) among the rows of all components."""
        return 2 * np.arange(self.first, self.first + self.count) + side

    def of(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Return the A rows (count, in) and the B rows (count, out), views of `flat`."""
        rows = flat[self.start : self.stop].view(self.count, self.inner + self.out)
        return rows[:, : self.inner], rows[:, self.inner :]


def blocks(targets: Sequence[Target], counts: Sequence[int]) -> tuple[Block, ...]:
    """Return where the components of each target are, if a target has so many."""
    parts, start, first = [], 0, 0
    for target, count in zip(targets, counts, strict=True):
        out, inner = target.matrix_shape
        parts.append(Block(start, first, count, inner, out))
        start, first = parts[-1].stop, first + count
    return tuple(parts)


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of all components in a flat tensor, numbered by component, its A row before its B row: `bounds` (n, 2)
    from where to where; of each length the numbers (m,) of the rows, and the blocks and sides that they are."""

    bounds: Array
    by_length: tuple[tuple[Array, tuple[tuple[Block, int], ...]], ...]

    @classmethod
    def of(cls, parts: Sequence[Block]) -> Rows:
        """Return the rows of `parts`, which follow each other."""
        lengths = np.array([n for part in parts for n in (part.inner, part.out) * part.count], np.int64)
        stops = np.cumsum(lengths)
        same: dict[int, list[tuple[Block, int]]] = {}
        for part in parts:
            for side, length in enumerate((part.inner, part.out)):
                if part.count:
                    same.setdefault(length, []).append((part, side))
        return cls(
            np.stack([stops - lengths, stops], axis=1),
            tuple((np.concatenate([part.rows(side) for part, side in all_]), tuple(all_)) for all_ in same.values()),
        )


@dataclass(frozen=True, eq=False)
class Coded:
    """The best coding of rounded latents: `integers` (N,), and by component the models (n, 2) of A and B, bits (n,),
    and which of the two rows (n, 2) hold a number that is not zero."""

    integers: Array
    models: Array
    bits: F64
    nonzero: Array


def coded(rows: Rows, latents: F32) -> Coded:
    """Return how flat latents (N,) in steps are coded."""
    counts, squares = np.zeros((len(rows.bounds), CLASSES)), np.zeros(len(rows.bounds))
    loops = jit.load("training", _SAVED * len(latents))
    if loops is None:
        codes = rounding.integers(latents, 1.0)
    else:
        limits = np.array([_CELL, LARGEST_INTEGER], np.float32)
        codes = loops.round_flat(latents, rows.bounds, limits, counts, squares)
    models, bits = np.zeros(len(rows.bounds), np.int64), np.zeros(len(rows.bounds))
    nonzero = counts[:, 0] < np.diff(rows.bounds)[:, 0]
    flat = torch.from_numpy(codes)
    for which, sides in rows.by_length:
        same = np.concatenate([part.of(flat)[side].numpy() for part, side in sides])
        known = (None, None) if loops is None else (counts[which], squares[which])
        models[which], bits[which] = best_models(same, *known)
        if loops is None:
            nonzero[which] = same.any(axis=1)
    return Coded(codes, models.reshape(-1, 2), bits.reshape(-1, 2).sum(axis=1), nonzero.reshape(-1, 2))


@lru_cache(maxsize=1)
def _tables() -> tuple[Tensor, Tensor]:
    """What one class more costs in bits (models, classes), and how many classes of a model are a step (models,),
    float32."""
    bits = torch.from_numpy(bits_of_classes())
    more = torch.cat([bits[1:] - bits[:-1], bits.new_zeros(1, bits.shape[1])])
    more[LARGEST] = 0  # what is escaped costs the same however large it is
    units = torch.exp2(-torch.from_numpy(shifts()).float())
    return more[: LARGEST + 1].clamp_(min=0).float().T.contiguous(), units


def slopes(rows: Rows, x: Tensor, models: Tensor) -> Tensor:
    """Return what each number of flat latents x costs in bits for a step more, negative where less costs more, under
    the models (components, 2). What a component costs beside its numbers falls on those that are not zero, and where a
    side has none, on the first that will not be."""
    loops = jit.load("training", _SAVED * len(x)) if x.device.type == "cpu" else None
    more, units = _tables()
    if loops is not None:
        limits = np.array([_EDGE, _OFFSET, DEAD_ZONE, SIDE_BITS / 2], np.float32)
        tables = more.numpy(), units.numpy(), limits
        return torch.from_numpy(loops.slopes_flat(x.numpy(), rows.bounds, models.reshape(-1).numpy(), *tables))
    more, units, result = more.to(x.device), units.to(x.device), torch.zeros_like(x)
    for which, sides in rows.by_length:
        model = models.reshape(-1)[torch.from_numpy(which).to(x.device)]
        same, unit = torch.cat([part.of(x)[side] for part, side in sides]), units[model][:, None]
        size = same.abs()
        place = torch.where(size < _EDGE, size / _EDGE, size - _OFFSET)
        cost = more[model].gather(1, (place * unit).long().clamp_(max=LARGEST)) * unit
        kept = size >= DEAD_ZONE
        count = kept.sum(dim=1, keepdim=True)
        cost += torch.where(kept | (count == 0), SIDE_BITS / 2 / count.clamp(min=1), 0.0)
        cost *= same.sign()
        counts = [part.count for part, _ in sides]
        for (part, side), own in zip(sides, torch.split_with_sizes(cost, counts), strict=True):
            part.of(result)[side].copy_(own)
    return result
