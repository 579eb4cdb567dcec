"""Fields of JSON objects: what a declaration admits, what it refuses, and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrconvert.core.errors import LrcError, OptionError
from lrconvert.io import fields
from lrconvert.io.fields import By, Hex, Key, Whole, between, matches, one_of


def _halve(value: Any, path: str) -> float:
    if not isinstance(value, int):
        raise OptionError(f"{path} cannot be halved")
    return value / 2


Half = Annotated[float, By(_halve, lambda value: int(2 * value))]


class Pair(NamedTuple):
    first: Whole
    second: Half


@dataclass(frozen=True)
class Leaf:
    name: str
    pair: Pair = field(default=Pair(0, 0.0))


@dataclass(frozen=True)
class Tree:
    count: Annotated[int, between(1, 8)]
    leaves: tuple[Leaf, ...]
    flag: bool = False
    scale: float = 1.0
    kind: Literal["a", "b", 1] = "a"
    width: Annotated[int, one_of((4, 8), OptionError)] = 4
    word: Annotated[str, matches("[a-z]+", "a word")] = "w"
    digests: Mapping[str, Hex] = field(default_factory=dict)
    row: tuple[int, str] | None = None
    rows: tuple[Pair, ...] = ()
    turned: Annotated[bool, Key("was_turned")] = False
    init: bool | str | None = None
    whatever: Any = None
    half: Half = 0.5


PAIRS = st.builds(Pair, st.integers(0, 99), st.integers(-9, 9).map(lambda n: n / 2))
TREES = st.builds(
    Tree,
    count=st.integers(1, 8),
    leaves=st.lists(st.builds(Leaf, st.text(max_size=3), PAIRS), max_size=3).map(tuple),
    flag=st.booleans(),
    scale=st.floats(allow_nan=False) | st.integers(),
    kind=st.sampled_from(["a", "b", 1]),
    width=st.sampled_from([4, 8]),
    word=st.sampled_from(["w", "word"]),
    digests=st.dictionaries(st.text(max_size=3), st.just("0" * 64), max_size=2),
    row=st.none() | st.tuples(st.integers(), st.text(max_size=3)),
    rows=st.lists(PAIRS, max_size=3).map(tuple),
    turned=st.booleans(),
    init=st.none() | st.booleans() | st.text(max_size=3),
    whatever=st.none() | st.lists(st.integers()),
    half=st.integers(-9, 9).map(lambda n: n / 2),
)


@given(TREES)
def test_what_is_written_is_read_back(tree: Tree) -> None:
    assert fields.read(Tree, fields.as_json(tree), "tree") == tree


def test_defaults_are_not_written() -> None:
    assert fields.as_json(Tree(1, (Leaf("x"),))) == {"count": 1, "leaves": [{"name": "x"}]}
    full = fields.as_json(Tree(1, (), turned=True, rows=(Pair(1, 1.5),), row=(1, "x"), init=False))
    assert full == {"count": 1, "leaves": [], "was_turned": True, "rows": [[1, 3]], "row": [1, "x"], "init": False}


@pytest.mark.parametrize(
    ("change", "code", "what"),
    [
        ({"count": None}, "E-LIMIT", "tree.count is None, expected 1 to 8"),
        ({"count": 9}, "E-LIMIT", "tree.count is 9, expected 1 to 8"),
        ({"count": True}, "E-LIMIT", "tree.count is True, expected 1 to 8"),
        ({"count": ...}, "E-MISSING", "tree lacks the field 'count'"),
        ({"more": 1}, "E-UNKNOWN", "tree has the unknown field 'more'"),
        ({"turned": True}, "E-UNKNOWN", "tree has the unknown field 'turned'"),
        ({"leaves": {}}, "E-JSON-SYNTAX", "tree.leaves is {}, expected a list"),
        ({"leaves": [{"name": "x"}, {}]}, "E-MISSING", "tree.leaves[1] lacks the field 'name'"),
        ({"leaves": [{"name": "x", "y": 1}]}, "E-UNKNOWN", "tree.leaves[0] has the unknown field 'y'"),
        ({"leaves": [[]]}, "E-JSON-SYNTAX", "tree.leaves[0] is [], expected an object"),
        ({"leaves": [{"name": 1}]}, "E-JSON-SYNTAX", "tree.leaves[0].name is 1, expected a string"),
        ({"flag": 1}, "E-JSON-SYNTAX", "tree.flag is 1, expected true or false"),
        ({"scale": True}, "E-JSON-SYNTAX", "tree.scale is True, expected a number"),
        ({"kind": True}, "E-JSON-SYNTAX", "tree.kind is True, expected one of a, b, 1"),
        ({"kind": []}, "E-JSON-SYNTAX", "tree.kind is [], expected one of a, b, 1"),
        ({"width": 5}, "E-OPTION", "tree.width is 5, expected one of 4, 8"),
        ({"width": "4"}, "E-OPTION", "tree.width is '4', expected one of 4, 8"),
        ({"word": "w\n"}, "E-JSON-SYNTAX", "tree.word is 'w\\n', expected a word"),
        ({"digests": []}, "E-JSON-SYNTAX", "tree.digests is [], expected an object"),
        ({"digests": {"a": "0"}}, "E-DIGEST", "tree.digests['a'] is '0', expected 64 lower-case hexadecimal digits"),
        ({"row": None}, "E-JSON-SYNTAX", "tree.row is None, expected a list of 2"),
        ({"row": [1]}, "E-JSON-SYNTAX", "tree.row is [1], expected a list of 2"),
        ({"row": [1, 2]}, "E-JSON-SYNTAX", "tree.row[1] is 2, expected a string"),
        ({"rows": [[-1, 2]]}, "E-JSON-SYNTAX", "tree.rows[0][0] is -1, expected an integer of at least 0"),
        ({"rows": [[1, 2, 3]]}, "E-JSON-SYNTAX", "tree.rows[0] is [1, 2, 3], expected a list of 2"),
        ({"init": 1}, "E-JSON-SYNTAX", "tree.init is 1, expected a string"),
        ({"half": "x"}, "E-OPTION", "tree.half cannot be halved"),
    ],
)
def test_every_refusal_names_the_field(change: dict[str, Any], code: str, what: str) -> None:
    value = {"count": 1, "leaves": [], **change}
    with pytest.raises(LrcError) as raised:
        fields.read(Tree, {key: entry for key, entry in value.items() if entry is not ...}, "tree")
    assert (raised.value.code, raised.value.what) == (code, what)


def test_types_that_are_no_dataclass() -> None:
    assert fields.read(tuple[Leaf, ...], [{"name": "x"}], "leaves") == (Leaf("x"),)
    assert fields.read(dict[str, int], {"a": 1}, "table") == {"a": 1}
    assert fields.names(Tree) >= {"count", "was_turned"} and "turned" not in fields.names(Tree)


def test_configurations_of_other_tools() -> None:
    """Null is absent, other fields are ignored, and every refusal is E-CONFIG."""
    assert fields.read_config(Tree, {"count": 1, "leaves": [], "flag": None, "more": 1}) == Tree(1, ())
    for change, what in (
        ({"leaves": None}, "leaves is missing"),
        ({"flag": "yes"}, "flag is 'yes', expected true or false"),
        ({"leaves": [{"name": 1}]}, "leaves[0].name is 1, expected a string"),
    ):
        with pytest.raises(LrcError) as raised:
            fields.read_config(Tree, {"count": 1, "leaves": [], **change})
        assert (raised.value.code, raised.value.what) == ("E-CONFIG", what)
