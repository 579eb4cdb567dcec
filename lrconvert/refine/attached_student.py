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
from lrconvert.refine import rate

NAME = "student"
_HEAD_RATE = 0.01


class AttachedStudent:
    """`compact` on `model` under the name "student", all of it and with `train_heads` its heads in training. `teacher`
    has the targets of `compact`, in their order."""

    def __init__(self, model: nn.Module, compact: CompactAdapter, teacher: LoraAdapter, train_heads: bool) -> None:
        self.source = attach.attach(model, compact, name=NAME)
        self.source.requires_grad_(True)
        self.teacher, self.device = teacher, next(iter(model.parameters())).device
        self._budget = rate.budget_of(compact)
        self.student = self._trainable(compact)
        replaced = attach.replaced(model, NAME, compact.extras) if train_heads else []
        self.heads = [_Head(extra, parameter) for extra, parameter in replaced if extra.dtype in FLOATS]
        self._factors: list[tuple[Tensor, Tensor]] = []

    def _trainable(self, compact: CompactAdapter) -> TrainableAdapter:
        student = methods.get(compact.method).student(compact).to(self.device)
        student.warm_start_latents(self.teacher.targets)
        student.keep_within(self._budget)
        return student

    def restart_from(self, compact: CompactAdapter) -> None:
        """Go on from `compact`, of the same form."""
        self.student = self._trainable(compact)
        extras = {extra.name: extra for extra in compact.extras}
        for head in self.heads:
            head.restart_from(extras[head.extra.name])

    def groups(self) -> list[dict[str, Any]]:
        """Return parameter groups with their highest rates, before any multiple."""
        return [*self.student.groups(), *({"params": [head.latent], "lr": _HEAD_RATE} for head in self.heads)]

    def parameters(self) -> list[nn.Parameter]:
        """Return all latents that are trained."""
        return [p for group in self.groups() for p in group["params"]]

    def update_model(self, training: bool) -> None:
        """Give the model the factors of the present latents. With `training`, `collect_gradients` may follow."""
        with torch.set_grad_enabled(training):
            self._factors = self.student.all_factors(self.student.values(training))
        with torch.no_grad():
            for n, factors in enumerate(self._factors):
                for leaf, factor in zip(self.source.factors(n), factors, strict=True):
                    leaf.grad = None
                    if leaf.shape == factor.shape:
                        leaf.copy_(factor)
                    else:  # as many components as there are now
                        leaf.data = factor.detach().to(leaf.dtype, copy=True)
            for head in self.heads:
                head.update_model()
        if not training:
            self._factors = []

    def collect_gradients(self) -> None:
        """Add to the gradients of the latents those that the model's factors have gained since `update_model`."""
        pairs = [
            (factor, leaf.grad)
            for n, factors in enumerate(self._factors)
            for leaf, factor in zip(self.source.factors(n), factors, strict=True)
            if factor.requires_grad and leaf.grad is not None  # some factors are fixed; an expert may have no tokens
        ]
        if pairs:
            torch.autograd.backward([f for f, _ in pairs], [g for _, g in pairs])
        for head in self.heads:
            head.collect_gradients()
        self._factors = []
        for parameter in self.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def own_gradients(self) -> float:
        """Add to the gradients what the adapter itself adds to the loss of a step, and return that."""
        term = self.student.own_loss()
        if term is None:
            return 0.0
        term.backward()  # type: ignore[no-untyped-call]
        return float(term.detach())

    def compact(self) -> CompactAdapter:
        """Return the adapter with the numbers that the model computes with."""
        heads = {head.extra.name: head.stored() for head in self.heads}
        compact = self.student.compact()
        return replace(compact, extras=tuple(heads.get(extra.name, extra) for extra in compact.extras))

    def state(self) -> dict[str, Tensor]:
        """Return all latents with their units, by the names that checkpoints use."""
        heads = {f"head.{n}": head.latent.data for n, head in enumerate(self.heads)}
        return {**{f"student.{k}": v for k, v in self.student.state_dict().items()}, **heads}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Take the latents of a `state`."""
        for name, value in self.state().items():
            value.copy_(state[name].reshape(value.shape))


class _Head:
    """A tensor that takes the place of a parameter, in training: kept in float32, used as it will be stored."""

    def __init__(self, extra: ExtraTensor, parameter: nn.Parameter) -> None:
        self.extra, self.parameter = extra, parameter
        parameter.requires_grad_(True)
        self.latent = nn.Parameter(torch.empty(0))
        self.restart_from(extra)

    def restart_from(self, extra: ExtraTensor) -> None:
        values = decode(np.frombuffer(extra.data, STORAGE[extra.dtype]).reshape(extra.shape), extra.dtype)
        value = torch.from_numpy(values.astype(np.float32)).to(self.parameter.device)
        self.unit = unit_of(value, each=False)
        self.latent.data = value / self.unit

    def _rounded(self) -> Any:
        return round_to((self.latent.data * self.unit).cpu().numpy(), self.extra.dtype)

    def update_model(self) -> None:
        value = torch.from_numpy(decode(self._rounded(), self.extra.dtype).astype(np.float32))
        self.parameter.data.copy_(value)
        self.parameter.grad = None

    def collect_gradients(self) -> None:
        if self.parameter.grad is not None:
            self.latent.grad = self.parameter.grad.float() * self.unit

    def stored(self) -> ExtraTensor:
        return replace(self.extra, data=np.ascontiguousarray(self._rounded(), STORAGE[self.extra.dtype]).tobytes())
