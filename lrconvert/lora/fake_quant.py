"""Fake quantization: the quantizers of `packing` in torch, with straight-through gradients.

The forward value is the number that a file holds, to the last bit; the gradient is that of the number before it was
rounded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrconvert.lora.packing import EXPONENT_RANGE


def odd(x: Tensor, bits: int) -> Tensor:
    """Return the odd integers ``2c + 1 - 2^bits`` of codes c nearest to x, float32, clipped to those that there are."""
    last = (1 << bits) - 1
    with torch.no_grad():
        value = torch.floor(x / 2).add_(1 << (bits - 1)).clamp_(0, last).mul_(2).sub_(last)
    return through(x, value)


def half(x: Tensor) -> Tensor:
    """Return x as a ``half`` tensor will hold it (`packing.round_half`), float32. The largest magnitude is below
    2^111."""
    with torch.no_grad():
        largest = x.detach().float().abs().max() if x.numel() else x.new_zeros(())
        mantissa, exponent = torch.frexp(largest)
        power = (exponent + (torch.round(mantissa * 2048) == 2048) - 15).clamp(*EXPONENT_RANGE)
        stored = torch.ldexp(x.double(), -power).half()
        value = torch.ldexp(stored.double(), power).float() + 0.0  # -0 becomes +0: one spelling of zero
    return through(x, value)


def through(x: Tensor, value: Tensor, slope: float = 1.0) -> Tensor:
    """Return `value`, with the gradient of ``slope x``."""
    return _Through.apply(x, value, slope)  # type: ignore[no-any-return, no-untyped-call]


def known(x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """Return the number `value` (), with this `gradient` in x."""
    return _Known.apply(x, value, gradient)  # type: ignore[no-any-return, no-untyped-call]


class _Through(torch.autograd.Function):
    """An identity for gradients; ``x + (value - x)`` would round `value` once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, slope: float) -> Tensor:
        ctx.slope = slope
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient if ctx.slope == 1 else gradient * ctx.slope, None, None


class _Known(torch.autograd.Function):
    """A function whose gradient was computed with it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0] * gradient, None, None
