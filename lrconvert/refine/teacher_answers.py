"""The teacher's answers to batches that come again, kept in memory.

A batch that comes again is the same batch (`Pool.plan`), and what is kept is what was computed, in its own dtype, so
that a training makes the same bytes whatever of it is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lrconvert.refine.losses import Goal

Key = tuple[object, ...]  # what identifies a batch


@dataclass(eq=False)
class TeacherAnswers:
    """Answers by batch, in memory of the processor, up to `limit` bytes: what comes first is kept."""

    limit: float
    nbytes: int = 0
    _kept: dict[Key, Goal] = field(default_factory=dict)

    def of(self, key: Key, compute: Callable[[], Goal], device: torch.device) -> Goal:
        """Return the answers to the batch `key`: those that are kept, or what `compute` gives."""
        if key in self._kept:
            return _on(self._kept[key], device)
        goal = compute()
        size = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(goal))
        if self.nbytes + size <= self.limit:
            self.nbytes += size
            self._kept[key] = _on(goal, torch.device("cpu"))
        return goal


def _tensors(goal: Goal) -> Iterator[Tensor]:
    for tensor in (*goal.hidden, goal.rows, goal.logs, goal.which, goal.rest):
        if tensor is not None:
            yield tensor


def _on(goal: Goal, device: torch.device) -> Goal:
    rows, logs, which, rest = (
        None if t is None else t.to(device) for t in (goal.rows, goal.logs, goal.which, goal.rest)
    )
    return replace(goal, hidden=tuple(t.to(device) for t in goal.hidden), rows=rows, logs=logs, which=which, rest=rest)
