"""formats/coded-v1.md, with the models of formats/kat/coded-v1.json: one number at a time, in plain integers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

KAT = json.loads((Path(__file__).parents[2] / "formats" / "kat" / "coded-v1.json").read_text(encoding="utf-8"))
ESCAPE = 63

Rows = Sequence[Sequence[int]]  # (model, length)


class Refused(Exception):
    """What a reader must refuse, with the code."""


def shift_of(k: int) -> int:
    """Section 2."""
    shift = 0
    while k > 18 + 4 * shift:
        shift += 1
    return shift


@cache
def frequencies(k: int) -> tuple[int, ...]:
    """Those of symbols 0 to 63 (section 2)."""
    listed = KAT["models"][k]
    of = dict(enumerate(listed))
    for h, frequency in enumerate(listed):
        of[-h if shift_of(k) == 0 else -1 - h] = frequency
    symbols = [of.get(h, 0) for h in range(-31, 32)]
    return (*symbols, 2**16 - sum(symbols))


@cache
def starts(k: int) -> tuple[int, ...]:
    return tuple(sum(frequencies(k)[:symbol]) for symbol in range(64))


@cache
def symbol_of(k: int, slot: int) -> int:
    return next(s for s in range(64) if starts(k)[s] <= slot < starts(k)[s] + frequencies(k)[s])


def lanes_of(rows: Rows) -> int:
    """Section 4."""
    count = sum(length for _, length in rows)
    weighed = sum(length * (2**16 - frequencies(k)[31]) for k, length in rows)
    most = max(count // 2**16, weighed // 2**27, 1)
    return max(2**n for n in range(13) if 2**n <= most) if count else 0


def decode(data: bytes, rows: Rows) -> list[int]:
    """The numbers of a tensor (sections 3, 5 and 6)."""
    count, lanes = sum(length for _, length in rows), lanes_of(rows)
    if count > 2**30 or count > 4096 * len(data):
        raise Refused("E-LIMIT")
    if len(data) < 4 * lanes:
        raise Refused("E-CANON")
    states = [int.from_bytes(data[4 * lane : 4 * lane + 4], "little") for lane in range(lanes)]
    if any(x < 2**16 for x in states):
        raise Refused("E-CANON")
    models = [k for k, length in rows for _ in range(length)]
    symbols, at = [], 4 * lanes
    for i, k in enumerate(models):
        x = states[i % lanes]
        slot = x % 2**16
        symbol = symbol_of(k, slot)
        x = frequencies(k)[symbol] * (x // 2**16) + slot - starts(k)[symbol]
        if x < 2**16:
            if at + 2 > len(data):
                raise Refused("E-CANON")
            x = 2**16 * x + int.from_bytes(data[at : at + 2], "little")
            at += 2
        assert x < 2**32
        symbols.append(symbol)
        states[i % lanes] = x
    if any(x != 2**16 for x in states):
        raise Refused("E-CANON")
    return with_low_bits(data[at:], models, symbols)


def with_low_bits(data: bytes, models: Sequence[int], symbols: Sequence[int]) -> list[int]:
    """The numbers of symbols and of the bits beside them, which are all of `data`."""
    widths = [21 if symbol == ESCAPE else shift_of(k) for k, symbol in zip(models, symbols, strict=True)]
    if len(data) != -(-sum(widths) // 8):
        raise Refused("E-CANON")
    rest, numbers = "".join(f"{byte:08b}"[::-1] for byte in data), []
    if "1" in rest[sum(widths) :]:
        raise Refused("E-CANON")
    at = 0
    for k, symbol, width in zip(models, symbols, widths, strict=True):
        low = int(rest[at : at + width][::-1] or "0", 2)
        at += width
        number = (symbol - 31) * 2**width + low
        if symbol == ESCAPE:
            number = low - 2**21 if low >= 2**20 else low
            if number == -(2**20):
                raise Refused("E-VALUE")
            h = number // 2 ** shift_of(k)
            if abs(h) <= 31 and frequencies(k)[h + 31]:
                raise Refused("E-CANON")
        numbers.append(number)
    return numbers


def value(q: int) -> int:
    """Section 1."""
    return 16 * q - (q > 0) + (q < 0)
