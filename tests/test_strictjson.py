"""Strict parsing and canonical spelling."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrconvert import errors, strictjson

TEXT = st.text(st.characters(categories=["L", "N", "P", "Zs"]), max_size=12).map(strictjson.canonical_text)
VALUES = st.recursive(
    st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | TEXT,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.from_regex(r"[a-z_.0-9]{1,6}", fullmatch=True), inner)
    ),
    max_leaves=12,
)


@given(VALUES)
def test_canonical_round_trip(value):
    data = strictjson.dump_canonical(value)
    assert strictjson.parse_canonical(data, depth=64) == value
    assert json.loads(data) == value


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (b'{"a":1,"a":1}', errors.JsonDuplicateError),
        (b'{"a":{"b":1,"b":2}}', errors.JsonDuplicateError),
        (b'{"a":NaN}', errors.JsonNumberError),
        (b'{"a":Infinity}', errors.JsonNumberError),
        (b'{"a":1.0}', errors.JsonNumberError),
        (b'{"a":1e999}', errors.JsonNumberError),
        (b'{"a":-0}', errors.JsonNumberError),
        (b'{"a":9007199254740992}', errors.JsonNumberError),
        (b'{"a":' + b"9" * 5000 + b"}", errors.JsonNumberError),
        (b'{"a":' * 9 + b"1" + b"}" * 9, errors.JsonDepthError),
        (b"[" * 100_000, errors.JsonDepthError),
        (b'{"a":"\xff"}', errors.HeaderTextError),
        (b"\xef\xbb\xbf{}", errors.HeaderTextError),
        (b'{"a":"\0"}', errors.HeaderTextError),
        (b'{"a":["\\ud800"]}', errors.HeaderTextError),
        (b'{"\\uDfFf":1}', errors.HeaderTextError),
        (b'{"a":"\\ude00\\ud83d"}', errors.HeaderTextError),
        (b"{", errors.JsonSyntaxError),
        (b"{} x", errors.JsonSyntaxError),
    ],
)
def test_refusals(text, error):
    with pytest.raises(error):
        strictjson.parse(text, depth=8)


@pytest.mark.parametrize(
    "text", [b'{"b":1,"a":2}', b'{"a": 1}', b'{"a":"\\u0041"}', b'{"a":"e\xcc\x81"}', b" {}", b'{"a":null}']
)
def test_only_the_canonical_spelling(text):
    with pytest.raises((errors.CanonicalError, errors.JsonNumberError)):
        strictjson.parse_canonical(text, depth=8)


def test_whole_surrogate_pairs_are_characters():
    assert strictjson.parse(b'{"a":"\\ud83d\\ude00","b":"\\\\ud800"}', depth=8) == {"a": "\U0001f600", "b": "\\ud800"}


@given(st.text())
def test_any_text_can_be_made_canonical(text):
    clean = strictjson.canonical_text(text)
    assert json.loads(strictjson.dump_canonical([clean])) == [clean] and strictjson.canonical_text(clean) == clean


def test_keys_are_compared_once():
    """A hundred thousand keys, the last one twice: comparing each with all others would not come back today."""
    keys = ",".join(f'"{n}":0' for n in [*range(100_000), 99_999])
    with pytest.raises(errors.JsonDuplicateError, match="99999"):
        strictjson.parse(f"{{{keys}}}".encode(), depth=8)


@pytest.mark.parametrize("unit", [b'"\\', b'"', b'{"a":"', b"\\"])
def test_hostile_text_is_scanned_once(unit):
    """Two million unterminated strings: a scan that starts over at each of them would not come back today."""
    with pytest.raises(errors.LrcError):
        strictjson.parse(b'{"k":' + unit * 2_000_000, depth=8)
