"""DoRA turned into a plain LoRA, for forms and servers that know no magnitudes.

DoRA's weight is ``f * (W + s B A)`` with f = magnitude / norm, so its update ``(f - 1) * W + f * s B A`` has full rank:
a LoRA holds the best part of a given rank, and how much that is gets measured. It needs the base's weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from lrconvert.core.dtypes import F64, STORAGE, Stored, decode, round_to
from lrconvert.core.errors import OptionError
from lrconvert.io.checkpoint import Checkpoint
from lrconvert.lora import factoring
from lrconvert.lora.adapter import MAGNITUDES, ExtraTensor, LoraAdapter, LoraTarget
from lrconvert.lora.base_weights import BaseWeights
from lrconvert.merge.arithmetic.dora import checked_factor

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

    By `factoring.of_matrix`. Raises E-OPTION, E-BASE, E-ORIENT, E-VALUE.
    """
    magnitudes = {e.name: e for e in lora.extras if e.use in MAGNITUDES}
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
        update = _update(pair, weights.rows(pair.target, 0, pair.target.out_features), extra)
        best = factoring.of_matrix(update, rank)
        energy = float(np.sum(np.square(update, dtype=np.float64)))
        stored_a, stored_b = (Stored("F32", round_to(x, "F32")) for x in (best.a, best.b))
        pairs.append(LoraTarget(pair.target, stored_a, stored_b, 1.0))
        shares.append((pair.target.name, 1 - best.lost / energy if energy else 1.0))
    extras = tuple(e for e in lora.extras if e.use not in MAGNITUDES)
    return Baked(replace(lora, targets=tuple(pairs), extras=extras), tuple(shares))


def _update(pair: LoraTarget, weight: np.ndarray, extra: ExtraTensor) -> np.ndarray:
    """Return the update that DoRA adds to `weight`, in its dtype; rows are computed in float64."""
    magnitude = decode(np.frombuffer(extra.data, STORAGE[extra.dtype]), extra.dtype).astype(np.float64)
    update = np.empty_like(weight)
    if extra.use == "magnitude":
        for rows, w, v in _sums(pair, weight):
            update[rows] = v * checked_factor(magnitude[rows], np.linalg.norm(v, axis=1))[:, None] - w
        return update
    squares = np.zeros(weight.shape[1])
    for _, _, v in _sums(pair, weight):
        squares += np.square(v).sum(axis=0)
    norms = np.sqrt(squares.reshape(magnitude.size, -1).sum(axis=1))
    factor = np.repeat(checked_factor(magnitude, norms), weight.shape[1] // magnitude.size)
    for rows, w, v in _sums(pair, weight):
        update[rows] = v * factor - w
    return update


def _sums(pair: LoraTarget, weight: np.ndarray) -> Iterator[tuple[slice, F64, F64]]:
    """Yield (rows, W, W + s B A) of a few rows each, in float64."""
    a, b = pair.A.astype(np.float64), pair.B.astype(np.float64) * pair.scale
    step = max(1, _ROWS // weight.shape[1])
    for top in range(0, weight.shape[0], step):
        rows = slice(top, top + step)
        w = weight[rows].astype(np.float64)
        yield rows, w, w + b[rows] @ a
