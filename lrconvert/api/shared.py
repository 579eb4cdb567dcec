"""Paths, progress and options of all verbs.

A verb takes its inputs, a frozen dataclass of options, and single fields of it as keywords: ``convert(lora, "lowrank",
target_ratio=50)`` is ``convert(lora, "lowrank", ConvertOptions(target_ratio=50))``.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from os import PathLike
from typing import Any

from lrconvert.core.options import names, refuse_unknown
from lrconvert.formats import loading
from lrconvert.formats.readers.shared.options import ReadOptions

AnyPath = str | PathLike[str]
Progress = Callable[[float, str], None]


def silent(fraction: float, text: str) -> None:
    """Report nothing: the progress callback of a caller who wants none."""


def take_reading(keywords: MutableMapping[str, Any], base: Any = None) -> ReadOptions:
    """Remove `allow_pickle`, `layout` and `alpha`, which say how adapters are read, from `keywords`, and return them as
    options with the `base`, if that is a path."""
    own = {name: keywords.pop(name) for name in names(ReadOptions) if name in keywords and name != "base"}
    return loading.options(own.get("allow_pickle", False), base, own.get("layout"), own.get("alpha"))


def refuse_rest(keywords: MutableMapping[str, Any], verb: str, *options: type[Any]) -> None:
    """Raise E-OPTION for a keyword that is a field of none of the `options` of the `verb`."""
    refuse_unknown(set(keywords), verb, [name for kind in options for name in names(kind)])
