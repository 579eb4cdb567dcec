"""MXFP4 as gpt-oss stores its experts: ``gate_up_proj_blocks`` (experts, out, groups, 16), two elements in a byte, and
``gate_up_proj_scales`` (experts, out, groups), a power of two for each group of 32.

The model holds them (experts, in, out). All of it is exact in bf16.
"""

from __future__ import annotations

import numpy as np

from lrconvert.core.dtypes import F32
from lrconvert.io.checkpoint import Checkpoint
from lrconvert.io.container import TensorInfo
from lrconvert.io.quantized.base import Described, Stored, Weight, by_blocks, panel_of, spread
from lrconvert.io.quantized.shared.fp4 import PAIRS

_WRITER = "gpt-oss"
_GROUP = 32  # elements of a scale
_BLOCKS, _SCALES = "_blocks", "_scales"


def described(checkpoint: Checkpoint) -> Described:
    """Return the stacks of experts."""
    weights = {}
    for name, info in checkpoint.tensors.items():
        weight = name.removesuffix(_BLOCKS)
        if weight != name and info.dtype == "U8":
            weights[weight] = _weight(Stored(checkpoint, weight, _WRITER), info)
    return Described(weights)


def _weight(stored: Stored, blocks: TensorInfo) -> Weight:
    if blocks.dtype != "U8" or len(blocks.shape) != 4 or blocks.shape[3] != _GROUP // 2:
        stored.broken(f"{blocks.name!r} is {blocks.dtype} {list(blocks.shape)}, not U8 of experts, out, groups, 16")
    experts, out, groups, _ = blocks.shape
    scales = stored.shaped(stored.name + _SCALES, ("U8", "F8_E8M0"), (experts, out, groups))
    inputs = groups * _GROUP

    def block(entry: int, rows: range, cols: range) -> F32:
        """Rows are inputs, columns outputs, and stored the other way round."""
        lines = range(entry * out + cols.start, entry * out + cols.stop)
        across = range(rows.start // 2, -(-rows.stop // 2))
        codes = stored.window(blocks, lines, across, inputs // 2)
        values = np.take(PAIRS, codes).view(np.float32)[:, rows.start - 2 * across.start :][:, : len(rows)]
        low = range(rows.start // _GROUP, -(-rows.stop // _GROUP))
        factors = stored.finite(scales, stored.window(scales, lines, low, groups))
        with np.errstate(over="ignore"):
            values = values * spread(factors, rows, _GROUP)
        return values.T

    shape = (experts, inputs, out)
    parts = frozenset({scales.name})
    return Weight(shape, blocks.name, parts, by_blocks(shape, block), panel_of(shape))
