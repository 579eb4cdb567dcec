"""A model folder that is changed in place: its journal, in which state every weight file is, and both ways out.

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
from typing import Any

from lrconvert.core.errors import DigestError, DurabilityError, FileWriteError, LrcError, OutputPathError, UndoError
from lrconvert.io.container import INDEX_NAME, JOURNAL, READY_NAME, Checkpoint, ContainerFile
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
from lrconvert.merge.arithmetic.workspace import Workspace
from lrconvert.merge.in_place import patches
from lrconvert.merge.in_place.patches import BASE, MERGED
from lrconvert.merge.journal import PLAN_NAME, Patch, plan_text, read_signed
from lrconvert.merge.plan.plan import CONFIG_NAME, RECORDS
from lrconvert.merge.sinks import file_tensor_digest
from lrconvert.merge.undo.record import RECORD_NAME, OpenRecord
from lrconvert.merge.undo.restoring import Restorer

TEXTS = (CONFIG_NAME, INDEX_NAME)
MERGE, UNMERGE = "merge", "unmerge"
SAME, SWAP, PATCH = "same", "swap", "patch"
_PLACE = re.compile(rf"{re.escape(RECORDS)}/merge-[1-9][0-9]{{0,5}}-[0-9a-f]{{12}}")
_PATCH = re.compile(r"patch-[0-9]{1,7}\.tmp")
_FRESH, _OLD, _UNDONE = "fresh.tmp", "old", "undone"


@dataclass(frozen=True)
class Change:
    """How a weight file is changed: not at all, by a new file that takes its name, or by a patch."""

    name: str
    mode: str
    patch: Patch | None = None


@dataclass(frozen=True)
class CommitPlan:
    """What is to be done now that everything is on the disk: a `kind` of work with the record `place` (number
    `number`), `changes` of the base's weight files in order, new small files `texts`."""

    kind: str
    number: int
    place: str
    changes: tuple[Change, ...]
    texts: tuple[str, ...]

    def encode(self) -> bytes:
        rows = [
            [c.name, c.mode, *([c.patch.name, c.patch.nbytes, c.patch.sha256] if c.patch else [])] for c in self.changes
        ]
        value = {"number": self.number, "place": self.place, "changes": rows, "texts": list(self.texts)}
        return plan_text(self.kind, value)


def _is_sound(ready: CommitPlan) -> bool:
    """Whether every name in it is one that a merge gives, so that none leads out of the folder."""
    return (
        ready.kind in (MERGE, UNMERGE)
        and type(ready.number) is int
        and _PLACE.fullmatch(ready.place) is not None
        and set(ready.texts) <= set(TEXTS)
        and all(
            type(change.name) is str
            and (change.patch is None) == (change.mode in (SAME, SWAP))
            and (change.patch is None or (change.mode == PATCH and _PATCH.fullmatch(change.patch.name) is not None))
            for change in ready.changes
        )
    )


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
        """The work folder, made if it is not there."""
        StagedDirectory(self.model, self.model).add_folder(RECORDS)
        return open_work(self.root, self.model)

    def begin(self, work: Work, ready: CommitPlan) -> None:
        """Sync everything and say that it is ready. Nothing has changed yet; from here on there are two ways out."""
        work.files.add_folder(_OLD)
        work.content.sync()
        work.files.sync()
        for folder in (self.model / RECORDS, self.model):
            self._sync(folder)
        with atomic_file(self.ready_path, overwrite=False) as file:
            file.write(ready.encode())

    def cancel(self, keep: bool) -> None:
        """Back out where nothing has changed; the work stays for a later run, if `keep`."""
        if self.is_ready:
            discard(self.ready_path)
            self._sync(self.root)
        if not keep and self.root.exists():
            self.clear()

    def hide(self) -> None:
        """Put configuration and index aside."""
        for name in TEXTS:
            if (self.model / name).exists() and not (self.root / _OLD / name).exists():
                install(self.model / name, self.root / _OLD / name)

    def text(self, name: str) -> Path:
        """Where a small file of the base, or of the merged model that is undone, lies now."""
        hidden = self.root / _OLD / name
        return hidden if hidden.exists() else self.model / name

    # --- while it is ready ---

    @property
    def is_ready(self) -> bool:
        return self.ready_path.exists()

    def ready(self) -> CommitPlan:
        """What is to be done. Raises E-DIGEST, E-VER, E-UNDO, E-IO-KIND, E-OUT-PATH: it may come from a stranger."""
        if self.root.is_symlink() or self.root.parent.is_symlink():
            raise OutputPathError("the journal is a link", fix="remove it", path=self.root)
        value = read_signed(self.ready_path)
        try:
            changes = tuple(Change(row[0], row[1], Patch(*row[2:]) if row[2:] else None) for row in value["changes"])
            ready = CommitPlan(value["kind"], value["number"], value["place"], changes, tuple(value["texts"]))
            sound = _is_sound(ready)
        except (KeyError, TypeError, IndexError):
            sound = False
        if not sound:
            raise UndoError("the journal is not one that a merge writes", path=self.ready_path)
        return ready

    def open_record(self, ready: CommitPlan) -> OpenRecord:
        """The record, wherever it is at this moment."""
        places = (self.root / CONTENT / ready.place, self.root / _UNDONE, self.model / ready.place)
        opened = OpenRecord(next((place for place in places if (place / RECORD_NAME).exists()), places[-1]))
        if [name for name, _ in opened.record.files] != [change.name for change in ready.changes]:
            opened.close()
            raise UndoError("the journal is of another record", path=self.ready_path)
        return opened

    def state(self, opened: OpenRecord, number: int) -> int:
        """BASE or MERGED: which of the two a weight file is that is swapped as a whole. Raises E-DIGEST."""
        header, infos = opened.headers[number]
        known = {t.name: t for t in opened.record.tensors}
        path = self.model / opened.record.files[number][0]
        with ContainerFile(path) as file:
            if file.header_bytes != header:
                return MERGED
            for info in infos:
                tensor = known[info.name]
                if tensor.after != tensor.before:
                    found = file_tensor_digest(file, file.by_name[info.name])
                    if found not in (tensor.before, tensor.after):
                        raise DigestError(f"{info.name!r} is neither that of the base nor the merged one", path=path)
                    return BASE if found == tensor.before else MERGED
        return BASE

    def states(self, ready: CommitPlan, opened: OpenRecord) -> dict[int, int]:
        """The states of the weight files that are swapped, by number."""
        return {n: self.state(opened, n) for n, c in enumerate(ready.changes) if c.mode == SWAP}

    @contextmanager
    def fresh(self, name: str) -> Iterator[File]:
        """A new weight file, which takes the place of the one of that name when the context ends."""
        folder = StagedDirectory(self.root, self.model)
        folder.remove(_FRESH)
        with folder.create(_FRESH) as file:
            yield file
        install(self.root / _FRESH, self.model / name)

    def staged(self, name: str) -> Path:
        """Where a weight file lies that was written ahead."""
        return self.root / CONTENT / name

    def put_staged(self, name: str) -> None:
        """A weight file that was written ahead takes its place."""
        install(self.staged(name), self.model / name)

    def patch(self, ready: CommitPlan, side: int) -> None:
        """Put the rows of one side into all weight files that are patched."""
        for change in ready.changes:
            if change.patch is not None:
                patches.apply(self.root / change.patch.name, change.patch, self.model / change.name, side)

    def restore(self, ready: CommitPlan, opened: OpenRecord) -> None:
        """Bring every weight file to the state of the base."""
        merged = [n for n, state in self.states(ready, opened).items() if state == MERGED]
        files = {n: ContainerFile(self.model / ready.changes[n].name) for n in merged}
        checkpoint = Checkpoint(self.model, {}, tuple(files.values()), None)
        try:
            with Workspace() as workspace, Restorer(opened, checkpoint, workspace) as restorer:
                for number, source in files.items():
                    with self.fresh(ready.changes[number].name) as file:
                        restorer.file(number, file)
                        source.check_unchanged()
                    source.close()  # its bytes are freed now
        finally:
            for source in files.values():
                source.close()
        self.patch(ready, BASE)

    # --- ways out ---

    def commit(self, ready: CommitPlan, opened: OpenRecord) -> None:
        """The new state: every weight file has it. The small files follow, then the record comes, or goes."""
        for name in TEXTS:
            new = self.root / CONTENT / name
            if name not in ready.texts:
                self._put_back(name, opened)
            elif new.exists():
                install(new, self.model / name, mode_of=self.root / _OLD / name)
        ours, theirs = self.root / CONTENT / ready.place, self.model / ready.place
        if ready.kind == MERGE and ours.exists():
            install(ours, theirs)
        if ready.kind == UNMERGE and theirs.exists():
            install(theirs, self.root / _UNDONE)
        self._end()

    def roll_back(self, ready: CommitPlan, opened: OpenRecord) -> None:
        """The old state of a merge."""
        self.restore(ready, opened)
        for name in TEXTS:
            self._put_back(name, opened)
        self._end()

    def _put_back(self, name: str, opened: OpenRecord) -> None:
        """Give a small file of the base its name again; from the record, should it be damaged."""
        old = self.root / _OLD / name
        if not old.exists():
            return
        if name in opened.record.texts and old.read_bytes() != (text := opened.text(f"base/{name}")):
            with self.fresh(name) as file:
                file.write(text)
        else:
            install(old, self.model / name)

    def _end(self) -> None:
        """The one moment from which on it is over: the journal is not ready any more."""
        discard(self.ready_path)
        try:
            sync_folder(self.root)
        except OSError as error:
            what = f"is done, but its journal was not synced to the disk: {error.strerror}"
            raise DurabilityError(what, fix="run lrconvert recover", path=self.model) from None
        self.clear()

    def clear(self) -> None:
        """Remove the journal, where nothing has changed or all is done. Raises E-IO-SYNC."""
        end_work(self.root, self.model)
        place = self.model / RECORDS
        if place.is_dir() and not any(place.iterdir()):
            end_work(place, self.model)

    def _sync(self, folder: Path) -> None:
        try:
            sync_folder(folder)
        except OSError as error:
            raise FileWriteError(f"cannot be synced: {error.strerror}", path=folder) from None

    def recover(self) -> str:
        """Bring the model to the old state or the new one; which of them. Raises E-DIGEST, E-IO-*."""
        if not self.is_ready:
            state = self._state_of_plan()
            self.clear()
            return state
        ready = self.ready()
        opened = self.open_record(ready)
        with opened:
            if ready.kind == MERGE:
                if BASE in self.states(ready, opened).values():
                    self.roll_back(ready, opened)
                    return "old"
                self.patch(ready, MERGED)
            else:
                self.restore(ready, opened)
            self.commit(ready, opened)
        return "new"

    def _state_of_plan(self) -> str:
        """What the end of a journal that is not ready means: it had not begun, or was over already; "clean" where too
        little of it is left to tell."""
        try:
            value: dict[str, Any] = read_signed(self.root / PLAN_NAME)
            if not _PLACE.fullmatch(value["place"]):
                return "clean"
            is_merged = (self.model / value["place"] / RECORD_NAME).exists()
            return "new" if is_merged == (value["kind"] == MERGE) else "old"
        except (LrcError, KeyError, TypeError):
            return "clean"
