"""bitsandbytes checkpoints read as ordinary ones: 4-bit (NF4, FP4) and 8-bit weights appear as bf16.

Dettmers et al., "QLoRA", 2023, and "LLM.int8()", 2022. A value is what bitsandbytes computes in float32 from code and
scale, rounded once to bf16. Normative text: ``formats/merge-v1.md``, section 7. No weight is held: blocks are computed
as they are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lrconvert import strictjson
from lrconvert.container import Appendable, Checkpoint, ContainerFile, TensorInfo, encode_header, open_checkpoint
from lrconvert.dtypes import F32, STORAGE, Array, decode, round_to
from lrconvert.errors import LrcError, QuantizedBaseError
from lrconvert.limits import FOREIGN, MAX_DIM

DTYPE = "BF16"
_CHUNK = 1 << 22  # elements that are computed at a time
_STATES = ("quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4")
_PARTS_4BIT = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *_STATES)
_PARTS_8BIT = ("SCB", "weight_format")
_INT8 = np.float32(7.874015718698502e-3)  # 1 / 127 as bitsandbytes has it


@dataclass
class Rounding:
    """How far values are from what bitsandbytes computes in float32; counted as they are read."""

    count: int = 0
    largest: float = 0.0
    total: float = 0.0

    def add(self, values: F32, codes: Array) -> None:
        errors = np.abs(values - decode(codes, DTYPE))
        self.count += errors.size
        self.largest = max(self.largest, float(errors.max(initial=0.0)))
        self.total += float(errors.sum(dtype=np.float64))

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0


@dataclass(frozen=True)
class _Weight:
    """One quantized weight: its shape, and `values(first, count)`, float32 of elements in row-major order."""

    shape: tuple[int, ...]
    values: Callable[[int, int], F32]


class DequantizedFile(ContainerFile):
    """A weight file whose quantized tensors appear as bf16, with the header that it would have; the others are as they
    are."""

    def __init__(self, path: Path, rounding: Rounding) -> None:
        super().__init__(path)
        self._rounding = rounding
        self._stored = _Stored(self, dict(self.by_name))
        try:
            self._weights = _weights(self._stored)
        except LrcError as error:
            self.close()
            raise error.at(path) from None
        shown = [self._shown(info) for info in self.tensors if not self._is_part(info.name)]
        # Wider dtypes first, as safetensors lays tensors out, so that all stay aligned.
        shown.sort(key=lambda entry: -STORAGE[entry[1]].itemsize)
        self.header_bytes = encode_header(shown, self.metadata)
        tensors, at = [], len(self.header_bytes)
        for name, dtype, shape in shown:
            nbytes = math.prod(shape) * STORAGE[dtype].itemsize
            tensors.append(TensorInfo(name, dtype, shape, at, nbytes, path))
            at += nbytes
        self.tensors = tuple(tensors)
        self.by_name = {t.name: t for t in tensors}
        self._size = at

    @property
    def size(self) -> int:
        return self._size

    @property
    def count(self) -> int:
        """How many tensors are quantized."""
        return len(self._weights)

    def _is_part(self, name: str) -> bool:
        """Whether a stored tensor describes how a weight is quantized."""
        return any(name.startswith(f"{w}.") for w in self._owners(name)) or any(
            name == f"{w.removesuffix('weight')}{part}" for w in self._weights for part in _PARTS_8BIT
        )

    def _owners(self, name: str) -> list[str]:
        """The quantized weights that `name` may be a part of."""
        found = [name.removesuffix(f".{part}") for part in _PARTS_4BIT if name.endswith(f".{part}")]
        return [weight for weight in found if weight in self._weights]

    def _shown(self, info: TensorInfo) -> tuple[str, str, tuple[int, ...]]:
        weight = self._weights.get(info.name)
        return (info.name, info.dtype, info.shape) if weight is None else (info.name, DTYPE, weight.shape)

    def read(self, info: TensorInfo, offset: int = 0, nbytes: int | None = None) -> bytearray:
        """Bytes of a tensor, or `nbytes` of them from `offset`."""
        weight = self._weights.get(info.name)
        if weight is None:
            return super().read(self._stored.by_name[info.name], offset, nbytes)
        count = info.nbytes - offset if nbytes is None else nbytes
        out = bytearray(count)
        codes = np.frombuffer(out, STORAGE[DTYPE])
        for at in range(0, codes.size, _CHUNK):
            values = weight.values(offset // 2 + at, min(_CHUNK, codes.size - at))
            codes[at : at + values.size] = round_to(values, DTYPE)
            self._rounding.add(values, codes[at : at + values.size])
        return out

    def copy(self, info: TensorInfo, writer: Appendable) -> None:
        for offset in range(0, info.nbytes, 2 * _CHUNK):
            writer.write(self.read(info, offset, min(2 * _CHUNK, info.nbytes - offset)))


@dataclass(frozen=True, eq=False)
class DequantizedCheckpoint(Checkpoint):
    """A checkpoint of which some tensors are computed. `rounding` grows as they are read; `method` names how they are
    stored."""

    rounding: Rounding = field(default_factory=Rounding)
    method: str = ""

    @property
    def is_derived(self) -> bool:
        return True

    @cached_property
    def note(self) -> str:
        """One line for the user, after everything was read."""
        count = sum(file.count for file in self.files if isinstance(file, DequantizedFile))
        return (
            f"{count} tensors were dequantized from {self.method} to bf16, at most {self.rounding.largest:.3g} and on "
            f"average {self.rounding.mean:.3g} from their values; an unmerge restores these, not the quantized ones"
        )


def open_base(path: Path, *, dequantize: bool = False) -> Checkpoint:
    """A model folder; with `dequantize` one that bitsandbytes has quantized, as bf16.

    Raises what `open_checkpoint` raises; E-BASE-QUANT for other quantizations, for a state that does not describe its
    weight, and, with `dequantize`, for a base that is not quantized.
    """
    if not dequantize:
        return open_checkpoint(path)
    with open_checkpoint(path, quantized=True) as stored:
        rounding = Rounding()
        files: list[DequantizedFile] = []
        try:
            files += (DequantizedFile(file.path, rounding) for file in stored.files)
            if not any(file.count for file in files):
                raise QuantizedBaseError("the base holds no quantized tensor", fix="leave out --dequantize", path=path)
        except BaseException:
            for file in files:
                file.close()
            raise
    settings = _table(stored.config.get("quantization_config"))
    return DequantizedCheckpoint(
        root=stored.root,
        config=_config(stored.config),
        files=tuple(files),
        index_path=stored.index_path,
        index=_index(stored.index, files),
        rounding=rounding,
        method=f"bitsandbytes {8 if settings.get('load_in_8bit') else 4} bit",
    )


def _config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the model as bf16."""
    kept = {key: value for key, value in config.items() if key != "quantization_config"}
    names = [key for key in ("dtype", "torch_dtype") if key in kept] or ["dtype"]
    return kept | dict.fromkeys(names, "bfloat16")


def _index(index: Mapping[str, Any], files: Sequence[DequantizedFile]) -> dict[str, Any]:
    """The shard index of the model as bf16; empty if there is none."""
    if not index:
        return {}
    total = sum(info.nbytes for file in files for info in file.tensors)
    names = {info.name: file.path.name for file in files for info in file.tensors}
    return {**index, "metadata": {**_table(index.get("metadata")), "total_size": total}, "weight_map": names}


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


# --- states ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stored:
    """The tensors of a file as they are stored."""

    file: ContainerFile
    by_name: Mapping[str, TensorInfo]

    def read(self, info: TensorInfo, first: int = 0, count: int | None = None) -> Array:
        """`count` elements from element `first` on."""
        kind = STORAGE[info.dtype]
        nbytes = None if count is None else count * kind.itemsize
        return np.frombuffer(ContainerFile.read(self.file, info, first * kind.itemsize, nbytes), kind)


def _weights(file: _Stored) -> dict[str, _Weight]:
    """The quantized weights of a file. Raises E-BASE-QUANT for states that do not fit."""
    found = {}
    for name, info in file.by_name.items():
        for state in _STATES:
            if name.endswith(f".{state}"):
                weight = name.removesuffix(f".{state}")
                found[weight] = _four_bit(file, weight, info)
        if name.endswith(".SCB"):
            weight = f"{name.removesuffix('SCB')}weight"
            found[weight] = _eight_bit(file, weight, info)
    return found


def _part(file: _Stored, weight: str, name: str, dtype: str, count: int | None = None) -> TensorInfo:
    """A tensor of a state. Raises E-BASE-QUANT if it is missing or of another kind."""
    info = file.by_name.get(name)
    if info is None:
        raise _broken(weight, f"{name!r} is missing")
    size = math.prod(info.shape)
    if info.dtype != dtype or (count is not None and size != count):
        raise _broken(weight, f"{name!r} is {info.dtype} of {size}, not {dtype} of {count if count else 'any size'}")
    return info


def _broken(weight: str, why: str) -> QuantizedBaseError:
    return QuantizedBaseError(
        f"the quantized weight {weight!r} is not as bitsandbytes writes it: {why}",
        fix="use the unquantized parent of this checkpoint",
    )


def _four_bit(file: _Stored, weight: str, state: TensorInfo) -> _Weight:
    if state.nbytes > 1 << 16:
        raise _broken(weight, "its state has more than 64 KiB")
    values = strictjson.parse(file.read(state).tobytes(), depth=FOREIGN.json_depth, floats=True)
    shape = values.get("shape") if isinstance(values, dict) else None
    if not isinstance(shape, list) or not all(type(n) is int and 0 < n <= MAX_DIM for n in shape) or not shape:
        raise _broken(weight, "its state has no shape")
    size, block = math.prod(shape), _whole(weight, values, "blocksize")
    packed = _part(file, weight, weight, "U8", -(-size // 2))
    blocks = -(-size // block)
    table = _finite(weight, file, _part(file, weight, f"{weight}.quant_map", "F32", 16))
    nested = f"{weight}.nested_absmax" in file.by_name
    absmax = _part(file, weight, f"{weight}.absmax", "U8" if nested else "F32", blocks)
    if nested:
        inner = _whole(weight, values, "nested_blocksize")
        outer_table = _finite(weight, file, _part(file, weight, f"{weight}.nested_quant_map", "F32", 256))
        scales = _finite(weight, file, _part(file, weight, f"{weight}.nested_absmax", "F32", -(-blocks // inner)))
        offset = values.get("nested_offset")
        if isinstance(offset, bool) or not isinstance(offset, (int, float)):
            raise _broken(weight, "its state has no nested_offset")
        shift = np.float32(offset)

    def sizes(first: int, count: int) -> F32:
        """Scales of blocks."""
        stored = file.read(absmax, first, count)
        if not nested:
            return stored
        found: F32 = outer_table[stored] * scales[np.arange(first, first + count) // inner] + shift
        return found

    def elements(first: int, count: int) -> F32:
        begin, end = first // 2, -(-(first + count) // 2)
        codes = file.read(packed, begin, end - begin)
        pairs = np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)[first - 2 * begin :][:count]
        low, high = first // block, -(-(first + count) // block)
        found: F32 = table[pairs] * sizes(low, high - low)[np.arange(first, first + count) // block - low]
        return found

    return _Weight(tuple(shape), elements)


def _whole(weight: str, values: Mapping[str, Any], key: str) -> int:
    value = values.get(key)
    if type(value) is not int or not 1 <= value <= 1 << 20:
        raise _broken(weight, f"its state has no {key}")
    return value


def _finite(weight: str, file: _Stored, info: TensorInfo) -> F32:
    values = file.read(info)
    if not np.isfinite(values).all():
        raise _broken(weight, f"{info.name!r} holds NaN or infinity")
    return values


def _eight_bit(file: _Stored, weight: str, scb: TensorInfo) -> _Weight:
    info = file.by_name.get(weight)
    if info is None or info.dtype != "I8" or len(info.shape) != 2:
        raise _broken(weight, "there is no matrix of I8")
    kind = file.by_name.get(f"{weight.removesuffix('weight')}weight_format")
    if kind is not None and (kind.nbytes != 1 or file.read(kind).tobytes() != b"\0"):
        raise _broken(weight, "its weight_format is not that of rows")
    rows, cols = info.shape
    scales = _finite(weight, file, _part(file, weight, scb.name, "F32", rows))

    def elements(first: int, count: int) -> F32:
        codes = file.read(info, first, count).astype(np.float32)
        found: F32 = codes * scales[np.arange(first, first + count) // cols] * _INT8
        return found

    return _Weight(info.shape, elements)
