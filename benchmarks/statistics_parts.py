"""Which part of the fits' metric brings answers nearer: that within a target, that between targets, or neither.

    python benchmarks/statistics_parts.py TEACHER SHARE [FORM]     a table; such as: trec 1.6

Files of SHARE percent of the LoRA's bytes at 16 bit, whole, refitted and not refined: KL closed on held-out texts, with
its interval. "Within" is the shape of a target's metric at the target's own weight, "between" the weights alone. The
leading direction of an input's second moments is mostly its mean: one direction that all tokens share.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import accuracy
import cells
import numpy as np
import teachers
from forms import statistics_of

from lrconvert import api
from lrconvert.lora import svd
from lrconvert.lora.adapter import LoraTarget
from lrconvert.lora.input_statistics import Moment

Metric = Callable[[LoraTarget, Moment], Moment]
_FIT = svd.fit_metric  # as it is before a row puts another in its place


def _energy(pair: LoraTarget, moment: Moment | None) -> float:
    out, inner = pair.target.matrix_shape
    return svd.distance(pair, np.zeros((0, inner)), np.zeros((out, 0)), moment)[1]


def _at(pair: LoraTarget, shape: Moment, weight: float) -> Moment:
    """`shape` scaled so that the update has the energy `weight`."""
    energy = _energy(pair, shape)
    return shape.scaled(weight / energy) if energy > 0 else shape


def _within(pair: LoraTarget, moment: Moment) -> Moment:
    return _at(pair, moment.damped(), _energy(pair, None))


def _between(pair: LoraTarget, moment: Moment) -> Moment:
    plain = Moment(0, diagonal=np.ones(moment.width, np.float32))
    return _at(pair, plain, _energy(pair, _FIT(pair, moment)))


def _without_leading(pair: LoraTarget, moment: Moment) -> Moment:
    """The metric within targets, of moments (exact, or a sketch) whose largest eigenvalue is taken to be zero."""
    if moment.matrix is not None:
        values, vectors = np.linalg.eigh(moment.matrix.astype(np.float64))
        rank_one = values[-1] * np.outer(vectors[:, -1], vectors[:, -1])
        return _within(pair, replace(moment, matrix=(moment.matrix - rank_one).astype(np.float32)))
    if moment.rows is None:
        return _within(pair, moment)
    left, sizes, right = np.linalg.svd(moment.rows.astype(np.float64), full_matrices=False)
    rows = (left[:, 1:] * sizes[1:] @ right[1:]).astype(np.float32)
    diagonal = (moment.rest + np.einsum("mn,mn->n", rows, rows, dtype=np.float64)).astype(np.float32)
    return _within(pair, replace(moment, rows=rows, diagonal=diagonal))


METRICS: dict[str, Metric | None] = {
    "no statistics": None,
    "statistics": _FIT,
    "within targets alone": _within,
    "between targets alone": _between,
    "within targets, without the leading direction": _without_leading,
}


def _row(teacher: teachers.Teacher, share: float, form: str, name: str) -> list[Any]:
    lora, metric = api.load_lora(teacher.adapter), METRICS[name]
    statistics = None if metric is None else statistics_of(teacher, teacher.seen)
    if metric is not None:
        svd.fit_metric = metric  # type: ignore[assignment]  # of this process alone
    done = api.convert(lora, form, target_size=int(lora.half_bytes * share / 100), statistics=statistics)
    scores = accuracy.scores_of(teacher, done.compact)
    closed, low, high = scores["closed"]
    return [name, f"{done.sizes.adapter:,}", f"{closed:.1%} ({low:.1%} to {high:.1%})"]


if __name__ == "__main__":
    given = teachers.get(sys.argv[1])
    if isinstance(given, str):
        sys.exit(given)
    form = sys.argv[3] if len(sys.argv) > 3 else "lowrank"
    rows = [_row(given, float(sys.argv[2]), form, name) for name in METRICS]
    print(cells.markdown(["metric of the fit", "bytes", "KL closed"], rows))
