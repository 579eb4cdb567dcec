"""JSON read strictly and written canonically.

Two levels. `parse` refuses what makes readers disagree: duplicate keys, NaN, deep nesting, oversized integers, bytes
that are not UTF-8. `parse_canonical` also demands the one canonical spelling (a subset of RFC 8785): keys sorted
bytewise, no white space, no floats, no null, integers within +-(2^53 - 1), NFC strings without control characters.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from typing import Any

from lrconvert.core.errors import (
    CanonicalError,
    HeaderTextError,
    JsonDepthError,
    JsonDuplicateError,
    JsonNumberError,
    JsonSyntaxError,
    LimitError,
)
from lrconvert.core.limits import MAX_INT, MAX_JSON

Json = Any  # dict[str, Json] | list[Json] | str | int | bool, as canonical JSON allows

_MAX_INT_DIGITS = 17  # 2^53 has 16; longer text is refused before Python converts it
_KEY = re.compile(r"[A-Za-z0-9_.]+\Z")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
# A bracket, or the end, and all before it that is none. An unterminated string runs to the end and nothing is tried
# twice: the scan stays linear on hostile text.
_BRACKET = re.compile(rb'(?:[^"\[\]{}]++|"(?:[^"\\]++|\\.?)*+(?:"|\Z))*+([\[\]{}]|\Z)', re.DOTALL)
_STEPS = {b"[": 1, b"{": 1, b"]": -1, b"}": -1, b"": 0}


def _check_size(data: bytes) -> None:
    """Refuse text of more values than any real file has: what is cheap to write is not always cheap to read."""
    counts = {
        "strings": data.count(b'"') // 2,
        "values": data.count(b",") + data.count(b":"),
        "objects and lists": max(data.count(b"{") + data.count(b"["), data.count(b"}") + data.count(b"]")),
    }
    for what, count in counts.items():
        if count > MAX_JSON[what]:
            raise LimitError(f"the JSON text holds {count} {what}; at most {MAX_JSON[what]} are read")


def _check_depth(data: bytes, limit: int) -> None:
    """Refuse nesting beyond `limit` by one scan over the bytes, before any recursive parser sees them."""
    depth = 0
    for match in _BRACKET.finditer(data):
        depth += _STEPS[match[1]]
        if depth > limit:
            raise JsonDepthError(f"JSON is nested more than {limit} levels deep")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        repeated = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise JsonDuplicateError(f"the key {repeated!r:.80} appears twice in one JSON object")
    return entries


def _integer(text: str) -> int:
    if len(text) > _MAX_INT_DIGITS or abs(int(text)) > MAX_INT:
        raise JsonNumberError(f"the integer {text[:20]} is outside +-(2^53 - 1)")
    if text == "-0":
        raise JsonNumberError("-0 is not an integer of this format")
    return int(text)


def _no_constant(text: str) -> Any:
    raise JsonNumberError(f"{text} is not a JSON number")


def _no_float(text: str) -> Any:
    raise JsonNumberError(f"the number {text[:20]} is not an integer")


def _finite(text: str) -> float:
    value = float(text)
    if value - value != 0:
        raise JsonNumberError(f"the number {text[:20]} is too large")
    return value


def parse(data: bytes, *, depth: int, floats: bool = False) -> Json:
    """Return the value of the JSON text `data` (UTF-8).

    Raises E-HDR-TEXT (not UTF-8, NUL, byte-order mark, half of a surrogate pair), E-JSON-DEPTH, E-JSON-DUP, E-JSON-NUM,
    E-JSON-SYNTAX, E-LIMIT (millions of values).
    `floats` admits finite floats, as the configurations of other tools have them.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise HeaderTextError(f"the JSON text is not UTF-8 at byte {error.start}") from None
    if text.startswith("\ufeff") or "\0" in text:
        raise HeaderTextError("the JSON text has a byte-order mark or a NUL character")
    _check_size(data)
    _check_depth(data, depth)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_constant=_no_constant,
            parse_float=_finite if floats else _no_float,
        )
    except json.JSONDecodeError as error:
        raise JsonSyntaxError(f"not JSON at character {error.pos}: {error.msg}") from None
    except RecursionError:  # an unbalanced text can outwit the scan only through broken strings
        raise JsonDepthError(f"JSON is nested more than {depth} levels deep") from None
    if _SURROGATE.search(text):  # the escape may stand for half a character, which no UTF-8 can hold
        _check_characters(value)
    return value


def _check_characters(value: Json) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise HeaderTextError("the JSON text has an escape of half a surrogate pair, which is no character") from None


def _strings(value: Json) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if not _KEY.match(key):
                raise CanonicalError(f"the key {key!r} is not of [A-Za-z0-9_.]+")
            yield from _strings(item)
    elif value is None or isinstance(value, float):
        raise JsonNumberError("null and floats are not part of the format")
    elif not isinstance(value, bool) and abs(value) > MAX_INT:
        raise JsonNumberError(f"the integer {value} is outside +-(2^53 - 1)")


def dump_canonical(value: Json) -> bytes:
    """Return the canonical bytes of `value`. Raises E-CANON or E-JSON-NUM for what canonical JSON cannot hold."""
    for text in _strings(value):
        if unicodedata.normalize("NFC", text) != text:
            raise CanonicalError(f"the string {text[:60]!r} is not in Unicode normal form C")
        if any(unicodedata.category(c) in ("Cc", "Cs") for c in text):
            raise CanonicalError(f"the string {text[:60]!r} has a control character")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8")


def parse_canonical(data: bytes, *, depth: int) -> Json:
    """Return what `parse` does, but raise E-CANON for any text that is not the canonical spelling of its value."""
    value = parse(data, depth=depth)
    if dump_canonical(value) != data:
        raise CanonicalError("the JSON text is not in canonical form (sorted keys, no spaces, no needless escapes)")
    return value


def canonical_text(text: str) -> str:
    """Return `text` fit for a canonical string: NFC, control characters replaced by spaces."""
    clean = "".join(" " if unicodedata.category(c) in ("Cc", "Cs") else c for c in text)
    return unicodedata.normalize("NFC", clean)
