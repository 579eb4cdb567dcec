"""Answers of models as rows, and the distance between those of two."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrconvert.core.errors import DataError
from lrconvert.formats.fidelity import Answers
from lrconvert.live import intervals

_CHUNK = 1 << 24  # logits that are compared at once
TINY = 1e-30
FEWEST = 20  # texts: a bootstrap over fewer says little


@dataclass(frozen=True, eq=False)
class Outputs:
    """Answers of a model at the places that count: `rows` (items, classes) of logits, or of hidden states where a
    model has no logits; the hidden states of all layers, (tokens, width) each, if they were asked for; the number of
    the text of each row (items,), in its batch, where intervals are."""

    rows: Tensor
    are_logits: bool
    hidden: tuple[Tensor, ...] = ()
    texts: Tensor | None = None


def answer_of(output: Any) -> tuple[Tensor, bool]:
    """Return the logits of a model's output, or its last hidden states, and whether it was logits. Raises E-DATA for a
    model that gives neither."""
    logits = getattr(output, "logits", None)
    value = logits if logits is not None else getattr(output, "last_hidden_state", None)
    if value is None:
        raise DataError("the model gives neither logits nor hidden states")
    return value, logits is not None


def masked_rows(value: Tensor, masks: Iterable[Any]) -> Tensor:
    """Return `value` (..., n) as rows (items, n), of the places that the first mask of its shape keeps."""
    for mask in masks:
        if isinstance(mask, Tensor) and mask.shape == value.shape[:-1]:
            return value[mask.bool()]
    return value.reshape(-1, value.shape[-1])


def row_distances(teacher: Tensor, student: Tensor, are_logits: bool) -> tuple[Tensor, Tensor]:
    """Return of each row (items, n), float32, how far the student's answer is from the teacher's (items,), KL in nats
    or relative squared error, and whether the first choices are the same (items,), false of hidden states."""
    if are_logits:
        agreed = teacher.argmax(-1) == student.argmax(-1)
        p, q = teacher.log_softmax(-1), student.log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1), agreed
    error = (teacher - student).square().sum(-1) / teacher.square().sum(-1).clamp(min=TINY)
    return error, torch.zeros_like(error, dtype=torch.bool)


@dataclass
class AnswerSums:
    """Sums over items: distance of the answers, equal first choices, squared errors of hidden states by layer; and the
    distance of each text, where the teacher's outputs say which is whose."""

    items: int = 0
    distance: float = 0.0
    agreed: int = 0
    tokens: int = 0
    hidden: list[float] | None = None
    are_logits: bool = True
    of_texts: list[float] = field(default_factory=list)

    @torch.no_grad()
    def add(self, teacher: Outputs, student: Outputs) -> None:
        """Count a batch: KL of the logits in nats, or the relative squared error of hidden states."""
        self.items += len(teacher.rows)
        self.are_logits = teacher.are_logits
        step = max(1, _CHUNK // max(1, teacher.rows.shape[-1]))
        count = 0 if teacher.texts is None or not len(teacher.rows) else int(teacher.texts.max()) + 1
        by_text = torch.zeros(count, dtype=torch.float64)
        for start in range(0, len(teacher.rows), step):
            p, q = (outputs.rows[start : start + step].float() for outputs in (teacher, student))
            distance, agreed = row_distances(p, q, teacher.are_logits)
            self.agreed += int(agreed.sum())
            self.distance += float(distance.double().sum())
            if teacher.texts is not None:
                by_text.index_add_(0, teacher.texts[start : start + step].cpu(), distance.double().cpu())
        self.of_texts += by_text.tolist()
        errors = [
            float((one.float() - other.float()).square().sum(-1).double().sum())
            for one, other in zip(teacher.hidden, student.hidden, strict=True)
        ]
        self.hidden = errors if self.hidden is None else [a + b for a, b in zip(self.hidden, errors, strict=True)]
        self.tokens += len(teacher.hidden[0]) if teacher.hidden else 0

    @property
    def mean(self) -> float:
        """The mean distance of an item."""
        return self.distance / max(1, self.items)

    @property
    def agreement(self) -> float:
        """The share of items with the same first choice."""
        return self.agreed / max(1, self.items)

    @property
    def sizes(self) -> tuple[float, ...]:
        """The mean squared error of each layer's hidden states."""
        return tuple(error / max(1, self.tokens) for error in self.hidden or ())

    def answers(self, base: AnswerSums) -> Answers:
        """Return these answers beside those of the base without updates."""
        own, of_base = (self.agreement, base.agreement) if self.are_logits else (None, None)
        kind = "KL" if self.are_logits else "hidden states"
        return Answers(kind, self.items, self.mean, base.mean, own, of_base, self._interval(base))

    def _interval(self, base: AnswerSums) -> tuple[float, float] | None:
        """The 95 % interval of the share that is closed; None where too few texts would say it."""
        if len(self.of_texts) < FEWEST or not base.distance:
            return None
        return intervals.share(np.array(self.of_texts), np.array(base.of_texts), one_minus=True)[1:]
