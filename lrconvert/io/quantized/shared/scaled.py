"""Weights of eight bits with scales: one for the whole weight, one a row, or one for every rectangle of it.

An element is code * scale, or (code - zero point) * scale, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lrconvert.core.dtypes import F32, Array
from lrconvert.io.checkpoint import Checkpoint
from lrconvert.io.container import TensorInfo
from lrconvert.io.quantized.base import EIGHT_BITS, FP8, Stored, Weight, by_blocks, spread

SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")


@dataclass(frozen=True)
class Grid:
    """Numbers that hold for rectangles of `height` rows and `width` columns of every matrix of a stack, or, with
    `is_shared`, for all matrices the same."""

    stored: Stored
    info: TensorInfo
    size: tuple[int, int]
    rectangle: tuple[int, int]
    is_shared: bool

    def over(self, entry: int, rows: range, cols: range, read: Callable[[TensorInfo, Array], F32]) -> F32:
        """Return the number of every row and every rectangle of columns, and where a column's is: (rows, cols)."""
        height, width = self.rectangle
        down = range(rows.start // height, -(-rows.stop // height))
        across = range(cols.start // width, -(-cols.stop // width))
        above = 0 if self.is_shared else entry * self.size[0]
        lines = range(above + down.start, above + down.stop)
        numbers = read(self.info, self.stored.window(self.info, lines, across, self.size[1]))
        if len(down) > 1:
            numbers = numbers[np.arange(rows.start, rows.stop) // height - down.start]
        return spread(numbers, cols, width)


def grid(stored: Stored, info: TensorInfo, shape: tuple[int, ...], block: Sequence[int] = ()) -> Grid:
    """Return how the numbers of `info` lie over a weight of this shape: as rectangles of the size `block` where as many
    of these cover it, else as equal parts."""
    size = math.prod(info.shape)
    *stack, rows, cols = 1, *shape
    entries, given = math.prod(stack), tuple(info.shape)
    if size == 1:
        return Grid(stored, info, (1, 1), (rows, cols), True)
    if given in (tuple(shape[:-2]), (*shape[:-2], 1)) and entries > 1:
        return Grid(stored, info, (1, 1), (rows, cols), False)
    if given == (rows,) and len(shape) == 2:
        return Grid(stored, info, (rows, 1), (1, cols), False)
    if len(given) != len(shape) or given[:-2] != tuple(shape[:-2]):
        stored.broken(f"{info.name!r} is {list(given)} for a weight of {list(shape)}")
    parts = [
        _part(length, count, block[axis] if block else 0)
        for axis, (length, count) in enumerate(zip((rows, cols), given[-2:], strict=True))
    ]
    if 0 in parts:
        stored.broken(f"{info.name!r} is {list(given)} for a weight of {list(shape)}: no equal blocks cover it")
    return Grid(stored, info, (given[-2], given[-1]), (parts[0], parts[1]), False)


def _part(length: int, count: int, block: int) -> int:
    """Return how long each of `count` parts of a line is, the last one perhaps shorter; 0 if nothing tells."""
    if count == 1:
        return length
    if block and -(-length // block) == count:
        return block
    return length // count if length % count == 0 else 0


def weight(
    stored: Stored, scale: TensorInfo, block: Sequence[int] = (), *, zero_point: TensorInfo | None = None
) -> Weight:
    """Return the weight `stored.name`, floats or integers of eight bits, with its scales."""
    info = stored.find(stored.name)
    if info.dtype not in (*FP8, "I8"):
        stored.broken(f"it is {info.dtype}, and has {scale.name!r}")
    if len(info.shape) < 2:
        stored.broken(f"it is {list(info.shape)}, no matrix")
    if scale.dtype not in SCALES:
        stored.broken(f"{scale.name!r} is {scale.dtype}, not {', '.join(SCALES)}")
    scales = grid(stored, scale, info.shape, block)
    zeros = None if zero_point is None else grid(stored, zero_point, info.shape, block)
    height, cols = info.shape[-2:]

    def block_of(entry: int, rows: range, columns: range) -> F32:
        lines = range(entry * height + rows.start, entry * height + rows.stop)
        codes = stored.window(info, lines, columns, cols)
        values: F32 = codes.astype(np.float32) if info.dtype == "I8" else np.take(EIGHT_BITS[info.dtype], codes)
        if zeros is not None:
            values -= zeros.over(entry, rows, columns, lambda info, codes: codes.astype(np.float32))
        with np.errstate(over="ignore", invalid="ignore"):
            values *= scales.over(entry, rows, columns, stored.finite)
        return values

    parts = frozenset({scale.name} if zero_point is None else {scale.name, zero_point.name})
    return Weight(info.shape, stored.name, parts, by_blocks(info.shape, block_of))


def scale_names(name: str, suffixes: Iterable[str]) -> list[str]:
    """Return the names that the scales of a weight may have: ``x.weight_scale_inv`` beside ``x.weight``, or where a
    suffix begins with a dot, ``x.scale``."""
    owner = name.removesuffix(".weight")
    return [f"{owner}{s}" if s.startswith(".") else f"{name}{s}" for s in suffixes]


def weights(
    checkpoint: Checkpoint,
    writer: str,
    suffixes: Sequence[str],
    block: Sequence[int] = (),
    *,
    dtypes: Sequence[str] = FP8,
) -> dict[str, Weight]:
    """Return every weight of these `dtypes` with its scales. Raises E-BASE-QUANT for one without, or with two."""
    found = {}
    for name, info in checkpoint.tensors.items():
        names = [scale for scale in scale_names(name, suffixes) if scale in checkpoint.tensors]
        if info.dtype not in FP8 or name.endswith(tuple(suffixes)):  # a scale may have eight bits, too
            continue
        stored = Stored(checkpoint, name, writer)
        if len(names) != 1:
            stored.broken(f"it has {' and '.join(names)}" if names else f"{name + suffixes[0]!r} is missing")
        found[name] = weight(stored, checkpoint.tensors[names[0]], block)
    return found
