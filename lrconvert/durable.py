"""The only module that creates, renames or deletes files: after a failure or a crash there is the old state or the new.

Everything is built beside its destination under a hidden name, synced to the disk, and put in place by one rename. Two
kinds of failure are told apart: E-IO-WRITE (nothing was committed) and E-IO-SYNC (the new state is in place, but the
system did not confirm that it would survive a power loss).
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol

from lrconvert.errors import (
    DiskSpaceError,
    DurabilityError,
    FileChangedError,
    FileReadError,
    FileWriteError,
    OutputExistsError,
    OutputPathError,
)

StrPath = str | os.PathLike[str]
Buffer = bytes | bytearray | memoryview

_COPY_BYTES = 1 << 23
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_NO_KERNEL_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.ETXTBSY)


class Writer(Protocol):
    """What `atomic_file` and `StagedDirectory.create` give: a file that can only be appended to."""

    position: int

    def write(self, data: Buffer) -> int: ...

    def copy(self, source: int, offset: int, nbytes: int) -> None: ...


# --- checks before any work -----------------------------------------------------------------------------------------


def check_output(
    path: StrPath, overwrite: bool, inputs: Iterable[StrPath] = (), *, directory: bool | None = None
) -> os.stat_result | None:
    """Refuse an output before any work is done for it; returns the stat of what it would replace, or None.

    `directory` says whether the output will be a folder or a file; None allows either. Raises E-OUT-PATH (a link, the
    wrong kind of thing, a file with other names, no parent folder, one of `inputs` or above or inside one) and
    E-OUT-EXISTS. An empty folder does not count as existing.
    """
    path = Path(path)
    if not path.name or path.name == "..":
        raise OutputPathError("the output path does not end in a name", path=path)
    _check_parent(path)
    for source in map(Path, inputs):
        _check_apart(path, source)
    try:
        info = path.lstat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OutputPathError(f"cannot be looked at: {error.strerror}", path=path) from None
    if stat.S_ISLNK(info.st_mode):
        raise OutputPathError("is a symbolic link", fix="give the path it points to, or remove it", path=path)
    if directory or (directory is None and stat.S_ISDIR(info.st_mode)):
        _check_folder(path, info, overwrite)
        return info
    if not stat.S_ISREG(info.st_mode):
        raise OutputPathError("is not a regular file", fix="give the path of a file", path=path)
    if not overwrite:
        raise OutputExistsError("exists already", fix="choose another name, or pass --overwrite", path=path)
    if info.st_nlink > 1:
        raise OutputPathError(f"has {info.st_nlink} hard links", fix="remove it, or choose another name", path=path)
    return info


def _check_parent(path: Path) -> None:
    parent = path.parent
    if not parent.is_dir():
        what = "is not a folder" if parent.exists() else "does not exist"
        raise OutputPathError(f"the folder {str(parent)!r} {what}", fix="create it first: mkdir -p", path=path)


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # a link that leads to itself
        raise OutputPathError("is a link that leads nowhere", fix="remove it, or choose another", path=path) from None


def _check_apart(path: Path, source: Path) -> None:
    """Raise E-OUT-PATH if writing `path` would touch `source`."""
    ours, theirs = _resolved(path), _resolved(source)
    if ours == theirs:
        raise OutputPathError("is also the input", fix="choose another output", path=path)
    if ours in theirs.parents:
        raise OutputPathError(f"holds the input {str(source)!r}", fix="choose another output", path=path)
    if theirs in ours.parents:
        raise OutputPathError(f"lies inside the input {str(source)!r}", fix="choose another output", path=path)


def _check_folder(path: Path, info: os.stat_result, overwrite: bool) -> None:
    if not stat.S_ISDIR(info.st_mode):
        raise OutputPathError("is not a folder", fix="give the path of a folder", path=path)
    real = _resolved(path)
    if real in (Path.cwd(), Path.home().resolve()) or real in Path.cwd().parents or real.is_mount():
        raise OutputPathError("is a folder that must not be replaced", fix="choose another output", path=path)
    if not overwrite and any(path.iterdir()):
        raise OutputExistsError("exists already and is not empty", fix="choose another, or pass --overwrite", path=path)


def require_space(path: StrPath, nbytes: int) -> None:
    """Raise E-OUT-SPACE if the disk that holds `path` (or its nearest existing parent) has less than `nbytes` free."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    try:
        free = shutil.disk_usage(place).free
    except OSError as error:
        raise FileWriteError(f"the free space cannot be determined: {error.strerror}", path=path) from None
    if free < nbytes:
        raise DiskSpaceError(
            f"{nbytes} bytes are needed and {free} are free", fix="free some space, or write to another disk", path=path
        )


# --- writing --------------------------------------------------------------------------------------------------------


class _File:
    """A new file that is appended to. Errors of the system become E-IO-WRITE on `shown`, the path the user knows."""

    def __init__(self, path: Path, shown: Path, mode: int | None = None) -> None:
        self.path, self.shown, self.position = path, shown, 0
        try:
            self._descriptor = os.open(path, _CREATE, 0o666)
            if mode is not None:
                os.fchmod(self._descriptor, mode)
        except OSError as error:
            raise _not_written(error, shown) from None

    def write(self, data: Buffer) -> int:
        """Append `data`; returns its length in bytes."""
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            try:
                done += os.write(self._descriptor, view[done : done + (1 << 30)])
            except OSError as error:
                raise _not_written(error, self.shown) from None
        self.position += done
        return done

    def copy(self, source: int, offset: int, nbytes: int) -> None:
        """Append `nbytes` of the open descriptor `source` from `offset`, inside the kernel where it can."""
        left = nbytes - self._copy_in_kernel(source, offset, nbytes)
        while left:
            try:
                chunk = os.pread(source, min(left, _COPY_BYTES), offset + nbytes - left)
            except OSError as error:
                raise FileReadError(f"cannot be read: {error.strerror}", path=self.shown) from None
            if not chunk:
                raise FileChangedError("an input ended early; it changed while it was copied", path=self.shown)
            left -= self.write(chunk)

    def _copy_in_kernel(self, source: int, offset: int, nbytes: int) -> int:
        """Bytes that copy_file_range has copied, 0 where the file systems do not offer it."""
        done = 0
        while hasattr(os, "copy_file_range") and done < nbytes:
            try:
                got = os.copy_file_range(source, self._descriptor, min(nbytes - done, 1 << 30), offset + done)
            except OSError as error:
                if error.errno in _NO_KERNEL_COPY:
                    break
                raise _not_written(error, self.shown) from None
            if got == 0:
                break
            done += got
        self.position += done
        return done

    def sync(self) -> None:
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise _not_written(error, self.shown) from None

    def close(self) -> None:
        """Idempotent. An error of close is an error of writing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            try:
                os.close(descriptor)
            except OSError as error:
                raise _not_written(error, self.shown) from None

    def __enter__(self) -> _File:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            try:
                self.sync()
            finally:
                self.close()
        else:
            with suppress(FileWriteError):
                self.close()


def _not_written(error: OSError, path: Path) -> FileWriteError:
    what = f"cannot be written: {error.strerror or error}"
    return FileWriteError(what, fix="nothing was changed; see to the cause and run it again", path=path)


def _hidden_sibling(path: Path, suffix: str) -> Path:
    """A name in the same folder that says whose leftover it is, should the machine stop now."""
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.{suffix}")


def _sync_folder(path: Path) -> None:
    """fsync a folder, so that the names in it are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _confirm(path: Path) -> None:
    """fsync the folder that `path` was put into. Raises E-IO-SYNC: it is there, but may not survive a power loss."""
    try:
        _sync_folder(path.parent)
    except OSError as error:
        what = f"was written, but its folder was not synced to the disk: {error.strerror}"
        raise DurabilityError(what, fix="check the disk, then what was written", path=path) from None


@contextmanager
def atomic_file(path: StrPath, *, overwrite: bool) -> Iterator[Writer]:
    """Write a file that appears under `path` whole or not at all.

    The mode is that of the file it replaces, else 0666 less the umask. Raises E-OUT-PATH, E-OUT-EXISTS (also if the
    file came to be meanwhile), E-IO-WRITE, E-IO-SYNC.
    """
    path = Path(path)
    old = check_output(path, overwrite, directory=False)
    temporary = _hidden_sibling(path, "tmp")
    try:
        with _File(temporary, path, None if old is None else stat.S_IMODE(old.st_mode)) as file:
            yield file
        _put_file(temporary, path, overwrite)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _delete_leftover(temporary, path)  # its name, where the commit was a link
    _confirm(path)


def discard(path: StrPath) -> None:
    """Remove a file of our own that has served its purpose; it may be gone already. Raises E-IO-WRITE."""
    try:
        Path(path).unlink(missing_ok=True)
    except OSError as error:
        raise FileWriteError(f"cannot be removed: {error.strerror}", path=path) from None


def make_folder(path: StrPath) -> None:
    """Make a folder, and those it lies in, where they are not there yet. Raises E-OUT-PATH for what is no folder,
    E-IO-WRITE."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise OutputPathError(
            "is not a folder, nor can it become one", fix="choose another output", path=path
        ) from None
    except OSError as error:
        raise _not_written(error, path) from None


def _put_file(temporary: Path, path: Path, overwrite: bool) -> None:
    """Commit: give the file its name. Without `overwrite` a link is made, which never replaces a file."""
    try:
        if not overwrite:
            try:
                os.link(temporary, path, follow_symlinks=False)
            except FileExistsError:
                raise OutputExistsError("was created by another program meanwhile", path=path) from None
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
            else:
                return
            check_output(path, overwrite, directory=False)
        os.replace(temporary, path)
    except OSError as error:
        raise _not_written(error, path) from None


# --- folders --------------------------------------------------------------------------------------------------------


class StagedDirectory:
    """A folder under construction. Names may have folders in them; those are made on the way."""

    def __init__(self, root: Path, shown: Path) -> None:
        self._root, self._shown = root, shown
        self._folders = {root}

    def _place(self, name: str) -> Path:
        parts = Path(name).parts
        if not parts or Path(name).is_absolute() or ".." in parts:
            raise OutputPathError(f"{name!r} is not a name inside the output folder", path=self._shown)
        path = self._root
        for part in parts[:-1]:
            path = path / part
            if path not in self._folders:
                try:
                    path.mkdir()
                except OSError as error:
                    raise _not_written(error, self._shown / name) from None
                self._folders.add(path)
        return path / parts[-1]

    def create(self, name: str) -> _File:
        """A new file in the folder, synced when its context ends."""
        return _File(self._place(name), self._shown / name)

    def write_bytes(self, name: str, data: Buffer) -> None:
        with self.create(name) as file:
            file.write(data)

    def copy_file(self, source: StrPath, name: str) -> int:
        """A copy of a regular file (or of what a link points to); returns its size in bytes. Raises E-IO-READ."""
        try:
            descriptor = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise FileReadError(f"cannot be opened: {error.strerror}", path=source) from None
        try:
            info = os.fstat(descriptor)
            if not stat.S_ISREG(info.st_mode):
                raise FileReadError("is not a regular file", path=source)
            with self.create(name) as file:
                file.copy(descriptor, 0, info.st_size)
            return info.st_size
        finally:
            with suppress(OSError):
                os.close(descriptor)

    def sync(self) -> None:
        """fsync every folder, the innermost first."""
        try:
            for folder in sorted(self._folders, key=lambda f: len(f.parts), reverse=True):
                _sync_folder(folder)
        except OSError as error:
            raise _not_written(error, self._shown) from None


@contextmanager
def atomic_directory(path: StrPath, *, overwrite: bool) -> Iterator[StagedDirectory]:
    """Build a folder that appears under `path` whole or not at all.

    With `overwrite` an existing folder is replaced in one step where the system can exchange two names, and deleted
    afterwards. Raises E-OUT-PATH, E-OUT-EXISTS, E-IO-WRITE, E-IO-SYNC.
    """
    path = Path(path)
    check_output(path, overwrite, directory=True)
    stage = _hidden_sibling(path, "partial")
    try:
        try:
            stage.mkdir()
        except OSError as error:
            raise _not_written(error, path) from None
        staged = StagedDirectory(stage, path)
        yield staged
        staged.sync()
        old = _put_folder(stage, path, overwrite)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    _confirm(path)
    if old is not None:  # not before the new names are on the disk
        _delete_leftover(old, path)


def _put_folder(stage: Path, path: Path, overwrite: bool) -> Path | None:
    """Commit: give the folder its name. Returns where the replaced folder is now, or None."""
    try:
        if check_output(path, overwrite, directory=True) is None or not any(path.iterdir()):
            os.rename(stage, path)  # fails if `path` has content by now
            return None
        if _exchange(stage, path):
            return stage
        aside = _hidden_sibling(path, "old")
        os.rename(path, aside)
        try:
            os.rename(stage, path)
        except BaseException:
            os.rename(aside, path)
            raise
        return aside
    except OSError as error:
        raise _not_written(error, path) from None


def _delete_leftover(leftover: Path, path: Path) -> None:
    """Delete what a commit left beside `path`: a second name, or the folder that was replaced."""
    try:
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)
    except OSError as error:
        what = f"is in place, but {leftover.name!r} beside it could not be deleted: {error.strerror}"
        raise DurabilityError(what, fix="delete it", path=path) from None


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step (Linux renameat2); False where the system or the file system cannot."""
    call = _renameat2()
    at_cwd, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return call is not None and call(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), swap) == 0


def _renameat2() -> Callable[..., int] | None:
    try:
        call: Callable[..., int] = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return None
    return call
