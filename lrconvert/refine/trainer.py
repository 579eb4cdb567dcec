"""Stage two, end to end: the student's answers and hidden states follow the teacher's.

Determinism: a step depends on the state and the settings alone. Batches are a pure function of seed and epoch; nothing
is drawn; so a resumed run is, on one device, the run that was never interrupted, to the last bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lrconvert.core.errors import OptionError
from lrconvert.live.answers import AnswerSums
from lrconvert.lora.adapter import CompactAdapter
from lrconvert.refine import kept_adapter, losses
from lrconvert.refine.attached_student import NAME, AttachedStudent
from lrconvert.refine.checkpoint import State
from lrconvert.refine.data import Pool
from lrconvert.refine.evaluation import Evaluator, TeacherModel
from lrconvert.refine.losses import Batch
from lrconvert.refine.settings import Settings
from lrconvert.refine.training_log import Log

_WARM = 0.1  # of the steps: rates rise
_FINAL = 0.02  # what rates fall to
_BAD = 5  # steps in a row whose loss or gradient is NaN or infinite, before a restart from the best
_RESTARTS = 3
_DIVERGED = 2.0  # times as far as the base without an adapter


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

    def __post_init__(self) -> None:
        self._optimizer = self._new_optimizer()
        self._highest_rates = [group["lr"] for group in self._optimizer.param_groups]
        self._plan: tuple[int, list[list[int]]] = (-2, [])
        self._names = [f"{n}" for n in range(len(self.student.parameters()))]

    def _new_optimizer(self) -> torch.optim.Adam:
        return torch.optim.Adam(self.student.groups(self.settings.lr), betas=(0.9, 0.99), eps=1e-12)

    # --- the way through ---

    def train(
        self, write: Callable[[State], None], progress: Callable[[float, str], None], until: int | None = None
    ) -> None:
        """Run to the end, or to the step `until`, rates falling as on the way to the end; `best` is then the best on
        held-out data. `write` is given the state for a checkpoint now and then."""
        state, settings, processes = self.state, self.settings, self.teacher_model.processes
        end = settings.steps if until is None else min(until, settings.steps)
        started, before = time.monotonic(), state.seconds
        while state.step < end and state.restarts <= _RESTARTS:
            state.seconds = processes.of_first(before + time.monotonic() - started, self.teacher_model.device)
            share = self._share()
            if share >= 1:
                break
            loss = self._step(share)
            progress(share, f"loss {loss:.3f}, agreement {state.best_agreed / max(1, self._items):.1%}")
            last = state.step >= end
            if state.step % settings.eval_every == 0 or last:
                self._evaluate()
                if settings.patience and state.waited >= settings.patience:
                    break
            if state.step % settings.checkpoint_every == 0 and not last:
                write(self.snapshot())
        if self.state.step % settings.eval_every and self.state.step < end:
            self._evaluate()

    def start(self, compact: CompactAdapter, measured: AnswerSums) -> None:
        """Take `compact`, whose answers were `measured`, for the best so far."""
        self.best, self._items = compact, measured.items
        self.state.best_distance, self.state.best_agreed = measured.mean, measured.agreed

    def restart_from(self, compact: CompactAdapter) -> None:
        """Let the student be `compact`, with a new optimizer."""
        self.student.restart_from(compact)
        self._optimizer = self._new_optimizer()

    def _share(self) -> float:
        """The share of the training that is done: by steps, or by time if that is shorter."""
        steps = self.state.step / self.settings.steps
        if self.settings.minutes is None:
            return steps
        return max(steps, self.state.seconds / (60 * self.settings.minutes))

    def _rate(self, share: float) -> float:
        if share < _WARM:
            return (share + 0.5 / self.settings.steps) / _WARM
        return _FINAL + (1 - _FINAL) * 0.5 * (1 + math.cos(math.pi * (share - _WARM) / (1 - _WARM)))

    # --- a step ---

    def _step(self, share: float) -> float:
        """Make one step; returns its loss, a share of what the teacher's update does."""
        state = self.state
        batches = list(self._batches())
        counts = self.teacher_model.processes.totals([sum(b.weight for b in batches)], self.teacher_model.device)[0]
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
            if state.bad >= _BAD:
                self._restart("the loss or a gradient was NaN or infinite in steps in a row")
            return loss
        state.bad = 0
        rate = self._rate(share) * state.rate
        for group, highest in zip(self._optimizer.param_groups, self._highest_rates, strict=True):
            group["lr"] = highest * rate
        self._optimizer.step()
        state.adam_steps += 1
        self.student.student.clamp_latents()
        self.student.student.stepped()
        notes = self.student.student.notes()
        self.log("step", {"step": state.step, "loss": round(loss, 6), "rate": round(rate, 6), **notes})
        return loss

    def _batches(self) -> Iterator[Batch]:
        """The next batches of this process; each step moves the state by those of all processes."""
        state, processes = self.state, self.teacher_model.processes
        for n in range(self.settings.accumulate * processes.size):
            if self._plan[0] != state.epoch:
                plan = self.pool.plan(self.settings.seed, state.epoch, self.settings.batch_tokens)
                self._plan = state.epoch, plan
            numbers = self._plan[1][state.place]
            state.place += 1
            if state.place == len(self._plan[1]):
                state.epoch, state.place = state.epoch + 1, 0
            if n % processes.size == processes.rank:
                yield self.pool.batch(numbers)

    def _gradients(self, batches: list[Batch], counts: float) -> float:
        """This process's part of the gradient of the mean loss, in the latents; returns its part of the loss."""
        self.teacher_model.activate(NAME)
        self.student.update_model(training=True)
        for parameter in self.student.parameters():
            parameter.grad = None
        total = 0.0
        for batch in batches:
            for piece in batch.parts(self.state.parts):
                loss = self._loss(piece.to(self.teacher_model.device)) * (piece.weight / counts)
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
        self.student.collect_gradients()
        return total

    def _loss(self, batch: Batch) -> Tensor:
        settings, hidden = self.settings, self.settings.hidden > 0
        goal = losses.goal(self.teacher_model.teacher(batch, hidden), settings.temperature)
        self.teacher_model.activate(NAME)
        answers = self.teacher_model.answers(batch, hidden)
        loss = losses.distance(goal, answers, settings.temperature) / self.base_distance.mean
        if hidden:
            loss = loss + settings.hidden * losses.hidden_error(goal, answers, self.base_distance.sizes)
        if settings.task_loss:
            loss = loss + settings.task_loss * losses.task_loss(batch, answers)
        return loss

    def _cut_batches(self, batches: list[Batch]) -> None:
        """Cut batches into more parts, as the last step did not fit into memory. Raises E-OPTION if they are single
        texts already."""
        most = max(batch.rows for batch in batches)
        if self.state.parts >= most:
            raise OptionError(
                "a single text does not fit into memory", fix="give a smaller --length, or --gradient-checkpointing"
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

    def _evaluate(self) -> None:
        state, sums = self.state, self.measured()
        closed = 1 - sums.mean / self.base_distance.mean
        fields = {"step": state.step, "distance": sums.mean, "agreement": sums.agreement, "closed": closed}
        self.log("held-out", {**fields, "seconds": round(state.seconds)})
        if not math.isfinite(sums.mean) or sums.mean > _DIVERGED * self.base_distance.mean:
            self._restart("the answers are farther off than the base's")
        elif sums.mean < state.best_distance:
            self.best = self.student.compact()
            state.best_distance, state.best_agreed, state.best_step = sums.mean, sums.agreed, state.step
            state.waited = 0
        else:
            state.waited += 1

    def _restart(self, why: str) -> None:
        """Go on from the best, at half the rates."""
        assert self.best is not None
        self.state.rate /= 2
        self.state.restarts += 1
        self.state.bad = 0
        self.state.adam_steps = 0
        self.restart_from(self.best)
        self.log("again", {"step": self.state.step, "why": why, "rate": self.state.rate})

    # --- checkpoints ---

    def snapshot(self) -> State:
        """Return the state with all that changes in training."""
        assert self.best is not None
        arrays = {f"now.{name}": value.detach().cpu().numpy() for name, value in self.student.state().items()}
        for name, parameter in zip(self._names, self.student.parameters(), strict=True):
            moments = self._optimizer.state.get(parameter)
            if moments:
                arrays[f"mean.{name}"] = moments["exp_avg"].cpu().numpy()
                arrays[f"square.{name}"] = moments["exp_avg_sq"].cpu().numpy()
        return replace(self.state, arrays=arrays | kept_adapter.arrays_of(self.best))

    def resume(self, state: State, compact: CompactAdapter) -> None:
        """Go on from a snapshot. `compact` is what the refinement began with."""
        arrays, device = state.arrays, self.teacher_model.device
        self.student.load({n.removeprefix("now."): torch.from_numpy(a) for n, a in arrays.items() if n[:4] == "now."})
        if state.adam_steps:
            for name, parameter in zip(self._names, self.student.parameters(), strict=True):
                mean, square = (
                    torch.from_numpy(arrays[f"{kind}.{name}"].copy()).to(device).reshape(parameter.shape)
                    for kind in ("mean", "square")
                )
                moments = {"step": torch.tensor(float(state.adam_steps)), "exp_avg": mean, "exp_avg_sq": square}
                self._optimizer.state[parameter] = moments
        self.best = kept_adapter.of_arrays(arrays, compact)
        self.state = replace(state, arrays={})


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()
