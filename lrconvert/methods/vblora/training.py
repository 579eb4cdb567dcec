"""VB-LoRA in training: codes that move.

Every sub-vector has a latent vector of its own, and its code is the bank's vector nearest to that. The gradient of a
sub-vector goes straight through to its latent one and to the vector of the bank at once, so that codes and bank learn
together. Against full logits over the bank this needs b numbers for a code instead of h, and short vectors were
measured to come out better. Codes that mix several vectors (k > 1) keep their choice; bank, weights of 32 bits and
gains move.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lrconvert.core.dtypes import Array
from lrconvert.lora import fake_quant
from lrconvert.lora.adapter import CompactAdapter, LoraTarget
from lrconvert.lora.trainable import Rates, TrainableAdapter, unit_of

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

    def values(self) -> dict[str, Tensor]:
        """Where codes move, a bank with one vector for each code: what the codes choose, with the latents' gradient."""
        found = super().values()
        if not self.moves:
            return found
        vectors = self._bank()[self.chosen]
        found["bank"] = vectors + fake_quant.through(self.latents * self.unit_latents, torch.zeros_like(vectors))
        found["indices"] = torch.arange(len(vectors), device=vectors.device)[:, None]
        if "scales" in self.specs:
            found["scales"] = vectors.new_ones(len(vectors))
        return found

    def groups(self) -> list[dict[str, Any]]:
        found = super().groups()
        return [*found, {"params": [self.latents], "lr": self.rates.latents}] if self.moves else found

    def warm_start_latents(self, pairs: Sequence[LoraTarget]) -> None:
        super().warm_start_latents(pairs)
        if not self.moves:
            return
        shift = self.shift("bank", pairs)
        with torch.no_grad():
            bank = self._bank()
            chosen = bank[self.chosen]
            way = torch.ones(len(chosen), 1, device=chosen.device)
            for last in (False,) * _HALVINGS + (True,):
                there = nearest(chosen + way * shift, bank, self.chosen)
                way = torch.where((there == self.chosen)[:, None], way, way * (0.0 if last else 0.5))
            self.latents.copy_((chosen + way * shift) / self.unit_latents)

    @torch.no_grad()
    def clamp_latents(self) -> None:
        super().clamp_latents()
        if "scales" in self.specs:
            self.moving_scales.clamp_(min=0)  # a file has no negative ones
        if self.moves:
            self.chosen.copy_(nearest(self.latents * self.unit_latents, self._bank(), self.chosen))

    @torch.no_grad()
    def tensors(self) -> dict[str, Array]:
        found = super().tensors()
        if self.moves:
            found["indices"] = self.chosen.cpu().numpy().astype(np.uint32)[:, None]
        return found


def nearest(x: Tensor, bank: Tensor, before: Tensor) -> Tensor:
    """The vector of `bank` (h, b) nearest to each x (n, b), int64 (n,); `before` where that is as near."""
    squares = bank.square().sum(1)
    found = torch.empty_like(before)
    step = max(1, _CHUNK // len(bank))
    for start in range(0, len(x), step):
        some, old = x[start : start + step], before[start : start + step]
        scores = torch.addmm(squares, some, bank.T, alpha=-2)
        least, place = scores.min(1)
        found[start : start + step] = torch.where(scores.gather(1, old[:, None])[:, 0] <= least, old, place)
    return found
