"""After a crash: a clean old or new state, and nothing left over."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from lrconvert.core.errors import FileKindError, LrcError
from lrconvert.io.checkpoint import JOURNAL
from lrconvert.io.container import ContainerFile
from lrconvert.io.durable import check_own, clean_up, leftovers, locked, partial_path
from lrconvert.merge.in_place import commit
from lrconvert.merge.in_place.model_folder import ModelFolder
from lrconvert.merge.plan.other_files import RECORDS


@dataclass(frozen=True)
class Recovery:
    """The report of a recovery of `path`: `state` is "clean" (no journal), "old" (what was broken off is taken back, or
    had not begun) or "new" (it is finished). `removed` names leftovers beside and in it that are gone, `unfinished`
    work of a refinement or of statistics, which stays: the same command goes on with it."""

    path: str
    state: str
    removed: tuple[str, ...]
    unfinished: tuple[str, ...] = ()

    def __repr__(self) -> str:
        gone, work = f", {len(self.removed)} leftovers removed", f", {len(self.unfinished)} unfinished"
        return f"<Recovery: {self.state}{gone if self.removed else ''}{work if self.unfinished else ''}>"


def recover(path: Path) -> Recovery:
    """Finish or take back what was broken off at `path`, a model folder or any output, and remove what killed runs have
    left of it. Raises E-LOCKED, E-IO-KIND (there is nothing), E-DIGEST (the model was changed since), E-OUT-PATH (a
    link lies where a merge keeps its own), E-IO-*."""
    unfinished = _unfinished(path)
    if not path.exists() and not leftovers(path) and not unfinished:
        raise FileKindError("does not exist, and nothing was left of it", path=path)
    is_folder = path.is_dir() and not path.is_symlink()
    folder = ModelFolder(path)
    if is_folder:
        folder.state()
        check_own(path / RECORDS, hard_links=True)
    removed = clean_up(path)
    state = "clean"
    if is_folder and (path / JOURNAL).exists():
        with ExitStack() as stack:
            stack.enter_context(locked(path))
            state = commit.recover(folder)
            removed = (*removed, JOURNAL)
    return Recovery(str(path), state, removed, unfinished)


def _unfinished(path: Path) -> tuple[str, ...]:
    """Return the name of unfinished work of a file that is computed at length, if it is there and ours."""
    place = partial_path(path)
    try:
        with ContainerFile(place) as file:
            is_ours = any(key.startswith("lrconvert-") and key.endswith("-partial") for key in file.metadata)
    except LrcError:
        return ()
    return (place.name,) if is_ours and not place.is_symlink() else ()
