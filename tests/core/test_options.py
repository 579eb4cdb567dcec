"""Options declared in dataclasses: keywords and the fields of a given dataclass are checked alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from lrconvert.convert.options import ConvertOptions
from lrconvert.core.errors import OptionError
from lrconvert.core.options import make, option, take
from lrconvert.refine.settings import Settings


@dataclass(frozen=True)
class Options:
    rank: float | None = option(4, "A rank.", least=1)
    kind: str = option("a", "A kind.", choices=("a", "b", "16"))
    free: Any = None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "rank is 0; it must be at least 1"),
        ({"rank": math.inf}, "rank is inf"),
        ({"rank": math.nan}, "rank is nan"),
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
    assert make(Options, {"kind": 16, "rank": None}, "the form") == Options(None, "16")


def test_equal_options_are_equal_however_they_are_spelled() -> None:
    """Numbers come in the type of their field; what is not whole where it must be is refused."""

    def spelled(**values: object) -> str:
        return repr(make(Settings, values, "refine"))

    assert spelled(steps=7, lr=1, hidden=2) == spelled(steps=7.0, lr=1.0, hidden=np.float32(2))
    assert spelled(steps=np.int64(7)) == spelled(steps=7)
    assert repr(make(ConvertOptions, {"include": ["a"]}, "x")) == repr(make(ConvertOptions, {"include": ("a",)}, "x"))
    for value in (2.5, float("nan"), float("inf")):
        with pytest.raises(OptionError, match="steps"):
            spelled(steps=value)
