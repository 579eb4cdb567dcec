"""numpy's ``.npz``: a zip of ``.npy`` arrays, read without pickles and with every size checked before it is allocated.

An array is what its own header says (dtype, order, shape), and that must fill its entry of the zip to the byte.
bfloat16, which numpy does not have, is what mlx writes for it: two bytes without a meaning (``V2``).
"""

from __future__ import annotations

import ast
import math
import zipfile
import zlib
from typing import IO

import numpy as np

from lrconvert.core import errors
from lrconvert.core.dtypes import STORAGE
from lrconvert.core.limits import MIB
from lrconvert.formats.readers.shared.files import ForeignFile, check_name, check_shape
from lrconvert.io.container import TensorInfo

_MAGIC = b"\x93NUMPY"
_HEADER_BYTES = 10_000  # numpy's own cap
_INFLATED = 16  # factors do not compress, zeros do: an entry may be this many times larger than it is stored
_ENTRIES = 1 << 16
_END_BYTES = 22  # of the record that ends a zip without a comment
_TAIL_BYTES = _END_BYTES + 20 + 56  # with those of zip64 before it
_DIRECTORY_BYTES = 16 * MIB
_DTYPES = {
    **{"f8": "F64", "f4": "F32", "f2": "F16", "V2": "BF16", "i8": "I64", "i4": "I32", "i2": "I16", "i1": "I8"},
    **{"u8": "U64", "u4": "U32", "u2": "U16", "u1": "U8", "b1": "BOOL"},
}
_UNZIPPING = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError, OSError)


class NpzFile(ForeignFile):
    """One open ``.npz``. A context manager; headers of the arrays are read at once, their data when it is asked for."""

    def _read_header(self, size: int) -> tuple[TensorInfo, ...]:
        self._zip = _open_zip(self._file, size)
        self._entries: dict[str, tuple[zipfile.ZipInfo, int, bool]] = {}
        tensors = []
        for entry in self._zip.infolist():
            name = entry.filename.removesuffix(".npy")
            dtype, shape, fortran, start = self._array_header(name, entry)
            if name in self._entries:
                raise errors.TensorNameError(f"the array {name!r:.120} is there twice")
            self._entries[name] = (entry, start, fortran)
            tensors.append(TensorInfo(name, dtype, shape, 0, entry.file_size - start, self.path))
        return tuple(tensors)

    def _array_header(self, name: str, entry: zipfile.ZipInfo) -> tuple[str, tuple[int, ...], bool, int]:
        """Return (dtype, shape, whether columns come first, where the data begins) of one array."""
        check_name(name, "array")
        start = self._inflate(entry, min(entry.file_size, 12))
        if start[:6] != _MAGIC or len(start) < 12 or start[6] not in (1, 2, 3):
            raise errors.HeaderTextError(f"the entry {name!r:.120} is no .npy array")
        begin = 12 if start[6] > 1 else 10
        length = int.from_bytes(start[8:begin], "little")
        if length > _HEADER_BYTES or begin + length > entry.file_size:
            raise errors.HeaderTextError(f"the header of {name!r:.120} claims {length} bytes")
        text = self._inflate(entry, begin + length)[begin:]
        descr, fortran, shape = _parse_header(name, text)
        check_shape(name, shape)
        if "O" in descr:
            raise errors.PickleError(f"the array {name!r:.120} holds Python objects", fix="save it as plain numbers")
        dtype = _DTYPES.get(descr[1:]) if descr[:1] in "<|=" else None
        if dtype is None:
            raise errors.DtypeError(f"the array {name!r:.120} has the dtype {descr!r:.40}, which is not read")
        nbytes, stored = math.prod(shape) * STORAGE[dtype].itemsize, entry.file_size - begin - length
        if nbytes != stored:
            raise errors.CoverageError(f"the array {name!r:.120} needs {nbytes} bytes, {stored} follow")
        return dtype, shape, fortran, begin + length

    def _inflate(self, entry: zipfile.ZipInfo, nbytes: int) -> bytes:
        """Unpack the first `nbytes` of an entry, and no more. Raises E-HDR-TEXT, E-IO-CHANGED."""
        try:
            with self._zip.open(entry) as stream:
                data = stream.read(nbytes)
        except _UNZIPPING as error:
            raise errors.HeaderTextError(f"the entry {entry.filename!r:.120} cannot be read: {error!s:.120}") from None
        if len(data) != nbytes:
            raise errors.FileChangedError("an entry of the zip ended early")
        return data

    def read(self, info: TensorInfo) -> bytes:
        """Return the bytes of an array, rows first, as a safetensors file would hold them."""
        entry, start, fortran = self._entries[info.name]
        try:
            data = self._inflate(entry, entry.file_size)[start:]
        except errors.LrcError as error:
            raise error.at(self.path) from None
        if fortran and len(info.shape) > 1:
            columns = np.frombuffer(data, STORAGE[info.dtype]).reshape(info.shape[::-1])
            return np.ascontiguousarray(columns.T).tobytes()
        return data


def _check_frame(file: IO[bytes], size: int) -> None:
    """Refuse a zip that other bytes stand before or follow, a file of two kinds, and one whose directory is too large
    to be held. Raises E-IO-KIND, E-OFF-COVER, E-LIMIT."""
    file.seek(0)
    head = file.read(4)
    file.seek(max(0, size - _TAIL_BYTES))
    tail = file.read(_TAIL_BYTES)
    wide, end = tail[:-_END_BYTES], tail[-_END_BYTES:]
    if head[:2] != b"PK":
        if end[:4] == b"PK\5\6":
            raise errors.CoverageError("bytes stand before the zip")
        raise errors.FileKindError("the file is no zip")
    if head != b"PK\3\4" or end[:4] != b"PK\5\6":
        raise errors.FileKindError("the zip does not end with its directory", fix="was a download cut off?")
    directory = int.from_bytes(end[12:16], "little")
    if wide[-20:-16] == b"PK\6\7":  # zip64
        directory = int.from_bytes(wide[40:48], "little")
    if directory > _DIRECTORY_BYTES:
        raise errors.LimitError(f"the directory of the zip has {directory} bytes; at most {_DIRECTORY_BYTES} are read")


def _open_zip(file: IO[bytes], size: int) -> zipfile.ZipFile:
    """Open the zip and check its directory: sizes before anything is inflated. Raises E-IO-KIND, E-LIMIT,
    E-OFF-COVER."""
    _check_frame(file, size)
    try:
        archive = zipfile.ZipFile(file)
        entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, IndexError, UnicodeError) as error:
        raise errors.FileKindError(f"the zip cannot be read: {error!s:.120}", fix="was a download cut off?") from None
    if len(entries) > _ENTRIES:
        raise errors.LimitError(f"the zip has {len(entries)} entries; at most {_ENTRIES} are read")
    for entry in entries:
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or entry.flag_bits & 1:
            raise errors.FileKindError(
                f"the entry {entry.filename!r:.120} is encrypted or compressed in an unknown way"
            )
        if entry.file_size > _INFLATED * max(entry.compress_size, 64):
            grown = f"grows from {entry.compress_size} to {entry.file_size} bytes"
            raise errors.LimitError(f"the entry {entry.filename!r:.120} {grown}")
    if sum(entry.file_size for entry in entries) > _INFLATED * size:
        raise errors.LimitError(f"the zip of {size} bytes grows to more than {_INFLATED} times that")
    if any(not 0 <= entry.header_offset < size for entry in entries):
        raise errors.FileKindError("an entry of the zip lies outside the file")
    return archive


def _parse_header(name: str, text: bytes) -> tuple[str, bool, tuple[int, ...]]:
    """Return (dtype, whether columns come first, shape) of the text of a header. Raises E-HDR-TEXT."""
    try:
        match ast.literal_eval(text.decode("utf-8").strip()):
            case {"descr": str(descr), "fortran_order": bool(fortran), "shape": tuple(shape), **rest} if (
                not rest and all(type(n) is int for n in shape)
            ):
                return descr, fortran, shape
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        pass
    raise errors.HeaderTextError(f"the header of the array {name!r:.120} is not understood")
