"""Packed JSON values: one spelling each, found by two readers; bounded work whatever a count claims."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from second_readers.container import packed as second_pack
from second_readers.container import value_at

from lrconvert.core import errors
from lrconvert.core.limits import MAX_INT
from lrconvert.formats.lrc import packed

MIB = 1 << 20
PIECES = st.sampled_from([*packed.WORDS, *packed.PARTS, ".", "é", "\N{GRINNING FACE}", "0a", "layers", "1", "Z"])
TEXTS = st.lists(PIECES, max_size=5).map("".join) | st.text("0123456789abcdef", max_size=9)
KEYS = st.sampled_from([*packed.WORDS, "zz", "a.b", "00", "ab12"])
INTEGERS = st.integers(-MAX_INT, MAX_INT) | st.integers(-40, 200) | st.sampled_from([30, 31, 158, 159, -31, -32])
VALUES = st.recursive(
    st.booleans() | INTEGERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


def depth(value: Any) -> int:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if items is None else 1 + max(map(depth, items), default=0)


@given(VALUES)
@settings(max_examples=300, deadline=None)
def test_two_writers_spell_alike_and_two_readers_read(value):
    if depth(value) > 8:
        return
    data = packed.pack(value)
    assert second_pack(value) == data
    for read, end in (packed.unpack(b"?" + data + b"?", 1, MIB), value_at(b"?" + data + b"?", 1)):
        assert json.dumps(read, sort_keys=True) == json.dumps(value, sort_keys=True) and end == 1 + len(data)
    assert len(data) <= len(json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode())


@given(st.binary(max_size=40) | VALUES.map(packed.spell), st.integers(0, 1 << 20), st.binary(max_size=2))
@settings(max_examples=500, deadline=None)
def test_any_bytes_are_refused_or_the_one_spelling(data, at, junk):
    """Whole or with some bytes exchanged: an error of ours, or both readers find a value that packs to the same."""
    at %= len(data) + 1
    data = data[:at] + junk + data[at + len(junk) :]
    try:
        value, end = packed.unpack(data, 0, MIB)
    except errors.LrcError as error:
        assert str(error).isprintable()
        return
    assert packed.pack(value) == data[:end] == second_pack(value) and value_at(data, 0)[1] == end


def test_the_tables_leave_no_doubt():
    """No word is a number of digits, whose length would change with its value; parts are plain and few."""
    assert len(set(packed.WORDS)) == len(packed.WORDS) and len(set(packed.PARTS)) == len(packed.PARTS) <= 96
    assert not [word for word in packed.WORDS if re.fullmatch("[0-9a-f]*", word) and len(word) % 2 == 0]
    assert all(part.isascii() and part.isprintable() and len(part) > 1 for part in packed.PARTS)


REFUSED = {
    "nothing": (b"", errors.JsonSyntaxError),
    "a head and no more": (b"\x5f", errors.JsonSyntaxError),
    "a million levels": (b"\x81" * MIB, errors.JsonDepthError),
    "more than a MiB": (b"\x9f\xff\xff\x7f" + bytes(2 * MIB), errors.LimitError),
    "billions of items": (b"\x9f" + b"\xff" * 7 + b"\x0f" + bytes(9), errors.JsonSyntaxError),
    "words of 18 MiB": (b"\x9f\xd1\xff\x3f" + b"\xdf\x28" * (MIB // 2 - 9), errors.LimitError),
    "parts of 20 MiB": (b"\x9f\xe1\x07" + (b"\x5f\xe1\x1f" + b"\xab" * 4096) * 256, errors.LimitError),
    "a text for a key is missing": (b"\xa1\xe0\x00", errors.JsonSyntaxError),
    "a key of other characters": (b"\xa1\x41-\x00", errors.CanonicalError),
    "a character of control": (b"\x41\x7f", errors.CanonicalError),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    data, error = REFUSED[case]
    with pytest.raises(error):
        packed.unpack(data, 0, MIB)
