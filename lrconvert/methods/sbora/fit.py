"""The numbers of the lines: exact at 16 bits, else codes and scales, with the error fed back where it helps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lrconvert.core.dtypes import Array
from lrconvert.lora import packing, svd
from lrconvert.lora.adapter import LoraTarget
from lrconvert.lora.input_statistics import Moment
from lrconvert.methods.sbora.columns import best_columns, both_sides, largest, line_energies, metric_rows, row_energies
from lrconvert.methods.sbora.form import Start
from lrconvert.methods.shared import payload
from lrconvert.methods.shared.mixed_widths import masks, numbers_name, quantize

_SWEEPS = 4  # of quantizing columns one after another
_LEAST_GAIN = 0.01  # of the error, for another sweep


@dataclass(frozen=True)
class Lines:
    """Lines of one width: places (n,), codes or 16-bit numbers (n, length), scales (n, 1) or (n, 0)."""

    places: Array
    numbers: Array
    scales: Array


def store(arrays: Mapping[str, Array], parts: Mapping[int, Lines], start: Start) -> None:
    """Write the lines of one target, by width, where they belong; within a width by place."""
    line, scale = start.line, start.scale
    for q, lines in sorted(parts.items(), reverse=True):
        order = np.argsort(lines.places, kind="stable")
        line = payload.put(arrays["indices"], line, lines.places[order])
        payload.put(arrays[numbers_name(q)], start.numbers[q], lines.numbers[order])
        if q != 16:
            scale = payload.put(arrays["scales"], scale, lines.scales[order])


def fit_lines(pairs: Sequence[LoraTarget], widths: Sequence[Sequence[int]], by_rows: bool) -> list[dict[int, Lines]]:
    """Return the rows, or the columns, of targets of equal shapes and ranks that hold most in the plain norm, as many
    of each target as `widths` has, those that hold most at the first. All of a width are quantized together."""
    sides = both_sides(pairs)[by_rows]
    places = [largest(own, len(row)) for own, row in zip(line_energies(*sides), widths, strict=True)]
    chosen = [svd.product(one[:, columns].T, two) for columns, one, two in zip(places, *sides, strict=True)]
    lines = np.concatenate(chosen)
    owners, where = np.repeat(np.arange(len(pairs)), [len(row) for row in widths]), np.concatenate(places)
    parts: list[dict[int, Lines]] = [{} for _ in pairs]
    for q, mask in masks([q for row in widths for q in row]).items():
        codes, scales, _ = quantize(lines[mask], q)
        which, own = where[mask], owners[mask]
        ends = np.searchsorted(own, np.arange(len(pairs) + 1))
        for n in np.unique(own).tolist():
            own_lines = slice(ends[n], ends[n + 1])
            parts[n][q] = Lines(which[own_lines], codes[own_lines], scales[own_lines])
    return parts


def fit_under(pair: LoraTarget, widths: Sequence[int], metric: Moment, by_rows: bool) -> dict[int, Lines]:
    """Return the rows, or the columns, of one target under a metric."""
    factors = svd.svd(pair, metric)
    return (_rows_under if by_rows else _columns_under)(factors, widths, metric)


def _rows_under(factors: svd.Factors, widths: Sequence[int], metric: Moment) -> dict[int, Lines]:
    """The rows that hold most. The scale of a row is solved again; its codes see the diagonal alone."""
    places = largest(row_energies(factors), len(widths))
    rows = (factors.U[places] * factors.s) @ factors.Vt
    parts = {}
    for q, mask in masks(widths).items():
        codes, scales, _ = quantize(rows[mask], q, weights=metric.squares)
        if q != 16:
            odd = packing.code_values(codes, q).astype(np.float64)
            weighed = metric.times(odd)
            squares = np.sum(weighed * odd, axis=1, keepdims=True)
            products = np.sum(weighed * rows[mask], axis=1, keepdims=True)
            scales = (products / np.maximum(squares, 1e-300)).astype(np.float32)
        parts[q] = Lines(places[mask], codes, scales)
    return parts


def _columns_under(factors: svd.Factors, widths: Sequence[int], metric: Moment) -> dict[int, Lines]:
    """Columns under a metric: B = delta M[:, S] M[S, S]^-1. Quantized, each in turn takes over what the errors of all
    others leave in its direction, the narrowest first, while that helps: no turn raises the error."""
    chosen = best_columns(factors, len(widths), metric)
    places = np.array(chosen)
    rows = metric_rows(metric, chosen)
    gram = rows[:, places]
    wanted = np.linalg.solve(gram, rows @ factors.Vt.T) @ (factors.U * factors.s).T  # (r, out)
    codes: list[Array] = [np.zeros(0)] * len(widths)
    scales: list[Array] = [np.zeros(0)] * len(widths)
    values = np.empty_like(wanted)
    for q, mask in masks(widths).items():
        numbers, steps, values[mask] = quantize(wanted[mask], q)
        for n, j in enumerate(np.flatnonzero(mask).tolist()):
            codes[j], scales[j] = numbers[n], steps[n]
    error = wanted - values
    size = float(np.sum((gram @ error) * error))
    for _ in range(_SWEEPS if set(widths) != {16} else 0):
        for j in reversed(range(len(widths))):
            goal = values[j] + gram[j] @ error / gram[j, j]
            numbers, steps, value = quantize(goal[None], widths[j])
            if np.sum((goal - value[0]) ** 2) < np.sum((goal - values[j]) ** 2):
                codes[j], scales[j], values[j] = numbers[0], steps[0], value[0]
                error[j] = wanted[j] - value[0]
        before, size = size, float(np.sum((gram @ error) * error))
        if size > before * (1 - _LEAST_GAIN):
            break
    parts = {}
    for q, mask in masks(widths).items():
        which = np.flatnonzero(mask)
        parts[q] = Lines(places[mask], np.stack([codes[j] for j in which]), np.stack([scales[j] for j in which]))
    return parts
