"""GPTQ: ``qweight`` (in * bits / 32, out), ``qzeros`` (groups, out * bits / 32), ``scales`` (groups, out), and
``g_idx``, the group of every input.

Frantar et al., "GPTQ", 2022. An element is scale * (code - zero point), in float32. The first version of the format
stores zero points less one, so that one more is taken modulo 2^bits; `gptq_v2` stores them as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lrconvert.core.dtypes import F32, Array
from lrconvert.io.checkpoint import Checkpoint, quantization_settings
from lrconvert.io.container import TensorInfo
from lrconvert.io.quantized.base import Described, Stored, Weight, by_blocks, by_owner, panel_of
from lrconvert.io.quantized.shared import packed

_WRITER = "GPTQ"
_FORMATS = {"gptq": 1, "gptq_v2": 0}  # what is added to a stored zero point


def described(checkpoint: Checkpoint) -> Described:
    """Return the weights of ``qweight`` tensors."""
    settings = quantization_settings(checkpoint.config)
    return by_owner(checkpoint, "qweight", _WRITER, lambda stored, owner: _weight(stored, owner, settings))


def _weight(stored: Stored, owner: str, settings: Mapping[str, Any]) -> Weight:
    format_name = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if format_name not in _FORMATS:
        stored.broken(f"its format is {format_name!r:.40}, not {' or '.join(_FORMATS)}")
    codes = stored.shaped(f"{owner}.qweight", ("I32",))
    if len(codes.shape) != 2:
        stored.broken(f"{codes.name!r} is {list(codes.shape)}, no matrix")
    lines, out = codes.shape
    index = stored.checkpoint.tensors.get(f"{owner}.g_idx")
    bits = settings.get("bits") if index is None else lines * 32 / max(1, index.nbytes // 4)
    if bits not in packed.BITS:
        stored.broken(f"it has {bits!r:.20} bits, not one of {', '.join(map(str, packed.BITS))}")
    bits = int(bits)
    inputs = lines * 32 // bits
    scales = stored.shaped(f"{owner}.scales", ("F16", "BF16", "F32"))
    groups = scales.shape[0] if len(scales.shape) == 2 else 0
    stored.shaped(scales.name, (scales.dtype,), (groups, out))
    zeros = stored.shaped(f"{owner}.qzeros", ("I32",), (groups, -(-out * bits // 32)))
    group_of = _groups(stored, index, inputs, groups)
    more, top = np.uint32(_FORMATS[format_name]), np.uint32((1 << bits) - 1)

    def block(entry: int, rows: range, cols: range) -> F32:
        """Rows are outputs, columns inputs, and stored the other way round."""
        lines = stored.window(codes, packed.words(cols.start, cols.stop, bits), rows)
        group = group_of(cols)
        used = range(int(group.min()), int(group.max()) + 1)
        points = stored.window(zeros, used, packed.words(rows.start, rows.stop, bits))
        point = packed.unpacked(np.ascontiguousarray(points.T), rows.start, len(rows), bits).T
        point = ((point + more) & top).astype(np.float32)
        scale = stored.finite(scales, stored.window(scales, used, rows))
        values = packed.unpacked(lines, cols.start, len(cols), bits).astype(np.float32)
        values -= point[group - used.start]
        values *= scale[group - used.start]
        return values.T

    parts = {zeros.name, scales.name, *([] if index is None else [index.name])}
    shape = (out, inputs)
    return Weight(shape, codes.name, frozenset(parts), by_blocks(shape, block), panel_of(shape))


def _groups(stored: Stored, index: TensorInfo | None, inputs: int, groups: int) -> Callable[[range], Array]:
    """Return a function that gives the groups of inputs."""
    if index is None:
        if not groups or inputs % groups:
            stored.broken(f"it has {groups} groups for {inputs} inputs, and no g_idx")
        return lambda cols: np.arange(cols.start, cols.stop) // (inputs // groups)
    stored.shaped(index.name, ("I32",), (inputs,))

    def given(cols: range) -> Array:
        group = stored.read(index, cols.start, len(cols))
        if group.min() < 0 or group.max() >= groups:
            stored.broken(f"{index.name!r} names a group that is not one of {groups}")
        return group

    return given
