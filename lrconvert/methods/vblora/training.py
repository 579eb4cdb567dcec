"""VB-LoRA in training: codes that move.

Every sub-vector has a latent vector of its own, and its code is the bank's vector nearest to that. The gradient of a
sub-vector goes straight through to its latent one and to the vector of the bank at once, so that codes and bank learn
together. Against full logits over the bank this needs b numbers for a code instead of h, and short vectors were
measured to come out better. Codes that mix several vectors (k > 1) keep their choice; bank, weights of 32 bits and
gains move.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lrconvert.core.dtypes import Array
from lrconvert.lora import fake_quant
from lrconvert.lora.adapter import CompactAdapter, LoraTarget
from lrconvert.lora.trainable import Rates, TrainableAdapter, unit_of
from lrconvert.methods.vblora.form import starts

_CHUNK = 1 << 24  # distances at once
_HALVINGS = 5


class TrainableBank(TrainableAdapter):
    """`latents` (codes, b) in units of the bank, for codes of one vector."""

    chosen: Tensor
    unit_latents: Tensor
    moving_scales: Tensor

    def __init__(self, method: Any, compact: CompactAdapter, rates: Rates) -> None:
        super().__init__(method, compact, rates)
        self.moves = compact.config.form.top_k == 1
        if self.moves:
            with torch.no_grad():
                bank = self._bank()
                chosen = torch.from_numpy(compact.tensors["indices"][:, 0].astype(np.int64))
                self.register_buffer("chosen", chosen)
                self.register_buffer("unit_latents", unit_of(bank, each=False))
                self.latents = nn.Parameter(bank[chosen] / self.unit_latents)

    def _bank(self) -> Tensor:
        """The vectors (h, b) as stored."""
        bank = self.stored("bank")
        return bank * self.stored("scales")[:, None] if "scales" in self.specs else bank

    def values(self, training: bool = False) -> dict[str, Tensor]:
        """Return, where codes move, the `vectors` (codes, b) that they name, with the latents' gradient, in place of
        the bank and its codes."""
        values = super().values()
        if not self.moves:
            return values
        vectors = self._bank()[self.chosen]
        moving = fake_quant.through(self.latents * self.unit_latents, torch.zeros_like(vectors))
        return {"vectors": vectors + moving, **({"gains": values["gains"]} if "gains" in values else {})}

    def factors(self, values: Mapping[str, Tensor], which: int) -> tuple[Tensor, Tensor]:
        if not self.moves:
            return super().factors(values, which)
        begins = starts(self.source.config, self.source.targets)
        return self._assembled(values["vectors"][begins[which][2] : begins[which + 1][2]], values, which)

    def all_factors(self, values: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        if not self.moves:
            return super().all_factors(values)
        # Split at once: the gradient of a slice is as long as the tensor it is of.
        begins = [code for _, _, code in starts(self.source.config, self.source.targets)]
        parts = torch.split(values["vectors"], np.diff(begins).tolist())
        return [self._assembled(part, values, which) for which, part in enumerate(parts)]

    def _assembled(self, vectors: Tensor, values: Mapping[str, Tensor], which: int) -> tuple[Tensor, Tensor]:
        source = self.source
        a, b = self.method.assembled(source.config, source.targets, which, vectors.double(), values, torch)
        return a, b

    def groups(self) -> list[dict[str, Any]]:
        latents = [{"params": [self.latents], "lr": self.rates.latents}] if self.moves else []
        return [*super().groups(), *latents]

    def warm_start_latents(self, pairs: Sequence[LoraTarget]) -> None:
        if not self.moves:
            return super().warm_start_latents(pairs)
        shift = self.shift("vectors", pairs)
        with torch.no_grad():
            bank = self._bank()
            chosen = bank[self.chosen]
            share = torch.ones(len(chosen), 1, device=chosen.device)  # of the shift that leaves the code as it is
            for factor in (*(0.5,) * _HALVINGS, 0.0):
                codes = nearest(chosen + share * shift, bank, self.chosen)
                share = torch.where((codes == self.chosen)[:, None], share, share * factor)
            self.latents.copy_((chosen + share * shift) / self.unit_latents)

    @torch.no_grad()
    def clamp_latents(self) -> None:
        super().clamp_latents()
        if "scales" in self.specs:
            self.moving_scales.clamp_(min=0)  # a file has no negative ones
        if self.moves:
            self.chosen.copy_(nearest(self.latents * self.unit_latents, self._bank(), self.chosen))

    @torch.no_grad()
    def tensors(self) -> dict[str, Array]:
        tensors = super().tensors()
        if self.moves:
            tensors["indices"] = self.chosen.cpu().numpy().astype(np.uint32)[:, None]
        return tensors


def nearest(x: Tensor, bank: Tensor, before: Tensor) -> Tensor:
    """Return which vector of `bank` (h, b) is nearest to each x (n, b), int64 (n,); `before` where that is as near."""
    squares = bank.square().sum(1)
    codes = torch.empty_like(before)
    step = max(1, _CHUNK // len(bank))
    for start in range(0, len(x), step):
        part, old = x[start : start + step], before[start : start + step]
        scores = torch.addmm(squares, part, bank.T, alpha=-2)
        least, place = scores.min(1)
        codes[start : start + step] = torch.where(scores.gather(1, old[:, None])[:, 0] <= least, old, place)
    return codes
