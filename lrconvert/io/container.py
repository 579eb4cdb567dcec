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
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from lrconvert.core import errors
from lrconvert.core.dtypes import STORAGE, Stored, itemsize
from lrconvert.core.errors import LrcError
from lrconvert.core.limits import FOREIGN, MAX_CONFIG_BYTES, OWN, Limits
from lrconvert.io import strictjson

_PIECE = 1 << 20  # bytes of a tensor that is read in pieces: they stay in the cache


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
    pread_into(descriptor, memoryview(buffer), offset, path)
    return buffer


def pread_into(descriptor: int, view: memoryview, offset: int, path: Path) -> None:
    """Fill a buffer of bytes from `offset`. Raises E-IO-READ, and E-IO-CHANGED if the file ends early."""
    done = 0
    while done < len(view):
        try:
            nread = os.preadv(descriptor, [view[done : done + (1 << 30)]], offset + done)
        except OSError as error:
            raise errors.FileReadError(f"cannot be read: {error.strerror}", path=path) from None
        if nread == 0:
            raise errors.FileChangedError("the file ended early; it changed while it was read", path=path)
        done += nread


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
    if isinstance(value, list) and count in (None, len(value)):
        for number in value:
            if type(number) is not int or number < 0:
                break
        else:
            return tuple(value)
    wanted = f"{'' if count is None else f'{count} '}non-negative integers"
    raise errors.ShapeError(f"{value!r:.60} is not a list of {wanted}")


def _check_name(name: str, limits: Limits) -> None:
    nbytes = len(name) if name.isascii() else len(name.encode("utf-8", "replace"))
    if not 0 < nbytes <= limits.name_bytes:
        raise errors.TensorNameError(f"a tensor name is empty or longer than {limits.name_bytes} bytes")
    if not name.isprintable():
        raise errors.TensorNameError(f"the tensor name {name!r} has control characters")


_FIELDS = frozenset({"dtype", "shape", "data_offsets"})


def _entry(name: str, value: Any, limits: Limits) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, begin, end) of one header entry, checked on its own."""
    _check_name(name, limits)
    if not isinstance(value, dict) or value.keys() != _FIELDS:
        raise errors.UnknownFieldError(f"the header entry of {name!r} does not have exactly dtype, shape, data_offsets")
    dtype = value["dtype"]
    if not isinstance(dtype, str) or dtype not in STORAGE:
        raise errors.DtypeError(f"tensor {name!r} has the unknown dtype {dtype!r:.40}")
    shape = _integers(value["shape"], None)
    if len(shape) > limits.ndim or (shape and not limits.least_dim <= min(shape) <= max(shape) <= limits.dim):
        what = f"tensor {name!r} has shape {list(shape)!s:.80}"
        read = f"at most {limits.ndim} dimensions of {limits.least_dim} to {limits.dim} are read"
        raise errors.ShapeError(f"{what}; {read}")
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
    if metadata is None and limits is not OWN:  # as mlx writes it, and the safetensors library reads it
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
    tensors.sort(key=lambda t: (t.start, t.nbytes))
    position = start
    for tensor in tensors:
        if tensor.start != position:
            where = f"byte {tensor.start}, the data before it ends at {position}"
            raise errors.OffsetError(f"tensor {tensor.name!r} begins at {where}")
        position += tensor.nbytes
    if position != start + data_bytes:
        raise errors.CoverageError(
            f"the tensors end at byte {position}, the file at {start + data_bytes}", fix="was a download cut off?"
        )
    return metadata, tensors


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
        self._read_header(limits)

    def _read_header(self, limits: Limits) -> None:
        """Read the header, and close the file if it is refused."""
        try:
            size = self.size
            if size > limits.file_bytes:
                raise errors.LimitError(f"the file has {size} bytes; at most {limits.file_bytes} are read")
            if size < 8:
                raise errors.FileKindError(
                    "the file is shorter than a safetensors header", fix="was a download cut off?"
                )
            prefix = bytes(self._bytes(8, 0))
            length = int.from_bytes(prefix, "little")
            if prefix[:2] in (b"PK", b"\x80\x02") and length > size - 8:
                raise errors.PickleError(
                    "this is a pickle or a zip file, not safetensors",
                    fix="name it .pt or .npz if it is one, or save it again as safetensors",
                )
            if not 0 < length <= size - 8:
                raise errors.HeaderLengthError(f"the header claims {length} bytes; {size - 8} follow")
            if length > limits.header_bytes:
                raise errors.HeaderLengthError(
                    f"the header claims {length} bytes; at most {limits.header_bytes} are read"
                )
            text = bytes(self._bytes(length, 8))
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

    def _bytes(self, nbytes: int, offset: int) -> bytearray:
        buffer = bytearray(nbytes)
        self._fill(memoryview(buffer), offset)
        return buffer

    def _fill(self, view: memoryview, offset: int) -> None:
        """Fill a buffer with the bytes of the file from `offset` on."""
        pread_into(self._descriptor, view, offset, self.path)

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
        return self._bytes(count, info.start + offset)

    def read_into(self, info: TensorInfo, offset: int, view: memoryview) -> None:
        """Fill a buffer with the bytes of a tensor from `offset` on: reused ones cost no new memory."""
        self._fill(view, info.start + offset)

    def load(self, info: TensorInfo) -> Stored:
        """Read a tensor with its stored bits."""
        buffer = np.empty(info.nbytes, np.uint8)  # not filled with zeros first, as a bytearray is
        self.read_into(info, 0, buffer.data)
        return Stored(info.dtype, buffer.view(STORAGE[info.dtype]).reshape(info.shape))

    def chunks(self, info: TensorInfo) -> Iterator[memoryview]:
        """Yield the bytes of a tensor in pieces, each valid until the next."""
        if info.nbytes <= _PIECE:
            yield memoryview(self.read(info))
            return
        buffer = memoryview(bytearray(_PIECE))
        for offset in range(0, info.nbytes, _PIECE):
            piece = buffer[: info.nbytes - offset]
            self.read_into(info, offset, piece)
            yield piece

    def fileno(self) -> int:
        """Return the open descriptor, for copies inside the kernel."""
        return self._descriptor


class ContainerBytes(ContainerFile):
    """A safetensors file that lies in memory: a part of another file. `path` is what messages call it; it has neither
    an `identity` nor a descriptor."""

    def __init__(self, data: bytes, path: Path, limits: Limits = FOREIGN) -> None:
        self.path, self._data, self._descriptor = path, data, -1
        self._read_header(limits)

    @property
    def size(self) -> int:
        return len(self._data)

    def _fill(self, view: memoryview, offset: int) -> None:
        piece = self._data[offset : offset + len(view)]
        if len(piece) < len(view):
            raise errors.FileChangedError("the data end early", path=self.path)
        view[:] = piece

    def check_unchanged(self) -> None:
        """Do nothing: bytes do not change."""


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
    parts = name.encode(), dtype.encode(), b"".join(n.to_bytes(8, "little") for n in shape)
    return hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts))


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
