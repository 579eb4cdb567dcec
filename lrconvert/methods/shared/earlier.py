"""Earlier versions of methods: their files are read and refined, and none are made any more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lrconvert.core.dtypes import Array
from lrconvert.core.errors import OptionError
from lrconvert.lora.adapter import LoraAdapter
from lrconvert.methods.base import Budget, FitContext, Method


@dataclass(frozen=True)
class NoOptions:
    """Nothing can be asked for."""


class EarlierMethod(Method):
    """A version of a method that is read forever and no longer made."""

    commands = ()
    Options = NoOptions
    examples = ()

    def plan(self, lora: LoraAdapter, options: Any, budget: Budget | None, context: FitContext) -> Any:
        raise OptionError(f"version {self.version} of {self.id} is read, not made", fix=f"convert to {self.id}")

    def fit(self, lora: LoraAdapter, config: Any, context: FitContext) -> dict[str, Array]:
        raise OptionError(f"version {self.version} of {self.id} is read, not made", fix=f"convert to {self.id}")
