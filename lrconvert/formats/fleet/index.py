"""The index of a fleet: runs, each a sorted table of keys in one file that is never changed.

Normative text: ``formats/fleet-v1.md``, section 6. A run is a tree whose nodes state the digests of those below; the
head of the fleet states that of the root. A lookup reads one node of each level, of the newest run first. A run whose
neighbour is not much larger is merged with it, so there are few, and each is written few times.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lrconvert.core import errors
from lrconvert.formats.fleet.records import DIGEST_BYTES, Cursor, number

NODE_BYTES = 4096  # that a node is filled to
MAX_NODE = 1 << 16
MAX_LEVELS = 8
KEY_BYTES = 255
RATIO = 4  # a run has at least as many times the entries of the next newer one
MAX_RUNS = 64


class Entry(NamedTuple):
    """The place of a record: the byte it begins at, and its bytes; none for a member that was removed."""

    key: bytes
    offset: int
    length: int


@dataclass(frozen=True)
class Run:
    """A run as the head states it: the `number` of its file, the bytes of file and root, how many entries it has, and
    the digest of the root."""

    number: int
    bytes: int
    root: int
    entries: int
    digest: str


Read = Callable[[int, int], bytes]  # (offset, bytes) of the file of a run


# --- out ------------------------------------------------------------------------------------------------------------


class _Level:
    """Nodes of one level under construction."""

    def __init__(self, level: int) -> None:
        self.level = level
        self.body = bytearray()
        self.count = 0
        self.first = self.last = b""

    def add(self, key: bytes, value: bytes) -> None:
        shared = _shared(self.last, key) if self.count else 0
        self.first = self.first if self.count else key
        self.body += number(shared) + number(len(key) - shared) + key[shared:] + value
        self.count, self.last = self.count + 1, key

    def node(self) -> bytes:
        """Return the node, and begin another."""
        made = bytes([self.level]) + number(self.count) + bytes(self.body)
        self.body, self.count = bytearray(), 0
        return made


def _shared(one: bytes, other: bytes) -> int:
    """The bytes that two keys begin with alike."""
    for n, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return n
    return min(len(one), len(other))


def write(entries: Iterable[Entry], file_number: int, put: Callable[[bytes], object]) -> Run | None:
    """Put the file of a run of sorted entries in pieces; None if there are no entries."""
    levels = [_Level(0)]
    at = count = 0

    def close(depth: int) -> tuple[int, bytes]:
        """Put the open node of a level, and enter it in the level above it."""
        nonlocal at
        first, node = levels[depth].first, levels[depth].node()
        put(node)
        digest = hashlib.sha256(node).digest()
        if depth + 1 == len(levels):
            levels.append(_Level(depth + 1))
        add(depth + 1, first, number(at) + number(len(node)) + digest)
        at += len(node)
        return len(node), digest

    def add(depth: int, key: bytes, value: bytes) -> None:
        level = levels[depth]
        if level.count > 1 and len(level.body) + len(key) + len(value) > NODE_BYTES:
            close(depth)
        levels[depth].add(key, value)

    for entry in entries:
        add(0, entry.key, number(entry.offset) + number(entry.length))
        count += 1
    if not count:
        return None
    depth = 0
    while depth + 1 < len(levels):
        close(depth)
        depth += 1
    node = levels[depth].node()  # the root
    put(node)
    return Run(file_number, at + len(node), len(node), count, hashlib.sha256(node).hexdigest())


# --- in -------------------------------------------------------------------------------------------------------------


class _Child(NamedTuple):
    key: bytes
    offset: int
    length: int
    digest: bytes


def _node(data: bytes, digest: bytes, level: int | None) -> tuple[int, list[Entry] | list[_Child]]:
    """Level and entries of a node, or its children. Raises E-DIGEST, E-CANON, E-OFF, E-LIMIT."""
    if hashlib.sha256(data).digest() != digest:
        raise errors.DigestError("a node of the index does not match its digest", fix=_REBUILD)
    cursor = Cursor(data)
    own = cursor.take(1)[0]
    if own >= MAX_LEVELS or (level is not None and own != level):
        raise errors.LimitError(f"a node of the index is of level {own}")
    count = cursor.number()
    entries: list[Entry] = []
    children: list[_Child] = []
    key = b""
    for n in range(count):
        before, shared = key, cursor.number()
        if shared > len(before):
            raise errors.OffsetError("a key of the index repeats more of the one before it than that has")
        key = before[:shared] + cursor.take(cursor.number())
        if not 0 < len(key) <= KEY_BYTES:
            raise errors.LimitError(f"a key of the index has {len(key)} bytes; 1 to {KEY_BYTES} are allowed")
        if n and (key <= before or _shared(before, key) != shared):
            raise errors.CanonicalError("the keys of the index do not rise, or are not spelled in the one way")
        offset, length = cursor.number(), cursor.number()
        if own:
            children.append(_Child(key, offset, length, cursor.take(DIGEST_BYTES)))
        else:
            entries.append(Entry(key, offset, length))
    if cursor.at != len(data) or not count:
        raise errors.OffsetError("a node of the index has no entries, or bytes behind them")
    return own, children if own else entries


_REBUILD = "`lrconvert pack reindex` makes it anew"


@dataclass(frozen=True)
class Tree:
    """A run that is open for reading."""

    run: Run
    read: Read

    def _root(self) -> tuple[int, list[Entry] | list[_Child]]:
        data = self.read(self.run.bytes - self.run.root, self.run.root)
        return _node(data, bytes.fromhex(self.run.digest), None)

    def _child(self, child: _Child, level: int) -> list[Entry] | list[_Child]:
        if child.length > MAX_NODE or child.offset + child.length > self.run.bytes - self.run.root:
            raise errors.LimitError(f"a node of the index has {child.length} bytes at byte {child.offset}")
        below = _node(self.read(child.offset, child.length), child.digest, level)[1]
        if below[0].key != child.key:
            raise errors.CanonicalError("a node of the index begins with another key than is stated above it")
        return below

    def find(self, key: bytes) -> Entry | None:
        """Return the entry of a key, None if there is none. Raises what a damaged node is refused with."""
        level, items = self._root()
        while True:
            at = _last(items, key)
            if at < 0:
                return None
            item = items[at]
            if isinstance(item, Entry):
                return item if item.key == key else None
            level -= 1
            items = self._child(item, level)

    def entries(self, start: bytes = b"") -> Iterator[Entry]:
        """Yield all entries from the key `start` on, in order. One node of each level is in memory."""
        level, items = self._root()
        yield from self._under(items, level, start)

    def _under(self, items: list[Entry] | list[_Child], level: int, start: bytes) -> Iterator[Entry]:
        first = max(_last(items, start), 0)
        for item in items[first:]:
            if isinstance(item, _Child):
                yield from self._under(self._child(item, level - 1), level - 1, start)
            elif item.key >= start:
                yield item

    def check(self) -> Iterator[errors.LrcError | Entry]:
        """Yield every entry, in place of what a damaged node holds its error, and at the end one if nodes do not cover
        the file, or entries are not as many as are stated."""
        nodes: list[tuple[int, int]] = [(self.run.bytes - self.run.root, self.run.root)]
        count = 0
        before = b""
        try:
            level, items = self._root()
        except errors.LrcError as error:
            yield error
            return
        is_whole = True
        for item in self._checked(items, level, nodes):
            if isinstance(item, errors.LrcError):
                is_whole = False
            else:
                count += 1
                if count > 1 and item.key <= before:
                    yield errors.CanonicalError("the keys of the index do not rise from node to node")
                before = item.key
            yield item
        at = 0
        for offset, length in sorted(nodes):
            if offset != at:
                break
            at += length
        if is_whole and (at != self.run.bytes or count != self.run.entries):
            yield errors.CoverageError("the nodes of the index are not all of its file, or are not as many as stated")

    def _checked(
        self, items: list[Entry] | list[_Child], level: int, nodes: list[tuple[int, int]]
    ) -> Iterator[errors.LrcError | Entry]:
        for item in items:
            if isinstance(item, Entry):
                yield item
                continue
            nodes.append((item.offset, item.length))
            try:
                below = self._child(item, level - 1)
            except errors.LrcError as error:
                yield error
                continue
            yield from self._checked(below, level - 1, nodes)


def _last(items: Sequence[Entry] | Sequence[_Child], key: bytes) -> int:
    """The place of the last item whose key is not above `key`, -1 if all are."""
    low, high = 0, len(items)
    while low < high:
        middle = (low + high) // 2
        if items[middle].key <= key:
            low = middle + 1
        else:
            high = middle
    return low - 1


# --- runs together --------------------------------------------------------------------------------------------------


def newest(runs: Sequence[Iterable[Entry]]) -> Iterator[Entry]:
    """Yield for every key, in order, the entry of the newest run that has it; `runs` are oldest first."""
    last = None
    for key, _, entry in heapq.merge(*(_tagged(run, age) for age, run in enumerate(runs))):
        if key != last:
            yield entry
        last = key


def _tagged(run: Iterable[Entry], age: int) -> Iterator[tuple[bytes, int, Entry]]:
    for entry in run:
        yield entry.key, -age, entry


def find(trees: Sequence[Tree], key: bytes) -> Entry | None:
    """Return the newest entry of a key, None if there is none, or the member was removed; `trees` are oldest first."""
    for tree in reversed(trees):
        entry = tree.find(key)
        if entry is not None:
            return entry if entry.length else None
    return None


def to_merge(runs: Sequence[Run], new: int) -> int:
    """Return how many of the newest runs are merged with `new` entries that come."""
    count = 0
    for run in reversed(runs):
        if run.entries >= RATIO * new:
            break
        new += run.entries
        count += 1
    return count
