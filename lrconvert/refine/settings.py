"""What a user may ask of a refinement."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lrconvert.core.errors import OptionError

AUTOCASTS = ("auto", "off", "bf16")


@dataclass(frozen=True)
class Settings:
    """`steps` of the end-to-end stage, or as many as `minutes` allow. A step reads `accumulate` batches of at most
    `batch_tokens` tokens, from texts of at most `length`; `max_tokens` of data in all (0: everything).

    The loss: KL at `temperature`, plus `hidden` times the error of hidden states, plus `task_loss` times the task's own
    loss. `lr` multiplies all rates. `layerwise` and `end_to_end` are the two stages. Every `eval_every` steps the
    answers on held-out data are measured; after `patience` times without a gain (0: never) the work ends.
    `own_tokens`: how much a decoder writes that is given no data. `checkpoint_every`: steps between checkpoints.
    """

    steps: int = 300
    minutes: float | None = None
    length: int = 512
    batch_tokens: int = 1024
    accumulate: int = 1
    max_tokens: int = 0
    own_tokens: int = 1 << 16
    temperature: float = 1.0
    hidden: float = 1.0
    task_loss: float = 0.0
    layerwise: bool = True
    end_to_end: bool = True
    lr: float = 1.0
    seed: int = 0
    autocast: str = "auto"
    gradient_checkpointing: bool = False
    eval_every: int = 50
    patience: int = 0
    checkpoint_every: int = 100
    train_heads: bool = False

    def check(self) -> None:
        """Raises E-OPTION for what cannot be."""
        least = {
            "steps": 1, "length": 2, "batch_tokens": 1, "accumulate": 1, "max_tokens": 0, "own_tokens": 1,
            "eval_every": 1, "patience": 0, "checkpoint_every": 1, "hidden": 0, "task_loss": 0,
        }  # fmt: skip
        for name, bound in least.items():
            value = getattr(self, name)
            if not bound <= value < math.inf:
                raise OptionError(f"--{name.replace('_', '-')} is {value}; it must be at least {bound}")
        for name in ("temperature", "lr", "minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise OptionError(f"--{name} is {value}; it must be above 0")
        if not self.layerwise and not self.end_to_end:
            raise OptionError("without both stages nothing is refined")
        if self.autocast not in AUTOCASTS:
            raise OptionError(f"--autocast is {self.autocast!r:.20}; {', '.join(AUTOCASTS)} are allowed")
