"""The seeded bases of version 1 of NOLA: sums of their vectors, without a basis ever being there whole.

A basis has `count` vectors of `length` numbers d, the first ones of a seeded sequence: bases of one seed and length are
nested. Two families:

``hadamard``  vector i is signs * T[order(i)]: seeded signs (d,), T the integer orthogonal transform of `prng.hadamard`,
              a seeded order of its rows. A sum of vectors is one transform, O(d log d).
``dense``     vector i is basis i of a seeded stream under a value map, the paper's: d numbers are drawn for it, and a
              sum costs O(count d). They are drawn in tiles.

The labels of the streams hold the role ("A" or "B") and d, nothing else: targets of one size share a basis, whatever
their names and order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from lrconvert.core.dtypes import F64
from lrconvert.lora import prng
from lrconvert.lora.prng import hadamard
from lrconvert.methods.nola.rotation import signs_of

HADAMARD, DENSE = "hadamard", "dense"
_TILE = 1 << 21  # numbers of a dense basis in memory, 16 MiB; a basis that is no larger is drawn once


@dataclass(frozen=True)
class Basis:
    """See the module's docstring; `value_map` is that of the seeded numbers, ``sign`` for Hadamard bases."""

    family: str
    value_map: str
    seed: int
    role: str
    length: int
    count: int

    def _stream(self, use: str) -> prng.Stream:
        return prng.Stream(self.seed, f"nola/{self.role}/{self.length}/{use}")

    @property
    def growth(self) -> int:
        """A bound on any number on the way to a sum over the sum of all coefficients' magnitudes, in units of the
        smallest bit of a vector."""
        if self.family == HADAMARD:
            return hadamard.growth(self.length)
        return 1 << prng.value_map(self.value_map).bits

    @property
    def largest(self) -> float:
        """A bound on the magnitude of the numbers of a vector."""
        if self.family == DENSE:
            return 1.0
        return max(float(block.odd << block.shift) for block in hadamard.blocks(self.length))

    @property
    def drawn(self) -> int:
        """Numbers that are drawn to sum vectors."""
        return self.length * (self.count if self.family == DENSE else 1)

    def combine(self, numbers: Any, xp: Any = np) -> Any:
        """Return ``sum_i numbers[i] * vector i``: (length,) of integers in float64 (count,), numpy arrays or torch
        tensors. In float64, with numpy in float32 where that is exact, too. Exact as far as `growth` allows."""
        if self.family == DENSE:
            tiles = [numbers @ tile for _, tile in self._tiles(numbers, xp)]
            return xp.concatenate(tiles)
        order, signs = (
            _order(self._stream("order"), self.length, self.count),
            signs_of(self.seed, self.role, self.length),
        )
        if xp is np:
            narrow = hadamard.narrowed(numbers[None], self.length)
            spread = np.zeros((1, self.length), narrow.dtype)
            spread[0, order] = narrow
            sums = hadamard.of_integers(spread)[0]
            sums *= signs
            return sums
        spread = numbers.new_zeros((1, self.length))
        spread[0, xp.from_numpy(order).to(numbers.device)] = numbers
        return hadamard.transform(spread, xp)[0] * xp.from_numpy(signs).to(numbers.device)

    def _tiles(self, like: Any, xp: Any) -> Iterator[tuple[int, Any]]:
        """(first element, tile (count, n)) of a dense basis."""
        if xp is np and self.length * self.count <= _TILE:
            yield 0, self._only_tile
            return
        wide = max(128, _TILE // self.count)
        for start in range(0, self.length, wide):
            yield start, self._tile(start, min(wide, self.length - start), like, xp)

    @cached_property
    def _only_tile(self) -> F64:
        return np.asarray(self._tile(0, self.length, None, np), np.float64)

    def _tile(self, start: int, count: int, like: Any, xp: Any) -> Any:
        return _draw(self._stream("basis"), self.value_map, range(self.count), slice(start, start + count), like, xp)

    def _vector(self, use: str, value_map: str, like: Any, xp: Any) -> Any:
        return _draw(self._stream(use), value_map, range(1), slice(0, self.length), like, xp)[0]

    def base_term(self, like: Any, xp: Any = np) -> Any:
        """Return the seeded matrix that A may begin with, float64 (length,)."""
        return self._vector("base", self.value_map, like, xp)


@lru_cache(maxsize=16)
def _order(stream: prng.Stream, length: int, count: int) -> hadamard.I64:
    """The rows of the transform that a basis has: targets of one size share it."""
    return hadamard.order(stream, length, count)


def _draw(stream: prng.Stream, value_map: str, bases: range, part: slice, like: Any, xp: Any) -> Any:
    """Seeded numbers, float64 (len(bases), part), as an array, or a tensor on the device of `like`."""
    place = stream, value_map, bases, part.start, part.stop - part.start
    if xp is np:
        return prng.values(*place, "float64")
    return prng.tensor(*place, device=like.device, dtype="float64")
