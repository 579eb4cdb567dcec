"""Strict parsing and canonical spelling."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrconvert.core import errors, limits
from lrconvert.io import strictjson

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


@pytest.mark.medium
@pytest.mark.parametrize(
    "part", (b'"",', b"1,", b"[],", b'{"":1},', b'{"a":[1,2]},'), ids=("strings", "numbers", "lists", "objects", "both")
)
def test_no_more_values_than_real_files_have(part):
    """What is cheap to write is not always cheap to read: counted before anything is parsed."""
    text = b"[" + part * (100_000_000 // len(part))
    with pytest.raises(errors.LimitError):
        strictjson.parse(text, depth=16)


def test_a_header_of_the_most_tensors_is_read():
    entry = '{"dtype":"F32","shape":[4096,4096],"data_offsets":[4,8]}'
    text = "{" + ",".join(f'"{n}":{entry}' for n in range(1 << 14)) + "}"
    counts = {"strings": text.count('"') // 2, "values": text.count(",") + text.count(":")}
    assert all(count << 6 <= limits.MAX_JSON[what] for what, count in counts.items())
    assert len(strictjson.parse(text.encode(), depth=16)) == 1 << 14


def test_an_unterminated_string_is_looked_at_once():
    """A scan that tries again at every place of 20 MB would not end."""
    for text in (b'["' + b"x" * 20_000_000, b'["' + b"\\" * 20_000_000, b"[" * 3 + b'"' + b"]" * 3_000_000):
        with pytest.raises(errors.LrcError):
            strictjson.parse(text, depth=16)
