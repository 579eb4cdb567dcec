"""Answers of models as rows, and the distance between those of two."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lrconvert.core.errors import DataError
from lrconvert.formats.fidelity import FEWEST, Answers
from lrconvert.live.text_sums import TextSums, row_values, scores, share

_CHUNK = 1 << 24  # logits that are compared at once


@dataclass(frozen=True, eq=False)
class Outputs:
    """Answers of a model at the places that count: `rows` (items, classes) of logits, or of hidden states where a
    model has no logits; the hidden states of all layers, (tokens, width) each, if they were asked for; the number of
    the text of each row (items,), in its batch, where intervals are, and the right answers (items,), where rows have
    some."""

    rows: Tensor
    are_logits: bool
    hidden: tuple[Tensor, ...] = ()
    texts: Tensor | None = None
    labels: Tensor | None = None


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


@dataclass
class AnswerSums:
    """Sums over items: distance of the answers, equal first choices, squared errors of hidden states by layer; and
    those of each text, where the teacher's outputs say which is whose."""

    items: int = 0
    distance: float = 0.0
    agreed: int = 0
    tokens: int = 0
    hidden: list[float] | None = None
    are_logits: bool = True
    are_classes: bool = False
    by_text: TextSums = field(default_factory=TextSums)

    @torch.no_grad()
    def add(self, teacher: Outputs, student: Outputs) -> None:
        """Count a batch: KL of the logits in nats, or the relative squared error of hidden states."""
        self.items += len(teacher.rows)
        self.are_logits = teacher.are_logits
        step = max(1, _CHUNK // max(1, teacher.rows.shape[-1]))
        rows: dict[str, list[Tensor]] = {}
        for start in range(0, len(teacher.rows), step):
            part = slice(start, start + step)
            p, q = (outputs.rows[part].float() for outputs in (teacher, student))
            labels = None if teacher.labels is None else teacher.labels[part]
            values = row_values(p, q, teacher.are_logits, labels)
            self.agreed += int(values["agreed"].sum())
            self.distance += float(values["distance"].double().sum())
            for name, value in values.items() if teacher.texts is not None else ():
                rows.setdefault(name, []).append(value)
        if teacher.texts is not None and rows:
            count = int(teacher.texts.max()) + 1
            self.by_text.add({name: torch.cat(pieces) for name, pieces in rows.items()}, teacher.texts, count)
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

    def answers(self, base: AnswerSums, lora: AnswerSums | None = None) -> Answers:
        """Return these answers beside those of the base without updates; with the LoRA's own, where places have right
        answers, the loss of all three, too, and their accuracy if `lora.are_classes`."""
        own, of_base = (self.agreement, base.agreement) if self.are_logits else (None, None)
        kind = "KL" if self.are_logits else "hidden states"
        answers = Answers(kind, self.items, self.mean, base.mean, own, of_base)
        if not len(self.by_text):
            return answers
        if lora is not None and self.are_logits and base.by_text.of("labelled").any():
            three = base.by_text, lora.by_text, self.by_text
            answers = replace(answers, loss=scores("loss", *three))
            if lora.are_classes:
                answers = replace(answers, accuracy=scores("correct", *three))
        if len(self.by_text) < FEWEST:
            return answers
        measures = {
            f"{of}{name}": share(sums.by_text.of(key), sums.by_text.of("items"))
            for of, sums in (("", self), ("base_", base))
            for name, key in (("distance", "distance"), ("agreement", "agreed"))
            if key == "distance" or self.are_logits
        }
        closed = None
        if base.distance:
            closed = share(self.by_text.of("distance"), base.by_text.of("distance"), one_minus=True)
        return replace(
            answers,
            interval=None if closed is None else (closed.low, closed.high),
            intervals={name: (one.low, one.high) for name, one in measures.items()},
        )
