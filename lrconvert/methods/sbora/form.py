"""What an SBoRA file says besides its numbers: variants, widths, and where the lines of each target lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from lrconvert.lora.adapter import Target

WIDTHS = (16, 8, 4, 3, 2, 1)
VARIANTS = ("fa", "fb", "mixed")


@dataclass(frozen=True)
class Config:
    """`levels`: widths in use, widest first. `counts[t][l]`: lines of target t at width levels[l]. `by_rows[t]`:
    whether target t is FB; where it has no lines, whether the others are all FB."""

    levels: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...]
    by_rows: tuple[bool, ...]

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sum(row) for row in self.counts)

    @cached_property
    def variant(self) -> str:
        """Of the targets that have lines: fa, fb or mixed."""
        used = {by_rows for rank, by_rows in zip(self.ranks, self.by_rows, strict=True) if rank}
        return "mixed" if len(used) == 2 else "fb" if True in used else "fa"

    def widths(self, which: int) -> tuple[int, ...]:
        """The width of each line of a target, widest first."""
        return tuple(q for q, n in zip(self.levels, self.counts[which], strict=True) for _ in range(n))


def settled(levels: Sequence[int], counts: Sequence[Sequence[int]], by_rows: Sequence[bool]) -> Config:
    """A Config in which targets without lines have the variant that the format gives them."""
    rows = tuple(tuple(row) for row in counts)
    rest = all(v for row, v in zip(rows, by_rows, strict=True) if any(row)) and any(any(row) for row in rows)
    return Config(tuple(levels), rows, tuple(v if any(row) else rest for row, v in zip(rows, by_rows, strict=True)))


def sizes(target: Target, by_rows: bool) -> tuple[int, int]:
    """(places for lines, numbers of a line)."""
    out, inner = target.matrix_shape
    return (out, inner) if by_rows else (inner, out)


def most_places(config: Config, targets: Sequence[Target]) -> int:
    """The most places that a target with lines has: the limit of `indices`."""
    used = zip(targets, config.by_rows, config.ranks, strict=True)
    return max(sizes(target, by_rows)[0] for target, by_rows, rank in used if rank)


@dataclass(frozen=True)
class Start:
    """Where the lines of a target begin in `indices`, in the tensor of each width, and in `scales`."""

    line: int
    numbers: Mapping[int, int]
    scale: int


@lru_cache(maxsize=8)
def starts(config: Config, targets: tuple[Target, ...]) -> tuple[Start, ...]:
    """The starts of each target; the last entry holds the totals."""
    at = Start(0, dict.fromkeys(config.levels, 0), 0)
    found = [at]
    for target, row, by_rows in zip(targets, config.counts, config.by_rows, strict=True):
        length = sizes(target, by_rows)[1]
        counts = dict(zip(config.levels, row, strict=True))
        numbers = {q: at.numbers[q] + n * length for q, n in counts.items()}
        at = Start(at.line + sum(row), numbers, at.scale + sum(n for q, n in counts.items() if q != 16))
        found.append(at)
    return tuple(found)
