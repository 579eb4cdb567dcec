"""Symbols to and from range asymmetric numeral systems, one after the other; `lora/coded/rans` has the same in numpy.

All integers: the bytes are the same.
"""

from __future__ import annotations

import numpy as np

from lrconvert.core.dtypes import Array
from lrconvert.kernels.jit import compiled
from lrconvert.kernels.machine_code import Signature

LOOPS = {
    "encode": Signature(("u1 1", "u1 1", "u4 1", "u4 1", "u4 1", "u2 1"), 1),
    "decode": Signature(("u2 1", ("u1 1", "i8 1", "i8 1"), "u1 1", "u4 1", "u4 1", "u1 1"), 1),
}


@compiled()
def encode(symbols: Array, which: Array, frequencies: Array, starts: Array, states: Array, words: Array) -> int:
    """Fill `words`, uint16 (n,), from the place on that is returned, with those of `symbols` under the models `which`,
    both uint8 (n,), and leave the final `states`, uint32 (lanes,). With f and s of symbol i from the tables, at
    ``64 which + symbol``, and x the state of lane ``i mod lanes``, from the last symbol to the first:

        x >= 2^16 f:  word <- x mod 2^16;  x <- x // 2^16
        x <- 2^16 (x // f) + x mod f + s
    """
    lanes, left = len(states), len(symbols)
    lane = (left - 1) % lanes
    for i in range(len(symbols) - 1, -1, -1):
        key = np.int64(which[i]) * 64 + symbols[i]
        f, x = np.uint32(frequencies[key]), np.uint32(states[lane])
        if x >> np.uint32(16) >= f:
            left -= 1
            words[left] = x & np.uint32(0xFFFF)
            x >>= np.uint32(16)
        states[lane] = x + x // f * (np.uint32(65536) - f) + starts[key]
        lane = lane - 1 if lane else lanes - 1
    return left


@compiled()
def decode(
    words: Array, runs: tuple[Array, Array, Array], slot_symbols: Array, packed: Array, states: Array, symbols: Array
) -> int:
    """Fill `symbols`, uint8 (n,), and return how many of the `words`, uint16, that took; -1 if there are too few.
    Leaves the last `states`, uint32 (lanes,). `runs` of symbols have their model, their end, and, by model, where its
    slots begin in `slot_symbols`; `packed` has ``2^16 f + s`` at ``64 model + symbol``. With x the state of lane
    ``i mod lanes``:

        symbol i <- of slot x mod 2^16;  x <- f (x // 2^16) + x mod 2^16 - s
        x < 2^16:  x <- 2^16 x + word
    """
    models, ends, tops = runs
    lanes, left = len(states), len(words)
    i, lane, taken = 0, 0, 0
    for run in range(len(models)):
        model = np.int64(models[run])
        top, row, end = tops[model], 64 * model, ends[run]
        while i < end:
            count = min(end - i, lanes - lane)
            for n in range(count):  # lanes do not depend on each other
                x = np.uint32(states[lane + n])
                slot = x & np.uint32(0xFFFF)
                symbol = slot_symbols[top + np.int64(slot)]
                both = np.uint32(packed[row + symbol])
                x = (both >> np.uint32(16)) * (x >> np.uint32(16)) + (slot - (both & np.uint32(0xFFFF)))
                if x < np.uint32(65536):
                    if taken == left:
                        return -1
                    x = x << np.uint32(16) | np.uint32(words[taken])
                    taken += 1
                states[lane + n] = x
                symbols[i + n] = symbol
            i += count
            lane = lane + count if lane + count < lanes else 0
    return taken
