"""Safetensors files: strict header reading, canonical header writing, pread access, sharded checkpoints.

A strict subset of what the safetensors library accepts (a differential test shows it): no duplicate names, no gaps, no
zero-size tensors, no unknown fields. Data is read by `pread` into memory we own: a file that shrinks under a memory
map kills the process, a short read is an error. Nothing here loads a tensor that was not asked for.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from lrconvert.core import errors
from lrconvert.core.dtypes import STORAGE, Stored, itemsize
from lrconvert.core.errors import LrcError
from lrconvert.core.limits import FOREIGN, MAX_CONFIG_BYTES, MAX_INDEX_BYTES, MAX_SHARDS, Limits
from lrconvert.io import strictjson

PIPELINE_NAME = "model_index.json"  # of a diffusers pipeline
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
JOURNAL = ".lrconvert/journal"  # of a model that is being changed in place
READY_NAME = "ready.json"  # in it from the first changed byte to the last
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
_SHARED_BLOB = re.compile(r"([0-9a-f]{2})/\1[0-9a-f]{62}")
_COPY_BYTES = 1 << 22
_BITSANDBYTES = "bitsandbytes"


@dataclass(frozen=True)
class TensorInfo:
    """The place of a tensor: `start` is its absolute byte offset in `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int
    file: Path


# --- files ----------------------------------------------------------------------------------------------------------


def open_regular(path: Path) -> tuple[int, os.stat_result]:
    """Return a descriptor of a regular file, to read, and its stat. Raises E-IO-KIND for anything else, never waits."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise errors.FileKindError(f"cannot be opened: {error.strerror}", path=path) from None
    info = os.fstat(descriptor)
    if not stat.S_ISREG(info.st_mode):
        os.close(descriptor)
        raise errors.FileKindError("is not a regular file", path=path)
    return descriptor, info


def pread(descriptor: int, nbytes: int, offset: int, path: Path) -> bytearray:
    """Read exactly `nbytes` from `offset` into memory of our own. Raises E-IO-CHANGED if the file ends early."""
    buffer = bytearray(nbytes)
    view = memoryview(buffer)
    done = 0
    while done < nbytes:
        try:
            nread = os.preadv(descriptor, [view[done : done + (1 << 30)]], offset + done)
        except OSError as error:
            raise errors.FileReadError(f"cannot be read: {error.strerror}", path=path) from None
        if nread == 0:
            raise errors.FileChangedError("the file ended early; it changed while it was read", path=path)
        done += nread
    return buffer


def read_small(path: Path, limit: int) -> bytes:
    """Read the whole of a small file. Raises E-IO-KIND, or E-LIMIT if it is larger than `limit` bytes."""
    descriptor, info = open_regular(path)
    try:
        if info.st_size > limit:
            raise errors.LimitError(f"the file has {info.st_size} bytes; at most {limit} are read", path=path)
        return bytes(pread(descriptor, info.st_size, 0, path))
    finally:
        os.close(descriptor)


def read_json(path: Path, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Read the JSON object of another tool's file (floats and null allowed, duplicates refused)."""
    try:
        value = strictjson.parse(read_small(path, limit), depth=FOREIGN.json_depth, floats=True)
    except LrcError as error:
        raise error.at(path) from None
    if not isinstance(value, dict):
        raise errors.JsonSyntaxError("the file does not hold a JSON object", path=path)
    return value


# --- headers --------------------------------------------------------------------------------------------------------


def encode_header(entries: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Return length and JSON of a safetensors header for tensors laid out in the given order, padded to 8 bytes.

    `entries` are (name, dtype, shape). With at most one metadata key the bytes equal those of the safetensors library
    for tensors in its order; with more, keys are sorted (the library's order is random).
    """
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    offset = 0
    for name, dtype, shape in entries:
        stop = offset + itemsize(dtype) * int(np.prod(shape, dtype=object))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _integers(value: Any, count: int | None) -> tuple[int, ...]:
    """`value` as non-negative integers (booleans are not), or E-SHAPE."""
    integers = isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)
    if not integers or (count is not None and len(value) != count):
        wanted = f"{'' if count is None else f'{count} '}non-negative integers"
        raise errors.ShapeError(f"{value!r:.60} is not a list of {wanted}")
    return tuple(value)


def _check_name(name: str, limits: Limits) -> None:
    if not name or len(name.encode("utf-8", "replace")) > limits.name_bytes:
        raise errors.TensorNameError(f"a tensor name is empty or longer than {limits.name_bytes} bytes")
    if not name.isprintable():
        raise errors.TensorNameError(f"the tensor name {name!r} has control characters")


def _entry(name: str, value: Any, limits: Limits) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, begin, end) of one header entry, checked on its own."""
    _check_name(name, limits)
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise errors.UnknownFieldError(f"the header entry of {name!r} does not have exactly dtype, shape, data_offsets")
    dtype = value["dtype"]
    if not isinstance(dtype, str) or dtype not in STORAGE:
        raise errors.DtypeError(f"tensor {name!r} has the unknown dtype {dtype!r:.40}")
    shape = _integers(value["shape"], None)
    if len(shape) > limits.ndim or any(not 0 < n <= limits.dim for n in shape):
        what = f"tensor {name!r} has shape {list(shape)!s:.80}"
        raise errors.ShapeError(f"{what}; at most {limits.ndim} dimensions of 1 to {limits.dim} are read")
    begin, end = _integers(value["data_offsets"], 2)
    nbytes = math.prod(shape) * itemsize(dtype)
    if end - begin != nbytes:
        raise errors.DtypeError(f"tensor {name!r}: {dtype} {list(shape)} needs {nbytes} bytes, it has {end - begin}")
    return dtype, shape, begin, end


def parse_header(text: bytes, data_bytes: int, limits: Limits, file: Path) -> tuple[dict[str, str], list[TensorInfo]]:
    """Return metadata and tensors (in offset order) of the header `text`, which `data_bytes` bytes of data follow.

    Raises one of our errors for every deviation; what it accepts, the safetensors library accepts too.
    """
    if not text.startswith(b"{"):
        raise errors.HeaderTextError("the header does not begin with '{'", fix="is this a safetensors file?")
    # A tensor has three objects and lists. Millions more would take thirty times their bytes once they are parsed.
    if text.count(b"{") + text.count(b"[") > 5 * limits.tensors:
        raise errors.LimitError(f"the header holds more objects and lists than {limits.tensors} tensors have")
    header = strictjson.parse(text.rstrip(b" "), depth=limits.json_depth)
    if not isinstance(header, dict):
        raise errors.JsonSyntaxError("the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if metadata is None and limits is FOREIGN:  # as mlx writes it, and the safetensors library reads it
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise errors.JsonSyntaxError("__metadata__ is not an object of strings")
    if len(header) > limits.tensors:
        raise errors.LimitError(f"the header names {len(header)} tensors; at most {limits.tensors} are allowed")
    start = 8 + len(text)
    tensors = []
    for name, value in header.items():
        dtype, shape, begin, end = _entry(name, value, limits)
        tensors.append(TensorInfo(name, dtype, shape, start + begin, end - begin, file))
    tensors.sort(key=lambda t: t.start)
    position = start
    for tensor in tensors:
        if tensor.start != position:
            where = f"byte {tensor.start}, the data before it ends at {position}"
            raise errors.OffsetError(f"tensor {tensor.name!r} begins at {where}")
        position += tensor.nbytes
    if position != start + data_bytes:
        raise errors.CoverageError(f"the tensors end at byte {position}, the file at {start + data_bytes}")
    return metadata, tensors


class Appendable(Protocol):
    """A target that tensors are copied to."""

    def write(self, data: bytes | bytearray | memoryview) -> int: ...

    def copy(self, source: int, offset: int, nbytes: int) -> None: ...


class OpenFile:
    """A regular file that is open for reading, whatever its format: a context manager. Raises E-IO-KIND, E-IO-READ."""

    path: Path

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._descriptor, self._stat = open_regular(self.path)

    def check_unchanged(self) -> None:
        """Raise E-IO-CHANGED if size, time or identity of the file differ from when it was opened."""
        now, then = os.fstat(self._descriptor), self._stat
        if (now.st_size, now.st_mtime_ns, now.st_ino) != (then.st_size, then.st_mtime_ns, then.st_ino):
            raise errors.FileChangedError("the file changed while it was read", path=self.path)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ContainerFile(OpenFile):
    """One open safetensors file. A context manager; `read` gives owned memory.

    Attributes: `path`, `header_bytes` (length and JSON exactly as on disk), `metadata`, `tensors` (in offset order),
    `by_name`.
    """

    def __init__(self, path: str | os.PathLike[str], limits: Limits = FOREIGN) -> None:
        super().__init__(path)
        try:
            size = self._stat.st_size
            if size > limits.file_bytes:
                raise errors.LimitError(f"the file has {size} bytes; at most {limits.file_bytes} are read")
            if size < 8:
                raise errors.FileKindError(
                    "the file is shorter than a safetensors header", fix="was a download cut off?"
                )
            prefix = bytes(pread(self._descriptor, 8, 0, self.path))
            length = int.from_bytes(prefix, "little")
            if prefix[:2] in (b"PK", b"\x80\x02") and length > size - 8:
                raise errors.PickleError("this is a pickle or a zip file, not safetensors")
            if not 0 < length <= size - 8:
                raise errors.HeaderLengthError(f"the header claims {length} bytes; {size - 8} follow")
            if length > limits.header_bytes:
                raise errors.HeaderLengthError(
                    f"the header claims {length} bytes; at most {limits.header_bytes} are read"
                )
            text = bytes(pread(self._descriptor, length, 8, self.path))
            self.header_bytes = prefix + text
            self.metadata, tensors = parse_header(text, size - 8 - length, limits, self.path)
            self.tensors: tuple[TensorInfo, ...] = tuple(tensors)
            self.by_name: dict[str, TensorInfo] = {t.name: t for t in tensors}
        except LrcError as error:
            self.close()
            raise error.at(self.path) from None
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        return self._stat.st_size

    @property
    def identity(self) -> tuple[str, int, int, int]:
        """Return path, size, modification in nanoseconds and inode, as they were when the file was opened."""
        return str(self.path.absolute()), self._stat.st_size, self._stat.st_mtime_ns, self._stat.st_ino

    def read(self, info: TensorInfo, offset: int = 0, nbytes: int | None = None) -> bytearray:
        """Read the bytes of a tensor of this file, or `nbytes` of them from `offset`."""
        count = info.nbytes - offset if nbytes is None else nbytes
        return pread(self._descriptor, count, info.start + offset, self.path)

    def load(self, info: TensorInfo) -> Stored:
        """Read a tensor with its stored bits."""
        return Stored(info.dtype, np.frombuffer(self.read(info), STORAGE[info.dtype]).reshape(info.shape))

    def copy(self, info: TensorInfo, writer: Appendable) -> None:
        """Append the bytes of a tensor to `writer`, inside the kernel where it can."""
        writer.copy(self._descriptor, info.start, info.nbytes)

    def fileno(self) -> int:
        """Return the open descriptor, for copies inside the kernel."""
        return self._descriptor


def carries(path: Path, key: str, limits: Limits = FOREIGN) -> bool:
    """Return true if `path` is a safetensors file that has the `key` in its metadata."""
    try:
        with ContainerFile(path, limits) as file:
            return key in file.metadata
    except LrcError:
        return False


# --- digests --------------------------------------------------------------------------------------------------------


def tensor_hasher(name: str, dtype: str, shape: Sequence[int]) -> hashlib._Hash:
    """Return a sha256 that has seen name, dtype and shape (each after its length, 8 bytes little endian) and
    is to be given the raw bytes of the tensor."""
    digest = hashlib.sha256()
    for part in (name.encode(), dtype.encode(), b"".join(n.to_bytes(8, "little") for n in shape)):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest


def tensor_digest(name: str, dtype: str, shape: Sequence[int], chunks: Iterable[bytes | bytearray | memoryview]) -> str:
    """Return the sha256 over name, dtype, shape and the raw bytes of a tensor, in hex."""
    digest = tensor_hasher(name, dtype, shape)
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def combined_digest(entries: Iterable[tuple[str, str]]) -> str:
    """Return the sha256 over the sorted (name, digest) list, in hex: one name for a set of tensors."""
    digest = hashlib.sha256()
    for name, value in sorted(entries):
        encoded = name.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded + bytes.fromhex(value))
    return digest.hexdigest()


# --- checkpoints ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KnownContent:
    """The digest of a checkpoint's contents, and what its files were when it was taken: path, size, modification in
    nanoseconds and inode of each. Good for one run, in which many adapters are converted on one base."""

    digest: str
    files: tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model folder: `config` (config.json, or {}), the open shards in order, and all tensors by name."""

    root: Path
    config: dict[str, Any]
    files: tuple[ContainerFile, ...]
    index_path: Path | None
    index: dict[str, Any] = field(default_factory=dict)

    @property
    def is_derived(self) -> bool:
        """True where headers and configuration are others than those on the disk."""
        return False

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        return {info.name: info for file in self.files for info in file.tensors}

    @cached_property
    def _by_path(self) -> dict[Path, ContainerFile]:
        return {file.path: file for file in self.files}

    def file_of(self, info: TensorInfo) -> ContainerFile:
        return self._by_path[info.file]

    def read(self, info: TensorInfo, offset: int = 0, nbytes: int | None = None) -> bytearray:
        return self.file_of(info).read(info, offset, nbytes)

    def _chunks(self, info: TensorInfo) -> Iterator[bytearray]:
        for offset in range(0, info.nbytes, _COPY_BYTES):
            yield self.read(info, offset, min(_COPY_BYTES, info.nbytes - offset))

    @property
    def _identities(self) -> tuple[tuple[str, int, int, int], ...]:
        return tuple(file.identity for file in self.files)

    def known_content(self) -> KnownContent:
        """Return the digest of the contents, for a later run. Raises E-IO-CHANGED if a file changed meanwhile."""
        content = KnownContent(self.content_digest(), self._identities)
        for file in self.files:
            file.check_unchanged()
        return content

    def content_digest(self, known: KnownContent | None = None) -> str:
        """Return the sha256 over name, dtype, shape and bytes of every tensor; the same however they are sharded.

        With `known` nothing is read: it is that digest. Raises E-IO-CHANGED if the files are others than they were.
        """
        if known is not None:
            if known.files != self._identities:
                raise errors.FileChangedError("the base changed after its contents were digested", path=self.root)
            return known.digest
        return combined_digest(
            (t.name, tensor_digest(t.name, t.dtype, t.shape, self._chunks(t))) for t in self.tensors.values()
        )

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self.files:
            file.close()


def contained(root: Path, path: Path) -> bool:
    """Return true if a (possibly linked) file stays in its folder, or in the blobs of the hub cache that it lies in."""
    try:
        real_root, real = root.resolve(), path.resolve()
    except (OSError, RuntimeError):  # a link that leads to itself
        return False
    if real_root.parent.name != "snapshots":
        return real.is_relative_to(real_root)
    model = real_root.parent.parent
    shared = model.parent / "blobs"  # huggingface_hub 2: files of several models, named by their content
    if real.is_relative_to(shared):
        return _SHARED_BLOB.fullmatch(real.relative_to(shared).as_posix()) is not None
    return real.is_relative_to(real_root) or real.is_relative_to(model / "blobs")


def _shard_names(index: dict[str, Any], path: Path) -> list[str]:
    """File names of a shard index in sorted order. Raises E-PATH or E-INDEX-MAP."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise errors.ShardIndexError("the index has no weight_map", path=path)
    names = set()
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            what = f"the index sends {tensor!r} to {name!r:.80}, which is not a plain .safetensors file name"
            raise errors.ShardPathError(what, path=path)
        names.add(name)
    if len(names) > MAX_SHARDS:
        raise errors.LimitError(f"the index names {len(names)} shards; at most {MAX_SHARDS} are read", path=path)
    if len({name.casefold() for name in names}) != len(names):
        raise errors.ShardIndexError("two shard names differ only in upper and lower case", path=path)
    return sorted(names)


def _present(path: Path) -> bool:
    """True also for a link that leads nowhere, so that it is refused and not overlooked."""
    return path.is_symlink() or path.exists()


def quantization_name(config: Mapping[str, Any]) -> str:
    """Return how a configuration says that its weights are quantized (``bitsandbytes 4 bit``, ``gptq``), or ""."""
    settings = config.get("quantization_config")
    if not settings:
        return ""
    table = settings if isinstance(settings, dict) else {}
    bits = next((f" {n} bit" for n in (4, 8) if table.get(f"load_in_{n}bit")), "")
    method = table.get("quant_method") or (_BITSANDBYTES if bits else None)
    if method == _BITSANDBYTES:
        return f"{_BITSANDBYTES}{bits}"
    return method if isinstance(method, str) else "a method that is not named"


def _check_quantization(config: Mapping[str, Any], allowed: bool, root: Path) -> None:
    """Raise E-BASE-QUANT for a quantized base, by the name of how it is; but for bitsandbytes if that is `allowed`."""
    name = quantization_name(config)
    is_readable = name.startswith(_BITSANDBYTES)
    if not name or (is_readable and allowed):
        return
    advice = "use the unquantized parent of this checkpoint"
    if is_readable:
        advice += ", so that the error of quantizing stays out; or pass --dequantize to merge into what it stands for"
    raise errors.QuantizedBaseError(f"the base is stored quantized, by {name:.60}", fix=advice, path=root)


def unfinished(root: Path) -> errors.UnfinishedError:
    """Return the error for a model folder in which a merge or unmerge in place was broken off."""
    what = "is between two states: a merge or unmerge in place was broken off"
    return errors.UnfinishedError(what, fix="run lrconvert recover, or the same command with --resume", path=root)


def is_without_weights(root: Path) -> bool:
    """Return true if a folder has the configuration of a model or a pipeline, and no file of a model's weights."""
    if not ((root / "config.json").is_file() or (root / PIPELINE_NAME).is_file()):
        return False
    return not (_present(root / INDEX_NAME) or _present(root / SINGLE_NAME) or any(root.glob("pytorch_model*.bin")))


def open_checkpoint(path: str | os.PathLike[str], *, quantized: bool = False) -> Checkpoint:
    """Open a Hugging Face model folder (``model.safetensors``, or an index and its shards), headers only.

    With `quantized` also one that bitsandbytes has quantized, its tensors as they are stored. Raises E-IO-KIND, E-PATH,
    E-INDEX-MAP, E-BASE-QUANT (another quantized checkpoint), E-UNFINISHED, and the container's errors.
    """
    root = Path(path)
    if not root.is_dir():
        raise errors.FileKindError("is not a model folder", fix="give the folder that holds config.json", path=root)
    if _present(root / JOURNAL / READY_NAME):
        raise unfinished(root)
    config = read_json(root / "config.json") if _present(root / "config.json") else {}
    _check_quantization(config, quantized, root)
    index_path = root / INDEX_NAME
    if not _present(index_path):
        return Checkpoint(root, config, (_single_file(root),), None)
    index = read_json(index_path, MAX_INDEX_BYTES)
    files: list[ContainerFile] = []
    try:
        for name in _shard_names(index, index_path):
            if not contained(root, root / name):
                raise errors.ShardPathError("the shard is a link that leaves its folder", path=root / name)
            files.append(ContainerFile(root / name))
        _check_index(index["weight_map"], files, index_path)
    except BaseException:
        for file in files:
            file.close()
        raise
    return Checkpoint(root, config, tuple(files), index_path, index)


def _single_file(root: Path) -> ContainerFile:
    """The one weight file of a folder without an index."""
    single = root / SINGLE_NAME
    if not single.exists():
        pickles = sorted(p.name for p in root.glob("pytorch_model*.bin"))
        if pickles:
            fix = "save it again with save_pretrained(..., safe_serialization=True)"
            raise errors.PickleError(f"the base is stored as pickles ({pickles[0]})", fix=fix, path=root)
        raise errors.FileKindError(f"holds neither {SINGLE_NAME} nor {INDEX_NAME}", path=root)
    if not contained(root, single):
        raise errors.ShardPathError("the file is a link that leaves its folder", path=single)
    return ContainerFile(single)


def _check_index(declared: Mapping[str, str], files: Sequence[ContainerFile], path: Path) -> None:
    """Raise E-INDEX-MAP unless every tensor is stored once, where the index says, and none is absent."""
    stored = [(info.name, file.path.name) for file in files for info in file.tensors]
    names = {name for name, _ in stored}
    if len(names) != len(stored):
        raise errors.ShardIndexError("a tensor is stored in two shards", path=path)
    misplaced = sorted(name for name, file in stored if declared.get(name) != file)
    absent = sorted(set(declared) - names)
    if misplaced or absent:
        problem = f"{misplaced[0]!r} is stored elsewhere" if misplaced else f"{absent[0]!r} is in no shard"
        raise errors.ShardIndexError(f"the index and the shards disagree: {problem}", path=path)


def config_text(config: Mapping[str, Any], key: str) -> str:
    """Return a string field of a foreign config, or "". Raises E-CONFIG if it has another type."""
    value = config.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise errors.ConfigError(f"{key} is {value!r:.60}, expected a string")
    return value
