"""Philox4x32-10 as one Triton kernel: words and numbers stay in registers, an element is written once.

Triton's own functions are not used: `tl.philox` becomes Philox4x64 when it is handed 64-bit counters, and the numbers
that `tl.rand` makes of words changed between releases. The kernel asserts that its state has 32 bits. Triton is
optional; `available` says whether the kernel works here.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from typing import TYPE_CHECKING, Any, no_type_check

import numpy as np

from lrconvert.prng import MAPS, Stream, ValueMap, philox, torch_philox

if TYPE_CHECKING:
    import torch


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


triton = _imported("triton")
tl = _imported("triton.language")

_PROGRAM_ELEMENTS = 1 << 12
_PROGRAMS = 1 << 30  # of one launch; a grid has fewer than 2^31
_AS_THEY_ARE = ("count", "skip", "first", "programs", "k0", "k1", "sid_low", "sid_high")


@functools.cache
def available(device: torch.device) -> bool:
    """Whether Triton is there, compiles the kernel for `device`, a GPU, and the kernel gives the numbers of torch."""
    import torch

    if triton is None or not torch.cuda.is_available():
        return False
    stream, bases = Stream(0x0123456789ABCDEF, "shared/A"), np.array([3, 2**32 - 1], np.uint32)
    try:
        return all(
            torch.equal(
                values(stream, kind, bases, 2**32 - 5, 1000, device, torch.float32),
                torch_philox.values(stream, kind, bases, 2**32 - 5, 1000, device, torch.float32),
            )
            for kind in MAPS.values()
        )
    except Exception:  # no compiler, a GPU or driver that this Triton does not know: torch computes the same numbers
        return False


def values(
    stream: Stream,
    kind: ValueMap,
    bases: philox.U32,
    start: int,
    count: int,
    device: torch.device,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Elements `start` to ``start + count`` of each basis: float32 or float64 (len(bases), count) on `device`.

    The arguments are those of `prng.tensor`, checked there. Raises what Triton raises where it does not work.
    """
    import torch

    out = torch.empty((len(bases), count), dtype=dtype, device=device)
    if not out.numel():
        return out
    indices = torch.from_numpy(bases.astype("int64")).to(device)
    first, skip = divmod(start, kind.lanes)
    programs = -(-(skip + count) // _PROGRAM_ELEMENTS)
    rows = max(1, _PROGRAMS // programs)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for top in range(0, len(bases), rows):
            part = out[top : top + rows]
            _compiled()[(len(part) * programs,)](
                part,
                indices[top:],
                count,
                skip,
                _signed(first),
                programs,
                *map(_signed, (*stream.key, stream.sid & philox.MASK, stream.sid >> 32)),
                2 * kind.unit,
                kind.offset * kind.unit,
                **constants(kind),
            )
    return out


def constants(kind: ValueMap) -> dict[str, int]:
    """The kernel's compile-time constants for a map."""
    return {
        "BLOCKS": _PROGRAM_ELEMENTS // kind.lanes,
        "PER_WORD": len(kind.shifts),
        "SHIFT": kind.shifts[0],
        "BITS": kind.bits,
        "M0": philox.M0,
        "M1": philox.M1,
        "W0": philox.W0,
        "W1": philox.W1,
        "ROUNDS": philox.ROUNDS,
    }


@no_type_check  # Triton reads the annotations; they are no types
def _kernel(
    out,  # (bases, count), contiguous
    bases,  # int64
    count,
    skip,  # elements of block `first` that lie before the range
    first,
    programs,  # per basis
    k0,
    k1,
    sid_low,
    sid_high,
    step,
    offset,
    BLOCKS: tl.constexpr,
    PER_WORD: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    M0: tl.constexpr,
    M1: tl.constexpr,
    W0: tl.constexpr,
    W1: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """BLOCKS blocks of one basis. Numbers beyond 2^31 come as the int32 of the same bits: one type for every value."""
    row = tl.program_id(0) // programs
    part = tl.program_id(0) % programs
    base = tl.load(bases + row).to(tl.uint32)
    zero = tl.zeros([BLOCKS], tl.uint32)
    c0 = zero + first.to(tl.uint32, bitcast=True) + part.to(tl.uint32) * BLOCKS + tl.arange(0, BLOCKS).to(tl.uint32)
    c1 = zero + base
    c2 = zero + sid_low.to(tl.uint32, bitcast=True)
    c3 = zero + sid_high.to(tl.uint32, bitcast=True)
    key0 = k0.to(tl.uint32, bitcast=True)
    key1 = k1.to(tl.uint32, bitcast=True)
    for _ in tl.static_range(ROUNDS):
        p = c0.to(tl.uint64) * M0
        q = c2.to(tl.uint64) * M1
        c0 = (q >> 32).to(tl.uint32) ^ c1 ^ key0
        c2 = (p >> 32).to(tl.uint32) ^ c3 ^ key1
        c1 = q.to(tl.uint32)
        c3 = p.to(tl.uint32)
        tl.static_assert(c0.dtype == tl.uint32)
        tl.static_assert(c1.dtype == tl.uint32)
        tl.static_assert(c2.dtype == tl.uint32)
        tl.static_assert(c3.dtype == tl.uint32)
        key0 = (key0.to(tl.uint64) + W0).to(tl.uint32)
        key1 = (key1.to(tl.uint64) + W1).to(tl.uint32)
    found = tl.join(tl.join(c0, c2), tl.join(c1, c3)).reshape([BLOCKS * 4])  # words in the order of the elements
    lane = tl.arange(0, PER_WORD)
    codes = (found[:, None] >> (SHIFT + BITS * lane)[None, :].to(tl.uint32)) & ((1 << BITS) - 1)
    number = codes.to(tl.float32) * step + offset  # exact, in one rounding or in two
    column = tl.arange(0, BLOCKS * 4)[:, None] * PER_WORD + lane[None, :]
    column = column + part.to(tl.int64) * (BLOCKS * 4 * PER_WORD) - skip
    place = out + row.to(tl.int64) * count + column
    tl.store(place, number.to(out.dtype.element_ty), mask=(column >= 0) & (column < count))


@functools.cache
def _compiled() -> Any:
    return triton.jit(_kernel, do_not_specialize=_AS_THEY_ARE)


def _signed(word: int) -> int:
    return word - (word >> 31 << 32)
