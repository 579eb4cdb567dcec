"""The records of a fleet's data file. Normative text: ``formats/fleet-v1.md``, sections 3 to 5.

A record is a kind, the length of its body, the body, and a check: the first bytes of the sha256 of all before it. What
members have in common are records of their own; a member names them by the byte at which they begin.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from lrconvert.core import errors
from lrconvert.core.limits import OWN
from lrconvert.formats.fleet.names import is_name
from lrconvert.formats.lrc.one_tensor import VERSIONS

MAGIC = b"lrfleet\x01"
FRAME, TENSOR, MEMBER, REMOVAL = range(1, 5)
KINDS = {FRAME: "frame", TENSOR: "shared tensor", MEMBER: "member", REMOVAL: "removal"}
CHECK_BYTES = 8
DIGEST_BYTES = 32
HEAD_BYTES = 1 + 8  # at most, of a record: its kind and the length
LEAST = HEAD_BYTES + 1  # of what is read of one at first
_MOST_GROUPS = 7  # of seven bits: 2^49 is more than any file has
SHARED_LEAST = 64  # bytes of a tensor for which a record of its own pays


# --- numbers --------------------------------------------------------------------------------------------------------


def number(value: int) -> bytes:
    """Return a number in groups of seven bits, the lowest first (LEB128)."""
    out = bytearray()
    while value > 127:
        out.append(128 | value & 127)
        value >>= 7
    return bytes([*out, value])


class Cursor:
    """Bytes that are read from front to end. Raises E-OFF where they end too early, E-CANON for a number that is not
    in its shortest form."""

    def __init__(self, data: bytes | memoryview, at: int = 0) -> None:
        self.data, self.at = memoryview(data), at

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        if count > len(self.data) - self.at:
            raise errors.OffsetError("a record of the fleet ends within a field")
        self.at += count
        return bytes(self.data[self.at - count : self.at])

    def number(self) -> int:
        """Return the next number."""
        value = 0
        for n in range(_MOST_GROUPS):
            group = self.take(1)[0]
            value |= (group & 127) << 7 * n
            if group < 128:
                if n and not group:
                    raise errors.CanonicalError("a number of the fleet is not in its shortest form")
                return value
        raise errors.LimitError("a number of the fleet is 2^49 or more")


# --- records --------------------------------------------------------------------------------------------------------


def encode(kind: int, body: bytes) -> bytes:
    """Return the bytes of a record."""
    stored = bytes([kind]) + number(len(body)) + body
    return stored + check_of(stored)


def check_of(stored: bytes | memoryview) -> bytes:
    """Return the check of a record's bytes before it."""
    return hashlib.sha256(stored).digest()[:CHECK_BYTES]


def head_of(data: bytes | memoryview) -> tuple[int, int, int]:
    """Return kind, bytes of the body, and where it begins, of the record that some bytes begin with. Raises E-UNKNOWN
    for another kind."""
    cursor = Cursor(data)
    kind = cursor.take(1)[0]
    if kind not in KINDS:
        raise errors.UnknownFieldError(f"the fleet holds a record of the unknown kind {kind}")
    return kind, cursor.number(), cursor.at


def size_of(body: int) -> int:
    """Return how many bytes a record has whose body has so many."""
    return 1 + len(number(body)) + body + CHECK_BYTES


# --- members --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """A tensor that lies in the shared store: `at` is the byte of the member's payload, with all that is put in before,
    that it begins at, `offset` where its record begins."""

    at: int
    offset: int


@dataclass(frozen=True)
class Member:
    """A member as it is stored, without its payload: `digest` and `nbytes` of its file, the container `version` of the
    file that went in, the `frame` by the byte where it begins, what its manifest has of its `own`, packed, and the
    tensors that it shares; `payload` is how many bytes follow."""

    name: str
    digest: bytes
    nbytes: int
    version: int
    frame: int
    own: bytes
    references: tuple[Reference, ...]
    payload: int

    def head(self) -> bytes:
        """Return the bytes of a member's body before its payload."""
        name = self.name.encode()
        parts = [number(len(name)), name, self.digest, bytes([self.version]), number(self.nbytes), number(self.frame)]
        parts += [number(len(self.own)), self.own, number(len(self.references))]
        at = 0
        for reference in self.references:
            parts += [number(reference.at - at), number(reference.offset)]
            at = reference.at
        fields = b"".join(parts)
        return number(len(fields)) + fields


def head_length(data: bytes | memoryview) -> int:
    """Return how many bytes a member's body has before its payload, of which a few are given."""
    cursor = Cursor(data)
    return cursor.number() + cursor.at


def member_of(data: bytes | memoryview, body: int, at: int) -> Member:
    """Return the member whose body has so many bytes and begins with `data`, `at` which byte of the file its record
    begins: what it refers to lies before. Raises E-NAME, E-LIMIT, E-INDEX, E-OFF, E-CANON."""
    length = head_length(data)
    if length > body:
        raise errors.OffsetError("a member's fields are longer than its record")
    cursor = Cursor(bytes(data[:length]))
    cursor.number()
    name = text_of(cursor)
    digest, version = cursor.take(DIGEST_BYTES), cursor.take(1)[0]
    nbytes, frame = cursor.number(), cursor.number()
    if version not in (1, *VERSIONS):
        raise errors.VersionError(f"the member {name!r} came as container version {version}", fix="update lrconvert")
    if nbytes > OWN.file_bytes:
        raise errors.LimitError(f"the file of {name!r} has {nbytes} bytes; at most {OWN.file_bytes} are read")
    own = cursor.take(cursor.number())
    references = _references(cursor, at)
    if not len(MAGIC) <= frame < at:
        raise errors.IndexRangeError(f"the member {name!r} has a frame at byte {frame}, which lies not before it")
    if cursor.at != length:
        raise errors.OffsetError(f"{length - cursor.at} bytes follow the fields of the member {name!r}")
    return Member(name, digest, nbytes, version, frame, own, references, body - length)


def text_of(cursor: Cursor) -> str:
    """Return the name that comes next. Raises E-NAME."""
    stored = cursor.take(cursor.number())
    try:
        name = stored.decode()
    except UnicodeDecodeError:
        raise errors.TensorNameError("the name of a member is not UTF-8") from None
    if not is_name(name):
        raise errors.TensorNameError(f"{name!r:.80} is no name of a member")
    return name


def _references(cursor: Cursor, before: int) -> tuple[Reference, ...]:
    count = cursor.number()
    if count > OWN.tensors:
        raise errors.LimitError(f"a member shares {count} tensors; at most {OWN.tensors} are allowed")
    references: list[Reference] = []
    at = 0
    for _ in range(count):
        at += cursor.number()
        references.append(Reference(at, cursor.number()))
    offsets = [reference.offset for reference in references]
    if len(set(offsets)) < count or any(not len(MAGIC) <= offset < before for offset in offsets):
        raise errors.IndexRangeError("a member shares a tensor twice, or one that lies not before it")
    return tuple(references)


def removal(name: str) -> bytes:
    """Return the record that a member was removed by."""
    stored = name.encode()
    return encode(REMOVAL, number(len(stored)) + stored)


def key_of(kind: int, digest: bytes) -> bytes:
    """Return the key of a frame or shared tensor in the index; names begin with no NUL."""
    return b"\0" + (b"F" if kind == FRAME else b"T") + digest


def joined(own: memoryview, references: Sequence[tuple[int, memoryview]]) -> bytes:
    """Return a payload with the shared tensors put in, each as (byte it begins at, bytes). Raises E-OFF for one that
    begins behind the end, or within the one before."""
    pieces: list[bytes | memoryview] = []
    taken = made = 0
    for at, data in references:
        count = at - made
        if not 0 <= count <= len(own) - taken:
            raise errors.OffsetError("a shared tensor of a member begins outside of its payload")
        pieces += [own[taken : taken + count], data]
        taken, made = taken + count, at + len(data)
    return b"".join([*pieces, own[taken:]])
