"""Rows of numbers, cut into sub-vectors and coded in passes: where each begins, free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Rows:
    """The way rows are cut and coded. `counts` (R,): sub-vectors of each row; `passes` (R,): how often it is coded;
    `valid` (sub-vectors,): valid numbers in each sub-vector, None if all are full.

    Codes are ordered by row, then pass, then place in the row.
    """

    counts: I64
    passes: I64
    valid: I64 | None = None

    @classmethod
    def of(cls, sizes: I64, passes: I64, b: int) -> Rows:
        """Return rows of `sizes` numbers, cut to length b."""
        counts = -(-sizes // b)
        if not (sizes % b).any():
            return cls(counts, passes)
        valid = np.full(int(counts.sum()), b, np.int64)
        valid[np.cumsum(counts) - 1] -= counts * b - sizes
        return cls(counts, passes, valid)

    @cached_property
    def starts(self) -> I64:
        """(R + 1,): where each row begins among the sub-vectors."""
        return ends(self.counts)

    @cached_property
    def first_pass(self) -> I64:
        """(R + 1,): number of the first pass of each row."""
        return ends(self.passes)

    @cached_property
    def code_starts(self) -> I64:
        """(passes of all rows + 1,): where the codes of each pass begin."""
        return ends(np.repeat(self.counts, self.passes))

    @property
    def codes(self) -> int:
        return int(self.code_starts[-1])

    def thinned(self, stride: int) -> tuple[Rows, I64]:
        """Return rows with every stride-th sub-vector (at least one), and which sub-vectors these are."""
        first = np.minimum(np.arange(len(self.counts)) % stride, self.counts - 1)
        counts = -(-(self.counts - first) // stride)
        kept = np.repeat(self.starts[:-1] + first, counts) + stride * spans(np.zeros_like(counts), counts)
        return Rows(counts, self.passes, None if self.valid is None else self.valid[kept]), kept


def ends(lengths: I64) -> I64:
    return np.asarray(np.concatenate([[0], np.cumsum(lengths)]), np.int64)


def spans(starts: I64, lengths: I64) -> I64:
    """Return start, start + 1, ..., start + length - 1 of each span, one after the other."""
    ends = np.cumsum(lengths)
    return np.asarray(np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths))
