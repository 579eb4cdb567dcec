"""Manifests of container version 3: tables and shortened bytes have one spelling, which two readers find; work and
memory are bounded whatever a number claims."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from second_readers import container as second
from test_packed import MIB, VALUES, depth

from lrconvert.core import errors
from lrconvert.formats.lrc import packed, shortened

KEYS = st.sampled_from(["name", "shape", "suffix", "zz"])
ROWS = st.dictionaries(KEYS, VALUES, max_size=3).flatmap(
    lambda row: st.lists(st.fixed_dictionaries(dict.fromkeys(row, VALUES)), max_size=4)
)
PIECES = st.lists(
    st.sampled_from([b".attentions.", b"0", b"1", b"blocks.", b"\x00", b"abc", b"abcabc", b"\xff" * 70])
    | st.binary(max_size=3),
    max_size=40,
).map(b"".join)


@given(st.recursive(VALUES, lambda inner: ROWS | st.lists(inner | ROWS, max_size=3), max_leaves=6))
@settings(max_examples=300, deadline=None)
def test_tables_are_spelled_alike_by_two_writers(value):
    if depth(value) > 8:
        return
    data = packed.pack(value, tables=True)
    assert second.packed(value, tables=True) == data and len(data) <= len(packed.pack(value))
    for read, end in (packed.unpack(data + b"?", 0, MIB, tables=True), second.value_at(data + b"?", 0, tables=True)):
        assert json.dumps(read, sort_keys=True) == json.dumps(value, sort_keys=True) and end == len(data)


def test_a_list_whose_objects_differ_is_no_table():
    for value in ([{}, {}], [{"a": 1}], [{"a": 1}, {"b": 1}], [{"a": 1}, 1], [{"a": 1}, {}]):
        assert packed.pack(value, tables=True) == packed.pack(value)
    with pytest.raises(errors.JsonSyntaxError):  # to version 2 a table is a boolean of no meaning
        packed.unpack(packed.pack([{"a": 1}, {"a": 2}], tables=True), 0, MIB)


@given(PIECES)
@settings(max_examples=300, deadline=None)
def test_bytes_are_shortened_alike_by_two_writers(data):
    stored = shortened.shorten(data)
    assert second.shortened(data) == stored
    assert shortened.lengthen(b"?" + stored + b"?", 1, MIB) == (data, 1 + len(stored))
    assert second.lengthened(b"?" + stored + b"?", 1) == (data, 1 + len(stored))
    assert len(stored) <= len(data) + 3 + len(data) // 64


@given(PIECES.map(shortened.shorten) | st.binary(max_size=40), st.integers(0, 1 << 20), st.binary(max_size=2))
@settings(max_examples=500, deadline=None)
def test_any_bytes_are_refused_or_the_one_spelling(data, at, junk):
    at %= len(data) + 1
    data = data[:at] + junk + data[at + len(junk) :]
    try:
        plain, end = shortened.lengthen(data, 0, MIB)
    except errors.LrcError as error:
        assert str(error).isprintable()
        return
    assert shortened.shorten(plain) == data[:end] == second.shortened(plain)


def test_a_copy_may_reach_into_itself():
    assert shortened.shorten(b"ab" * 50) == bytes([100, 1]) + b"ab" + bytes([128 + 95, 1])


def test_many_places_are_not_all_looked_at(monkeypatch):
    """Comparisons grow as the bytes do, however many places begin alike."""
    counts = []
    for size in (20_000, 40_000):
        compared = 0

        def counting(data, one, other, count):
            nonlocal compared
            compared += 1
            return data[one : one + count] == data[other : other + count]

        monkeypatch.setattr(shortened, "_same", counting)
        rng = random.Random(0)
        shortened.shorten(b"".join(b"abc" + rng.randbytes(2) for _ in range(size // 5)))
        counts.append(compared)
    assert counts[1] < 2.2 * counts[0]


def test_nothing_is_made_before_the_size_is_known():
    with pytest.raises(errors.LimitError):
        shortened.lengthen(b"\xff\xff\xff\x7f" + b"\x00a" + b"\xff\xff\xff\x7f\x00", 0, MIB)
