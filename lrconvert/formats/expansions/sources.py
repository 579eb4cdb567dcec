"""The files that are expanded, and their digests, for which a file that was read before is not read again.

A digest is noted with what tells a file and its content from others: of a local one its device, inode, size and both
times. A file that is changed in the very moment in which it is read may keep them all, so nothing is noted of a file
that was written to in the last seconds. Who sets the times of a changed file to what they were changes that of its
inode all the same.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lrconvert.core.errors import FileChangedError, FileKindError, FileReadError, LrcError
from lrconvert.formats.expansions.cache import file_digest
from lrconvert.formats.fleet import names
from lrconvert.formats.fleet.opened import OpenFleet
from lrconvert.io import durable, remote
from lrconvert.io.container import read_small

_SETTLED = 2.0  # seconds: the coarsest clock of a file system
_RECORD_BYTES = 4096


@dataclass(frozen=True)
class Opened:
    """A source that is looked at: the sha256 of its content in hex; `path`, which gives it as a local file, fetched
    when it is needed; and `check`, which raises E-IO-CHANGED if it is another than it was."""

    digest: str
    path: Callable[[], Path]
    check: Callable[[], None]


class Source(Protocol):
    """A file to be expanded. `shown` is what messages call it."""

    @property
    def shown(self) -> str: ...

    def opened(self, records: Path) -> AbstractContextManager[Opened]:
        """Look at it, until the context ends; digests are noted in the folder `records`."""
        ...


@dataclass(frozen=True)
class LocalFile:
    """A file of this machine."""

    path: Path

    @property
    def shown(self) -> str:
        return str(self.path)

    @contextmanager
    def opened(self, records: Path) -> Iterator[Opened]:
        """Look at the file. Raises E-IO-KIND, E-IO-READ, E-IO-CHANGED."""
        identity = _identity(self.path)
        place = str(self.path.absolute())
        digest = known_digest(records, place, identity)

        def check() -> None:
            if _identity(self.path) != identity:
                raise FileChangedError("changed while it was read", fix="try it again", path=self.path)

        if digest is None:
            is_settled = time.time() - self.path.stat().st_mtime > _SETTLED
            digest = read_digest(self.path)
            check()
            if is_settled:
                note_digest(records, place, identity, digest)
        yield Opened(digest, lambda: self.path, check)


@dataclass(frozen=True)
class RemoteFile:
    """A file at a URL. It is fetched when it is needed, and kept no longer."""

    place: remote.Store
    entry: remote.Entry

    @property
    def shown(self) -> str:
        return str(self.place.url)

    @contextmanager
    def opened(self, records: Path) -> Iterator[Opened]:
        """Look at the file; one of a version that was fetched before is not fetched. Raises E-REMOTE, E-ACCESS,
        E-IO-CHANGED."""
        with ExitStack() as stack:
            fetched: list[Path] = []

            def path() -> Path:
                if not fetched:
                    files = remote.Files(self.place.url, [(self.place, self.entry)], self.entry.name)
                    fetched.append(remote.fetch(files, stack.enter_context(remote.folder("adapter"))))
                return fetched[0]

            version = self.entry.version
            digest = known_digest(records, self.shown, version) if version else None
            if digest is None:
                digest = read_digest(path())
                if version:
                    note_digest(records, self.shown, version, digest)
            yield Opened(digest, path, lambda: None)


@dataclass(frozen=True)
class FleetMember:
    """A member of a fleet. Its file is put together when it is needed, and kept no longer; its digest is known."""

    root: Path
    name: str

    @property
    def shown(self) -> str:
        return str(names.spelled_member(self.root, self.name))

    @contextmanager
    def opened(self, records: Path) -> Iterator[Opened]:
        """Look at the member as it is now. Raises E-MISSING, E-DIGEST, E-IO-KIND."""
        with ExitStack() as stack, OpenFleet(self.root) as fleet:
            digest = fleet.member(fleet.entry(self.name)).digest.hex()

            def path() -> Path:
                data = fleet.bytes_of(self.name)
                copy = stack.enter_context(remote.folder("member")) / "adapter.lrc"
                with durable.atomic_file(copy, overwrite=False) as file:
                    file.write(data)
                return copy

            yield Opened(digest, path, lambda: None)


def _identity(path: Path) -> str:
    try:
        info = path.stat()
    except OSError as error:
        raise FileKindError(f"cannot be looked at: {error.strerror}", path=path) from None
    return "/".join(map(str, (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)))


def read_digest(path: Path) -> str:
    """Return the digest of a file. Raises E-IO-READ."""
    try:
        return file_digest(path)
    except OSError as error:
        raise FileReadError(f"cannot be read: {error.strerror}", path=path) from None


def known_digest(records: Path, place: str, identity: str) -> str | None:
    """Return the digest that was noted of what lies at a place, if it is still the same."""
    with suppress(LrcError, ValueError, OSError):
        noted, digest = read_small(_record(records, place), _RECORD_BYTES).decode().rsplit(" ", 1)
        if noted == identity and len(digest) == 64:
            return digest
    return None


def note_digest(records: Path, place: str, identity: str, digest: str) -> None:
    """Note the digest of what lies at a place; a cache that cannot be written to goes without."""
    with suppress(LrcError):
        durable.make_folder(records)
        with durable.atomic_file(_record(records, place), overwrite=True) as file:
            file.write(f"{identity} {digest}".encode())


def _record(records: Path, place: str) -> Path:
    return records / hashlib.sha256(place.encode(errors="surrogateescape")).hexdigest()
