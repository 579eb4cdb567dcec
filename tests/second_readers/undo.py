"""A second reader of undo records, written from formats/undo-v1.md and formats/merge-v1.md alone: plain Python and
exact rational numbers, one element at a time. It knows LoRAs on whole matrices."""

from __future__ import annotations

import json
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any

# bits in all and of the mantissa, and the smallest exponent of a normal number
KINDS = {"BF16": (16, 7, -126), "F16": (16, 10, -14), "F32": (32, 23, -126)}


def tensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    data = data[8 + length :]
    return {name: (t["dtype"], t["shape"], data[slice(*t["data_offsets"])]) for name, t in header.items()}


def numbers(dtype: str, data: bytes) -> list[int]:
    size = KINDS[dtype][0] // 8
    return [int.from_bytes(data[n : n + size], "little") for n in range(0, len(data), size)]


def value(code: int, dtype: str) -> Fraction:
    width, mantissa, least = KINDS[dtype]
    magnitude = code & (1 << (width - 1)) - 1
    exponent, digits = magnitude >> mantissa, magnitude & (1 << mantissa) - 1
    units = digits if exponent == 0 else digits + (1 << mantissa)
    size = units * Fraction(2) ** (max(exponent, 1) - 1 + least - mantissa)
    return -size if code >> (width - 1) else size


def nearest(x: Fraction, dtype: str) -> int:
    """The code whose value is nearest, ties to even: codes of one sign are in the order of their values."""
    width, low, high = KINDS[dtype][0], 0, (1 << (KINDS[dtype][0] - 1)) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if value(middle, dtype) <= abs(x) else (low, middle)
    below, above = abs(x) - value(low, dtype), value(high, dtype) - abs(x)
    code = low if below < above or (below == above and low % 2 == 0) else high
    return code | (1 << (width - 1) if x < 0 else 0)


def added(code: int, change: Fraction, dtype: str) -> int:
    return code if change == 0 else nearest(value(code, dtype) + change, dtype)


def order(code: int, width: int) -> int:
    """The place of a number among all, neighbours one apart."""
    top = 1 << (width - 1)
    return code | top if code < top else (1 << width) - 1 - code


def from_order(place: int, width: int) -> int:
    top = 1 << (width - 1)
    return place ^ top if place >= top else (1 << width) - 1 - place


def inflated(data: bytes) -> bytes:
    return zlib.decompress(data, -15)


def steps_of(code: bytes, count: int, width: int) -> list[int]:
    """Section 3, mode 0: the steps of `count` elements."""
    lengths = [int.from_bytes(code[8 * n : 8 * n + 8], "little") for n in range(3)]
    streams, at = [], 24
    for length in lengths:
        streams.append(inflated(code[at : at + length]))
        at += length
    assert at == len(code)
    symbols = [streams[0][n // 4] >> 2 * (n % 4) & 3 for n in range(count)]
    short = iter(int.from_bytes(streams[1][n : n + 1], "little", signed=True) for n in range(len(streams[1])))
    size = width // 8
    wide = (streams[2][n : n + size] for n in range(0, len(streams[2]), size))
    steps = []
    for symbol in symbols:
        step = {0: 0, 1: 1, 2: -1}.get(symbol)
        if step is None and (step := next(short)) == -128:
            step = int.from_bytes(next(wide), "little", signed=True)
        steps.append(step)
    return steps


def restored(code: bytes, mode: int, guess: list[int], merged: list[int], dtype: str) -> list[int]:
    width, mantissa, _ = KINDS[dtype]
    if mode == 0:
        chosen = list(range(len(guess)))
    else:
        count, length = (int.from_bytes(code[n : n + 8], "little") for n in (0, 8))
        gaps, code = inflated(code[16 : 16 + length]), code[16 + length :]
        exponents = (1 << (width - 1)) - (1 << mantissa)
        chosen = [n for n in range(len(guess)) if guess[n] & exponents < merged[n] & exponents]
        place = 0
        for n in range(count):
            place += int.from_bytes(gaps[4 * n : 4 * n + 4], "little")
            chosen.append(place)
    out = list(guess)
    for n, step in zip(chosen, steps_of(code, len(chosen), width), strict=True):
        out[n] = from_order((order(guess[n], width) + step) % (1 << width), width)
    return out


def base_of(model: Path) -> dict[str, bytes]:
    """The bytes of the base's tensors."""
    folder = next((model / ".lrconvert").glob("merge-*"))
    record = json.loads((folder / "record.json").read_text())
    stored, codes = tensors(model / "model.safetensors"), (folder / "undo.bin").read_bytes()
    factors = [tensors(folder / f"adapter-{n}.safetensors") for n in range(len(record["adapters"]))]
    out = {}
    for tensor in record["tensors"]:
        dtype, (rows, *_), data = stored[tensor["output"]]
        at = tensor.get("offset")
        merged = numbers(dtype, data) if tensor.get("codes") else []
        for first, count, mode, nbytes in tensor.get("codes", ()):
            cols = tensor["cols"]
            changes = [[Fraction(0)] * cols for _ in range(rows)]
            live = set(), set()
            for piece in tensor["pieces"]:
                add_piece(piece, record, factors, changes, live)
            rows_in = kept(live[0], first, count)
            cols_in = kept(live[1], 0, cols)
            places = [r * cols + c for r in rows_in for c in cols_in]
            before = [merged[n] for n in places]
            guess = [added(merged[n], -changes[n // cols][n % cols], dtype) for n in places]
            for n, code in zip(places, restored(codes[at : at + nbytes], mode, guess, before, dtype), strict=True):
                merged[n] = code
            at += nbytes
            size = KINDS[dtype][0] // 8
            data = b"".join(code.to_bytes(size, "little") for code in merged)
        out[tensor["name"]] = data
    return out


def kept(live: set[int], first: int, count: int) -> list[int]:
    """Those of rows or columns that are coded: all of them if few are left out."""
    inside = [n for n in range(first, first + count) if n in live]
    return list(range(first, first + count)) if count - len(inside) < count // 8 else inside


def add_piece(piece: dict[str, Any], record: Any, factors: Any, changes: Any, live: Any) -> None:
    entry = record["adapters"][piece["adapter"]]
    target = entry["targets"][piece["which"]]
    scale = Fraction(float.fromhex(piece["scale"]) * float.fromhex(target[3]))
    sides = [factors[piece["adapter"]][f"{piece['which']}.{side}"] for side in "ab"]
    (_, (rank, cols), a), (_, (rows, _), b) = sides
    right = [value(code, "F32") for code in numbers("F32", a)]
    left = [value(code, "F32") for code in numbers("F32", b)]
    for row in range(rows):
        for col in range(cols):
            products = (left[row * rank + j] * right[j * cols + col] for j in range(rank))
            changes[row][col] += scale * sum(products, Fraction(0))
    live[0].update(row for row in range(rows) if any(left[row * rank : (row + 1) * rank]))
    live[1].update(col for col in range(cols) if any(right[col::cols]))
