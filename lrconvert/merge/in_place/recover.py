"""After a crash: a clean old or new state, and nothing left over."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from lrconvert.core.errors import FileKindError
from lrconvert.io.checkpoint import JOURNAL
from lrconvert.io.durable import clean_up, leftovers, locked
from lrconvert.merge.in_place import commit
from lrconvert.merge.in_place.model_folder import ModelFolder


@dataclass(frozen=True)
class Recovery:
    """The report of a recovery of `path`: `state` is "clean" (no journal), "old" (what was broken off is taken back, or
    had not begun) or "new" (it is finished). `removed` names leftovers beside and in it that are gone."""

    path: str
    state: str
    removed: tuple[str, ...]


def recover(path: Path) -> Recovery:
    """Finish or take back what was broken off at `path`, a model folder or any output, and remove what killed runs have
    left of it. Raises E-LOCKED, E-IO-KIND (there is nothing), E-DIGEST (the model was changed since), E-IO-*."""
    if not path.exists() and not leftovers(path):
        raise FileKindError("does not exist, and nothing was left of it", path=path)
    removed = clean_up(path)
    state = "clean"
    if path.is_dir() and not path.is_symlink() and (path / JOURNAL).exists():
        with ExitStack() as stack:
            stack.enter_context(locked(path))
            state = commit.recover(ModelFolder(path))
            removed = (*removed, JOURNAL)
    return Recovery(str(path), state, removed)
