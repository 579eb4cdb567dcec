"""Locks, folders of unfinished work that a later run can go on with, and what killed runs have left.

The work of an output `out` lies beside it in `.out.partial/`: files about the work, and `model/`, which becomes `out`.
Whoever writes holds the lock of the folder it writes in (flock). It ends with the process, so no lock is ever stale,
and what is not locked is a leftover. Where a file system gives no locks, only what this run has made itself is written
in: making a folder is a lock, too, but one that outlives a crash. A network file system may keep the locks of folders
to each machine; that cannot be seen from here.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from lrconvert.core.errors import DurabilityError, FileReadError, FileWriteError, LockedError, OutputPathError
from lrconvert.core.wording import verb
from lrconvert.io.durable import system
from lrconvert.io.durable.checks import StrPath, check_output
from lrconvert.io.durable.files import (
    beside,
    confirm,
    delete_leftover,
    hidden_pattern,
    hidden_stem,
    not_written,
    remove,
    stem_of_hidden,
    sync_folder,
    writing,
)
from lrconvert.io.durable.folders import StagedDirectory, put_folder

CONTENT = "model"
PLAN_NAME, LINES_NAME = "plan.json", "done.jsonl"  # of work: its plan, written first and deleted last; what is done
_MARK = b'"format":"lrconvert-'  # in a plan of ours
_PLAN_BYTES = 1 << 28
_IF_NONE_IS = "if none is, remove it, and run it again"


@contextmanager
def locked(folder: Path, *, needed: bool = True, fix: str = "write a new folder, or to another disk") -> Iterator[None]:
    """Hold the lock of a folder, and reach nothing below it through a link. The lock is not `needed` for one that this
    run has just made: who finds it later needs it.

    Raises E-LOCKED if another run has it or, where it is needed, if there are no locks (`fix`: what to do then);
    E-OUT-PATH if it is no folder.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise OutputPathError(f"cannot be opened as a folder: {error.strerror}", path=folder) from None
    try:
        try:
            system.current.lock(descriptor)
        except BlockingIOError:
            raise LockedError("another run is at work here", fix="wait until it ends", path=folder) from None
        except OSError as error:
            if needed:
                raise _no_locks(error, folder, fix) from None
        held, named = os.fstat(descriptor), folder.stat() if folder.exists() else None
        if named is None or (held.st_ino, held.st_dev) != (named.st_ino, named.st_dev):
            raise LockedError("another run has just finished here", fix="look at it, then run it again", path=folder)
        with system.guarded(folder):
            yield
    finally:
        os.close(descriptor)


def _no_locks(error: OSError, place: Path, fix: str) -> LockedError:
    what = f"the file system gives no lock ({error.strerror}), so nothing shows whether another run is at work here"
    return LockedError(what, fix=fix, path=place)


@dataclass
class Work:
    """Unfinished work: `files` about it, and `content`, what will be put in place. `keep` says whether it stays, for a
    later run, when it is broken off."""

    files: StagedDirectory
    content: StagedDirectory
    keep: bool = field(default=False)

    @classmethod
    def at(cls, root: Path, shown: Path, is_ours: Callable[[str], bool] = lambda name: True) -> Work:
        """Return the work in a folder that exists; `is_ours` as of a `StagedDirectory`."""
        return cls(StagedDirectory(root, shown, is_ours), StagedDirectory(root / CONTENT, shown))

    @property
    def nbytes(self) -> int:
        """The bytes of all its files."""
        return sum(p.lstat().st_size for p in self.files.root.rglob("*") if p.is_file())

    def clear(self, keep: Collection[str] = ()) -> None:
        """Remove all of ours but the files of the names `keep`, in the folder of the work. Raises E-IO-WRITE."""
        self.files.clear(keep)
        again = open_work(self.files.root, self.files.shown, self.files.is_ours)
        self.files, self.content = again.files, again.content


def work_root(path: Path) -> Path:
    """Return the folder that the work of an output lies in."""
    return beside(path, ".partial")


def partial_path(path: Path) -> Path:
    """Return the file, beside an output that is one file, that its unfinished work lies in."""
    return beside(path, ".partial", hidden=False)


def open_work(root: Path, shown: Path, is_ours: Callable[[str], bool] = lambda name: True) -> Work:
    """Return the work folder `root`, made if it does not exist. Raises E-OUT-PATH, E-IO-WRITE."""
    for place in (root, root / CONTENT):
        try:
            system.current.mkdir(place)
        except FileExistsError:
            if place.is_symlink() or not place.is_dir():
                raise OutputPathError("is in the way", fix="remove it", path=place) from None
        except OSError as error:
            raise not_written(error, shown) from None
    return Work.at(root, shown, is_ours)


@contextmanager
def work_directory(path: StrPath, *, overwrite: bool, resume: bool) -> Iterator[Work]:
    """Build a folder that appears under `path` whole or not at all, by one run at a time.

    With `resume` the work finds what an earlier run has left, and stays if it is broken off while `keep` is set;
    without it all of that is removed. Raises E-LOCKED, E-OUT-PATH, E-OUT-EXISTS, E-IO-WRITE, E-IO-SYNC.
    """
    path = Path(path)
    check_output(path, overwrite, directory=True)
    root = work_root(path)
    made = not root.exists()
    try:
        system.current.mkdir(root)
    except FileExistsError:
        made = False
    except OSError as error:
        raise not_written(error, path) from None
    with locked(root, needed=not made, fix=_IF_NONE_IS):
        if not made and not _is_ours(root):
            raise OutputPathError("is in the way, and is not the work of an earlier run", fix="move it", path=root)
        work = Work.at(root, path)
        work.keep = resume
        try:
            if not resume:
                work.files.clear()
            open_work(root, path)
            yield work
            work.content.sync()
            old = put_folder(work.content.root, path, overwrite)
        except BaseException:
            if not work.keep:
                with suppress(OSError):
                    remove(root)
            raise
        confirm(path)
        if old is not None and old != work.content.root:
            delete_leftover(old, path)
        delete_leftover(root, path)


def _is_ours(root: Path) -> bool:
    """Return true if a folder is work that we wrote: it has our names, and where there is content a plan that says so
    (a power loss may have torn the plan, but then nothing else was written yet)."""
    names = {p.name for p in root.iterdir()}
    content, plan = root / CONTENT, root / PLAN_NAME
    if not names <= {CONTENT, PLAN_NAME, LINES_NAME} or content.is_symlink() or plan.is_symlink():
        return False
    if CONTENT not in names or (content.is_dir() and not any(content.iterdir())):
        return True
    return plan.is_file() and plan.stat().st_size < _PLAN_BYTES and _MARK in plan.read_bytes()


def end_work(work: StagedDirectory, last: str = "") -> None:
    """Remove a work folder inside the folder that was worked on, the file `last`, by which it is known, after all
    others; what is not ours stays. Raises E-IO-SYNC: what was done is done."""
    try:
        work.clear({last})
        work.clear()
        if not any(work.root.iterdir()):
            remove(work.root)
        sync_folder(work.root.parent)
    except (OSError, FileWriteError) as error:
        what = f"is done, but {work.root.name!r} in it could not be deleted: {getattr(error, 'strerror', error)}"
        raise DurabilityError(what, fix=f"run {verb('recover')}", path=work.shown) from None


# --- leftovers ------------------------------------------------------------------------------------------------------


def leftovers(path: Path) -> list[Path]:
    """Return what ended runs that were to write `path` have left beside it, and unfinished work. Raises E-LOCKED where
    the file system does not say whether they have ended."""
    patterns = [hidden_pattern(path), hidden_pattern(partial_path(path))]
    if not path.parent.is_dir():
        return []
    ours = [p for p in sorted(path.parent.iterdir()) if any(pattern.fullmatch(p.name) for pattern in patterns)]
    root = work_root(path)
    ours += [root] if root.is_dir() and not root.is_symlink() and _is_ours(root) else []
    return [p for p in ours if not p.is_symlink() and _is_idle(p)]


def clean_up_files(folders: Iterable[Path], outputs: Callable[[], Iterable[Path]]) -> int:
    """Remove the files that ended runs had begun for any of `outputs`, files in `folders`, each of which is looked into
    once; `outputs` is asked for only if something is there. Returns how many are gone. Raises E-IO-READ, E-LOCKED,
    E-IO-WRITE."""
    begun: dict[tuple[Path, str], list[Path]] = {}
    for folder in folders:
        for path in _hidden_files(folder):
            begun.setdefault((folder, stem_of_hidden(path.name) or ""), []).append(path)
    if not begun:
        return 0
    keys = {(path.parent, hidden_stem(path)) for path in outputs()}
    removable = [path for key, paths in begun.items() if key in keys for path in paths if _is_idle(path)]
    for path in removable:
        with writing(path):
            remove(path)
    return len(removable)


def _hidden_files(folder: Path) -> list[Path]:
    """Return the files in a folder that have a name as of `hidden_sibling`. Raises E-IO-READ."""
    try:
        with os.scandir(folder) as entries:
            return [
                Path(entry.path)
                for entry in entries
                if stem_of_hidden(entry.name) is not None and entry.is_file(follow_symlinks=False)
            ]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise FileReadError(f"cannot be looked into: {error.strerror}", path=folder) from None


def _is_idle(path: Path) -> bool:
    """Return true if nobody has locked a file or folder. Raises E-LOCKED if there are no locks."""
    try:
        if not stat.S_ISREG(mode := path.lstat().st_mode) and not stat.S_ISDIR(mode):
            return False
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        system.current.lock(descriptor)
    except BlockingIOError:
        return False
    except OSError as error:
        raise _no_locks(error, path, _IF_NONE_IS) from None
    finally:
        os.close(descriptor)
    return True


def clean_up(path: Path) -> tuple[str, ...]:
    """Remove leftovers beside `path`; a folder that was set aside while it was being replaced gets its name back if
    nothing has taken its place. Returns the names that are gone. Raises E-LOCKED, E-IO-WRITE."""
    removable = leftovers(path)
    with writing(path):
        for leftover in removable:
            if leftover.name.endswith(".old") and not path.exists():
                system.current.rename(leftover, path)
            else:
                remove(leftover)
        if removable:
            sync_folder(path.parent)
    return tuple(leftover.name for leftover in removable)
