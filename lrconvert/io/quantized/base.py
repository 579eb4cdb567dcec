"""The contract of a method of storing quantized weights, and what every one needs.

A method is a module beside this one, named as `quant_method` in config.json (``compressed-tensors`` is
`compressed_tensors`). Its function `described(checkpoint)` gives the weights that the stored tensors stand for. No
weight is held: elements are computed as they are read. Normative text: ``formats/merge-v1.md``, section 7.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from lrconvert.core import registry
from lrconvert.core.dtypes import F32, FLOATS, STORAGE, Array, decode
from lrconvert.core.errors import QuantizedBaseError
from lrconvert.io.checkpoint import METHODS, Checkpoint, dequantizer
from lrconvert.io.container import TensorInfo

PANEL = 1 << 21  # elements that are computed at a time of a weight that is stored transposed
_SQUARE = 256
_READ_BYTES = 1 << 22
_SEEK_BYTES = 1 << 14  # to skip fewer bytes than these takes longer than to read them


def _eight_bits(exponent_bits: int, bias: int) -> F32:
    """Return the values of all 256 codes of a float of eight bits, with subnormal ones; infinities are not set."""
    codes = np.arange(256)
    mantissa_bits = 7 - exponent_bits
    exponent = (codes & 127) >> mantissa_bits
    mantissa = (codes & (1 << mantissa_bits) - 1) / (1 << mantissa_bits)
    sizes = np.where(exponent, 1 + mantissa, 2 * mantissa) * 2.0 ** (exponent - bias)
    values: F32 = np.where(codes < 128, sizes, -sizes).astype(np.float32)
    return values


def _tables() -> dict[str, F32]:
    """Return the values of floats of eight bits (Micikevicius et al., "FP8 formats for deep learning", 2022; Open
    Compute Project, "Microscaling formats", 2023)."""
    e4m3, e5m2 = _eight_bits(4, 7), _eight_bits(5, 15)
    e4m3[[0x7F, 0xFF]] = np.nan
    e5m2[[0x7C, 0xFC]] = np.inf, -np.inf
    e5m2[[*range(0x7D, 0x80), *range(0xFD, 0x100)]] = np.nan
    e8m0 = np.ldexp(np.float32(1), np.arange(256) - 127).astype(np.float32)
    e8m0[255] = np.nan
    return {"F8_E4M3": e4m3, "F8_E5M2": e5m2, "F8_E8M0": e8m0}


with np.errstate(over="ignore"):  # the last code of E8M0 is no number
    EIGHT_BITS = _tables()
FP8 = ("F8_E4M3", "F8_E5M2")


@dataclass
class Rounding:
    """Distances of values from what they stand for, in float32; counted as they are read."""

    count: int = 0
    largest: float = 0.0
    total: float = 0.0

    def add(self, values: F32, codes: Array, dtype: str) -> None:
        with np.errstate(invalid="ignore"):  # a product beyond float32
            errors = np.abs(values - decode(codes, dtype))
        self.count += errors.size
        self.largest = max(self.largest, float(errors.max(initial=0.0)))
        self.total += float(errors.sum(dtype=np.float64))


@dataclass(frozen=True)
class Weight:
    """One quantized weight: its shape, the stored tensor whose place it takes, other tensors that describe it, and
    `values(first, count)`, float32 of elements in row-major order.

    With `panel` so many elements are computed together, as single rows lie scattered in the file. `rounding` is its
    own, as tensors are read in several threads.
    """

    shape: tuple[int, ...]
    stored: str
    parts: frozenset[str]
    values: Callable[[int, int], F32]
    panel: int = 0
    rounding: Rounding = field(default_factory=Rounding)


@dataclass(frozen=True)
class Described:
    """The meaning of the stored tensors of a checkpoint: quantized weights by name, and `left_out`, tensors that
    describe how activations are quantized."""

    weights: Mapping[str, Weight]
    left_out: frozenset[str] = frozenset()


def described(method: str, checkpoint: Checkpoint) -> Described:
    """Return what a checkpoint holds that `method`, a module of this folder, has quantized. Raises E-BASE-QUANT."""
    result: Described = registry.load(METHODS, method, "described")(checkpoint)
    return result


def shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the parameters of a checkpoint, of quantized weights as they are without that. What is
    not as its method writes it is as it is stored: who reads its values hears why."""
    stored = {name: info.shape for name, info in checkpoint.tensors.items()}
    method = dequantizer(checkpoint.config)
    try:
        weights = described(method, checkpoint).weights if method else {}
    except QuantizedBaseError:
        return stored
    hidden = {part for weight in weights.values() for part in (weight.stored, *weight.parts)}
    kept = {name: shape for name, shape in stored.items() if name not in hidden}
    return kept | {name: weight.shape for name, weight in weights.items()}


@dataclass(frozen=True)
class Stored:
    """The stored tensors of the weight `name`. Everything that is not as `writer` writes it raises E-BASE-QUANT."""

    checkpoint: Checkpoint
    name: str
    writer: str

    def broken(self, why: str) -> NoReturn:
        raise QuantizedBaseError(
            f"the quantized weight {self.name!r} is not as {self.writer} writes it: {why}",
            fix="use the unquantized parent of this checkpoint",
            path=self.checkpoint.root,
        )

    def find(self, name: str) -> TensorInfo:
        """Return a tensor."""
        info = self.checkpoint.tensors.get(name)
        if info is None:
            self.broken(f"{name!r} is missing")
        return info

    def part(self, name: str, dtype: str, count: int) -> TensorInfo:
        """Return a tensor of that many elements."""
        info = self.find(name)
        size = math.prod(info.shape)
        if info.dtype != dtype or size != count:
            self.broken(f"{name!r} is {info.dtype} of {size}, not {dtype} of {count}")
        return info

    def shaped(self, name: str, dtypes: Iterable[str], *shapes: tuple[int, ...]) -> TensorInfo:
        """Return a tensor of one of these dtypes and shapes."""
        info = self.find(name)
        if info.dtype not in dtypes or (shapes and info.shape not in shapes):
            wanted = f"{' or '.join(dtypes)} {' or '.join(str(list(shape)) for shape in shapes)}".strip()
            self.broken(f"{name!r} is {info.dtype} {list(info.shape)}, not {wanted}")
        return info

    def read(self, info: TensorInfo, first: int = 0, count: int | None = None) -> Array:
        """Return `count` elements from element `first` on."""
        kind = STORAGE[info.dtype]
        nbytes = None if count is None else count * kind.itemsize
        return np.frombuffer(self.checkpoint.read(info, first * kind.itemsize, nbytes), kind)

    def numbers(self, info: TensorInfo, first: int = 0, count: int | None = None) -> F32:
        """Return elements of a tensor of real numbers as float32, none of them NaN or infinite."""
        return self.finite(info, self.read(info, first, count))

    def finite(self, info: TensorInfo, codes: Array) -> F32:
        """Return stored elements of `info` as float32. Bytes are exponents of two, as in ``F8_E8M0``."""
        dtype = "F8_E8M0" if info.dtype == "U8" else info.dtype
        if dtype not in EIGHT_BITS and dtype not in FLOATS:
            self.broken(f"{info.name!r} is {info.dtype}, no real numbers")
        values: Any = EIGHT_BITS[dtype][codes] if dtype in EIGHT_BITS else decode(codes, dtype)
        with np.errstate(over="ignore"):
            values = values.astype(np.float32, copy=False)
        if not np.isfinite(values).all():
            self.broken(f"{info.name!r} holds NaN or infinity")
        return values  # type: ignore[no-any-return]

    def window(self, info: TensorInfo, rows: range, cols: range, width: int = 0) -> Array:
        """Return a part of a tensor seen as a matrix whose rows have `width` elements, or as many as its last axis."""
        width, kind = width or info.shape[-1], STORAGE[info.dtype]
        skipped = (width - len(cols)) * kind.itemsize
        if skipped > _SEEK_BYTES:
            picked = [self.read(info, row * width + cols.start, len(cols)) for row in rows]
            return np.stack(picked) if picked else np.empty((0, len(cols)), kind)
        out = np.empty((len(rows), len(cols)), kind)
        step = max(1, _READ_BYTES // (width * kind.itemsize))
        for top in range(0, len(rows), step):
            height = min(step, len(rows) - top)
            start = (rows.start + top) * width + cols.start
            # The last row ends with its own part.
            flat = self.read(info, start, (height - 1) * width + len(cols))
            strides = (width * kind.itemsize, kind.itemsize)
            out[top : top + height] = np.lib.stride_tricks.as_strided(flat, (height, len(cols)), strides)
        return out


Block = Callable[[int, range, range], F32]


def by_owner(checkpoint: Checkpoint, leaf: str, writer: str, weight_of: Callable[[Stored, str], Weight]) -> Described:
    """Return the weights of the tensors ``OWNER.<leaf>``: OWNER's `weight` is what `weight_of(stored, OWNER)` makes."""
    weights = {}
    for name in checkpoint.tensors:
        owner, _, last = name.rpartition(".")
        if last == leaf:
            stored = Stored(checkpoint, f"{owner}.weight", writer)
            weights[stored.name] = weight_of(stored, owner)
    return Described(weights)


def by_blocks(shape: tuple[int, ...], block: Block) -> Callable[[int, int], F32]:
    """Return `values` of a weight whose `block(entry, rows, cols)` gives a part of a matrix (out, in), number `entry`
    of a stack."""
    *_, rows, cols = 1, *shape

    def values(first: int, count: int) -> F32:
        out = np.empty(count, np.float32)
        done = 0
        while done < count:
            row, col = divmod(first + done, cols)
            entry, row = divmod(row, rows)
            height, width = min(rows - row, (count - done) // cols), cols
            if col or not height:  # a part of a row
                height, width = 1, min(cols - col, count - done)
            part = out[done : done + height * width].reshape(height, width)
            _copy(block(entry, range(row, row + height), range(col, col + width)), part)
            done += height * width
        return out

    return values


def _copy(values: F32, out: F32) -> None:
    """Fill `out` in squares: what is stored transposed stays in the cache."""
    rows, cols = out.shape
    down, across = (rows, cols) if values.flags.c_contiguous else (_SQUARE, _SQUARE)
    for top in range(0, rows, down):
        for left in range(0, cols, across):
            out[top : top + down, left : left + across] = values[top : top + down, left : left + across]


def spread(numbers: F32, cols: range, size: int) -> F32:
    """Return numbers of groups of `size` columns for each of `cols`; the first ones are of the group of the first."""
    if numbers.shape[1] == 1:
        return numbers
    edges = np.arange(cols.start // size, -(-cols.stop // size) + 1) * size
    edges = edges.clip(cols.start, cols.stop)
    return np.repeat(numbers, edges[1:] - edges[:-1], axis=1)


def panel_of(shape: tuple[int, ...]) -> int:
    """Return how many elements of a weight that is stored transposed are computed together: whole rows."""
    return max(1, PANEL // shape[-1]) * shape[-1]


def suffixed(checkpoint: Checkpoint, suffixes: Iterable[str]) -> frozenset[str]:
    """Return the names of the tensors that end in one of these segments."""
    endings = tuple(f".{suffix}" for suffix in suffixes)
    return frozenset(name for name in checkpoint.tensors if name.endswith(endings))
