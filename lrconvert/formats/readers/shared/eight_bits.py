"""Factors of eight bits: tools for diffusion models store LoRAs in F8_E4M3 or F8_E5M2 with every number cast.

Nothing in such a LoRA says more. Where a tool quantized it as ComfyUI quantizes models, a number for the tensor stands
beside it, ``<half>.scale_weight`` or ``<half>.weight_scale``, which its numbers are multiplied with, and the file may
hold a mark, ``scaled_fp8``. Without such a number the values are exact in F16; with one they are rounded once to F32.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping

import numpy as np

from lrconvert.core.dtypes import Stored, round_to
from lrconvert.core.errors import PairError
from lrconvert.io.container import TensorInfo
from lrconvert.io.quantized.base import EIGHT_BITS, FP8

MARK = "scaled_fp8"
_SCALES = (".scale_weight", ".weight_scale")


def scales(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Return {tensor of eight bits: the one that holds its scale}, by names."""
    eights = [name for name, info in tensors.items() if info.dtype in FP8 and name.endswith(".weight")]
    pairs = ((name, name.removesuffix(".weight") + end) for name in eights for end in _SCALES)
    return {name: scale for name, scale in pairs if scale in tensors}


def notes(tensors: Iterable[TensorInfo], scaled: Collection[str]) -> list[str]:
    """Return the warning, if any, of tensors of eight bits."""
    eights = [info for info in tensors if info.dtype in FP8 and math.prod(info.shape) > 1]
    if not eights:
        return []
    dtypes = " and ".join(sorted({info.dtype for info in eights}))
    line = f"{len(eights)} tensors are stored in {dtypes}: their numbers are read exactly"
    return [f"{line}, {len(scaled)} of them times the scale beside them" if scaled else line]


def decoded(stored: Stored, scale: Stored | None, name: str) -> Stored:
    """Return numbers of eight bits as F16, which holds all of them; with a `scale` times that, as F32. Raises E-PAIR
    for a scale of another shape than one number, or one for each row."""
    values = EIGHT_BITS[stored.dtype][stored.array]
    if scale is None:
        return Stored("F16", np.asarray(values, "<f2"))
    factor = scale.decode().astype(np.float64).reshape(-1)
    if factor.size not in (1, stored.shape[0]):
        what = f"tensor {name!r:.160} is {list(stored.shape)}, its scale {list(scale.shape)}"
        raise PairError(what, fix="expected one number, or one for each row; store the factors in F16")
    by_row = factor.reshape(-1, *(1 for _ in stored.shape[1:]))
    return Stored("F32", round_to(values.astype(np.float64) * by_row, "F32"))
