"""A folder of expansions that many processes share: each is made once, appears whole, and goes when space is needed.

    CACHE/KEY/                 the expansion as its exporter writes it, and `expansion.json`, which lists it
    CACHE/locks/KEY.lock       held by whoever looks or makes; its time says when the expansion was last asked for
    CACHE/locks/KEY.used       shared by those who need it for longer (`use`)
    CACHE/digests/             digests of files that were read (`sources`)

KEY is a digest of what is expanded and how. An expansion is put in place by one rename, so a killed maker leaves
nothing that is taken for whole. On a hit its list is compared with the names, sizes and times of its files; contents
are read only where a time differs, as after a copy of the folder. What changes no size and no time is not noticed.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lrconvert.core.errors import LockedError, LrcError
from lrconvert.io import durable
from lrconvert.io.container import read_json

LIST = "expansion.json"
LEASE = 600  # seconds for which an expansion that was asked for stays: time to load it
_LOCKS = "locks"
_KEY = re.compile(r"[0-9a-f]{64}")
_HIDDEN = re.compile(r"\.([0-9a-f]{64})\.\d+\.[0-9a-f]{8}\.(?:tmp|partial|old)")
_PIECE = 1 << 20

Files = Mapping[str, Iterable[bytes]]


@dataclass(frozen=True)
class Expansion:
    """An expansion: its `folder`, the `facts` that its maker noted, whether it `was_there`, and `excess`, the bytes of
    the cache above its size, all of them in use."""

    folder: Path
    facts: Mapping[str, Any]
    was_there: bool = True
    excess: int = 0


@dataclass(frozen=True)
class Cache:
    """A folder of expansions, at most `size` bytes of them if that is given; `lease`: seconds for which one that was
    asked for is safe from others' need for space."""

    root: Path
    size: int | None = None
    lease: float = LEASE

    def get(self, key: str, make: Callable[[], tuple[Files, Mapping[str, Any]]]) -> Expansion:
        """Return the expansion of a key; if it is not there, `make` gives its files and facts. Of several that ask at
        once one makes it, the others wait. Raises E-OUT-PATH, E-IO-WRITE, and what `make` raises."""
        durable.make_folder(self.root / _LOCKS)
        with self._lock(key, shared=True):
            present = self.present(key)
        if present is not None:
            return present
        with self._lock(key):
            present = self.present(key)
            if present is not None:
                return present
            made = self._made(key, *make())
        total = self.shrink(keep=key)
        return replace(made, was_there=False, excess=max(0, total - self.size) if self.size is not None else 0)

    def _lock(self, key: str, *, shared: bool = False) -> Any:
        """The lock of an expansion, its time set to now; nothing where the file system has no locks: then two may make
        the same one, and nothing is removed."""
        try:
            lock = durable.file_lock(self._lock_path(key), shared=shared)
        except LockedError:
            return nullcontext()
        assert lock is not None
        lock.stamp()
        return lock

    def _lock_path(self, key: str, kind: str = "lock") -> Path:
        return self.root / _LOCKS / f"{key}.{kind}"

    def present(self, key: str) -> Expansion | None:
        """Return the expansion of a key if it is there and whole."""
        folder = self.root / key
        try:
            listed = read_json(folder / LIST)
            is_whole = _is_whole(folder, listed["files"])
            return Expansion(folder, listed["facts"]) if is_whole else None
        except (LrcError, OSError, KeyError, TypeError, ValueError, AttributeError):
            return None

    def _made(self, key: str, files: Files, facts: Mapping[str, Any]) -> Expansion:
        """Write an expansion; a damaged one of the same key is replaced in one step."""
        with suppress(LockedError):
            durable.clean_up(self.root / key)
        try:
            with durable.atomic_directory(self.root / key, overwrite=True) as folder:
                listed = {name: _written(folder, name, chunks) for name, chunks in files.items()}
                text = json.dumps({"files": listed, "facts": facts}, indent=1, sort_keys=True)
                folder.write_bytes(LIST, text.encode())
        except LrcError:
            present = self.present(key)  # without locks another may have been faster
            if present is None:
                raise
            return present
        return Expansion(self.root / key, facts)

    # --- space ------------------------------------------------------------------------------------------------------

    def use(self, key: str) -> durable.FileLock | None:
        """Keep an expansion from being removed until the lock that this returns is closed, or the process ends; None
        where there are no locks, and nothing is removed. It is to be asked for again (`get`) after that."""
        durable.make_folder(self.root / _LOCKS)
        with suppress(LockedError):
            return durable.file_lock(self._lock_path(key, "used"), shared=True)
        return None

    def entries(self) -> list[tuple[str, int]]:
        """Return key and bytes of every expansion, the least recently asked for first."""
        ages = []
        for path in self.root.iterdir():
            if _KEY.fullmatch(path.name) and not path.is_symlink() and path.is_dir():
                lock = self._lock_path(path.name)
                asked = lock.stat().st_mtime if lock.exists() else 0.0
                ages.append((asked, path.name, sum(_sizes(path))))
        return [(key, nbytes) for _, key, nbytes in sorted(ages)]

    def shrink(self, keep: str = "") -> int:
        """Remove what killed makers left, and the least recently used expansions until the rest fits into `size`; not
        `keep`, none in use, and none younger than the lease. Returns the bytes that remain. Raises E-IO-WRITE."""
        for key in {match[1] for path in self.root.iterdir() if (match := _HIDDEN.fullmatch(path.name))}:
            self._clean_up(key)
        entries = self.entries()
        total = sum(nbytes for _, nbytes in entries)
        for key, nbytes in entries if self.size is not None else ():
            if self.size is None or total <= self.size:
                break
            if key != keep and self._removed(key):
                total -= nbytes
        return total

    def _clean_up(self, key: str) -> None:
        """Remove what killed makers of an expansion left, unless one is at work: its folder bears no mark of that in
        the moment in which it is made, the lock of the key does."""
        durable.make_folder(self.root / _LOCKS)
        with suppress(LockedError):
            lock = durable.file_lock(self._lock_path(key), wait=False)
            if lock is not None:
                with lock:
                    durable.clean_up(self.root / key)

    def _removed(self, key: str) -> bool:
        """Remove an expansion, unless it is used, being made, or was asked for within the lease."""
        path = self._lock_path(key)
        try:
            lock = durable.file_lock(path, wait=False)
            if lock is None:
                return False
            with lock:
                if time.time() - lock.stamped < self.lease:
                    return False
                used = durable.file_lock(self._lock_path(key, "used"), wait=False)
                if used is None:
                    return False
                with used:
                    durable.discard(self.root / key)
                    durable.discard(used.path)
                    durable.discard(path)
                    return True
        except LockedError:
            return False


def _written(folder: durable.StagedDirectory, name: str, chunks: Iterable[bytes]) -> list[Any]:
    """Write a file of an expansion; returns its size, time and digest."""
    digest = hashlib.sha256()
    with folder.create(name) as file:
        for chunk in chunks:
            digest.update(chunk)
            file.write(chunk)
    info = (folder.root / name).stat()
    return [info.st_size, str(info.st_mtime_ns), digest.hexdigest()]  # nanoseconds are beyond JSON's integers


def _is_whole(folder: Path, listed: Mapping[str, list[Any]]) -> bool:
    """Say whether a folder holds what its list says, and nothing else."""
    names = {path.name for path in folder.iterdir()}
    if names != {*listed, LIST}:
        return False
    for name, (nbytes, time_ns, digest) in listed.items():
        info = (folder / name).lstat()
        if info.st_size != nbytes:
            return False
        if str(info.st_mtime_ns) != time_ns and file_digest(folder / name) != digest:
            return False
    return True


def _sizes(folder: Path) -> Iterator[int]:
    for path in folder.iterdir():
        with suppress(OSError):
            yield path.lstat().st_size


def file_digest(path: Path) -> str:
    """Return the sha256 of a file in hex. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()
