"""NOLA: every row of a factor is a sum of seeded vectors; a file holds their coefficients, entropy-coded, and the seed.

    delta_W = sum_j gain_j * b_j a_j^T,   a_j (in,), b_j (out,):  c_1 P_1 + ... + c_d P_d

It is `lowrank` on other bases (`rotation`). For each role and length d there is one: the d signed rows P of an
orthogonal transform, which make the numbers of a row alike, Gaussian, as the models of coded integers want them.
Coefficients are integers with one step for the whole adapter, their files have the tensors of `lowrank` and a seed.

In the paper (arXiv 2310.02556, ICLR 2024) a basis has fewer vectors than a factor has numbers. A random subspace holds
its share k / d of a factor and no more, at k / d of the bytes; coefficients of a whole basis that are rounded to zero
take next to none, and those that hold most are kept. Version 1 (`v1`) has such bases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lrconvert.core.errors import LimitError
from lrconvert.core.options import option
from lrconvert.io import fields
from lrconvert.lora import prng
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter, Target
from lrconvert.methods import lowrank
from lrconvert.methods.base import Budget, Command, FitContext, Tensors
from lrconvert.methods.lowrank import form
from lrconvert.methods.lowrank.plan import DEFAULT_BITS, MOST_BITS, LowRankOptions, make_plan
from lrconvert.methods.nola.rotation import Rotation, sums_are_exact


@dataclass(frozen=True)
class Header(form.Header):
    """The JSON part of a config."""

    seed: str


@dataclass(frozen=True)
class Config(form.Config):
    """That of `lowrank`, with the `seed` of the bases."""

    seed: int = field(kw_only=True)


@dataclass(frozen=True)
class NolaOptions(LowRankOptions):
    """The options of `lora-to-nola`."""

    bits: float | None = option(
        None,
        f"Average bits per coefficient, above 0, at most {MOST_BITS:g}; without it and without a size "
        f"{DEFAULT_BITS:g} where other options are given.",
        least=0,
    )


class Nola(lowrank.LowRank):
    """See the module's docstring."""

    id = "nola"
    version = 2
    earlier = (1,)
    title = "NOLA: entropy-coded coefficients of seeded bases"
    commands = (Command("lora-to-nola", "Sum seeded bases, and store only coded coefficients (NOLA)."),)
    Options = NolaOptions
    uses = ("seed", "statistics")
    fit_seconds = 0.055
    examples = (
        {"bits": 12},
        {"bits": 5, "rank": 3},
        {"bits": 2, "dynamic_method": "sv_ratio", "dynamic_param": 3.0},
        {"bits": 1},
        {"target_size": 2000},
        {"target_size": 1800, "rank": 2},
    )
    Head = Header

    def coordinates(self, config: Any) -> Rotation:
        return Rotation(config.seed)

    # --- what the file holds ---

    def header(self, config: Any) -> dict[str, Any]:
        return {**super().header(config), "seed": str(config.seed)}

    def config(self, header: Mapping[str, Any], layout: Tensors, targets: Sequence[Target]) -> Config:
        plain = super().config(header, layout, targets)
        seed = prng.parse_seed(fields.read(Header, header, "method.config").seed)
        _check_lengths(targets)
        return Config(plain.counts, plain.models, plain.length, seed=seed)

    # --- making it ---

    def plan(self, lora: LoraAdapter, options: LowRankOptions, budget: Budget | None, context: FitContext) -> Config:
        seed = prng.Stream(context.seed, "nola").seed
        _check_lengths(lora.shapes())

        def seeded(plain: form.Config) -> Config:
            return Config(plain.counts, plain.models, plain.length, plain.quantizer, seed=seed)

        if budget is not None:
            size = budget.size
            budget = Budget(budget.limit, lambda plain: size(seeded(plain)))
        return seeded(make_plan(lora, options, budget, context, Rotation(seed)))

    def refit(
        self, lora: LoraAdapter, compact: CompactAdapter, size: Callable[[Any], int], context: FitContext
    ) -> CompactAdapter:
        return super().refit(lora, compact, size, replace(context, seed=compact.config.seed))


def _check_lengths(targets: Sequence[Target]) -> None:
    """Raise E-LIMIT on rows whose sums would not be exact."""
    for target in targets:
        for length in target.matrix_shape:
            if not sums_are_exact(length):
                raise LimitError(f"target {target.name!r:.80}: sums of {length} coefficients are not exact")


METHOD = Nola()
