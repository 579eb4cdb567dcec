"""A model folder that is changed in place, and its journal.

Normative text: ``formats/undo-v1.md``, section 5. `.lrconvert/journal/` holds `plan.json`, `done.jsonl`, `model/` (the
record, new small files, and one weight file ahead), patches and, from the moment on in which every undo code is on the
disk, `ready.json`: while that is there the model is between two states, and `old/` has its configuration and index, so
that no program takes it for a model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple

from lrconvert.core.errors import FileWriteError, LrcError, OutputPathError, UndoError
from lrconvert.io import fields
from lrconvert.io.checkpoint import JOURNAL, READY_NAME
from lrconvert.io.durable import (
    CONTENT,
    File,
    StagedDirectory,
    Work,
    atomic_file,
    check_changeable,
    discard,
    end_work,
    install,
    open_work,
    sync_folder,
)
from lrconvert.io.fields import Hex, Whole
from lrconvert.merge.journal import PLAN_NAME, Patch, plan_text, read_signed
from lrconvert.merge.plan.plan import RECORDS
from lrconvert.merge.undo.open_record import RECORD_NAME
from lrconvert.merge.undo.record import TEXTS

MERGE: Final = "merge"
UNMERGE: Final = "unmerge"
SAME, SWAP, PATCH = "same", "swap", "patch"
OLD = "old"
_FRESH = "fresh.tmp"
_PLACE = rf"{re.escape(RECORDS)}/merge-[1-9][0-9]{{0,5}}-[0-9a-f]{{12}}"


@dataclass(frozen=True)
class Change:
    """The change of a weight file: none, a new file that takes its name, or a patch."""

    name: str
    mode: str
    patch: Patch | None = None


class _Row(NamedTuple):
    name: str
    mode: Literal["same", "swap"]


class _PatchRow(NamedTuple):
    name: str
    mode: Literal["patch"]
    patch: Annotated[str, fields.matches(r"patch-[0-9]{1,7}\.tmp", "the name of a patch")]
    nbytes: Whole
    sha256: Hex


def _read_change(value: Any, path: str) -> Change:
    if isinstance(value, list) and len(value) > len(_Row._fields):
        row = fields.read(_PatchRow, value, path)
        return Change(row.name, row.mode, Patch(row.patch, row.nbytes, row.sha256))
    return Change(*fields.read(_Row, value, path))


def _write_change(change: Change) -> Any:
    return [change.name, change.mode, *(change.patch or ())]


@dataclass(frozen=True)
class CommitPlan:
    """The work to be done now that everything is on the disk: a `kind` of work with the record `place` (number
    `number`), `changes` of the base's weight files in order, new small files `texts`. Every name is one that a merge
    gives, so that none leads out of the folder."""

    kind: Literal["merge", "unmerge"]
    number: Whole
    place: Annotated[str, fields.matches(_PLACE, "the folder of a record")]
    changes: tuple[Annotated[Change, fields.By(_read_change, _write_change)], ...]
    texts: tuple[Annotated[str, fields.one_of(TEXTS)], ...]

    def encode(self) -> bytes:
        return plan_text(self.kind, fields.as_json(self))


class ModelFolder:
    """The journal of the model folder `model`, whose lock the caller holds."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self.root = model / JOURNAL
        self.ready_path = self.root / READY_NAME

    # --- before anything changes ---

    def check(self, names: Sequence[str]) -> None:
        """Raise E-OUT-PATH unless the model's weight files `names` and small files are plain files of this folder's
        own, on its disk."""
        if self.model.is_symlink():
            raise OutputPathError("is a symbolic link", fix="give the path it points to", path=self.model)
        place = self.model / RECORDS
        if place.is_symlink() or (place.exists() and not place.is_dir()):
            raise OutputPathError("is in the way of the record", fix="remove it", path=place)
        if self.root.is_symlink():
            raise OutputPathError("is in the way of the journal", fix="remove it", path=self.root)
        device = self.model.stat().st_dev
        for name in (*names, *(n for n in TEXTS if (self.model / n).exists() or (self.model / n).is_symlink())):
            if check_changeable(self.model / name).st_dev != device:
                raise OutputPathError("lies on another disk than its folder", path=self.model / name)
        if place.exists() and place.stat().st_dev != device:
            raise OutputPathError("lies on another disk than the model", path=place)

    def open(self) -> Work:
        """Return the work folder, made if it is not there."""
        StagedDirectory(self.model, self.model).add_folder(RECORDS)
        return open_work(self.root, self.model)

    def begin(self, work: Work, commit_plan: CommitPlan) -> None:
        """Sync everything and say that it is ready. Nothing has changed yet; from here on there are two ways out."""
        work.files.add_folder(OLD)
        work.content.sync()
        work.files.sync()
        for folder in (self.model / RECORDS, self.model):
            _sync(folder)
        with atomic_file(self.ready_path, overwrite=False) as file:
            file.write(commit_plan.encode())

    def cancel(self, keep: bool) -> None:
        """Back out where nothing has changed; the work stays for a later run, if `keep`."""
        if self.is_ready:
            discard(self.ready_path)
            _sync(self.root)
        if not keep and self.root.exists():
            self.clear()

    def hide(self) -> None:
        """Put configuration and index aside."""
        for name in TEXTS:
            if (self.model / name).exists() and not (self.root / OLD / name).exists():
                install(self.model / name, self.root / OLD / name)

    def text(self, name: str) -> Path:
        """Return where a small file of the base, or of the merged model that is undone, lies now."""
        hidden = self.root / OLD / name
        return hidden if hidden.exists() else self.model / name

    # --- while it is ready ---

    @property
    def is_ready(self) -> bool:
        return self.ready_path.exists()

    def commit_plan(self) -> CommitPlan:
        """Return what is to be done, which may come from a stranger. Raises E-DIGEST, E-VER, E-UNDO, E-IO-KIND,
        E-OUT-PATH."""
        if self.root.is_symlink() or self.root.parent.is_symlink():
            raise OutputPathError("the journal is a link", fix="remove it", path=self.root)
        value = read_signed(self.ready_path)
        try:
            return fields.read(CommitPlan, value, "the journal")
        except LrcError:
            raise UndoError("the journal is not one that a merge writes", path=self.ready_path) from None

    @contextmanager
    def fresh(self, name: str) -> Iterator[File]:
        """Open a new weight file, which takes the place of the one of that name when the context ends."""
        folder = StagedDirectory(self.root, self.model)
        folder.remove(_FRESH)
        with folder.create(_FRESH) as file:
            yield file
        install(self.root / _FRESH, self.model / name)

    def staged(self, name: str) -> Path:
        """Return where a weight file lies that was written ahead."""
        return self.root / CONTENT / name

    def clear(self) -> None:
        """Remove the journal, where nothing has changed or all is done. Raises E-IO-SYNC."""
        end_work(self.root, self.model)
        place = self.model / RECORDS
        if place.is_dir() and not any(place.iterdir()):
            end_work(place, self.model)

    def state(self) -> str:
        """Return "old" or "new" where the work had not begun, or was over already: the journal is not ready. "clean"
        where too little of it is left to tell."""
        try:
            value = read_signed(self.root / PLAN_NAME)
            if not re.fullmatch(_PLACE, value["place"]):
                return "clean"
            is_merged = (self.model / value["place"] / RECORD_NAME).exists()
            return "new" if is_merged == (value["kind"] == MERGE) else "old"
        except (LrcError, KeyError, TypeError):
            return "clean"


def _sync(folder: Path) -> None:
    try:
        sync_folder(folder)
    except OSError as error:
        raise FileWriteError(f"cannot be synced: {error.strerror}", path=folder) from None
