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
    from lrconvert.api.live import attach, detach, disabled, peft_model, set_active
    from lrconvert.api.outputs import export, merge, recover, unmerge, verify
    from lrconvert.convert.compress import Compression
    from lrconvert.convert.convert import Conversion
    from lrconvert.convert.options import AllocateOptions, CompressOptions, ConvertOptions
    from lrconvert.convert.rank_allocation import Allocation
    from lrconvert.core.errors import (
        ArgumentError,
        AttachError,
        BaseError,
        BudgetError,
        CanonicalError,
        ConfigError,
        CoverageError,
        DataError,
        DependencyError,
        DigestError,
        DiskSpaceError,
        DtypeError,
        DurabilityError,
        EmptyAdapterError,
        ExportError,
        FileChangedError,
        FileKindError,
        FileReadError,
        FileWriteError,
        FingerprintError,
        HeaderLengthError,
        HeaderTextError,
        HubError,
        IndexRangeError,
        JsonDepthError,
        JsonDuplicateError,
        JsonNumberError,
        JsonSyntaxError,
        LimitError,
        LockedError,
        LrcError,
        MergeOverflowError,
        MissingFieldError,
        NoEffectError,
        NotLoraError,
        OffsetError,
        OptionError,
        OrientationError,
        OutputExistsError,
        OutputPathError,
        PairError,
        PatternError,
        PickleError,
        PlacementError,
        QuantizedBaseError,
        ShapeError,
        ShardIndexError,
        ShardPathError,
        StatisticsError,
        TensorNameError,
        TensorUnknownError,
        UndoError,
        UndoOrderError,
        UnfinishedError,
        UnknownFieldError,
        UnknownLayoutError,
        UnsupportedLoraError,
        ValueRangeError,
        VersionError,
        WorkerError,
    )
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
    "ArgumentError",
    "AttachError",
    "BaseError",
    "Batch",
    "BatchOptions",
    "BudgetError",
    "CanonicalError",
    "CompactAdapter",
    "CompareOptions",
    "CompressOptions",
    "Compression",
    "ConfigError",
    "Conversion",
    "ConvertOptions",
    "CoverageError",
    "DataError",
    "DependencyError",
    "DigestError",
    "DiskSpaceError",
    "DtypeError",
    "DurabilityError",
    "EmptyAdapterError",
    "ExportError",
    "ExportOptions",
    "Exported",
    "Fidelity",
    "FileChangedError",
    "FileKindError",
    "FileReadError",
    "FileWriteError",
    "Finding",
    "FingerprintError",
    "HeaderLengthError",
    "HeaderTextError",
    "HubError",
    "IndexRangeError",
    "InputStatistics",
    "JsonDepthError",
    "JsonDuplicateError",
    "JsonNumberError",
    "JsonSyntaxError",
    "LimitError",
    "LockedError",
    "LoraAdapter",
    "LrcError",
    "MergeOptions",
    "MergeOverflowError",
    "MergeReport",
    "MissingFieldError",
    "NoEffectError",
    "NotLoraError",
    "OffsetError",
    "OptionError",
    "OrientationError",
    "OutputExistsError",
    "OutputPathError",
    "PairError",
    "PatternError",
    "PickleError",
    "PlacementError",
    "QuantizedBaseError",
    "Recovery",
    "RunOptions",
    "Scaled",
    "Settings",
    "ShapeError",
    "ShardIndexError",
    "ShardPathError",
    "StatisticsError",
    "StatisticsOptions",
    "TensorNameError",
    "TensorUnknownError",
    "UndoError",
    "UndoOrderError",
    "UnfinishedError",
    "UnknownFieldError",
    "UnknownLayoutError",
    "UnmergeOptions",
    "UnmergeReport",
    "UnsupportedLoraError",
    "Validation",
    "ValueRangeError",
    "VerifyReport",
    "VersionError",
    "WorkerError",
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
    "api.batch.run": "Batch BatchOptions allocate_many compress_many convert_many",
    "api.comparing": "compare load_statistics statistics",
    "api.conversions": "allocate compress convert refine",
    "api.live": "attach detach disabled peft_model set_active",
    "api.outputs": "export merge recover unmerge verify",
    "convert.compress": "Compression",
    "convert.convert": "Conversion",
    "convert.rank_allocation": "Allocation",
    "convert.options": "AllocateOptions CompressOptions ConvertOptions",
    "core.errors": (
        "LrcError HubError FileKindError FileChangedError FileReadError FileWriteError "
        "DurabilityError LockedError UnfinishedError OutputExistsError OutputPathError "
        "DiskSpaceError HeaderLengthError HeaderTextError JsonDuplicateError JsonNumberError "
        "JsonDepthError JsonSyntaxError OffsetError CoverageError ShapeError "
        "DtypeError TensorNameError LimitError ShardPathError ShardIndexError "
        "PickleError VersionError UnknownFieldError MissingFieldError CanonicalError "
        "DigestError ValueRangeError IndexRangeError UnknownLayoutError NotLoraError "
        "UnsupportedLoraError ConfigError PatternError PairError EmptyAdapterError "
        "TensorUnknownError BaseError OrientationError FingerprintError QuantizedBaseError "
        "PlacementError NoEffectError AttachError UndoError UndoOrderError "
        "StatisticsError DataError MergeOverflowError BudgetError ArgumentError "
        "OptionError ExportError WorkerError DependencyError"
    ),
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
    if name not in _HOME_OF:
        raise AttributeError(f"module 'lrconvert.api' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"lrconvert.{_HOME_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
