"""LoRA-XS (arXiv 2405.17604): of an update B R A only R (r, r) is trained; B = U S and A = V^T are the base's own.

R begins at the best fit to the LoRA, (U S)^+ dW V: what is known of the LoRA is used, as the other forms use it.
Numbers count at 16 bit; B and A are made from the base, which a reader has.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from chat.peers.components import Component, as_lora
from chat.peers.distil import Schedule, distil

_RATE = 1e-3  # of Adam, before the probe


def trained(
    lora: Any, nbytes: int, base: Path, data: Path, schedule: Schedule | None
) -> tuple[Any, int, dict[str, Any]]:
    """Return the LoRA of at most `nbytes`, its bytes, and the rate; `schedule` None leaves R at its start."""
    import torch

    from lrconvert.live.load_model import load_model

    rank = int(np.sqrt(nbytes / 2 / len(lora.targets)))
    if rank == 0:
        raise ValueError(f"LoRA-XS takes at least {2 * len(lora.targets)} bytes")
    weights = dict(load_model(base).named_parameters())
    torch.manual_seed(0)  # the search for singular vectors begins at random ones
    frames, cores = [], []
    for pair in lora.targets:
        weight = weights[pair.target.name].detach().double()
        u, s, v = torch.svd_lowrank(weight.float(), q=min(rank + 8, *weight.shape), niter=4)
        u, s, v = (x.double() for x in (u[:, :rank], s[:rank], v[:, :rank]))
        b, a = torch.from_numpy(pair.B.astype(np.float64) * pair.scale), torch.from_numpy(pair.A.astype(np.float64))
        cores.append(torch.nn.Parameter((((u.T @ b) @ (a @ v)) / s[:, None]).float()))
        frames.append(((u * s).float(), v.T.contiguous().float()))

    def factors() -> list[tuple[Any, Any]]:
        return [(core @ a, b) for core, (b, a) in zip(cores, frames, strict=True)]

    note = distil(base, lora, data, cores, factors, schedule) if schedule else {}
    components = []
    with torch.no_grad():
        for core in cores:
            core.copy_(core.half().float())
        for n, (a, b) in enumerate(factors()):
            components += [Component(n, k, b[:, k].numpy(), a[k].numpy()) for k in range(rank)]
    return as_lora(lora, components), 2 * rank * rank * len(cores), note
