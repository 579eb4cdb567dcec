"""How far a student's answers are from its teacher's: KL of the logits, the error of hidden states, the task's loss.

All distances are shares of what the teacher's update does: 1 is the base without an adapter, 0 the teacher. So the
parts of the loss have one scale, whatever the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrconvert.core.errors import DataError

TOP_K = 1024  # logits of a teacher that are compared one by one; what the rest holds is compared as one
_CHUNK = 1 << 24  # logits that are compared at once
_TINY = 1e-30


@dataclass(frozen=True, eq=False)
class Batch:
    """What a model is given, and what counts of what it answers. `scored`: which places of the outputs count, bool in
    the shape of the logits less their last dimension, None for all. `labels`: classes in that shape, -100 where there
    is none; None without a task's answers. `by_place`: answers are of places (tokens), else of rows."""

    inputs: Mapping[str, Any]
    scored: Tensor | None = None
    labels: Tensor | None = None
    by_place: bool = False

    @property
    def rows(self) -> int:
        """How many rows its tensors have in common; 1 if they do not, and nothing can be cut."""
        counts = {len(v) for v in self._tensors().values()}
        return counts.pop() if len(counts) == 1 else 1

    @property
    def weight(self) -> float:
        """What it counts in a mean over batches: its answers."""
        if self.by_place and self.scored is not None:
            return float(self.scored.sum())
        ids = self.inputs.get("input_ids")
        return float(ids.numel()) if self.by_place and isinstance(ids, Tensor) else float(self.rows)

    def parts(self, count: int) -> list[Batch]:
        """The batch in `count` parts of about equal rows, or as many as it has rows."""
        bounds = [self.rows * n // min(count, self.rows) for n in range(min(count, self.rows) + 1)]
        if len(bounds) == 2:
            return [self]
        return [self._mapped(partial(_rows_between, start, stop)) for start, stop in pairwise(bounds)]

    def to(self, device: torch.device) -> Batch:
        return self._mapped(lambda value: value.to(device))

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.inputs.items() if isinstance(value, Tensor) and value.dim()}

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Batch:
        inputs = {name: change(value) if isinstance(value, Tensor) else value for name, value in self.inputs.items()}
        other = [None if value is None else change(value) for value in (self.scored, self.labels)]
        return Batch(inputs, other[0], other[1], self.by_place)


def _rows_between(start: int, stop: int, value: Tensor) -> Tensor:
    return value[start:stop] if value.dim() else value


@dataclass(frozen=True, eq=False)
class Outputs:
    """What a model answers at the places that count: `rows` (items, classes) of logits, or of hidden states where a
    model has no logits; the hidden states of all layers, (tokens, width) each, if they were asked for."""

    rows: Tensor
    are_logits: bool
    hidden: tuple[Tensor, ...] = ()


def outputs(model: nn.Module, batch: Batch, hidden: bool) -> Outputs:
    """Run `model` on a batch. Raises E-DATA if it gives neither logits nor hidden states."""
    asked = {"output_hidden_states": True} if hidden else {}
    found: Any = model(**batch.inputs, **asked)
    logits = getattr(found, "logits", None)
    value = logits if logits is not None else getattr(found, "last_hidden_state", None)
    if value is None:
        raise DataError("the model gives neither logits nor hidden states")
    layers: list[Tensor] = []
    if hidden:
        mask = batch.inputs.get("attention_mask")
        for name in ("hidden_states", "encoder_hidden_states", "decoder_hidden_states"):
            for layer in getattr(found, name, None) or ():
                layers.append(_rows(layer, (batch.scored, mask)))
    return Outputs(_rows(value, (batch.scored,)), logits is not None, tuple(layers))


def _rows(value: Tensor, masks: Sequence[Any]) -> Tensor:
    """`value` (..., n) as rows, of the places that the first mask of its shape keeps."""
    for mask in masks:
        if isinstance(mask, Tensor) and mask.shape == value.shape[:-1]:
            return value[mask.bool()]
    return value.reshape(-1, value.shape[-1])


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


def goal(found: Outputs, temperature: float, top_k: int = TOP_K) -> Goal:
    if not found.are_logits:
        return Goal(found.hidden, rows=found.rows)
    logs = (found.rows.float() / temperature).log_softmax(-1)
    if logs.shape[-1] <= 2 * top_k:
        return Goal(found.hidden, logs=logs)
    some, which = logs.topk(top_k, -1)
    return Goal(found.hidden, logs=some, which=which, rest=_rest(some))


def _rest(logs: Tensor) -> Tensor:
    """The log probability of what is not among `logs` (items, k): (items,)."""
    return torch.log1p(-logs.exp().sum(-1).clamp(max=1 - 1e-6))


def distance(goal: Goal, found: Outputs, temperature: float) -> Tensor:
    """The mean KL of the answers in nats, times the temperature squared; or the relative squared error of hidden
    states where a model has no logits."""
    if goal.rows is not None:
        error = (goal.rows.float() - found.rows.float()).square().sum(-1)
        return (error / goal.rows.float().square().sum(-1).clamp(min=_TINY)).mean()
    assert goal.logs is not None
    logs = (found.rows.float() / temperature).log_softmax(-1)
    if goal.which is None:
        each = (goal.logs.exp() * (goal.logs - logs)).sum(-1)
    else:
        assert goal.rest is not None
        some = logs.gather(-1, goal.which)
        each = (goal.logs.exp() * (goal.logs - some)).sum(-1) + goal.rest.exp() * (goal.rest - _rest(some))
    return each.mean() * temperature**2


def hidden_error(goal: Goal, found: Outputs, sizes: Sequence[float]) -> Tensor:
    """The mean over layers of the squared error of hidden states, each as a share of `sizes`: what the teacher's update
    changes there. Layers that it does not change are left out."""
    shares = [
        (one.float() - other.float()).square().sum(-1).mean() / size
        for one, other, size in zip(goal.hidden, found.hidden, sizes, strict=True)
        if size > 0
    ]
    return torch.stack(shares).mean() if shares else found.rows.new_zeros((), dtype=torch.float32)


def task_loss(batch: Batch, found: Outputs) -> Tensor:
    """Cross-entropy of the task's own answers."""
    assert batch.labels is not None
    labels = batch.labels
    if batch.scored is not None and batch.scored.shape == labels.shape:
        labels = labels[batch.scored]
    if labels.numel() != len(found.rows) or not bool((labels != -100).any()):
        return found.rows.new_zeros((), dtype=torch.float32)
    return F.cross_entropy(found.rows.float(), labels.reshape(-1), ignore_index=-100)


# --- measuring ------------------------------------------------------------------------------------------------------


@dataclass
class Sums:
    """Sums over items: distance of the answers, equal first choices, squared errors of hidden states by layer."""

    items: int = 0
    distance: float = 0.0
    agreed: int = 0
    tokens: int = 0
    hidden: list[float] | None = None
    are_logits: bool = True

    @torch.no_grad()
    def add(self, teacher: Outputs, found: Outputs) -> None:
        self.items += len(teacher.rows)
        self.are_logits = teacher.are_logits
        step = max(1, _CHUNK // max(1, teacher.rows.shape[-1]))
        for start in range(0, len(teacher.rows), step):
            p, q = (some.rows[start : start + step].float() for some in (teacher, found))
            if teacher.are_logits:
                self.agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
                p, q = p.log_softmax(-1), q.log_softmax(-1)
                self.distance += float((p.exp() * (p - q)).sum(-1).double().sum())
            else:
                error = (p - q).square().sum(-1) / p.square().sum(-1).clamp(min=_TINY)
                self.distance += float(error.double().sum())
        errors = [
            float((one.float() - other.float()).square().sum(-1).double().sum())
            for one, other in zip(teacher.hidden, found.hidden, strict=True)
        ]
        self.hidden = errors if self.hidden is None else [a + b for a, b in zip(self.hidden, errors, strict=True)]
        self.tokens += len(teacher.hidden[0]) if teacher.hidden else 0

    @property
    def mean(self) -> float:
        return self.distance / max(1, self.items)

    @property
    def agreement(self) -> float:
        return self.agreed / max(1, self.items)

    @property
    def sizes(self) -> tuple[float, ...]:
        """The mean squared error of each layer's hidden states."""
        return tuple(some / max(1, self.tokens) for some in self.hidden or ())
