"""Options that several methods offer, their checks, and the refusal of a budget that is too small."""

from __future__ import annotations

from typing import Any, TypeVar

from lrconvert.core.errors import BudgetError, OptionError
from lrconvert.core.options import option
from lrconvert.core.wording import spelled
from lrconvert.methods.base import Budget
from lrconvert.methods.shared.widths import WIDTHS

Config = TypeVar("Config")


def bits_option(unit: str = "number", auto: str = "the best mix") -> Any:
    """Declare the option ``--bits``: a width, or ``auto``."""
    names = tuple(str(bits) for bits in WIDTHS)
    text = f"Bits per {unit}: {', '.join(names)}, or auto (16 without a size; under a size, {auto})."
    return option("auto", text, choices=("auto", *names))


def check_range(options: Any, name: str, least: int, most: int | None = None) -> None:
    """Raise E-OPTION if the integer option `name` is given and out of range."""
    value = getattr(options, name)
    if value is not None and (value < least or (most is not None and value > most)):
        allowed = f"at least {least} is" if most is None else f"{least} to {most} are"
        raise OptionError(f"{spelled(name)} is {value}; {allowed} allowed")


def within(budget: Budget, smallest: Config) -> Config:
    """Return `smallest`, the config of the smallest possible file. Raise E-BUDGET if even that file is too large."""
    size = budget.size(smallest)
    if size > budget.limit:
        what = f"{budget.limit} bytes cannot be reached; the smallest possible file has {size} bytes"
        raise BudgetError(what, smallest=size)
    return smallest
