"""Plots of lines: ranks by layer, the spectrum of a LoRA, and how a refinement went. Only the places of things."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from lrconvert.core.errors import DataError, FileReadError
from lrconvert.report.html.labels import SIZE, Box, Label, boxed
from lrconvert.report.html.layers import by_layer, kind_labels
from lrconvert.report.html.measures import File, short

WIDTH, HEIGHT = 420, 250
AREA = Box(44, 14, 330, 200)  # to the right of it stand the names of the lines
_ROOM = Box(44, 4, WIDTH, 208)
_APART = 16.0  # from one name to the next
_PANELS = 12  # kinds of modules whose ranks are drawn
_LINES = 8


Place = Callable[[float, float], tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """A line of a plot: the number of its colour (None: grey), its path, its label, and the same in words."""

    colour: int | None
    path: str
    label: Label
    words: str


@dataclass(frozen=True)
class Lines:
    """A plot of lines: grid lines as (y, text), ticks as (x, text), and what runs along the axis below."""

    title: str
    across: str
    grid: list[tuple[float, str]]
    ticks: list[tuple[float, str]]
    lines: list[Line]


@dataclass(frozen=True)
class _Series:
    """Points of one line, which may be interrupted, its colour, and its name."""

    colour: int | None
    name: str
    points: Sequence[tuple[float, float]]


# --- ranks by layer -------------------------------------------------------------------------------------------------


def rank_plots(files: Sequence[File]) -> list[Lines]:
    """Return a plot for each kind of module whose rank is not the same in all layers, before and after."""
    shown = files if len(files) <= _LINES - 1 else files[:1]
    tables = [by_layer(f.kept.targets, pooled=True) for f in shown]
    kinds = sorted({kind for table in tables for layer, kind in table if layer >= 0})
    plots = []
    for kind, label in zip(kinds, kind_labels(kinds), strict=True):
        series = []
        for n, (file, table) in enumerate(zip(shown, tables, strict=True)):
            cells = {layer: cell for (layer, of), cell in sorted(table.items()) if of == kind}
            if n == 0:
                before = [(float(at), float(median(t.rank_before for t in cell))) for at, cell in cells.items()]
                series.append(_Series(None, "LoRA", before))
            after = [(float(at), float(median(t.rank_after for t in cell))) for at, cell in cells.items()]
            series.append(_Series(file.colour, f"{file.number}", after))
        if len(series[0].points) > 1 and any(len({y for _, y in s.points}) > 1 for s in series):
            plots.append(_lines(f"Rank of {label}", "layer", series, percent=False))
    return plots[:_PANELS]


def same_ranks(files: Sequence[File]) -> list[tuple[File, str]]:
    """Return the files all of whose modules have one rank, with that rank in words."""
    ranks = [(f, {t.rank_after for t in f.kept.targets}) for f in files]
    return [(f, f"rank {next(iter(rank))} everywhere") for f, rank in ranks if len(rank) == 1]


# --- spectrum -------------------------------------------------------------------------------------------------------


def spectrum_plot(spectra: Iterable[tuple[str, Sequence[float]]]) -> Lines | None:
    """Return, by kind of module, the share of the energy that so many components hold, the median over the layers.

    `spectra` are names of targets with their singular values.
    """
    kinds: dict[str, list[list[float]]] = {}
    for name, values in spectra:
        total = math.fsum(v * v for v in values)
        if total <= 0 or not math.isfinite(total):
            continue
        held, sums = 0.0, [0.0]
        for value in sorted(values, reverse=True):
            held += value * value
            sums.append(min(held / total, 1.0))
        kinds.setdefault(".".join("*" if part.isdecimal() else part for part in name.split(".")), []).append(sums)
    if not kinds:
        return None
    series = []
    for n, (label, rows) in enumerate(zip(_brief(kind_labels(list(kinds))), kinds.values(), strict=True)):
        ranks = range(max(map(len, rows)))
        series.append(_Series(n, label, [(float(k), median(row[min(k, len(row) - 1)] for row in rows)) for k in ranks]))
    series = sorted(series, key=lambda s: s.points[1][1])
    if len(series) > _LINES:  # the flattest and the steepest
        series = [*series[: _LINES // 2], *series[-_LINES // 2 :]]
    return _lines("Energy that the first components hold, median over the layers", "components", series, percent=True)


def _brief(labels: Sequence[str]) -> list[str]:
    """The last parts of names, where these tell them apart."""
    ends = [label.rpartition(".")[2] for label in labels]
    return ends if len(set(ends)) == len(ends) else list(labels)


# --- refinement -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """One refinement: its name, and the share closed on held-out data after so many steps."""

    name: str
    points: tuple[tuple[int, float], ...]


def read_curves(path: Path) -> list[Curve]:
    """Return the refinements of a log that `refine --log` wrote. Raises E-DATA for a file that is none, E-IO-READ."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise DataError("is no log of a refinement", fix="give a file that refine --log wrote", path=path) from None
    except OSError as error:
        raise FileReadError(f"cannot be read: {error.strerror}", path=path) from None
    runs: list[list[tuple[int, float]]] = []
    for line in lines:
        event = _event(line)
        if event.get("event") == "start" and _is_number(event.get("base")) and event["base"] > 0:
            runs.append([(0, 1 - event["before"] / event["base"])] if _is_number(event.get("before")) else [])
        elif event.get("event") == "held-out" and runs and all(map(_is_number, map(event.get, ("step", "closed")))):
            runs[-1].append((int(event["step"]), float(event["closed"])))
    if not runs:
        raise DataError("is no log of a refinement", fix="give a file that refine --log wrote", path=path)
    names = [path.stem if len(runs) == 1 else f"{path.stem} {n}" for n in range(1, len(runs) + 1)]
    return [Curve(name, tuple(points)) for name, points in zip(names, runs, strict=True) if points]


def _event(line: str) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:  # the last line of a run that was broken off
        return {}
    return event if isinstance(event, dict) else {}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def curve_plot(curves: Sequence[Curve]) -> Lines | None:
    """Return the plot of refinements; None without one."""
    series = [_Series(n, c.name, c.points) for n, c in enumerate(curves[:_LINES]) if c.points]
    if not series:
        return None
    return _lines("Share of the distance closed on held-out data", "steps", series, percent=True)


# --- any of them ----------------------------------------------------------------------------------------------------


def _lines(title: str, across: str, series: Sequence[_Series], percent: bool) -> Lines:
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    low = _floor(min(ys)) if percent else 0.0
    high = 1.0 if percent else max(*ys, 1.0)
    left, right = min(xs), max(max(xs), min(xs) + 1)

    def place(x: float, y: float) -> tuple[float, float]:
        share = min(max((high - y) / (high - low), 0.0), 1.0)
        along = (x - left) / (right - left)
        return AREA.left + along * (AREA.right - AREA.left), AREA.top + share * (AREA.bottom - AREA.top)

    ends = [place(*max(s.points)) for s in series]
    labels = _stacked([(y, s.name) for (_, y), s in zip(ends, series, strict=True)])
    lines = [
        Line(s.colour, _path(s.points, place), label, f"{s.name}: {_in_words(s.points, percent)}")
        for s, label in zip(series, labels, strict=True)
    ]
    steps = _steps(low, high, 5)
    grid = [(place(left, y)[1], f"{100 * y:.0f}" if percent else f"{y:g}") for y in steps]
    ticks = [(place(x, low)[0], f"{x:,.0f}") for x in _steps(left, right, 4) if x == int(x)]
    return Lines(title, across, grid, ticks, lines)


def _floor(lowest: float) -> float:
    """Return where the axis of shares begins: at zero, or at -1, or nearer to shares that are all high."""
    return -1.0 if lowest < -0.5 else max((edge for edge in (-0.5, 0.0, 0.5, 0.8, 0.9) if edge <= lowest), default=-1.0)


def _stacked(ends: Sequence[tuple[float, str]]) -> list[Label]:
    """Labels right of the area, each at the height of the end of its line, or the nearest that is free."""
    order = sorted(range(len(ends)), key=lambda n: ends[n][0])
    heights: list[float] = []
    for n in order:
        heights.append(max(ends[n][0] + SIZE / 3, heights[-1] + _APART if heights else _ROOM.top + SIZE))
    for k in reversed(range(len(heights))):  # those that run out below move up
        heights[k] = min(heights[k], _ROOM.bottom - _APART * (len(heights) - 1 - k))
    left = AREA.right + 6
    texts = [short(ends[n][1], 11) for n in order]
    made = [Label(text, left, y, boxed(text, left, y), "") for text, y in zip(texts, heights, strict=True)]
    return [label for _, label in sorted(zip(order, made, strict=True), key=lambda pair: pair[0])]


def _path(points: Sequence[tuple[float, float]], place: Place) -> str:
    """The path through the points; where the steps go back, as after a diverging try, a new piece begins."""
    path, last = "", math.inf
    for x, y in points:
        at = place(x, y)
        path += f"{'L' if x > last else 'M'}{at[0]:.1f} {at[1]:.1f}"
        last = x
    return path


def _in_words(points: Sequence[tuple[float, float]], percent: bool) -> str:
    """The first and last values of runs of equal ones, at most twelve."""
    values = [(x, f"{100 * y:.1f} %" if percent else f"{y:g}") for x, y in points]
    runs = [next(run) for _, run in groupby(values, key=lambda v: v[1])]
    step = math.ceil(len(runs) / 12)
    return ", ".join(f"{text} at {x:g}" for x, text in [*runs[:-1:step], *runs[-1:]])


def _steps(low: float, high: float, most: int) -> list[float]:
    """Round numbers from low to high, at most `most` of them and one."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    return [round(n * step, 12) for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
