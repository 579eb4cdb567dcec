"""The ranks of targets in a file: one number in the header if all are equal, else the layout tensor ``ranks``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lrconvert.core.dtypes import Array
from lrconvert.core.errors import CanonicalError, LimitError
from lrconvert.lora import packing
from lrconvert.lora.adapter import Target
from lrconvert.lora.packing import TensorSpec


def ranks_specs(rank: int, uniform: bool, targets: Sequence[Target]) -> tuple[TensorSpec, ...]:
    """Return the layout tensor of ranks up to `rank`; none if they are `uniform`."""
    return () if uniform else (packing.index("ranks", (len(targets),), rank + 1),)


def ranks_layout(ranks: Sequence[int]) -> dict[str, Array]:
    """Return the values of `ranks_specs`."""
    return {} if min(ranks) == max(ranks) else {"ranks": np.array(ranks, np.uint32)}


def read_ranks(rank: int, uniform: bool, layout: Mapping[str, Array], targets: Sequence[Target]) -> tuple[int, ...]:
    """Return the ranks of a file. Raise E-CANON if its header does not describe them."""
    if uniform:
        return (rank,) * len(targets)
    ranks = tuple(layout["ranks"].tolist())
    if max(ranks) != rank or min(ranks) == max(ranks):
        raise CanonicalError("method.config: rank and uniform do not describe the tensor 'ranks'")
    return ranks


def check_ranks(targets: Sequence[Target], ranks: Sequence[int], largest: Iterable[int] | None = None) -> None:
    """Raise E-LIMIT if the rank of a target is above the `largest` of its shape: the shorter side unless given."""
    allowed = [min(target.matrix_shape) for target in targets] if largest is None else largest
    for target, rank, most in zip(targets, ranks, allowed, strict=True):
        if rank > most:
            raise LimitError(f"target {target.name!r:.80} has rank {rank}, more than its shape {target.matrix_shape}")
