"""Merging into a model folder itself, with one weight file of extra space.

Two passes. The first computes everything and changes nothing: it writes the whole record, and refuses what has to be
refused. Once that is on the disk the second replaces one weight file after the other, or patches the few rows that
change. A failure in the second is taken back, or finished (`recover`); see `commit`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from lrconvert.core.errors import FileChangedError, LrcError, OptionError, UnfinishedError
from lrconvert.core.wording import spelled, verb
from lrconvert.io.checkpoint import open_checkpoint, unfinished
from lrconvert.io.container import tensor_hasher
from lrconvert.io.durable import PLAN_NAME, Work, Writer, install, locked, require_space
from lrconvert.merge.arithmetic.workspace import Workspace
from lrconvert.merge.background_writer import BackgroundWriter
from lrconvert.merge.compute import Computer, workspace_for
from lrconvert.merge.hashing import Digest, copy_hashed, emit
from lrconvert.merge.in_place.commit import Commit, open_commit, recover
from lrconvert.merge.in_place.first_pass import InPlaceSink
from lrconvert.merge.in_place.model_folder import BETWEEN, CLEAN, DONE, MERGE, CommitPlan, ModelFolder, State, is_ours
from lrconvert.merge.in_place.patches import MERGED
from lrconvert.merge.in_place.reconstructed_base import reconstructed_base
from lrconvert.merge.job import BROKEN_OFF, Job
from lrconvert.merge.journal import Journal
from lrconvert.merge.plan.other_files import RECORDS
from lrconvert.merge.plan.plan import Plan, Shard, plan
from lrconvert.merge.report import MergeReport
from lrconvert.merge.undo import open_record, repeats
from lrconvert.merge.undo.record import TEXTS

FIRST_PASS = 0.6  # of the time, as progress is shown


def merge_in_place(base: Path, job: Job, *, resume: bool, dry_run: bool, again: bool = False) -> MergeReport:
    """Turn `base` into the merge of it, unless it holds that merge already and is not to be merged `again`. Raises what
    `merge` raises; nothing is changed then, but for E-UNFINISHED."""
    folder = ModelFolder(base)
    with locked(base), ExitStack() as stack:
        state = folder.state()
        if state.stage == BETWEEN:
            if not resume or dry_run:
                raise unfinished(base)
            return _continue(folder, job)
        checkpoint = stack.enter_context(open_checkpoint(base, quantized=True))
        folder.check([file.path.name for file in checkpoint.files])
        if state.stage in (CLEAN, DONE) and not dry_run:
            folder.clear()
        earlier = open_record.numbered(base)
        merged = repeats.same_merge(earlier, job.inputs)
        if merged and (not again or state == State(DONE, MERGE, f"{RECORDS}/{earlier[merged].name}")):
            repeats.check_is_merged(checkpoint, earlier)
            return repeats.already_merged(earlier[merged], dry_run=dry_run)
        planned = plan(job.inputs, checkpoint)
        report = job.begin(planned, earlier, dry_run)
        if dry_run:
            return _in_place(report, planned)
        largest = max(shard.size for shard in planned.shards)
        require_space(base, job.needed_bytes(planned, largest + largest // 2))
        keep = False
        try:
            work = folder.open()
            if not resume:
                work.clear()
            sink = InPlaceSink(work, planned)
            stack.callback(sink.patches.close)
            first = replace(job, progress=lambda f, text: job.progress(FIRST_PASS * f, text))
            number = max(earlier, default=0) + 1
            report = first.write(planned, sink, number, earlier, report)
            folder.begin(work, CommitPlan(MERGE, number, report.record, sink.changes(), tuple(planned.texts)))
        except BaseException as error:
            keep = resume and (isinstance(error, BROKEN_OFF) or not isinstance(error, LrcError))
            take_back(folder, keep)
            raise
        _second_pass(folder, planned, job, resume)
    return _in_place(report, planned)


def take_back(folder: ModelFolder, keep: bool) -> None:
    """Leave nothing after a failure before anything was changed, or only what a later run can use."""
    try:
        folder.cancel(keep)
    except LrcError:
        if folder.is_ready:
            raise unfinished(folder.model) from None


def _in_place(report: MergeReport, planned: Plan) -> MergeReport:
    """Return the report, with a warning of weights that a copy would not have."""
    stay = [name for name in report.left_out if not name.endswith("/") and (planned.checkpoint.root / name).is_file()]
    warnings = (f"{name} stays as it is, and is not part of the merge" for name in stay)
    return replace(report, left_out=(), warnings=(*report.warnings, *warnings))


def _continue(folder: ModelFolder, job: Job) -> MergeReport:
    """Do the rest of the second pass of a merge in place that was broken off."""
    with open_commit(folder) as commit:
        commit_plan, opened = commit.plan, commit.opened
        if commit_plan.kind != MERGE:
            raise OptionError("an unmerge was broken off here", fix=f"run {verb('recover')} first", path=folder.model)
        with reconstructed_base(commit) as checkpoint:
            planned = plan(job.inputs, checkpoint)
            texts = {name: folder.text(name) for name in TEXTS if name not in planned.texts}
            copies = {n: path for n, path in planned.copies.items() if not n.startswith(f"{commit_plan.place}/")}
            copies |= {name: path for name, path in texts.items() if path.exists()}
            planned = replace(planned, copies=copies)
            with Workspace() as workspace, job.merger(planned, workspace, commit_plan.number) as merger:
                text = merger.plan_text(True)
            if text != (folder.root / PLAN_NAME).read_bytes():
                what = "a merge of other adapters was broken off here"
                raise OptionError(what, fix=f"give the same ones, or run {verb('recover')} first", path=folder.model)
            journal = Journal(Work.at(folder.root, folder.model, is_ours).files, text, len(job.inputs))
            journal.read()
            stats = {name: s for done in journal.finished for name, s in done.stats.items()}
            nbytes = sum((opened.folder / name).stat().st_size for name in opened.record.stored)
            report = job.begin(planned, {}, dry_run=False)
            report = job.done(report, planned, commit_plan.place, stats, nbytes + opened.path.stat().st_size)
            _second_pass(folder, planned, job, resume=True)
    return _in_place(report, planned)


def _second_pass(folder: ModelFolder, planned: Plan, job: Job, resume: bool) -> None:
    """Change the weights. A failure is taken back, unless work is to be kept or nothing can be written any more."""
    try:
        folder.hide()
        with open_commit(folder) as commit:
            _swap(commit, planned, job)
            commit.patch(MERGED)
            commit.finish()
    except LrcError as error:
        if not folder.is_ready:
            raise  # all is done, but for the journal's remains
        if resume:
            raise broken_off(folder, error) from error
        try:
            state = recover(folder)
        except LrcError:
            if folder.is_ready:
                raise broken_off(folder, error) from error
            raise
        if state == "old":
            raise


def broken_off(folder: ModelFolder, error: LrcError) -> UnfinishedError:
    """Return the error of a model that is left between two states."""
    return UnfinishedError(
        f"was broken off between two states: {error}",
        fix=f"run {verb('recover')}, or the same again with {spelled('resume', True)}",
        path=folder.model,
    )


def _swap(commit: Commit, planned: Plan, job: Job) -> None:
    """Replace the weight files that change as a whole; the last first, as it may have copies of tensors of others."""
    folder, record = commit.folder, commit.opened.record
    digests = dict(record.added) | {t.output: t.after for t in record.tensors if t.output}
    states = commit.states()
    todo = [n for n in reversed(range(len(planned.shards))) if states.get(n, MERGED) != MERGED]
    with workspace_for("merge", planned) as workspace:
        computer = Computer(planned, workspace)
        for count, number in enumerate(todo):
            shard, source = planned.shards[number], planned.checkpoint.files[number]
            if folder.staged(shard.name).exists():
                source.check_unchanged()
                install(folder.staged(shard.name), folder.model / shard.name)
            else:
                with folder.fresh(shard.name) as file:
                    _write_shard(computer, shard, file, digests)
                    source.check_unchanged()
            source.close()  # its bytes are freed now
            job.progress(FIRST_PASS + (1 - FIRST_PASS) * (count + 1) / len(todo), shard.name)


def _write_shard(computer: Computer, shard: Shard, file: Writer, digests: Mapping[str, str]) -> None:
    """Compute a weight file of a plan again. Raises E-IO-CHANGED if a tensor that is not copied has another digest than
    the one of its name."""

    def compare(digest: Digest, name: str) -> None:
        if digest.hexdigest() != digests[name]:
            path = shard.file.path if shard.file else None
            raise FileChangedError(f"{name!r} changed while it was merged", path=path)

    with BackgroundWriter() as writer:
        writer.submit(file.write, shard.header)
        for output in shard.outputs:
            if output.is_copy:
                assert output.source is not None
                writer.submit(copy_hashed, computer.plan.checkpoint, output.source, file, ())
                continue
            digest = tensor_hasher(output.name, output.dtype, output.shape)
            parts = (b.after for b in computer.blocks(output)) if output.is_touched else (output.data or b"",)
            for part in parts:
                writer.submit(emit, file, part, digest)
            writer.submit(compare, digest, output.name)
