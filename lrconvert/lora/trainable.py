"""Trainable adapters: the payload of a compact adapter as latents, with the quantizers in the loop.

A trainable adapter holds every number of a payload as a latent. It expands to the numbers that a file would hold for
these latents (`fake_quant`), so that the same update is trained, measured and written. How latents move follows from
the kind of a tensor in `packing`:

``code``    a number in code units, stored as the nearest odd integer
``half``    a number, stored as fp16 times the tensor's power of two
``single``  a number, stored as it is
``index``   fixed, unless the method names it as numbers (codes too wide for bytes) or has its own trainable form

Latents are kept in units of their own size (a power of two, so that nothing is rounded), which makes one rate mean the
same relative change everywhere: for codes and numbers the root mean square of the tensor; for scales each number's own
magnitude.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lrconvert.core.dtypes import Array
from lrconvert.lora import fake_quant
from lrconvert.lora.adapter import CompactAdapter, LoraTarget

_CELL = 63 / 64  # of the way to where the next code begins
_RANK = 1e-6  # of the largest: what is smaller is no direction of a factor
SCALES = ("scales", "gains", "base_scales")  # what numbers are multiplied with, in all methods


@dataclass(frozen=True)
class Rates:
    """The largest move of numbers in a step, as a share of their own size, by what they are."""

    codes: float = 0.1
    numbers: float = 0.02
    scales: float = 0.02
    latents: float = 0.05


class TrainableAdapter(nn.Module):
    """One compact adapter in training; `method` is its method (`methods.base.Method`). `numbers` names the index
    tensors that stand for numbers, n for ``2n + 1 - limit``.

    `values` gives what the method's ``expand`` takes, and `compact` the adapter with exactly these numbers. The two
    change with `parameters` only, which `groups` hands to an optimizer; call `clamp_latents` after each of its steps.
    """

    def __init__(self, method: Any, compact: CompactAdapter, rates: Rates, numbers: Sequence[str] = ()) -> None:
        super().__init__()
        self.method, self.source, self.rates, self.numbers = method, compact, rates, tuple(numbers)
        self.specs = {spec.name: spec for spec in method.specs(compact.config, compact.targets)}
        for name, spec in self.specs.items():
            array = compact.tensors[name]
            kind = self.kind(name)
            if kind == "index":
                self.register_buffer(_fixed(name), torch.from_numpy(array.astype(np.int64)))
                continue
            if kind == "code":
                bits = spec.width
                array = (array.astype(np.int64) * 2 + (1 - (1 << bits))).astype(np.float32)
            value = torch.from_numpy(np.ascontiguousarray(array, np.float32))
            unit = unit_of(value, each=name in SCALES)
            self.register_buffer(_unit(name), unit)
            self.register_parameter(_moving(name), nn.Parameter(value / unit))

    def kind(self, name: str) -> str:
        """Return ``code``, ``half``, ``single``, or ``index`` for a tensor that does not move."""
        return "code" if name in self.numbers else self.specs[name].kind

    def latent(self, name: str) -> Tensor:
        """Return the numbers of a tensor before they are rounded, in the units of `values`."""
        latent: Tensor = getattr(self, _moving(name)) * getattr(self, _unit(name))
        return latent

    def stored(self, name: str) -> Tensor:
        """Return the numbers of a tensor that moves as a file would hold them: codes as odd integers."""
        kind, latent = self.kind(name), self.latent(name)
        if kind == "code":
            return fake_quant.odd(latent, self.specs[name].width)
        return fake_quant.half(latent) if kind == "half" else latent

    def values(self, training: bool = False) -> dict[str, Tensor]:
        """Return the numbers that ``expand`` takes; to be computed once a step. In `training` they may be others that
        give the same update, with gradients for what a file does not hold yet."""
        values = {}
        for name, spec in self.specs.items():
            if self.kind(name) == "index":
                values[name] = getattr(self, _fixed(name))
            else:
                stored = self.stored(name)
                values[name] = (stored + (spec.limit - 1)) / 2 if name in self.numbers else stored
        return values

    def factors(self, values: Mapping[str, Tensor], which: int) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r) of a target, float32."""
        a, b = self.method.expand(self.source.config, self.source.targets, values, which, torch)
        return a, b

    def all_factors(self, values: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return the `factors` of all targets."""
        return [self.factors(values, which) for which in range(len(self.source.targets))]

    def groups(self) -> list[dict[str, Any]]:
        """Return parameter groups with their highest rates."""
        groups = []
        for name in self.specs:
            if self.kind(name) != "index":
                rate = self.rates.codes if self.kind(name) == "code" else self.rates.numbers
                rate = self.rates.scales if name in SCALES else rate
                groups.append({"params": [getattr(self, _moving(name))], "lr": rate})
        return groups

    def warm_start_latents(self, pairs: Sequence[LoraTarget]) -> None:
        """Move latents of codes towards the best numbers for the LoRA `pairs`, target by target, as far as what is
        stored stays the same: those that lie near to another code are then the first to reach it."""
        for name, spec in self.specs.items():
            if spec.kind == "code" and spec.bits < 8:
                shift = self.shift(name, pairs).clamp_(-_CELL, _CELL)
                with torch.no_grad():
                    getattr(self, _moving(name)).add_(shift / getattr(self, _unit(name)))

    def shift(self, name: str, pairs: Sequence[LoraTarget]) -> Tensor:
        """Return what to add to the numbers ``values()[name]`` so that each factor is the best one beside the other as
        it is: one step of least squares. Factors are affine in the numbers, and what two numbers do is taken
        to be orthogonal, which is so in all forms (mosaics, disjoint entries, Hadamard bases)."""
        fixed = {key: value.detach() for key, value in self.values().items()}
        numbers = fixed[name].clone().requires_grad_(True)
        signs = torch.where(torch.arange(numbers.numel(), device=numbers.device) * 7919 % 13 < 6, -1.0, 1.0)
        probe, zero = signs.view_as(numbers), torch.zeros_like(numbers)
        wanted, probed = torch.zeros_like(numbers), torch.zeros_like(numbers)
        for which, pair in enumerate(pairs):
            now = self.factors({**fixed, name: numbers}, which)
            if not now[0].shape[0] or not any(factor.requires_grad for factor in now):
                continue
            with torch.no_grad():
                ends = (self.factors({**fixed, name: x}, which) for x in (probe, zero))
                moves = [end - start for end, start in zip(*ends, strict=True)]
            errors = [(best - f.detach()).float() for best, f in zip(nearest_factors(pair, *now), now, strict=True)]
            for total, directions in ((wanted, errors), (probed, moves)):
                product = sum((f * d).sum() for f, d in zip(now, directions, strict=True))
                (gradient,) = torch.autograd.grad(product, numbers, retain_graph=True, allow_unused=True)
                if gradient is not None:
                    total += gradient
        squares = probed * probe
        return torch.where(squares > 0, wanted / squares, torch.zeros_like(wanted))

    def keep_within(self, budget: Any) -> None:
        """Hold what is written to a byte budget (`methods.base.Budget`) that it meets now; nothing for forms whose size
        does not change."""

    # --- what a form does beside its answers: all of this is nothing by default ---
    # What they remember (a multiplier, an average) is to be buffers: checkpoints and returns to an earlier point of a
    # training carry all of `state_dict`.

    def own_loss(self) -> Tensor | None:
        """Return what is added to the loss of each step, computed from the latents: a share as the loss is (1: what the
        base does without an adapter); None for nothing. Every process adds the same."""
        return None

    def stepped(self) -> None:
        """Take note of a step of the optimizer, after `clamp_latents`."""

    def notes(self) -> dict[str, float]:
        """Return what the log of a training says of this adapter after each step."""
        return {}

    def settle(self) -> None:
        """Move latents to where `compact` is what may be written: before each measurement on held-out data, whose best
        is the outcome. Training goes on from there."""

    @torch.no_grad()
    def clamp_latents(self) -> None:
        """Bring latents back to where a step can change what is stored."""
        for name, spec in self.specs.items():
            if self.kind(name) == "code":
                edge = float(1 << spec.width) / getattr(self, _unit(name))
                getattr(self, _moving(name)).clamp_(-edge, edge)

    @torch.no_grad()
    def tensors(self) -> dict[str, Array]:
        """Return the payload in the in-memory form of `packing`."""
        tensors: dict[str, Array] = {}
        for name, spec in self.specs.items():
            kind = self.kind(name)
            value = (getattr(self, _fixed(name)) if kind == "index" else self.stored(name)).cpu()
            if kind == "code":
                codes = (value.to(torch.int64) + ((1 << spec.width) - 1)) // 2
                tensors[name] = codes.numpy().astype(np.uint8 if spec.kind == "code" else np.uint32)
            elif kind == "index":
                tensors[name] = value.numpy().astype(np.uint32)
            else:
                tensors[name] = value.numpy() + np.float32(0)
        return tensors

    def compact(self) -> CompactAdapter:
        """Return the adapter with the numbers of `values`, in the one spelling that files have."""
        return replace(self.source, tensors=self.tensors())


def nearest_factors(pair: LoraTarget, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the A (r, in) nearest to the update of `pair` beside b, and the B (out, r) beside a, by least squares."""
    x, y = a.detach().double().cpu().numpy(), b.detach().double().cpu().numpy()
    left, right = pair.scale * pair.B.astype(np.float64), pair.A.astype(np.float64)
    best_a = np.linalg.lstsq(y.T @ y, (y.T @ left) @ right, rcond=_RANK)[0]
    best_b = np.linalg.lstsq(x @ x.T, (x @ right.T) @ left.T, rcond=_RANK)[0].T
    one, two = (torch.from_numpy(np.ascontiguousarray(f)).to(a) for f in (best_a, best_b))
    return one, two


def unit_of(value: Tensor, each: bool) -> Tensor:
    """Return the power of two next to the root mean square of `value` (), or to the magnitude of each number; 1 for
    zeros."""
    size = value.double().abs() if each else value.double().square().mean().sqrt()
    if each and size.numel():
        size = torch.maximum(size, size.amax() * 2.0**-12)  # what was zero may become something
    size = torch.where(size > 0, size, torch.ones_like(size))
    return torch.exp2(torch.log2(size).round()).float()


def _moving(name: str) -> str:
    return f"moving_{_plain(name)}"


def _unit(name: str) -> str:
    return f"unit_{_plain(name)}"


def _fixed(name: str) -> str:
    return f"fixed_{_plain(name)}"


def _plain(name: str) -> str:
    """The name of a payload tensor as torch takes it."""
    return name.replace(".", "__")
