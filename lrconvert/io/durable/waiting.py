"""Locks that are waited for, and locks that many hold at once: empty files of their own, beside what they guard.

`locked` refuses a folder that another run works in; here whoever comes second waits, and takes what the first has made.
A lock ends with the process that holds it, so none is ever stale. Locks are flock's: on the disks of one machine they
hold among all its processes, on NFS (version 4, Linux) among machines, elsewhere as the file system says.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from lrconvert.core.errors import LockedError
from lrconvert.io.durable import system
from lrconvert.io.durable.files import not_written

_CREATE = os.O_RDWR | os.O_CREAT


class FileLock:
    """A lock that is held until it is closed, or its context or process ends."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor

    def stamp(self) -> None:
        """Set the time of the file to now, where it may be written: it says when its lock was last taken."""
        with suppress(OSError):
            system.current.touch(self._descriptor)

    @property
    def stamped(self) -> float:
        """Return the time of the file, in seconds."""
        return os.fstat(self._descriptor).st_mtime

    def close(self) -> None:
        """Let go of the lock. Idempotent."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> FileLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def file_lock(path: Path, *, shared: bool = False, wait: bool = True) -> FileLock | None:
    """Return the lock of a file, which is made if it is not there: alone, or `shared` with others that share it. None
    if another holds it and this does not `wait`. Raises E-LOCKED if the file system gives no locks, E-IO-WRITE.
    """
    while True:
        descriptor = _opened(path, shared)
        try:
            system.current.lock_file(descriptor, shared, wait)
            held, named = os.fstat(descriptor), path.stat() if path.exists() else None
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            os.close(descriptor)
            what = f"the file system gives no lock ({error.strerror})"
            raise LockedError(what, fix="take a folder on another disk", path=path) from None
        except BaseException:
            os.close(descriptor)
            raise
        if named is not None and (held.st_ino, held.st_dev) == (named.st_ino, named.st_dev):
            return FileLock(path, descriptor)
        os.close(descriptor)  # it was deleted while this waited for it


def _opened(path: Path, shared: bool) -> int:
    """A descriptor of a lock file; of one that is there, a reader's is enough to share it."""
    try:
        return system.current.open(path, _CREATE)
    except OSError as error:
        if shared:
            with suppress(OSError):
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        raise not_written(error, path) from None
