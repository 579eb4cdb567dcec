"""An orthogonal transform of any length whose vectors are integers, and a seeded order of its vectors.

For a length d = 2^a m with m odd, the matrix is the Kronecker product of the Sylvester-Hadamard matrix of 2^a and
``m I - 2 J`` (J all ones; for m = 1 the number 1). Where m exceeds `MAX_ODD`, d is cut into blocks of powers of two,
one for each bit of d, largest first; a block that is 2^s times shorter than the first is multiplied with
2^floor(s / 2), so that no two vectors differ in length by more than sqrt(2). Matrices are symmetric: rows are columns,
and a transform is its own adjoint. Normative text: ``formats/methods/nola.md``.

`transform` is the same code on numpy and torch: sums and differences, O(d log d) of them, between two buffers, in one
order whatever the machine. Sums of integers are exact, in any order, while they stay below 2^53, or 2^24 in float32:
`of_integers` takes small matrix products for them, each so small that no BLAS gives it to its threads, which wait for
one another on a busy machine. What `growth` says of the sums is for the caller to hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from lrconvert.core.errors import LimitError
from lrconvert.lora import prng

MAX_ODD = 127  # above it the vectors of m I - 2 J are little more than single coordinates
MAX_LENGTH = 1 << 40
_ROUNDS = 4
_LOW_BITS = 4
_AT_ONCE = 1 << 15  # numbers that fit into a cache with their buffers

_EXACT_SINGLE = 0.99 * (1 << 24)  # integers below 2^24 are exact in float32; what bounds them is a rounded sum
_WIDEST = 32  # rows of the first matrix product, unless the odd part has more
_STEP_BITS = 4  # of each further one
_ONE_THREAD = 1 << 18  # multiplications of a product that stays on one thread

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Block:
    """Positions `start` to ``start + (odd << bits)``: vectors of the Kronecker product times 2^shift."""

    start: int
    bits: int
    odd: int
    shift: int = 0

    @property
    def length(self) -> int:
        return self.odd << self.bits

    @property
    def square(self) -> int:
        """The squared length of each vector."""
        return self.odd * self.odd << self.bits + 2 * self.shift


def blocks(length: int) -> tuple[Block, ...]:
    """Return how a length of 1 to `MAX_LENGTH` is cut. Raise E-LIMIT."""
    if not 1 <= length <= MAX_LENGTH:
        raise LimitError(f"a transform has {length} numbers; 1 to {MAX_LENGTH} are allowed")
    bits = (length & -length).bit_length() - 1
    if length >> bits <= MAX_ODD:
        return (Block(0, bits, length >> bits),)
    top, start, blocks = length.bit_length() - 1, 0, []
    for power in range(top, -1, -1):
        if length >> power & 1:
            blocks.append(Block(start, power, 1, (top - power) // 2))
            start += 1 << power
    return tuple(blocks)


def growth(length: int) -> int:
    """Return how many times the sum of the magnitudes of the inputs any number on the way can be; powers of two that
    are exact in floating point do not count."""
    return max(block.odd + 2 if block.odd > 1 else 1 for block in blocks(length))


@lru_cache(maxsize=8)
def squares(length: int) -> npt.NDArray[np.float64]:
    """Return the squared length of each vector: float64 (length,) or, where they are all equal, (1,)."""
    parts = blocks(length)
    if len(parts) == 1:
        return np.array([float(parts[0].square)])
    return np.repeat([float(b.square) for b in parts], [b.length for b in parts])


def transform(x: Any, xp: Any) -> Any:
    """Return the matrix times each row of `x`: float64 (n, length), a numpy array or, with `xp` torch, a tensor, with
    gradients."""
    if getattr(x, "requires_grad", False):
        return _with_gradients()(x)
    if not len(x):
        return x
    parts = [_block(x[:, b.start : b.start + b.length], b, xp) for b in blocks(x.shape[1])]
    return parts[0] if len(parts) == 1 else xp.concatenate(parts, 1)


@cache
def _with_gradients() -> Any:
    """`transform` for torch tensors that are trained: its gradient is the transform of the one that comes."""
    import torch

    class Transform(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: Any) -> Any:
            return transform(x.detach(), torch)

        @staticmethod
        def backward(context: Any, gradient: Any) -> Any:
            return transform(gradient, torch)

    return Transform.apply


def _block(x: Any, block: Block, xp: Any) -> Any:
    rows = max(1, _AT_ONCE // block.length)
    if xp is np and len(x) > rows:
        return np.concatenate([_block(x[n : n + rows], block, np) for n in range(0, len(x), rows)])
    # Numpy is slow in loops over a few neighbours: it does the lowest bits and the odd part with their axes in front.
    low = min(block.bits, _LOW_BITS) if xp is np else 0
    shape, width = x.shape, block.odd << low
    if width > 1:
        front = x.reshape(-1, width).T.reshape(-1)
        count = len(front) // width
        front = _butterflies(front, low, block.odd * count, xp).reshape(-1, block.odd, count)
        if block.odd > 1:
            front = block.odd * front - 2 * front.sum(1)[:, None]
        x = front.reshape(width, count).T
    x = _butterflies(x.reshape(-1), block.bits - low, width, xp).reshape(shape)
    return x * float(1 << block.shift) if block.shift else x


def _butterflies(x: Any, bits: int, step: int, xp: Any) -> Any:
    """The Sylvester-Hadamard matrix of 2^bits times the axis of flat `x` along which neighbours are `step` apart."""
    buffers = xp.empty_like(x), xp.empty_like(x)
    for n in range(bits):
        pairs, sums = x.reshape(-1, 2, step), buffers[n % 2].reshape(-1, 2, step)
        xp.add(pairs[:, 0], pairs[:, 1], out=sums[:, 0])
        xp.subtract(pairs[:, 0], pairs[:, 1], out=sums[:, 1])
        x, step = sums, 2 * step
    return x


def narrowed(numbers: npt.NDArray[Any], length: int) -> npt.NDArray[Any]:
    """Return integers (n, up to length) in float32 if all sums of transforms of their rows are exact in it, else in
    float64."""
    single, limit = numbers.astype(np.float32), _EXACT_SINGLE / growth(length)
    squares = np.einsum("nd,nd->n", single, single).max(initial=0.0)
    if (length * float(squares)) ** 0.5 > limit and float(np.abs(single).sum(axis=1).max()) > limit:
        return numbers.astype(np.float64)
    return single


def of_integers(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return `transform` of rows of integers, float32 or float64 (n, length), in their dtype; `x` is overwritten. Exact
    while the sum of the magnitudes of a row, times `growth`, is below 2^24 or 2^53, shifts apart."""
    cut = blocks(x.shape[1])
    if len(cut) > 1:
        return np.concatenate([_products(np.ascontiguousarray(x[:, b.start : b.start + b.length]), b) for b in cut], 1)
    return _products(np.ascontiguousarray(x), cut[0])


def _products(x: npt.NDArray[Any], block: Block) -> npt.NDArray[Any]:
    """The matrix of a block times each row of `x`, in its place: by products with Kronecker factors of it."""
    rows = max(1, _AT_ONCE // block.length)
    buffer = np.empty((min(rows, len(x)), block.length), x.dtype)
    for n in range(0, len(x), rows):
        part = x[n : n + rows]
        last = _on_rows(part, buffer[: len(part)], block)
        if block.shift:
            np.multiply(last, x.dtype.type(1 << block.shift), out=part)
        elif last is not part:
            part[...] = last
    return x


def _on_rows(x: npt.NDArray[Any], other: npt.NDArray[Any], block: Block) -> npt.NDArray[Any]:
    """The same, without its shift, in `x` or in the `other` buffer of this shape, whichever is last."""
    done = max(n for n in range(block.bits + 1) if n == 0 or block.odd << n <= _WIDEST)
    width, left = block.odd << done, block.bits - done
    if width > 1:
        more = max(n for n in range(left + 1) if n == 0 or width * width << n <= _ONE_THREAD)
        shape = (-1, 1 << more, width)
        np.matmul(x.reshape(shape), _factor(block.odd, done, x.dtype.char), out=other.reshape(shape))
        x, other = other, x
    while done < block.bits:
        bits = min(_STEP_BITS, block.bits - done)
        step = block.odd << done
        one, two = (y.reshape(-1, 1 << bits, step) for y in (x, other))
        part = _ONE_THREAD >> 2 * bits
        for first in range(0, step, part):
            columns = slice(first, first + part)
            np.matmul(_factor(1, bits, x.dtype.char), one[..., columns], out=two[..., columns])
        x, other, done = other, x, done + bits
    return x


@lru_cache(maxsize=64)
def _factor(odd: int, bits: int, dtype: str) -> npt.NDArray[Any]:
    """The matrix of the length ``odd 2^bits``."""
    length = odd << bits
    return transform(np.eye(length), np).astype(dtype) if length > 1 else np.ones((1, 1), dtype)


def order(stream: prng.Stream, length: int, count: int) -> I64:
    """Return the first `count` numbers of a seeded order of 0 to `length` - 1, all different: int64 (count,).

    The order is that of a permutation of 2^n numbers, n the bits of ``length - 1``, in which numbers from `length` on
    are left out. The permutation multiplies, adds and folds the upper half onto the lower one, four times over.
    """
    bits = (length - 1).bit_length()
    draws = prng.words(stream, (0,), 0, 2 * _ROUNDS)[0].astype(np.uint64).tolist()
    mask, fold = np.uint64((1 << bits) - 1), np.uint64((bits + 1) // 2)
    numbers: list[I64] = []
    start, missing = 0, count
    while missing:
        stop = min(1 << bits, start + missing + missing * ((1 << bits) - length) // length + 64)
        x = np.arange(start, stop, dtype=np.uint64)
        for n in range(_ROUNDS):
            x *= np.uint64(2 * draws[2 * n] + 1)
            x += np.uint64(draws[2 * n + 1])
            x &= mask
            x ^= x >> fold
        kept = x[x < np.uint64(length)][:missing].astype(np.int64)
        numbers.append(kept)
        start, missing = stop, missing - len(kept)
    return np.concatenate(numbers) if numbers else np.zeros(0, np.int64)
