"""Bringing a model between two states, whose undo codes are all on the disk, to the new one or back to the old one.

Normative text: ``formats/undo-v1.md``, section 5.
"""

from __future__ import annotations

from dataclasses import dataclass

from lrconvert.core.errors import DigestError, DurabilityError, UndoError
from lrconvert.core.wording import verb
from lrconvert.io.checkpoint import Checkpoint
from lrconvert.io.container import ContainerFile
from lrconvert.io.durable import CONTENT, discard, install, sync_folder
from lrconvert.merge.hashing import stored_digest
from lrconvert.merge.in_place import patches
from lrconvert.merge.in_place.model_folder import (
    BEGUN,
    BETWEEN,
    CLEAN,
    DONE,
    MERGE,
    OLD,
    SWAP,
    UNDONE_RECORD,
    CommitPlan,
    ModelFolder,
)
from lrconvert.merge.in_place.patches import BASE, MERGED
from lrconvert.merge.plan.other_files import UNDONE
from lrconvert.merge.undo.open_record import RECORD_NAME, OpenRecord
from lrconvert.merge.undo.record import TEXTS
from lrconvert.merge.undo.restoring import Restorer, workspace_for


@dataclass
class Commit:
    """A model `folder` whose journal is ready, with the `plan` of what is to be done and the record of the merge that
    is done or undone. A context manager, which closes the record."""

    folder: ModelFolder
    plan: CommitPlan
    opened: OpenRecord

    def __enter__(self) -> Commit:
        return self

    def __exit__(self, *_: object) -> None:
        self.opened.close()

    def state(self, number: int) -> int:
        """Return which of BASE and MERGED a weight file is that is swapped as a whole. Raises E-DIGEST."""
        header, infos = self.opened.headers[number]
        path = self.folder.model / self.plan.changes[number].name
        with ContainerFile(path) as file:
            if file.header_bytes != header:
                return MERGED
            for info in infos:
                tensor = self.opened.tensors[info.name]
                if tensor.after != tensor.before:
                    digest = stored_digest(file, file.by_name[info.name])
                    if digest not in (tensor.before, tensor.after):
                        raise DigestError(f"{info.name!r} is neither that of the base nor the merged one", path=path)
                    return BASE if digest == tensor.before else MERGED
        return BASE

    def states(self) -> dict[int, int]:
        """Return the states of the weight files that are swapped, by number."""
        return {n: self.state(n) for n, change in enumerate(self.plan.changes) if change.mode == SWAP}

    def patch(self, side: int) -> None:
        """Put the rows of one side into all weight files that are patched."""
        for change in self.plan.changes:
            if change.patch is not None:
                path = self.folder.root / change.patch.name
                patches.apply(path, change.patch, self.folder.model / change.name, side)

    def restore(self) -> None:
        """Bring every weight file to the state of the base."""
        names = {n: self.plan.changes[n].name for n, state in self.states().items() if state == MERGED}
        files = {n: ContainerFile(self.folder.model / name) for n, name in names.items()}
        checkpoint = Checkpoint(self.folder.model, {}, tuple(files.values()), None)
        try:
            with workspace_for(self.opened) as workspace, Restorer(self.opened, checkpoint, workspace) as restorer:
                for number, source in files.items():
                    with self.folder.fresh(names[number]) as file:
                        restorer.file(number, file)
                        source.check_unchanged()
                    source.close()  # its bytes are freed now
        finally:
            for source in files.values():
                source.close()
        self.patch(BASE)

    def finish(self) -> None:
        """Reach the new state, which every weight file has: the small files follow, then the record comes, or goes."""
        folder, plan = self.folder, self.plan
        for name in TEXTS:
            new = folder.root / CONTENT / name
            if name not in plan.texts:
                self._put_back(name)
            elif new.exists():
                install(new, folder.model / name, like=folder.root / OLD / name)
        staged, place = folder.root / CONTENT / plan.place, folder.model / plan.place
        if plan.kind == MERGE:
            if staged.exists():
                install(staged, place)
            discard(folder.model / UNDONE)
        else:
            if place.exists():
                install(place, folder.root / UNDONE_RECORD)
            if (note := folder.root / CONTENT / UNDONE).exists():
                install(note, folder.model / UNDONE)
        self._end()

    def roll_back(self) -> None:
        """Reach the old state of a merge."""
        self.restore()
        for name in TEXTS:
            self._put_back(name)
        self._end()

    def _put_back(self, name: str) -> None:
        """Give a small file of the base its name again; from the record, should it be damaged."""
        old = self.folder.root / OLD / name
        if not old.exists():
            return
        if name in self.opened.record.texts and old.read_bytes() != (text := self.opened.text(f"base/{name}")):
            with self.folder.fresh(name) as file:
                file.write(text)
        else:
            install(old, self.folder.model / name)

    def _end(self) -> None:
        """Take the journal's readiness away: from this one moment on it is over."""
        discard(self.folder.ready_path)
        try:
            sync_folder(self.folder.root)
        except OSError as error:
            what = f"is done, but its journal was not synced to the disk: {error.strerror}"
            raise DurabilityError(what, fix=f"run {verb('recover')}", path=self.folder.model) from None
        self.folder.clear()


def open_commit(folder: ModelFolder) -> Commit:
    """Open what is to be done in a folder that is ready, with the record, wherever it is at this moment."""
    plan = folder.commit_plan()
    places = (folder.root / CONTENT / plan.place, folder.root / UNDONE_RECORD, folder.model / plan.place)
    opened = OpenRecord(next((place for place in places if (place / RECORD_NAME).exists()), places[-1]))
    if [file.name for file in opened.record.files] != [change.name for change in plan.changes]:
        opened.close()
        raise UndoError("the journal is of another record", path=folder.ready_path)
    return Commit(folder, plan, opened)


def recover(folder: ModelFolder) -> str:
    """Bring the model to the state "old" or "new", and return which of them; "clean" where nothing shows what was at
    work. Raises E-DIGEST, E-OUT-PATH, E-IO-*."""
    stage = folder.state().stage
    if stage != BETWEEN:
        folder.clear()
        return {CLEAN: "clean", BEGUN: "old", DONE: "new"}[stage]
    with open_commit(folder) as commit:
        if commit.plan.kind == MERGE:
            if BASE in commit.states().values():
                commit.roll_back()
                return "old"
            commit.patch(MERGED)
        else:
            commit.restore()
        commit.finish()
    return "new"
