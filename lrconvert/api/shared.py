"""Paths, progress and options of all verbs.

A verb takes its inputs, a frozen dataclass of options, and single fields of it as keywords: ``convert(lora, "lowrank",
target_ratio=50)`` is ``convert(lora, "lowrank", ConvertOptions(target_ratio=50))``.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

from lrconvert.core.errors import UnknownLayoutError
from lrconvert.core.options import names, refuse_unknown
from lrconvert.formats import loading
from lrconvert.formats.lrc import file
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter

AnyPath = str | PathLike[str]
AnyLora = AnyPath | LoraAdapter
Progress = Callable[[float, str], None]


class Result(Protocol):
    """A result of a verb that makes a compact adapter: `Conversion`, `Compression`, `Allocation`, `Refinement`."""

    @property
    def compact(self) -> CompactAdapter: ...


AnyCompact = AnyPath | CompactAdapter | Result


def compact_of(item: AnyCompact) -> CompactAdapter:
    """Return a compact adapter: as it is, of the result of a verb, or read from an lrconvert file."""
    if isinstance(item, CompactAdapter):
        return item
    if not isinstance(item, (str, PathLike)):
        return item.compact
    path = Path(item)
    if path.is_dir():
        fix = "convert it first, or give the LoRA where a LoRA is asked for"
        raise UnknownLayoutError("is a folder, not an lrconvert file", fix=fix, path=path)
    return file.read(path)


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
