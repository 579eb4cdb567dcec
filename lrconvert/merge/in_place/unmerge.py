"""Undoing a merge in the model folder itself, with one weight file of extra space.

As in a merge in place the first pass changes nothing: it restores everything once, into nothing, so that whatever is
damaged is found before anything changes.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from lrconvert.core.dtypes import Array
from lrconvert.core.errors import LrcError, UndoError, UndoOrderError
from lrconvert.core.wording import spelled
from lrconvert.io.checkpoint import Checkpoint, open_checkpoint, unfinished
from lrconvert.io.container import TensorInfo
from lrconvert.io.durable import PLAN_NAME, Work, locked, require_space
from lrconvert.merge.in_place.commit import Commit, open_commit, recover
from lrconvert.merge.in_place.merge import FIRST_PASS, broken_off, take_back
from lrconvert.merge.in_place.model_folder import (
    BETWEEN,
    CLEAN,
    DONE,
    PATCH,
    SAME,
    SWAP,
    UNMERGE,
    Change,
    CommitPlan,
    ModelFolder,
    State,
)
from lrconvert.merge.in_place.patches import Patches
from lrconvert.merge.journal import plan_text
from lrconvert.merge.plan.other_files import UNDONE, other_files
from lrconvert.merge.report import UnmergeReport
from lrconvert.merge.sinks import Nowhere
from lrconvert.merge.undo import repeats
from lrconvert.merge.undo.checks import changed_files, check_own_record, check_undoable, undone
from lrconvert.merge.undo.open_record import OpenRecord, latest, number_of, numbered
from lrconvert.merge.undo.record import TensorRecord
from lrconvert.merge.undo.restoring import Restorer, workspace_for
from lrconvert.merge.writing import Progress

_SPACE_MARGIN = 1.05


def unmerge_in_place(merged: Path, number: int | None, progress: Progress, *, resume: bool) -> UnmergeReport:
    """Turn `merged` into the base again. Raises what `unmerge` raises; but for E-UNFINISHED nothing is changed then."""
    folder = ModelFolder(merged)
    with locked(merged):
        state = folder.state()
        if state.stage == BETWEEN:
            kind = folder.commit_plan().kind
            if not resume or kind != UNMERGE:
                raise unfinished(merged)
            with open_commit(folder) as commit:
                return _restore(commit)
        if state.stage in (CLEAN, DONE):
            folder.clear()
        if done := undone_before(merged, state, number, resume=resume):
            return done
        with OpenRecord(latest(merged, number)) as opened:
            with open_checkpoint(merged, quantized=True) as checkpoint:
                check_undoable(opened, checkpoint)
                check_own_record(opened)
                _check_files(opened, checkpoint)
                folder.check([name for name, _ in opened.record.files])
                largest = max(size for _, size in opened.record.files)
                require_space(merged, int((largest + largest // 2) * _SPACE_MARGIN))
                try:
                    work = folder.open()
                    work.clear()
                    commit_plan = _rehearse(opened, checkpoint, work, progress)
                    note = repeats.undone_note(opened.folder, numbered(merged)) if number is None else None
                    if note is not None:
                        work.content.write_bytes(UNDONE, note)
                    folder.begin(work, commit_plan)
                except BaseException as error:
                    take_back(folder, keep=False)
                    if isinstance(error, LrcError):
                        error.at(merged)
                    raise
            return _restore(Commit(folder, commit_plan, opened))


def undone_before(model: Path, state: State, number: int | None, *, resume: bool) -> UnmergeReport | None:
    """Return the report of an unmerge that is done already, so that it is not repeated on the merge before; else None.

    A journal that is left says so. With `resume`, which means to finish something, so does the note of an unmerge that
    was not told a `number`, and a model that does not hold the merge any more. Without it, nothing tells a command that
    is repeated from one that means the merge before: raises E-UNDO-ORDER, which asks for the number.
    """
    records = numbered(model)
    last = max(records, default=0)
    done: tuple[int | None, ...] = ()
    if (state.stage, state.kind) == (DONE, UNMERGE):
        place, done = state.place, (None, number_of(state.place))
    elif (place := repeats.noted_place(model, records)) and number is None and not resume:
        what = f"merge {number_of(place)} was undone last, and merge {last} is left"
        raise UndoOrderError(what, fix=f"to undo that one, too, pass {spelled('number', last, '--merge')}", path=model)
    elif place:
        done = (None,)
    if resume:
        done = (*done, last + 1, None) if not records else (*done, last + 1)
    if number not in done:
        return None
    return UnmergeReport(Path(place).name, (), (), (), remaining=len(records), verified=False, already_done=True)


def _check_files(opened: OpenRecord, checkpoint: Checkpoint) -> None:
    """Raise E-UNDO unless every weight file of the base comes from the one of its name."""
    names = {file.path.name: {info.name for info in file.tensors} for file in checkpoint.files}
    is_alike = len(names) == len(opened.record.files)
    for (name, _), (_, infos) in zip(opened.record.files, opened.headers, strict=True):
        outputs = {opened.tensors[info.name].output for info in infos} - {""}
        is_alike = is_alike and outputs <= names.get(name, set())
    if not is_alike:
        what = "the merge cut the weights into other files, so it is not undone in place"
        raise UndoError(what, fix=f"give {spelled('out', ..., '--output')}", path=checkpoint.root)


def _rehearse(opened: OpenRecord, checkpoint: Checkpoint, work: Work, progress: Progress) -> CommitPlan:
    """Restore everything once, into nothing, and collect patches."""
    record, place = opened.record, opened.place
    work.files.write_bytes(PLAN_NAME, plan_text(UNMERGE, {"place": place}))
    files = {file.path.name: file for file in checkpoint.files}
    patches = Patches(work.files, [file.nbytes for file in record.files])
    total, done = max(1, sum(patches.sizes)), 0
    changes: list[Change] = []

    def advance(info: TensorInfo) -> None:
        nonlocal done
        done += info.nbytes
        progress(FIRST_PASS * min(1.0, done / total), info.name)

    def change(tensor: TensorRecord, first: int, present: Array, restored: Array) -> None:
        width = present.shape[1] * present.dtype.itemsize
        patches.change(checkpoint.tensors[tensor.output].start + first * width, restored, present)

    workspace = workspace_for(opened)
    with closing(patches), workspace, Restorer(opened, checkpoint, workspace, change) as restorer:
        for number, (name, _) in enumerate(record.files):
            header, infos = opened.headers[number]
            tensors = [opened.tensors[info.name] for info in infos]
            changed = [t for t in tensors if t.before != t.after]
            has_same_header = files[name].header_bytes == header
            if has_same_header and changed and all(t.cols for t in changed):
                patches.open(number)
            restorer.file(number, Nowhere(), advance)
            patch = patches.finish()
            mode = SAME if has_same_header and not changed else SWAP if patch is None else PATCH
            changes.append(Change(name, mode, patch))
    opened.check_content()
    for file in checkpoint.files:
        file.check_unchanged()
    texts = []
    for name in record.texts:
        text, path = opened.text(f"base/{name}"), checkpoint.root / name
        if not path.exists() or path.read_bytes() != text:
            work.content.write_bytes(name, text)
            texts.append(name)
    return CommitPlan(UNMERGE, record.number, place, tuple(changes), tuple(texts))


def _restore(commit: Commit) -> UnmergeReport:
    """Change the weights; a failure is tried again once, since only forward leads out."""
    folder, opened = commit.folder, commit.opened
    try:
        folder.hide()
        commit.restore()
        commit.finish()
    except LrcError as error:
        if not folder.is_ready:
            raise
        try:
            recover(folder)
        except LrcError:
            if folder.is_ready:
                raise broken_off(folder, error) from error
            raise
    with open_checkpoint(folder.model, quantized=True) as checkpoint:
        copies, _ = other_files(checkpoint)
        sizes = {name: path.stat().st_size for name, path in copies.items() if not opened.holds(name)}
        sizes |= {file.path.name: file.size for file in checkpoint.files}
        if checkpoint.index_path is not None:
            sizes[checkpoint.names.index] = checkpoint.index_path.stat().st_size
        return undone(opened, sizes, changed_files(opened, copies))
