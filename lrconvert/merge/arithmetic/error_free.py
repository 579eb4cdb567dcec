"""Error-free transformations: sums and products of float64 numbers with what their rounding loses."""

from __future__ import annotations

import numpy as np

from lrconvert.core.dtypes import F64
from lrconvert.merge.arithmetic.workspace import Mask


class Sum:
    """Running sums ``high + low + lost`` of exact numbers: `lost` bounds what the two levels could not hold."""

    def __init__(self, size: int) -> None:
        self.high, self.low, self.lost = np.zeros(size), np.zeros(size), np.zeros(size)

    def add(self, x: F64) -> None:
        self.high, rest = two_sum(self.high, x)
        self.low, rest = two_sum(self.low, rest)
        np.abs(rest, out=rest)
        self.lost += rest

    def add_scaled(self, other: Sum, scale: float) -> None:
        """Add ``scale * other``."""
        exact = np.frexp(scale)[0] in (0.5, -0.5)  # a power of two
        for part in (other.high, other.low):
            product = part * scale
            self.add(product)
            if not exact:
                self.add(product_error(part, np.full_like(part, scale), product))
        self.lost += other.lost * abs(scale)


def two_sum(a: F64, b: F64) -> tuple[F64, F64]:
    """Return a + b rounded, and what the rounding lost: exact (Knuth)."""
    s = a + b
    b_part = s - a
    return s, (a - (s - b_part)) + (b - b_part)


def product_error(a: F64, b: F64, product: F64) -> F64:
    """Return ``a * b - product``, exact if nothing under- or overflows (Dekker, with Veltkamp's splitting)."""
    a_high, a_low = _split(a)
    b_high, b_low = _split(b)
    return ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def _split(a: F64) -> tuple[F64, F64]:
    """Return two halves of at most 26 bits each."""
    c = a * 134217729.0  # 2^27 + 1
    high = c - (c - a)
    return high, a - high


def certain(high: F64, low: F64, lost: F64, dtype: str) -> Mask:
    """Return where ``high + low``, exact up to `lost`, rounds the same whatever was lost.

    For F64 the result is `high`, so `low` must stay clear of half a unit of it. For the narrower dtypes boundaries are
    float64 numbers, so only the sign of `low` matters: it says on which side of `high` the result lies.
    """
    half_unit = np.spacing(np.nextafter(np.abs(high), 0)) / 2
    if dtype == "F64":
        clear = (np.abs(low) < half_unit * (1 - 2.0**-40)) & (lost < half_unit * 2.0**-41)
    else:
        clear = (np.abs(low) > 2 * lost) & (lost < half_unit * 2.0**-10)
    sure: Mask = np.isfinite(high) & np.isfinite(low) & np.isfinite(lost) & ((lost == 0) | clear)
    return sure


def to_odd(high: F64, low: F64) -> F64:
    """Return ``high + low`` rounded to odd, so that a later rounding to fewer than 52 bits is the only one."""
    bits = high.view(np.int64).copy()
    outward = np.signbit(high) == np.signbit(low)
    step = np.where(outward, 1, -1)
    move = (low != 0) & ((bits & 1) == 0)
    return (bits + np.where(move, step, 0)).view(np.float64)
