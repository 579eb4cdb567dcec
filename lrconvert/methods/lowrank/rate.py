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

from lrconvert.core.dtypes import F64, Array
from lrconvert.lora import fake_quant
from lrconvert.lora.adapter import Target
from lrconvert.lora.coded.choice import best_models, bits_of_classes
from lrconvert.lora.coded.models import LARGEST, shifts
from lrconvert.lora.coded.stream import LARGEST_INTEGER
from lrconvert.methods.lowrank.rounding import DEAD_ZONE, SIDE_BITS

_CELL = 1 - DEAD_ZONE  # a number of this much less than an integer is rounded to it


def rounded(x: Tensor) -> Tensor:
    """Return the integers of numbers in steps, as `rounding.integers` rounds."""
    return x.sign() * torch.floor(x.abs() + _CELL).clamp_(max=LARGEST_INTEGER)


def numbers_of(x: Tensor) -> Tensor:
    """Return the numbers of the integers of x, in sixteenths of a step, with the gradient of ``16 x``."""
    with torch.no_grad():
        whole = rounded(x)
        value = 16 * whole - whole.sign()
    return fake_quant.through(16 * x, value)


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


def nonzero(parts: Sequence[Block], flat: Tensor) -> Tensor:
    """Mark the components (n,) with a number that is not zero on both sides."""
    return torch.cat([torch.stack([rows.any(dim=1) for rows in part.of(flat)]).all(dim=0) for part in parts])


@dataclass(frozen=True, eq=False)
class Coded:
    """The best coding of components (n,): models (n, 2) of A and B, and bits (n,)."""

    models: Array
    bits: F64


def coded(parts: Sequence[Block], integers: Array) -> Coded:
    """Return how the components of flat integers, int32, are coded; rows of one length at once."""
    count, flat = parts[-1].first + parts[-1].count, torch.from_numpy(integers)
    models, bits = np.zeros((count, 2), np.int64), np.zeros(count)
    by_length: dict[tuple[int, int], list[Block]] = {}
    for part in parts:
        if part.count:
            by_length.setdefault((0, part.inner), []).append(part)
            by_length.setdefault((1, part.out), []).append(part)
    for (side, _), same in by_length.items():
        rows = np.concatenate([part.of(flat)[side].numpy() for part in same])
        places = np.concatenate([np.arange(part.first, part.first + part.count) for part in same])
        models[places, side], lengths = best_models(rows)
        bits[places] += lengths
    return Coded(models, bits)


@lru_cache(maxsize=1)
def _tables() -> tuple[Tensor, Tensor]:
    """What one class more costs in bits (classes, models), float32, and by how many bits a model shifts (models,)."""
    bits = torch.from_numpy(bits_of_classes())
    more = torch.cat([bits[1:] - bits[:-1], bits.new_zeros(1, bits.shape[1])])
    more[LARGEST] = 0  # what is escaped costs the same however large it is
    return more.clamp_(min=0).float(), torch.from_numpy(shifts())


def slopes(parts: Sequence[Block], x: Tensor, models: Tensor) -> Tensor:
    """Return what each number of flat latents x costs in bits for a step more, negative where less costs more, under
    the models (components, 2). What a component costs beside its numbers falls on those that are not zero, and where a
    side has none, on the first that will not be."""
    more, widths = (table.to(x.device) for table in _tables())
    result = torch.zeros_like(x)
    for part in parts:
        for side, (rows, into) in enumerate(zip(part.of(x), part.of(result), strict=True)):
            model = models[part.components, side]
            size = rows.abs()
            place = torch.where(size < 1.1, size / 1.1, size - 0.1)
            scale = torch.exp2(-widths[model].float())[:, None]
            classes = (place * scale).long().clamp_(max=LARGEST)
            cost = more.T[model].gather(1, classes) * scale
            kept = size >= DEAD_ZONE
            count = kept.sum(dim=1, keepdim=True)
            cost += torch.where(kept | (count == 0), SIDE_BITS / 2 / count.clamp(min=1), 0.0)
            into.copy_(cost * rows.sign())
    return result
