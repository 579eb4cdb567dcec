"""Merging into a model folder itself, and undoing it there, with one weight file of extra space.

Two passes. The first computes everything and changes nothing: it writes the whole record, and refuses what has to be
refused. Once that is on the disk the second replaces one weight file after the other, or patches the few rows that
change. What breaks off the second is taken back, or finished (`recover`); see `site`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lrconvert.core.dtypes import STORAGE, Array
from lrconvert.core.errors import FileChangedError, LrcError, OptionError, UndoError, UnfinishedError
from lrconvert.io.container import INDEX_NAME, Checkpoint, TensorInfo, open_checkpoint, tensor_hasher, unfinished
from lrconvert.io.durable import CONTENT, Work, Writer, locked, require_space
from lrconvert.merge.arithmetic.workspace import Workspace
from lrconvert.merge.background_writer import BackgroundWriter
from lrconvert.merge.compute import Computer
from lrconvert.merge.in_place.model_folder import (
    MERGE,
    PATCH,
    SAME,
    SWAP,
    TEXTS,
    UNMERGE,
    Change,
    CommitPlan,
    ModelFolder,
)
from lrconvert.merge.in_place.patches import MERGED, PatchWriter, is_whole
from lrconvert.merge.in_place.reconstructed_base import reconstructed_base
from lrconvert.merge.job import BROKEN_OFF, Job
from lrconvert.merge.journal import PLAN_NAME, Done, Journal, Patch, plan_text
from lrconvert.merge.plan.plan import Output, Plan, Shard, other_files, plan
from lrconvert.merge.report import MergeReport, UnmergeReport
from lrconvert.merge.sinks import Nowhere, has_digests
from lrconvert.merge.undo import record as records
from lrconvert.merge.undo.checks import changed_files, check_undoable, undone
from lrconvert.merge.undo.record import OpenRecord
from lrconvert.merge.undo.record_json import TensorRecord
from lrconvert.merge.undo.restoring import Restorer
from lrconvert.merge.writing import Merger, Progress

_FIRST_PASS = 0.6  # of the time, as progress is shown
_PATCH_SHARE = 8  # a patch has at most this part of its weight file
_SPACE_MARGIN = 1.05


# --- merging --------------------------------------------------------------------------------------------------------


def merge_in_place(base: Path, job: Job, *, resume: bool, dry_run: bool) -> MergeReport:
    """Turn `base` into the merge of it. Raises what `merge` raises; nothing is changed then, but for E-UNFINISHED."""
    site = ModelFolder(base)
    with locked(base), ExitStack() as stack:
        if site.is_ready:
            if not resume or dry_run:
                raise unfinished(base)
            return _go_on(site, job)
        checkpoint = stack.enter_context(open_checkpoint(base))
        site.check([file.path.name for file in checkpoint.files])
        planned = plan(job.inputs, checkpoint)
        earlier = records.numbered(base)
        report = job.begin(planned, earlier, dry_run)
        if dry_run:
            return _in_place(report, planned)
        largest = max(shard.size for shard in planned.shards)
        require_space(base, job.needed_bytes(planned, largest + largest // 2))
        keep = False
        try:
            work = site.open()
            if not resume:
                work.clear()
            sink = _Sink(work, planned, job)
            stack.callback(sink.close)
            first = replace(job, progress=lambda f, text: job.progress(_FIRST_PASS * f, text))
            number = max(earlier, default=0) + 1
            report = first.write(planned, sink, number, earlier, report)
            ready = CommitPlan(MERGE, number, report.record, sink.changes(), tuple(planned.texts))
            site.begin(work, ready)
        except BaseException as error:
            keep = resume and (isinstance(error, BROKEN_OFF) or not isinstance(error, LrcError))
            _take_back(site, keep)
            raise
        _second_pass(site, ready, planned, job, resume)
    return _in_place(report, planned)


def _take_back(site: ModelFolder, keep: bool) -> None:
    """After a failure before anything was changed: leave nothing behind, or only what a later run can use."""
    try:
        site.cancel(keep)
    except LrcError:
        if site.is_ready:
            raise unfinished(site.model) from None


def _in_place(report: MergeReport, planned: Plan) -> MergeReport:
    """The report, with a warning of weights that a copy would not have."""
    stay = [name for name in report.left_out if not name.endswith("/") and (planned.checkpoint.root / name).is_file()]
    warnings = (f"{name} stays as it is, and is not part of the merge" for name in stay)
    return replace(report, left_out=(), warnings=(*report.warnings, *warnings))


def _go_on(site: ModelFolder, job: Job) -> MergeReport:
    """The rest of the second pass of a merge in place that was broken off."""
    ready = site.ready()
    if ready.kind != MERGE:
        raise OptionError("an unmerge was broken off here", fix="run lrconvert recover first", path=site.model)
    with site.open_record(ready) as opened, reconstructed_base(site, ready, opened) as checkpoint:
        planned = plan(job.inputs, checkpoint)
        hidden = {name: site.text(name) for name in TEXTS if name not in planned.texts and site.text(name).exists()}
        copies = {name: path for name, path in planned.copies.items() if not name.startswith(f"{ready.place}/")}
        planned = replace(planned, copies={**copies, **hidden})
        with Workspace() as workspace, Merger(planned, job.inputs, workspace, ready.number, True, job.progress) as same:
            if same.plan_text(True) != (site.root / PLAN_NAME).read_bytes():
                what = "a merge of other adapters was broken off here"
                raise OptionError(what, fix="give the same ones, or run lrconvert recover first", path=site.model)
            text = same.plan_text(True)
        journal = Journal(Work.at(site.root, site.model).files, text, len(job.inputs))
        journal.read()
        tallies = {name: tally for done in journal.finished for name, tally in done.tallies.items()}
        size = sum((opened.folder / name).stat().st_size for name in opened.record.stored)
        report = job.begin(planned, {}, dry_run=False)
        report = job.done(report, planned, ready.place, tallies, size + opened.path.stat().st_size)
        _second_pass(site, ready, planned, job, resume=True)
    return _in_place(report, planned)


def _second_pass(site: ModelFolder, ready: CommitPlan, planned: Plan, job: Job, resume: bool) -> None:
    """Change the weights. A failure is taken back, unless work is to be kept or nothing can be written any more."""
    try:
        site.hide()
        _swap(site, ready, planned, job)
        site.patch(ready, MERGED)
        with site.open_record(ready) as opened:
            site.commit(ready, opened)
    except LrcError as error:
        if not site.is_ready:
            raise  # all is done, but for the journal's remains
        if resume:
            raise _broken_off(site, error) from error
        try:
            state = site.recover()
        except LrcError:
            if site.is_ready:
                raise _broken_off(site, error) from error
            raise
        if state == "old":
            raise


def _broken_off(site: ModelFolder, error: LrcError) -> UnfinishedError:
    return UnfinishedError(
        f"was broken off between two states: {error}",
        fix="run lrconvert recover, or the same command with --resume",
        path=site.model,
    )


def _swap(site: ModelFolder, ready: CommitPlan, planned: Plan, job: Job) -> None:
    """Replace the weight files that change as a whole; the last first, as it may have copies of tensors of others."""
    with site.open_record(ready) as opened, Workspace() as workspace:
        wanted = dict(opened.record.added) | {t.output: t.after for t in opened.record.tensors if t.output}
        computer = Computer(planned, workspace)
        states = site.states(ready, opened)
        todo = [n for n in reversed(range(len(planned.shards))) if states.get(n, MERGED) != MERGED]
        for count, number in enumerate(todo):
            shard, source = planned.shards[number], planned.checkpoint.files[number]
            if site.staged(shard.name).exists():
                source.check_unchanged()
                site.put_staged(shard.name)
            else:
                with site.fresh(shard.name) as file:
                    write_shard(computer, shard, file, wanted)
                    source.check_unchanged()
            source.close()  # its bytes are freed now
            job.progress(_FIRST_PASS + (1 - _FIRST_PASS) * (count + 1) / len(todo), shard.name)


@dataclass
class _Sink:
    """The first pass: patches where few rows change, and the weight file that is replaced first; the rest is computed
    again when its turn comes."""

    work: Work
    plan: Plan
    job: Job
    is_copy: bool = False
    _patch: PatchWriter | None = None
    _ahead: str = ""
    _spent: int = 0
    _changes: dict[str, Change] = field(default_factory=dict)

    def __post_init__(self) -> None:
        last = self.plan.shards[-1]
        if any(not o.is_copy for o in last.outputs) and not self._is_sparse(last):
            self._ahead = last.name

    def open(self, shard: Shard) -> AbstractContextManager[Writer]:
        self._patch = None
        limit = min(shard.size // _PATCH_SHARE, max(s.size for s in self.plan.shards) // 2 - self._spent)
        if _may_be_patched(shard) and any(o.is_touched for o in shard.outputs) and shard.name != self._ahead:
            self._patch = PatchWriter(self.work.files, self._patch_name(shard), limit)
        return self.work.content.create(shard.name) if shard.name == self._ahead else Nowhere()

    def change(self, output: Output, first: int, before: Array, after: Array) -> None:
        if self._patch is not None and output.base is not None:
            width = before.shape[1] * before.dtype.itemsize
            self._patch.change(output.base.start + first * width, before, after)

    def finish(self, shard: Shard) -> Patch | None:
        patch = None if self._patch is None else self._patch.finish()
        self._spent += 0 if patch is None else patch.nbytes
        return patch

    def close(self) -> None:
        """Let go of what a failure has left open."""
        if self._patch is not None:
            self._patch.close()

    def note(self, done: Done, shard: Shard) -> None:
        """Settle how a finished file is changed."""
        same = shard.file is not None and shard.header == shard.file.header_bytes and not done.added
        same = same and all(t.before == t.after for t in done.tensors)
        mode = SAME if same else SWAP if done.patch is None else PATCH
        self._changes[shard.name] = Change(shard.name, mode, done.patch)

    def kept(self, done: Done, shard: Shard) -> list[str] | None:
        if done.patch is not None:
            if not is_whole(self.work.files.root / done.patch.name, done.patch):
                return None
            self._spent += done.patch.nbytes
            return [done.patch.name]
        wanted = dict(done.added) | {t.output: t.after for t in done.tensors if t.output}
        path = self.work.content.root / shard.name
        return [f"{CONTENT}/{shard.name}"] if path.exists() and has_digests(path, shard, wanted) else []

    def changes(self) -> tuple[Change, ...]:
        """How every weight file is changed."""
        return tuple(self._changes[shard.name] for shard in self.plan.shards)

    def _patch_name(self, shard: Shard) -> str:
        return f"patch-{self.plan.shards.index(shard)}.tmp"

    def _is_sparse(self, shard: Shard) -> bool:
        """Whether the factors show that few rows of a file change, so that it is not worth writing it ahead."""
        nbytes = 0
        for output in shard.outputs:
            if not _may_be_patched(shard):
                return False
            if output.rows is not None:
                nbytes += output.rows.values.nbytes
            for piece in output.pieces:
                left = self.plan.sources[piece.origin.adapter].term(piece.origin).left
                rows = left.shape[0] if piece.magnitude is not None else np.count_nonzero(np.any(left, axis=1))
                nbytes += int(rows) * piece.cols * STORAGE[output.dtype].itemsize
                if 2 * nbytes > shard.size // _PATCH_SHARE:
                    return False
        return True


def _may_be_patched(shard: Shard) -> bool:
    """Whether a file keeps its header and whatever is not computed."""
    same = shard.file is not None and shard.header == shard.file.header_bytes
    return same and all(o.is_copy or o.is_touched for o in shard.outputs)


def write_shard(computer: Computer, shard: Shard, file: Writer, wanted: Mapping[str, str]) -> None:
    """Compute a weight file of a plan again. Raises E-IO-CHANGED if a tensor that is not copied has another digest than
    the one `wanted`."""
    with BackgroundWriter() as behind:
        behind.submit(file.write, shard.header)
        for output in shard.outputs:
            if output.is_copy:
                assert output.source is not None
                behind.submit(computer.plan.checkpoint.file_of(output.source).copy, output.source, file)
                continue
            digest = tensor_hasher(output.name, output.dtype, output.shape)
            parts = (b.after for b in computer.blocks(output)) if output.is_touched else (output.data,)
            for part in parts:
                behind.submit(_emit, file, part, digest)
            behind.submit(_compare, digest, wanted[output.name], output.name, shard)


def _emit(file: Writer, part: Any, digest: Any) -> None:
    data = part if isinstance(part, bytes) else np.ascontiguousarray(part).data.cast("B")
    digest.update(data)
    file.write(data)


def _compare(digest: Any, wanted: str, name: str, shard: Shard) -> None:
    if digest.hexdigest() != wanted:
        raise FileChangedError(f"{name!r} changed while it was merged", path=shard.file.path if shard.file else None)


# --- undoing --------------------------------------------------------------------------------------------------------


def unmerge_in_place(merged: Path, number: int | None, progress: Progress, *, resume: bool) -> UnmergeReport:
    """Turn `merged` into the base again. Raises what `unmerge` raises; but for E-UNFINISHED nothing is changed then."""
    site = ModelFolder(merged)
    with locked(merged), ExitStack() as stack:
        if site.is_ready:
            ready = site.ready()
            if not resume or ready.kind != UNMERGE:
                raise unfinished(merged)
            with site.open_record(ready) as opened:
                return _restore(site, ready, opened)
        opened = stack.enter_context(OpenRecord(records.latest(merged, number)))
        with open_checkpoint(merged) as checkpoint:
            check_undoable(opened, checkpoint)
            _check_files(opened, checkpoint)
            site.check([name for name, _ in opened.record.files])
            largest = max(size for _, size in opened.record.files)
            require_space(merged, int((largest + largest // 2) * _SPACE_MARGIN))
            try:
                with _new_work(site) as work:
                    ready = _rehearse(opened, checkpoint, work, progress)
                    site.begin(work, ready)
            except LrcError as error:
                _take_back(site, keep=False)
                raise error.at(merged) from None
            except BaseException:
                _take_back(site, keep=False)
                raise
        return _restore(site, ready, opened)


@contextmanager
def _new_work(site: ModelFolder) -> Iterator[Work]:
    work = site.open()
    work.clear()
    yield work


def _check_files(opened: OpenRecord, checkpoint: Checkpoint) -> None:
    """Raise E-UNDO unless every weight file of the base comes from the one of its name."""
    ours = {file.path.name: {info.name for info in file.tensors} for file in checkpoint.files}
    known = {t.name: t for t in opened.record.tensors}
    for (name, _), (_, infos) in zip(opened.record.files, opened.headers, strict=True):
        outputs = {known[info.name].output for info in infos} - {""}
        if not outputs <= ours.get(name, set()):
            break
    else:
        if len(ours) == len(opened.record.files):
            return
    what = "the merge cut the weights into other files, so it is not undone in place"
    raise UndoError(what, fix="give --output", path=checkpoint.root)


def _rehearse(opened: OpenRecord, checkpoint: Checkpoint, work: Work, progress: Progress) -> CommitPlan:
    """Restore everything once, into nothing: whatever is damaged is found before anything changes. Collects patches."""
    record = opened.record
    place = f"{opened.folder.parent.name}/{opened.folder.name}"
    work.files.write_bytes(PLAN_NAME, plan_text(UNMERGE, {"place": place}))
    files = {file.path.name: file for file in checkpoint.files}
    known = {t.name: t for t in record.tensors}
    largest = max(size for _, size in record.files)
    total, done, spent = max(1, sum(size for _, size in record.files)), 0, 0
    changes: list[Change] = []

    def advance(info: TensorInfo) -> None:
        nonlocal done
        done += info.nbytes
        progress(_FIRST_PASS * min(1.0, done / total), info.name)

    def change(tensor: TensorRecord, first: int, present: Array, restored: Array) -> None:
        if patch is not None:
            width = present.shape[1] * present.dtype.itemsize
            patch.change(checkpoint.tensors[tensor.output].start + first * width, restored, present)

    with (
        ExitStack() as stack,
        Workspace() as workspace,
        Restorer(opened, checkpoint, workspace, change) as restorer,
    ):
        for number, (name, size) in enumerate(record.files):
            header, infos = opened.headers[number]
            changed = [known[i.name] for i in infos if known[i.name].before != known[i.name].after]
            same = files[name].header_bytes == header
            patch = None
            if same and changed and all(t.cols for t in changed):
                limit = min(size // _PATCH_SHARE, largest // 2 - spent)
                patch = PatchWriter(work.files, f"patch-{number}.tmp", limit)
                stack.callback(patch.close)
            restorer.file(number, Nowhere(), advance)
            made = None if patch is None else patch.finish()
            spent += 0 if made is None else made.nbytes
            mode = SAME if same and not changed else SWAP if made is None else PATCH
            changes.append(Change(name, mode, made))
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


def _restore(site: ModelFolder, ready: CommitPlan, opened: OpenRecord) -> UnmergeReport:
    """Change the weights; a failure is tried again once, since only forward leads out."""
    try:
        site.hide()
        site.restore(ready, opened)
        site.commit(ready, opened)
    except LrcError as error:
        if not site.is_ready:
            raise
        try:
            site.recover()
        except LrcError:
            if site.is_ready:
                raise _broken_off(site, error) from error
            raise
    with open_checkpoint(site.model) as checkpoint:
        copies, _ = other_files(checkpoint)
        sizes = {name: path.stat().st_size for name, path in copies.items() if not opened.holds(name)}
        sizes |= {file.path.name: file.size for file in checkpoint.files}
        if checkpoint.index_path is not None:
            sizes[INDEX_NAME] = checkpoint.index_path.stat().st_size
        return undone(opened, sizes, changed_files(opened, copies))
