"""compressed-tensors: FP8 and 8-bit integers beside ``weight_scale``, integers of few bits in ``weight_packed`` words,
and NVFP4 and MXFP4 in ``weight_packed`` bytes.

An element is (code - zero point) * scale, in float32; an NVFP4 scale is weight_scale / weight_global_scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lrconvert.core.dtypes import F32, Array
from lrconvert.io.checkpoint import Checkpoint, quantization_settings
from lrconvert.io.container import TensorInfo
from lrconvert.io.quantized.base import FP8, Described, Stored, Weight, by_blocks, suffixed
from lrconvert.io.quantized.shared import fp4, packed, scaled

_WRITER = "compressed-tensors"
_ACTIVATIONS = (
    *(f"{what}_{part}" for what in ("input", "output") for part in ("scale", "zero_point", "global_scale")),
    *(f"{what}_{part}" for what in ("q", "k", "v") for part in ("scale", "zero_point", "global_scale")),
)
_FORMATS = (
    *("dense", "naive-quantized", "float-quantized", "int-quantized", "pack-quantized", "mixed-precision"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"),
)


def described(checkpoint: Checkpoint) -> Described:
    """Return the weights of every layer, each by its own tensors."""
    groups = _groups(checkpoint)
    weights: dict[str, Weight] = {}
    for name, info in checkpoint.tensors.items():
        owner, _, leaf = name.rpartition(".")
        stored = Stored(checkpoint, f"{owner}.weight", _WRITER)
        if leaf == "weight_packed":
            weights[stored.name] = _packed(stored, info, groups)
        elif leaf == "weight" and info.dtype in (*FP8, "I8"):
            scale = stored.find(f"{name}_scale")
            zeros = checkpoint.tensors.get(f"{name}_zero_point")
            if zeros is not None:
                stored.shaped(zeros.name, ("I8", "I32"), scale.shape)
            weights[name] = scaled.weight(stored, scale, groups.block, zero_point=zeros)
    return Described(weights, suffixed(checkpoint, _ACTIVATIONS))


@dataclass(frozen=True)
class _Groups:
    """All numbers of bits that groups of layers have, and the size of a block."""

    bits: frozenset[int]
    block: tuple[int, ...]


def _groups(checkpoint: Checkpoint) -> _Groups:
    """Return what the configuration says. Raises E-BASE-QUANT for formats that are not read."""
    settings = quantization_settings(checkpoint.config)
    tables = settings.get("config_groups")
    groups = [group for group in (tables.values() if isinstance(tables, dict) else ()) if isinstance(group, dict)]
    everything = Stored(checkpoint, "*", _WRITER)
    for table in (settings, *groups):
        kind = table.get("format")
        if kind is not None and kind not in _FORMATS:
            everything.broken(f"the format {kind!r:.40} is not read")
    if settings.get("transform_config"):
        everything.broken("its activations are transformed as the model runs")
    sparsity = settings.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format") not in (None, "dense"):
        everything.broken(f"the sparse format {sparsity['format']!r:.40} is not read")
    weights = [group["weights"] for group in groups if isinstance(group.get("weights"), dict)]
    bits = {each["num_bits"] for each in weights if type(each.get("num_bits")) is int and 0 < each["num_bits"] <= 8}
    blocks = {_pair(each) for each in weights} - {()}
    if len(blocks) > 1:
        everything.broken("its layers have blocks of several sizes")
    return _Groups(frozenset(bits), next(iter(blocks), ()))


def _pair(weights: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the size of a block, () without."""
    block = weights.get("block_structure")
    is_pair = isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
    return tuple(block) if is_pair and isinstance(block, list) else ()


def _packed(stored: Stored, info: TensorInfo, groups: _Groups) -> Weight:
    name = stored.name
    if info.dtype == "I32":
        return _integers(stored, info, groups)
    stored.shaped(info.name, ("U8", "I8"))
    scale = stored.shaped(f"{name}_scale", ("F8_E4M3", "U8", "F8_E8M0"))
    if scale.dtype != "F8_E4M3":
        return fp4.weight(stored, info, scale)
    whole = stored.part(f"{name}_global_scale", "F32", 1)
    factor = stored.numbers(whole)[0]
    if factor == 0:
        stored.broken(f"{whole.name!r} is 0, and divides")
    return fp4.weight(stored, info, scale, factor, divides=True, beside=(whole.name,))


def _integers(stored: Stored, info: TensorInfo, groups: _Groups) -> Weight:
    name, tensors = stored.name, stored.checkpoint.tensors
    given = stored.find(f"{name}_shape")
    if given.dtype not in ("I64", "I32") or math.prod(given.shape) != 2:
        stored.broken(f"{given.name!r} is {given.dtype} {list(given.shape)}, not two integers")
    rows, cols = (int(length) for length in stored.read(given))
    fitting = [bits for bits in sorted(groups.bits) if info.shape == (rows, -(-cols * bits // 32))]
    if not fitting or rows < 1 or cols < 1:
        shown = f"{list(info.shape)} for a weight of {[rows, cols]}"
        stored.broken(f"{info.name!r} is {shown} with {' or '.join(map(str, sorted(groups.bits))) or 'no'} bits")
    bits, shape = fitting[0], (rows, cols)
    offset = np.float32(1 << (bits - 1))
    scale = stored.shaped(f"{name}_scale", ("F32", "BF16", "F16"))
    count = scale.shape[-1] if len(scale.shape) == 2 and scale.shape[0] == rows else 0
    if not count and math.prod(scale.shape) != 1:
        stored.broken(f"{scale.name!r} is {list(scale.shape)} for a weight of {[rows, cols]}")
    lines, count = (rows, count) if count else (1, 1)
    index = tensors.get(f"{name}_g_idx")
    if index is not None:
        stored.shaped(index.name, ("I32",), (cols,))
    elif cols % count:
        stored.broken(f"{scale.name!r} is {list(scale.shape)} for a weight of {[rows, cols]}")
    zeros = tensors.get(f"{name}_zero_point")
    if zeros is not None:
        stored.shaped(zeros.name, ("I32",), (-(-lines * bits // 32), count))

    def group_of(columns: range) -> Array:
        group = np.arange(columns.start, columns.stop) // (cols // count or 1)
        if index is not None:
            group = stored.read(index, columns.start, len(columns))
            if group.min() < 0 or group.max() >= count:
                stored.broken(f"{index.name!r} names a group that is not one of {count}")
        return group

    def block(entry: int, down: range, columns: range) -> F32:
        words = stored.window(info, down, packed.words(columns.start, columns.stop, bits))
        codes = packed.unpacked(np.ascontiguousarray(words.T), columns.start, len(columns), bits).T
        values = codes.astype(np.float32)
        group = group_of(columns)
        used = range(int(group.min()), int(group.max()) + 1)
        down = down if lines > 1 else range(1)
        if zeros is None:
            values -= offset
        else:
            points = stored.window(zeros, packed.words(down.start, down.stop, bits), used)
            point = packed.unpacked(points, down.start, len(down), bits).astype(np.float32)
            values -= point[:, group - used.start]
        values *= stored.finite(scale, stored.window(scale, down, used, count))[:, group - used.start]
        return values

    beside = {scale.name, given.name, *(part.name for part in (index, zeros) if part is not None)}
    return Weight(shape, info.name, frozenset(beside), by_blocks(shape, block))
