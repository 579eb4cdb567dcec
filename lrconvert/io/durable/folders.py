"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lrconvert.core.errors import FileReadError, OutputPathError
from lrconvert.io.durable import system
from lrconvert.io.durable.checks import StrPath, check_output
from lrconvert.io.durable.files import (
    File,
    confirm,
    delete_leftover,
    give_to_owner,
    hidden_sibling,
    not_written,
    remove,
    sync_folder,
    writing,
)
from lrconvert.io.durable.system import Buffer


class StagedDirectory:
    """A folder under construction. Names may have folders in them; those are made on the way.

    Attributes: `root`, where it lies now; `shown`, the path the user knows; `is_ours`, which says of a name in it (of a
    folder: with a slash at its end) whether it is one that we write, and may delete.
    """

    def __init__(self, root: Path, shown: Path, is_ours: Callable[[str], bool] = lambda name: True) -> None:
        self.root, self.shown, self.is_ours = root, shown, is_ours
        self._folders = {root}

    def _place(self, name: str) -> Path:
        parts = Path(name).parts
        if not parts or Path(name).is_absolute() or ".." in parts:
            raise OutputPathError(f"{name!r} is not a name inside the output folder", path=self.shown)
        path = self.root
        for part in parts[:-1]:
            path = path / part
            if path not in self._folders:
                with writing(self.shown / name), suppress(FileExistsError):  # of an earlier run
                    system.current.mkdir(path)
                self._folders.add(path)
        return path / parts[-1]

    def create(self, name: str) -> File:
        """Make a new file in the folder, synced when its context ends."""
        return File(self._place(name), self.shown / name)

    def add_folder(self, name: str) -> None:
        """Make a folder of that name, which may exist already."""
        self._place(f"{name}/x")

    def remove(self, name: str) -> None:
        """Delete a file, which may be gone already. Raises E-IO-WRITE."""
        with writing(self.shown / name):
            remove(self._place(name))

    def reopen(self, name: str, nbytes: int) -> File:
        """Open a file that exists, cut off after `nbytes`, to append to it."""
        return File(self._place(name), self.shown / name, keep=nbytes)

    def write_bytes(self, name: str, data: Buffer) -> None:
        with self.create(name) as file:
            file.write(data)

    def copy_file(self, source: StrPath, name: str) -> int:
        """Copy a regular file (or what a link points to), and return its size in bytes. Raises E-IO-READ."""
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

    def clear(self, keep: Collection[str] = ()) -> None:
        """Remove every file of ours but those of the names `keep`, and folders of ours that are empty then. Raises
        E-IO-WRITE."""
        with writing(self.shown):
            self._clear(self.root, keep)
        self._folders = {self.root}

    def _clear(self, folder: Path, keep: Collection[str]) -> None:
        for path in sorted(folder.iterdir()):
            name = path.relative_to(self.root).as_posix()
            if path.is_dir() and not path.is_symlink():
                if self.is_ours(f"{name}/"):
                    self._clear(path, keep)
                    if not any(path.iterdir()):
                        remove(path)
            elif name not in keep and self.is_ours(name):
                remove(path)

    def sync(self) -> None:
        """fsync every folder, the innermost first."""
        with writing(self.shown):
            for folder in sorted(self._folders, key=lambda f: len(f.parts), reverse=True):
                sync_folder(folder)


def make_folder(path: StrPath) -> tuple[Path, ...]:
    """Make a folder, and those it lies in, where they are not there yet; returns those that it made, the outermost
    first. Raises E-OUT-PATH for what is no folder, E-IO-WRITE."""
    path = Path(path)
    missing, made = [], []
    for folder in (path, *path.parents):
        if folder.is_dir():
            break
        missing.append(folder)
    try:
        for folder in reversed(missing):
            with suppress(FileExistsError):  # made meanwhile
                system.current.mkdir(folder)
                made.append(folder)
        if not path.is_dir():
            raise NotADirectoryError
    except (FileExistsError, NotADirectoryError):
        what = "is not a folder, nor can it become one"
        raise OutputPathError(what, fix="choose another output", path=path) from None
    except OSError as error:
        raise not_written(error, path) from None
    return tuple(made)


def remove_empty(made: Sequence[Path]) -> None:
    """Remove folders that `make_folder` made, where nothing was put into them."""
    for folder in reversed(made):
        with suppress(OSError):  # it is not empty, or gone
            system.current.rmdir(folder)


@contextmanager
def atomic_directory(path: StrPath, *, overwrite: bool) -> Iterator[StagedDirectory]:
    """Build a folder that appears under `path` whole or not at all.

    With `overwrite` an existing folder is replaced in one step where the system can exchange two names, and deleted
    afterwards. Raises E-OUT-PATH, E-OUT-EXISTS, E-IO-WRITE, E-IO-SYNC.
    """
    path = Path(path)
    check_output(path, overwrite, directory=True)
    stage = hidden_sibling(path, "partial")
    claim = -1
    try:
        with writing(path):
            system.current.mkdir(stage)
        with suppress(OSError):  # where locks work, `recover` knows by it that this is not a leftover
            claim = os.open(stage, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            system.current.lock(claim)
        try:
            with system.guarded(stage):
                staged = StagedDirectory(stage, path)
                yield staged
                staged.sync()
            old = put_folder(stage, path, overwrite)
        except BaseException:
            with suppress(OSError):
                remove(stage)
            raise
        confirm(path)
        if old is not None:  # not before the new names are on the disk
            delete_leftover(old, path)
    finally:
        if claim >= 0:
            os.close(claim)


def put_folder(stage: Path, path: Path, overwrite: bool) -> Path | None:
    """Commit: give the folder its name and, where root writes, the owner of the one that it replaces. Returns where the
    replaced folder is now, or None."""
    with writing(path):
        if check_output(path, overwrite, directory=True) is None or not any(path.iterdir()):
            system.current.rename(stage, path)  # fails if `path` has content by now
            return None
        give_to_owner(stage, path.lstat())
        if system.current.exchange(stage, path):
            return stage
        aside = hidden_sibling(path, "old")
        system.current.rename(path, aside)
        try:
            system.current.rename(stage, path)
        except BaseException:
            system.current.rename(aside, path)
            raise
        return aside
