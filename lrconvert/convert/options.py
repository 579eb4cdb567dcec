"""Options of the ways from a LoRA to a compact form: one declaration for `convert`, `compress`, `allocate`, their
batches and their commands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from lrconvert.convert.verdict import LossBound
from lrconvert.core.devices import resolved
from lrconvert.core.options import option
from lrconvert.io import hub
from lrconvert.lora import statistics_file
from lrconvert.lora.input_statistics import InputStatistics

ExtraDtype = Literal["F32", "F16", "BF16"]
Data = str | PathLike[str] | Sequence[str | PathLike[str]] | Iterable[Mapping[str, Any]]
RANKINGS = ("auto", "answers", "fit")
ROUNDS, EXACT = 8, 16


@dataclass(frozen=True)
class ConvertOptions:
    """Options of every conversion.

    `target_size` (bytes) or `target_ratio` (factors at 16 bit over the file's bytes) bound the file without its extra
    tensors. `include` and `exclude` are regular expressions searched in target names. `base` (a folder) settles the
    orientation of square weights and adds the digest of its contents. `statistics` make the fit minimize the mean
    squared error of the layers' outputs, not of their weights; targets that they lack are fitted in the plain norm.
    `strength` is what the updates are multiplied with before the fit: a small file leaves much of them out, and what it
    keeps answers nearer to the LoRA when it is larger than the nearest fit makes it, which `captured` does not show;
    without one it is 1, and `compress` chooses.
    `bake_dora` turns DoRA's magnitudes, which are carried along otherwise, into plain updates of that rank; it needs
    `base`. `device` is a torch device name; auto is CUDA where there is a GPU.
    """

    target_size: int | None = option(None, "At most this many bytes without extra tensors, e.g. 200KB.", kind="size")
    target_ratio: float | None = option(None, "At least this many times smaller than the factors at 16 bit.")
    include: tuple[str, ...] = option((), "Only targets whose name this pattern finds; repeatable.")
    exclude: tuple[str, ...] = option((), "No targets whose name this pattern finds; repeatable.")
    base: Path | None = option(
        None, "Base model folder or hub id: settles orientations, records its digest.", kind="path"
    )
    statistics: Path | InputStatistics | None = option(
        None,
        "Input statistics of the base (see `statistics`): the fit then minimizes the error of outputs.",
        kind="path",
    )
    strength: float | None = option(
        None,
        "Multiply the updates with this before the fit; above 1 makes up for what a small file leaves out. "
        "Default: 1; compress chooses one.",
        least=0,
    )
    bake_dora: int | None = option(
        None, "Turn DoRA's magnitudes into plain updates of this rank (needs --base); default: carried along.", least=1
    )
    extra_dtype: ExtraDtype | None = option(
        None,
        "Narrow extra tensors (heads) to this dtype; carried byte for byte otherwise.",
        choices=("F32", "F16", "BF16"),
    )
    seed: int = option(0, "Seed of the fit.")
    device: str = option("auto", "Where the fit computes.", kind="device")

    def resolved(self) -> ConvertOptions:
        """Return the options with the base found, in the local cache if it is named by a hub id, and the statistics
        opened. Raises E-BASE, E-IO-*, E-STATS."""
        base = None if self.base is None else hub.locate(self.base)
        given = self.statistics
        statistics = statistics_file.read(Path(given)) if isinstance(given, (str, PathLike)) else given
        return replace(
            self,
            base=base,
            statistics=statistics,
            include=tuple(self.include),
            exclude=tuple(self.exclude),
            device=resolved(self.device),
        )

    @property
    def input_statistics(self) -> InputStatistics | None:
        """The statistics of `resolved` options."""
        assert not isinstance(self.statistics, PathLike)
        return self.statistics


@dataclass(frozen=True)
class CompressOptions:
    """Options of `compress`: the request to the winner, and the ranking.

    `min_captured` asks for the smallest file that keeps this share: of the outputs' energy under statistics, else of
    the weights'. `max_loss` asks for the smallest that leaves at most this share of the distance between base and LoRA
    open, `max_accuracy_loss` for one that loses at most this share of all texts in accuracy; on held-out data, with the
    whole 95 % interval. `forms` are the ids of the methods to try; all that join `compress` without. `data` (files as
    in `refine`) and the budgets are for ranking by answers, and `resume` goes on with one that was broken off.
    """

    min_captured: float | None = option(
        None, "The smallest file that keeps this share: of outputs with --statistics, else of weights."
    )
    max_loss: float | None = option(
        None,
        "With --base: the smallest file that leaves at most this share of the KL between base and LoRA open, e.g. 5%.",
        kind="share",
    )
    max_accuracy_loss: float | None = option(
        None, "With --base and labelled --data: at most this much accuracy lost, e.g. 1% of all texts.", kind="share"
    )
    forms: tuple[str, ...] = ()
    data: tuple[Path, ...] | None = option(
        None,
        "Texts that rank the forms and refine the winner (see `refine`); without, a decoder writes its own.",
        kind="paths",
    )
    rank_by: str = option(
        "auto",
        "What the model answers after a short refinement, or what fits keep; auto: answers, with --base.",
        choices=RANKINGS,
    )
    budget_minutes: float | None = option(
        None,
        "Time for ranking by answers, instead of steps that take at most 30; without a base for all fits, else 1.",
    )
    steps: int = option(0, "Refine the winner by so many more.", least=0)
    length: int = option(512, "Tokens of a text.", least=2)
    batch_tokens: int = option(1024, "Tokens of a batch.", least=1)
    max_tokens: int = option(0, "Tokens of --data; 0: all.", least=0)
    resume: bool = option(False, "With --base: go on with what was broken off, kept beside the output.")

    @property
    def loss_bound(self) -> LossBound | None:
        """The bound on what answers may lose; None if there is none."""
        is_bounded = self.max_loss is not None or self.max_accuracy_loss is not None
        return LossBound(self.max_loss, self.max_accuracy_loss) if is_bounded else None


@dataclass(frozen=True)
class AllocateOptions:
    """Options of `allocate` (ALoRA): one budget of `total_rank` components, or the size or ratio of the conversion.

    With a base and `data` (files, or batches of model inputs) components are scored by ablation, in `rounds` of
    pruning; in each the `exact` components next to the cut are ablated, two forward passes each. `budget_minutes` bound
    that: where they are too few, fewer texts and components are measured, and a warning says so."""

    total_rank: int | None = option(None, "Keep this many components over all modules.", least=1)
    bits: float | None = option(None, "With --total-rank: average bits per number, as in `lora-to-lowrank`.", least=0)
    data: Data | None = option(
        None, "With --base: score by ablation on held-out texts instead of by energy.", kind="paths"
    )
    length: int = option(512, "Tokens of a text, at most.", least=1)
    max_tokens: int = option(1 << 13, "Tokens of --data in all; 0: all.", least=0)
    rounds: int = option(ROUNDS, "Rounds of pruning on data.", least=1)
    exact: int = option(
        EXACT, "Components next to the cut that are ablated in each round, two forward passes each.", least=0
    )
    budget_minutes: float = option(10.0, "With --data: the most that scoring may take.")
    batch_tokens: int = 1024
