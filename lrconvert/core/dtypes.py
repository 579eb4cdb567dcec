"""Safetensors dtypes in numpy: storage types, exact decoding, and correct rounding to bf16 and fp16.

numpy has no bfloat16, and casting float64 to fp16 or bf16 in most libraries rounds twice (through float32). Here a
stored array keeps its bits (`Stored`), decodes exactly, and `round_to` rounds once, to nearest, ties to even.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lrconvert.core.errors import DtypeError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

# Spelled out: numpy.typing takes as long to load as all the rest that a reader needs.
Array = np.ndarray[Any, np.dtype[Any]]
F32 = np.ndarray[Any, np.dtype[np.float32]]
F64 = np.ndarray[Any, np.dtype[np.float64]]
U16 = np.ndarray[Any, np.dtype[np.uint16]]
U32 = np.ndarray[Any, np.dtype[np.uint32]]
Index = np.ndarray[Any, np.dtype[np.intp]]

_CHUNK = 1 << 16  # numbers that are rounded at a time: what is made on the way stays in the cache

STORAGE: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("u1"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
    "F8_E8M0": np.dtype("u1"),
}
FLOATS = ("F64", "F32", "F16", "BF16")
TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def itemsize(dtype: str) -> int:
    """Return the bytes of one element of a safetensors dtype. Raises E-DTYPE if unknown."""
    try:
        return STORAGE[dtype].itemsize
    except KeyError:
        raise DtypeError(f"the dtype {dtype!r} is not known") from None


@dataclass(frozen=True, eq=False)
class Stored:
    """An array with the bits of a file: `dtype` is the safetensors name, `array` has the storage type of `STORAGE`."""

    dtype: str
    array: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def nbytes(self) -> int:
        return int(self.array.nbytes)

    def decode(self) -> Array:
        """Return the values: float32 for F32, F16 and BF16 (exact), float64 for F64. Raises E-DTYPE for others."""
        return decode(self.array, self.dtype)

    def is_finite(self) -> bool:
        """Return true if no number of a float dtype is NaN or infinite, by its bits."""
        if self.dtype == "BF16":
            return all(int((part & 0x7FFF).max(initial=0)) < 0x7F80 for part in self._parts())
        return all(bool(np.isfinite(part).all()) for part in self._parts())

    def is_zero(self) -> bool:
        """Return true if all numbers of a float dtype are zero, by their bits."""
        return not any((part & 0x7FFF if self.dtype == "BF16" else part).any() for part in self._parts())

    def _parts(self) -> Sequence[Array]:
        """The numbers some at a time, so that what is made of them stays in the cache."""
        flat = self.array.reshape(-1)
        return [flat[start : start + _CHUNK] for start in range(0, flat.size, _CHUNK)]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Stored)
            and self.dtype == other.dtype
            and self.shape == other.shape
            and self.array.tobytes() == other.array.tobytes()
        )

    def __hash__(self) -> int:
        return hash((self.dtype, self.shape))


def decode(array: Array, dtype: str) -> Array:
    """Decode storage bits to float32 (float64 for F64); exact."""
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    if dtype not in FLOATS:
        raise DtypeError(f"{dtype} does not hold real numbers", fix=f"expected one of {', '.join(FLOATS)}")
    return array.astype(np.float64 if dtype == "F64" else np.float32, copy=False)


def _to_float32_odd(x: F64) -> F32:
    """float64 to float32 rounding to odd: inexact results get an odd last bit.

    A later rounding to a format with at least two bits fewer then equals one rounding from float64 (Boldo and
    Melquiond, "When double rounding is odd", 2005).
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        near = x.astype(np.float32)
        wide = near.astype(np.float64)
    bits = near.view(np.uint32).copy()
    away = np.abs(wide) > np.abs(x)  # rounded away from zero: step back, so that `bits` is x truncated
    bits -= away
    bits |= (wide != x) & np.isfinite(x)
    return bits.view(np.float32)


def round_to(x: ArrayLike, dtype: str) -> Array:
    """Return `x` (float32 or float64) as storage bits of a float `dtype`, rounded once: nearest, ties to even.

    Values beyond the range become infinite, NaN stays NaN.
    """
    values = np.asarray(x)
    if dtype == "F64":
        return values.astype("<f8")
    if dtype == "F32":
        with np.errstate(over="ignore", under="ignore"):
            return values.astype("<f4")
    if dtype not in ("F16", "BF16"):
        raise DtypeError(f"{dtype} does not hold real numbers", fix=f"expected one of {', '.join(FLOATS)}")
    if values.ndim == 2 and not values.flags.c_contiguous and values.flags.f_contiguous:
        return np.ascontiguousarray(round_to(values.T, dtype).T)  # two bytes of a number are moved, not four
    flat = np.ascontiguousarray(values).reshape(-1)
    codes = np.empty(flat.size, "<u2")
    narrow = _to_f16 if dtype == "F16" else _to_bf16
    for start in range(0, flat.size, _CHUNK):
        chunk = flat[start : start + _CHUNK]
        single = chunk if chunk.dtype == np.float32 else _to_float32_odd(chunk.astype(np.float64, copy=False))
        narrow(single, codes[start : start + _CHUNK])
    return codes.view(STORAGE[dtype]).reshape(values.shape)


def _to_bf16(single: F32, out: U16) -> None:
    bits = single.view(np.uint32)
    word = np.right_shift(bits, np.uint32(16))
    np.bitwise_and(word, np.uint32(1), out=word)
    np.add(word, np.uint32(0x7FFF), out=word)
    np.add(word, bits, out=word)
    np.right_shift(word, np.uint32(16), out=word)
    np.copyto(out, word, casting="unsafe")
    if np.isnan(single.max(initial=-np.inf)):  # a maximum takes half as long as to look for each
        nan = np.flatnonzero(np.isnan(single))
        out[nan] = (bits[nan] >> np.uint32(16)) | np.uint32(0x40)


def _to_f16(single: F32, out: U16) -> None:
    bits, word = single.view(np.uint32), np.empty(single.size, np.uint32)
    small = f16_half_up(single, out, word)
    ties = np.flatnonzero(np.equal(np.bitwise_and(bits, np.uint32(0x1FFF), out=word), np.uint32(0x1000)))
    out[ties] -= out[ties] & np.uint16(1)  # a half that went up to an odd number belongs to the even one below
    out[small] = f16_small(bits[small])
    np.bitwise_and(bits, np.uint32(0x7FFFFFFF), out=word)
    large = np.flatnonzero(np.greater_equal(word, np.uint32(0x47800000)))  # 2^16 and more, infinite, NaN
    if large.size:
        nan = np.maximum(bits[large] >> np.uint32(13) & np.uint32(0x3FF), np.uint32(1))
        payload = np.where(word[large] > np.uint32(0x7F800000), nan, np.uint32(0))
        out[large] = (bits[large] >> np.uint32(16) & np.uint32(0x8000)) | np.uint32(0x7C00) | payload


def f16_half_up(single: F32, out: U16, word: U32) -> Index:
    """Write the fp16 codes of `single`, halves rounded away from zero, and return where they are wrong because a number
    is below 2^-14; those from 2^16 on are wrong as well. `word` is overwritten."""
    bits = single.view(np.uint32)
    np.bitwise_and(bits, np.uint32(0x7FFFFFFF), out=word)
    small = np.flatnonzero(np.less(word, np.uint32(0x38800000)))
    np.subtract(word, np.uint32(0x38000000 - 0x1000), out=word)  # another exponent bias, and half a unit
    np.right_shift(word, np.uint32(13), out=word)
    np.copyto(out, word, casting="unsafe")
    np.right_shift(bits, np.uint32(16), out=word)
    np.bitwise_and(word, np.uint32(0x8000), out=word)
    np.bitwise_or(out, word, out=out, casting="unsafe")
    return small


def f16_small(bits: U32) -> U16:
    """Return the fp16 codes of float32 `bits` of sizes up to 2^-14, ties to even.

    Adding 1/2, whose unit in float32 is that of subnormal fp16, rounds to it: the difference in bits is the code.
    """
    sizes = (bits & np.uint32(0x7FFFFFFF)).view(np.float32) + np.float32(0.5)
    codes = (sizes.view(np.uint32) - np.uint32(0x3F000000)) | (bits >> np.uint32(16) & np.uint32(0x8000))
    return codes.astype(np.uint16)
