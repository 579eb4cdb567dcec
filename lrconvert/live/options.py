"""Options of what is measured on a live model: input statistics, and the answers of adapters."""

from __future__ import annotations

from dataclasses import dataclass

from lrconvert.core.options import option


@dataclass(frozen=True)
class StatisticsOptions:
    """The choice of inputs, and the form of their statistics.

    Texts are cut to `length` tokens, `batch_tokens` of them at a time, `max_tokens` in all (0: everything). Inputs
    wider than `exact_width` keep a sketch of `rank` rows. Unfinished work is kept every `checkpoint_seconds`.
    """

    include: tuple[str, ...] = option((), "Only parameters whose name this pattern finds; repeatable.")
    exclude: tuple[str, ...] = option((), "No parameters whose name this pattern finds; repeatable.")
    length: int = option(512, "Tokens of a text, at most.", least=1)
    batch_tokens: int = option(4096, "Tokens at a time.", least=1)
    max_tokens: int = option(1 << 18, "Tokens in all; 0: everything.", least=0)
    exact_width: int = option(1024, "Inputs up to this width keep their whole moment, wider ones a sketch.", least=0)
    rank: int = option(256, "Rows of a sketch.", least=1)
    seed: int = option(0, "Seed of the sketches.")
    device: str = option("auto", "Where the model runs.", kind="device")
    checkpoint_seconds: float = 600.0
    overwrite: bool = False


@dataclass(frozen=True)
class CompareOptions:
    """The amount of data that adapters are compared on: texts of at most `length` tokens, `batch_tokens` at a time,
    `max_tokens` in all (0: everything)."""

    length: int = option(512, "Tokens of a text, at most.", least=1)
    max_tokens: int = option(1 << 15, "Tokens in all; 0: all.", least=0)
    device: str = option("auto", "Where the model runs.", kind="device")
    batch_tokens: int = 1024
