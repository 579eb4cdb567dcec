"""`refine`: train a compact adapter to answer more as its teacher does, or return it as it was."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from lrconvert.core.devices import resolved
from lrconvert.core.errors import FingerprintError, OptionError, OutputExistsError
from lrconvert.core.notebook import html_table
from lrconvert.core.wording import spelled
from lrconvert.formats import fidelity
from lrconvert.formats.fidelity import Answers
from lrconvert.formats.lrc import budgets, file
from lrconvert.io.checkpoint import open_checkpoint
from lrconvert.live.zero_point import differences
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter
from lrconvert.methods import base as methods
from lrconvert.refine import distributed, layerwise
from lrconvert.refine.checkpoint import FileStore
from lrconvert.refine.run import RefineResult, RefineRun
from lrconvert.refine.session import Progress, RefineSession, open_session, part
from lrconvert.refine.settings import RunOptions, Settings

_PREFIX = "refined_"  # of the provenance's fields
_OPENING = 0.05  # of the progress: what comes before the student


@dataclass(frozen=True, eq=False)
class Refinement(RefineResult):
    """A `RefineResult` to be written. `data`: digest of all data. `leads`: whether this is the first of several
    processes, the one that writes. `sizes` are exact; `source_bytes`: the teacher's factors at 16 bit. `warnings` are
    one-line texts."""

    data: str
    seconds: float
    leads: bool
    sizes: file.Sizes
    source_bytes: int

    def __repr__(self) -> str:
        size = f"{self.sizes.adapter:,} bytes, {self.ratio:.1f} times smaller"
        closed = f"{self.before.closed:.1%} to {self.after.closed:.1%} of the distance closed"
        return f"<Refinement: {self.compact.method}, {size}, {closed}>"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the answers before and after."""
        rows = []
        for name, answers in (("before", self.before), ("after", self.after)):
            agreement = "" if answers.agreement is None else f"{answers.agreement:.1%}"
            rows.append((name, f"{answers.distance:.4g}", f"{answers.closed:.1%}", agreement))
        caption = f"Refinement: {self.compact.method}, {self.sizes.adapter:,} bytes, {self.steps} steps"
        head = ("", f"{self.before.kind} from the LoRA", "closed", "agreement")
        return html_table(caption, head, rows, self.warnings)

    @property
    def ratio(self) -> float:
        """Source factors at 16 bit over the file's bytes, extras counted on neither side."""
        return self.source_bytes / self.sizes.adapter


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
    run = replace(run, device=resolved(run.device))
    if partial is not None and partial.exists() and not run.resume:
        raise OutputExistsError(
            "is the checkpoint of an unfinished refinement",
            fix=f"pass {spelled('resume', True)} to go on with it, or remove it",
            path=partial,
        )
    layerwise.aligned(teacher, compact)
    if run.load_in_4bit and not isinstance(base, Path):
        raise OptionError("a live model cannot be loaded in 4 bit", fix="load it so, or give its folder")
    if isinstance(base, Path) and compact.base.content:
        with open_checkpoint(base, quantized=True) as checkpoint:
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
            store = None if partial is None else FileStore(partial, run.resume)
            student = RefineRun(session, compact, settings, store, log)
            result = student.run(part(quiet, _OPENING, 1.0))
            warnings = (*teacher.warnings, *_source_warnings(compact, teacher), *differences(teacher, compact))
            return refinement(session, result, settings.seed, time.monotonic() - started, warnings)


def refinement(
    session: RefineSession, result: RefineResult, seed: int, seconds: float, warnings: tuple[str, ...] = ()
) -> Refinement:
    """Return the outcome of a student with its provenance."""
    compact = with_provenance(session, result, seed)
    done = replace(
        result,
        compact=compact,
        warnings=(*warnings, *result.warnings, *note_warnings(compact)),
    )
    return Refinement(
        **vars(done),
        data=session.split.digest,
        seconds=seconds,
        leads=session.teacher_model.processes.is_first,
        sizes=file.sizes(compact),
        source_bytes=layerwise.aligned(session.teacher, compact).half_bytes,
    )


def _source_warnings(compact: CompactAdapter, teacher: LoraAdapter) -> tuple[str, ...]:
    """A warning if the teacher is not the LoRA that the file was made from, as far as both say."""
    file_source, teacher_source = compact.provenance.source, teacher.provenance.source
    if not file_source or not teacher_source or file_source == teacher_source:
        return ()
    return ("the teacher is not the LoRA that the file was made from: what is measured is against the teacher",)


# --- provenance -----------------------------------------------------------------------------------------------------


_NOTE = ("steps", "after", "before", "layerwise", "seed", "data", "teacher")  # the most telling first


def with_provenance(session: RefineSession, result: RefineResult, seed: int) -> CompactAdapter:
    """Return the outcome of a student with what was done in its provenance, also where nothing was gained: as much of
    it as a budget that the file was made under has room for, in the order of `_NOTE`."""
    compact, source = result.compact, session.teacher.provenance.source
    note = {
        "steps": str(result.best_step),
        "layerwise": "yes" if result.layerwise else "no",
        "seed": str(seed),
        "data": session.split.digest,
        "before": _metrics(result.before),
        "after": _metrics(result.after),
        "teacher": source if source != compact.provenance.source else "",
    }
    fields = {key: text for key, text in compact.provenance.fields.items() if not key.startswith(_PREFIX)}
    if result.improved and methods.needs_base(compact) and session.base is None:
        fields.pop("captured", None)  # unknown without the base's weights
    elif result.improved and "captured" in fields:
        teacher = layerwise.aligned(session.teacher, compact)
        captured = fidelity.fidelity_on(teacher, compact, None, session.base).captured
        fields["captured"] = f"{min(max(captured, 0.0), 1.0):.4f}"
    noted = _with_fields(compact, fields)
    for name in _NOTE:
        longer = _with_fields(compact, {**noted.provenance.fields, f"{_PREFIX}{name}": note[name]})
        if note[name] and budgets.is_kept(longer):
            noted = longer
    return noted


def note_warnings(compact: CompactAdapter) -> tuple[str, ...]:
    """Return a warning if the note of a refinement had to be shortened."""
    missing = [name for name in _NOTE if name != "teacher" and f"{_PREFIX}{name}" not in compact.provenance.fields]
    if not missing:
        return ()
    limit = f"{budgets.stated(compact):,} bytes asked for"
    return (f"the file does not record {', '.join(missing)} of its refinement: no room in the {limit}",)


def _with_fields(compact: CompactAdapter, fields: dict[str, str]) -> CompactAdapter:
    return replace(compact, provenance=replace(compact.provenance, fields=fields))


def _metrics(answers: Answers) -> str:
    agreement = "" if answers.agreement is None else f", agreement {answers.agreement:.4f}"
    return f"{answers.kind} {answers.distance:.6g} of {answers.base_distance:.6g}{agreement}, {answers.items} items"
