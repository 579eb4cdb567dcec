"""Products of thin float64 matrices for `exact`: by the BLAS here, or on another device.

Whoever multiplies has to keep one promise, on which the bound of `exact` rests: every element is the sum of the k
products ``L_oj R_ji``, each rounded at most once, and added up in float64 in some order, fused or not; that is at most
k roundings along the way of any product into the sum. A BLAS does that in whatever order it likes. What does *not* are
algorithms that form other products (Strassen), narrower formats (TF32, which torch never uses for float64), and sums of
integer slices, by which newer GPU libraries may be told to emulate float64: their error is small beside the largest
element of a row, not beside the row's own terms. No library is asked, therefore, on a device: the sum is one
elementwise multiply-add of IEEE 754 after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lrconvert.core.devices import torch_device
from lrconvert.core.dtypes import F64
from lrconvert.core.errors import DeviceError

if TYPE_CHECKING:
    import torch

# (top, out): fill `out` (n, cols) with the rows of the product from `top` on.
Rows = Callable[[int, F64], None]
# (left (rows, k), right (k, cols)), finite and without products that leave float64's normal range, to its rows.
Products = Callable[[F64, F64], Rows]

_GEMM_ROWS = 32
_GEMM_WORK = 1 << 18  # multiplications of one call of the BLAS: more, and OpenBLAS starts threads of its own


def on(device: str) -> Products:
    """What multiplies on a device of torch; "cpu" is numpy, without torch. Raises E-OPTION if it is not there."""
    return by_blas if device == "cpu" else OnDevice(torch_device(device))


def by_blas(left: F64, right: F64) -> Rows:
    """In the calling thread, a few rows at a time, when they are asked for."""

    def rows(top: int, out: F64) -> None:
        _multiply(left[top : top + out.shape[0]], right, out)

    return rows


def _multiply(left: F64, right: F64, out: F64) -> None:
    """``out = left @ right`` in pieces that the BLAS computes in the calling thread."""
    rank = left.shape[1]
    across = max(16, _GEMM_WORK // (_GEMM_ROWS * rank))
    down = max(_GEMM_ROWS, _GEMM_WORK // (min(across, right.shape[1]) * rank))
    for c in range(0, right.shape[1], across):
        for r in range(0, left.shape[0], down):
            np.matmul(left[r : r + down], right[:, c : c + across], out=out[r : r + down, c : c + across])


@dataclass(frozen=True)
class OnDevice:
    """On a device of torch, the whole product at once; its rows are copied back when they are asked for. Raises
    E-DEVICE if the device fails, as for want of memory: it needs 8 bytes an element and the factors."""

    device: torch.device

    def __call__(self, left: F64, right: F64) -> Rows:
        import torch

        try:
            a, b = (torch.from_numpy(np.ascontiguousarray(x)).to(self.device) for x in (left, right))
            sums = torch.zeros((a.shape[0], b.shape[1]), dtype=torch.float64, device=self.device)
            for j in range(a.shape[1]):
                sums.addcmul_(a[:, j : j + 1], b[j : j + 1])
        except RuntimeError as error:
            raise self._failed(error) from None

        def rows(top: int, out: F64) -> None:
            try:
                torch.from_numpy(out).copy_(sums[top : top + out.shape[0]])  # waits for the device, whose errors it has
            except RuntimeError as error:
                raise self._failed(error) from None

        return rows

    def _failed(self, error: RuntimeError) -> DeviceError:
        said = str(error).strip().splitlines() or [type(error).__name__]
        return DeviceError(f"the device {str(self.device)!r} failed: {said[0]:.200}", fix="try --device cpu")
