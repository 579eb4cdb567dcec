"""The configuration of a Bone file: variant, shards, ranks, widths, and where each block lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Literal

from lrconvert.core.errors import LimitError
from lrconvert.core.limits import MAX_DIM, MAX_RANK
from lrconvert.io.fields import between, one_of
from lrconvert.lora.adapter import Target
from lrconvert.methods.shared.beside import beside_config
from lrconvert.methods.shared.widths import WIDTHS, groups_of

EXACT = 32  # bits of blocks that came from elsewhere as float32
Variant = Literal["bone", "mini", "bat"]
Shard = Literal["in", "out", "mixed"]


@dataclass(frozen=True)
class Header:
    """The JSON part of a config."""

    variant: Variant
    shard: Shard
    bits: Annotated[int, one_of((EXACT, *WIDTHS), LimitError)]
    group_size: Annotated[int, between(0, MAX_DIM)]
    mini_rank: Annotated[int, between(0, MAX_DIM)]
    rank: Annotated[int, between(1, MAX_RANK)]
    uniform: bool


@dataclass(frozen=True)
class Config:
    """`ranks`: rows of each target's block. `turned`: whether it repeats along outputs. `mini_rank`: columns of the
    blocks of "mini", else 0. `group_size`: numbers per scale, 0 for whole rows (always if no row that has scales is
    longer)."""

    variant: Variant
    bits: int
    ranks: tuple[int, ...]
    turned: tuple[bool, ...]
    mini_rank: int = 0
    group_size: int = 0

    @cached_property
    def uniform(self) -> bool:
        return min(self.ranks) == max(self.ranks)

    @cached_property
    def shard(self) -> Shard:
        """ "in", "out" or "mixed", over the targets that have a block."""
        used = {turned for turned, rank in zip(self.turned, self.ranks, strict=True) if rank}
        return "mixed" if len(used) > 1 else "out" if used == {True} else "in"

    def columns(self, which: int, target: Target) -> int:
        """Return the number of columns of a target's block."""
        return self.mini_rank or target.matrix_shape[1 if self.turned[which] else 0]


def complete(
    targets: Sequence[Target],
    ranks: Sequence[int],
    turned: Sequence[bool] | None = None,
    *,
    bits: int = 16,
    mini_rank: int = 0,
    group_size: int = 0,
    bat: bool = False,
) -> Config:
    """Return the one Config of these blocks: targets without one count as not turned, a group size without effect is
    0."""
    if turned is None:
        turned = [False] * len(targets)
    sides = tuple(side and rank > 0 for side, rank in zip(turned, ranks, strict=True))
    variant: Variant = "bat" if bat else "mini" if mini_rank else "bone"
    config = Config(variant, bits, tuple(ranks), sides, mini_rank)
    longest = max((config.columns(n, t) for n, t in enumerate(targets) if ranks[n]), default=0)
    return replace(config, group_size=group_size if bits < 16 and group_size < longest else 0)


@beside_config
def starts_of(config: Config, targets: tuple[Target, ...]) -> tuple[tuple[int, int], ...]:
    """Return (number, scale) where the block of each target begins; the last entry holds the totals."""
    number = scale = 0
    starts = []
    for which, (target, rank) in enumerate(zip(targets, config.ranks, strict=True)):
        starts.append((number, scale))
        columns = config.columns(which, target)
        number += rank * columns
        if config.bits < 16:
            scale += rank * groups_of(columns, config.group_size)
    return (*starts, (number, scale))
