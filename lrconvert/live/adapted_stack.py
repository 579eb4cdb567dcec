"""Stacks of experts of a live model that compute with updates: those of all experts are one grouped product.

A stack is a parameter without a layer of its own, so its updates are added to it as it is used, as PEFT does: once in
each pass through the module that holds it, however often this asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrconvert.live.adapted_layer import ActiveAdapters, dense_update
from lrconvert.live.attached_adapter import Update


class AdaptedParameter(nn.Module):
    """A parametrization: a stack of experts, or a matrix, with the updates of the active adapters."""

    def __init__(self, active: ActiveAdapters) -> None:
        super().__init__()
        self.updates: dict[str, list[Update]] = {}  # by the name of the adapter
        self.active = active
        self._frozen: dict[str, tuple[Any, Tensor, Tensor]] = {}  # factors that do not change, stacked
        self._computed: list[Tensor] = []  # what the module that is being passed asked for before
        self._is_passed = False
        self._hooks: tuple[Any, ...] = ()

    def watch(self, owner: nn.Module) -> None:
        """Compute once in each pass through `owner`."""
        self._hooks = (
            owner.register_forward_pre_hook(self._enter),
            owner.register_forward_hook(self._leave, always_call=True),
        )

    def remove(self, name: str) -> None:
        """Take the updates of an adapter off."""
        self.updates.pop(name, None)
        self._frozen.pop(name, None)

    def unwatch(self) -> None:
        """Take the hooks off the module that is watched."""
        for hook in self._hooks:
            hook.remove()

    def forget(self) -> None:
        """Compute again what is asked for next, and each time until the next pass."""
        self._computed, self._is_passed = [], False

    def _enter(self, owner: nn.Module, arguments: Any) -> None:
        self._computed, self._is_passed = [], True

    def _leave(self, owner: nn.Module, arguments: Any, output: Any) -> None:
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_frozen": {}, "_computed": [], "_is_passed": False}

    def forward(self, weight: Tensor) -> Tensor:
        if self._computed:
            return self._computed[0]
        own = weight
        for name, updates in self.updates.items():
            if name in self.active.names:
                weight = self._with_updates(name, updates, own, weight)
        if self._is_passed:
            self._computed = [weight]
        return weight

    def _with_updates(self, name: str, updates: Sequence[Update], own: Tensor, weight: Tensor) -> Tensor:
        """Return `weight` with the updates of one adapter on the base's parameter `own`."""
        if not updates[0].target.view.kind.startswith("expert"):
            for update in updates:
                delta = dense_update(update, own)
                turned = delta.T if update.target.view.kind == "transposed" else delta.reshape(weight.shape)
                weight = weight + turned.to(weight.dtype)
            return weight
        if updates[0].source.needs_base:
            changes = {_expert(update): dense_update(update, own) for update in updates}
            change = _stacked(changes, len(weight)).to(weight.dtype)
            return weight + (change if updates[0].target.view.kind == "expert" else change.mT)
        left, right = self._factors(name, updates, weight)
        with torch.autocast(weight.device.type, enabled=False):  # a parametrization keeps the dtype
            return torch.baddbmm(weight, left, right)

    def _factors(self, name: str, updates: Sequence[Update], weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return all updates of one adapter as ``left @ right``, (experts, rows, rank) and (experts, rank, columns);
        of factors that do not change, those of the pass before."""
        factors = [update.source.factors(update.which) for update in updates]
        numbers = [number for pair in factors for number in pair]
        if torch.compiler.is_compiling() or not all(type(n) is nn.Parameter and not n.requires_grad for n in numbers):
            self._frozen.pop(name, None)
            return _grouped(updates, factors, weight)
        state = (weight.dtype, weight.device, updates[0].source.scale, [(n.data_ptr(), _version(n)) for n in numbers])
        if name not in self._frozen or self._frozen[name][0] != state:
            self._frozen[name] = (state, *_grouped(updates, factors, weight))
        return self._frozen[name][1:]


def _version(number: Tensor) -> int:
    """Return how often a tensor was written to."""
    return 0 if number.is_inference() else number._version


def _grouped(
    updates: Sequence[Update], factors: Sequence[tuple[Tensor, Tensor]], weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The updates of one adapter in the layout of the stack `weight`, zero for experts that have none."""
    rank = max(len(a) for a, _ in factors)
    ins, outs = {}, {}
    for update, (a, b) in zip(updates, factors, strict=True):
        missing = rank - len(a)
        expert = _expert(update)
        ins[expert] = F.pad(a, (0, 0, 0, missing)) if missing else a
        scaled = b * update.source.factor_of(update.which)
        outs[expert] = F.pad(scaled, (0, missing)) if missing else scaled
    right, left = _stacked(ins, len(weight)).to(weight.dtype), _stacked(outs, len(weight)).to(weight.dtype)
    if updates[0].target.view.kind == "expert":
        return left, right
    return right.mT, left.mT


def _stacked(entries: dict[int, Tensor], count: int) -> Tensor:
    """Entries of experts, of one shape, as a stack of `count`; zero where there is none."""
    none = torch.zeros_like(next(iter(entries.values())))
    return torch.stack([entries.get(expert, none) for expert in range(count)])


def _expert(update: Update) -> int:
    """The number of the expert that an update is for."""
    return int(update.target.view.text.rpartition(":")[2])
