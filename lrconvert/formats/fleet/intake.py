"""Members on their way into a fleet: what of each is shared with others, and the records that follow.

What is shared is measured. A tensor lies once from the second member on that has it; which the caller names, from the
first on. The first member of a frame waits for the second: what both have is the frame,
and what is equal in both is never stored twice. Of members that came before, one of each frame is compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lrconvert.core.errors import LrcError
from lrconvert.formats.fleet import manifests, records
from lrconvert.formats.fleet.index import Entry
from lrconvert.formats.fleet.opened import OpenFleet
from lrconvert.formats.fleet.records import FRAME, MEMBER, SHARED_LEAST, TENSOR, Member, Reference
from lrconvert.formats.lrc import file, one_tensor
from lrconvert.lora.adapter import CompactAdapter

_LONG_PATCH = 160  # bytes of what a member states of its own, from which another frame is looked for
_NEAR = 64  # records behind a frame, among which its first member is looked for
_SHORT = 16  # bytes of a digest that is remembered


class Out(Protocol):
    """The data file, which is appended to."""

    position: int

    def write(self, data: bytes) -> int: ...


@dataclass(frozen=True)
class Arrival:
    """An adapter that becomes a member: its file as parts, what that has for bytes and digest, the container `version`
    of the file it comes from."""

    name: str
    parts: file.Parts
    version: int
    nbytes: int
    digest: bytes

    @classmethod
    def of(cls, name: str, compact: CompactAdapter, version: int = one_tensor.VERSION) -> Arrival:
        """Return an adapter as it arrives. Raises what writing its file raises."""
        parts = file.parts(compact)
        digest, nbytes = hashlib.sha256(), 0
        for piece in one_tensor.encode(parts.manifest, [data for _, data in parts.payload], parts.extras):
            digest.update(piece)
            nbytes += len(piece)
        return cls(name, parts, version, nbytes, digest.digest())

    @classmethod
    def of_file(cls, name: str, data: bytes, shown: Path, came_as: int = 0) -> Arrival:
        """Return the adapter of a file's bytes as it arrives; `came_as`: it came as another container version. Raises
        what reading it raises."""
        compact, version = file.read_bytes(data, shown), file.version_of(data, shown)
        if version != one_tensor.VERSION:
            return cls.of(name, compact, version)
        parts = file.parts_of(compact, data)
        digest = hashlib.sha256(data).digest()
        return cls(name, parts, came_as or version, len(data), digest)

    def tensors(self) -> list[tuple[str, bytes]]:
        """Return (name, bytes) of all tensors, extra ones last."""
        extras = [(f"extra.{n}", data) for n, data in enumerate(self.parts.extras)]
        return [*self.parts.payload, *extras]

    def digests(self) -> dict[str, bytes]:
        """Return the digests of the tensors that are large enough to be shared, by their names."""
        return {name: hashlib.sha256(data).digest() for name, data in self.tensors() if len(data) >= SHARED_LEAST}


@dataclass(frozen=True)
class _Frame:
    offset: int
    content: Mapping[str, Any]


@dataclass
class Intake:
    """Members that are put into a data file, `out`. `fleet` is what lies in it already; `share` names tensors that are
    shared whoever else has them. `entries` are what the index gets; `named` the names in `share` that a member had.
    """

    out: Out
    fleet: OpenFleet | None = None
    share: Collection[str] = ()
    entries: list[Entry] = field(default_factory=list)
    named: set[str] = field(default_factory=set)
    _frames: dict[bytes, list[_Frame]] = field(default_factory=dict, init=False)
    _held: dict[bytes, Arrival] = field(default_factory=dict, init=False)
    _shared: dict[bytes, int] = field(default_factory=dict, init=False)
    _seen: set[bytes] = field(default_factory=set, init=False)
    _unchecked: set[bytes] = field(default_factory=set, init=False)
    _looked_at: set[int] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        if self.fleet is None:
            return
        for entry in self.fleet.frames():
            with suppress(LrcError):  # what is damaged is not shared any more
                content = self.fleet.frame(entry.offset)
                self._frames.setdefault(manifests.group_key(content), []).append(_Frame(entry.offset, content))
        for entry in self.fleet.shared_tensors():
            self._shared[entry.key[-records.DIGEST_BYTES :]] = entry.offset
        self._unchecked.update(self._shared)

    def put(self, arrival: Arrival) -> None:
        """Take a member in; it may wait for the next one."""
        manifest = arrival.parts.manifest
        key = manifests.group_key(manifest)
        frame, cost = self._cheapest(key, manifest)
        if frame is not None and cost <= _LONG_PATCH:
            self._look_at_first(frame)
            self._write(arrival, frame, ())
        elif key in self._held:
            self._write_both(self._held.pop(key), arrival, key)
        else:
            self._held[key] = arrival

    def finish(self) -> list[Entry]:
        """Write what waits, and return all entries in the order of their keys."""
        for key, arrival in self._held.items():
            frame, _ = self._cheapest(key, arrival.parts.manifest)
            if frame is None:
                frame = self._new_frame(key, manifests.first_frame(arrival.parts.manifest))
            self._write(arrival, frame, ())
        self._held.clear()
        return sorted(self.entries)

    # --- frames -----------------------------------------------------------------------------------------------------

    def _cheapest(self, key: bytes, manifest: Mapping[str, Any]) -> tuple[_Frame | None, int]:
        """The frame that leaves the least to state, and how many bytes that takes."""
        costs = [(len(_patch(frame.content, manifest)), n) for n, frame in enumerate(self._frames.get(key, ()))]
        if not costs:
            return None, 0
        cost, n = min(costs)
        return self._frames[key][n], cost

    def _write_both(self, first: Arrival, second: Arrival, key: bytes) -> None:
        """Write two members of one frame, a new one where that pays."""
        both = [first.parts.manifest, second.parts.manifest]
        content = manifests.common(*both)
        known = [self._cheapest(key, manifest) for manifest in both]
        new = len(manifests.pack_frame(content)) + sum(len(_patch(content, one)) for one in both)
        equal = {*first.digests().values()} & {*second.digests().values()}
        if known[0][0] is None or new < sum(cost for _, cost in known):
            frame = self._new_frame(key, content)
            known = [(frame, 0), (frame, 0)]
        for arrival, (frame_of, _) in zip((first, second), known, strict=True):
            assert frame_of is not None  # both have one, or the new one
            self._write(arrival, frame_of, equal)

    def _new_frame(self, key: bytes, content: Mapping[str, Any]) -> _Frame:
        offset = self._record(FRAME, manifests.pack_frame(content))
        frame = _Frame(offset, content)
        self._frames.setdefault(key, []).append(frame)
        self._looked_at.add(offset)
        return frame

    def _look_at_first(self, frame: _Frame) -> None:
        """Remember the tensors of the first member that a frame of an earlier writer has, to compare those that come.
        A damaged one shares nothing."""
        if self.fleet is None or frame.offset in self._looked_at:
            return
        self._looked_at.add(frame.offset)
        with suppress(LrcError):
            if entry := _first_member(self.fleet, frame.offset):
                first = Arrival.of_file("", self.fleet.file_bytes(entry), self.fleet.root)
                self._seen.update(digest[:_SHORT] for digest in first.digests().values())

    # --- records ----------------------------------------------------------------------------------------------------

    def _record(self, kind: int, content: bytes) -> int:
        """Write what members have in common, and return where it lies."""
        offset, stored = self.out.position, records.encode(kind, content)
        self.out.write(stored)
        digest = hashlib.sha256(content).digest()
        self.entries.append(Entry(records.key_of(kind, digest), offset, len(stored)))
        return offset

    def _write(self, arrival: Arrival, frame: _Frame, equal: Collection[bytes]) -> None:
        """Write a member; `equal` are digests of tensors that another member, still to come, has too."""
        digests = arrival.digests()
        references: list[Reference] = []
        own: list[bytes] = []
        at = 0
        for name, data in arrival.tensors():
            digest = digests.get(name)
            offset = None
            if digest is not None:
                offset = self._place(digest, data, name in self.share or digest in equal)
                self.named.update({name} & set(self.share))
            if offset is None or any(reference.offset == offset for reference in references):
                own.append(data)
            else:
                references.append(Reference(at, offset))
            at += len(data)
        payload = b"".join(own)
        patch = _patch(frame.content, arrival.parts.manifest)
        about = (arrival.name, arrival.digest, arrival.nbytes, arrival.version, frame.offset, patch)
        member = Member(*about, tuple(references), len(payload))
        offset, stored = self.out.position, records.encode(MEMBER, member.head() + payload)
        self.out.write(stored)
        self.entries.append(Entry(arrival.name.encode(), offset, len(stored)))

    def _place(self, digest: bytes, data: bytes, is_shared: bool) -> int | None:
        """Return where a tensor lies that is shared, None for one that is the member's own."""
        if digest in self._unchecked:
            self._check(digest)
        if digest not in self._shared:
            if not is_shared and digest[:_SHORT] not in self._seen:
                self._seen.add(digest[:_SHORT])
                return None
            self._shared[digest] = self._record(TENSOR, data)
        return self._shared[digest]

    def _check(self, digest: bytes) -> None:
        """Forget a tensor of an earlier writer that is damaged: it is written anew."""
        self._unchecked.discard(digest)
        try:
            assert self.fleet is not None  # whose tensor it is
            if hashlib.sha256(self.fleet.body(self._shared[digest], TENSOR)).digest() == digest:
                return
        except LrcError:
            pass
        del self._shared[digest]


def _patch(frame: Mapping[str, Any], manifest: Mapping[str, Any]) -> bytes:
    return manifests.packed_patch(frame, manifests.with_parts_of(frame, manifest))


def _first_member(fleet: OpenFleet, frame: int) -> Entry | None:
    """The first member behind a frame that is of it, None if none is near."""
    offset = frame
    for _ in range(_NEAR):
        if offset >= fleet.head.bytes:
            return None
        data, kind, body, at = fleet.start(offset)
        if kind == MEMBER:
            length = records.head_length(data[at:])
            data = fleet.start(offset, length)[0]
            member = records.member_of(data[at:], body, offset)
            if member.frame == frame:
                return Entry(member.name.encode(), offset, records.size_of(body))
        offset += records.size_of(body)
    return None
