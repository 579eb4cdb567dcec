"""Merge adapters into a base, shard by shard and in row blocks, correctly rounded: into a new folder, or in its place.

Normative text: ``formats/merge-v1.md``. What no adapter touches is copied byte for byte: tensors, header, index, and
all other files. The output appears whole or not at all. Memory does not grow with the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lrconvert.core.errors import LrcError, OptionError
from lrconvert.core.wording import spelled
from lrconvert.io.checkpoint import open_checkpoint
from lrconvert.io.durable import check_output, clean_up, require_space, work_directory
from lrconvert.io.pipeline import is_pipeline
from lrconvert.merge import pipeline
from lrconvert.merge.in_place.merge import merge_in_place
from lrconvert.merge.job import BROKEN_OFF, Job, check_replaceable
from lrconvert.merge.options import MergeOptions
from lrconvert.merge.plan.plan import Plan, plan
from lrconvert.merge.plan.updates import Adapter, Scaled
from lrconvert.merge.quantized_base import open_base
from lrconvert.merge.report import MergeReport
from lrconvert.merge.sinks import FolderSink
from lrconvert.merge.undo.open_record import numbered
from lrconvert.merge.undo.repeats import already_merged, changed_tensor, read_record, same_merge
from lrconvert.merge.writing import Progress


def merge(
    base: Path, adapters: Sequence[Adapter | Scaled], out: Path | None, options: MergeOptions, progress: Progress
) -> MergeReport:
    """Write the folder `out`: `base` with all `adapters` added in one sum and rounded once, and the record that undoes
    it; or change the base itself. A diffusers pipeline gets a merge in each of its models that the adapters name.

    `progress(fraction, text)` is called as bytes are written. Raises E-BASE, E-ORIENT, E-FPR, E-PLACE, E-NO-EFFECT
    (nothing to merge, all updates zero, or no element moved), E-OVERFLOW, E-VALUE, E-BASE-QUANT, E-OPTION, E-OUT-*,
    E-LOCKED, E-IO-*, and what `open_base` raises: nothing is changed or left behind then (but what `resume` keeps).
    E-UNFINISHED: a merge in place could neither be finished nor taken back; `recover` does either.
    """
    options.check(out)
    inputs = [item if isinstance(item, Scaled) else Scaled(item) for item in adapters]
    if is_pipeline(base):
        return pipeline.merge(
            base, inputs, out, options, progress, lambda *model: _merge_model(model[0], inputs, *model[1:])
        )
    if options.component:
        what = f"{spelled('component', ...)} is for a pipeline, a folder with model_index.json"
        raise OptionError(what, fix="leave it out, or give the pipeline's folder", path=base)
    return _merge_model(base, inputs, out, options, progress)


def _merge_model(
    base: Path, inputs: Sequence[Scaled], out: Path | None, options: MergeOptions, progress: Progress
) -> MergeReport:
    """Merge into one model folder."""
    job = Job(inputs, options.undo, options.allow_no_op, progress)
    if options.in_place or out is None:
        return merge_in_place(base, job, resume=options.resume, dry_run=options.dry_run, again=options.again)
    may_be_done = options.resume and not options.overwrite and bool(numbered(out))
    check_output(out, options.overwrite or may_be_done, [base], directory=True)
    check_replaceable(out)
    with open_base(base, dequantize=options.dequantize) as checkpoint:
        planned = plan(inputs, checkpoint, options.shard_bytes)
        earlier = numbered(base)
        if may_be_done:
            return _finished(out, planned, job, max(earlier, default=0) + 1)
        report = job.begin(planned, earlier, options.dry_run)
        if not options.again and (number := same_merge(earlier, inputs)):
            what = f"the base holds this merge already, as merge {number}; once more is {spelled('again', True)}"
            report = replace(report, warnings=(*report.warnings, what))
        if options.dry_run:
            return report
        with work_directory(out, overwrite=options.overwrite, resume=options.resume) as work:
            require_space(out, job.needed_bytes(planned, sum(planned.files.values())) - work.nbytes)
            try:
                report = job.write(planned, FolderSink(work), max(earlier, default=0) + 1, earlier, report)
            except LrcError as error:
                work.keep = work.keep and isinstance(error, BROKEN_OFF)
                raise
    return report


def _finished(out: Path, planned: Plan, job: Job, number: int) -> MergeReport:
    """Return the report of a merge that an earlier run put in place, before it could say so, and remove what it left.
    Raises E-OUT-EXISTS if `out` is anything else."""
    records = numbered(out)
    is_done = max(records) == number and same_merge(records, job.inputs) == number
    if is_done:
        last = read_record(records[number])
        is_done = last.can_undo == job.undo and last.content == planned.checkpoint.content_digest()
    if is_done:
        with open_checkpoint(out, quantized=True) as model:
            is_done = [f.header_bytes for f in model.files] == [shard.header for shard in planned.shards]
            is_done = is_done and changed_tensor(model, records) is None
    if not is_done:
        check_output(out, overwrite=False, directory=True)
    clean_up(out)
    return already_merged(records[number], dry_run=False)
