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
    from lrconvert.api.batch.job import Job, Outcome, Work
    from lrconvert.api.batch.one import convert_one
    from lrconvert.api.batch.options import BatchOptions
    from lrconvert.api.batch.run import allocate_many, batch_jobs, compress_many, convert_many
    from lrconvert.api.batch.tally import Batch
    from lrconvert.api.combining import combine
    from lrconvert.api.comparing import compare, load_statistics, statistics
    from lrconvert.api.conversions import allocate, compress, convert, refine
    from lrconvert.api.expanding import ExpandOptions, expanded
    from lrconvert.api.extracting import extract
    from lrconvert.api.fleets import Fleet
    from lrconvert.api.live import attach, detach, disabled, peft_model, set_active
    from lrconvert.api.outputs import export, merge, recover, unmerge, verify
    from lrconvert.convert.combine.combine import Combination
    from lrconvert.convert.combine.options import CombineOptions
    from lrconvert.convert.compress import Compression
    from lrconvert.convert.convert import Conversion
    from lrconvert.convert.extract.extract import Extraction
    from lrconvert.convert.extract.options import ExtractOptions
    from lrconvert.convert.options import AllocateOptions, CompressOptions, ConvertOptions
    from lrconvert.convert.rank_allocation import Allocation
    from lrconvert.core.errors import LrcError
    from lrconvert.formats.compat.base import Finding
    from lrconvert.formats.exporters.base import Exported, ExportOptions
    from lrconvert.formats.fidelity import Fidelity
    from lrconvert.formats.lrc.validation import Validation
    from lrconvert.live.options import CompareOptions, StatisticsOptions
    from lrconvert.lora.adapter import CompactAdapter, LoraAdapter
    from lrconvert.lora.input_statistics import InputStatistics
    from lrconvert.merge import MergeReport, Recovery, Scaled, UnmergeReport, VerifyReport
    from lrconvert.merge.options import MergeOptions, UnmergeOptions
    from lrconvert.refine.settings import RunOptions, Settings

__all__ = [
    "AllocateOptions",
    "Allocation",
    "Batch",
    "BatchOptions",
    "Combination",
    "CombineOptions",
    "CompactAdapter",
    "CompareOptions",
    "CompressOptions",
    "Compression",
    "Conversion",
    "ConvertOptions",
    "ExpandOptions",
    "ExportOptions",
    "Exported",
    "ExtractOptions",
    "Extraction",
    "Fidelity",
    "Finding",
    "Fleet",
    "InputStatistics",
    "Job",
    "LoraAdapter",
    "LrcError",
    "MergeOptions",
    "MergeReport",
    "Outcome",
    "Recovery",
    "RunOptions",
    "Scaled",
    "Settings",
    "StatisticsOptions",
    "UnmergeOptions",
    "UnmergeReport",
    "Validation",
    "VerifyReport",
    "Work",
    "allocate",
    "allocate_many",
    "attach",
    "batch_jobs",
    "check",
    "combine",
    "compare",
    "compress",
    "compress_many",
    "convert",
    "convert_many",
    "convert_one",
    "detach",
    "disabled",
    "download",
    "expanded",
    "export",
    "extract",
    "inspect",
    "load",
    "load_all",
    "load_lora",
    "load_statistics",
    "merge",
    "peft_model",
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
    "api.batch.job": "Job Outcome Work",
    "api.batch.one": "convert_one",
    "api.batch.options": "BatchOptions",
    "api.batch.run": "allocate_many batch_jobs compress_many convert_many",
    "api.batch.tally": "Batch",
    "api.combining": "combine",
    "api.comparing": "compare load_statistics statistics",
    "api.conversions": "allocate compress convert refine",
    "api.extracting": "extract",
    "api.expanding": "ExpandOptions expanded",
    "api.fleets": "Fleet",
    "api.live": "attach detach disabled peft_model set_active",
    "api.outputs": "export merge recover unmerge verify",
    "convert.combine.combine": "Combination",
    "convert.combine.options": "CombineOptions",
    "convert.compress": "Compression",
    "convert.convert": "Conversion",
    "convert.extract.extract": "Extraction",
    "convert.extract.options": "ExtractOptions",
    "convert.rank_allocation": "Allocation",
    "convert.options": "AllocateOptions CompressOptions ConvertOptions",
    "core.errors": "LrcError",
    "formats.compat.base": "Finding",
    "formats.exporters.base": "ExportOptions Exported",
    "formats.fidelity": "Fidelity",
    "formats.lrc.validation": "Validation",
    "live.options": "CompareOptions StatisticsOptions",
    "lora.adapter": "CompactAdapter LoraAdapter",
    "lora.input_statistics": "InputStatistics",
    "merge": "MergeReport Recovery Scaled UnmergeReport VerifyReport",
    "merge.options": "MergeOptions UnmergeOptions",
    "refine.settings": "RunOptions Settings",
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(importlib.import_module(f"lrconvert.{_HOME_OF[name]}"), name)
    elif name in (known := _errors()):
        value = known[name]
    else:
        raise AttributeError(f"module 'lrconvert.api' has no attribute {name!r}")
    globals()[name] = value
    return value


def _errors() -> dict[str, type[Any]]:
    """Return the errors by their names: attributes here, though `import *` and `help` leave them out."""
    return {kind.__name__: kind for kind in importlib.import_module("lrconvert.core.errors").all_errors()}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_errors()})
