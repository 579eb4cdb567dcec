"""The verbs: the same as the commands of the CLI, as typed functions."""

from __future__ import annotations

from lrconvert.api.adapters import check, inspect, load, load_all, load_lora, read, upgrade, validate, write
from lrconvert.api.comparing import compare, load_statistics, statistics
from lrconvert.api.conversions import allocate, compress, convert, refine
from lrconvert.api.live import attach, detach, disabled, set_active
from lrconvert.api.outputs import export, merge, recover, unmerge, verify
from lrconvert.convert.compress import Compression
from lrconvert.convert.convert import Conversion
from lrconvert.core.errors import LrcError
from lrconvert.formats.compat.base import Finding
from lrconvert.merge import Scaled

__all__ = [
    "Compression",
    "Conversion",
    "Finding",
    "LrcError",
    "Scaled",
    "allocate",
    "attach",
    "check",
    "compare",
    "compress",
    "convert",
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
