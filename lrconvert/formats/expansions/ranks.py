"""The rank that a server needs for an adapter.

A server has room for one rank (vLLM: `--max-lora-rank`), and the largest of an adapter counts. The factors that a form
expands to are often of a larger rank than their product: SBoRA keeps columns of the base's unit vectors, as many as its
budget has, of an update that had rank 16. The singular values of the products say what is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lrconvert.core.dtypes import Array

EXACT = 1e-6  # of the norm of the update: the rounding of its factors in float32
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vllm/config/lora.py MaxLoRARanks
MAX_ERROR = 0.01  # of the norm: what is cut off unasked


@dataclass(frozen=True)
class NeededRank:
    """Ranks in which an adapter can be served: that of its factors as they are `stored`, the smallest that is `exact`,
    and the smallest that loses no more than `MAX_ERROR` of the update's norm (`close`, with its `error`)."""

    stored: int
    exact: int
    close: int
    error: float


def needed(spectra: Sequence[Array], stored: int) -> NeededRank | None:
    """Return the ranks that a server needs for targets with these singular values, whose factors have at most the rank
    `stored`; None if all updates are zero."""
    lost = _lost(spectra, stored)
    if not lost[0]:
        return None
    errors = np.sqrt(lost / lost[0])
    exact, close = (int(np.argmax(errors <= bound)) for bound in (EXACT, MAX_ERROR))
    return NeededRank(stored, max(exact, 1), max(close, 1), float(errors[close]))


def _lost(spectra: Sequence[Array], top: int) -> Array:
    """The squared norm of what is cut off at ranks 0 to `top`, over all targets (top + 1,)."""
    squares = np.zeros(top + 1)
    for s in spectra:
        squares[: len(s)] += s * s
    return np.cumsum(squares[::-1])[::-1]


def vllm_rank(rank: int) -> int:
    """Return the `--max-lora-rank` that vLLM needs for a rank; 0 if it has none as large."""
    return next((one for one in VLLM_RANKS if one >= rank), 0)
