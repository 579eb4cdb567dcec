"""Results of a config and its targets, computed once and kept beside the config."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

from lrconvert.lora.adapter import Target

Config = TypeVar("Config")
Result = TypeVar("Result")
_OfTargets = Callable[[Config, tuple[Target, ...]], Result]


def beside_config(compute: _OfTargets[Config, Result]) -> _OfTargets[Config, Result]:
    """Return `compute` (config, targets) with its last result kept in the config, a frozen dataclass.

    Every target of a file asks for the places of all: a cache with keys would hash all targets for each of them, and
    keep adapters alive that nobody uses any more.
    """
    name = f"_{compute.__name__}_beside"

    @wraps(compute)
    def kept(config: Config, targets: tuple[Target, ...]) -> Result:
        entry: tuple[tuple[Target, ...], Result] | None = vars(config).get(name)
        if entry is None or (entry[0] is not targets and entry[0] != targets):
            entry = vars(config)[name] = targets, compute(config, targets)
        return entry[1]

    return kept
