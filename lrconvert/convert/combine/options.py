"""Options of `combine`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lrconvert.core.errors import OptionError
from lrconvert.core.limits import MAX_RANK
from lrconvert.core.options import option
from lrconvert.core.wording import spelled

MODES = (
    *("sum", "svd", "linear", "magnitude_prune", "ties", "dare_linear", "dare_ties"),
    *("magnitude_prune_svd", "ties_svd", "dare_linear_svd", "dare_ties_svd"),
)


@dataclass(frozen=True)
class CombineOptions:
    """Options of a combination.

    `mode` is what is made of the updates: ``sum`` their weighted sum, exactly, by stacking factors; ``svd`` the best
    part of that of a `rank`; the others what PEFT's `add_weighted_adapter` makes under these names, of the factors, or
    with ``_svd`` of the updates themselves, cut to a rank. `density` is the share of numbers that pruning keeps,
    `sign` how TIES elects a sign. `seed` draws DARE's masks: the same on every machine, others than torch's. `extras`
    says what becomes of extra tensors that differ: they are refused, those of the first adapter are taken, or all are
    left out.
    """

    mode: str = option("sum", "What is made of the updates; see docs/guides/combining.md.", choices=MODES)
    rank: int | None = option(None, "Rank of svd and ..._svd; default: the largest of the adapters.", least=1)
    density: float | None = option(
        None, "Share of numbers that ties, dare and magnitude_prune keep, as 20%.", kind="share"
    )
    sign: Literal["total", "frequency"] = option(
        "total", "What elects a sign in ties: the sum of numbers, or that of signs.", choices=("total", "frequency")
    )
    extras: Literal["refuse", "first", "drop"] = option(
        "refuse",
        "Extra tensors (heads) that differ: refused, the first adapter's, or all left out.",
        choices=("refuse", "first", "drop"),
    )
    seed: int = option(0, "Seed of the masks of dare.", least=0)

    @property
    def prunes(self) -> bool:
        return self.mode.removesuffix("_svd") in ("ties", "dare_linear", "dare_ties", "magnitude_prune")

    @property
    def is_dense(self) -> bool:
        """Return whether the updates themselves are combined."""
        return self.prunes and self.mode.endswith("_svd")

    def check(self) -> None:
        """Raise E-OPTION for values out of range, and for options that mean nothing to the mode."""
        if self.prunes != (self.density is not None):
            if self.prunes:
                fix = f"set it, such as {spelled('density', 0.5)}"
                raise OptionError(f"{self.mode} needs {spelled('density')}, the share of numbers to keep", fix=fix)
            raise OptionError(
                f"{self.mode} prunes nothing: {spelled('density')} means nothing to it", fix="leave it out"
            )
        if self.density is not None and not 0 < self.density <= 1:
            raise OptionError(f"{spelled('density')} is {self.density:g}; above 0, at most 1 is allowed")
        if self.rank is not None and not self.mode.endswith("svd"):
            raise OptionError(f"{self.mode} cuts no rank: {spelled('rank')} means nothing to it", fix="take svd")
        if self.rank is not None and self.rank > MAX_RANK:
            raise OptionError(f"{spelled('rank')} is {self.rank}; at most {MAX_RANK} is allowed")
