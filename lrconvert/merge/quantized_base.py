"""bitsandbytes checkpoints read as ordinary ones: 4-bit (NF4, FP4) and 8-bit weights appear as bf16.

Dettmers et al., "QLoRA", 2023, and "LLM.int8()", 2022. A value is what bitsandbytes computes in float32 from code and
scale, rounded once to bf16. Normative text: ``formats/merge-v1.md``, section 7. No weight is held: blocks are computed
as they are read, and so are their scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, NoReturn

import numpy as np

from lrconvert.core.dtypes import F32, STORAGE, Array, decode, round_to
from lrconvert.core.errors import LrcError, QuantizedBaseError
from lrconvert.core.limits import FOREIGN, MAX_DIM
from lrconvert.core.wording import spelled
from lrconvert.io import fields, strictjson
from lrconvert.io.checkpoint import BITSANDBYTES, Checkpoint, open_checkpoint, quantization_name, quantized_base
from lrconvert.io.container import ContainerFile, TensorInfo, encode_header

DTYPE = "BF16"
_CHUNK = 1 << 18  # elements that are computed at a time: they stay in the cache
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


@dataclass
class Rounding:
    """Distances of values from what bitsandbytes computes in float32; counted as they are read."""

    count: int = 0
    largest: float = 0.0
    total: float = 0.0

    def add(self, values: F32, codes: Array) -> None:
        with np.errstate(invalid="ignore"):  # a product beyond float32
            errors = np.abs(values - decode(codes, DTYPE))
        self.count += errors.size
        self.largest = max(self.largest, float(errors.max(initial=0.0)))
        self.total += float(errors.sum(dtype=np.float64))


@dataclass(frozen=True)
class _Weight:
    """One quantized weight: its shape, the stored tensors that describe it, and `values(first, count)`, float32 of
    elements in row-major order. `rounding` is its own, as tensors are read in several threads."""

    shape: tuple[int, ...]
    parts: frozenset[str]
    values: Callable[[int, int], F32]
    rounding: Rounding = field(default_factory=Rounding)


class DequantizedFile(ContainerFile):
    """The tensors `kept` of a weight file, quantized ones as bf16, with the header that it would have.
    `described_in` are the files that describe them: a checkpoint is cut between any two tensors."""

    def __init__(
        self,
        stored: ContainerFile,
        kept: Iterable[TensorInfo],
        weights: Mapping[str, _Weight],
        described_in: Iterable[ContainerFile],
    ) -> None:
        self.path, self.metadata = stored.path, stored.metadata
        self._stored, self._weights, self._sources = stored, weights, (stored, *described_in)
        shown = [self._shown(info) for info in kept]
        # Wider dtypes first, as safetensors lays tensors out, so that all stay aligned.
        shown.sort(key=lambda entry: -STORAGE[entry[1]].itemsize)
        self.header_bytes = encode_header(shown, self.metadata)
        tensors, end = [], len(self.header_bytes)
        for name, dtype, shape in shown:
            nbytes = math.prod(shape) * STORAGE[dtype].itemsize
            tensors.append(TensorInfo(name, dtype, shape, end, nbytes, self.path))
            end += nbytes
        self.tensors = tuple(tensors)
        self.by_name = {t.name: t for t in tensors}
        self._size = end

    @property
    def size(self) -> int:
        return self._size

    def _shown(self, info: TensorInfo) -> tuple[str, str, tuple[int, ...]]:
        weight = self._weights.get(info.name)
        return (info.name, info.dtype, info.shape) if weight is None else (info.name, DTYPE, weight.shape)

    def read(self, info: TensorInfo, offset: int = 0, nbytes: int | None = None) -> bytearray:
        """Return bytes of a tensor, or `nbytes` of them from `offset`. Raises E-BASE-QUANT for scales that are NaN."""
        weight = self._weights.get(info.name)
        if weight is None:
            return self._stored.read(self._stored.by_name[info.name], offset, nbytes)
        out = bytearray(info.nbytes - offset if nbytes is None else nbytes)
        codes = np.frombuffer(out, STORAGE[DTYPE])
        for start in range(0, codes.size, _CHUNK):
            part = codes[start : start + _CHUNK]
            try:
                values = weight.values(offset // 2 + start, part.size)
            except LrcError as error:
                raise error.at(self.path) from None
            part[:] = round_to(values, DTYPE)
            weight.rounding.add(values, part)
        return out

    def read_into(self, info: TensorInfo, offset: int, view: memoryview) -> None:
        view[:] = self.read(info, offset, len(view))

    def fileno(self) -> int:
        raise NotImplementedError("the bytes of this file are not those on the disk")

    def check_unchanged(self) -> None:
        for file in self._sources:
            file.check_unchanged()

    def close(self) -> None:
        self._stored.close()


@dataclass(frozen=True, eq=False)
class DequantizedCheckpoint(Checkpoint):
    """The checkpoint that `stored` stands for: `weights` are computed."""

    stored: Checkpoint = field(kw_only=True)
    weights: Mapping[str, _Weight] = field(kw_only=True)

    @property
    def is_derived(self) -> bool:
        return True

    @property
    def note(self) -> str:
        """A line for the user, with what was measured if everything was read."""
        method = quantization_name(self.stored.config)
        lines = [f"{len(self.weights)} tensors are dequantized from {method} to bf16"]
        if all(weight.rounding.count for weight in self.weights.values()):
            largest, mean = self.rounding_error
            lines.append(f"at most {largest:.3g} and on average {mean:.3g} from their values")
        return f"{', '.join(lines)}; an unmerge restores these, not the quantized ones"

    @property
    def rounding_error(self) -> tuple[float, float]:
        """(largest, mean) of everything, however often a tensor was read."""
        sizes = [(math.prod(weight.shape), weight.rounding) for weight in self.weights.values()]
        mean = math.fsum(size * r.total / max(1, r.count) for size, r in sizes) / sum(size for size, _ in sizes)
        return max(r.largest for _, r in sizes), mean

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stored.__exit__(kind, error, trace)


def open_base(path: Path, *, dequantize: bool = False) -> Checkpoint:
    """Open a model folder, quantized layers as they are stored; with `dequantize` one that bitsandbytes has quantized,
    as bf16.

    Raises what `open_checkpoint` raises; with `dequantize` E-BASE-QUANT for other quantizations, for a state that does
    not describe its weight, and for a base that is not quantized.
    """
    if not dequantize:
        return open_checkpoint(path, quantized=True)
    with ExitStack() as stack:
        stored = stack.enter_context(open_checkpoint(path, quantized=True))
        method = quantization_name(stored.config)
        if method and not method.startswith(BITSANDBYTES):
            raise quantized_base(stored.config, path)
        weights = _weights(stored)
        if not weights:
            raise QuantizedBaseError(
                "the base holds no quantized tensor", fix=f"leave out {spelled('dequantize', True)}", path=path
            )
        files = _files(stored, weights)
        stack.pop_all()  # what is returned closes them
    return DequantizedCheckpoint(
        root=stored.root,
        config=_config(stored.config),
        files=files,
        index_path=stored.index_path,
        index=_index(stored.index, files),
        stored=stored,
        weights=weights,
    )


def _files(stored: Checkpoint, weights: Mapping[str, _Weight]) -> tuple[DequantizedFile, ...]:
    """Return the weight files as they appear, without those that hold nothing but descriptions."""
    hidden: set[str] = set()
    described_in: dict[Path, set[ContainerFile]] = {}
    for name, weight in weights.items():
        hidden |= weight.parts
        files = described_in.setdefault(stored.tensors[name].file, set())
        files.update(stored.file_of(stored.tensors[part]) for part in weight.parts)
    kept = [(file, [info for info in file.tensors if info.name not in hidden]) for file in stored.files]
    return tuple(
        DequantizedFile(file, infos, weights, described_in.get(file.path, ())) for file, infos in kept if infos
    )


def _config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of the model as bf16."""
    kept = {key: value for key, value in config.items() if key != "quantization_config"}
    names = [key for key in ("dtype", "torch_dtype") if key in kept] or ["dtype"]
    return kept | dict.fromkeys(names, "bfloat16")


def _index(index: Mapping[str, Any], files: Iterable[DequantizedFile]) -> dict[str, Any]:
    """Return the shard index of the model as bf16; empty if there is none."""
    if not index:
        return {}
    infos = [info for file in files for info in file.tensors]
    metadata = index.get("metadata")
    totals = {
        "total_size": sum(info.nbytes for info in infos),
        "total_parameters": sum(math.prod(info.shape) for info in infos),
    }
    stated = metadata if isinstance(metadata, dict) else {}
    return {
        **index,
        "metadata": {key: totals.get(key, value) for key, value in stated.items()},
        "weight_map": {info.name: info.file.name for info in infos},
    }


# --- states ---------------------------------------------------------------------------------------------------------


_BlockSize = Annotated[int, fields.between(1, _MAX_BLOCK)]
_Shape = tuple[Annotated[int, fields.between(1, MAX_DIM)], ...]


@dataclass(frozen=True)
class _State:
    """The JSON text that describes a 4-bit weight."""

    shape: Annotated[_Shape, fields.Check(lambda shape: 0 < len(shape) <= FOREIGN.ndim, "a few dimensions")]
    blocksize: _BlockSize
    nested_blocksize: _BlockSize | None = None
    nested_offset: float | None = None


@dataclass(frozen=True)
class _Stored:
    """The stored tensors of the weight `name`. Everything that is not as bitsandbytes writes it raises E-BASE-QUANT."""

    checkpoint: Checkpoint
    name: str

    def broken(self, why: str) -> NoReturn:
        raise QuantizedBaseError(
            f"the quantized weight {self.name!r} is not as bitsandbytes writes it: {why}",
            fix="use the unquantized parent of this checkpoint",
            path=self.checkpoint.root,
        )

    def part(self, name: str, dtype: str, count: int) -> TensorInfo:
        """Return a tensor of that many elements."""
        info = self.checkpoint.tensors.get(name)
        if info is None:
            self.broken(f"{name!r} is missing")
        size = math.prod(info.shape)
        if info.dtype != dtype or size != count:
            self.broken(f"{name!r} is {info.dtype} of {size}, not {dtype} of {count}")
        return info

    def read(self, info: TensorInfo, first: int = 0, count: int | None = None) -> Array:
        """Return `count` elements from element `first` on."""
        kind = STORAGE[info.dtype]
        nbytes = None if count is None else count * kind.itemsize
        return np.frombuffer(self.checkpoint.read(info, first * kind.itemsize, nbytes), kind)

    def numbers(self, info: TensorInfo, first: int = 0, count: int | None = None) -> F32:
        """Return float32 elements, none of them NaN or infinite."""
        values = self.read(info, first, count)
        if not np.isfinite(values).all():
            self.broken(f"{info.name!r} holds NaN or infinity")
        return values


def _weights(checkpoint: Checkpoint) -> dict[str, _Weight]:
    """Return the quantized weights of a checkpoint. Raises E-BASE-QUANT for states that do not fit."""
    weights: dict[str, _Weight] = {}
    for name, info in checkpoint.tensors.items():
        weight = next((name.removesuffix(f".{state}") for state in _STATES if name.endswith(f".{state}")), "")
        if name.endswith(".SCB"):
            weight = f"{name.removesuffix('SCB')}weight"
        if not weight:
            continue
        stored = _Stored(checkpoint, weight)
        if weight in weights:
            stored.broken("it has two states")
        weights[weight] = _eight_bit(stored) if name.endswith(".SCB") else _four_bit(stored, info)
    hidden = {part for weight in weights.values() for part in weight.parts}
    for name, info in checkpoint.tensors.items():
        owner, _, part = name.rpartition(".")
        if name in weights or name in hidden:
            continue
        if part in _PARTS_4BIT and owner in checkpoint.tensors:
            _Stored(checkpoint, owner).broken(f"it has {name!r} and no quant_state")
        if part == "weight" and info.dtype in ("U8", "I8"):
            _Stored(checkpoint, name).broken("nothing says how it is quantized")
    return weights


def _four_bit(stored: _Stored, state: TensorInfo) -> _Weight:
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
    return _Weight(shape, frozenset({f"{name}.{part}" for part in suffixes} & tensors.keys()), elements)


def _scales(stored: _Stored, state: _State, blocks: int) -> Callable[[int, int], F32]:
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


def _eight_bit(stored: _Stored) -> _Weight:
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

    return _Weight(info.shape, frozenset({f"{layer}{part}" for part in _PARTS_8BIT} & tensors.keys()), elements)


def _scale(values: F32, scales: Callable[[int, int], F32], first: int, block: int) -> None:
    """Multiply `values`, elements from number `first` on, by the scales of their blocks."""
    low, stop = first // block, first + values.size
    high = -(-stop // block)
    edges = np.clip(np.arange(low, high + 1) * block, first, stop)
    with np.errstate(over="ignore", invalid="ignore"):
        values *= np.repeat(scales(low, high - low), edges[1:] - edges[:-1])
