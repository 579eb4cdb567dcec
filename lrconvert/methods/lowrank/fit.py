"""From a planned quantizer to the numbers of a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from lrconvert.core.dtypes import F32, F64, Array
from lrconvert.lora import svd
from lrconvert.lora.adapter import LoraAdapter, LoraTarget
from lrconvert.lora.packing import coded_values
from lrconvert.methods.base import FitContext
from lrconvert.methods.lowrank.coordinates import PLAIN, Coordinates
from lrconvert.methods.lowrank.form import Config, starts
from lrconvert.methods.shared import payload


def fit(lora: LoraAdapter, config: Config, context: FitContext, coordinates: Coordinates = PLAIN) -> dict[str, Array]:
    """Return the payload of the components that `config.quantizer` keeps."""
    quantizer = config.quantizer
    assert quantizer is not None and quantizer.codes is not None, "a config of a file has no quantizer: plan anew"
    begins = starts(config, lora.shapes())
    gains = np.zeros(len(config.models), np.float32)
    finished = 0
    for which in _alike(lora.targets, config.counts):
        out, inner = lora.targets[which[0]].target.matrix_shape
        count = config.counts[which[0]]
        size = count * (inner + out)
        codes = np.stack([quantizer.codes[begins.numbers[n] : begins.numbers[n] + size] for n in which])
        codes = codes.reshape(len(which), count, inner + out)
        solved = solved_gains(
            [lora.targets[n] for n in which], codes[..., :inner], codes[..., inner:], context, coordinates
        )
        gains[np.array([begins.components[n] for n in which])[:, None] + np.arange(count)] = solved
        finished += len(which)
        context.progress(finished / len(lora.targets), lora.targets[which[-1]].target.name)
    return payload.rounded({"gains": gains}) | {"codes": quantizer.codes}


def _alike(pairs: Sequence[LoraTarget], counts: Sequence[int]) -> Iterator[list[int]]:
    """Yield the numbers of targets that can be looked at together: of equal shapes, ranks and counts of components."""
    for numbers in svd.stacks(pairs):
        by_count: dict[int, list[int]] = {}
        for n in numbers:
            by_count.setdefault(counts[n], []).append(n)
        by_count.pop(0, None)
        yield from by_count.values()


def solved_gains(
    pairs: Sequence[LoraTarget], a: Array, b: Array, context: FitContext, coordinates: Coordinates = PLAIN
) -> F32:
    """Return the gains (n, k) with which ``sum_j gain_j b_j a_j^T`` is nearest to the update of each of n targets, for
    coded integers a (n, k, in) and b (n, k, out), by least squares. A component of zeros has gain 0."""

    def rows(codes: Array, role: str) -> F64:
        numbers = coordinates.rows(coded_values(codes).astype(np.float64).reshape(-1, codes.shape[-1]), role)
        return np.asarray(numbers, np.float64).reshape(codes.shape)

    rows_a, rows_b = rows(a, "A"), rows(b, "B")
    weighed = rows_a
    if context.metric(pairs[0]) is not None:
        metrics = map(context.metric, pairs)
        weighed = np.stack([m.times(x) for m, x in zip(metrics, rows_a, strict=True) if m is not None])
    own_a, own_b = svd.factors_of(pairs)
    scales = np.array([pair.scale for pair in pairs], np.float64)[:, None]
    gram = svd.products(weighed, rows_a) * svd.products(rows_b, rows_b)
    right = scales * (svd.products(rows_b, own_b) * svd.products(weighed, own_a)).sum(axis=-1)
    sizes = np.sqrt(gram.diagonal(axis1=-2, axis2=-1))
    sizes = np.where(sizes > 0, sizes, 1.0)
    inverse = np.linalg.pinv(gram / (sizes[:, :, None] * sizes[:, None, :]), rcond=1e-9, hermitian=True)
    return np.asarray((inverse @ (right / sizes)[..., None])[..., 0] / sizes, np.float32)
