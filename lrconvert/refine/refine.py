"""`refine`: a compact adapter is made to answer more as its teacher does, or comes back as it was."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from lrconvert.core.errors import FingerprintError, OptionError, OutputExistsError
from lrconvert.formats import fidelity
from lrconvert.formats.fidelity import Answers
from lrconvert.io.container import open_checkpoint
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter
from lrconvert.methods import base as methods
from lrconvert.refine import distributed, layerwise, session
from lrconvert.refine.run import RefineResult, RefineRun
from lrconvert.refine.session import Progress, RefineSession
from lrconvert.refine.settings import RunOptions, Settings

_UNKNOWN = "hidden states -0.00000e-000 of -0.00000e-000, agreement 0.0000, 0000000000 items"
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
    """Refine `compact`; see `lrconvert.api.refine`. Unfinished work is kept at `partial`."""
    settings.check()
    if partial is not None and partial.exists() and not run.resume:
        raise OutputExistsError(
            "holds a refinement that was broken off", fix="pass --resume to go on with it, or remove it", path=partial
        )
    layerwise.aligned(teacher, compact)
    if run.load_in_4bit and not isinstance(base, Path):
        raise OptionError("a live model cannot be loaded in 4 bit", fix="load it so, or give its folder")
    if isinstance(base, Path):
        _check_base(compact, base)
    started = time.monotonic()
    with distributed.joined(run.device) as here:
        quiet = progress if here.leads else lambda share, text: None
        with session.opened(
            base,
            teacher,
            data,
            settings,
            device=distributed.own_device(run.device),
            here=here,
            load_in_4bit=run.load_in_4bit,
            progress=lambda share, text: quiet(_OPENING * share, text),
        ) as opened:
            study = RefineRun(
                opened, compact, settings, partial, run.resume, None if run.log is None else Path(run.log)
            )
            found = study.run(lambda share, text: quiet(_OPENING + (1 - _OPENING) * share, text))
            warnings = (*teacher.warnings, *_other(compact, teacher))
            return refinement(opened, found, settings.seed, time.monotonic() - started, warnings)


def refinement(
    there: RefineSession, found: RefineResult, seed: int, seconds: float, warnings: tuple[str, ...] = ()
) -> Refinement:
    """What came of a student, signed."""
    done = replace(found, compact=signed(there, found, seed), warnings=(*warnings, *found.warnings))
    return Refinement(**vars(done), data=there.split.digest, seconds=seconds, leads=there.room.world.leads)


def with_room(lora: LoraAdapter) -> LoraAdapter:
    """The LoRA with a text as long as can be for each thing that `signed` says: what is converted from it under a
    budget is within that budget when it is refined, too."""
    came = lora.provenance
    fields = {"refined_layerwise": "yes", **dict.fromkeys(("refined_steps", "refined_seed"), "0" * 20)}
    fields |= dict.fromkeys(("refined_data", *(("refined_teacher",) if came.source else ())), "0" * 64)
    fields |= dict.fromkeys(("refined_before", "refined_after"), _UNKNOWN)
    return replace(lora, provenance=replace(came, fields={**came.fields, **fields}))


def _other(compact: CompactAdapter, teacher: LoraAdapter) -> tuple[str, ...]:
    """A warning if the teacher is not the LoRA that the file was made from, as far as both say."""
    made_from, given = compact.provenance.source, teacher.provenance.source
    if not made_from or not given or made_from == given:
        return ()
    return ("the teacher is not the LoRA that the file was made from: what is measured is against the teacher",)


def _check_base(compact: CompactAdapter, base: Path) -> None:
    if compact.base.content:
        with open_checkpoint(base) as opened:
            if opened.content_digest() != compact.base.content:
                raise FingerprintError("the base has other contents than the file's own", path=base)


def signed(there: RefineSession, found: RefineResult, seed: int) -> CompactAdapter:
    """What came of a student with what was done in its provenance, also where it came to nothing."""
    compact, teacher = found.compact, there.teacher
    fields = {
        **compact.provenance.fields,
        "refined_steps": str(found.best_step),
        "refined_layerwise": "yes" if found.layerwise else "no",
        "refined_seed": str(seed),
        "refined_data": there.split.digest,
        "refined_before": _metrics(found.before),
        "refined_after": _metrics(found.after),
    }
    if teacher.provenance.source:
        fields["refined_teacher"] = teacher.provenance.source
    if found.improved and methods.needs_base(compact) and there.base is None:
        fields.pop("captured", None)  # nobody knows without the base's weights
    elif found.improved and "captured" in fields:
        captured = fidelity.fidelity_on(layerwise.aligned(teacher, compact), compact, None, there.base).captured
        fields["captured"] = f"{min(max(captured, 0.0), 1.0):.4f}"
    return replace(compact, provenance=replace(compact.provenance, fields=fields))


def _metrics(found: Answers) -> str:
    agreement = "" if found.agreement is None else f", agreement {found.agreement:.4f}"
    return f"{found.kind} {found.distance:.6g} of {found.base_distance:.6g}{agreement}, {found.items} items"
