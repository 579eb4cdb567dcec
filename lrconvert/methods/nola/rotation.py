"""Rows on a whole seeded basis: the signed rows of an orthogonal transform, the same basis for all rows of one length.

A row of the length d is ``sigma * (T c) / 2^p``: T the integer transform of `prng.hadamard`, sigma seeded signs, 2^p
the power of two next below the length of T's rows, which keeps rows about as long as their coefficients c. For
coefficients that are integers the sum is exact, in any order, so that every machine has the same row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from lrconvert.core.dtypes import F32, F64
from lrconvert.lora import prng
from lrconvert.lora.coded.stream import LARGEST_INTEGER
from lrconvert.lora.prng import hadamard
from lrconvert.lora.svd import products
from lrconvert.methods.lowrank.coordinates import Coordinates

_EXACT = 1 << 53  # integers below it add up exactly in float64


@dataclass(frozen=True)
class Rotation(Coordinates):
    """See the module's docstring; a basis follows from the `seed`, the role and the length of its rows alone."""

    seed: int

    def rows(self, numbers: Any, role: str, xp: Any = np) -> Any:
        length = numbers.shape[1]
        scale = 2.0 ** -_power(length)
        if xp is np:
            sums = hadamard.of_integers(hadamard.narrowed(numbers, length))
            sums *= signs_of(self.seed, role, length) * sums.dtype.type(scale)
            return sums.astype(np.result_type(sums, numbers), copy=False)
        return hadamard.transform(_double(numbers, xp), xp) * (self._signs(role, numbers, xp) * scale)

    def numbers(self, rows: Any, role: str, xp: Any = np) -> Any:
        length = rows.shape[1]
        scales = 2.0 ** _power(length) / hadamard.squares(length)
        if xp is not np:
            scales = xp.from_numpy(scales).to(rows.device)
        return hadamard.transform(_double(rows, xp) * self._signs(role, rows, xp), xp) * scales

    def unit(self, length: int) -> float:
        return float(hadamard.squares(length).mean() ** 0.5 * 2.0 ** -_power(length))

    def fill(self, out: F32, scales: F64, rows: F64, role: str) -> None:
        length = out.shape[1]
        numbers = scales * rows
        numbers *= signs_of(self.seed, role, length)
        sums = hadamard.of_integers(numbers)  # of other numbers they are not exact, and as good as any
        np.multiply(sums, self._factors(length), out=out, casting="same_kind")

    def sampled(self, rows: F64, stride: int, role: str) -> F64:
        length = rows.shape[-1]
        factors = np.broadcast_to(self._factors(length), length)[::stride]
        return products(rows, _every(self.seed, role, length, stride)) * factors

    def _factors(self, length: int) -> F64:
        """The factor of sums of a transform for numbers in units in which all lengths are kept."""
        return np.asarray(2.0 ** _power(length) / hadamard.squares(length) * self.unit(length), np.float64)

    def _signs(self, role: str, like: Any, xp: Any) -> Any:
        signs = signs_of(self.seed, role, like.shape[1])
        return _double(signs if xp is np else xp.from_numpy(signs).to(like.device), xp)


def sums_are_exact(length: int) -> bool:
    """Return true if sums of any coded integers over a basis of vectors of this `length` are exact in float64."""
    return length * hadamard.growth(length) * (LARGEST_INTEGER + 1) * 16 < _EXACT


@lru_cache(maxsize=16)
def signs_of(seed: int, role: str, length: int) -> F32:
    """Return the seeded signs of a basis, float32 (length,)."""
    drawn = prng.values(prng.Stream(seed, f"nola/{role}/{length}/signs"), "sign", (0,), 0, length, "float32")[0]
    return np.asarray(drawn, np.float32)


@lru_cache(maxsize=2)
def _every(seed: int, role: str, length: int, stride: int) -> F64:
    """Every vector in `stride` of a basis, float64 (n, length), which a transform multiplies rows with."""
    picked = np.arange(0, length, stride)
    units = np.zeros((len(picked), length))
    units[np.arange(len(picked)), picked] = 1
    return np.asarray(hadamard.of_integers(units) * signs_of(seed, role, length), np.float64)


def _power(length: int) -> int:
    """The largest p with 4^p at most the squared length of the first row of the transform."""
    return (hadamard.blocks(length)[0].square.bit_length() - 1) // 2


def _double(numbers: Any, xp: Any) -> Any:
    return numbers.astype(np.float64) if xp is np else numbers.double()
