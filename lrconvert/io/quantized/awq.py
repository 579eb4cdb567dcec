"""AWQ: ``qweight`` (in, out / 8), ``qzeros`` (groups, out / 8) and ``scales`` (groups, out), in the order of its GEMM.

Lin et al., "AWQ", 2023. A word of 32 bits holds eight outputs, of which the first four bits have number 0, the next
ones 2, 4, 6, 1, 3, 5, 7. An element is scale * (code - zero point), in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lrconvert.core.dtypes import F32, Array
from lrconvert.io.checkpoint import Checkpoint, quantization_settings
from lrconvert.io.container import TensorInfo
from lrconvert.io.quantized.base import Described, Stored, Weight, by_blocks, by_owner, panel_of

_WRITER = "AWQ"
_SHIFTS = (4 * np.array([0, 4, 1, 5, 2, 6, 3, 7])).astype(np.uint32)  # of the bits of output 0, 1, ... of a word


def described(checkpoint: Checkpoint) -> Described:
    """Return the weights of ``qweight`` tensors."""
    settings = quantization_settings(checkpoint.config)
    return by_owner(checkpoint, "qweight", _WRITER, lambda stored, owner: _weight(stored, owner, settings))


def _weight(stored: Stored, owner: str, settings: Mapping[str, Any]) -> Weight:
    for key in ("version", "format"):
        kind = settings.get(key) or "gemm"
        if not isinstance(kind, str) or kind.lower() != "gemm":
            stored.broken(f"its {key} is {kind!r:.40}, not 'gemm'")
    bits = settings.get("bits", settings.get("w_bit", 4))
    if bits != 4:
        stored.broken(f"it has {bits!r:.20} bits, not 4")
    codes = stored.shaped(f"{owner}.qweight", ("I32",))
    if len(codes.shape) != 2:
        stored.broken(f"{codes.name!r} is {list(codes.shape)}, no matrix")
    inputs, out = codes.shape[0], 8 * codes.shape[1]
    scales = stored.shaped(f"{owner}.scales", ("F16", "BF16", "F32"))
    groups = scales.shape[0] if len(scales.shape) == 2 else 0
    stored.shaped(scales.name, (scales.dtype,), (groups, out))
    zeros = stored.shaped(f"{owner}.qzeros", ("I32",), (groups, out // 8))
    if not groups or inputs % groups:
        stored.broken(f"it has {groups} groups for {inputs} inputs")
    size = inputs // groups

    def numbers(info: TensorInfo, lines: range, outputs: range) -> F32:
        words = range(outputs.start // 8, -(-outputs.stop // 8))
        stored_words: Array = stored.window(info, lines, words).view(np.uint32)
        each = (stored_words[:, :, None] >> _SHIFTS) & np.uint32(15)
        flat = each.reshape(len(lines), -1)[:, outputs.start - 8 * words.start :][:, : len(outputs)]
        return flat.astype(np.float32)

    def block(entry: int, rows: range, cols: range) -> F32:
        """Rows are outputs, columns inputs, and stored the other way round."""
        used = range(cols.start // size, -(-cols.stop // size))
        group = np.arange(cols.start, cols.stop) // size - used.start
        values = numbers(codes, cols, rows)
        values -= numbers(zeros, used, rows)[group]
        values *= stored.finite(scales, stored.window(scales, used, rows))[group]
        return values.T

    shape = (out, inputs)
    parts = frozenset({zeros.name, scales.name})
    return Weight(shape, codes.name, parts, by_blocks(shape, block), panel_of(shape))
