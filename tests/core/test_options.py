"""Options declared in dataclasses: keywords and the fields of a given dataclass are checked alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest

from lrconvert.core.errors import OptionError
from lrconvert.core.options import make, option, take


@dataclass(frozen=True)
class Options:
    rank: float = option(4, "A rank.", least=1)
    kind: str = option("a", "A kind.", choices=("a", "b", "16"))
    free: Any = None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "--rank is 0; it must be at least 1"),
        ({"rank": math.inf}, "--rank is inf"),
        ({"rank": math.nan}, "--rank is nan"),
        ({"kind": "c"}, "kind is 'c'; the form takes a, b, 16"),
        ({"size": 1}, "the form has no option 'size'"),
    ],
)
def test_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make(Options, values, "the form")
    if "size" not in values:
        with pytest.raises(OptionError, match=message):
            take(Options, None, dict(values), "the form")
        with pytest.raises(OptionError, match=message):
            take(Options, Options(**values), {}, "the form")


def test_keywords_go_before_what_is_given_and_others_stay() -> None:
    keywords = {"rank": 2, "other": 1}
    assert take(Options, Options(rank=3, kind="b", free=[1]), keywords, "the form") == Options(2, "b", [1])
    assert keywords == {"other": 1}


def test_choices_are_texts() -> None:
    assert make(Options, {"kind": 16, "rank": None}, "the form") == Options(None, "16")  # type: ignore[arg-type]
