"""One student's way through a lesson: layer by layer, then end to end; or it comes back as it was."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lrconvert.formats.fidelity import Answers
from lrconvert.formats.lrc import file
from lrconvert.live import attach
from lrconvert.lora.adapter import CompactAdapter
from lrconvert.refine import checkpoint, training_log
from lrconvert.refine import layerwise as layers
from lrconvert.refine.attached_student import NAME, AttachedStudent
from lrconvert.refine.evaluation import answers
from lrconvert.refine.losses import Sums
from lrconvert.refine.session import Progress, RefineSession
from lrconvert.refine.settings import Settings
from lrconvert.refine.trainer import Scale, Trainer

Keep = Callable[[checkpoint.State], None]
_FIRST_STAGE = 0.1  # of the progress


@dataclass(frozen=True, eq=False)
class RefineResult:
    """What came of a student: the best of it, which is the input itself unless `improved`, and how far the input
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


def _to_the_end(trainer: Trainer, keep: Keep, progress: Progress) -> Trainer:
    trainer.train(keep, progress)
    return trainer


@dataclass(eq=False)
class RefineRun:
    """`run` it once. Unfinished work is kept at `partial`, if that is given, and gone on with if `resume`. `train` is
    the second stage: it takes the trainer, where to keep a state, and progress, and gives the trainer whose best and
    state are the outcome."""

    lesson: RefineSession
    compact: CompactAdapter
    settings: Settings
    partial: Path | None = None
    resume: bool = False
    log_to: Path | None = None
    train: Callable[[Trainer, Keep, Progress], Trainer] = _to_the_end

    def run(self, progress: Progress) -> RefineResult:
        room, teacher = self.lesson.room, layers.aligned(self.lesson.teacher, self.compact)
        pupil = AttachedStudent(room.model, self.compact, teacher, self.settings.train_heads)
        try:
            return self._run(pupil, progress)
        finally:
            attach.detach(room.model, NAME)

    def _run(self, pupil: AttachedStudent, progress: Progress) -> RefineResult:
        settings, lesson, base = self.settings, self.lesson, self.lesson.far
        told = training_log.to_file(self.log_to if lesson.room.world.leads else None)
        scale = Scale(base.mean, base.sizes)
        trainer = Trainer(lesson.room, pupil, lesson.split.train, lesson.held, scale, settings, told)
        before = self._measured(trainer, self.compact)
        told("start", {"base": base.mean, "before": before.mean, "items": base.items, "settings": asdict(settings)})
        kept = self._kept()
        if kept is None:
            self._first_stage(trainer, before, told, lambda s, t: progress(_FIRST_STAGE * s, t))
        else:
            trainer.start(self.compact, before)
            trainer.begin(self.compact)
            trainer.resume(kept, self.compact)
        if settings.end_to_end:
            trainer = self.train(trainer, self._keep, lambda s, t: progress(_FIRST_STAGE + (1 - _FIRST_STAGE) * s, t))
        assert trainer.best is not None
        state = trainer.state
        improved = trainer.best is not self.compact and state.best_distance < before.mean
        after = replace(before, distance=state.best_distance * before.items, agreed=state.best_agreed)
        found = RefineResult(
            trainer.best if improved else self.compact,
            answers(before, base),
            answers(after if improved else before, base),
            improved,
            state.step,
            state.best_step,
            bool(state.layerwise),
            tuple(_trouble(state)),
        )
        told("end", {"distance": found.after.distance, "closed": found.after.closed, "best_step": state.best_step})
        return found

    def _measured(self, trainer: Trainer, compact: CompactAdapter) -> Sums:
        trainer.pupil.take(compact)
        return trainer.measured()

    def _first_stage(self, trainer: Trainer, before: Sums, told: training_log.Log, progress: Progress) -> None:
        trainer.start(self.compact, before)
        if self.settings.layerwise:
            progress(0.0, "layer by layer")
            found = layers.refitted(self.lesson, self.compact, self.settings, progress)
            if found is not None:
                after = self._measured(trainer, found)
                told("layers", {"distance": after.mean, "before": before.mean})
                if after.mean < before.mean:
                    trainer.start(found, after)
                    trainer.state.layerwise = 1
        assert trainer.best is not None
        trainer.begin(trainer.best)

    def _about(self) -> dict[str, Any]:
        """What a checkpoint is of: it is of no use to other work."""
        options = {k: repr(v) for k, v in sorted(asdict(self.settings).items()) if k not in ("checkpoint_every",)}
        payload = hashlib.sha256()
        for piece in file.encode(self.compact):
            payload.update(piece)
        return {
            "file": payload.hexdigest(),
            "teacher": self.lesson.teacher.provenance.source,
            "data": self.lesson.split.digest,
            "settings": options,
            "processes": self.lesson.room.world.size,
        }

    def _kept(self) -> checkpoint.State | None:
        if self.partial is None or not self.partial.exists() or not self.resume:
            return None
        return checkpoint.read(self.partial, self._about())

    def _keep(self, state: checkpoint.State) -> None:
        if self.partial is not None and self.lesson.room.world.leads:
            checkpoint.write(self.partial, self._about(), state)


def _trouble(state: checkpoint.State) -> Iterator[str]:
    if state.parts > 1:
        yield f"batches did not fit into memory: they were computed in up to {state.parts} parts"
    if state.restarts:
        times = "once" if state.restarts == 1 else f"{state.restarts} times"
        yield f"training lost its way and went back to the best {times}, with smaller rates: try a smaller --lr"
