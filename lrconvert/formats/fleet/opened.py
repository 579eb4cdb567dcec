"""A fleet that is open for reading: as it was when it was opened, whatever writers do meanwhile.

All its files are opened at once. A writer deletes what it has replaced, so where one is gone, the head is read anew:
another writer was faster. What is read of a file is what was asked for: a member costs its own bytes, those of what it
shares, and a few nodes of the index.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lrconvert.core import errors
from lrconvert.core.errors import LrcError
from lrconvert.core.limits import OWN
from lrconvert.core.wording import spelled
from lrconvert.formats.fleet import head as heads
from lrconvert.formats.fleet import index, manifests, names, records
from lrconvert.formats.fleet.index import Entry, Tree
from lrconvert.formats.fleet.records import FRAME, MAGIC, MEMBER, TENSOR, Member
from lrconvert.formats.lrc import file, one_tensor
from lrconvert.formats.lrc.manifest import MANIFEST_BYTES, extra_sizes
from lrconvert.io.container import OpenFile, pread
from lrconvert.lora.adapter import CompactAdapter

_AT_FIRST = 1024  # bytes of a record that are read to see what it is
_TRIES = 100  # to open a fleet that is being written to
_FRAMES = 64  # that are kept


class _File(OpenFile):
    """One file of a fleet."""

    @property
    def size(self) -> int:
        return self._stat.st_size

    def read(self, offset: int, nbytes: int) -> bytes:
        return bytes(pread(self._descriptor, nbytes, offset, self.path))


class OpenFleet:
    """A fleet of one moment. A context manager.

    Attributes: `root`, its folder; `head`; `trees`, the runs of its index, oldest first.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.head, self._data, self._runs = _opened(root)
        self.trees = [Tree(run, opened.read) for run, opened in zip(self.head.runs, self._runs, strict=True)]
        self._frame = lru_cache(_FRAMES)(self._read_frame)
        try:
            if self._data.read(0, len(MAGIC)) != MAGIC:
                raise errors.FileKindError("is no data file of a fleet", path=self._data.path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close all files. Idempotent."""
        for opened in (self._data, *self._runs):
            opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- the index --------------------------------------------------------------------------------------------------

    def find(self, key: bytes) -> Entry | None:
        """Return the entry of a key, None if there is none."""
        with self._on_index():
            return index.find(self.trees, key)

    def entries(self, start: bytes = b"\1") -> Iterator[Entry]:
        """Yield the entries of all members in the order of their names' bytes, from `start` on."""
        with self._on_index():
            for entry in index.newest([tree.entries(start) for tree in self.trees]):
                if entry.length:
                    yield entry

    def frames(self) -> Iterator[Entry]:
        """Yield the entries of all frames."""
        return self._shared(FRAME)

    def shared_tensors(self) -> Iterator[Entry]:
        """Yield the entries of all tensors in the shared store."""
        return self._shared(TENSOR)

    def _shared(self, kind: int) -> Iterator[Entry]:
        start = records.key_of(kind, b"")
        with self._on_index():
            for entry in index.newest([tree.entries(start) for tree in self.trees]):
                if not entry.key.startswith(start):
                    return
                yield entry

    def entry(self, name: str) -> Entry:
        """Return the entry of a member. Raises E-MISSING if there is none of that name."""
        entry = self.find(names.check_name(name).encode())
        if entry is None:
            raise errors.MissingFieldError(f"the fleet has no member {name!r}", fix=self._near(name), path=self.root)
        return entry

    def _near(self, name: str) -> str:
        """Return the advice for an unknown name: the names around its place, without reading all."""
        start = name[: max(1, len(name) // 2)].encode()
        near: list[str] = []
        with suppress(LrcError):
            for entry in self.entries(start):
                if not entry.key.startswith(start) or len(near) == 3:
                    break
                near.append(entry.key.decode(errors="replace"))
        return f"there are {', '.join(near)}" if near else "`lrconvert pack list` shows all"

    def _on_index(self) -> _At:
        return _At(self.root)

    # --- records ----------------------------------------------------------------------------------------------------

    def read(self, offset: int, nbytes: int) -> bytes:
        """Return bytes of the data file. Raises E-OFF for what is not committed."""
        if offset + nbytes > self.head.bytes:
            raise errors.OffsetError(f"a record ends at byte {offset + nbytes}, the fleet at {self.head.bytes}")
        return self._data.read(offset, nbytes)

    def start(self, offset: int, least: int = 0) -> tuple[bytes, int, int, int]:
        """Return the first bytes of a record, at least so many of its body, and kind, bytes of the body, and where it
        begins in them."""
        nbytes = min(max(_AT_FIRST, least + records.HEAD_BYTES), self.head.bytes - offset)
        data = self.read(offset, max(nbytes, 0))
        kind, body, at = records.head_of(data)
        if offset + at + body + records.CHECK_BYTES > self.head.bytes:
            raise errors.OffsetError(f"the record at byte {offset} reaches beyond the end of the fleet")
        return data, kind, body, at

    def body(self, offset: int, kind: int, most: int = OWN.file_bytes) -> memoryview:
        """Return the body of the record at a byte, checked. Raises E-DIGEST, E-UNKNOWN for another kind, E-LIMIT."""
        data, own, body, at = self.start(offset)
        what = records.KINDS[kind]
        if own != kind:
            raise errors.UnknownFieldError(f"at byte {offset} lies a {records.KINDS[own]}, no {what}")
        if body > most:
            raise errors.LimitError(f"the {what} at byte {offset} has {body} bytes; at most {most} are read")
        stop = at + body
        if len(data) < stop + records.CHECK_BYTES:
            data += self.read(offset + len(data), stop + records.CHECK_BYTES - len(data))
        view = memoryview(data)
        if records.check_of(view[:stop]) != data[stop : stop + records.CHECK_BYTES]:
            raise errors.DigestError(f"the {what} at byte {offset} is damaged", fix=_again())
        return view[at:stop]

    def frame(self, offset: int) -> dict[str, Any]:
        """Return the frame at a byte; it is not to be changed."""
        return self._frame(offset)

    def _read_frame(self, offset: int) -> dict[str, Any]:
        return manifests.unpack_frame(bytes(self.body(offset, FRAME, 2 * MANIFEST_BYTES)))

    # --- members ----------------------------------------------------------------------------------------------------

    def member(self, entry: Entry) -> Member:
        """Return the fields of a member without reading its payload. Raises E-DIGEST if the record is another's."""
        data, kind, body, at = self.start(entry.offset)
        if kind != MEMBER or records.size_of(body) != entry.length:
            raise errors.DigestError("the index names a record that is none of this member", fix=_again())
        length = records.head_length(data[at:])
        if length > len(data) - at:
            data, kind, body, at = self.start(entry.offset, length)
        member = records.member_of(data[at:], body, entry.offset)
        if member.name.encode() != entry.key:
            raise errors.DigestError(f"the record is of a member {member.name!r:.80}", fix=_again())
        return member

    def manifest(self, member: Member) -> dict[str, Any]:
        """Return the manifest of a member's file."""
        return manifests.whole(self.frame(member.frame), member.own)

    def file_bytes(self, entry: Entry) -> bytes:
        """Return the bytes of a member's file, checked against its digest."""
        body = self.body(entry.offset, MEMBER)
        member = records.member_of(body, len(body), entry.offset)
        if member.name.encode() != entry.key or records.size_of(len(body)) != entry.length:
            raise errors.DigestError("the index names a record that is none of this member", fix=_again())
        shared, left = [], member.nbytes - member.payload
        for reference in member.references:
            tensor = self.body(reference.offset, TENSOR, max(left, 0))
            left -= len(tensor)
            shared.append((reference.at, tensor))
        payload = memoryview(records.joined(body[len(body) - member.payload :], shared))
        manifest = self.manifest(member)
        extras, stop = [], len(payload)
        for size in reversed(extra_sizes(manifest)):
            if size > stop:
                raise errors.OffsetError("the extra tensors are longer than the payload")
            extras.append(bytes(payload[stop - size : stop]))
            stop -= size
        data = b"".join(one_tensor.encode(manifest, [bytes(payload[:stop])], extras[::-1]))
        if len(data) != member.nbytes or hashlib.sha256(data).digest() != member.digest:
            raise errors.DigestError("what it is put together of does not match its digest", fix=_again())
        return data

    def holds(self, entry: Entry, digest: bytes) -> bool:
        """Return true if a member is the file of that digest, and undamaged."""
        try:
            return self.member(entry).digest == digest and bool(self.file_bytes(entry))
        except LrcError:
            return False

    def bytes_of(self, name: str) -> bytes:
        """Return the file of a member, with its name in every error."""
        entry = self.entry(name)
        try:
            return self.file_bytes(entry)
        except LrcError as error:
            raise error.at(self.shown(name)) from None

    def compact(self, name: str) -> CompactAdapter:
        """Return the adapter that a member is, fully checked."""
        return file.read_bytes(self.bytes_of(name), self.shown(name))

    def shown(self, name: str) -> Path:
        """Return what messages call a member."""
        return names.spelled_member(self.root, name)


def _again() -> str:
    return f"restore the fleet from a copy, or add what is damaged again, with {spelled('overwrite', True)}"


class _At:
    """A context in which errors name a file that knows none."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, LrcError):
            error.at(self.path)


def _opened(root: Path) -> tuple[heads.Head, _File, list[_File]]:
    """The head, and all files that it states, opened."""
    if not names.is_fleet(root):
        fix = "`lrconvert pack build` makes one"
        raise errors.UnknownLayoutError("is no fleet", fix=fix, path=root)
    before: heads.Head | None = None
    for _ in range(_TRIES):
        head = heads.read(root)
        try:
            return _files(root, head)
        except LrcError:
            if head == before:  # nobody writes: it is gone
                raise
            before = head
    raise errors.FileChangedError("is written to all the time", fix="try it again", path=root)


def _files(root: Path, head: heads.Head) -> tuple[heads.Head, _File, list[_File]]:
    """Open the files of a head. Raises E-IO-KIND if one is gone, E-IO-CHANGED if one is too short."""
    opened: list[_File] = []
    try:
        sizes = [(head.data_name, head.bytes), *((heads.index_name(run), run.bytes) for run in head.runs)]
        for name, nbytes in sizes:
            opened.append(_File(root / name))
            size = opened[-1].size
            if size < nbytes or (name != head.data_name and size > nbytes):
                raise errors.CoverageError(f"has {size} bytes, the head states {nbytes}", path=root / name)
    except BaseException:
        for one in opened:
            one.close()
        raise
    return head, opened[0], opened[1:]
