"""The calls that change a disk, one method each: the one seam at which tests make them fail, or write them down.

Everything else in `lrconvert.io.durable` goes through `current`. Methods raise OSError. While a folder is `guarded`,
they reach what is below it by descriptors that were opened without following links: a link there, even one that comes
at the last moment, is an error, and nothing outside is touched.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

Buffer = bytes | bytearray | memoryview

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_guarded: ContextVar[tuple[Path, ...]] = ContextVar("guarded", default=())


@contextmanager
def guarded(root: Path) -> Iterator[None]:
    """Reach nothing below `root` through a link, until the context ends."""
    before = _guarded.get()
    _guarded.set((*before, root))
    try:
        yield
    finally:
        _guarded.set(before)


@contextmanager
def _at(path: Path) -> Iterator[tuple[int | None, str]]:
    """Give a descriptor of the folder that `path` lies in and its name there; None and the path where no guarded folder
    is above it."""
    roots = [root for root in _guarded.get() if root in path.parents]
    if not roots:
        yield None, os.fspath(path)
        return
    root = min(roots, key=lambda root: len(root.parts))
    descriptor = os.open(root, _FOLDER)
    try:
        for part in path.relative_to(root).parts[:-1]:
            inner = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        yield descriptor, path.name
    finally:
        os.close(descriptor)


class System:
    """The operating system itself."""

    def open(self, path: Path, flags: int, mode: int = 0o666) -> int:
        """A descriptor of a file that is to be written."""
        with _at(path) as (folder, name):
            return os.open(name, flags | os.O_CLOEXEC | os.O_NOFOLLOW, mode, dir_fd=folder)

    def open_folder(self, path: Path) -> int:
        with _at(path) as (folder, name):
            return os.open(name, _FOLDER if folder is None else _FOLDER | os.O_NOFOLLOW, dir_fd=folder)

    def chown(self, descriptor: int, user: int, group: int) -> None:
        os.fchown(descriptor, user, group)

    def chmod(self, descriptor: int, mode: int) -> None:
        os.fchmod(descriptor, mode)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Bytes that were written, perhaps fewer than there are."""
        return os.write(descriptor, data)

    def pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
        return os.pwrite(descriptor, data, offset)

    def copy_range(self, source: int, target: int, nbytes: int, offset: int) -> int:
        """Bytes copied inside the kernel from `offset` of `source` to the position of `target`."""
        return os.copy_file_range(source, target, nbytes, offset)

    def truncate(self, descriptor: int, nbytes: int) -> None:
        """Cut a file off, and write on from there."""
        os.ftruncate(descriptor, nbytes)
        os.lseek(descriptor, nbytes, os.SEEK_SET)

    def fsync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def mkdir(self, path: Path) -> None:
        with _at(path) as (folder, name):
            os.mkdir(name, dir_fd=folder)

    def rename(self, source: Path, target: Path) -> None:
        """Give a file or folder another name; a file of that name is replaced."""
        with _at(source) as (from_folder, old), _at(target) as (to_folder, new):
            os.rename(old, new, src_dir_fd=from_folder, dst_dir_fd=to_folder)

    def exchange(self, one: Path, other: Path) -> bool:
        """Swap two names in one step (Linux renameat2); False where the system or the file system cannot."""
        call = _renameat2()
        at_cwd, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        if call is None:
            return False
        with _at(one) as (folder, name), _at(other) as (other_folder, other_name):
            at, other_at = (at_cwd if place is None else place for place in (folder, other_folder))
            return call(at, os.fsencode(name), other_at, os.fsencode(other_name), swap) == 0

    def link(self, source: Path, target: Path) -> None:
        with _at(source) as (from_folder, old), _at(target) as (to_folder, new):
            os.link(old, new, src_dir_fd=from_folder, dst_dir_fd=to_folder, follow_symlinks=False)

    def unlink(self, path: Path) -> None:
        with _at(path) as (folder, name):
            os.unlink(name, dir_fd=folder)

    def rmdir(self, path: Path) -> None:
        with _at(path) as (folder, name):
            os.rmdir(name, dir_fd=folder)

    def lock(self, descriptor: int) -> None:
        """Take the lock of an open file or folder without waiting; it ends with the descriptor, or the process."""
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def lock_file(self, descriptor: int, shared: bool, wait: bool) -> None:
        """Take the lock of an open file, alone or `shared`; BlockingIOError if it has to `wait` and may not."""
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))

    def touch(self, descriptor: int) -> None:
        """Set the time of an open file to now."""
        os.utime(descriptor)


def _renameat2() -> Callable[..., int] | None:
    try:
        call: Callable[..., int] = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return None
    return call


current = System()
