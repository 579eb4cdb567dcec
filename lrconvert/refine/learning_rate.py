"""Rates: how they rise and fall over a training, and which multiple of the default ones a training begins with.

What a start that is already good wants is less than what one far off wants, and how much less differs by model, form
and size; so the first steps try two or three multiples.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

_WARM = 0.1  # of a training: rates rise
_FINAL = 0.02  # what rates fall to
_FACTOR = 2.5  # between multiples that are tried
_BRANCHES = 3
_PARTS = 20  # of a training: how many branches are as long as it
_LEAST_STEPS = 5  # of a branch
_LONGEST = 4.0  # times the usual norm of a gradient: what it may have
_USUAL, _FEWEST = 16, 5  # steps whose median norm is the usual one, at most and at least


def rate_at(share: float, steps: int) -> float:
    """Return the rate, as a share of the highest, where `share` of a training of `steps` is done: a warm start, then
    half a cosine."""
    if share < _WARM:
        return (share + 0.5 / steps) / _WARM
    return _FINAL + (1 - _FINAL) * 0.5 * (1 + math.cos(math.pi * (share - _WARM) / (1 - _WARM)))


def branch_steps(steps: int) -> int:
    """Return the steps of a branch of the probe of a training of `steps`; 0 if they are too few for a probe."""
    each = steps // _PARTS
    return each if each >= _LEAST_STEPS else 0


@dataclass(frozen=True)
class Tried:
    """A branch of a probe: the multiple of the default rates, and how far its answers were from the teacher's then."""

    multiple: float
    distance: float


def next_multiple(tried: Sequence[Tried]) -> float | None:
    """Return the multiple that the next branch tries, None after the last: 1, then less for as long as that is better.

    More is not tried: a short branch of a start that is far off likes it, and the training then diverges.
    """
    if not tried:
        return 1.0
    is_better = tried[-1].distance <= min(branch.distance for branch in tried)
    return tried[-1].multiple / _FACTOR if is_better and len(tried) < _BRANCHES else None


def chosen(tried: Sequence[Tried]) -> float:
    """Return the multiple to go on with: the smallest of those that are best."""
    return min(tried, key=lambda branch: (branch.distance, branch.multiple)).multiple


@dataclass(eq=False)
class Clip:
    """Clipping of gradients against those of the steps before, whose `norms` it knows."""

    norms: list[float] = field(default_factory=list)

    def factor(self, norm: float) -> float:
        """Return what a gradient of this norm is to be multiplied with, and take note of the norm."""
        usual = statistics.median(self.norms) if len(self.norms) >= _FEWEST else math.inf
        self.norms = [*self.norms[1 - _USUAL :], norm]
        return min(1.0, _LONGEST * usual / norm) if norm else 1.0
