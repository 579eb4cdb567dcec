"""The widths at which numbers are stored, what each of them loses, and which steps between them buy most."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np

Item = TypeVar("Item")

WIDTHS = (16, 8, 4, 3, 2, 1)
# Share of the energy of a Gaussian row that is lost at each width (uniform quantizer, best scale): what planning
# assumes before anything is quantized.
ENERGY_LOST = {16: 0.0, 8: 1.2e-4, 4: 0.0115, 3: 0.0374, 2: 0.119, 1: 0.363}


def concave_hull(points: Iterable[tuple[int, float, Item]]) -> list[tuple[int, float, Item]]:
    """Return those of the points (cost, value, item), given by rising cost, that lie on the concave hull of value
    against cost and are worth more than those before; the first one always."""
    hull: list[tuple[int, float, Item]] = []
    for cost, value, item in points:
        if hull and value <= hull[-1][1]:
            continue
        while len(hull) > 1 and (value - hull[-1][1]) * (hull[-1][0] - hull[-2][0]) >= (hull[-1][1] - hull[-2][1]) * (
            cost - hull[-1][0]
        ):
            hull.pop()
        hull.append((cost, value, item))
    return hull


def groups_of(length: int, group_size: int) -> int:
    """Return how many scales a row of `length` numbers has: one per group, one in all if `group_size` is 0."""
    return -(-length // group_size) if group_size else 1


def spread_scales(scales: Any, length: int, group_size: int) -> Any:
    """Return the scale of every number, (n, length), of scales (n, groups); or (n, 1) if there is one group."""
    return scales if scales.shape[1] == 1 else scales[:, np.arange(length) // group_size]
