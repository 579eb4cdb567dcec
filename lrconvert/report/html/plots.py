"""The plots: bytes on a logarithmic axis against what is kept, one for each measure. Only the places of things."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lrconvert.report.html.measures import File, Measure

LEFT, RIGHT, TOP, BOTTOM = 36, 410, 14, 228  # of the area between the axes
_LOWEST = -0.5  # an axis goes no lower; a mark below stands on its edge


@dataclass(frozen=True)
class Plot:
    """One plot: grid lines as (y, share), ticks as (x, bytes), marks as (x, y, file, share) from the smallest file on,
    and the path along the files that no smaller one beats."""

    title: str
    shares: list[tuple[float, float]]
    ticks: list[tuple[float, int]]
    marks: list[tuple[float, float, File, float]]
    frontier: str


def plots(files: Sequence[File], measures: Sequence[Measure]) -> list[Plot]:
    """Return a plot for each measure, and one for the models' answers where these were measured."""
    panels = [(f"Captured {m.title}", [(f, m.of(f.kept)) for f in files]) for m in measures]
    closed = [(f, None if f.kept.answers is None else f.kept.answers.closed) for f in files]
    panels.append(("Share of the distance to the LoRA's answers that is closed", closed))
    drawn = [(title, [(f, v) for f, v in points if v is not None and math.isfinite(v)]) for title, points in panels]
    return [_plot(title, points) for title, points in drawn if points]


def _plot(title: str, points: Sequence[tuple[File, float]]) -> Plot:
    sizes = [max(f.kept.adapter_bytes, 1) for f, _ in points]
    middle = math.sqrt(min(sizes) * max(sizes))
    half = max(1.3 * math.sqrt(max(sizes) / min(sizes)), math.sqrt(8))
    low = max(min([0.95, *(value for _, value in points)]), _LOWEST)
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.25) if (1 - low) / s <= 6.5)
    count = math.ceil((1 - low) / step - 1e-9)

    def x(nbytes: float) -> float:
        return LEFT + (math.log(nbytes / middle, half) + 1) / 2 * (RIGHT - LEFT)

    def y(share: float) -> float:
        return TOP + min((1 - share) / (count * step), 1.0) * (BOTTOM - TOP)

    marks = [(x(size), y(value), f, value) for size, (f, value) in zip(sizes, points, strict=True)]
    marks.sort(key=lambda mark: (mark[0], -mark[3], mark[2].number))
    path, best = "", -math.inf
    for mark_x, mark_y, _, value in marks:
        if value > best:
            path += f"H{mark_x:.1f}V{mark_y:.1f}" if path else f"M{mark_x:.1f} {mark_y:.1f}"
            best = value
    shares = [(y(1 - n * step), 1 - n * step) for n in range(count + 1)]
    ticks = [(x(tick), round(tick)) for tick in _ticks(middle / half, middle * half)]
    return Plot(title, shares, ticks, marks, f"{path}H{RIGHT}")


def _ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten, or the powers alone where that would be too many."""
    powers = [10.0**d for d in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    fine = [m * power for power in powers for m in (1, 2, 5) if low <= m * power <= high]
    return fine if len(fine) <= 7 else [power for power in powers if low <= power <= high]
