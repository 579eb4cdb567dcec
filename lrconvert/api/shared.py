"""What all verbs share: paths, progress, settings, statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrconvert.core.errors import OptionError
from lrconvert.lora import statistics_file
from lrconvert.lora.input_statistics import InputStatistics

if TYPE_CHECKING:
    from lrconvert.refine.settings import Settings

AnyPath = str | PathLike[str]
Progress = Callable[[float, str], None]


def silent(fraction: float, text: str) -> None:
    """The progress callback of a caller who wants none."""


def settings_of(verb: str, given: Mapping[str, Any]) -> Settings:
    """Raises E-OPTION for what is no setting."""
    from lrconvert.refine.settings import Settings

    known = {field.name for field in fields(Settings)}
    unknown = sorted(set(given) - known)
    if unknown:
        raise OptionError(f"{verb} has no option {unknown[0]!r:.40}", fix=f"it has: {', '.join(sorted(known))}")
    return Settings(**given)


def statistics_of(given: AnyPath | InputStatistics | None) -> InputStatistics | None:
    return statistics_file.read(Path(given)) if isinstance(given, (str, PathLike)) else given
