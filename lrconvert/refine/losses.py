"""The loss of a student: KL of the logits from its teacher's, the error of hidden states, the task's own loss.

All distances are shares of what the teacher's update does: 1 is the base without an adapter, 0 the teacher. So the
parts of the loss have one scale, whatever the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrconvert.live.answers import Outputs, answer_of, masked_rows
from lrconvert.live.text_sums import TINY
from lrconvert.live.texts import IGNORED

TOP_K = 1024  # logits of a teacher that are compared one by one; what the rest holds is compared as one


@dataclass(frozen=True, eq=False)
class Batch:
    """Inputs of a model, and what counts of its answers. `scored`: which places of the outputs count, bool in
    the shape of the logits less their last dimension, None for all. `labels`: classes in that shape, -100 where there
    is none; None without a task's answers. `by_place`: answers are of places (tokens), else of rows."""

    inputs: Mapping[str, Any]
    scored: Tensor | None = None
    labels: Tensor | None = None
    by_place: bool = False

    @property
    def rows(self) -> int:
        """The number of rows that its tensors have in common; 1 if they differ, and nothing can be cut."""
        counts = {len(v) for v in self.inputs.values() if isinstance(v, Tensor) and v.dim()}
        return counts.pop() if len(counts) == 1 else 1

    @property
    def weight(self) -> float:
        """The number of its answers, which it counts with in a mean over batches."""
        if self.by_place and self.scored is not None:
            return float(self.scored.sum())
        ids = self.inputs.get("input_ids")
        return float(ids.numel()) if self.by_place and isinstance(ids, Tensor) else float(self.rows)

    def parts(self, count: int) -> list[Batch]:
        """Return the batch in `count` parts of about equal rows, or as many as it has rows."""
        bounds = [self.rows * n // min(count, self.rows) for n in range(min(count, self.rows) + 1)]
        if len(bounds) == 2:
            return [self]
        return [self._mapped(partial(_rows_between, start, stop)) for start, stop in pairwise(bounds)]

    def to(self, device: torch.device) -> Batch:
        """Return the batch with its tensors on `device`."""
        return self._mapped(lambda value: value.to(device))

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Batch:
        inputs = {name: change(value) if isinstance(value, Tensor) else value for name, value in self.inputs.items()}
        scored, labels = (None if value is None else change(value) for value in (self.scored, self.labels))
        return Batch(inputs, scored, labels, self.by_place)


def _rows_between(start: int, stop: int, value: Tensor) -> Tensor:
    return value[start:stop] if value.dim() else value


def outputs(model: nn.Module, batch: Batch, hidden: bool) -> Outputs:
    """Run `model` on a batch. Raises E-DATA if it gives neither logits nor hidden states."""
    options = {"output_hidden_states": True} if hidden else {}
    with _head_on(model, batch):
        output: Any = model(**batch.inputs, **options)
    value, are_logits = answer_of(output)
    masks = (batch.scored, batch.inputs.get("attention_mask"))
    layers = [
        masked_rows(layer, masks)
        for name in ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")
        for layer in (getattr(output, name, None) if hidden else None) or ()
    ]
    return Outputs(masked_rows(value, masks[:1]), are_logits, tuple(layers))


@contextmanager
def _head_on(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Let the output layer of a model that writes texts compute the places that count alone, as one row of them: there
    are often few, and many words. A model that is given labels needs all places for its own loss."""
    head = getattr(model, "get_output_embeddings", lambda: None)() if batch.by_place else None
    scored = batch.scored
    if head is None or scored is None or "labels" in batch.inputs:
        yield
        return

    def select(module: nn.Module, arguments: tuple[Any, ...]) -> Any:
        x = arguments[0] if arguments else None
        if isinstance(x, Tensor) and x.dim() == 3 and x.shape[:-1] == scored.shape:
            return (x[scored][None], *arguments[1:])
        return None

    hook = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()


# --- distances ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Goal:
    """A teacher's answers at a temperature: log probabilities (items, k) of the classes `which` (items, k), all in
    order if that is None, and of all others together, `rest` (items,). Or `rows` of hidden states."""

    hidden: tuple[Tensor, ...]
    rows: Tensor | None = None
    logs: Tensor | None = None
    which: Tensor | None = None
    rest: Tensor | None = None


def goal(teacher: Outputs, temperature: float, top_k: int = TOP_K) -> Goal:
    """Return the teacher's answers as a student is to match them."""
    if not teacher.are_logits:
        return Goal(teacher.hidden, rows=teacher.rows)
    logs = (teacher.rows.float() / temperature).log_softmax(-1)
    if logs.shape[-1] <= 2 * top_k:
        return Goal(teacher.hidden, logs=logs)
    largest, which = logs.topk(top_k, -1)
    return Goal(teacher.hidden, logs=largest, which=which.int(), rest=_rest(largest))


def _rest(logs: Tensor) -> Tensor:
    """The log probability of what is not among `logs` (items, k): (items,)."""
    return torch.log1p(-logs.exp().sum(-1).clamp(max=1 - 1e-6))


def distance(goal: Goal, student: Outputs, temperature: float) -> Tensor:
    """Return the mean KL of the answers in nats, times the temperature squared; or the relative squared error of hidden
    states where a model has no logits."""
    if goal.rows is not None:
        error = (goal.rows.float() - student.rows.float()).square().sum(-1)
        return (error / goal.rows.float().square().sum(-1).clamp(min=TINY)).mean()
    assert goal.logs is not None
    logs = (student.rows.float() / temperature).log_softmax(-1)
    if goal.which is None:
        each = (goal.logs.exp() * (goal.logs - logs)).sum(-1)
    else:
        assert goal.rest is not None
        largest = logs.gather(-1, goal.which.long())
        each = (goal.logs.exp() * (goal.logs - largest)).sum(-1) + goal.rest.exp() * (goal.rest - _rest(largest))
    return each.mean() * temperature**2


def hidden_error(goal: Goal, student: Outputs, sizes: Sequence[float]) -> Tensor:
    """Return the mean over layers of the squared error of hidden states, each as a share of `sizes`: what the teacher's
    update changes there. Layers that it does not change are left out."""
    shares = [
        (one.float() - other.float()).square().sum(-1).mean() / size
        for one, other, size in zip(goal.hidden, student.hidden, sizes, strict=True)
        if size > 0
    ]
    return torch.stack(shares).mean() if shares else student.rows.new_zeros((), dtype=torch.float32)


def task_loss(batch: Batch, student: Outputs) -> Tensor:
    """Return the cross-entropy of the task's own answers."""
    assert batch.labels is not None
    labels = batch.labels
    if batch.scored is not None and batch.scored.shape == labels.shape:
        labels = labels[batch.scored]
    if labels.numel() != len(student.rows) or not bool((labels != IGNORED).any()):
        return student.rows.new_zeros((), dtype=torch.float32)
    return F.cross_entropy(student.rows.float(), labels.reshape(-1), ignore_index=IGNORED)
