"""A fleet's data file from front to end: every record with its check, in memory of one piece."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lrconvert.core import errors
from lrconvert.core.errors import LrcError
from lrconvert.formats.fleet import records
from lrconvert.formats.fleet.index import Entry
from lrconvert.formats.fleet.records import FRAME, MAGIC, MEMBER, REMOVAL, TENSOR, Cursor
from lrconvert.io.container import OpenFile, pread

_PIECE = 1 << 20


@dataclass(frozen=True)
class Scanned:
    """A record: its `kind` and `entry`, whose key is that of the index; `error` says what is wrong with it. The last
    one of a damaged file may be `lost`: nothing tells where the next record begins."""

    kind: int
    entry: Entry
    error: LrcError | None = None
    lost: bool = False

    @property
    def name(self) -> str:
        """Return the name of a member, or of one that was removed."""
        return self.entry.key.decode(errors="replace") if self.kind in (MEMBER, REMOVAL) else ""


class _Data(OpenFile):
    def size(self) -> int:
        return self._stat.st_size

    def read(self, offset: int, nbytes: int) -> bytes:
        return bytes(pread(self._descriptor, nbytes, offset, self.path))


def scan(path: Path, stop: int | None = None) -> Iterator[Scanned]:
    """Yield the records of a data file up to byte `stop`, or its end. Raises E-IO-KIND if it is none."""
    with _Data(path) as data:
        end = data.size() if stop is None else stop
        if data.size() < len(MAGIC) or data.read(0, len(MAGIC)) != MAGIC:
            raise errors.FileKindError("is no data file of a fleet", path=path)
        at = len(MAGIC)
        while at < end:
            record = _record(data, at, end)
            yield record
            if record.lost:
                return
            at += record.entry.length


def _record(data: _Data, offset: int, end: int) -> Scanned:
    kind = 0
    try:
        kind, body, start = records.head_of(data.read(offset, min(records.HEAD_BYTES, end - offset)))
        if offset + records.size_of(body) > end or records.size_of(body) != start + body + records.CHECK_BYTES:
            raise errors.OffsetError("reaches beyond the end")
        first = data.read(offset, min(_PIECE, start + body))
    except LrcError as error:
        what = f"the record at byte {offset} is damaged, and none behind it can be told: {error.what}"
        return Scanned(kind, Entry(b"", offset, 0), errors.DigestError(what, fix=_COPY), lost=True)
    whole, content = hashlib.sha256(first), hashlib.sha256(first[start:])
    at = offset + len(first)
    stop = offset + start + body
    while at < stop:
        piece = data.read(at, min(_PIECE, stop - at))
        whole.update(piece)
        content.update(piece)
        at += len(piece)
    key, wrong = b"", None
    try:
        key = _key(kind, first[start:], content.digest())
    except LrcError as broken:
        wrong = broken
    if data.read(stop, records.CHECK_BYTES) != whole.digest()[: records.CHECK_BYTES]:
        what = f"the {records.KINDS[kind]} at byte {offset}{_named(kind, key)} is damaged"
        wrong = errors.DigestError(what, fix=_COPY)
    return Scanned(kind, Entry(key, offset, records.size_of(body)), wrong)


def _key(kind: int, body: bytes, digest: bytes) -> bytes:
    if kind in (FRAME, TENSOR):
        return records.key_of(kind, digest)
    cursor = Cursor(body)
    if kind == MEMBER:
        cursor.number()
    return records.text_of(cursor).encode()


def _named(kind: int, key: bytes) -> str:
    return f", of {key.decode(errors='replace')!r:.80}," if kind in (MEMBER, REMOVAL) and key else ""


_COPY = "restore it from a copy of the fleet"
