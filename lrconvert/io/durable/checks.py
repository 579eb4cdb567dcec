"""Checks of an output before any work is done for it: what it would replace, what it would touch, whether it fits."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path

from lrconvert.core.errors import DiskSpaceError, FileWriteError, OutputExistsError, OutputPathError
from lrconvert.core.wording import spelled

StrPath = str | os.PathLike[str]


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
        raise OutputExistsError(
            "exists already", fix=f"choose another name, or pass {spelled('overwrite', True)}", path=path
        )
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


def _home() -> Path | None:
    """The user's home, if the user has one: in containers numbers without a name have none."""
    try:
        return Path.home().resolve()
    except RuntimeError:
        return None


def _check_folder(path: Path, info: os.stat_result, overwrite: bool) -> None:
    if not stat.S_ISDIR(info.st_mode):
        raise OutputPathError("is not a folder", fix="give the path of a folder", path=path)
    real = _resolved(path)
    if real in (Path.cwd(), _home()) or real in Path.cwd().parents or real.is_mount():
        raise OutputPathError("is a folder that must not be replaced", fix="choose another output", path=path)
    if not overwrite and any(path.iterdir()):
        raise OutputExistsError(
            "exists already and is not empty", fix=f"choose another, or pass {spelled('overwrite', True)}", path=path
        )


def check_own(root: Path, *, hard_links: bool = False) -> None:
    """Raise E-OUT-PATH if a folder that we alone write, or anything in it, is a link, or, unless `hard_links` are
    allowed, a file with names elsewhere: what is tidied or put back must be nobody else's."""
    files: dict[tuple[int, int], list[tuple[Path, int]]] = {}
    todo = [root]
    while todo:
        path = todo.pop()
        try:
            info = path.lstat()
            todo += sorted(path.iterdir()) if stat.S_ISDIR(info.st_mode) else []
        except FileNotFoundError:
            continue
        except OSError as error:
            raise OutputPathError(f"cannot be looked at: {error.strerror}", path=path) from None
        if stat.S_ISLNK(info.st_mode):
            what = "is a link, and in the way of the record or journal that a merge keeps there"
            raise OutputPathError(what, fix="remove it", path=path)
        if not stat.S_ISDIR(info.st_mode):
            files.setdefault((info.st_dev, info.st_ino), []).append((path, info.st_nlink))
    for names in () if hard_links else files.values():
        path, links = names[0]
        if links > len(names):  # a file that just got its name may have two of ours
            what = f"has {links} hard links, where a merge keeps its own files"
            raise OutputPathError(what, fix="move it away", path=path)


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
