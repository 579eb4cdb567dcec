"""ALoRA with training between the rounds (arXiv 2403.16187): ranks move while the adapter learns from its LoRA.

The first allocation is that of `lrconvert.convert.rank_allocation`, from data that is trained on. Then one refinement
runs, of the steps that are asked for and with rates that fall once over all of them; in its first half it pauses a few
times. In a pause the components of the adapter as it is then, and those that may come (`rank_exchange`), are scored by
ablation on the live model, and some change places. So the budget is met at every step, and what is best on held-out
data is the result, be it the first allocation.

What to expect: hardly more than of an allocation and then a refinement of as many steps; what was gained on the bundled
pair was within what chance does. Once an adapter is trained, what the LoRA's update has and it has not is seldom better
than its weakest components, so that few move.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import nn

from lrconvert.convert import ablation, rank_allocation
from lrconvert.convert.ablation import Trial
from lrconvert.convert.options import AllocateOptions, ConvertOptions
from lrconvert.convert.rank_allocation import Allocation, Chooser, Cut
from lrconvert.core.dtypes import F64, Array
from lrconvert.core.errors import OptionError
from lrconvert.formats import fidelity
from lrconvert.formats.lrc import file
from lrconvert.io.checkpoint import KnownContent
from lrconvert.live import attach
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter
from lrconvert.methods.base import FitContext
from lrconvert.refine import rank_exchange, refine
from lrconvert.refine.attached_student import NAME, AttachedStudent
from lrconvert.refine.rank_exchange import Offer
from lrconvert.refine.refine import Refinement
from lrconvert.refine.run import RefineRun, WriteState
from lrconvert.refine.session import Progress, open_session, part
from lrconvert.refine.settings import RunOptions, Settings
from lrconvert.refine.trainer import Trainer

_HALF = 0.5  # of the steps: when ranks no longer move
_SHARE = 0.05  # of the budget that moves at once, at most
_DAMPING = 0.3  # what a new component begins with, of the best one
_CHOOSING = 0.2  # of the progress: the first allocation


@dataclass(frozen=True)
class Move:
    """The components that changed places before the step after `step` of a training: how many `came` and `went`, and
    the held-out distance right before and after."""

    step: int
    came: int
    went: int
    before: float
    after: float


@dataclass(frozen=True)
class TrainedAllocation(Allocation):
    """A first allocation that was trained: the `training`, and the `moves` of components between its steps."""

    training: Refinement
    moves: tuple[Move, ...]


@dataclass(eq=False)
class Rounds:
    """The second stage of a refinement (`RefineRun.train`) with `count` pauses, in which ranks move under `cut`."""

    teacher: LoraAdapter  # with the targets of what is trained
    cut: Cut
    context: FitContext
    batches: Sequence[Mapping[str, Any]]
    count: int
    exact: int
    damping: float = _DAMPING
    share: float = _SHARE
    moves: list[Move] = field(default_factory=list)

    def __call__(self, trainer: Trainer, write: WriteState, progress: Progress) -> Trainer:
        steps, reached = trainer.settings.steps, [(trainer.best, replace(trainer.state))]
        for step in sorted({round(_HALF * steps * n / self.count) for n in range(1, self.count + 1)} - {0, steps}):
            trainer.train(write, progress, until=step)
            if trainer.state.step < step:
                break  # out of time or patience
            reached.append((trainer.best, replace(trainer.state)))
            progress(step / steps, "which ranks move")
            trainer = self._moved(trainer)
        else:
            trainer.train(write, progress)
        trainer.best, best = min([*reached, (trainer.best, trainer.state)], key=lambda pair: pair[1].best_distance)
        for name in ("best_step", "best_distance", "best_agreed"):
            setattr(trainer.state, name, getattr(best, name))
        return trainer

    def _moved(self, trainer: Trainer) -> Trainer:
        """The trainer that goes on after an exchange; the same if there is none."""
        teacher_model, compact = trainer.teacher_model, trainer.student.compact()
        offer = rank_exchange.offer(compact, self.teacher, self.context)
        cut = replace(self.cut, parts=offer.parts)
        teacher_model.activate()
        with ablation.on_trial(teacher_model.model, offer.lora, self.batches) as trial:
            scores, known = scored(trial, offer, self.exact)
        kept = rank_exchange.exchanged(cut, offer.present, known, scores, self.share)
        came, went = int((kept & ~offer.present).sum()), int((offer.present & ~kept).sum())
        if not came:
            return trainer
        changed = rank_exchange.applied(compact, offer, kept, self.damping, self.context)
        before = trainer.measured().mean
        onward = self._onward(trainer, compact, changed, offer, kept)
        move = Move(trainer.state.step, came, went, before, onward.state.best_distance)
        onward.log("moved", {**vars(move)})
        self.moves.append(move)
        return onward

    def _onward(
        self, trainer: Trainer, compact: CompactAdapter, changed: CompactAdapter, offer: Offer, kept: Array
    ) -> Trainer:
        """The trainer that goes on with `changed` from where `trainer` is with `compact`: numbers that stay keep their
        latents and what the optimizer knows of them."""
        model, before = trainer.teacher_model.model, trainer.snapshot()
        attach.detach(model, NAME)
        student = AttachedStudent(model, changed, self.teacher, trainer.settings.train_heads)
        state = replace(trainer.state, bad=0, waited=0, best_step=trainer.state.step)
        onward = replace(trainer, student=student, state=state, best=None)
        onward.start(changed, onward.measured())
        now = onward.snapshot()
        arrays = {**before.arrays, **{n: a for n, a in now.arrays.items() if n[:5] in ("best.", "extra")}}
        names = list(student.student.specs)  # in the order of its parameters

        def of(arrays: Mapping[str, Array], kind: str) -> dict[str, Array]:
            return {name: arrays[_of_student(kind, name)] for name in names}

        def carry(kind: str, old: Mapping[str, Array], new: Mapping[str, Array]) -> None:
            for name, array in rank_exchange.carried(old, new, compact, changed, offer, kept).items():
                place = _of_student(kind, name) if kind in ("moving", "unit") else f"{kind}.{names.index(name)}"
                if kind != "unit" or units[name].ndim:
                    arrays[place] = array

        # Old units, so that rates and moments mean what they did; each scale has its own.
        units, old = of(before.arrays, "unit"), of(before.arrays, "moving")
        fresh, new = of(now.arrays, "unit"), of(now.arrays, "moving")
        carry("moving", old, {n: a if units[n].ndim else a * (fresh[n] / units[n]) for n, a in new.items()})
        carry("unit", _as_wide(units, old), _as_wide(fresh, new))
        if before.adam_steps:
            for kind in ("mean", "square"):
                moments = {name: before.arrays[f"{kind}.{n}"] for n, name in enumerate(names)}
                carry(kind, moments, {name: np.zeros_like(a) for name, a in new.items()})
        onward.resume(replace(onward.state, arrays=arrays), changed)
        return onward


def _as_wide(arrays: Mapping[str, Array], like: Mapping[str, Array]) -> dict[str, Array]:
    return {name: np.broadcast_to(value, like[name].shape) for name, value in arrays.items()}


def _of_student(kind: str, name: str) -> str:
    """Return the name of a tensor's latents (``moving``) or units in a snapshot of a trainer."""
    return f"now.student.{kind}_{name.replace('.', '__')}"


def scored(trial: Trial, offer: Offer, exact: int) -> tuple[F64, Array]:
    """Return what S, the score of the model's answers, owes to components (n,) beside the others that are there, and of
    which components (n,) that was measured: of the `exact` with least energy per cost that are there, and of the
    `exact` that may come with the best slopes.

    These are the first two terms of the ablation score. What a component does alone says who deserves a place in an
    adapter that is still to be made; in one that is trained, others have learned to rely on each, and what may come
    does much alone that is done already: with all terms an exchange was measured to set training back.
    """
    present, parts = offer.present, offer.parts
    slopes, weak = parts.order(trial.slopes(present)), parts.order(parts.energy)[::-1]
    chosen = [*weak[present[weak]][:exact], *slopes[~present[slopes]][:exact]]
    scores, known = np.zeros(len(present)), np.zeros(len(present), bool)
    for c in chosen:
        one = np.arange(len(present)) == c
        scores[c], known[c] = trial.score(present | one) - trial.score(present & ~one), True
    return scores, known


# --- the conversion -------------------------------------------------------------------------------------------------


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
        raise OptionError("training needs the base", fix="give it with --base")
    if dry_run:
        raise OptionError(
            "which ranks there are is known only after training", fix="plan the first allocation, without --train-steps"
        )
    started, data = time.monotonic(), allocate_options.data
    run_options, opening = RunOptions(device=options.device), part(progress, 0.0, 0.0)
    with open_session(base, lora, data, settings, run_options, progress=opening) as session:
        pool, most = session.split.train, allocate_options.max_tokens
        batches = [pool.inputs(numbers) for numbers in pool.first_batches(settings.seed, settings.batch_tokens, most)]

        def trial(whole: LoraAdapter) -> AbstractContextManager[Trial]:
            session.teacher_model.activate()
            return ablation.on_trial(session.teacher_model.model, whole, batches)

        chooser = Chooser(allocate_options, trial, part(progress, 0.0, _CHOOSING))
        conversion = rank_allocation.converted(
            lora, options, chooser, base_content=base_content, progress=lambda share, text: None
        )
        first = chooser.allocation(conversion, "ablation")
        source = chooser.source
        assert source is not None and chooser.cut is not None and chooser.context is not None
        context = replace(chooser.context, base=None, progress=lambda share, text: None)
        train = Rounds(source, chooser.cut, context, batches, allocate_options.moves, allocate_options.exact)
        run = RefineRun(session, first.compact, settings, train=train)
        result = run.run(part(progress, _CHOOSING, 1.0))
        training = refine.refinement(session, result, settings.seed, time.monotonic() - started)
    trained = {
        "compact": training.compact,
        "sizes": file.sizes(training.compact),
        "fidelity": fidelity.fidelity(source, training.compact, options.input_statistics),
        "modules": rank_allocation.modules(source, training.compact),
        "training": training,
        "moves": tuple(train.moves),
    }
    return TrainedAllocation(**{**vars(first), **trained})
