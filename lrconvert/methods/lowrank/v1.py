"""Version 1 of low rank: quantized factors, each component at its own width. Read forever, no longer made.

    delta_W = B @ A,   A[j] = scale_A[j] * a[j],   B[:, j] = scale_B[j] * b[j]

Rank-one components come from the SVD of the source update, largest first. Each component is stored at its own width:
``a[j]`` (in,) and ``b[j]`` (out,) are odd integers of 1, 2, 3, 4 or 8 bit with one scale per component, side and group,
or 16-bit numbers. 1 bit is sign times mean magnitude.

Stored tensors, in the order of their declaration (components: by target, then largest first):

=============  ======  ==========================================================================================
``counts``     index   (targets, levels): how many components of a target have each width of ``levels``, widest first
``half``       half    16-bit components: for each A row, then B column
``codes.<q>``  code    q-bit components: for each A row, then B column
``scales``     half    quantized components: scales of the A row's groups, then of the B column's
=============  ======  ==========================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from lrconvert.core.dtypes import Array
from lrconvert.core.errors import CanonicalError
from lrconvert.core.limits import MAX_DIM
from lrconvert.io import fields
from lrconvert.lora.adapter import Target
from lrconvert.lora.packing import TensorSpec
from lrconvert.methods.base import Tensors
from lrconvert.methods.shared import mixed_widths
from lrconvert.methods.shared.beside import beside_config
from lrconvert.methods.shared.earlier import EarlierMethod
from lrconvert.methods.shared.mixed_widths import MixedWidths, numbers_name
from lrconvert.methods.shared.ranks import check_ranks
from lrconvert.methods.shared.widths import groups_of, spread_scales


@dataclass(frozen=True)
class Config(MixedWidths):
    """`counts` are those of components. `group_size`: numbers per scale, 0 for whole rows (always if no row that has
    scales is longer)."""

    group_size: int = 0


@dataclass(frozen=True)
class Header:
    """The JSON part of a config."""

    levels: mixed_widths.Levels
    group_size: Annotated[int, fields.between(0, MAX_DIM)]
    max_count: mixed_widths.MaxCount


def complete(
    targets: Sequence[Target], levels: Sequence[int], counts: Sequence[Sequence[int]], group_size: int
) -> Config:
    """Return the one Config of these components: the group size is 0 if no row or column with scales is longer."""
    scaled = [any(n for q, n in zip(levels, row, strict=True) if q != 16) for row in counts]
    longest = max((max(t.matrix_shape) for t, has_scales in zip(targets, scaled, strict=True) if has_scales), default=0)
    return Config(tuple(levels), tuple(tuple(row) for row in counts), group_size if group_size < longest else 0)


def _scales_of(target: Target, group_size: int) -> int:
    """Scales of one component."""
    return sum(groups_of(length, group_size) for length in target.matrix_shape)


@beside_config
def _starts(config: Config, targets: tuple[Target, ...]) -> tuple[tuple[dict[int, int], int], ...]:
    """For each target: where its numbers begin in the tensor of each width, and where its scales begin. The last entry
    holds the totals."""
    numbers = dict.fromkeys(config.levels, 0)
    scales = 0
    starts: list[tuple[dict[int, int], int]] = []
    for target, row in zip(targets, config.counts, strict=True):
        starts.append((dict(numbers), scales))
        for q, n in zip(config.levels, row, strict=True):
            numbers[q] += n * sum(target.matrix_shape)
            scales += n * _scales_of(target, config.group_size) if q != 16 else 0
    return (*starts, (numbers, scales))


class LowRank(EarlierMethod):
    """See the module's docstring."""

    id = "lowrank"
    version = 1
    title = "low rank, quantized factors"

    # --- what the file holds ---

    def header(self, config: Config) -> dict[str, Any]:
        return dict(fields.as_json(Header(config.levels, config.group_size, config.max_count)))

    def layout_specs(self, header: Mapping[str, Any], targets: Sequence[Target]) -> tuple[TensorSpec, ...]:
        read = fields.read(Header, header, "method.config")
        return (mixed_widths.counts_spec(targets, read.levels, read.max_count),)

    def layout(self, config: Config) -> dict[str, Array]:
        return {"counts": np.array(config.counts, np.uint32)}

    def config(self, header: Mapping[str, Any], layout: Tensors, targets: Sequence[Target]) -> Config:
        read = fields.read(Header, header, "method.config")
        counts = mixed_widths.read_counts(layout["counts"], read.max_count)
        config = complete(targets, read.levels, counts, read.group_size)
        check_ranks(targets, config.ranks)
        if config.group_size != read.group_size:
            raise CanonicalError("method.config.group_size must be 0: no row or column with scales is longer")
        return config

    def specs(self, config: Config, targets: Sequence[Target]) -> tuple[TensorSpec, ...]:
        return tuple(mixed_widths.numbers_specs(*_starts(config, tuple(targets))[-1]))

    def ranks(self, config: Config, targets: Sequence[Target]) -> Sequence[int]:
        return config.ranks

    # --- using it ---

    def expand(
        self, config: Config, targets: Sequence[Target], values: Mapping[str, Any], which: int, xp: Any
    ) -> tuple[Any, Any]:
        out, inner = targets[which].matrix_shape
        starts, scale_start = _starts(config, tuple(targets))[which]
        groups, group_size = groups_of(inner, config.group_size), config.group_size
        rows_a, rows_b = [], []
        for q, n in zip(config.levels, config.counts[which], strict=True):
            if n == 0:
                continue
            block = values[numbers_name(q)][starts[q] : starts[q] + n * (out + inner)].reshape(n, inner + out)
            a, b = block[:, :inner], block[:, inner:]
            if q != 16:
                scale_stop = scale_start + n * _scales_of(targets[which], group_size)
                scales = values["scales"][scale_start:scale_stop].reshape(n, -1)
                a = a * spread_scales(scales[:, :groups], inner, group_size)
                b = b * spread_scales(scales[:, groups:], out, group_size)
                scale_start = scale_stop
            rows_a.append(a)
            rows_b.append(b)
        if not rows_a:
            return xp.zeros((0, inner), dtype=xp.float32), xp.zeros((out, 0), dtype=xp.float32)
        return xp.concatenate(rows_a), xp.concatenate(rows_b).T


METHOD = LowRank()
