"""The contract of an exporter, and the registry that finds exporters by scanning this folder.

An exporter is one file here that binds ``EXPORTER``. It is a pure function from a compact adapter to the files of a
folder; writing them is not its business.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from lrconvert.adapter import CompactAdapter
from lrconvert.errors import ExportError
from lrconvert.report import Fidelity

Files = Mapping[str, Iterable[bytes]]


@dataclass(frozen=True)
class ExportOptions:
    """`keep_ranks`: per-module ranks instead of one padded rank. `dtype`: of the factors. `command`: what the user ran,
    for the model card."""

    keep_ranks: bool = False
    dtype: str = "F32"
    command: str = ""


@dataclass(frozen=True)
class Exporter:
    """One output layout. `files(compact, options, fidelity)` maps file names to their bytes in pieces."""

    id: str
    title: str
    files: Callable[[CompactAdapter, ExportOptions, Fidelity | None], Files]


def ids() -> list[str]:
    """Names for `--to`, from the file names of this folder."""
    import lrconvert.exporters as package

    return sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules(package.__path__) if m.name != "base")


def get(exporter_id: str) -> Exporter:
    """The exporter of that id. Raises E-EXPORT for an unknown one."""
    if exporter_id not in ids():
        raise ExportError(f"there is no export to {exporter_id!r}", fix=f"known: {', '.join(ids())}")
    found: Exporter = importlib.import_module(f"lrconvert.exporters.{exporter_id.replace('-', '_')}").EXPORTER
    return found
