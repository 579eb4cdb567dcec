"""Rounding of rational numbers to the dtypes of weights: where nothing else decides."""

from __future__ import annotations

from fractions import Fraction

from lrconvert.core.dtypes import STORAGE

# (bits of the mantissa, smallest exponent of a normal number, code of infinity)
FORMATS = {
    "F64": (52, -1022, 0x7FF << 52),
    "F32": (23, -126, 0xFF << 23),
    "F16": (10, -14, 0x1F << 10),
    "BF16": (7, -126, 0xFF << 7),
}


def sign_bit(dtype: str) -> int:
    """Return the bit of the sign, as an integer."""
    return 1 << (8 * STORAGE[dtype].itemsize - 1)


def round_fraction(x: Fraction, dtype: str) -> int:
    """Return the bits, as an integer, of the value of `dtype` nearest to `x`, ties to even; or infinity."""
    mantissa, smallest, infinity = FORMATS[dtype]
    sign = sign_bit(dtype) if x < 0 else 0
    x = abs(x)
    if x == 0:
        return 0
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    if x < Fraction(2) ** exponent:
        exponent -= 1
    exponent = max(exponent, smallest)
    units = round(x / Fraction(2) ** (exponent - mantissa))  # Python rounds fractions half to even
    # A normal number's units include its leading one, which is the lowest bit of the exponent field.
    code = ((exponent - smallest) << mantissa) + units
    return sign | min(code, infinity)
