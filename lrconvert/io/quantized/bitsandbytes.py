"""bitsandbytes: 4-bit (NF4, FP4) and 8-bit weights.

Dettmers et al., "QLoRA", 2023, and "LLM.int8()", 2022. A value is what bitsandbytes computes in float32 from code and
scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from lrconvert.core.dtypes import F32, round_to
from lrconvert.core.errors import LrcError
from lrconvert.core.limits import FOREIGN, MAX_DIM
from lrconvert.io import fields, strictjson
from lrconvert.io.checkpoint import Checkpoint
from lrconvert.io.container import TensorInfo
from lrconvert.io.quantized.base import Described, Stored, Weight

_WRITER = "bitsandbytes"
_STATE_BYTES = 1 << 16  # of the JSON text of a state; real ones have a few hundred
_MAX_BLOCK = 1 << 20  # elements of one scale; bitsandbytes has up to 4096
_PARTS_4BIT = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_PARTS_8BIT = ("SCB", "weight_format")
_INT8 = np.float32(7.874015718698502e-3)  # 1 / 127 as bitsandbytes has it

# The 16 values of a code. Kernels of bitsandbytes have them built in, so a state with others stands for another model.
_FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
_TABLES: dict[str, F32] = {
    "nf4": np.array(
        [
            *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
            *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
            *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
            *(0.7229568362236023, 1.0),
        ],
        np.float32,
    ),
    "fp4": np.concatenate([_FP4, -_FP4]),
}
_TABLE_ERROR = 1e-6  # within which bitsandbytes takes two tables for the same
_STATES = {f"quant_state.bitsandbytes__{kind}": kind for kind in _TABLES}


_BlockSize = Annotated[int, fields.between(1, _MAX_BLOCK)]
_Shape = tuple[Annotated[int, fields.between(1, MAX_DIM)], ...]


@dataclass(frozen=True)
class _State:
    """The JSON text that describes a 4-bit weight."""

    shape: Annotated[_Shape, fields.Check(lambda shape: 0 < len(shape) <= FOREIGN.ndim, "a few dimensions")]
    blocksize: _BlockSize
    nested_blocksize: _BlockSize | None = None
    nested_offset: float | None = None


def described(checkpoint: Checkpoint) -> Described:
    """Return the weights that bitsandbytes has quantized. Raises E-BASE-QUANT for states that do not fit."""
    weights: dict[str, Weight] = {}
    for name, info in checkpoint.tensors.items():
        weight = next((name.removesuffix(f".{state}") for state in _STATES if name.endswith(f".{state}")), "")
        if name.endswith(".SCB"):
            weight = f"{name.removesuffix('SCB')}weight"
        if not weight:
            continue
        stored = Stored(checkpoint, weight, _WRITER)
        if weight in weights:
            stored.broken("it has two states")
        weights[weight] = _eight_bit(stored) if name.endswith(".SCB") else _four_bit(stored, info)
    hidden = {part for weight in weights.values() for part in weight.parts}
    for name in checkpoint.tensors:
        owner, _, part = name.rpartition(".")
        if part in _PARTS_4BIT and owner in checkpoint.tensors and name not in hidden:
            Stored(checkpoint, owner, _WRITER).broken(f"it has {name!r} and no quant_state")
    return Described(weights)


def _four_bit(stored: Stored, state: TensorInfo) -> Weight:
    tensors, name = stored.checkpoint.tensors, stored.name
    if name not in tensors:
        stored.broken("it is missing")
    if state.nbytes > _STATE_BYTES:
        stored.broken("its state has more than 64 KiB")
    try:
        value = strictjson.parse(stored.read(state).tobytes(), depth=FOREIGN.json_depth, floats=True)
    except LrcError as error:
        raise error.at(state.file) from None
    try:
        described = fields.read_config(_State, value)
    except LrcError as error:
        stored.broken(f"its state: {error.what}")
    shape, block = described.shape, described.blocksize
    kind = next(_STATES[suffix] for suffix in _STATES if state.name.endswith(suffix))
    size = math.prod(shape)
    packed = tensors[name]  # of any dtype: bitsandbytes can store the bytes as another one
    if packed.nbytes != -(-size // 2):
        stored.broken(f"it has {packed.nbytes} bytes for the shape {list(shape)}")
    table = stored.read(stored.part(f"{name}.quant_map", "F32", 16))
    if not np.all(np.abs(table - _TABLES[kind]) <= _TABLE_ERROR):
        stored.broken(f"its quant_map is not that of {kind}")
    pairs = np.array([(high, low) for high in table for low in table], np.float32).view(np.complex64)[:, 0]
    scales = _scales(stored, described, -(-size // block))

    def elements(first: int, count: int) -> F32:
        begin, end = first // 2, -(-(first + count) // 2)
        codes = np.frombuffer(stored.checkpoint.read(packed, begin, end - begin), np.uint8)
        values: F32 = pairs[codes].view(np.float32)[first - 2 * begin :][:count]
        _scale(values, scales, first, block)
        return values

    suffixes = (*_PARTS_4BIT, *_STATES)
    return Weight(shape, name, frozenset({f"{name}.{part}" for part in suffixes} & tensors.keys()), elements)


def _scales(stored: Stored, state: _State, blocks: int) -> Callable[[int, int], F32]:
    """Return a function that gives the scales of blocks from number `first` on, quantized ones or not."""
    name = stored.name
    if f"{name}.nested_absmax" not in stored.checkpoint.tensors:
        absmax = stored.part(f"{name}.absmax", "F32", blocks)
        return lambda first, count: stored.numbers(absmax, first, count)
    codes = stored.part(f"{name}.absmax", "U8", blocks)
    block, offset = state.nested_blocksize, state.nested_offset
    if block is None or offset is None:
        stored.broken("its state has no nested_blocksize or no nested_offset")
    table = stored.numbers(stored.part(f"{name}.nested_quant_map", "F32", 256))
    outer = stored.part(f"{name}.nested_absmax", "F32", -(-blocks // block))
    shift = round_to(np.array([offset], np.float64), "F32")

    def scales(first: int, count: int) -> F32:
        values: F32 = table[stored.read(codes, first, count)]
        _scale(values, lambda *block_range: stored.numbers(outer, *block_range), first, block)
        with np.errstate(over="ignore", invalid="ignore"):
            values += shift
        if not np.isfinite(values).all():
            stored.broken("its scales are beyond float32")
        return values

    return scales


def _eight_bit(stored: Stored) -> Weight:
    tensors, name = stored.checkpoint.tensors, stored.name
    info = tensors.get(name)
    if info is None or info.dtype != "I8" or len(info.shape) != 2:
        stored.broken("there is no matrix of I8")
    layer = name.removesuffix("weight")
    kind = tensors.get(f"{layer}weight_format")
    if kind is not None and (kind.nbytes != 1 or stored.read(kind).tobytes() != b"\0"):
        stored.broken("its weight_format is not that of rows")
    rows, cols = info.shape
    scb = stored.part(f"{layer}SCB", "F32", rows)

    def elements(first: int, count: int) -> F32:
        values = stored.read(info, first, count).astype(np.float32)
        _scale(values, lambda *rows: stored.numbers(scb, *rows), first, cols)
        values *= _INT8
        return values

    return Weight(info.shape, name, frozenset({f"{layer}{part}" for part in _PARTS_8BIT} & tensors.keys()), elements)


def _scale(values: F32, scales: Callable[[int, int], F32], first: int, block: int) -> None:
    """Multiply `values`, elements from number `first` on, by the scales of their blocks."""
    low, stop = first // block, first + values.size
    high = -(-stop // block)
    edges = np.clip(np.arange(low, high + 1) * block, first, stop)
    with np.errstate(over="ignore", invalid="ignore"):
        values *= np.repeat(scales(low, high - low), edges[1:] - edges[:-1])
