"""Stage two, end to end: the student's answers and hidden states follow the teacher's.

Determinism: a step depends on the state and the settings alone. Batches are a pure function of seed and epoch; nothing
is drawn; so a resumed run is, on one device, the run that was never interrupted, to the last bit.
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
from lrconvert.lora.adapter import CompactAdapter
from lrconvert.refine import losses
from lrconvert.refine.attached_student import NAME, AttachedStudent
from lrconvert.refine.checkpoint import State
from lrconvert.refine.data import Pool
from lrconvert.refine.evaluation import Evaluator, TeacherModel
from lrconvert.refine.losses import Batch
from lrconvert.refine.settings import Settings
from lrconvert.refine.training_log import Log

_WARM = 0.1  # of the steps: rates rise
_FINAL = 0.02  # what rates fall to
_BAD = 5  # steps in a row that are no numbers before the work begins again from the best
_RESTARTS = 3
_DIVERGED = 2.0  # times as far as the base without an adapter


@dataclass(frozen=True)
class Scale:
    """What the teacher's update does on held-out data: the distance of the base's answers, and by layer the squared
    change of hidden states."""

    distance: float
    hidden: tuple[float, ...]


@dataclass(eq=False)
class Trainer:
    """One refinement under way; `train` runs it to its end."""

    room: TeacherModel
    pupil: AttachedStudent
    pool: Pool
    held: Evaluator
    scale: Scale
    settings: Settings
    log: Log
    state: State = field(default_factory=State)
    best: CompactAdapter | None = None

    def __post_init__(self) -> None:
        self._optimizer = self._new_optimizer()
        self._tops = [group["lr"] for group in self._optimizer.param_groups]
        self._plan: tuple[int, list[list[int]]] = (-2, [])
        self._names = [f"{n}" for n in range(len(self.pupil.parameters()))]

    def _new_optimizer(self) -> torch.optim.Adam:
        return torch.optim.Adam(self.pupil.groups(self.settings.lr), betas=(0.9, 0.99), eps=1e-12)

    # --- the way through ---

    def train(
        self, keep: Callable[[State], None], progress: Callable[[float, str], None], until: int | None = None
    ) -> CompactAdapter:
        """Run to the end, or to the step `until`, rates falling as on the way to the end; returns the best on held-out
        data. `keep` is given the state to write now and then."""
        state, settings, world = self.state, self.settings, self.room.world
        end = settings.steps if until is None else min(until, settings.steps)
        started, before = time.monotonic(), state.seconds
        told = ""
        while state.step < end and state.restarts <= _RESTARTS:
            state.seconds = world.told(before + time.monotonic() - started, self.room.device)
            share = self._share()
            if share >= 1:
                break
            loss = self._step(share)
            told = f"loss {loss:.3f}, agreement {state.best_agreed / max(1, self.items):.1%}"
            progress(share, told)
            last = state.step >= end
            if state.step % settings.eval_every == 0 or last:
                self._evaluate(loss)
                if settings.patience and state.waited >= settings.patience:
                    break
            if state.step % settings.checkpoint_every == 0 and not last:
                keep(self.snapshot())
        if self.state.step % settings.eval_every and self.state.step < end:
            self._evaluate(math.nan)
        assert self.best is not None
        return self.best

    @property
    def items(self) -> int:
        return self._items

    def start(self, compact: CompactAdapter, found: losses.Sums) -> None:
        """Begin with `compact`, which was measured to be as far as `found`."""
        self.best, self._items = compact, found.items
        self.state.best_distance, self.state.best_agreed = found.mean, found.agreed

    def begin(self, compact: CompactAdapter) -> None:
        """Let the student be `compact`."""
        self.pupil.take(compact)
        self._optimizer = self._new_optimizer()

    def _share(self) -> float:
        """How much of the way is behind: by steps, or by time if that is shorter."""
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
        """One step; returns its loss, a share of what the teacher's update does."""
        state = self.state
        batches = list(self._batches())
        counts = self.room.world.totals([sum(b.weight for b in batches)], self.room.device)[0]
        while True:
            full, loss = 0.0, 0.0
            try:
                loss = self._gradients(batches, counts)
            except RuntimeError as error:
                if not _is_full(error):
                    raise
                full = 1.0
            loss, full = self.room.world.totals([loss, full], self.room.device)
            if not full:
                break
            self._smaller(batches)
        state.step += 1
        parameters = self.pupil.parameters()
        gradients = [p.grad for p in parameters if p.grad is not None]
        self.room.world.add(gradients)
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        if not (math.isfinite(loss) and bool(norm.isfinite())):
            state.bad += 1
            self.log("skipped", {"step": state.step, "why": "the loss or a gradient is no number"})
            if state.bad >= _BAD:
                self._again("steps in a row were no numbers")
            return loss
        state.bad = 0
        rate = self._rate(share) * state.rate
        for group, top in zip(self._optimizer.param_groups, self._tops, strict=True):
            group["lr"] = top * rate
        self._optimizer.step()
        state.adam_steps += 1
        self.pupil.student.clamp_latents()
        self.log("step", {"step": state.step, "loss": round(loss, 6), "rate": round(rate, 6)})
        return loss

    def _batches(self) -> Iterator[Batch]:
        """The next batches of this process; each step moves the state by those of all processes."""
        state, world = self.state, self.room.world
        for n in range(self.settings.accumulate * world.size):
            if self._plan[0] != state.epoch:
                plan = self.pool.plan(self.settings.seed, state.epoch, self.settings.batch_tokens)
                self._plan = state.epoch, plan
            which = self._plan[1][state.place]
            state.place += 1
            if state.place == len(self._plan[1]):
                state.epoch, state.place = state.epoch + 1, 0
            if n % world.size == world.rank:
                yield self.pool.batch(which)

    def _gradients(self, batches: list[Batch], counts: float) -> float:
        """This process's part of the gradient of the mean loss, in the latents; returns its part of the loss."""
        self.room.using(NAME)
        self.pupil.show(training=True)
        for parameter in self.pupil.parameters():
            parameter.grad = None
        total = 0.0
        for batch in batches:
            for piece in batch.parts(self.state.parts):
                loss = self._loss(piece.to(self.room.device)) * (piece.weight / counts)
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
        self.pupil.learn()
        return total

    def _loss(self, batch: Batch) -> Tensor:
        settings, hidden = self.settings, self.settings.hidden > 0
        goal = losses.goal(self.room.teacher(batch, hidden), settings.temperature)
        self.room.using(NAME)
        found = self.room.answers(batch, hidden)
        loss = losses.distance(goal, found, settings.temperature) / self.scale.distance
        if hidden:
            loss = loss + settings.hidden * losses.hidden_error(goal, found, self.scale.hidden)
        if settings.task_loss:
            loss = loss + settings.task_loss * losses.task_loss(batch, found)
        return loss

    def _smaller(self, batches: list[Batch]) -> None:
        """Cut batches into more parts, as the last step did not fit into memory. Raises E-OPTION if they are single
        texts already."""
        most = max(batch.rows for batch in batches)
        if self.state.parts >= most:
            raise OptionError(
                "a single text does not fit into memory", fix="give a smaller --length, or --gradient-checkpointing"
            )
        self.state.parts = min(most, 2 * self.state.parts)
        self.log("smaller", {"step": self.state.step, "parts": self.state.parts})
        if self.room.device.type == "cuda":
            torch.cuda.empty_cache()

    # --- what was reached ---

    def measured(self) -> losses.Sums:
        """The student as it is, on held-out data."""
        self.room.using(NAME)
        self.pupil.show(training=False)
        return self.held.sums((NAME,))

    def _evaluate(self, loss: float) -> None:
        state, found = self.state, self.measured()
        told = {"step": state.step, "distance": found.mean, "agreement": found.agreement}
        self.log("held-out", {**told, "closed": 1 - found.mean / self.scale.distance, "seconds": round(state.seconds)})
        if not math.isfinite(found.mean) or found.mean > _DIVERGED * self.scale.distance:
            self._again("the answers are farther off than the base's")
        elif found.mean < state.best_distance:
            self.best = self.pupil.compact()
            state.best_distance, state.best_agreed, state.best_step = found.mean, found.agreed, state.step
            state.waited = 0
        else:
            state.waited += 1

    def _again(self, why: str) -> None:
        """Go on from the best, at half the rates."""
        assert self.best is not None
        self.state.rate /= 2
        self.state.restarts += 1
        self.state.bad = 0
        self.state.adam_steps = 0
        self.begin(self.best)
        self.log("again", {"step": self.state.step, "why": why, "rate": self.state.rate})

    # --- stopping and going on ---

    def snapshot(self) -> State:
        """The state with all that moves."""
        assert self.best is not None
        arrays = {f"now.{name}": value.detach().cpu().numpy() for name, value in self.pupil.state().items()}
        for name, parameter in zip(self._names, self.pupil.parameters(), strict=True):
            kept = self._optimizer.state.get(parameter)
            if kept:
                arrays[f"mean.{name}"] = kept["exp_avg"].cpu().numpy()
                arrays[f"square.{name}"] = kept["exp_avg_sq"].cpu().numpy()
        arrays |= {f"best.{name}": array for name, array in self.best.tensors.items()}
        for n, extra in enumerate(self.best.extras):
            arrays[f"extra.{n}"] = np.frombuffer(extra.data, np.uint8)
        return replace(self.state, arrays=arrays)

    def resume(self, state: State, compact: CompactAdapter) -> None:
        """Go on from a snapshot. `compact` is what the refinement began with."""
        arrays = state.arrays
        device = self.room.device
        self.pupil.load({n.removeprefix("now."): torch.from_numpy(a) for n, a in arrays.items() if n[:4] == "now."})
        for name, parameter in zip(self._names, self.pupil.parameters(), strict=True):
            if state.adam_steps:
                moments = [torch.from_numpy(arrays[f"{kind}.{name}"].copy()) for kind in ("mean", "square")]
                one, two = (m.to(device).reshape(parameter.shape) for m in moments)
                kept = {"step": torch.tensor(float(state.adam_steps)), "exp_avg": one, "exp_avg_sq": two}
                self._optimizer.state[parameter] = kept
        tensors = {n.removeprefix("best."): a for n, a in arrays.items() if n[:5] == "best."}
        extras = tuple(replace(e, data=arrays[f"extra.{n}"].tobytes()) for n, e in enumerate(compact.extras))
        self.best = replace(compact, tensors=tensors, extras=extras)
        self.state = replace(state, arrays={})


def _is_full(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()
