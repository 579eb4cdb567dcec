"""Options of `extract`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lrconvert.core.errors import OptionError
from lrconvert.core.limits import MAX_RANK
from lrconvert.core.options import option
from lrconvert.core.wording import spelled

DEFAULT_RANK = 32

FactorDtype = Literal["F32", "F16", "BF16"]


@dataclass(frozen=True)
class ExtractOptions:
    """Options of an extraction.

    `rank` is the largest of a module; without anything else every module gets it. `min_captured` keeps the fewest
    numbers that hold this share of the difference's energy over all modules together. `target_size` bounds the file
    that is made: of a LoRA its factors, which then hold the most energy of all modules together in so many bytes; of a
    compact form all but its extra tensors. `target_ratio` is for compact forms: the LoRA at 16 bit over the file.
    `dtype` is that of the factors. `vocabulary` says what becomes of embeddings and heads with another number of rows
    than the base's: they are refused, or carried whole. `include` and `exclude` are regular expressions searched in the
    base's names: what they leave out stays as the base has it. `iterations` are the passes of the subspace iteration,
    each over the difference and its transpose, with `oversampling` vectors more than the rank.
    """

    rank: int | None = option(
        None, f"Largest rank of a module; default: {DEFAULT_RANK}, with --min-captured: whatever it takes.", least=1
    )
    min_captured: float | None = option(
        None, "Ranks that together keep this share of the difference's energy, as 90%.", kind="share"
    )
    target_size: int | None = option(
        None, "At most this many bytes: of the compact file, or of a LoRA's factors, as 50MB.", kind="size"
    )
    target_ratio: float | None = option(
        None, "Of a compact file: at least this many times smaller than the LoRA's factors at 16 bit."
    )
    dtype: FactorDtype = option("F32", "Of the factors.", choices=("F32", "F16", "BF16"))
    vocabulary: Literal["refuse", "whole"] = option(
        "refuse",
        "Embeddings and heads with other numbers of rows than the base's: refused, or carried whole.",
        choices=("refuse", "whole"),
    )
    include: tuple[str, ...] = option((), "Only tensors whose name this pattern finds; repeatable.")
    exclude: tuple[str, ...] = option((), "No tensors whose name this pattern finds: they stay the base's; repeatable.")
    dequantize: bool = option(False, "Take quantized models (FP8, MXFP4, NF4, GPTQ, AWQ...) as bf16.")
    iterations: int = option(2, "Passes of the subspace iteration; more are nearer to the best ranks.", least=1)
    oversampling: int = option(16, "Vectors of the subspace beyond the rank.", least=0)
    seed: int = option(0, "Seed of the first subspace.", least=0)

    def check(self) -> None:
        """Raise E-OPTION for values out of range, and for bounds that exclude each other."""
        if self.rank is not None and self.rank > MAX_RANK:
            raise OptionError(f"{spelled('rank')} is {self.rank}; at most {MAX_RANK} is allowed")
        if self.min_captured is not None and not 0 < self.min_captured <= 1:
            raise OptionError(f"{spelled('min_captured')} is {self.min_captured:g}; above 0, at most 1 is allowed")
        if self.target_size is not None and self.target_size <= 0:
            raise OptionError(f"{spelled('target_size')} is {self.target_size}; it must be above 0")

    def check_lora(self) -> None:
        """Raise E-OPTION for bounds that a LoRA cannot have, or not together."""
        if self.target_ratio is not None:
            what = f"{spelled('target_ratio')} is of a compact form, and a LoRA is made"
            fix = f"name a form with {spelled('method', ...)}, or bound the LoRA with {spelled('target_size')}"
            raise OptionError(what, fix=fix)
        if self.min_captured is not None and self.target_size is not None:
            names = f"{spelled('min_captured')} and {spelled('target_size')}"
            raise OptionError(f"{names} exclude each other for a LoRA", fix="give one of them")

    @property
    def most(self) -> int | None:
        """The largest rank of a module, None if a share decides."""
        return DEFAULT_RANK if self.rank is None and self.min_captured is None else self.rank
