"""Fields of adapter configurations that other tools wrote: unknown ones that are set are refused by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any

from lrconvert.core.errors import ConfigError, UnsupportedLoraError
from lrconvert.io.fields import Check

Count = Annotated[int, Check(lambda value: value > 0, "a positive integer", ConfigError)]
"""A field that counts something; anything but an integer of at least 1 raises E-CONFIG."""


def is_set(value: Any) -> bool:
    """Return whether a field has a value that could mean anything."""
    return value not in (None, False, "", [], {})


def check_known(config: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise E-LORA-FEATURE for the first field that is not known and is set: it might change the update."""
    for key in sorted(set(config) - set(known)):
        if is_set(config[key]):
            what = f"the configuration field {key!r} is not known and is set to {config[key]!r:.60}"
            raise UnsupportedLoraError(what, fix="remove the field if it does not change the update")
