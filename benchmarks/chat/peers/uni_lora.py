"""Uni-LoRA (arXiv 2506.00799): all numbers of a LoRA are drawn from one short vector, each of which stands in equally
many random places, divided by the root of their number.

Rank 4 and the start as published: the vector uniform within 0.02. Numbers count at 16 bit; places come from a seed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from chat.peers.components import Component, as_lora
from chat.peers.distil import Schedule, distil

_RANK, _START, _RATE = 4, 0.02, 5e-3


def places(numbers: int, length: int, seed: int) -> np.ndarray:
    """Return which number of the vector stands in each place, all equally often or once more."""
    rng = np.random.default_rng(seed)
    return rng.permutation(np.arange(numbers) % length)


def trained(lora: Any, nbytes: int, base: Path, data: Path, schedule: Schedule) -> tuple[Any, int, dict[str, Any]]:
    """Return the LoRA of at most `nbytes`, its bytes, and the rate."""
    import torch

    shapes = [pair.target.matrix_shape for pair in lora.targets]
    numbers, length = _RANK * sum(map(sum, shapes)), nbytes // 2
    index = torch.from_numpy(places(numbers, length, schedule.seed))
    divided = torch.bincount(index, minlength=length).float().rsqrt()[index]
    draw = torch.Generator().manual_seed(schedule.seed)
    vector = torch.nn.Parameter((2 * torch.rand(length, generator=draw) - 1) * _START)

    def factors() -> list[tuple[Any, Any]]:
        flat, at, pairs = vector[index] * divided, 0, []
        for outer, inner in shapes:
            a = flat[at : at + _RANK * inner].view(_RANK, inner)
            at += _RANK * (inner + outer)
            pairs.append((a, flat[at - _RANK * outer : at].view(outer, _RANK)))
        return pairs

    note = distil(base, lora, data, [vector], factors, schedule)
    with torch.no_grad():
        vector.copy_(vector.half().float())
        made = [(a.numpy(), b.numpy()) for a, b in factors()]
    components = [Component(n, k, b[:, k], a[k]) for n, (a, b) in enumerate(made) for k in range(_RANK)]
    return as_lora(lora, components), 2 * length, note
