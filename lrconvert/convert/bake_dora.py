"""DoRA turned into a plain LoRA, for forms and servers that know no magnitudes.

DoRA's weight is ``f * (W + s B A)`` with f = magnitude / norm, so its update ``(f - 1) * W + f * s B A`` has full rank:
a LoRA holds the best part of a given rank, and how much that is gets measured. It needs the base's weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from lrconvert.core.dtypes import F64, STORAGE, Stored, decode, round_to
from lrconvert.core.errors import OptionError
from lrconvert.io.checkpoint import Checkpoint
from lrconvert.lora import svd
from lrconvert.lora.adapter import LoraAdapter, LoraTarget, Target
from lrconvert.lora.base_weights import BaseWeights
from lrconvert.merge.arithmetic.dora import checked_factor

_OVERSAMPLING = 10
_ITERATIONS = 4  # of the subspace: the spectrum of the part that comes from W decays slowly
_ROWS = 1 << 22  # elements of a weight that are read as float64 at a time


@dataclass(frozen=True)
class Baked:
    """The plain LoRA, and of each baked target its name and the share of the update's energy that it holds."""

    lora: LoraAdapter
    shares: tuple[tuple[str, float], ...]

    @property
    def note(self) -> str:
        """One line for the user."""
        name, least = min(self.shares, key=lambda item: item[1])
        mean = sum(share for _, share in self.shares) / len(self.shares)
        return f"DoRA baked: plain updates hold {mean:.4f} of the whole on average, {least:.4f} in {name}"


def bake_dora(lora: LoraAdapter, checkpoint: Checkpoint, rank: int) -> Baked:
    """`lora`, whose targets are viewed as the base stores them, with every target that has a DoRA magnitude replaced by
    the best plain update of that `rank`, factors in float32.

    By subspace iteration (Halko, Martinsson and Tropp, 2011). Raises E-OPTION, E-BASE, E-ORIENT, E-VALUE.
    """
    magnitudes = {e.name: e for e in lora.extras if e.use == "magnitude"}
    if not magnitudes:
        raise OptionError("the adapter has no DoRA magnitudes to bake")
    if rank < 1:
        raise OptionError(f"a DoRA cannot be baked into a rank of {rank}")
    weights = BaseWeights(lora, checkpoint)
    pairs, shares = [], []
    for pair in lora.targets:
        extra = magnitudes.get(pair.target.name)
        if extra is None:
            pairs.append(pair)
            continue
        magnitude = decode(np.frombuffer(extra.data, STORAGE[extra.dtype]), extra.dtype).astype(np.float64)
        update = _update(pair, weights.rows(pair.target, 0, pair.target.out_features), magnitude)
        a, b, share = _best(update, rank)
        stored_a, stored_b = (Stored("F32", round_to(x, "F32")) for x in (a, b))
        pairs.append(LoraTarget(pair.target, stored_a, stored_b, 1.0))
        shares.append((pair.target.name, share))
    extras = tuple(e for e in lora.extras if e.use != "magnitude")
    return Baked(replace(lora, targets=tuple(pairs), extras=extras), tuple(shares))


def _update(pair: LoraTarget, weight: np.ndarray, magnitude: F64) -> np.ndarray:
    """Return the update that DoRA adds to `weight`, in its dtype; rows are computed in float64."""
    update = np.empty_like(weight)
    a, b = pair.A.astype(np.float64), pair.B.astype(np.float64) * pair.scale
    step = max(1, _ROWS // weight.shape[1])
    for top in range(0, weight.shape[0], step):
        rows = slice(top, top + step)
        w = weight[rows].astype(np.float64)
        v = w + b[rows] @ a
        update[rows] = v * checked_factor(magnitude[rows], np.linalg.norm(v, axis=1))[:, None] - w
    return update


def _best(update: np.ndarray, rank: int) -> tuple[F64, F64, float]:
    """(A, B, share of the energy): the best part of `rank` of a dense matrix, split evenly between the factors."""
    rank = min(rank, *update.shape)
    energy = float(np.sum(np.square(update, dtype=np.float64)))
    if energy == 0:
        return np.zeros((1, update.shape[1])), np.zeros((update.shape[0], 1)), 1.0
    width = min(rank + _OVERSAMPLING, *update.shape)
    start = np.random.default_rng(0).standard_normal((update.shape[1], width)).astype(update.dtype)
    basis = np.linalg.qr(update @ start)[0]
    for _ in range(_ITERATIONS):
        basis = np.linalg.qr(update @ np.linalg.qr(update.T @ basis)[0])[0]
    whole = LoraTarget(
        Target("", update.shape),
        Stored("F64", (basis.T @ update).astype(np.float64)),
        Stored("F64", basis.astype(np.float64)),
        1.0,
    )
    factors = svd.svd(whole)
    a, b = svd.balanced(factors, rank)
    return a, b, min(1.0, float(np.sum(factors.s[:rank] ** 2)) / energy)
