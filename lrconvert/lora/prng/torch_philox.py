"""Philox4x32-10 in int64 operations of torch, on any device; no generator of torch takes part.

torch has no unsigned arithmetic, and the product of two 32-bit numbers does not fit int64. It never has to: with
``m = M - 2^32``, which is above -2^31, x * m does fit, its low 32 bits are those of x * M, and the high half of x * M
is ``floor(x m / 2^32) + x``, where >> is that floor. So nothing depends on how a device overflows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lrconvert.lora.prng import philox

if TYPE_CHECKING:
    import torch

    from lrconvert.lora.prng.streams import Stream, ValueMap

# Elements computed at once. A processor has caches to stay in; a GPU has some hundred kernels to start for each tile.
_TILE_ELEMENTS = 1 << 18
_TILE_ELEMENTS_GPU = 1 << 22
_TILE_BLOCKS = 1 << 14
_TILE_BLOCKS_GPU = 1 << 19


def values(
    stream: Stream,
    kind: ValueMap,
    bases: philox.U32,
    start: int,
    count: int,
    device: torch.device,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return elements `start` to ``start + count`` of each basis: float32 or float64 (len(bases), count) on `device`.

    The arguments are those of `prng.tensor`, checked there.
    """
    import torch

    out = torch.empty((len(bases), count), dtype=dtype, device=device)
    indices = torch.from_numpy(bases.astype("int64")).to(device)
    shifts = torch.tensor(kind.shifts, dtype=torch.int32, device=device)
    small = device.type == "cpu"
    size = min(
        _TILE_BLOCKS if small else _TILE_BLOCKS_GPU,
        (_TILE_ELEMENTS if small else _TILE_ELEMENTS_GPU) // kind.lanes,
    )
    for tile in philox.tiles(len(bases), start, count, kind.lanes, size):
        block = words(stream.key, stream.sid, indices[tile.rows], tile.first, tile.blocks)
        codes = (block.unsqueeze(-1) >> shifts).bitwise_and_((1 << kind.bits) - 1)
        piece = codes.reshape(len(block), -1)[:, tile.lanes].to(dtype)
        out[tile.rows, tile.out] = piece.mul_(2 * kind.unit).add_(kind.offset * kind.unit)
    return out


def words(key: philox.Key, sid: int, bases: torch.Tensor, first: int, blocks: int) -> torch.Tensor:
    """Return words of blocks `first` to ``first + blocks`` of each basis: int32 (len(bases), blocks, 4) with the bits
    of the words. `bases` is int64 (n,) and says on which device."""
    import torch

    shape = len(bases), blocks
    counter = torch.arange(first, first + blocks, dtype=torch.int64, device=bases.device)
    low, high = (torch.full((1, 1), half, dtype=torch.int64, device=bases.device) for half in _halves(sid))
    state = rounds((counter.expand(shape), bases[:, None].expand(shape), low.expand(shape), high.expand(shape)), key)
    # Words from 2^31 on become negative before the cast: a cast of what does not fit has no defined result.
    return torch.stack([((x ^ (1 << 31)) - (1 << 31)).to(torch.int32) for x in state], dim=-1)


def rounds(state: tuple[torch.Tensor, ...], key: philox.Key) -> tuple[torch.Tensor, ...]:
    """Apply ten rounds to four int64 tensors of one shape, which stay as they are; the results are below 2^32 too."""
    x0, x1, x2, x3 = state
    for k0, k1 in philox.round_keys(key):
        p, q = x0 * (philox.M0 - (1 << 32)), x2 * (philox.M1 - (1 << 32))
        x0, x2 = (
            (q >> 32).add_(x2).bitwise_xor_(x1).bitwise_xor_(k0),
            (p >> 32).add_(x0).bitwise_xor_(x3).bitwise_xor_(k1),
        )
        x1, x3 = q.bitwise_and_(philox.MASK), p.bitwise_and_(philox.MASK)
    return x0, x1, x2, x3


def _halves(number: int) -> tuple[int, int]:
    return number & philox.MASK, number >> 32
