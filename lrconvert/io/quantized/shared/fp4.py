"""Weights of four bits, E2M1, two in a byte, the first in the low bits, with scales for some elements of a row.

NVFP4 has a scale of eight bits for 16 elements and one for the whole weight; MXFP4 has a power of two for 32 (Open
Compute Project, "Microscaling formats", 2023).
"""

from __future__ import annotations

import numpy as np

from lrconvert.core.dtypes import F32
from lrconvert.io.container import TensorInfo
from lrconvert.io.quantized.base import Stored, Weight, by_blocks, spread

_SIZES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
VALUES: F32 = np.concatenate([_SIZES, -_SIZES])
_ONE = np.float32(1)
# Both values of a byte as one number, so that a look-up finds two.
PAIRS = np.array([(VALUES[byte & 15], VALUES[byte >> 4]) for byte in range(256)], np.float32).view(np.complex64)[:, 0]


def weight(
    stored: Stored,
    packed: TensorInfo,
    scale: TensorInfo,
    factor: np.float32 = _ONE,
    *,
    divides: bool = False,
    beside: tuple[str, ...] = (),
) -> Weight:
    """Return the weight of the `packed` bytes: an element is its value * (scale * factor), in float32, or with
    `divides` value * (scale / factor). `beside` are the other tensors that go with it."""
    *lead, half = packed.shape
    shape = (*lead, 2 * half)
    groups = scale.shape[-1] if len(scale.shape) == len(shape) else 0
    if scale.shape[:-1] != tuple(lead) or not groups or shape[-1] % groups:
        stored.broken(f"{scale.name!r} is {list(scale.shape)} for a weight of {list(shape)}")
    size = shape[-1] // groups
    height = lead[-1] if lead else 1

    def block(entry: int, rows: range, cols: range) -> F32:
        lines = range(entry * height + rows.start, entry * height + rows.stop)
        across = range(cols.start // 2, -(-cols.stop // 2))
        codes = stored.window(packed, lines, across, half)
        values = np.take(PAIRS, codes).view(np.float32)[:, cols.start - 2 * across.start :][:, : len(cols)]
        low = range(cols.start // size, -(-cols.stop // size))
        scales = stored.finite(scale, stored.window(scale, lines, low, groups))
        with np.errstate(over="ignore", invalid="ignore"):
            scales = scales / factor if divides else scales * factor
            return values * spread(scales, cols, size)

    return Weight(shape, packed.name, frozenset({scale.name, *beside}), by_blocks(shape, block))
