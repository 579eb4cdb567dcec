"""One student's way through a session: layer by layer, then end to end; or it comes back as it was."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lrconvert.core.wording import spelled
from lrconvert.formats.fidelity import Answers
from lrconvert.formats.lrc import file
from lrconvert.live import attach
from lrconvert.live.answers import AnswerSums
from lrconvert.lora.adapter import CompactAdapter
from lrconvert.refine import checkpoint, layerwise, training_log
from lrconvert.refine.attached_student import NAME, AttachedStudent
from lrconvert.refine.session import Progress, RefineSession, part
from lrconvert.refine.settings import Settings
from lrconvert.refine.trainer import Trainer

WriteState = Callable[[checkpoint.State], None]
_FIRST_STAGE = 0.1  # of the progress
_NO_MATTER = ("checkpoint_every", "answers_gb")  # settings that change no result


@dataclass(frozen=True, eq=False)
class RefineResult:
    """The outcome of a student: the best of it, which is the input itself unless `improved`, and how far the input
    (`before`) and the best (`after`) are from the teacher's answers on held-out data. `best_step` of `steps` was taken
    (0: before the first); `layerwise`: whether stage one helped. `warnings`: what went wrong on the way."""

    compact: CompactAdapter
    before: Answers
    after: Answers
    improved: bool
    steps: int
    best_step: int
    layerwise: bool
    warnings: tuple[str, ...]


def _to_the_end(trainer: Trainer, write: WriteState, progress: Progress) -> Trainer:
    trainer.train(write, progress)
    return trainer


@dataclass(eq=False)
class RefineRun:
    """One refinement of `compact`; `run` it once. Checkpoints are put into `store`, if that is given, and it goes on
    from the one that is there. `train` is the second stage: it takes the trainer, a writer of checkpoints, and
    progress, and returns the trainer whose best and state are the outcome."""

    session: RefineSession
    compact: CompactAdapter
    settings: Settings
    store: checkpoint.Store | None = None
    log_to: Path | None = None
    train: Callable[[Trainer, WriteState, Progress], Trainer] = _to_the_end

    def run(self, progress: Progress) -> RefineResult:
        """Return the outcome; the student is taken off the model again."""
        model, teacher = self.session.teacher_model.model, layerwise.aligned(self.session.teacher, self.compact)
        student = AttachedStudent(model, self.compact, teacher, self.settings.train_heads)
        try:
            return self._run(student, progress)
        finally:
            attach.detach(model, NAME)

    def _run(self, student: AttachedStudent, progress: Progress) -> RefineResult:
        settings, session, base = self.settings, self.session, self.session.base_distance
        log = training_log.to_file(self.log_to if session.teacher_model.processes.is_first else None)
        trainer = Trainer(session.teacher_model, student, session.split.train, session.evaluator, base, settings, log)
        before = self._measured(trainer, self.compact)
        log("start", {"base": base.mean, "before": before.mean, "items": base.items, "settings": asdict(settings)})
        state = None if self.store is None else self.store.read(self._about())
        if state is None:
            self._first_stage(trainer, before, part(progress, 0.0, _FIRST_STAGE))
        else:
            trainer.start(self.compact, before)
            trainer.resume(state)
        if settings.end_to_end:
            trainer = self.train(trainer, self._write_checkpoint, part(progress, _FIRST_STAGE, 1.0))
        assert trainer.best is not None
        state = trainer.state
        improved = trainer.best is not self.compact and state.best_distance < before.mean
        after = replace(before, distance=state.best_distance * before.items, agreed=state.best_agreed)
        result = RefineResult(
            trainer.best if improved else self.compact,
            before.answers(base),
            (after if improved else before).answers(base),
            improved,
            state.step,
            state.best_step,
            bool(state.layerwise),
            tuple(_warnings(state)),
        )
        log("end", {"distance": result.after.distance, "closed": result.after.closed, "best_step": state.best_step})
        return result

    def _measured(self, trainer: Trainer, compact: CompactAdapter) -> AnswerSums:
        trainer.student.restart_from(compact)
        return trainer.measured()

    def _first_stage(self, trainer: Trainer, before: AnswerSums, progress: Progress) -> None:
        trainer.start(self.compact, before)
        if self.settings.layerwise:
            progress(0.0, "layer by layer")
            refitted = layerwise.refitted(self.session, self.compact, self.settings, progress)
            if refitted is not None:
                after = self._measured(trainer, refitted)
                trainer.log("layers", {"distance": after.mean, "before": before.mean})
                if after.mean < before.mean:
                    trainer.start(refitted, after)
                    trainer.state.layerwise = 1
        assert trainer.best is not None
        trainer.restart_from(trainer.best)

    # --- checkpoints ---

    def _about(self) -> dict[str, Any]:
        """Return the identity of this run: a checkpoint of another is of no use."""
        options = {k: repr(v) for k, v in sorted(asdict(self.settings).items()) if k not in _NO_MATTER}
        payload = hashlib.sha256()
        for piece in file.encode(self.compact):
            payload.update(piece)
        return {
            "file": payload.hexdigest(),
            "teacher": self.session.teacher.provenance.source,
            "data": self.session.split.digest,
            "settings": options,
            "processes": self.session.teacher_model.processes.size,
        }

    def _write_checkpoint(self, state: checkpoint.State) -> None:
        if self.store is not None and self.session.teacher_model.processes.is_first:
            self.store.write(self._about(), state)


def _warnings(state: checkpoint.State) -> Iterator[str]:
    if state.parts > 1:
        yield f"batches did not fit into memory: they were computed in up to {state.parts} parts"
    if state.restarts:
        times = {1: "once", 2: "twice"}.get(state.restarts, f"{state.restarts} times")
        smaller = f"try a smaller {spelled('lr', ...)}"
        yield f"refinement diverged {times} and was restarted from the best, with smaller rates: {smaller}"
