"""What a Bone file says besides its numbers: variant, shards, ranks, widths, and where each block lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from lrconvert.lora.adapter import Target

EXACT = 32  # bits of blocks that came from elsewhere as float32
WIDTHS = (16, 8, 4, 3, 2, 1)
VARIANTS = ("bone", "mini", "bat")
SHARDS = ("in", "out", "mixed")


@dataclass(frozen=True)
class Config:
    """`variant`: "bone", "mini" or "bat". `ranks`: rows of each target's block. `turned`: whether it repeats along
    outputs. `mini_rank`: columns of the blocks of "mini", else 0. `group_size`: numbers per scale, 0 for whole rows
    (always if no row that has scales is longer)."""

    variant: str
    bits: int
    ranks: tuple[int, ...]
    turned: tuple[bool, ...]
    mini_rank: int = 0
    group_size: int = 0

    @cached_property
    def uniform(self) -> bool:
        return min(self.ranks) == max(self.ranks)

    @cached_property
    def shard(self) -> str:
        """ "in", "out" or "mixed", over the targets that have a block."""
        used = {turned for turned, rank in zip(self.turned, self.ranks, strict=True) if rank}
        return "mixed" if len(used) > 1 else "out" if used == {True} else "in"

    def columns(self, which: int, target: Target) -> int:
        """Columns of a target's block."""
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
    """The one Config of these blocks: targets without one count as not turned, a group size without effect is 0."""
    sides = [False] * len(targets) if turned is None else list(turned)
    sides = [side and rank > 0 for side, rank in zip(sides, ranks, strict=True)]
    found = Config("bat" if bat else "mini" if mini_rank else "bone", bits, tuple(ranks), tuple(sides), mini_rank)
    rows = [found.columns(n, t) for n, (t, rank) in enumerate(zip(targets, ranks, strict=True)) if rank]
    group = group_size if bits < 16 and group_size < max(rows, default=0) else 0
    return replace(found, group_size=group)


def groups_of(length: int, group_size: int) -> int:
    return -(-length // group_size) if group_size else 1


@lru_cache(maxsize=8)
def starts_of(config: Config, targets: tuple[Target, ...]) -> tuple[tuple[int, int], ...]:
    """(number, scale) where the block of each target begins; the last entry holds the totals."""
    number = scale = 0
    starts = []
    for which, (target, rank) in enumerate(zip(targets, config.ranks, strict=True)):
        starts.append((number, scale))
        columns = config.columns(which, target)
        number += rank * columns
        if config.bits < 16:
            scale += rank * groups_of(columns, config.group_size)
    return (*starts, (number, scale))
