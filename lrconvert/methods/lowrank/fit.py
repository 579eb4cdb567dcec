"""From a planned quantizer to the numbers of a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lrconvert.core.dtypes import F32, F64, Array
from lrconvert.lora.adapter import LoraAdapter
from lrconvert.lora.packing import coded_values
from lrconvert.lora.svd import Factors
from lrconvert.methods.base import FitContext
from lrconvert.methods.lowrank.coordinates import PLAIN, Coordinates
from lrconvert.methods.lowrank.form import Config
from lrconvert.methods.lowrank.rounding import integers, rows_of, scaled_rows
from lrconvert.methods.shared import payload

if TYPE_CHECKING:
    from lrconvert.lora.input_statistics import Moment


def fit(lora: LoraAdapter, config: Config, context: FitContext, coordinates: Coordinates = PLAIN) -> dict[str, Array]:
    """Return the payload of the components that `config.quantizer` keeps."""
    quantizer = config.quantizer
    assert quantizer is not None, "a config of a file has no quantizer: plan anew"
    gains, codes = [np.zeros(0, np.float32)], []
    for which, (pair, kept) in enumerate(zip(lora.targets, quantizer.kept, strict=True)):
        if kept:
            factors, factor = scaled_rows(pair, context)
            both = rows_of(factors, factor, max(kept) + 1, coordinates)
            a, b = (integers(rows[list(kept)], quantizer.step) for rows in both)
            codes.append(np.concatenate([a, b], axis=1).reshape(-1))
            gains.append(solved_gains(factors, a, b, context.metric(pair), coordinates))
        context.progress((which + 1) / len(lora.targets), pair.target.name)
    return payload.rounded({"gains": np.concatenate(gains)}) | {"codes": np.concatenate(codes)}


def solved_gains(factors: Factors, a: Array, b: Array, metric: Moment | None, coordinates: Coordinates = PLAIN) -> F32:
    """Return the gains (k,) with which ``sum_j gain_j b_j a_j^T`` is nearest to an update, for coded integers a (k, in)
    and b (k, out), by least squares. A component of zeros has gain 0."""
    rows_a = coordinates.rows(coded_values(a).astype(np.float64), "A")
    rows_b = coordinates.rows(coded_values(b).astype(np.float64), "B")
    weighed: F64 = rows_a if metric is None else metric.times(rows_a)
    gram = (weighed @ rows_a.T) * (rows_b @ rows_b.T)
    right = np.einsum("kr,kr->k", (rows_b @ factors.U) * factors.s, weighed @ factors.Vt.T)
    scale = np.sqrt(gram.diagonal())
    scale = np.where(scale > 0, scale, 1.0)
    solution = np.linalg.lstsq(gram / np.outer(scale, scale), right / scale, rcond=1e-9)[0]
    return np.asarray(solution / scale, np.float32)
