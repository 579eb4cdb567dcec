"""The plots of bytes, on a logarithmic axis, against what is kept. Only the places of things."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lrconvert.report.html.labels import Box, Label, placed
from lrconvert.report.html.measures import File, Measure, short

_LOWEST = -0.5  # an axis goes no lower; a mark below stands on its edge
RADIUS = 6


@dataclass(frozen=True)
class Frame:
    """The size of a plot, and the area between its axes."""

    width: int
    height: int
    area: Box


LARGE = Frame(900, 430, Box(52, 18, 866, 372))
SMALL = Frame(420, 280, Box(44, 14, 388, 228))


@dataclass(frozen=True)
class Mark:
    """A file in a plot: its place, the share that it stands for, the ends of the interval as (y of the high end, y of
    the low end), and its label."""

    x: float
    y: float
    file: File
    share: float
    interval: tuple[float, float] | None
    label: Label | None


@dataclass(frozen=True)
class Plot:
    """One plot: grid lines as (y, share), ticks as (x, bytes), marks from the smallest file on, and the path along the
    files that no smaller one beats."""

    title: str
    frame: Frame
    shares: list[tuple[float, float]]
    ticks: list[tuple[float, int]]
    marks: list[Mark]
    frontier: str


@dataclass(frozen=True)
class Point:
    """A file, its share, and the interval of the share where one was measured."""

    file: File
    share: float
    interval: tuple[float, float] | None = None


def answers_plot(files: Sequence[File]) -> Plot | None:
    """Return the large plot: the share of the distance to the LoRA's answers that each file closes; None without."""
    points = [
        Point(f, f.kept.answers.closed, f.interval)
        for f in files
        if f.kept.answers is not None and math.isfinite(f.kept.answers.closed)
    ]
    return _plot("Share of the distance to the LoRA's answers that is closed", points, LARGE) if points else None


def measure_plot(files: Sequence[File], measure: Measure, frame: Frame) -> Plot | None:
    """Return the plot of what is captured by one measure; None where no file has it."""
    shares = [(f, measure.of(f.kept)) for f in files]
    points = [Point(f, share) for f, share in shares if share is not None]
    return _plot(f"Captured {measure.title}", points, frame) if points else None


def _plot(title: str, points: Sequence[Point], frame: Frame) -> Plot:
    sizes = [max(p.file.kept.adapter_bytes, 1) for p in points]
    area, middle = frame.area, math.sqrt(min(sizes) * max(sizes))
    half = max(1.3 * math.sqrt(max(sizes) / min(sizes)), math.sqrt(8))
    lows = [p.share if p.interval is None else p.interval[0] for p in points]
    low = max(min([0.95, *lows]), _LOWEST)
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.25) if (1 - low) / s <= 6.5)
    count = math.ceil((1 - low) / step - 1e-9)

    def x(nbytes: float) -> float:
        return area.left + (math.log(nbytes / middle, half) + 1) / 2 * (area.right - area.left)

    def y(share: float) -> float:
        return area.top + min(max(1 - share, 0.0) / (count * step), 1.0) * (area.bottom - area.top)

    places = [(x(size), y(p.share), p) for size, p in zip(sizes, points, strict=True)]
    places.sort(key=lambda place: (place[0], -place[2].share, place[2].file.number))
    intervals = [None if p.interval is None else (y(p.interval[1]), y(p.interval[0])) for _, _, p in places]
    whiskers = [Box(a - 4, i[0], a + 4, i[1]) for (a, _, _), i in zip(places, intervals, strict=True) if i is not None]
    texts = [_named(p.file, len(points), frame) for _, _, p in places]
    path, along = _frontier(places, area.right)
    named_points = [(a, b, text) for (a, b, _), text in zip(places, texts, strict=True)]
    labels = placed(named_points, area, RADIUS, [*whiskers, *along])
    marks = [
        Mark(a, b, p.file, p.share, interval, label)
        for (a, b, p), interval, label in zip(places, intervals, labels, strict=True)
    ]
    shares = [(y(1 - n * step), 1 - n * step) for n in range(count + 1)]
    ticks = [(x(tick), round(tick)) for tick in _ticks(middle / half, middle * half)]
    return Plot(title, frame, shares, ticks, marks, path)


def _frontier(places: Sequence[tuple[float, float, Point]], right: float) -> tuple[str, list[Box]]:
    """The path along the files that no smaller one beats, and the boxes of its pieces, which no label may cover."""
    path, boxes, best = "", [], -math.inf
    last_x = last_y = 0.0
    for x, y, point in places:
        if point.share <= best:
            continue
        if path:
            boxes += [Box(last_x, last_y - 1, x, last_y + 1), Box(x - 1, y, x + 1, last_y)]
        path += f"H{x:.1f}V{y:.1f}" if path else f"M{x:.1f} {y:.1f}"
        last_x, last_y, best = x, y, point.share
    return f"{path}H{right:.1f}", [*boxes, Box(last_x, last_y - 1, right, last_y + 1)]


def _named(file: File, count: int, frame: Frame) -> str:
    """The label of a mark: number and name where there is room for names, else the number."""
    return f"{file.number} {short(file.name, 24)}" if frame is LARGE and count <= 16 else str(file.number)


def _ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten, or the powers alone where that would be too many."""
    powers = [10.0**d for d in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    fine = [m * power for power in powers for m in (1, 2, 5) if low <= m * power <= high]
    return fine if len(fine) <= 6 else [power for power in powers if low <= power <= high]
