"""`refine`: train a compact adapter to answer more as its teacher does, or return it as it was."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from lrconvert.core.errors import FingerprintError, OptionError, OutputExistsError
from lrconvert.formats import fidelity
from lrconvert.formats.fidelity import Answers
from lrconvert.io.checkpoint import open_checkpoint
from lrconvert.live.zero_point import differences
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter
from lrconvert.methods import base as methods
from lrconvert.refine import distributed, layerwise
from lrconvert.refine.run import RefineResult, RefineRun
from lrconvert.refine.session import Progress, RefineSession, open_session, part
from lrconvert.refine.settings import RunOptions, Settings

_LONGEST_METRICS = "hidden states -0.00000e-000 of -0.00000e-000, agreement 0.0000, 0000000000 items"
_OPENING = 0.05  # of the progress: what comes before the student


@dataclass(frozen=True, eq=False)
class Refinement(RefineResult):
    """A `RefineResult` to be written. `data`: digest of all data. `leads`: whether this is the first of several
    processes, the one that writes. `warnings` are one-line texts."""

    data: str
    seconds: float
    leads: bool


def refine(
    compact: CompactAdapter,
    teacher: LoraAdapter,
    base: Path | nn.Module,
    data: Any,
    settings: Settings,
    run: RunOptions,
    *,
    partial: Path | None,
    progress: Progress,
) -> Refinement:
    """Refine `compact`; see `lrconvert.api.refine`. Checkpoints are written to `partial`."""
    settings.check()
    if partial is not None and partial.exists() and not run.resume:
        raise OutputExistsError(
            "is the checkpoint of an unfinished refinement",
            fix="pass --resume to go on with it, or remove it",
            path=partial,
        )
    layerwise.aligned(teacher, compact)
    if run.load_in_4bit and not isinstance(base, Path):
        raise OptionError("a live model cannot be loaded in 4 bit", fix="load it so, or give its folder")
    if isinstance(base, Path) and compact.base.content:
        with open_checkpoint(base) as checkpoint:
            if checkpoint.content_digest() != compact.base.content:
                raise FingerprintError("the base has other contents than the file's own", path=base)
    started = time.monotonic()
    with distributed.joined(run.device) as processes:
        quiet = progress if processes.is_first else lambda share, text: None
        with open_session(
            base,
            teacher,
            data,
            settings,
            replace(run, device=distributed.own_device(run.device)),
            processes=processes,
            student=compact,
            progress=part(quiet, 0.0, _OPENING),
        ) as session:
            log = None if run.log is None else Path(run.log)
            student = RefineRun(session, compact, settings, partial, run.resume, log)
            result = student.run(part(quiet, _OPENING, 1.0))
            warnings = (*teacher.warnings, *_source_warnings(compact, teacher), *differences(teacher, compact))
            return refinement(session, result, settings.seed, time.monotonic() - started, warnings)


def refinement(
    session: RefineSession, result: RefineResult, seed: int, seconds: float, warnings: tuple[str, ...] = ()
) -> Refinement:
    """Return the outcome of a student with its provenance."""
    done = replace(result, compact=with_provenance(session, result, seed), warnings=(*warnings, *result.warnings))
    is_first = session.teacher_model.processes.is_first
    return Refinement(**vars(done), data=session.split.digest, seconds=seconds, leads=is_first)


def _source_warnings(compact: CompactAdapter, teacher: LoraAdapter) -> tuple[str, ...]:
    """A warning if the teacher is not the LoRA that the file was made from, as far as both say."""
    file_source, teacher_source = compact.provenance.source, teacher.provenance.source
    if not file_source or not teacher_source or file_source == teacher_source:
        return ()
    return ("the teacher is not the LoRA that the file was made from: what is measured is against the teacher",)


# --- provenance -----------------------------------------------------------------------------------------------------


def with_provenance(session: RefineSession, result: RefineResult, seed: int) -> CompactAdapter:
    """Return the outcome of a student with what was done in its provenance, also where nothing was gained."""
    compact, teacher = result.compact, session.teacher
    fields = {
        **compact.provenance.fields,
        "refined_steps": str(result.best_step),
        "refined_layerwise": "yes" if result.layerwise else "no",
        "refined_seed": str(seed),
        "refined_data": session.split.digest,
        "refined_before": _metrics(result.before),
        "refined_after": _metrics(result.after),
    }
    if teacher.provenance.source:
        fields["refined_teacher"] = teacher.provenance.source
    if result.improved and methods.needs_base(compact) and session.base is None:
        fields.pop("captured", None)  # unknown without the base's weights
    elif result.improved and "captured" in fields:
        captured = fidelity.fidelity_on(layerwise.aligned(teacher, compact), compact, None, session.base).captured
        fields["captured"] = f"{min(max(captured, 0.0), 1.0):.4f}"
    return replace(compact, provenance=replace(compact.provenance, fields=fields))


def with_longest_provenance(lora: LoraAdapter) -> LoraAdapter:
    """Return the LoRA with the longest text for each field that `with_provenance` adds: what is converted from it under
    a budget is within that budget when it is refined, too."""
    provenance = lora.provenance
    fields = {"refined_layerwise": "yes", **dict.fromkeys(("refined_steps", "refined_seed"), "0" * 20)}
    fields |= dict.fromkeys(("refined_data", *(("refined_teacher",) if provenance.source else ())), "0" * 64)
    fields |= dict.fromkeys(("refined_before", "refined_after"), _LONGEST_METRICS)
    return replace(lora, provenance=replace(provenance, fields={**provenance.fields, **fields}))


def _metrics(answers: Answers) -> str:
    agreement = "" if answers.agreement is None else f", agreement {answers.agreement:.4f}"
    return f"{answers.kind} {answers.distance:.6g} of {answers.base_distance:.6g}{agreement}, {answers.items} items"
