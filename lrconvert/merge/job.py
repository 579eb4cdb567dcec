"""The checks of a merge, its report, and its pass over the base, wherever it writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lrconvert.core import errors
from lrconvert.core.wording import spelled
from lrconvert.io.checkpoint import Checkpoint
from lrconvert.lora.adapter import LoraAdapter
from lrconvert.merge.arithmetic.stats import MergeStats
from lrconvert.merge.arithmetic.workspace import Workspace
from lrconvert.merge.compute import workspace_for
from lrconvert.merge.plan.plan import CONFIG_NAME, Output, Plan
from lrconvert.merge.plan.updates import Scaled
from lrconvert.merge.plan.whole_tensors import is_zero
from lrconvert.merge.quantized_base import DequantizedCheckpoint
from lrconvert.merge.report import MergedTensor, MergeReport
from lrconvert.merge.sinks import Sink
from lrconvert.merge.undo.open_record import OpenRecord
from lrconvert.merge.writing import Merger, Progress

# After these a merge may go on where it stopped; after others it would stop there again.
BROKEN_OFF = (errors.FileWriteError, errors.FileReadError, errors.FileChangedError, errors.DiskSpaceError)

_SPACE_MARGIN = 1.05
_RECORD_SHARE = 0.08  # of the touched bytes, to be safe: 1 to 2 % in bf16, more where updates are large


@dataclass(frozen=True)
class Job:
    """The adapters of a merge, and its options."""

    inputs: Sequence[Scaled]
    undo: bool
    allow_no_op: bool
    progress: Progress

    def begin(self, planned: Plan, earlier: Mapping[int, Path], dry_run: bool) -> MergeReport:
        """Return the report of what will be written. Raises E-NO-EFFECT; after a dry run also E-FPR."""
        if not self.allow_no_op:
            _check_effect(self.inputs, planned)
        report = _report(self.inputs, planned)
        if not dry_run:
            return report
        if planned.contents:
            _check_content(planned.checkpoint.content_digest(), planned, earlier)
        return replace(report, dry_run=True, warnings=(*report.warnings, *notes(planned.checkpoint)))

    def needed_bytes(self, planned: Plan, files: int) -> int:
        """Return the space for so many bytes of files and, with `undo`, the record, with a margin."""
        touched = sum(o.nbytes for o in planned.touched)
        return int((files + (touched * _RECORD_SHARE if self.undo else 0)) * _SPACE_MARGIN)

    def write(
        self, planned: Plan, sink: Sink, number: int, earlier: Mapping[int, Path], report: MergeReport
    ) -> MergeReport:
        """Compute everything, give it to `sink` and return the report of what was done. Raises E-FPR, E-NO-EFFECT,
        E-IO-CHANGED and what computing raises."""
        work = "merge with a record" if self.undo else "merge"
        with workspace_for(work, planned) as workspace, self.merger(planned, workspace, number) as merger:
            merger.run(sink)
        for file in planned.checkpoint.files:
            file.check_unchanged()
        _check_content(merger.content, planned, earlier)
        report = self.done(report, planned, merger.place, merger.stats, merger.record_bytes)
        if not self.allow_no_op and not planned.placement.has_effect:
            _check_moved(report)
        return report

    def merger(self, planned: Plan, workspace: Workspace, number: int) -> Merger:
        """Return what writes merge number `number`."""
        return Merger(planned, self.inputs, workspace, number, self.undo, self.progress)

    def done(
        self, report: MergeReport, planned: Plan, place: str, stats: Mapping[str, MergeStats], record_bytes: int
    ) -> MergeReport:
        """Return the report with what was measured."""
        return replace(
            report,
            tensors=tuple(_row(o, stats[o.name]) for o in planned.touched),
            record=place,
            record_bytes=record_bytes,
            can_undo=self.undo,
            warnings=(*report.warnings, *notes(planned.checkpoint)),
        )


def notes(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return what the user should know of a base, with what was measured if all of it was read."""
    return (checkpoint.note,) if isinstance(checkpoint, DequantizedCheckpoint) else ()


def _report(inputs: Sequence[Scaled], planned: Plan) -> MergeReport:
    placement = planned.placement
    return MergeReport(
        tensors=tuple(_row(o, MergeStats(elements=int(np.prod(o.shape)))) for o in planned.touched),
        placed=tuple(sorted(placement.prefix + name for name in placement.replaced)),
        added=tuple(sorted([e.name for e in placement.added] + list(placement.copies))),
        dropped=tuple(sorted(placement.dropped)),
        config=placement.config,
        files=tuple(planned.files.items()),
        left_out=planned.left_out,
        warnings=(*(w for item in inputs for w in item.adapter.warnings), *planned.warnings),
        touched_bytes=sum(o.nbytes for o in planned.touched),
    )


def _row(output: Output, stats: MergeStats) -> MergedTensor:
    updates = len(output.pieces) + (output.rows is not None)
    return MergedTensor(output.name, output.dtype, output.shape, updates, stats)


def check_replaceable(out: Path) -> None:
    """Raise E-OUT-PATH unless `out` is a model folder, empty, or not there: nothing else is ever replaced."""
    if out.is_dir() and any(out.iterdir()) and not (out / CONFIG_NAME).exists() and not any(out.glob("*.safetensors")):
        raise errors.OutputPathError(
            "is not a model folder, so it is not replaced", fix="choose another output", path=out
        )


# --- checks ---------------------------------------------------------------------------------------------------------


def _check_content(content: str, planned: Plan, earlier: Mapping[int, Path]) -> None:
    """Raise E-FPR if an adapter names the contents of its base and neither this base nor, if it is a merged model, what
    it was merged from has them. Updates that depend on the base are of this one alone."""
    if not planned.contents or content in planned.contents:
        return
    for place in () if any(source.needs_base for source in planned.sources) else earlier.values():
        with OpenRecord(place) as opened:
            if opened.record.content in planned.contents:
                return
    raise errors.FingerprintError(
        "the base has other contents than the one that the adapter was made for",
        fix="use the same revision of the base",
        path=planned.checkpoint.root,
    )


def _check_effect(inputs: Sequence[Scaled], planned: Plan) -> None:
    """Raise E-NO-EFFECT, before anything is written, where a look at the adapters shows that nothing would change."""
    if planned.placement.has_effect:
        return
    if not planned.touched:
        raise errors.NoEffectError("the adapter has no target and no other tensor for this base", fix=_allow())
    if all(_is_zero(item) for item in inputs):
        raise errors.NoEffectError(
            "the update is zero everywhere", fix=f"was the adapter trained? Otherwise {_allow()}"
        )


def _is_zero(item: Scaled) -> bool:
    """Return whether a look at the adapter shows that it changes nothing beside whole tensors."""
    adapter = item.adapter
    if any(e.use not in ("replace", "textual_inversion") for e in adapter.extras):
        return False
    return item.scale == 0 or (isinstance(adapter, LoraAdapter) and all(map(is_zero, adapter.targets)))


def _check_moved(report: MergeReport) -> None:
    stats = report.stats
    if stats.changed:
        return
    if not stats.unmoved:
        raise errors.NoEffectError(
            "the update is zero everywhere", fix=f"was the adapter trained? Otherwise {_allow()}"
        )
    names = ", ".join(sorted({t.dtype for t in report.tensors}))
    raise errors.NoEffectError(
        f"no element moved: all {stats.unmoved} nonzero updates are below the resolution of {names}",
        fix=f"merge into a base of a wider dtype, or {_allow()}",
    )


def _allow() -> str:
    return f"pass {spelled('allow_no_op', True)} to write a copy of the base all the same"
