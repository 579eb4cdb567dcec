"""VB-LoRA on a bank that is given: learned over many adapters, or from nothing but Gaussian numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lrconvert.lora import packing
from lrconvert.methods.base import Budget, FitContext
from lrconvert.methods.vblora import METHOD
from lrconvert.methods.vblora.bank import train_bank
from lrconvert.methods.vblora.coder import Coder
from lrconvert.methods.vblora.fit import Problem
from lrconvert.methods.vblora.form import Config
from lrconvert.methods.vblora.plan import VBLoraOptions
from lrconvert.methods.vblora.rows import Rows

_SAMPLE = 1 << 16  # sub-vectors in all, however many adapters there are
_ROUNDS, _SWEEPS, _BEAM = 6, 8, 8


def own(lora: Any, limit: int) -> tuple[float, int, int]:
    """Return what VB-LoRA with a bank of its own captures in `limit` bytes of payload, these bytes, and those of the
    bank."""
    config = METHOD.plan(lora, VBLoraOptions(), Budget(limit, lambda config: _nbytes(lora, config)), FitContext())
    tensors = METHOD.fit(lora, config, FitContext())
    from lrconvert.lora import svd
    from lrconvert.lora.adapter import CompactAdapter
    from lrconvert.methods import base as methods

    compact = CompactAdapter("vblora", config, lora.shapes(), tensors)
    pairs = zip(lora.targets, methods.without_base(compact), strict=True)
    parts = np.array([svd.distance(pair, a, b) for pair, (_, a, b) in pairs])
    lost, energy = parts.sum(axis=0)
    return 1 - float(lost / energy), _nbytes(lora, config), config.form.bank_bits // 8


def planned(lora: Any, limit: int, b: int, h: int) -> Config:
    """Return the Config with a bank (h, b) whose other tensors take at most `limit` bytes."""
    bank = 2 * b * h
    options = VBLoraOptions(vector_length=b, num_vectors=h, top_k=1, bits=16)
    config: Config = METHOD.plan(lora, options, Budget(limit + bank, lambda c: _nbytes(lora, c)), FitContext())
    return config


def captured(lora: Any, config: Config, bank: torch.Tensor) -> float:
    """Return what codes and gains capture on a bank that stays as it is."""
    problem = Problem(lora, config, FitContext())
    form = config.form
    coder = Coder.new(problem.rows, bank, form.top_k, form.denominator, form.gains)
    coder.recode(np.arange(len(problem.rows.counts)), problem.x, fresh=True)
    refit = problem.refit(coder)
    coder.beam = _BEAM
    error = refit.error()
    for _ in range(_SWEEPS):
        before = error
        refit.sweep(0)
        refit.sweep(1)
        error = refit.error()
        if error > before * (1 - 1e-3):
            break
    return 1 - min(error, before) / refit.energy


def learned(loras: Sequence[Any], configs: Sequence[Config], *, synthetic: bool = False) -> torch.Tensor:
    """Return the bank (h, b) that codes the rows of all adapters best, from an equal sample of each; with `synthetic`,
    of Gaussian numbers in their place."""
    parts, counts, passes, weights = [], [], [], []
    for lora, config in zip(loras, configs, strict=True):
        problem = Problem(lora, config, FitContext())
        rows, x = problem.rows, problem.x
        stride = max(1, len(x) * len(loras) // _SAMPLE)
        if stride > 1:
            rows, places = rows.thinned(stride)
            x = x[torch.from_numpy(places)]
        parts.append(x)
        counts.append(rows.counts)
        passes.append(rows.passes)
        weights.append(problem.weight / problem.weight.sum())
    x = torch.cat(parts)
    if synthetic:
        x = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    form = configs[0].form
    shape = (form.num_vectors, form.top_k, form.denominator, form.gains)
    rows = Rows(np.concatenate(counts), np.concatenate(passes))
    coder = train_bank(x, rows, np.concatenate(weights), shape, np.random.default_rng(0), _ROUNDS)
    return torch.from_numpy(packing.round_half(coder.bank.numpy()))


def random(b: int, h: int) -> torch.Tensor:
    """Return a bank of Gaussian numbers that nobody learned."""
    drawn = torch.randn((h, b), generator=torch.Generator().manual_seed(1)).numpy()
    return torch.from_numpy(packing.round_half(drawn))


def _nbytes(lora: Any, config: Config) -> int:
    targets = lora.shapes()
    layout = METHOD.layout_specs(METHOD.header(config), targets)
    return sum(spec.nbytes for spec in (*layout, *METHOD.specs(config, targets)))
