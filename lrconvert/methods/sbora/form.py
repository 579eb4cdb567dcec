"""The configuration of an SBoRA file: variants, widths, and where the lines of each target lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from lrconvert.core.dtypes import Array
from lrconvert.lora.adapter import Target
from lrconvert.methods.shared import mixed_widths
from lrconvert.methods.shared.beside import beside_config
from lrconvert.methods.shared.mixed_widths import MixedWidths

Variant = Literal["fa", "fb", "mixed"]


@dataclass(frozen=True)
class Header:
    """The JSON part of a config."""

    levels: mixed_widths.Levels
    max_count: mixed_widths.MaxCount
    variant: Variant


@dataclass(frozen=True)
class Config(MixedWidths):
    """`counts` are those of lines. `by_rows[t]`: whether target t is FB; where it has no lines, whether the others are
    all FB."""

    by_rows: tuple[bool, ...]

    @cached_property
    def variant(self) -> Variant:
        """Of the targets that have lines: fa, fb or mixed."""
        used = np.array(self.by_rows)[self.table.any(axis=1)]
        return "fa" if not used.any() else "fb" if used.all() else "mixed"


def settled(levels: Sequence[int], counts: Sequence[Sequence[int]], by_rows: Sequence[bool]) -> Config:
    """Return the Config in which targets without lines have the variant that the format gives them."""
    used, rows = np.array(counts).any(axis=1), np.array(by_rows, bool)
    rest = used.any() and rows[used].all()
    return Config(tuple(levels), tuple(map(tuple, counts)), tuple(np.where(used, rows, rest).tolist()))


def sizes(target: Target, by_rows: bool) -> tuple[int, int]:
    """Return (places for lines, numbers of a line)."""
    out, inner = target.matrix_shape
    return (out, inner) if by_rows else (inner, out)


def most_places(config: Config, targets: Sequence[Target]) -> int:
    """Return the most places that a target with lines has: the limit of `indices`."""
    return int(_sizes(config, targets)[config.table.any(axis=1), 0].max())


def _sizes(config: Config, targets: Sequence[Target]) -> Array:
    """The `sizes` of all targets, int64 (targets, 2)."""
    shapes = np.array([target.matrix_shape for target in targets], np.int64)
    return np.where(np.array(config.by_rows)[:, None], shapes, shapes[:, ::-1])


@dataclass(frozen=True)
class Start:
    """The places where the lines of a target begin in `indices`, in the tensor of each width, and in `scales`."""

    line: int
    numbers: Mapping[int, int]
    scale: int


def totals(config: Config, targets: Sequence[Target]) -> Start:
    """Return the lines, the numbers of each width, and the scales of all targets."""
    counts, lengths = config.table, _sizes(config, targets)[:, 1]
    numbers = dict(zip(config.levels, (lengths @ counts).tolist(), strict=True))
    scales = sum(n for q, n in zip(config.levels, counts.sum(axis=0).tolist(), strict=True) if q != 16)
    return Start(int(counts.sum()), numbers, scales)


@beside_config
def starts(config: Config, targets: tuple[Target, ...]) -> tuple[Start, ...]:
    """Return the starts of each target."""
    starts, start = [], Start(0, dict.fromkeys(config.levels, 0), 0)
    for target, row, by_rows in zip(targets, config.counts, config.by_rows, strict=True):
        starts.append(start)
        length = sizes(target, by_rows)[1]
        counts = dict(zip(config.levels, row, strict=True))
        numbers = {q: start.numbers[q] + n * length for q, n in counts.items()}
        scales = sum(n for q, n in counts.items() if q != 16)
        start = Start(start.line + sum(row), numbers, start.scale + scales)
    return tuple(starts)
