"""The numbers of one adapter on a live model: parameters that the methods' own `expand` reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lrconvert.lora.adapter import CompactAdapter, LoraAdapter, Target
from lrconvert.methods import base as methods

Adapter = LoraAdapter | CompactAdapter


class AttachedAdapter(nn.Module):
    """The numbers of one adapter: parameters, and for a compact form that is trained, its codes and indices as buffers.

    `factors(which)` gives A (r, in) and B (out, r) of a target; the update is ``scale * B @ A``. A compact adapter that
    is not trained is expanded once. Where updates depend on the base (`needs_base`), `update_on` takes its place.
    """

    def __init__(self, adapter: Adapter, scale: float, dtype: torch.dtype, trainable: bool) -> None:
        super().__init__()
        self.scale = scale
        self.needs_base = methods.needs_base(adapter)
        self._form = adapter if isinstance(adapter, CompactAdapter) else None
        self._trained_form = self._form if trainable else None
        self._own_scales = [1.0] * len(targets_of(adapter))
        if self._trained_form is not None:
            self._register_payload(self._trained_form, dtype)
        elif isinstance(adapter, LoraAdapter):
            self._own_scales = [pair.scale for pair in adapter.targets]
            for n, pair in enumerate(adapter.targets):
                self._register_factors(n, torch.from_numpy(pair.A.copy()), torch.from_numpy(pair.B.copy()), dtype)
        else:
            for n, (_, a, b) in enumerate(methods.without_base(adapter, torch)):
                self._register_factors(n, a, b, dtype)
        self.requires_grad_(trainable)

    def extra_repr(self) -> str:
        form = "LoRA" if self._form is None else self._form.method
        return f"{form}, {len(self._own_scales)} targets, scale {self.scale:g}"

    def _register_factors(self, n: int, a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
        self.register_parameter(f"A_{n}", nn.Parameter(a.to(dtype)))
        self.register_parameter(f"B_{n}", nn.Parameter(b.to(dtype)))

    def _register_payload(self, compact: CompactAdapter, dtype: torch.dtype) -> None:
        """Register numbers of finite precision as parameters, codes and indices as buffers."""
        method = methods.get(compact.method)
        kinds = {spec.name: spec.kind for spec in method.specs(compact.config, compact.targets)}
        self._names = tuple(kinds)
        for name, value in methods.values(method, compact, torch).items():
            if kinds[name] in ("half", "single"):
                self.register_parameter(_attribute(name), nn.Parameter(value.to(dtype)))
            else:
                fixed = value if value.dtype == torch.int64 else value.to(dtype)
                self.register_buffer(_attribute(name), fixed, persistent=False)

    def factors(self, which: int) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r) of target number `which`."""
        if self._trained_form is None:
            return getattr(self, f"A_{which}"), getattr(self, f"B_{which}")
        method, form = methods.get(self._trained_form.method), self._trained_form
        values = {name: getattr(self, _attribute(name)) for name in self._names}
        a, b = method.expand(form.config, form.targets, values, which, torch)
        return a, b

    def update_on(self, which: int, weight: Tensor) -> Tensor:
        """Return the update (out, in) of a target on the base's `weight` (out, in), without `factor_of`."""
        assert self._form is not None
        method, form = methods.get(self._form.method), self._form
        update: Tensor = method.rows_on(form.config, form.targets, which, self.factors(which), weight, 0)
        return update

    def factor_of(self, which: int) -> float:
        """Return what B @ A is multiplied with."""
        return self.scale * self._own_scales[which]


def _attribute(name: str) -> str:
    """The name of a payload tensor as torch takes it, apart from those of modules."""
    return f"_{name.replace('.', '__')}"


def targets_of(adapter: Adapter) -> tuple[Target, ...]:
    """Return the targets of a LoRA or of a compact adapter."""
    return adapter.shapes() if isinstance(adapter, LoraAdapter) else adapter.targets


@dataclass(frozen=True, eq=False)
class Update:
    """The update of one target by one adapter; `magnitude` (out,) or `input_magnitude` (in,) for DoRA, `bias` of its
    LoRA (out,)."""

    name: str
    source: AttachedAdapter
    which: int
    target: Target
    magnitude: Tensor | None = None
    input_magnitude: Tensor | None = None
    bias: Tensor | None = None
