"""ALoRA with training (arXiv 2403.16187): components move between modules while an adapter learns from its LoRA.

The first allocation is that of `lrconvert.convert.rank_allocation`, on data that is trained on. Then one refinement
runs with the rate in its loss (`lrconvert.methods.lowrank.student`): components shrink until nothing of them is coded,
others grow, and the coded bytes stay what they were. What is noted of it after every measurement is a round. The result
is what is best on held-out data, be it the first allocation.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from torch import nn

from lrconvert.convert import ablation, rank_allocation
from lrconvert.convert.ablation import Trial
from lrconvert.convert.options import AllocateOptions, ConvertOptions
from lrconvert.convert.rank_allocation import Allocation, Chooser
from lrconvert.core.errors import OptionError
from lrconvert.core.wording import spelled
from lrconvert.formats import fidelity
from lrconvert.formats.lrc import file
from lrconvert.io.checkpoint import KnownContent
from lrconvert.lora.adapter import LoraAdapter
from lrconvert.refine import refine
from lrconvert.refine.refine import Refinement
from lrconvert.refine.run import RefineRun, WriteState
from lrconvert.refine.session import Progress, open_session, part
from lrconvert.refine.settings import RunOptions, Settings
from lrconvert.refine.trainer import Trainer

_CHOOSING = 0.2  # of the progress: the first allocation


@dataclass(frozen=True)
class Round:
    """An adapter in training after a `step`: the bytes of its file without extra tensors, and how many `components` the
    modules of each kind have together."""

    step: int
    nbytes: int
    components: Mapping[str, int]


@dataclass(frozen=True)
class TrainedAllocation(Allocation):
    """A first allocation that was trained: the `training`, and how its components lay at every measurement."""

    training: Refinement
    rounds: tuple[Round, ...]


@dataclass(eq=False)
class Rounds:
    """The second stage of a refinement (`RefineRun.train`), with notes of where components are; `teacher` has the
    targets of what is trained."""

    teacher: LoraAdapter
    notes: list[Round] = field(default_factory=list)

    def __call__(self, trainer: Trainer, write: WriteState, progress: Progress) -> Trainer:
        steps, every = trainer.settings.steps, trainer.settings.eval_every
        self._note(trainer)
        for step in sorted({*range(every, steps, every), steps}):
            trainer.train(write, progress, until=step)
            if trainer.state.step > self.notes[-1].step:
                self._note(trainer)
            if trainer.state.step < step:
                break  # out of time or patience
        return trainer

    def _note(self, trainer: Trainer) -> None:
        compact = trainer.student.compact()
        kinds: Counter[str] = Counter()
        for module in rank_allocation.modules(self.teacher, compact):
            kinds[module.kind] += module.after
        self.notes.append(Round(trainer.state.step, file.sizes(compact).adapter, dict(kinds)))


def allocate(
    lora: LoraAdapter,
    options: ConvertOptions,
    allocate_options: AllocateOptions,
    settings: Settings,
    *,
    model: nn.Module | None = None,
    dry_run: bool = False,
    base_content: KnownContent | None = None,
    progress: Progress,
) -> Allocation:
    """Allocate ranks, convert and train; see `lrconvert.api.allocate`. `settings` are those of the refinement, whose
    texts are all that is read; on about `max_tokens` of those that are trained on components are scored."""
    rank_allocation.check(options, allocate_options)
    settings.check()
    base = options.base if model is None else model
    if base is None:
        raise OptionError("training needs the base", fix=f"give it with {spelled('base', ...)}")
    if dry_run:
        raise OptionError(
            "which ranks there are is known only after training",
            fix=f"plan the first allocation, without {spelled('retrain', None, '--train-steps')}",
        )
    started, data = time.monotonic(), allocate_options.data
    run_options, opening = RunOptions(device=options.device), part(progress, 0.0, 0.0)
    with open_session(base, lora, data, settings, run_options, progress=opening) as session:
        pool, most = session.split.train, allocate_options.max_tokens
        batches = [pool.inputs(numbers) for numbers in pool.first_batches(settings.seed, settings.batch_tokens, most)]

        def trial(whole: LoraAdapter) -> AbstractContextManager[Trial]:
            session.teacher_model.activate()
            seconds = rank_allocation.Time.of(allocate_options).of_a_pass
            return ablation.on_trial(session.teacher_model.model, whole, batches, seconds)

        chooser = Chooser(allocate_options, trial, part(progress, 0.0, _CHOOSING))
        conversion = rank_allocation.converted(
            lora, options, chooser, base_content=base_content, progress=lambda share, text: None
        )
        first = chooser.allocation(conversion, "ablation")
        source = chooser.source
        assert source is not None
        rounds = Rounds(source)
        run = RefineRun(session, first.compact, settings, train=rounds)
        result = run.run(part(progress, _CHOOSING, 1.0))
        training = refine.refinement(session, result, settings.seed, time.monotonic() - started)
    trained = {
        "compact": training.compact,
        "sizes": file.sizes(training.compact),
        "fidelity": fidelity.fidelity(source, training.compact, options.input_statistics),
        "modules": rank_allocation.modules(source, training.compact),
        "training": training,
        "rounds": tuple(rounds.notes),
    }
    return TrainedAllocation(**{**vars(first), **trained})
