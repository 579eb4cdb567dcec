"""Options of a refinement."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from lrconvert.core.errors import OptionError
from lrconvert.core.options import make, option
from lrconvert.core.wording import spelled

AUTOCASTS = ("auto", "off", "bf16")


@dataclass(frozen=True)
class Settings:
    """`steps` of the end-to-end stage, or as many as `minutes` allow. A step reads `accumulate` batches of at most
    `batch_tokens` tokens, from texts of at most `length`; `max_tokens` of data in all (0: everything).

    The loss: KL at `temperature`, plus `hidden` times the error of hidden states, plus `task_loss` times the task's own
    loss. `lr` multiplies all rates; without it the first of 100 steps or more try what is best (`learning_rate`).
    `layerwise` and `end_to_end` are the two stages. Every `eval_every` steps the answers on held-out data are measured;
    after `patience` times without a gain (0: never) the work ends.
    `answers_gb`: how much memory the teacher's answers take, which are kept for when their texts come again.
    `own_tokens`: how much a decoder writes that is given no data. `checkpoint_every`: steps between checkpoints.
    """

    steps: int = option(300, "Steps of the end-to-end stage.", least=1)
    minutes: float | None = option(None, "Stop after that long, rates falling in time.")
    length: int = option(512, "Tokens of a text, at most.", least=2)
    batch_tokens: int = option(1024, "Tokens of a batch.", least=1)
    accumulate: int = option(1, "Batches of a step.", least=1)
    max_tokens: int = option(0, "Tokens of --data in all; 0: everything.", least=0)
    own_tokens: int = option(1 << 16, "Tokens that the teacher writes without --data.", least=1)
    temperature: float = option(1.0, "Temperature of the answers that are compared.")
    hidden: float = option(1.0, "Weight of the error of hidden states beside the KL.", least=0)
    task_loss: float = option(0.0, "Weight of the task's own loss, where data has labels.", least=0)
    layerwise: bool = option(True, "Leave out the fit layer by layer.", flag="--no-layerwise")
    end_to_end: bool = option(True, "Leave out the training end to end.", flag="--no-end-to-end")
    lr: float | None = option(None, "Multiplies all learning rates; without it the first steps try 1, 0.4 and 0.16.")
    seed: int = option(0, "Seed of the split, the order of texts, and of texts that are written.")
    autocast: str = option("auto", "Compute in bf16; auto: on CUDA.", choices=AUTOCASTS)
    gradient_checkpointing: bool = option(False, "Less memory, a third more time.")
    eval_every: int = option(50, "Steps between measurements on held-out data.", least=1)
    patience: int = option(0, "Stop after so many measurements without a gain; 0: never.", least=0)
    checkpoint_every: int = option(100, "Steps between checkpoints.", least=1)
    train_heads: bool = option(False, "Train the heads that FILE carries, too.")
    answers_gb: float = option(1.0, "GB of memory for the teacher's answers to texts that come again.", least=0)

    def check(self) -> None:
        """Raise E-OPTION for what cannot be."""
        make(Settings, vars(self), "refine")
        for name in ("temperature", "lr", "minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise OptionError(f"{spelled(name)} is {value}; it must be above 0")
        if not self.layerwise and not self.end_to_end:
            raise OptionError("without both stages nothing is refined")


@dataclass(frozen=True)
class RunOptions:
    """The device of a refinement, its log of JSON lines, and what it does with work that was broken off; `load_in_4bit`
    quantizes the base to NF4 (bitsandbytes, CUDA)."""

    device: str = option("auto", "Where the model runs.", kind="device")
    resume: bool = option(False, "Go on with a refinement that was broken off.")
    log: Path | None = option(None, "Append what happens to this file, a JSON object a line.", kind="path")
    load_in_4bit: bool = option(False, "Quantize the base to NF4 (needs bitsandbytes).")
    overwrite: bool = False
