"""Settings that a file states beside its tensors, in metadata or in a pickled dict: alpha, rank, rsLoRA."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lrconvert.core.errors import PairError
from lrconvert.formats.readers.shared.pairs import scale_of

# By the last word of a key, in small letters.
_ALPHAS = ("alpha", "lora_alpha", "network_alpha", "ss_network_alpha")
_RANKS = ("r", "rank", "lora_r", "lora_rank", "lora_dim", "network_dim", "ss_network_dim")
_STABILIZED = ("use_rslora", "rslora", "rs_lora")


@dataclass(frozen=True)
class Settings:
    """Settings of a file for all its modules, None for those it does not state. `used` are the keys that said it."""

    alpha: float | None = None
    rank: float | None = None
    stabilized: bool = False
    used: tuple[str, ...] = ()

    def scale(self, module: str, alpha: float, rank: int) -> float:
        """Return alpha / r, or alpha / sqrt(r). Raises E-PAIR for another rank than is stated, E-CONFIG."""
        if self.rank is not None and self.rank != rank:
            what = f"{module}: the tensors have rank {rank}, the file states {self.rank:g}"
            raise PairError(what, fix="is the file of one adapter?")
        return scale_of(module, alpha, math.sqrt(rank) if self.stabilized else rank)


def settings(stated: Mapping[str, str]) -> Settings:
    """Return the settings among the texts of a file. What is not understood is left to be named as unused."""
    numbers: dict[str, float] = {}
    used: list[str] = []
    for kind, words in (("alpha", _ALPHAS), ("rank", _RANKS), ("stabilized", _STABILIZED)):
        found = {key: _number(text) for key, text in stated.items() if key.rpartition(".")[2].lower() in words}
        values = {number for number in found.values() if number is not None}
        if len(values) == 1 and None not in found.values():
            numbers[kind] = values.pop()
            used += found
    return Settings(numbers.get("alpha"), numbers.get("rank"), bool(numbers.get("stabilized")), tuple(used))


def _number(text: str) -> float | None:
    flag = {"true": 1.0, "false": 0.0}.get(text.strip().lower())
    if flag is not None:
        return flag
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
