"""Devices that torch computes on, tried once and before any work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lrconvert.core.errors import OptionError

if TYPE_CHECKING:
    import torch


def torch_device(name: str) -> torch.device:
    """Return the device that torch knows as `name` ("cpu", "cuda:1"). Raises E-OPTION if there is none, or if it
    cannot compute in float64."""
    import torch

    try:
        device = torch.device(name)
        works = torch.ones(1, dtype=torch.float64, device=device).item() == 1
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:  # a build without CUDA asserts
        reason = str(error).strip().splitlines() or [type(error).__name__]
        what = f"the device {name!r:.40} cannot be used here: {reason[0]:.200}"
        raise OptionError(what, fix="leave out --device, or choose cpu") from None
    if not works:
        raise OptionError(f"the device {name!r:.40} does not compute", fix="leave out --device, or choose cpu")
    return device
