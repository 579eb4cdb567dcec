"""Stage two, end to end: the student's answers and hidden states follow the teacher's.

It begins with a probe, unless `--lr` says what the rates are: a few short branches from one state, on the same batches,
with different multiples of the default rates (`learning_rate`). The training goes on from the best of them. Where
answers to held-out data are no better than the last time, it returns to its best point, with smaller rates.

Determinism: a step depends on the state and the settings alone. Batches are a pure function of seed and epoch; nothing
is drawn; so a resumed run is, on one device, the run that was never interrupted, to the last bit.

A form whose training needs more than its answers (a size that must stay what it was, say) adds to the loss itself: see
`TrainableAdapter.own_loss`, `stepped` and `settle`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from lrconvert.core.errors import OptionError
from lrconvert.core.wording import spelled
from lrconvert.live.answers import AnswerSums
from lrconvert.lora.adapter import CompactAdapter
from lrconvert.refine import kept_adapter, learning_rate, losses
from lrconvert.refine.attached_student import NAME, AttachedStudent
from lrconvert.refine.checkpoint import State
from lrconvert.refine.data import Pool
from lrconvert.refine.evaluation import Evaluator, TeacherModel
from lrconvert.refine.learning_rate import Tried
from lrconvert.refine.losses import Batch, Goal
from lrconvert.refine.settings import Settings
from lrconvert.refine.teacher_answers import Key, TeacherAnswers
from lrconvert.refine.training_log import Log
from lrconvert.refine.training_point import Point

_BAD = 5  # steps in a row whose loss or gradient is NaN or infinite, before a restart from the best
_RESTARTS = 3
_DIVERGED = 2.0  # times as far as the base without an adapter
_SMALLER = 0.5  # the rates after a return, of those before
_ROUNDING = 1e-9  # of a share


@dataclass(eq=False)
class Trainer:
    """The training of one student; `train` runs it to its end. `base_distance`: how far the base without an adapter is
    from the teacher on held-out data, which all losses are shares of."""

    teacher_model: TeacherModel
    student: AttachedStudent
    pool: Pool
    evaluator: Evaluator
    base_distance: AnswerSums
    settings: Settings
    log: Log
    state: State = field(default_factory=State)
    best: CompactAdapter | None = None
    origin: CompactAdapter | None = None

    def __post_init__(self) -> None:
        self._plan: tuple[int, list[list[int]]] = (-2, [])
        self._answers = TeacherAnswers(1e9 * self.settings.answers_gb)
        self._clip = learning_rate.Clip()
        self._tried: list[Tried] = []
        self._start: Point | None = None
        self._new_optimizer()
        self._best_point = self._point()

    def _new_optimizer(self) -> None:
        self._optimizer = torch.optim.Adam(self.student.groups(), betas=(0.9, 0.99), eps=1e-12)
        self._highest_rates = [group["lr"] for group in self._optimizer.param_groups]
        self._clip = learning_rate.Clip()

    # --- the way through ---

    def train(
        self, write: Callable[[State], None], progress: Callable[[float, str], None], until: int | None = None
    ) -> None:
        """Run to the end, or to the step `until`, rates falling as on the way to the end; `best` is then the best on
        held-out data. `write` is given the state for a checkpoint now and then."""
        state, settings, processes = self.state, self.settings, self.teacher_model.processes
        end = settings.steps if until is None else min(until, settings.steps)
        started, before = time.monotonic(), state.seconds
        if not state.step:
            self._begin()
        is_measured = True
        while state.step < end and state.restarts <= _RESTARTS:
            state.seconds = processes.of_first(before + time.monotonic() - started, self.teacher_model.device)
            share = self._share()
            if share >= 1:
                break
            loss = self._step(share)
            progress(share, f"loss {loss:.3f}, agreement {state.best_agreed / max(1, self._items):.1%}")
            is_measured = self._after_step(is_last=state.step >= end)
            if settings.patience and state.waited >= settings.patience:
                break
            if state.step % settings.checkpoint_every == 0 and state.step < end:
                write(self.snapshot())
        if not is_measured and (state.step < end or not state.branch):
            self._evaluate()

    def _begin(self) -> None:
        """Set the rates, or begin the probe for them."""
        self.state.rate = self.settings.lr or 1.0
        if self.settings.lr is None and learning_rate.branch_steps(self.settings.steps):
            self._start = self._point()
            self.state.branch = 1

    def _after_step(self, is_last: bool) -> bool:
        """Measure the answers where it is time, and go on from where they are best; returns whether they were."""
        state, settings = self.state, self.settings
        is_end = state.step >= settings.steps
        if state.bad >= _BAD and not state.branch:
            self._restart("the loss or a gradient was NaN or infinite in steps in a row")
        elif state.branch:
            width = learning_rate.branch_steps(settings.steps) / settings.steps
            if is_end or state.bad >= _BAD or self._share() - state.begun >= width - _ROUNDING:
                self._end_branch()
                return True
        elif is_last or state.step % settings.eval_every == 0:
            self._evaluate()
            if state.waited and not is_end:
                self._return("the answers to held-out data are no better")
            return True
        return False

    def _end_branch(self) -> None:
        """Measure where a branch of the probe has led, and begin the next, or the training itself."""
        state = self.state
        self._tried.append(Tried(state.rate, math.inf if state.bad >= _BAD else self._evaluate()))
        multiple = learning_rate.next_multiple(self._tried)
        assert self._start is not None
        state.bad = state.waited = 0
        state.begun = self._share()
        if multiple is not None:
            self._go_to(self._start)
            state.epoch = state.place = 0
            state.rate, state.branch = multiple, state.branch + 1
            return
        state.rate, state.branch = learning_rate.chosen(self._tried), 0
        self.log("rate", {"step": state.step, "tried": [vars(branch) for branch in self._tried], "rate": state.rate})
        self._go_to(self._best_point)
        self._tried, self._start = [], None

    def start(self, compact: CompactAdapter, measured: AnswerSums) -> None:
        """Take `compact`, whose answers were `measured`, for the best so far."""
        self.best, self._items = compact, measured.items
        self.state.best_distance, self.state.best_agreed = measured.mean, measured.agreed

    def restart_from(self, compact: CompactAdapter) -> None:
        """Let the student be `compact`, with a new optimizer: a point to return to."""
        self.origin = compact
        self.student.restart_from(compact)
        self._new_optimizer()
        self.state.adam_steps = 0
        self._best_point = self._point()

    def _point(self) -> Point:
        return Point.of(self.student, self._optimizer, self.state.adam_steps)

    def _go_to(self, point: Point) -> None:
        self._new_optimizer()
        point.restore(self.student, self._optimizer)
        self.state.adam_steps = point.adam_steps

    def _share(self) -> float:
        """The share of the training that is done: by steps, or by time if that is shorter."""
        steps = self.state.step / self.settings.steps
        if self.settings.minutes is None:
            return steps
        return max(steps, self.state.seconds / (60 * self.settings.minutes))

    def _rate(self, share: float) -> float:
        """The rate as a share of the highest: in a branch, and in what is left after the probe, as in a training."""
        state, steps = self.state, self.settings.steps
        if state.branch:
            each = learning_rate.branch_steps(steps)
            return learning_rate.rate_at((share - state.begun) * steps / each, each)
        return learning_rate.rate_at((share - state.begun) / (1 - state.begun), steps)

    # --- a step ---

    def _step(self, share: float) -> float:
        """Make one step; returns its loss, a share of what the teacher's update does."""
        state = self.state
        batches = list(self._batches())
        counts = self.teacher_model.processes.totals([sum(b.weight for _, b in batches)], self.teacher_model.device)[0]
        while True:
            out_of_memory, loss = 0.0, 0.0
            try:
                loss = self._gradients(batches, counts)
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                out_of_memory = 1.0
            loss, out_of_memory = self.teacher_model.processes.totals([loss, out_of_memory], self.teacher_model.device)
            if not out_of_memory:
                break
            self._cut_batches(batches)
        state.step += 1
        parameters = self.student.parameters()
        gradients = [p.grad for p in parameters if p.grad is not None]
        self.teacher_model.processes.add(gradients)
        loss += self.student.own_gradients()
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        if not (math.isfinite(loss) and bool(norm.isfinite())):
            state.bad += 1
            self.log("skipped", {"step": state.step, "why": "the loss or a gradient is NaN or infinite"})
            return loss
        state.bad = 0
        rate = self._rate(share) * state.rate
        for group, highest in zip(self._optimizer.param_groups, self._highest_rates, strict=True):
            group["lr"] = highest * rate
        shorter = self._clip.factor(float(norm))
        if shorter < 1:
            for gradient in gradients:
                gradient.mul_(shorter)
        self._optimizer.step()
        state.adam_steps += 1
        self.student.student.clamp_latents()
        self.student.student.stepped()
        notes = self.student.student.notes()
        self.log("step", {"step": state.step, "loss": round(loss, 6), "rate": round(rate, 6), **notes})
        return loss

    def _batches(self) -> Iterator[tuple[tuple[int, ...], Batch]]:
        """The next batches of this process, with the numbers of their examples; each step moves the state by those of
        all processes."""
        state, processes = self.state, self.teacher_model.processes
        for n in range(self._batches_of_a_step()):
            if self._plan[0] != state.epoch:
                plan = self.pool.plan(self.settings.seed, state.epoch, self.settings.batch_tokens)
                self._plan = state.epoch, plan
            numbers = self._plan[1][state.place]
            state.place += 1
            if state.place == len(self._plan[1]):
                state.epoch, state.place = state.epoch + 1, 0
            if n % processes.size == processes.rank:
                yield tuple(numbers), self.pool.batch(numbers)

    def _batches_of_a_step(self) -> int:
        return self.settings.accumulate * self.teacher_model.processes.size

    def _gradients(self, batches: list[tuple[tuple[int, ...], Batch]], counts: float) -> float:
        """This process's part of the gradient of the mean loss, in the latents; returns its part of the loss."""
        self.teacher_model.activate(NAME)
        self.student.update_model(training=True)
        for parameter in self.student.parameters():
            parameter.grad = None
        total, parts = 0.0, self.state.parts
        for numbers, batch in batches:
            for n, piece in enumerate(batch.parts(parts)):
                moved = piece.to(self.teacher_model.device)
                loss = self._loss(moved, self._goal((numbers, parts, n), moved)) * (piece.weight / counts)
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
        self.student.collect_gradients()
        return total

    def _goal(self, key: Key, batch: Batch) -> Goal:
        """The teacher's answers: those that are kept, where batches come again."""

        def compute() -> Goal:
            answers = self.teacher_model.teacher(batch, self.settings.hidden > 0, training=True)
            return losses.goal(answers, self.settings.temperature)

        if not self._comes_again():
            self._answers = TeacherAnswers(1e9 * self.settings.answers_gb)
            return compute()
        return self._answers.of(key, compute, self.teacher_model.device)

    def _comes_again(self) -> bool:
        """True if batches do: branches of a probe share them, and so do epochs."""
        batches = self.settings.steps * self._batches_of_a_step()
        return bool(self.state.branch or batches > len(self._plan[1]))

    def _loss(self, batch: Batch, goal: Goal) -> Tensor:
        settings, hidden = self.settings, self.settings.hidden > 0
        self.teacher_model.activate(NAME)
        answers = self.teacher_model.answers(batch, hidden, training=True)
        loss = losses.distance(goal, answers, settings.temperature) / self.base_distance.mean
        if hidden:
            loss = loss + settings.hidden * losses.hidden_error(goal, answers, self.base_distance.sizes)
        if settings.task_loss:
            loss = loss + settings.task_loss * losses.task_loss(batch, answers)
        return loss

    def _cut_batches(self, batches: list[tuple[tuple[int, ...], Batch]]) -> None:
        """Cut batches into more parts, as the last step did not fit into memory. Raises E-OPTION if they are single
        texts already."""
        most = max(batch.rows for _, batch in batches)
        if self.state.parts >= most:
            raise OptionError(
                "a single text does not fit into memory",
                fix=f"give a smaller {spelled('length', ...)}, or {spelled('gradient_checkpointing', True)}",
            )
        self.state.parts = min(most, 2 * self.state.parts)
        self.log("smaller", {"step": self.state.step, "parts": self.state.parts})
        if self.teacher_model.device.type == "cuda":
            torch.cuda.empty_cache()

    # --- evaluation ---

    def measured(self) -> AnswerSums:
        """Return how far the student, as it is, is from the teacher on held-out data."""
        self.student.student.settle()
        self.teacher_model.activate(NAME)
        self.student.update_model(training=False)
        return self.evaluator.sums((NAME,))

    def _evaluate(self) -> float:
        """Measure the answers to held-out data, keep what is the best so far, and return their distance."""
        state, sums = self.state, self.measured()
        closed = 1 - sums.mean / self.base_distance.mean
        fields = {"step": state.step, "distance": sums.mean, "agreement": sums.agreement, "closed": closed}
        self.log("held-out", {**fields, "seconds": round(state.seconds)})
        if sums.mean < state.best_distance:
            self.best, self._best_point = self.student.compact(), self._point()
            state.best_distance, state.best_agreed, state.best_step = sums.mean, sums.agreed, state.step
            state.waited = 0
        elif not state.branch and not sums.mean <= _DIVERGED * self.base_distance.mean:
            self._restart("the answers are farther off than the base's")
        else:
            state.waited += 1
        return sums.mean if math.isfinite(sums.mean) else math.inf

    def _restart(self, why: str) -> None:
        """Return because the training diverged: it may do so a few times."""
        self.state.restarts += 1
        self.state.bad = 0
        self._return(why)

    def _return(self, why: str) -> None:
        """Go on from the best point, at smaller rates."""
        self.state.rate *= _SMALLER
        self._go_to(self._best_point)
        self.log("again", {"step": self.state.step, "why": why, "rate": self.state.rate})

    # --- checkpoints ---

    def snapshot(self) -> State:
        """Return the state with all that changes in training."""
        assert self.best is not None
        arrays = self._point().arrays() | self._best_point.arrays("kept.")
        if self._start is not None:
            arrays |= self._start.arrays("start.")
        if self._clip.norms:  # no file holds empty tensors
            arrays["norms"] = np.array(self._clip.norms, np.float64)
        if self._tried:
            arrays["tried"] = np.array([[t.multiple, t.distance] for t in self._tried], np.float64)
        arrays |= kept_adapter.arrays_of(self.best)
        assert self.origin is not None
        arrays |= {f"origin.{name}": array for name, array in kept_adapter.arrays_of(self.origin).items()}
        return replace(self.state, arrays=arrays, kept_adam_steps=self._best_point.adam_steps)

    def resume(self, state: State) -> None:
        """Go on from a snapshot, after `start`."""
        arrays, compact = state.arrays, self.best
        assert compact is not None
        origin = {name.removeprefix("origin."): array for name, array in arrays.items() if name.startswith("origin.")}
        self.restart_from(kept_adapter.of_arrays(origin, compact))
        self.state = replace(state, arrays={})
        self._go_to(Point.from_arrays(arrays, state.adam_steps))
        self._best_point = Point.from_arrays(arrays, state.kept_adam_steps, "kept.")
        self._start = Point.from_arrays(arrays, 0, "start.") if state.branch else None
        self._clip = learning_rate.Clip(arrays["norms"].tolist() if "norms" in arrays else [])
        self._tried = [Tried(*row) for row in arrays["tried"].tolist()] if "tried" in arrays else []
        self.best = kept_adapter.of_arrays(arrays, compact)


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()
