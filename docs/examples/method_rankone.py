"""Rank one: the largest component of every target at 16 bits.

    delta_W = b a

Stored: ``numbers`` half (sum of in + out,): for each target a (in), then b (out).

A complete method. As ``lrconvert/methods/rankone.py`` it is found by itself: the command ``lora-to-rankone``, the
validation, exact sizes, ``--dry-run`` and the laws of ``tests/methods/test_laws.py`` follow from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lrconvert.core.dtypes import Array
from lrconvert.core.errors import BudgetError, UnknownFieldError
from lrconvert.lora import packing, svd
from lrconvert.lora.adapter import LoraAdapter, Target
from lrconvert.methods.base import Budget, Command, FitContext, Method, Tensors


@dataclass(frozen=True)
class RankOneOptions:
    """What a user may ask for; a field declared with `core.options.option` becomes an option of the command."""


@dataclass(frozen=True)
class Config:
    """What a file needs besides its tensors."""


class RankOne(Method):
    id = "rankone"
    title = "rank one"
    commands = (Command("lora-to-rankone", "Keep the largest component of every target."),)
    Options = RankOneOptions
    examples = ({},)  # option sets for the laws and the golden files
    uses = ()  # neither the seed, the device nor statistics change its fit
    default_ratio = None

    def header(self, config: Config) -> dict[str, Any]:
        return {}

    def config(self, header: Mapping[str, Any], layout: Tensors, targets: Sequence[Target]) -> Config:
        if header:
            raise UnknownFieldError(f"method.config has the unknown field {min(header)!r:.80}")
        return Config()

    def specs(self, config: Config, targets: Sequence[Target]) -> tuple[packing.TensorSpec, ...]:
        return (packing.half("numbers", (sum(sum(target.matrix_shape) for target in targets),)),)

    def ranks(self, config: Config, targets: Sequence[Target]) -> Sequence[int]:
        return [1] * len(targets)

    def plan(self, lora: LoraAdapter, options: RankOneOptions, budget: Budget | None, context: FitContext) -> Config:
        if budget is not None and not budget.fits(Config()):
            smallest = budget.size(Config())
            what = f"{budget.limit} bytes cannot be reached; the smallest possible file has {smallest} bytes"
            raise BudgetError(what, fix="ask for more bytes")
        return Config()

    def fit(self, lora: LoraAdapter, config: Config, context: FitContext) -> dict[str, Array]:
        rows: list[Array] = []
        for pair in lora.targets:
            a, b = svd.balanced(svd.svd(pair), 1)
            rows += [a[0], b[:, 0]]
        return {"numbers": packing.round_half(np.concatenate(rows))}

    def expand(
        self, config: Config, targets: Sequence[Target], values: Mapping[str, Any], which: int, xp: Any
    ) -> tuple[Any, Any]:
        start = sum(sum(target.matrix_shape) for target in targets[:which])
        out, inner = targets[which].matrix_shape
        row = values["numbers"][start : start + inner + out]
        return row[None, :inner], row[inner:, None]


METHOD = RankOne()
