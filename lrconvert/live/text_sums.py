"""Measures of answers, row by row and summed over each text, which intervals are drawn from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lrconvert.core.dtypes import F64
from lrconvert.formats.fidelity import Interval, Scores
from lrconvert.live import intervals
from lrconvert.live.texts import IGNORED

TINY = 1e-30


def row_distances(teacher: Tensor, student: Tensor, are_logits: bool) -> tuple[Tensor, Tensor]:
    """Return of each row (items, n), float32, how far the student's answer is from the teacher's (items,), KL in nats
    or relative squared error, and whether the first choices are the same (items,), false of hidden states."""
    if are_logits:
        agreed = teacher.argmax(-1) == student.argmax(-1)
        p, q = teacher.log_softmax(-1), student.log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1), agreed
    error = (teacher - student).square().sum(-1) / teacher.square().sum(-1).clamp(min=TINY)
    return error, torch.zeros_like(error, dtype=torch.bool)


def row_values(teacher: Tensor, student: Tensor, are_logits: bool, labels: Tensor | None) -> dict[str, Tensor]:
    """Return what a student's rows (items, n), float32, are worth by its names, (items,) each: ``distance`` and
    ``agreed`` of `row_distances`; where rows have a right answer, of `labels` (items,), ``labelled`` and ``correct``,
    and their ``loss`` in nats, zero where they have none."""
    distance, agreed = row_distances(teacher, student, are_logits)
    values = {"items": torch.ones_like(distance), "distance": distance, "agreed": agreed}
    if labels is None:
        nothing = torch.zeros(len(student), device=student.device)
        return values | dict.fromkeys(("labelled", "loss", "correct"), nothing)
    known = labels != IGNORED
    loss = F.cross_entropy(student, labels, reduction="none", ignore_index=IGNORED)
    return values | {"labelled": known, "loss": loss, "correct": known & (student.argmax(-1) == labels)}


@dataclass
class TextSums:
    """Sums of one adapter's `row_values` over the rows of each text, text after text."""

    parts: dict[str, list[F64]] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(map(len, self.parts.get("items", ())))

    def of(self, name: str) -> F64:
        """Return one sum of each text (texts,)."""
        return np.concatenate(self.parts[name])

    def add(self, values: Mapping[str, Tensor], owners: Tensor, texts: int) -> None:
        """Count the rows of a batch of `texts`; `owners` (items,) says which of them each row is of."""
        for name, value in values.items():
            total = torch.zeros(texts, dtype=torch.float64, device=value.device)
            total.index_add_(0, owners.to(value.device), value.double())
            self.parts.setdefault(name, []).append(total.cpu().numpy())


def share(over: F64, under: F64, *, one_minus: bool = False) -> Interval:
    """Return `intervals.share` as an `Interval`."""
    return Interval(*intervals.share(over, under, one_minus=one_minus))


def scores(name: str, base: TextSums, lora: TextSums, file: TextSums) -> Scores:
    """Return a score, ``loss`` or ``correct``, of base, LoRA and file, over what is labelled."""
    of, labelled = [sums.of(name) for sums in (base, lora, file)], base.of("labelled")
    return Scores(*(share(values, labelled) for values in (*of, of[2] - of[1])))
