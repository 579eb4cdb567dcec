"""Safetensors dtypes in numpy: storage types, exact decoding, and correct rounding to bf16 and fp16.

numpy has no bfloat16, and casting float64 to fp16 or bf16 in most libraries rounds twice (through float32). Here a
stored array keeps its bits (`Stored`), decodes exactly, and `round_to` rounds once, to nearest, ties to even.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lrconvert.errors import DtypeError

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

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
}
FLOATS = ("F64", "F32", "F16", "BF16")
TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def itemsize(dtype: str) -> int:
    """Bytes of one element of a safetensors dtype. Raises E-DTYPE if unknown."""
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
        """The values: float32 for F32, F16 and BF16 (exact), float64 for F64. Raises E-DTYPE for other dtypes."""
        return decode(self.array, self.dtype)

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
    """Storage bits to float32 (float64 for F64); exact."""
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


def round_to(x: npt.ArrayLike, dtype: str) -> Array:
    """`x` (float32 or float64) as storage bits of a float `dtype`, rounded once: nearest, ties to even.

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
    single = values if values.dtype == np.float32 else _to_float32_odd(values.astype(np.float64, copy=False))
    if dtype == "F16":
        with np.errstate(over="ignore", under="ignore"):
            return single.astype("<f2")
    bits = np.ascontiguousarray(single).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(single), quiet_nan, rounded).astype("<u2").reshape(values.shape)
