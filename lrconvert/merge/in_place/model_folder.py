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
from lrconvert.io.checkpoint import JOURNAL, READY_NAME, is_between_states
from lrconvert.io.durable import (
    CONTENT,
    LINES_NAME,
    PLAN_NAME,
    File,
    StagedDirectory,
    Work,
    atomic_file,
    check_changeable,
    check_own,
    discard,
    end_work,
    give_to_owner,
    install,
    open_work,
    sync_folder,
)
from lrconvert.io.fields import Hex, Whole
from lrconvert.merge.journal import Patch, plan_text, read_signed
from lrconvert.merge.plan.other_files import RECORDS, UNDONE
from lrconvert.merge.undo.open_record import RECORD_NAME, numbered
from lrconvert.merge.undo.record import CODES_NAME, TEXTS, WEIGHT_NAME

MERGE: Final = "merge"
UNMERGE: Final = "unmerge"
SAME, SWAP, PATCH = "same", "swap", "patch"
OLD = "old"
UNDONE_RECORD = "undone"  # the record of an unmerge, in the journal
CLEAN, BEGUN, BETWEEN, DONE = "clean", "begun", "between", "done"
_FRESH = "fresh.tmp"
_PLACE = rf"{re.escape(RECORDS)}/merge-[1-9][0-9]{{0,5}}-[0-9a-f]{{12}}"


def _names_of_ours() -> re.Pattern[str]:
    """Return what matches the names in a journal that a merge or unmerge writes; those of folders end with a slash."""

    def any_of(*parts: str) -> str:
        return f"(?:{'|'.join(parts)})"

    texts = any_of(*map(re.escape, TEXTS))
    record = any_of(
        *(re.escape(RECORD_NAME), re.escape(CODES_NAME), r"adapter-\d+\.(?:lrc|safetensors)", "base/"),
        *(r"base/\d+\.header", f"base/{texts}"),
    )
    content = any_of(texts, WEIGHT_NAME, re.escape(UNDONE), f"{re.escape(RECORDS)}/", f"{_PLACE}/(?:{record})?")
    top = any_of(*map(re.escape, (PLAN_NAME, LINES_NAME, READY_NAME, _FRESH)), r"patch-\d+\.tmp")
    ready = rf"\.{re.escape(READY_NAME)}\.\d+\.[0-9a-f]{{8}}\.tmp"
    folders = (f"{OLD}/(?:{texts})?", f"{UNDONE_RECORD}/(?:{record})?", f"{CONTENT}/(?:{content})?")
    return re.compile(any_of(top, ready, *folders))


_OURS = _names_of_ours()


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


@dataclass(frozen=True)
class State:
    """The state of a model folder. CLEAN: nothing is at work in it, or too little is left to tell what was; BEGUN: work
    has changed nothing yet; BETWEEN two states; DONE: only tidying is left. `kind` of work (MERGE, UNMERGE) and `place`
    of its record are known where it has begun or is done."""

    stage: str
    kind: str = ""
    place: str = ""


class ModelFolder:
    """The journal of the model folder `model`, whose lock the caller holds where it changes anything."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self.root = model / JOURNAL
        self.ready_path = self.root / READY_NAME

    def state(self) -> State:
        """Return where the folder stands: every command that changes it asks this first.

        A journal without `ready.json` is of work that had not begun to change the model, or was over: the record of a
        merge is in its place when it is over, that of an unmerge is not. Raises E-OUT-PATH where a link or a stranger's
        file lies among what a merge keeps.
        """
        if (self.model / RECORDS).is_symlink():
            check_own(self.model / RECORDS)
        check_own(self.root)
        if is_between_states(self.model):
            return State(BETWEEN)
        try:
            value = read_signed(self.root / PLAN_NAME)
            kind, place = value["kind"], value["place"]
            if kind not in (MERGE, UNMERGE) or not re.fullmatch(_PLACE, place):
                return State(CLEAN)
        except (LrcError, KeyError, TypeError):
            return State(CLEAN)
        is_merged = (self.model / place / RECORD_NAME).exists()
        return State(DONE if is_merged == (kind == MERGE) else BEGUN, kind, place)

    # --- before anything changes ---

    def check(self, names: Sequence[str]) -> None:
        """Raise E-OUT-PATH unless the model's weight files `names` and small files are plain files of this folder's
        own, on its disk."""
        if self.model.is_symlink():
            raise OutputPathError("is a symbolic link", fix="give the path it points to", path=self.model)
        place = self.model / RECORDS
        check_own(place, hard_links=True)
        for folder, what in ((place, "record"), (self.root, "journal")):
            if folder.exists() and not folder.is_dir():
                raise OutputPathError(f"is in the way of the {what}", fix="remove it", path=folder)
        device = self.model.stat().st_dev
        for name in (*names, *(n for n in TEXTS if (self.model / n).exists() or (self.model / n).is_symlink())):
            if check_changeable(self.model / name).st_dev != device:
                raise OutputPathError("lies on another disk than its folder", path=self.model / name)
        if place.exists() and place.stat().st_dev != device:
            raise OutputPathError("lies on another disk than the model", path=place)

    def open(self) -> Work:
        """Return the work folder, made if it is not there."""
        place = self.model / RECORDS
        if not place.exists():
            StagedDirectory(self.model, self.model).add_folder(RECORDS)
            give_to_owner(place, self.model.stat())
        return open_work(self.root, self.model, is_ours)

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
        return is_between_states(self.model)

    def commit_plan(self) -> CommitPlan:
        """Return what is to be done, which may come from a stranger. Raises E-DIGEST, E-VER, E-UNDO, E-IO-KIND,
        E-OUT-PATH."""
        check_own(self.root)
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
        """Remove what is ours of the journal, where nothing has changed or all is done. Raises E-IO-SYNC."""
        place = self.model / RECORDS
        if not numbered(self.model) and (self.model / UNDONE).exists():
            discard(self.model / UNDONE)  # with the last record
        if self.root.exists():
            end_work(StagedDirectory(self.root, self.model, is_ours), PLAN_NAME)
        if place.is_dir() and not any(place.iterdir()):
            end_work(StagedDirectory(place, self.model))


def is_ours(name: str) -> bool:
    """Return whether a name in a journal (of a folder: with a slash at its end) is one that merges write there."""
    return _OURS.fullmatch(name) is not None


def _sync(folder: Path) -> None:
    try:
        sync_folder(folder)
    except OSError as error:
        raise FileWriteError(f"cannot be synced: {error.strerror}", path=folder) from None
