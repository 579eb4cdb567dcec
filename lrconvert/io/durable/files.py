"""Files that appear whole or not at all, and the few changes that are made to files which are there."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol

from lrconvert.core import errors
from lrconvert.io.durable import system
from lrconvert.io.durable.checks import StrPath, check_output
from lrconvert.io.durable.system import Buffer

_COPY_BYTES = 1 << 23
_NAME_BYTES = 255  # where the file system does not say
_SUFFIX_BYTES = 36  # of a process number, eight digits and a kind, with room for a number of any system
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_NO_FOLDER_SYNC = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
_NO_KERNEL_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.ETXTBSY)


class Writer(Protocol):
    """The file that `atomic_file` and `StagedDirectory.create` give: it that can only be appended to."""

    position: int

    def write(self, data: Buffer) -> int: ...


class File:
    """A file that is appended to: a new one, or with `keep` one that is there, cut off after so many bytes. It has the
    owner, group and mode of `like`, the file that it will replace.

    Errors of the system become E-IO-WRITE on `shown`, the path the user knows. Synced when its context ends.
    """

    def __init__(self, path: Path, shown: Path, like: os.stat_result | None = None, keep: int | None = None) -> None:
        self.path, self.shown, self.position = path, shown, 0 if keep is None else keep
        self._descriptor = -1
        try:
            self._descriptor = system.current.open(path, _CREATE if keep is None else os.O_WRONLY)
            if like is not None:
                take_after(self._descriptor, like)
            if keep is not None:
                system.current.truncate(self._descriptor, keep)
        except OSError as error:
            with suppress(errors.FileWriteError):
                self.close()
            raise not_written(error, shown) from None

    def claim(self) -> None:
        """Lock the file, where that works: `recover` then knows that it is not a leftover."""
        with suppress(OSError):
            system.current.lock(self._descriptor)

    def write(self, data: Buffer) -> int:
        """Append `data`; returns its length in bytes."""
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            try:
                done += _progress(system.current.write(self._descriptor, view[done : done + (1 << 30)]))
            except OSError as error:
                raise not_written(error, self.shown) from None
        self.position += done
        return done

    def copy(self, source: int, offset: int, nbytes: int) -> None:
        """Append `nbytes` of the open descriptor `source` from `offset`, inside the kernel where it can."""
        left = nbytes - self._copy_in_kernel(source, offset, nbytes)
        while left:
            try:
                chunk = os.pread(source, min(left, _COPY_BYTES), offset + nbytes - left)
            except OSError as error:
                raise errors.FileReadError(f"cannot be read: {error.strerror}", path=self.shown) from None
            if not chunk:
                raise errors.FileChangedError("an input ended early; it changed while it was copied", path=self.shown)
            left -= self.write(chunk)

    def _copy_in_kernel(self, source: int, offset: int, nbytes: int) -> int:
        """Bytes that copy_file_range has copied, 0 where the file systems do not offer it."""
        done = 0
        while hasattr(os, "copy_file_range") and done < nbytes:
            try:
                copied = system.current.copy_range(source, self._descriptor, min(nbytes - done, 1 << 30), offset + done)
            except OSError as error:
                if error.errno in _NO_KERNEL_COPY:
                    break
                raise not_written(error, self.shown) from None
            if copied == 0:
                break
            done += copied
        self.position += done
        return done

    def sync(self) -> None:
        with writing(self.shown):
            system.current.fsync(self._descriptor)

    def close(self) -> None:
        """Idempotent. An error of close is an error of writing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with writing(self.shown):
                system.current.close(descriptor)

    def __enter__(self) -> File:
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
            with suppress(errors.FileWriteError):
                self.close()


def _progress(nbytes: int) -> int:
    """Bytes of a write. A system that never takes any would keep us here forever."""
    if nbytes <= 0:
        raise OSError(errno.EIO, "the system takes no more bytes")
    return nbytes


def not_written(error: OSError, path: Path) -> errors.FileWriteError:
    what = f"cannot be written: {error.strerror or error}"
    return errors.FileWriteError(what, fix="nothing was changed; see to the cause and run it again", path=path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn errors of the system into E-IO-WRITE on `path`, the one that the user knows."""
    try:
        yield
    except OSError as error:
        raise not_written(error, path) from None


def take_after(descriptor: int, like: os.stat_result) -> None:
    """Give an open file or folder the owner and group of another, where the system lets us, and its mode."""
    now = os.fstat(descriptor)
    if (now.st_uid, now.st_gid) != (like.st_uid, like.st_gid):
        try:
            system.current.chown(descriptor, like.st_uid, like.st_gid)
        except PermissionError:  # only root gives files away; the group may be one of ours
            with suppress(PermissionError):
                system.current.chown(descriptor, -1, like.st_gid)
    system.current.chmod(descriptor, stat.S_IMODE(like.st_mode))  # last, as a new owner clears bits of it


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    """A descriptor of a file that is changed; it is closed at the end."""
    descriptor = system.current.open(path, flags)
    try:
        yield descriptor
    finally:
        system.current.close(descriptor)


def _name_bytes(folder: Path) -> int:
    """Return how many bytes a name in a folder may have."""
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (OSError, ValueError):
        return _NAME_BYTES


def beside(path: Path, suffix: str, *, hidden: bool = True, room: int | None = None) -> Path:
    """Return the name that work for `path` has in the same folder: its own with a suffix, and with a dot in front of it
    where it is `hidden`. A name that would be longer than the file system takes (with `room` bytes of suffixes) is cut,
    and gets a digest of the whole in place of what it lacks."""
    name, dot = path.name, "." if hidden else ""
    free = _name_bytes(path.parent) - len(dot) - (len(suffix) if room is None else room)
    if len(os.fsencode(name)) > free:
        digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
        while len(os.fsencode(name)) > free - 17:
            name = name[:-1]
        name = f"{name}~{digest}"
    return path.with_name(f"{dot}{name}{suffix}")


def hidden_sibling(path: Path, suffix: str) -> Path:
    """Return a name in the same folder that says whose leftover it is, should the machine stop now."""
    return beside(path, f".{os.getpid()}.{secrets.token_hex(4)}.{suffix}", room=_SUFFIX_BYTES)


_SUFFIX = r"\.\d+\.[0-9a-f]{8}\.(tmp|partial|old)"  # of what `hidden_sibling` gives
_HIDDEN = re.compile(rf"(\..+){_SUFFIX}", re.DOTALL)


def hidden_pattern(path: Path) -> re.Pattern[str]:
    """Return what matches every name that `hidden_sibling` gives for a path."""
    return re.compile(re.escape(hidden_stem(path)) + _SUFFIX)


def hidden_stem(path: Path) -> str:
    """Return what all names begin with that `hidden_sibling` gives for a path."""
    return beside(path, "", room=_SUFFIX_BYTES).name


def stem_of_hidden(name: str) -> str | None:
    """Return the `hidden_stem` that a name begins with; None if `hidden_sibling` did not give it."""
    match = _HIDDEN.fullmatch(name) if name.startswith(".") else None
    return None if match is None else match[1]


def sync_folder(path: Path) -> None:
    """fsync a folder, so that the names in it are on the disk. A file system that does not do that for folders (some
    network ones) sees to it in its own way, or not at all: nothing more can be asked of it. Raises OSError."""
    descriptor = system.current.open_folder(path)
    try:
        try:
            system.current.fsync(descriptor)
        except OSError as error:
            if error.errno not in _NO_FOLDER_SYNC:
                raise
    finally:
        system.current.close(descriptor)


def confirm(path: Path) -> None:
    """fsync the folder that `path` was put into. Raises E-IO-SYNC: it is there, but may not survive a power loss."""
    try:
        sync_folder(path.parent)
    except OSError as error:
        what = f"was written, but its folder was not synced to the disk: {error.strerror}"
        raise errors.DurabilityError(what, fix="check the disk, then what was written", path=path) from None


@contextmanager
def atomic_file(path: StrPath, *, overwrite: bool) -> Iterator[Writer]:
    """Write a file that appears under `path` whole or not at all.

    The mode is that of the file it replaces, else 0666 less the umask. Raises E-OUT-PATH, E-OUT-EXISTS (also if the
    file came to be meanwhile), E-IO-WRITE, E-IO-SYNC.
    """
    path = Path(path)
    old = check_output(path, overwrite, directory=False)
    temporary = hidden_sibling(path, "tmp")
    try:
        with File(temporary, path, old) as file:
            file.claim()
            yield file
        _put_file(temporary, path, overwrite)
    except BaseException:
        with suppress(OSError):
            remove(temporary)
        raise
    try:
        delete_leftover(temporary, path)  # its name, where the commit was a link
    except KeyboardInterrupt:
        with suppress(OSError):
            remove(temporary)
        raise
    confirm(path)


def appended(path: StrPath, data: Buffer) -> None:
    """Append to a file, which is made if it is not there: a log. Raises E-OUT-PATH, E-IO-WRITE."""
    path = Path(path)
    check_output(path, overwrite=True, directory=False)
    with writing(path), _opened(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as descriptor:
        view = memoryview(data).cast("B")
        while view:
            view = view[_progress(system.current.write(descriptor, view)) :]


def discard(path: StrPath) -> None:
    """Remove a file of our own that has served its purpose; it may be gone already. Raises E-IO-WRITE."""
    try:
        remove(Path(path))
    except OSError as error:
        raise errors.FileWriteError(f"cannot be removed: {error.strerror}", path=path) from None


def remove(path: Path) -> None:
    """Delete a file, or a folder with all that is in it, which may be gone already; links are not followed, and nothing
    is reached through one. Folders go before the files beside them, and where a folder stays, so do those files:
    a plan, by which work is known to be ours, outlives its content. Raises OSError, after it has deleted what else it
    can."""
    with system.guarded(path.parent):
        try:
            _remove(path)
        except RecursionError:
            raise OSError(errno.ENAMETOOLONG, "has folders in folders without end") from None


def _remove(path: Path) -> None:
    failed: OSError | None = None
    try:
        if stat.S_ISDIR(path.lstat().st_mode):
            groups: tuple[list[Path], list[Path]] = [], []
            for inner in sorted(path.iterdir()):
                groups[not inner.is_dir() or inner.is_symlink()].append(inner)
            for group in groups:
                for inner in group if failed is None else ():
                    try:
                        _remove(inner)
                    except OSError as error:
                        failed = failed or error
            if failed is None:
                system.current.rmdir(path)
        else:
            system.current.unlink(path)
    except FileNotFoundError:
        return
    if failed is not None:
        raise failed


def _put_file(temporary: Path, path: Path, overwrite: bool) -> None:
    """Commit: give the file its name. Without `overwrite` a link is made, which never replaces a file."""
    with writing(path):
        if not overwrite:
            try:
                system.current.link(temporary, path)
            except FileExistsError:
                raise errors.OutputExistsError("was created by another program meanwhile", path=path) from None
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
            else:
                return
            check_output(path, overwrite, directory=False)
        system.current.rename(temporary, path)


def delete_leftover(leftover: Path, path: Path) -> None:
    """Delete what a commit left beside `path`: a second name, the folder that was replaced, unfinished work. It may be
    gone already. Raises E-IO-SYNC: the output is there."""
    try:
        remove(leftover)
    except OSError as error:
        what = f"is in place, but {leftover.name!r} beside it could not be deleted: {error.strerror}"
        raise errors.DurabilityError(what, fix="delete it", path=path) from None


# --- changing what is there -----------------------------------------------------------------------------------------


def check_changeable(path: Path) -> os.stat_result:
    """Return the stat of a file that may be changed in place. Raises E-OUT-PATH for links, files with other names, and
    what is no file: whoever else uses those bytes did not ask for a change."""
    try:
        info = path.lstat()
    except OSError as error:
        raise errors.OutputPathError(f"cannot be looked at: {error.strerror}", path=path) from None
    if stat.S_ISLNK(info.st_mode):
        what = "is a symbolic link, and is not changed in place"
        raise errors.OutputPathError(what, fix="write a new folder", path=path)
    if not stat.S_ISREG(info.st_mode):
        raise errors.OutputPathError("is not a regular file", path=path)
    if info.st_nlink > 1:
        what = f"has {info.st_nlink} hard links, and is not changed in place"
        raise errors.OutputPathError(what, fix="write a new folder", path=path)
    return info


def install(source: Path, target: Path, like: Path | None = None) -> None:
    """Move a synced file or folder to `target` in one step, over a file that is there, and sync both folders.

    A file gets owner, group and mode of the one that it replaces, or of `like`; what replaces nothing, the owner and
    group of the folder that it comes to, where root writes. Raises E-IO-WRITE.
    """
    model = target if like is None else like
    with writing(target):
        if model.exists() and stat.S_ISREG(source.lstat().st_mode):
            with _opened(source, os.O_WRONLY) as descriptor:
                take_after(descriptor, model.stat())
        elif not target.exists():
            give_to_owner(source, target.parent.stat())
        system.current.rename(source, target)
        sync_folder(target.parent)
        sync_folder(source.parent)


def give_to_owner(path: Path, owner: os.stat_result) -> None:
    """Give what root has written, and all in it, to the owner and group of the folder that it comes to."""
    if os.geteuid() != 0 or (owner.st_uid, owner.st_gid) == (0, 0):
        return
    for place in (path, *path.rglob("*")) if path.is_dir() else (path,):
        if not place.is_symlink():
            opening = system.current.open_folder(place) if place.is_dir() else system.current.open(place, os.O_RDONLY)
            try:
                system.current.chown(opening, owner.st_uid, owner.st_gid)
            finally:
                system.current.close(opening)


def overwrite_bytes(path: Path, pieces: Iterable[tuple[int, Buffer]]) -> None:
    """Put (offset, bytes) into a file that may be changed, and sync it. Doing it again gives the same bytes. Raises
    E-OUT-PATH, E-IO-WRITE."""
    check_changeable(path)
    with writing(path), _opened(path, os.O_WRONLY) as descriptor:
        for offset, data in pieces:
            view = memoryview(data).cast("B")
            done = 0
            while done < len(view):
                done += _progress(system.current.pwrite(descriptor, view[done:], offset + done))
        system.current.fsync(descriptor)
