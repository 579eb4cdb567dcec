"""A student on a live model.

The model computes with plain factors, as with any LoRA; once a step they are made from the student's latents, and their
gradients go back through the method's formula and the quantizers. So a step costs the model what a LoRA costs it,
whatever the form, and any number of batches share one expansion.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lrconvert.core.dtypes import FLOATS, STORAGE, decode, round_to
from lrconvert.live import attach
from lrconvert.lora.adapter import CompactAdapter, ExtraTensor, LoraAdapter
from lrconvert.lora.trainable import TrainableAdapter, unit_of
from lrconvert.methods import base as methods

NAME = "student"
_HEAD_RATE = 0.01


class AttachedStudent:
    """`compact` on `model` under the name "student", all of it and with `train_heads` its heads in training. `teacher`
    has the targets of `compact`, in their order."""

    def __init__(self, model: nn.Module, compact: CompactAdapter, teacher: LoraAdapter, train_heads: bool) -> None:
        self.source = attach.attach(model, compact, name=NAME)
        self.source.requires_grad_(True)
        self.teacher, self.device = teacher, next(iter(model.parameters())).device
        self.student = self._student(compact)
        self.targets = len(compact.targets)
        self.heads = [_Head(e, p) for e, p in attach.replaced(model, NAME, compact.extras) if e.dtype in FLOATS]
        self.heads = self.heads if train_heads else []
        self._made: list[tuple[Tensor, Tensor]] = []

    def _student(self, compact: CompactAdapter) -> TrainableAdapter:
        found = methods.get(compact.method).student(compact).to(self.device)
        found.warm_start_latents(self.teacher.targets)
        return found

    def take(self, compact: CompactAdapter) -> None:
        """Go on from `compact`, of the same form."""
        self.student = self._student(compact)
        extras = {extra.name: extra for extra in compact.extras}
        for head in self.heads:
            head.take(extras[head.extra.name])

    def groups(self, lr: float) -> list[dict[str, Any]]:
        """Parameter groups with their highest rates."""
        groups = [*self.student.groups(), *({"params": [head.moving], "lr": _HEAD_RATE} for head in self.heads)]
        return [{**group, "lr": group["lr"] * lr} for group in groups]

    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.groups(1.0) for p in group["params"]]

    def show(self, training: bool) -> None:
        """Give the model the factors of the present latents. With `training`, `learn` may follow."""
        with torch.set_grad_enabled(training):
            values = self.student.values()
            self._made = [self.student.factors(values, n) for n in range(self.targets)]
        with torch.no_grad():
            for n, made in enumerate(self._made):
                for leaf, factor in zip(self.source.factors(n), made, strict=True):
                    leaf.copy_(factor)
                    leaf.grad = None
            for head in self.heads:
                head.show()
        if not training:
            self._made = []

    def learn(self) -> None:
        """Add to the gradients of the latents what the factors have gathered since `show`."""
        pairs = [
            (factor, leaf.grad)
            for n, made in enumerate(self._made)
            for leaf, factor in zip(self.source.factors(n), made, strict=True)
            if factor.requires_grad and leaf.grad is not None  # some factors are fixed; an expert may have no tokens
        ]
        if pairs:
            torch.autograd.backward([f for f, _ in pairs], [g for _, g in pairs])
        for head in self.heads:
            head.learn()
        self._made = []
        for parameter in self.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def compact(self) -> CompactAdapter:
        """The adapter with the numbers that the model computes with."""
        heads = {head.extra.name: head.stored() for head in self.heads}
        found = self.student.compact()
        return replace(found, extras=tuple(heads.get(extra.name, extra) for extra in found.extras))

    def state(self) -> dict[str, Tensor]:
        heads = {f"head.{n}": head.moving.data for n, head in enumerate(self.heads)}
        return {**{f"student.{k}": v for k, v in self.student.state_dict().items()}, **heads}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        for name, value in self.state().items():
            value.copy_(state[name].reshape(value.shape))


class _Head:
    """A tensor that takes the place of a parameter, in training: kept in float32, shown as it will be stored."""

    def __init__(self, extra: ExtraTensor, parameter: nn.Parameter) -> None:
        self.extra, self.parameter = extra, parameter
        parameter.requires_grad_(True)
        self.moving = nn.Parameter(torch.empty(0))
        self.take(extra)

    def take(self, extra: ExtraTensor) -> None:
        values = decode(np.frombuffer(extra.data, STORAGE[extra.dtype]).reshape(extra.shape), extra.dtype)
        value = torch.from_numpy(values.astype(np.float32)).to(self.parameter.device)
        self.unit = unit_of(value, each=False)
        self.moving.data = value / self.unit

    def _rounded(self) -> Any:
        return round_to((self.moving.data * self.unit).cpu().numpy(), self.extra.dtype)

    def show(self) -> None:
        value = torch.from_numpy(decode(self._rounded(), self.extra.dtype).astype(np.float32))
        self.parameter.data.copy_(value)
        self.parameter.grad = None

    def learn(self) -> None:
        if self.parameter.grad is not None:
            self.moving.grad = self.parameter.grad.float() * self.unit

    def stored(self) -> ExtraTensor:
        return replace(self.extra, data=np.ascontiguousarray(self._rounded(), STORAGE[self.extra.dtype]).tobytes())
