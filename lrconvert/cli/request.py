"""What a converter was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lrconvert.api.batch.options import BatchOptions
from lrconvert.cli import flags
from lrconvert.formats.readers.shared.options import ReadOptions


@dataclass(frozen=True)
class Request:
    """A conversion as it was typed: adapters, how they are read, where the result goes, and what is printed. `many` are
    options that are for several adapters alone."""

    sources: tuple[Path, ...]
    output: Path | None
    reading: Mapping[str, Any]
    many: Mapping[str, Any]
    dry_run: bool
    overwrite: bool
    quiet: bool
    verbose: bool
    as_json: bool
    html: Path | None = None

    @classmethod
    def of(cls, given: dict[str, Any]) -> Request:
        """Take the request out of what a command was `given`; what is left are options of the conversion."""
        reading = flags.chosen(given, ReadOptions)
        names = [field.name for field in fields(cls) if field.name not in ("reading", "many")]
        declared = [field.name for field in fields(BatchOptions) if field.metadata.get("help")]
        only_many = {name: value for name in declared if (value := given.pop(name, None)) is not None}
        return cls(
            reading=reading,
            many=only_many,
            **{name: given.pop(name, False) for name in names if name != "html"},
            html=given.pop("html", None),
        )
