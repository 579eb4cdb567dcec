"""Devices that torch computes on, tried once and before any work, and its threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lrconvert.core.errors import OptionError
from lrconvert.core.wording import spelled

if TYPE_CHECKING:
    import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread of the processor: several wait for one another longer than they compute where
    there are many small operations."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def resolved(name: str) -> str:
    """Return the name of a device, of ``auto`` that of CUDA if torch sees a GPU. Where no driver is installed torch is
    not loaded to find that out."""
    if name != "auto":
        return name
    if not (Path("/proc/driver/nvidia").exists() or Path("/dev/nvidia0").exists()):
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def torch_device(name: str) -> torch.device:
    """Return the device that torch knows as `name` ("cpu", "cuda:1"). Raises E-OPTION if there is none, or if it
    cannot compute in float64."""
    import torch

    try:
        device = torch.device(name)
        works = torch.ones(1, dtype=torch.float64, device=device).item() == 1
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:  # a build without CUDA asserts
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        reason = "torch has no such device" if "device type at start of device string" in reason else reason
        what = f"the device {name!r:.40} cannot be used here: {reason:.200}"
        raise OptionError(what, fix=f"choose {spelled('device', 'cpu')}") from None
    if not works:
        raise OptionError(f"the device {name!r:.40} does not compute", fix=f"choose {spelled('device', 'cpu')}")
    return device
