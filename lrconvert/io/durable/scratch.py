"""Folders for what is fetched: they end with the process that made them, and a killed one's go when the next begins.

ROOT/                     0700, of this user alone
ROOT/PID.HEX/             of a process, locked as long as that lives
ROOT/PID.HEX/N/NAME/...   what it has fetched
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from contextlib import suppress
from itertools import count
from pathlib import Path

from lrconvert.core.errors import OutputPathError
from lrconvert.io.durable import system
from lrconvert.io.durable.files import remove, writing
from lrconvert.io.durable.folders import make_folder

_NAME = re.compile(r"\d{1,12}\.[0-9a-f]{8}")
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Scratch:
    """A process's folder in `root`, which is made if it is not there. Raises E-OUT-PATH if another user owns the root
    or may write there, E-IO-WRITE."""

    def __init__(self, root: Path) -> None:
        _make_root(root)
        _tidy(root)
        self._numbers = count()
        self.path, self._claim = _claimed(root)

    def folder(self, name: str) -> Path:
        """Return a new folder of that name in it, alone in its own; `discard_folder` of its parent removes it."""
        path = self.path / str(next(self._numbers))
        with writing(path):
            system.current.mkdir(path)
            system.current.mkdir(path / name)
        return path / name

    def close(self) -> None:
        """Remove all of it. Idempotent."""
        claim, self._claim = self._claim, -1
        if claim >= 0:
            discard_folder(self.path)
            os.close(claim)


def discard_folder(path: Path) -> None:
    """Remove a folder of what was fetched; what cannot be removed goes when a later run tidies."""
    with suppress(OSError):
        remove(path)


def _make_root(root: Path) -> None:
    make_folder(root.parent)
    with writing(root), suppress(FileExistsError):
        system.current.mkdir(root)
        os.chmod(root, 0o700)
    info = root.lstat()
    is_own = stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid() and not info.st_mode & 0o022
    if not is_own:
        what = "is where fetched files would lie for a while, and is no folder that is this user's alone"
        raise OutputPathError(what, fix="set LRCONVERT_SCRATCH to another folder", path=root)


def _tidy(root: Path) -> None:
    """Remove what processes have left that are no more; where there are no locks, nobody can say."""
    for path in sorted(root.iterdir()):
        if not _NAME.fullmatch(path.name) or path.is_symlink():
            continue
        with suppress(OSError):
            claim = os.open(path, _FOLDER)
            try:
                system.current.lock(claim)
                remove(path)
            finally:
                os.close(claim)


def _claimed(root: Path) -> tuple[Path, int]:
    """A new folder and the descriptor that locks it; another process may take it for a leftover until it is locked."""
    while True:
        path = root / f"{os.getpid()}.{secrets.token_hex(4)}"
        claim = -1
        with writing(path):
            system.current.mkdir(path)
        try:
            claim = os.open(path, _FOLDER)
            system.current.lock(claim)
        except (FileNotFoundError, BlockingIOError):
            pass
        except OSError:  # no locks here: nobody tidies, and this one goes at the end all the same
            return path, claim
        if claim >= 0:
            with suppress(FileNotFoundError):
                if path.stat().st_ino == os.fstat(claim).st_ino:
                    return path, claim
            os.close(claim)
