"""Threads, buffers and the matrix product that blocks of weights are computed with."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from lrconvert.core.dtypes import F32, F64, Array
from lrconvert.kernels import jit

TILE = 1 << 16  # elements of one pass of the filter: what they need stays in the cache of a core
WIDTH = 1 << 11  # columns of a block
BLOCK = 1 << 20  # elements of a block, which one thread computes
_MAX_THREADS = 4
_GEMM_ROWS = 32
_GEMM_WORK = 1 << 18  # multiplications of one call of the BLAS: more, and OpenBLAS starts threads of its own

# Seconds of the processor that compiled loops save for a weight.
_SAVED = {"merge with a record": 4e-9, "merge": 2.4e-9, "unmerge": 1.2e-9, "verify": 0.6e-9}

Mask = npt.NDArray[np.bool_]
U64 = npt.NDArray[np.uint64]
Item = TypeVar("Item")
Result = TypeVar("Result")

# Fills `out` with ``left @ right``, see `multiply`.
Product = Callable[[F64, F64, F64], None]


def multiply(left: F64, right: F64, out: F64) -> None:
    """Fill `out` (rows, cols) with ``left @ right``, in pieces that the BLAS computes in the calling thread.

    The bound of `exact` rests on this: every element is the sum of the k products ``L_oj R_ji``, each rounded at most
    once, and added up in float64 in some order, fused or not. A BLAS does that in whatever order it likes. Algorithms
    that form other products (Strassen), narrower formats, and sums of integer slices do not.
    """
    rank = left.shape[1]
    across = max(16, _GEMM_WORK // (_GEMM_ROWS * rank))
    down = max(_GEMM_ROWS, _GEMM_WORK // (min(across, right.shape[1]) * rank))
    for c in range(0, right.shape[1], across):
        for r in range(0, left.shape[0], down):
            np.matmul(left[r : r + down], right[:, c : c + across], out=out[r : r + down, c : c + across])


class Buffers(threading.local):
    """The arrays that one thread computes a tile in, small enough for its cache, and the two masks of its block."""

    def __init__(self) -> None:
        self.sums: F64 = np.empty(TILE)
        self.double: F64 = np.empty(TILE)
        self.long: U64 = np.empty(TILE, np.uint64)
        self.single: F32 = np.empty(TILE, np.float32)
        self.value: F32 = np.empty(TILE, np.float32)
        self.flag: Mask = np.empty(TILE, np.bool_)
        self.zero: Mask = np.empty(TILE, np.bool_)
        self.doubtful: Mask = np.empty(TILE, np.bool_)
        self.open: Mask = np.empty(BLOCK, np.bool_)
        self.open_guess: Mask = np.empty(BLOCK, np.bool_)


def loops_for(work: str, elements: int) -> Any:
    """Return `lrconvert.kernels.merging` if it pays for so many weights in bfloat16, else None; `work` is a key of
    `_SAVED`."""
    return jit.load("merging", elements * _SAVED[work])


class Pool:
    """Memory for blocks of weights that is used again when the last array on it is gone: new memory costs as much as
    reading what goes there."""

    def __init__(self) -> None:
        self._free: list[bytearray] = []

    def take(self, shape: tuple[int, ...], kind: np.dtype[Any]) -> Array:
        """Return an array of anything."""
        count = int(np.prod(shape))
        memory = self._memory(count * kind.itemsize)
        array: Array = np.frombuffer(memory, kind, count)  # all views of it refer to this one
        weakref.finalize(array, self._free.append, memory).atexit = False
        return array.reshape(shape)

    def _memory(self, nbytes: int) -> bytearray:
        try:
            memory = self._free.pop()
        except IndexError:
            return bytearray(nbytes)
        return memory if len(memory) >= nbytes else bytearray(nbytes)


class Workspace:
    """Threads and buffers that one block after the other is computed with; a context manager.

    The threads are ours, not the BLAS's: the products are too thin for those. Results depend neither on them nor on
    `loops`, the compiled ones (`loops_for`); estimates of errors do, in their last digits.
    """

    def __init__(self, threads: int | None = None, multiply: Product = multiply, loops: Any = None) -> None:
        count = threads or min(_MAX_THREADS, os.cpu_count() or 1)
        self.multiply, self.loops = multiply, loops
        self.buffers = Buffers()
        self.pool = Pool()
        self._pool = ThreadPoolExecutor(count) if count > 1 else None

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Return the results of `function` in order; raise the first error in order."""
        if self._pool is None or len(items) == 1:
            return [function(item) for item in items]
        return list(self._pool.map(function, items))

    def __enter__(self) -> Workspace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
