"""Several processes that refine one adapter together, as torchrun and accelerate start them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This process among all: `rank` of `size`."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """True for the process that writes files."""
        return self.rank == 0

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors of one dtype and device over all processes, in place."""
        if self.size > 1 and tensors:
            flat = torch.cat([t.reshape(-1) for t in tensors])
            dist.all_reduce(flat)
            at = 0
            for t in tensors:
                t.copy_(flat[at : at + t.numel()].view_as(t))
                at += t.numel()

    def totals(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Return the sums of numbers over all processes."""
        if self.size == 1:
            return [float(v) for v in values]
        sums = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(sums)
        return [float(v) for v in sums.tolist()]

    def of_first(self, value: float, device: torch.device) -> float:
        """Return the value that the first process has."""
        return self.totals([value if self.is_first else 0.0], device)[0]


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Join the processes that a launcher's environment names. A process group that exists is used, and left alone."""
    if not dist.is_available() or (not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) < 2):
        yield Processes()
        return
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        if ours:
            dist.destroy_process_group()


def own_device(device: str) -> str:
    """Return the device of this process: each its own GPU."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device
