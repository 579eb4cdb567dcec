"""What each component of a LoRA does for a model's answers: the ablation of AB-LoRA (arXiv 2403.16187), and its slopes.

Every row of A with its column of B is a component behind a gate g. S(g) is minus the cross-entropy of the answers, in
nats per item: of the labels of a batch if it has them, of the texts' own next tokens for decoders, else of the LoRA
model's own first choices. The score of a component r of the model M is

    IS(r) = S(M) - S(M without r) + S(M with only r) - S(base)

The paper's has no last term, which is the same for all; with it a component that does nothing scores 0, and scores
may be divided by what components cost. Its first order is dS/dg(r) at the gates of M plus that at all gates 0: two
backward passes for all components instead of two forward passes for each.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrconvert.core.dtypes import F64, Array
from lrconvert.core.errors import DataError
from lrconvert.live import attach, load_model
from lrconvert.live.layer_inputs import Batch
from lrconvert.lora.adapter import LoraAdapter

_NAME = "ablated"
_IGNORED = -100  # the label of what is no item, as in torch


@dataclass(frozen=True, eq=False)
class _Question:
    """The inputs of the model, and the right answers: classes (...), `_IGNORED` where there is none, in the shape of
    its logits less their last dimension."""

    given: Mapping[str, Any]
    answers: Tensor


@dataclass(eq=False)
class Trial:
    """A model with a LoRA's components behind gates (components,), targets in the LoRA's order: true or 1 is open,
    false or 0 is closed. What was measured is remembered."""

    model: nn.Module
    rows: list[Tensor]  # the A of each target as a parameter (r, in)
    full: list[Tensor]  # and with all gates open
    questions: list[_Question]
    items: int
    seconds: float = 0.0  # of a forward pass over all questions
    left_out: int = 0  # questions, for want of time
    _known: dict[bytes, float] = field(default_factory=dict)

    def score(self, gates: Array) -> float:
        """S at these gates. Raises E-DATA if it is NaN or infinite."""
        key = gates.tobytes()
        if key not in self._known:
            self._set(gates)
            with torch.no_grad():
                self._known[key] = -self._mean(float(self._loss(q)) for q in self.questions)
        return self._known[key]

    def ablation(self, gates: Array, which: int) -> float:
        """IS of one component: what it does beside the others that are open at `gates` (bool), and alone."""
        one = np.arange(len(gates)) == which
        alone = self.score(one) - self.score(np.zeros_like(one))
        return self.score(gates) - self.score(gates & ~one) + alone

    def slopes(self, gates: Array) -> F64:
        """dS/dg of every component at these gates (components,), of closed ones too."""
        self._set(gates)
        total = [torch.zeros(len(row), dtype=torch.float64, device=row.device) for row in self.rows]

        def losses() -> Iterator[float]:
            for question in self.questions:
                loss = self._loss(question)
                gradients = torch.autograd.grad(loss, self.rows, allow_unused=True)
                for into, gradient, row in zip(total, gradients, self.full, strict=True):
                    if gradient is not None:  # an expert that no token went to, a layer that is not used
                        into.sub_((gradient.double() * row.double()).sum(1))
                yield float(loss.detach())

        self._known[gates.tobytes()] = -self._mean(losses())
        slopes: F64 = torch.cat([part.cpu() for part in total]).numpy() / self.items
        if not np.isfinite(slopes).all():
            raise _not_finite("a gradient")
        return slopes

    def _mean(self, losses: Iterable[float]) -> float:
        mean = sum(losses) / self.items
        if not np.isfinite(mean):
            raise _not_finite("the loss")
        return mean

    def _set(self, gates: Array) -> None:
        at = 0
        with torch.no_grad():
            for row, full in zip(self.rows, self.full, strict=True):
                part = torch.from_numpy(np.ascontiguousarray(gates[at : at + len(row)]))
                row.copy_(full * part.to(full)[:, None])
                at += len(row)

    def _loss(self, question: _Question) -> Tensor:
        """The summed cross-entropy of the answers, float32."""
        has_answer = question.answers != _IGNORED
        rows = _logits(self.model, question.given)[has_answer]
        return F.cross_entropy(
            rows if rows.dtype == torch.float64 else rows.float(), question.answers[has_answer], reduction="sum"
        )


def _not_finite(what: str) -> DataError:
    return DataError(f"{what} of the model on the data is NaN or infinite", fix="try float32, or other data")


@contextmanager
def on_trial(
    model: nn.Module, lora: LoraAdapter, batches: Iterable[Batch], seconds: float = math.inf
) -> Iterator[Trial]:
    """While the context lasts `lora` is on the model with its components behind gates, all open at first. Afterwards
    the model is as it was. Of the batches as many are used as a forward pass over them takes `seconds`. What the LoRA
    carries besides (heads, biases, magnitudes) is there at all gates, and so are adapters that are active on the model
    already.

    Raises E-DATA for data without an answer or a model without logits, E-ATTACH, E-BASE, E-PLACE.
    """
    device, dtype = next((p.device, p.dtype) for p in model.parameters())
    training = [module for module in model.modules() if module.training]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    source = attach.attach(model, lora, name=_NAME, dtype=wide, trainable=True)
    try:
        model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        rows = []
        for n in range(len(lora.targets)):
            a, b = source.factors(n)
            b.requires_grad_(False)
            rows.append(a)
        moved = [{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()} for batch in batches]
        questions: list[_Question] = []
        start = time.monotonic()
        with torch.no_grad():
            for batch in moved:
                if questions and time.monotonic() - start > seconds:
                    break
                questions.append(_question(model, batch))
        taken = time.monotonic() - start
        items = sum(int((q.answers != _IGNORED).sum()) for q in questions)
        if items == 0:
            raise DataError("there is no answer to score", fix="is the data empty?")
        full = [row.detach().clone() for row in rows]
        yield Trial(model, rows, full, questions, items, taken, len(moved) - len(questions))
    finally:
        attach.detach(model, _NAME)
        for parameter in trained:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


def _logits(model: nn.Module, given: Mapping[str, Any]) -> Tensor:
    logits = getattr(model(**given), "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[-1] < 2:
        raise DataError(
            "the model gives no logits of several classes", fix="load it with the class of its task, as AutoModelFor..."
        )
    return logits


def _question(model: nn.Module, batch: Batch) -> _Question:
    """The answers that a batch asks for. Raises E-DATA for labels that are no classes of the model."""
    kind, labels, ids, mask = (
        load_model.kind_of(model),
        *(batch.get(k) for k in ("labels", "input_ids", "attention_mask")),
    )
    # The model's own loss is not needed; but an encoder-decoder reads what it is to write from its labels.
    given = {k: v for k, v in batch.items() if k != "labels" or kind == "encoder-decoder"}
    logits = _logits(model, given)
    shape, classes = logits.shape[:-1], logits.shape[-1]
    if labels is None and kind == "decoder" and isinstance(ids, Tensor):
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        labels = ids.masked_fill(~real, _IGNORED)
        labels = labels.masked_fill(~_before(real), _IGNORED)  # the first token of a padded text follows nothing
    if labels is None:
        answers = logits.argmax(-1)
        if isinstance(mask, Tensor) and mask.shape == shape:
            answers = answers.masked_fill(~mask.bool(), _IGNORED)
        return _Question(given, answers)
    if kind == "decoder" and labels.shape == shape:
        answers = torch.full_like(labels, _IGNORED)
        answers[:, :-1] = labels[:, 1:]
    else:
        answers = labels
    known = answers[answers != _IGNORED]
    if (
        answers.shape != shape
        or answers.is_floating_point()
        or (len(known) and not 0 <= known.min() <= known.max() < classes)
    ):
        raise DataError(f"labels of shape {list(labels.shape)} are no classes of logits of shape {list(logits.shape)}")
    return _Question(given, answers.long())


def _before(real: Tensor) -> Tensor:
    """Mark the tokens that follow a real one."""
    found = torch.zeros_like(real)
    found[:, 1:] = real[:, :-1]
    return found
