"""The calls that change a disk, one method each: the one seam at which tests make them fail, or write them down.

Everything else in `lrconvert.io.durable` goes through `current`. Methods raise OSError.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

Buffer = bytes | bytearray | memoryview


class System:
    """The operating system itself."""

    def open(self, path: Path, flags: int, mode: int = 0o666) -> int:
        """A descriptor of a file that is to be written."""
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, mode)

    def open_folder(self, path: Path) -> int:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

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
        os.mkdir(path)

    def rename(self, source: Path, target: Path) -> None:
        """Give a file or folder another name; a file of that name is replaced."""
        os.rename(source, target)

    def exchange(self, one: Path, other: Path) -> bool:
        """Swap two names in one step (Linux renameat2); False where the system or the file system cannot."""
        call = _renameat2()
        at_cwd, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        return call is not None and call(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), swap) == 0

    def link(self, source: Path, target: Path) -> None:
        os.link(source, target, follow_symlinks=False)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def rmdir(self, path: Path) -> None:
        os.rmdir(path)

    def lock(self, descriptor: int) -> None:
        """Take the lock of an open file or folder without waiting; it ends with the descriptor, or the process."""
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _renameat2() -> Callable[..., int] | None:
    try:
        call: Callable[..., int] = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return None
    return call


current = System()
