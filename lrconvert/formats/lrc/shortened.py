"""Bytes with copies of earlier ones, each with one spelling: what a manifest is stored as from container version 3 on.
Normative text: ``formats/lrconvert-v3.md``, section 4.

Names of targets repeat themselves, from block to block and from module to module. A sequence of commands either states
bytes or copies some that came before (Ziv and Lempel, *A universal algorithm for sequential data compression*, 1977).
"""

from __future__ import annotations

from collections.abc import Sequence

from lrconvert.core import errors

LEAST = 3  # bytes of a copy
PLACES = 32  # that are looked at for a copy, the latest ones
_LITERAL, _COPY = range(2)
_MOST_DIGITS = 4  # of seven bits, behind the first byte of a number


# --- out ------------------------------------------------------------------------------------------------------------


def shorten(data: bytes) -> bytes:
    """Return the one spelling of some bytes."""
    out = bytearray(_number(0, len(data), 8))
    places: dict[bytes, list[int]] = {}
    at = first = 0  # bytes from `first` to `at` are not written yet
    while at < len(data) - LEAST + 1:
        length, place = _longest(data, at, places.get(data[at : at + LEAST], ()))
        if length:
            out += _literal(data[first:at]) + _number(_COPY, length - LEAST, 7) + _number(0, at - place - 1, 8)
        for n in range(at, at + max(length, 1)):
            places.setdefault(data[n : n + LEAST], []).append(n)
        at += max(length, 1)
        first = at if length else first
    return bytes(out + _literal(data[first:]))


def _longest(data: bytes, at: int, places: Sequence[int]) -> tuple[int, int]:
    """The length and the place of the longest copy for what is at `at`, of equally long ones the latest; 0 if there is
    none. What it begins with is known to be equal at all `places`."""
    longest, best = 0, 0
    for place in reversed(places[-PLACES:]):
        if longest and data[place : place + longest + 1] != data[at : at + longest + 1]:
            continue
        length = _common(data, place, at)
        if length > longest:
            longest, best = length, place
    return longest, best


def _common(data: bytes, place: int, at: int) -> int:
    """The number of bytes that are the same from `place` and from `at` on: by blocks that double, then halve."""
    length, block = LEAST, 16
    while at + length + block <= len(data) and _same(data, place + length, at + length, block):
        length += block
        block *= 2
    while block := block // 2:
        if at + length + block <= len(data) and _same(data, place + length, at + length, block):
            length += block
    return length


def _same(data: bytes, one: int, other: int, count: int) -> bool:
    return data[one : one + count] == data[other : other + count]


def _literal(data: bytes) -> bytes:
    return _number(_LITERAL, len(data) - 1, 7) + data if data else b""


def _number(kind: int, number: int, bits: int) -> bytes:
    """A number in the lower `bits` of a byte, and in groups of seven bits behind it (RFC 7541, 5.1)."""
    most = (1 << bits) - 1
    if number < most:
        return bytes([kind << bits | number])
    out = [kind << bits | most]
    number -= most
    while number > 127:
        out.append(128 | number & 127)
        number >>= 7
    return bytes([*out, number])


# --- in -------------------------------------------------------------------------------------------------------------


def lengthen(data: bytes, start: int, limit: int) -> tuple[bytes, int]:
    """Return the bytes, at most `limit`, that are spelled in `data` from byte `start` on, and where the spelling ends.

    Raises E-LIMIT, E-JSON-SYNTAX (`data` ends, or a command is impossible), E-CANON for any but the one spelling.
    """
    at, _, size = _number_at(data, start, 8)
    if size > limit:
        raise errors.LimitError(f"the manifest has {size} bytes; at most {limit} are read")
    out = bytearray()
    while len(out) < size:
        at, kind, number = _number_at(data, at, 7)
        count = number + (LEAST if kind == _COPY else 1)
        if count > size - len(out):
            raise errors.JsonSyntaxError(f"a command before byte {at} makes more of the manifest than there is")
        if kind == _LITERAL:
            if at + count > len(data):
                raise errors.JsonSyntaxError("the data end within the manifest")
            out += data[at : at + count]
            at += count
            continue
        at, _, number = _number_at(data, at, 8)
        distance = number + 1
        if distance > len(out):
            raise errors.JsonSyntaxError(f"a copy before byte {at} begins before the manifest")
        piece = bytes(out[-distance:][:count])
        out += (piece * (count // distance + 1))[:count]  # what is copied may reach into the copy
    made = bytes(out)
    if shorten(made) != data[start:at]:
        raise errors.CanonicalError("the manifest is not in its one spelling (the longest and latest copies)")
    return made, at


def _number_at(data: bytes, at: int, bits: int) -> tuple[int, int, int]:
    """The end of the number at byte `at`, the kind above it, and the number."""
    if at >= len(data):
        raise errors.JsonSyntaxError("the data end within the manifest")
    most = (1 << bits) - 1
    kind, number = data[at] >> bits, data[at] & most
    at += 1
    if number < most:
        return at, kind, number
    for n in range(_MOST_DIGITS):
        if at >= len(data):
            raise errors.JsonSyntaxError("the data end within the manifest")
        digit = data[at]
        at += 1
        number += (digit & 127) << 7 * n
        if digit < 128:
            return at, kind, number
    raise errors.JsonNumberError(f"a number of the manifest before byte {at} is too large")
