"""The arrays that a fit fills, and how one LoRA's targets go through it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from lrconvert.core.dtypes import Array
from lrconvert.lora import packing
from lrconvert.lora.packing import TensorSpec

_DTYPES = {"code": np.uint8, "index": np.uint32, "half": np.float32, "single": np.float32, "coded": np.int32}


def zeros(specs: Iterable[TensorSpec]) -> dict[str, Array]:
    """Return the tensors of `specs` in their in-memory form, all zero."""
    return {spec.name: np.zeros(spec.shape, _DTYPES[spec.kind]) for spec in specs}


def put(array: Array, start: int, values: Array) -> int:
    """Write `values` row by row into the flat `array` from `start` on; return where they end."""
    array[start : start + values.size] = values.reshape(-1)
    return start + values.size


def rounded(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Return `arrays` with their float32 numbers as ``half`` tensors hold them."""
    return {name: packing.round_half(a) if a.dtype == np.float32 else a for name, a in arrays.items()}
