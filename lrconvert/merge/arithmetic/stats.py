"""Counts and rounding errors of what a merge did to weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MergeStats:
    """Counts of the elements that an update was added to. Errors are |stored - exact|, in float64 estimates.

    `changed` is exact. `unmoved` counts elements whose nonzero update is too small to change them, where float64 does
    not take it for zero. `recomputed` and `rational` count those that the second and the third stage decided.
    """

    elements: int = 0
    changed: int = 0
    unmoved: int = 0
    max_error: float = 0.0
    sum_error: float = 0.0
    recomputed: int = 0
    rational: int = 0

    def __add__(self, other: MergeStats) -> MergeStats:
        return MergeStats(
            self.elements + other.elements,
            self.changed + other.changed,
            self.unmoved + other.unmoved,
            max(self.max_error, other.max_error),
            self.sum_error + other.sum_error,
            self.recomputed + other.recomputed,
            self.rational + other.rational,
        )

    @property
    def mean_error(self) -> float:
        return self.sum_error / self.elements if self.elements else 0.0
