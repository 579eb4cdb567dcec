"""What is held out: how far answers are from the teacher's, measured as `measuring` does."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lrconvert.formats.fidelity import Answers
from lrconvert.live import attach
from lrconvert.refine.data import Pool
from lrconvert.refine.distributed import Processes
from lrconvert.refine.losses import Batch, Outputs, Sums, outputs

TEACHER = "teacher"
_KEPT = 1 << 27  # numbers of the teacher's answers that are kept in memory, 512 MiB


@dataclass(eq=False)
class TeacherModel:
    """A model with a teacher, what was active on it before, and how it computes."""

    model: nn.Module
    before: tuple[str, ...]
    device: torch.device
    autocast: bool
    world: Processes

    def using(self, *names: str) -> None:
        attach.set_active(self.model, (*self.before, *names))

    def computing(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)

    def answers(self, batch: Batch, hidden: bool) -> Outputs:
        with self.computing():
            return outputs(self.model, batch, hidden)

    @torch.no_grad()
    def teacher(self, batch: Batch, hidden: bool) -> Outputs:
        self.using(TEACHER)
        return self.answers(batch, hidden)


@dataclass(eq=False)
class Evaluator:
    """The held-out batches of this process: its share of them, or all where there are fewer than processes."""

    room: TeacherModel
    batches: list[Batch]
    shared: bool
    _known: list[Outputs] = field(default_factory=list)
    _kept: int = 0

    @classmethod
    def of(cls, room: TeacherModel, pool: Pool, batch_tokens: int) -> Evaluator:
        plan = pool.plan(0, -1, batch_tokens)
        shared = len(plan) >= room.world.size
        some = plan[room.world.rank :: room.world.size] if shared else plan
        return cls(room, [pool.batch(which).to(room.device) for which in some], shared)

    @torch.no_grad()
    def sums(self, names: Sequence[str], hidden: bool = False) -> Sums:
        """The base with the adapters `names`, against the teacher."""
        total = Sums()
        for n, batch in enumerate(self.batches):
            goal = self._goal(n, batch, hidden)
            self.room.using(*names)
            total.add(goal, self.room.answers(batch, hidden))
        if not self.shared:
            return total
        values = [total.items, total.distance, total.agreed, total.tokens, *(total.hidden or ())]
        found = self.room.world.totals(values, self.room.device)
        return Sums(int(found[0]), found[1], int(found[2]), int(found[3]), found[4:], total.are_logits)

    def _goal(self, n: int, batch: Batch, hidden: bool) -> Outputs:
        if not hidden and n < len(self._known):
            return self._known[n]
        found = self.room.teacher(batch, hidden)
        if not hidden and n == len(self._known) and self._kept + found.rows.numel() <= _KEPT:
            self._known.append(Outputs(found.rows, found.are_logits))
            self._kept += found.rows.numel()
        return found


def answers(found: Sums, base: Sums) -> Answers:
    agreement = (found.agreement, base.agreement) if found.are_logits else (None, None)
    kind = "KL" if found.are_logits else "hidden states"
    return Answers(kind, found.items, found.mean, base.mean, *agreement)
