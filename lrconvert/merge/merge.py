"""Merge adapters into a base, shard by shard and in row blocks, correctly rounded: into a new folder, or in its place.

Normative text: ``formats/merge-v1.md``. What no adapter touches is copied byte for byte: tensors, header, index, and
all other files. The output appears whole or not at all. Memory does not grow with the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lrconvert.core.errors import LrcError, OptionError
from lrconvert.io.durable import check_output, require_space, work_directory
from lrconvert.merge.arithmetic import products
from lrconvert.merge.in_place.merge import merge_in_place
from lrconvert.merge.job import BROKEN_OFF, Job, check_replaceable
from lrconvert.merge.plan.plan import plan
from lrconvert.merge.plan.updates import Adapter, Scaled
from lrconvert.merge.quantized_base import open_base
from lrconvert.merge.report import MergeReport
from lrconvert.merge.sinks import FolderSink
from lrconvert.merge.undo import record as records
from lrconvert.merge.writing import Progress


def _silent(fraction: float, text: str) -> None:
    """The progress callback of a caller who wants none."""


def merge(
    base: Path,
    adapters: Sequence[Adapter | Scaled],
    out: Path | None = None,
    *,
    in_place: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    allow_no_op: bool = False,
    undo: bool = True,
    shard_bytes: int | None = None,
    dequantize: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
) -> MergeReport:
    """Write the folder `out`: `base` with all `adapters` added in one sum and rounded once, and the record that undoes
    it (with `undo`; otherwise digests only). With `in_place` instead of `out` the base itself becomes it.

    `dequantize` takes a base that bitsandbytes has quantized as bf16. `shard_bytes` bounds the weight files of the
    output; without it they are cut as the base's. With `resume` work that is broken off stays, and the same merge goes
    on from there. `device`, one of torch's, computes the products of factors: the bytes do not depend on it.
    `progress(fraction, text)` is called as bytes are written. Raises E-BASE, E-ORIENT, E-FPR, E-PLACE, E-NO-EFFECT
    (nothing to merge, all updates zero, or no element moved), E-OVERFLOW, E-VALUE, E-BASE-QUANT, E-OPTION, E-OUT-*,
    E-LOCKED, E-DEVICE, E-IO-*, and what `open_base` raises: nothing is changed or left behind then (but what `resume`
    keeps). E-UNFINISHED: a merge in place could neither be finished nor taken back; `recover` does either.
    """
    inputs = [item if isinstance(item, Scaled) else Scaled(item) for item in adapters]
    job = Job(inputs, undo, allow_no_op, progress or _silent, products.on(device))
    if in_place:
        _check_in_place(out, overwrite, undo, shard_bytes, dequantize)
        return merge_in_place(base, job, resume=resume, dry_run=dry_run)
    if out is None:
        raise OptionError("a merge needs an output", fix="give --output, or --in-place")
    check_output(out, overwrite, [base], directory=True)
    check_replaceable(out)
    with open_base(base, dequantize=dequantize) as checkpoint:
        planned = plan(inputs, checkpoint, shard_bytes)
        earlier = records.numbered(base)
        report = job.begin(planned, earlier, dry_run)
        if dry_run:
            return report
        with work_directory(out, overwrite=overwrite, resume=resume) as work:
            require_space(out, job.needed_bytes(planned, sum(planned.files.values())) - work.nbytes)
            try:
                report = job.write(planned, FolderSink(work), max(earlier, default=0) + 1, earlier, report)
            except LrcError as error:
                work.keep = work.keep and isinstance(error, BROKEN_OFF)
                raise
    return report


def _check_in_place(out: Path | None, overwrite: bool, undo: bool, shard_bytes: int | None, dequantize: bool) -> None:
    """Raise E-OPTION for what a merge in place cannot do."""
    for given, name in ((out is not None, "--output"), (overwrite, "--overwrite"), (dequantize, "--dequantize")):
        if given:
            raise OptionError(f"{name} does not go with --in-place", fix="leave out one of them")
    if shard_bytes is not None:
        raise OptionError("--in-place keeps the weight files as they are cut", fix="leave out --out-shard-size")
    if not undo:
        raise OptionError("--in-place needs its undo record: a broken off merge is taken back with it")
