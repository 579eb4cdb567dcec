"""GGUF files, read strictly: header, key-value pairs, tensor descriptions, data; little endian, versions 2 and 3.

Everything is bounded by the size of the file before it is allocated, and nothing may lie outside of it, overlap or
follow it. Arrays among the key-value pairs are walked over, not built, but for short ones of integers. Tensors are F32,
F16, BF16 or Q8_0 (blocks of 32 int8 with an fp16 factor, decoded to float32 without rounding).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lrconvert.core import errors
from lrconvert.core.dtypes import Stored
from lrconvert.core.limits import FOREIGN, KIB, MIB
from lrconvert.formats.readers.shared.files import ForeignFile, check_shape
from lrconvert.io.container import TensorInfo, pread

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_HEADER_BYTES = 16 * MIB  # 2^17 tensors, or the vocabulary of a model, which an adapter does not need
_KEPT = 4096  # integers of an array that are kept
_ARRAY_DEPTH = 2
_ALIGNMENTS = tuple(8 << n for n in range(14))
_CHUNK = 64 * KIB

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_BLOCK = 32  # numbers of one Q8_0 block
_Q8 = np.dtype([("factor", "<f2"), ("codes", "i1", (_BLOCK,))])
# ggml's types: name, numbers of a block, bytes of a block
_TYPES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 8: ("Q8_0", _BLOCK, _Q8.itemsize)}

Value = str | int | float | bool | tuple[int, ...] | None
_Description = tuple[str, tuple[int, ...], int, int]  # name, dims in ggml's order, type, offset


class _Cursor:
    """Bytes of a file in order, fetched in chunks, never beyond its end or the cap of a header."""

    def __init__(self, descriptor: int, size: int, path: Path) -> None:
        self._descriptor, self._path = descriptor, path
        self._stop = min(size, _HEADER_BYTES)
        self._buffer, self._begin = b"", 0
        self.at = 0

    def _check(self, nbytes: int) -> None:
        left = self._stop - self.at
        if nbytes > left:
            raise errors.HeaderLengthError(f"the header claims {nbytes} bytes at byte {self.at}; {left} are left")

    def take(self, nbytes: int) -> bytes:
        self._check(nbytes)
        if self.at + nbytes > self._begin + len(self._buffer):
            count = min(max(nbytes, _CHUNK), self._stop - self.at)
            self._buffer, self._begin = bytes(pread(self._descriptor, count, self.at, self._path)), self.at
        start = self.at - self._begin
        self.at += nbytes
        return self._buffer[start : start + nbytes]

    def skip(self, nbytes: int) -> None:
        self._check(nbytes)
        self.at += nbytes

    def number(self, form: str) -> int:
        value = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        assert isinstance(value, int)
        return value

    def text(self, most: int) -> str:
        length = self.number("<Q")
        if length > most:
            raise errors.LimitError(f"a text of the header has {length} bytes; at most {most} are read")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise errors.HeaderTextError("a text of the header is no UTF-8") from None


class GgufFile(ForeignFile):
    """One open GGUF file. A context manager.

    `fields`: the key-value pairs; long arrays are None. `metadata`: those that are texts. `tensors`: in the order of
    the file, with shapes as numpy has them (ggml lists dimensions the other way round); the dtype of Q8_0 is F32.
    """

    def _read_header(self, size: int) -> tuple[TensorInfo, ...]:
        cursor = _Cursor(self._descriptor, size, self.path)
        if size < 24 or cursor.take(4) != MAGIC:
            raise errors.FileKindError("the file is no GGUF", fix="was a download cut off?")
        version = cursor.number("<I")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            why = "is big endian" if swapped else f"has version {version}"
            raise errors.VersionError(f"the GGUF file {why}; versions 2 and 3 in little endian are read")
        tensors, pairs = cursor.number("<Q"), cursor.number("<Q")
        if tensors > FOREIGN.tensors or pairs > FOREIGN.tensors:
            raise errors.LimitError(f"{tensors} tensors and {pairs} fields are more than {FOREIGN.tensors}")
        if 24 * tensors + 13 * pairs > size:  # the least that each takes
            raise errors.HeaderLengthError(f"{tensors} tensors and {pairs} fields are more than fit the file")
        self.fields: dict[str, Value] = {}
        for _ in range(pairs):
            key = _name(cursor, "field")
            if key in self.fields:
                raise errors.TensorNameError(f"the field {key!r:.120} is there twice")
            self.fields[key] = _value(cursor, cursor.number("<I"), _ARRAY_DEPTH)
        self.metadata = {key: value for key, value in self.fields.items() if isinstance(value, str)}
        descriptions = [_description(cursor) for _ in range(tensors)]
        return self._place(descriptions, cursor.at, size)

    def _place(self, descriptions: Sequence[_Description], header: int, size: int) -> tuple[TensorInfo, ...]:
        """Return the tensors; each begins where the one before ends, up to the alignment. Raises E-OFF, E-OFF-COVER."""
        alignment = self.fields.get("general.alignment", 32)
        if alignment not in _ALIGNMENTS or isinstance(alignment, bool):
            raise errors.HeaderTextError(f"general.alignment is {alignment!r:.40}, no power of two from 8 to 65536")
        assert isinstance(alignment, int)
        start = header + -header % alignment
        position, tensors = 0, {}
        self._quantized: set[str] = set()
        for name, dims, kind, offset in descriptions:
            if kind not in _TYPES:
                titles = ", ".join(title for title, _, _ in _TYPES.values())
                raise errors.DtypeError(f"tensor {name!r:.120} has ggml's type {kind}; {titles} are read")
            title, block, nbytes = _TYPES[kind]
            if dims[0] % block:
                raise errors.ShapeError(f"tensor {name!r:.120}: rows of {dims[0]} are no blocks of {block}")
            nbytes *= math.prod(dims) // block
            if offset != position:
                raise errors.OffsetError(f"tensor {name!r:.120} begins at byte {offset}, expected {position}")
            if start + offset + nbytes > size:
                raise errors.CoverageError(f"tensor {name!r:.120} ends after the end of the file, byte {size}")
            if name in tensors:
                raise errors.TensorNameError(f"the tensor {name!r:.120} is there twice")
            if title == "Q8_0":
                self._quantized.add(name)
                title = "F32"
            tensors[name] = TensorInfo(name, title, dims[::-1], start + offset, nbytes, self.path)
            end = position + nbytes
            position = end + -end % alignment
        if tensors and not start + end <= size <= start + position:
            raise errors.CoverageError(f"the tensors end at byte {start + end}, the file at {size}")
        return tuple(tensors.values())

    def read(self, info: TensorInfo) -> bytes:
        """Return the bytes of a tensor as they are stored."""
        return bytes(pread(self._descriptor, info.nbytes, info.start, self.path))

    def load(self, info: TensorInfo) -> Stored:
        """Return a tensor with its stored bits; Q8_0 decoded, which float32 holds exactly."""
        if info.name in self._quantized:
            blocks = np.frombuffer(self.read(info), _Q8)
            values = blocks["factor"].astype(np.float32)[:, None] * blocks["codes"].astype(np.float32)
            return Stored("F32", values.astype("<f4").reshape(info.shape))
        return super().load(info)


def _description(cursor: _Cursor) -> _Description:
    """Return the description of one tensor. Raises E-NAME, E-SHAPE, E-HDR-LEN, E-LIMIT."""
    name = _name(cursor, "tensor")
    count = cursor.number("<I")
    if not 0 < count <= FOREIGN.ndim:
        raise errors.ShapeError(f"tensor {name!r:.120} has {count} dimensions; 1 to {FOREIGN.ndim} are read")
    dims = struct.unpack(f"<{count}Q", cursor.take(8 * count))
    check_shape(name, dims)
    return name, dims, cursor.number("<I"), cursor.number("<Q")


def _name(cursor: _Cursor, what: str) -> str:
    name = cursor.text(FOREIGN.name_bytes)
    if not name or not name.isprintable():
        raise errors.TensorNameError(f"the {what} name {name!r:.120} is empty or has control characters")
    return name


def _value(cursor: _Cursor, kind: int, depth: int) -> Value:
    """Read a value of a key-value pair. Raises E-HDR-TEXT, E-HDR-LEN, E-LIMIT."""
    if kind == _STRING:
        return cursor.text(FOREIGN.string_bytes)
    if kind in _SCALARS:
        raw = cursor.take(struct.calcsize(_SCALARS[kind]))
        if kind == _BOOL and raw not in (b"\0", b"\1"):
            raise errors.HeaderTextError(f"a truth value of the header is {raw[0]}")
        number: int | float | bool = struct.unpack(_SCALARS[kind], raw)[0]
        return number
    if kind != _ARRAY:
        raise errors.HeaderTextError(f"a value of the header has the unknown type {kind}")
    inner, count = cursor.number("<I"), cursor.number("<Q")
    if inner in _SCALARS:
        size = struct.calcsize(_SCALARS[inner])
        if count <= _KEPT and inner not in (6, _BOOL, 12):
            return struct.unpack(f"<{count}{_SCALARS[inner][1]}", cursor.take(count * size))
        cursor.skip(count * size)
        return None
    if depth == 0 or inner not in (_STRING, _ARRAY):
        raise errors.HeaderTextError(f"an array of the header has the unknown or too deep type {inner}")
    for _ in range(count):  # each takes at least eight bytes of the header, which is bounded
        if inner == _STRING:
            cursor.skip(cursor.number("<Q"))
        else:
            _value(cursor, _ARRAY, depth - 1)
    return None
