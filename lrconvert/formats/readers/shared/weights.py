"""The tensors of a foreign adapter, from a safetensors or npz file, or from a pickle if the user allows it."""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

from lrconvert.core.dtypes import FLOATS, STORAGE, Stored
from lrconvert.core.errors import (
    DependencyError,
    DtypeError,
    FileKindError,
    HeaderLengthError,
    HeaderTextError,
    LimitError,
    LrcError,
    PickleError,
    ShapeError,
    TensorUnknownError,
    ValueRangeError,
)
from lrconvert.core.limits import ADAPTER, MAX_INDEX_BYTES
from lrconvert.core.wording import spelled
from lrconvert.formats.readers.shared import eight_bits, wrappers
from lrconvert.formats.readers.shared.files import ForeignFile, check_name, check_shape
from lrconvert.formats.readers.shared.folders import INDEX
from lrconvert.formats.readers.shared.npz import NpzFile
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.io import mistaken
from lrconvert.io.checkpoint import check_index, shard_paths
from lrconvert.io.container import ContainerFile, TensorInfo, combined_digest, read_json, tensor_digest
from lrconvert.io.quantized.base import FP8
from lrconvert.lora.adapter import ExtraTensor, Use

if TYPE_CHECKING:
    import torch

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
# torch's tensors-only loader could be made to run code before this release (CVE-2025-32434, CVE-2026-24747).
_SAFE_TORCH = (2, 10)
_MOST_LEVELS = 8  # of dicts in dicts
_SHARED = 4  # tensors may share memory, so that they are larger than their file; not by more than this
_DTYPES = {
    **{"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"},
    **{"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"},
    **{"int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"},
}


# Parts of an adapter, by their names: one that is empty is missed.
_PART = re.compile(r"(?i)lora|lokr|loha|hada_|vblora|(miss|bone)_block|modules_to_save|\.(up|down)\.|(^|\.)w_[ab]_")


class Weights:
    """The tensors of an adapter, from one file or from shards. A context manager.

    `tensors` have their plain names (`wrappers`); those that are empty are left out, their names are `empty`. `notes`
    are warnings of both. `metadata` are the texts and settings that stand beside the tensors. `lost`: by the name of a
    B, what its pair lacks of the update (`LoraTarget.lost`).
    """

    lost: Mapping[str, float] = {}

    def __init__(self, path: Path, files: Sequence[ContainerFile | ForeignFile]) -> None:
        """Takes open files over. Raises E-TENSOR for two names of one meaning, E-SHAPE for an empty part of a LoRA."""
        self.path, self._files = path, tuple(files)
        try:
            self._name_tensors()
        except LrcError:
            self.close()
            raise

    def _name_tensors(self) -> None:
        files = self._files
        self.metadata = {key: value for file in files for key, value in file.metadata.items()}
        self.stored = tuple(info for file in files for info in file.tensors)
        filled = [info for info in self.stored if 0 not in info.shape]
        names, notes = wrappers.plain([info.name for info in filled])
        self._stored_as: dict[str, TensorInfo] = {}
        for name, info in zip(names, filled, strict=True):
            other = self._stored_as.setdefault(name, info)
            if other is not info:
                what = f"tensors {other.name!r:.200} and {info.name!r:.200} mean the same"
                raise TensorUnknownError(what, fix="remove one of them")
        self.tensors = tuple(
            TensorInfo(name, info.dtype, info.shape, info.start, info.nbytes, info.file)
            for name, info in self._stored_as.items()
        )
        self.empty = tuple(info.name for info in self.stored if 0 in info.shape)
        self._set_scales_aside(notes)
        _check_empty(self.empty, names)
        if self.empty:
            notes.append(
                f"{len(self.empty)} tensors are empty, as DeepSpeed's ZeRO-3 leaves what is on other devices, and are "
                f"left out: {self.empty[0]!r:.120} for one"
            )
        self.notes = tuple(notes)

    def _set_scales_aside(self, notes: list[str]) -> None:
        """Take the scales of numbers of eight bits out of `tensors`, and the mark of files that have any."""
        by_name = {info.name: info for info in self.tensors}
        self._scales = {name: by_name[scale] for name, scale in eight_bits.scales(by_name).items()}
        aside = {eight_bits.MARK, *(info.name for info in self._scales.values())}
        self.tensors = tuple(info for info in self.tensors if info.name not in aside)
        self.empty = tuple(name for name in self.empty if name != eight_bits.MARK)
        notes += eight_bits.notes(self.tensors, self._scales)

    @cached_property
    def _by_path(self) -> dict[Path, ContainerFile | ForeignFile]:
        return {file.path: file for file in self._files}

    def read(self, info: TensorInfo) -> bytes | bytearray:
        """Return the bytes of one of `tensors`, as a safetensors file would hold them."""
        return self._by_path[info.file].read(self._stored_as[info.name])

    def pieces_of_stored(self, info: TensorInfo) -> Iterable[bytes | bytearray | memoryview]:
        """Return the bytes of one of `stored` in pieces, each valid until the next."""
        file = self._by_path[info.file]
        return file.chunks(info) if isinstance(file, ContainerFile) else [file.read(info)]

    def load(self, info: TensorInfo) -> Stored:
        """Return one of `tensors` with its stored bits."""
        return self._by_path[info.file].load(self._stored_as[info.name])

    def load_floats(self, info: TensorInfo) -> Stored:
        """Return one of `tensors` as real numbers: with its stored bits, those of eight bits wider. Raises E-DTYPE,
        E-PAIR."""
        if info.dtype in FP8:
            scale = self._scales.get(info.name)
            return eight_bits.decoded(self.load(info), None if scale is None else load_finite(self, scale), info.name)
        if info.dtype not in FLOATS:
            raise DtypeError(
                f"tensor {info.name!r} is {info.dtype}, expected one of {', '.join((*FLOATS, *FP8))}: integers are "
                "codes of a quantization that the file does not describe",
                fix="save the adapter again in F32, F16 or BF16 with the tool that trained it",
            )
        return self.load(info)

    def check_unchanged(self) -> None:
        """Raise E-IO-CHANGED if a file differs from when it was opened."""
        for file in self._files:
            file.check_unchanged()

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check_empty(empty: Sequence[str], names: Sequence[str]) -> None:
    """Raise E-SHAPE if one of the empty tensors is a part of the adapter, or none of the others is."""
    parts = [name for name in empty if _PART.search(name)]
    if parts:
        raise empty_part(parts[0])
    if empty and not any(_PART.search(name) for name in names):
        raise ShapeError(f"tensor {empty[0]!r:.200} is empty, and no other is a part of an adapter")


def empty_part(name: str) -> ShapeError:
    """Return the error for a part of an adapter that was saved without its numbers."""
    return ShapeError(
        f"tensor {name!r:.200} is a part of the adapter and is empty: it was saved under DeepSpeed's ZeRO-3 "
        "while its numbers were on other devices",
        fix="save it again with stage3_gather_16bit_weights_on_model_save, or make the weights with the checkpoint's "
        "zero_to_fp32.py",
    )


def open_weights(path: Path, options: ReadOptions) -> Weights:
    """Open a file of tensors, or the shards of an index. Raises E-PICKLE for a ``.bin`` or ``.pt`` unless pickles are
    allowed, the errors of `Weights`, and of an index E-INDEX-MAP, E-PATH and E-IO-KIND."""
    files: list[ContainerFile | ForeignFile] = []
    try:
        if not path.name.endswith(INDEX):
            files.append(_open_file(path, options))
            return Weights(path, files)
        index = read_json(path, MAX_INDEX_BYTES)
        for shard in shard_paths(index, path, Path(path.name.removesuffix(INDEX)).suffix):
            files.append(_open_file(shard, options))
        stored = [(info.name, file.path.name) for file in files for info in file.tensors]
        check_index(index["weight_map"], stored, path)
        return Weights(path, files)
    except BaseException as error:
        for file in files:
            file.close()
        raise error.at(path) if isinstance(error, LrcError) else error from None


def _open_file(path: Path, options: ReadOptions) -> ContainerFile | ForeignFile:
    if path.suffix == ".npz":
        return NpzFile(path)
    if path.suffix not in _PICKLE_SUFFIXES:
        try:
            return ContainerFile(path, ADAPTER)
        except (FileKindError, HeaderLengthError, HeaderTextError) as error:
            raise mistaken.by_content(path) or error from None
    if (mistake := mistaken.by_content(path)) is not None:
        raise mistake
    if not options.allow_pickle:
        raise PickleError(
            "the adapter is stored as a pickle, which can run code when it is loaded",
            fix="save it again as safetensors (PEFT: load it and save_pretrained it), or pass "
            f"{spelled('allow_pickle', True)} if you trust it",
            path=path,
        )
    return PickledFile(path)


def load_finite(weights: Weights, info: TensorInfo) -> Stored:
    """Return a tensor of real numbers with its stored bits. Raises E-DTYPE, and E-VALUE for NaN and infinity."""
    stored = weights.load_floats(info)
    if not stored.is_finite():
        fix = "the training diverged; use an earlier checkpoint"
        raise ValueRangeError(f"tensor {info.name!r} holds NaN or infinity", fix=fix)
    return stored


def load_extra(name: str, info: TensorInfo, weights: Weights) -> ExtraTensor:
    """Return a tensor of any kind as an extra, byte for byte."""
    return ExtraTensor(name, info.dtype, info.shape, bytes(weights.read(info)))


def load_finite_extra(name: str, info: TensorInfo, weights: Weights, use: Use) -> ExtraTensor:
    """Return a tensor of finite numbers as an extra, with its stored bits. Raises E-DTYPE, E-VALUE."""
    stored = load_finite(weights, info)
    return ExtraTensor(name, stored.dtype, stored.shape, stored.array.tobytes(), use)


def source_digest(weights: Weights) -> str:
    """Return the sha256 over all tensors of the file, in hex. Raises E-IO-CHANGED if the file changed meanwhile."""
    digest = combined_digest(
        (info.name, tensor_digest(info.name, info.dtype, info.shape, weights.pieces_of_stored(info)))
        for info in weights.stored
    )
    weights.check_unchanged()
    return digest


# --- pickles --------------------------------------------------------------------------------------------------------


class PickledFile(ForeignFile):
    """A pickled dict of tensors, as ``torch.save`` writes it. The same tensors as a safetensors file of them gives.
    Those of a pickled list are named by their places: ``0``, ``1``."""

    def _read_header(self, size: int) -> tuple[TensorInfo, ...]:
        _check_zip(self._file, size)
        state, self.metadata = _flattened(_unpickle(self._file))
        self._values = {name: value.detach().resolve_conj().resolve_neg() for name, value in state.items()}
        tensors = tuple(_info(name, value, self.path) for name, value in state.items())
        nbytes = sum(info.nbytes for info in tensors)
        if nbytes > _SHARED * size:
            raise LimitError(f"the tensors have {nbytes} bytes, the file {size}")
        return tensors

    def read(self, info: TensorInfo) -> bytes:
        """Return the bytes of a tensor, as a safetensors file would hold them."""
        import torch

        if not info.nbytes:
            return b""
        return self._values[info.name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _check_zip(file: IO[bytes], size: int) -> None:
    """Refuse a zip that would grow when it is unpacked; torch writes its own uncompressed. Older files are no zips."""
    if file.read(2) == b"PK":
        try:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise PickleError(f"the zip cannot be read: {error}", fix="was a download cut off?") from None
        if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or sum(e.file_size for e in entries) > size:
            raise PickleError("the zip is compressed, which torch.save does not do")
    file.seek(0)


def _unpickle(file: IO[bytes]) -> Any:
    """Return what is in a pickle, by torch's loader that builds nothing but tensors. Raises E-PICKLE, E-DEPENDENCY."""
    try:
        import torch
    except ImportError:
        raise DependencyError("a pickle is read with torch, which is not installed", fix="pip install torch") from None
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < _SAFE_TORCH:
        raise DependencyError(f"the pickle loader of torch {torch.__version__} has known holes", fix="use torch 2.10")
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a stranger's bytes provoke in there
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise PickleError(f"the pickle holds more than tensors, or is damaged: {reason[0]:.200}") from None


def _flattened(state: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return (tensors, settings) of a pickled dict or list. What is nested has names with dots, but for one level that
    holds all tensors (``{"state_dict": ...}``). Raises E-PICKLE for anything but tensors and plain settings."""
    if isinstance(state, list):
        state = {str(place): value for place, value in enumerate(state)}
    if not isinstance(state, dict):
        raise PickleError(f"the pickle holds a {type(state).__name__}, not a dict of tensors")
    tensors: dict[str, torch.Tensor] = {}
    settings: dict[str, str] = {}
    _flatten(state, "", 0, tensors, settings)
    levels = {name.partition(".")[0] for name in tensors}
    level = next(iter(levels)) if len(levels) == 1 else ""
    if isinstance(state.get(level), dict) and level.replace("_", "").isalpha():  # layer_0 is a part of the model
        tensors = {name.removeprefix(f"{level}."): value for name, value in tensors.items()}
    return tensors, settings


def _flatten(
    table: Mapping[Any, Any], prefix: str, depth: int, tensors: dict[str, torch.Tensor], settings: dict[str, str]
) -> None:
    import torch

    for key, value in table.items():
        name = f"{prefix}{key}"
        if isinstance(key, str) and isinstance(value, torch.Tensor):
            tensors[name] = value
        elif isinstance(key, str) and isinstance(value, dict) and value and depth < _MOST_LEVELS:
            _flatten(value, f"{name}.", depth + 1, tensors, settings)
        elif isinstance(key, str) and _is_setting(value):
            settings[name] = str(value)
        else:
            what = f"the pickle's entry {name!r:.120} is a {type(value).__name__}, not a named tensor"
            raise PickleError(what, fix="save the adapter's tensors alone, as one dict" if prefix else "")


def _is_setting(value: Any) -> bool:
    """Return whether a value is a plain setting, or a list of them."""
    if isinstance(value, (list, tuple)):
        return all(isinstance(entry, (str, int, float)) for entry in value)
    return value is None or isinstance(value, (str, int, float))


def _info(name: str, value: torch.Tensor, path: Path) -> TensorInfo:
    """Describe one tensor, by the rules of `container`. Raises E-NAME, E-DTYPE, E-SHAPE, E-LIMIT."""
    check_name(name)
    dtype = _DTYPES.get(str(value.dtype).removeprefix("torch."))
    if dtype is None or str(value.layout) != "torch.strided" or value.is_quantized or value.device.type != "cpu":
        raise DtypeError(f"tensor {name!r} is a {value.dtype} ({value.layout}), which is not read")
    shape = tuple(value.shape)
    check_shape(name, shape, ADAPTER)
    nbytes = math.prod(shape) * STORAGE[dtype].itemsize
    if nbytes > value.untyped_storage().nbytes():  # a repeating view: a few bytes that claim to be many
        raise LimitError(f"tensor {name!r} has {nbytes} bytes, of which {value.untyped_storage().nbytes()} are stored")
    return TensorInfo(name, dtype, shape, 0, nbytes, path)
