"""The verbs: the same as the commands of the CLI, as typed functions, and the types of what they take and give.

A name is imported when it is used: who reads an adapter needs nothing that merges or refines.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lrconvert.api.adapters import (
        check,
        download,
        inspect,
        load,
        load_all,
        load_lora,
        read,
        upgrade,
        validate,
        write,
    )
    from lrconvert.api.batch.run import Batch, BatchOptions, allocate_many, compress_many, convert_many
    from lrconvert.api.comparing import compare, load_statistics, statistics
    from lrconvert.api.conversions import allocate, compress, convert, refine
    from lrconvert.api.live import attach, detach, disabled, set_active
    from lrconvert.api.outputs import export, merge, recover, unmerge, verify
    from lrconvert.convert.compress import Compression
    from lrconvert.convert.convert import Conversion
    from lrconvert.convert.options import AllocateOptions, CompressOptions, ConvertOptions
    from lrconvert.core.errors import LrcError
    from lrconvert.formats.compat.base import Finding
    from lrconvert.formats.exporters.base import ExportOptions
    from lrconvert.live.options import CompareOptions, StatisticsOptions
    from lrconvert.merge import Scaled
    from lrconvert.merge.options import MergeOptions, UnmergeOptions
    from lrconvert.refine.settings import RunOptions, Settings

__all__ = [
    "AllocateOptions",
    "Batch",
    "BatchOptions",
    "CompareOptions",
    "CompressOptions",
    "Compression",
    "Conversion",
    "ConvertOptions",
    "ExportOptions",
    "Finding",
    "LrcError",
    "MergeOptions",
    "RunOptions",
    "Scaled",
    "Settings",
    "StatisticsOptions",
    "UnmergeOptions",
    "allocate",
    "allocate_many",
    "attach",
    "check",
    "compare",
    "compress",
    "compress_many",
    "convert",
    "convert_many",
    "detach",
    "disabled",
    "download",
    "export",
    "inspect",
    "load",
    "load_all",
    "load_lora",
    "load_statistics",
    "merge",
    "read",
    "recover",
    "refine",
    "set_active",
    "statistics",
    "unmerge",
    "upgrade",
    "validate",
    "verify",
    "write",
]

_HOMES = {  # the modules, and what they give
    "api.adapters": "check download inspect load load_all load_lora read upgrade validate write",
    "api.batch.run": "Batch BatchOptions allocate_many compress_many convert_many",
    "api.comparing": "compare load_statistics statistics",
    "api.conversions": "allocate compress convert refine",
    "api.live": "attach detach disabled set_active",
    "api.outputs": "export merge recover unmerge verify",
    "convert.compress": "Compression",
    "convert.convert": "Conversion",
    "convert.options": "AllocateOptions CompressOptions ConvertOptions",
    "core.errors": "LrcError",
    "formats.compat.base": "Finding",
    "formats.exporters.base": "ExportOptions",
    "live.options": "CompareOptions StatisticsOptions",
    "merge": "Scaled",
    "merge.options": "MergeOptions UnmergeOptions",
    "refine.settings": "RunOptions Settings",
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'lrconvert.api' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"lrconvert.{_HOME_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
