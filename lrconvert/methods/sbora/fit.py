"""The numbers of the lines: exact at 16 bits, else codes and scales, with the error fed back where it helps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lrconvert.core.dtypes import F64, Array
from lrconvert.lora import packing, svd
from lrconvert.lora.adapter import LoraTarget
from lrconvert.lora.input_statistics import Moment
from lrconvert.methods.sbora.columns import best_columns, column_energies, largest, metric_rows, row_energies
from lrconvert.methods.sbora.form import Start

_SWEEPS = 4  # of quantizing columns one after another
_LEAST_GAIN = 0.01  # of the error, for another sweep


@dataclass(frozen=True)
class Lines:
    """Lines of one width: places (n,), codes or 16-bit numbers (n, length), scales (n,) or none."""

    places: Array
    numbers: Array
    scales: Array


def _quantized(rows: F64, q: int, weights: Array | None = None) -> tuple[Array, Array, F64]:
    """(codes or numbers, scales, the numbers that they stand for) of rows (n, length) at width q."""
    if q == 16:
        numbers = rows.astype(np.float32)
        return numbers, np.zeros(0, np.float32), numbers.astype(np.float64)
    codes, scales = packing.quantize_rows(rows, q, weights)
    return codes, scales, packing.code_values(codes, q).astype(np.float64) * scales[:, None]


def store(arrays: Mapping[str, Array], parts: Mapping[int, Lines], start: Start) -> None:
    """Write the lines of one target, by width, where they belong; within a width by place."""
    line, scale = start.line, start.scale
    for q in sorted(parts, reverse=True):
        order = np.argsort(parts[q].places, kind="stable")
        numbers = parts[q].numbers[order]
        arrays["indices"][line : line + len(order)] = parts[q].places[order]
        at = start.numbers[q]
        arrays["half" if q == 16 else f"codes.{q}"][at : at + numbers.size] = numbers.reshape(-1)
        if q != 16:
            arrays["scales"][scale : scale + len(order)] = parts[q].scales[order]
            scale += len(order)
        line += len(order)


def _masks(widths: Sequence[int]) -> dict[int, Array]:
    return {q: np.array(widths) == q for q in dict.fromkeys(widths)}


def fit_rows(pair: LoraTarget, widths: Sequence[int], metric: Moment | None) -> dict[int, Lines]:
    """The rows that hold most. A row's scale is solved again under the metric; its codes see the metric's diagonal."""
    factors = svd.svd(pair, metric)
    places = largest(row_energies(factors), len(widths))
    rows = (factors.U[places] * factors.s) @ factors.Vt
    parts = {}
    for q, mask in _masks(widths).items():
        codes, scales, _ = _quantized(rows[mask], q, None if metric is None else metric.squares)
        if metric is not None and q != 16:
            odd = packing.code_values(codes, q).astype(np.float64)
            seen = metric.times(odd)
            squares = np.sum(seen * odd, axis=1)
            scales = (np.sum(seen * rows[mask], axis=1) / np.maximum(squares, 1e-300)).astype(np.float32)
        parts[q] = Lines(places[mask], codes, scales)
    return parts


def fit_columns(pair: LoraTarget, widths: Sequence[int], metric: Moment | None) -> dict[int, Lines]:
    """Columns of the plain norm are those of the update that hold most; under a metric see `best_columns`."""
    factors = svd.svd(pair, metric)
    if metric is not None:
        return _fit_under(factors, widths, metric)
    places = largest(column_energies(factors), len(widths))
    columns = ((factors.U * factors.s) @ factors.Vt[:, places]).T
    parts = {}
    for q, mask in _masks(widths).items():
        codes, scales, _ = _quantized(columns[mask], q)
        parts[q] = Lines(places[mask], codes, scales)
    return parts


def _fit_under(factors: svd.Factors, widths: Sequence[int], metric: Moment) -> dict[int, Lines]:
    """Columns under a metric: B = delta M[:, S] M[S, S]^-1. Quantized, each in turn takes over what the errors of all
    others leave in its direction, the narrowest first, while that helps: no turn raises the error."""
    chosen = best_columns(factors, len(widths), metric)
    places = np.array(chosen)
    rows = metric_rows(metric, chosen)
    gram = rows[:, places]
    wanted = np.linalg.solve(gram, rows @ factors.Vt.T) @ (factors.U * factors.s).T  # (r, out)
    masks = _masks(widths)
    codes: list[Array] = [np.zeros(0)] * len(widths)
    scales: list[Array] = [np.zeros(0)] * len(widths)
    values = np.empty_like(wanted)
    for q, mask in masks.items():
        some, some_scales, values[mask] = _quantized(wanted[mask], q)
        for n, j in enumerate(np.flatnonzero(mask).tolist()):
            codes[j], scales[j] = some[n], some_scales[n : n + 1]
    error = wanted - values
    size = float(np.sum((gram @ error) * error))
    for _ in range(_SWEEPS if set(widths) != {16} else 0):
        for j in reversed(range(len(widths))):
            goal = values[j] + gram[j] @ error / gram[j, j]
            code, scale, value = _quantized(goal[None], widths[j])
            if np.sum((goal - value[0]) ** 2) < np.sum((goal - values[j]) ** 2):
                codes[j], scales[j], values[j] = code[0], scale, value[0]
                error[j] = wanted[j] - value[0]
        before, size = size, float(np.sum((gram @ error) * error))
        if size > before * (1 - _LEAST_GAIN):
            break
    parts = {}
    for q, mask in masks.items():
        which = np.flatnonzero(mask)
        parts[q] = Lines(places[mask], np.stack([codes[j] for j in which]), np.concatenate([scales[j] for j in which]))
    return parts
