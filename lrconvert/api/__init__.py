"""The verbs: the same as the commands of the CLI, as typed functions, and the types of what they take and give."""

from __future__ import annotations

from lrconvert.api.adapters import check, inspect, load, load_all, load_lora, read, upgrade, validate, write
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
