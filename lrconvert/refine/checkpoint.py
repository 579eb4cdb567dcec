"""Checkpoints of refinements: all that the next step depends on, in the container of every other file, without
pickles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lrconvert.core.dtypes import Array
from lrconvert.core.errors import StatisticsError
from lrconvert.lora import statistics_file

KEY = "lrconvert-refinement-partial"
VERSION = 2  # of what is in a checkpoint: 1 knew no probe and no points to return to
_DTYPES = {"float32": "F32", "float64": "F64", "int64": "I64", "int32": "I32", "uint32": "U32", "uint8": "U8"}


@dataclass
class State:
    """The state of a refinement: steps done, the next batch (epoch and place in it), seconds spent, into how many parts
    a batch is cut, what all default rates are multiplied with, how often it diverged and was restarted from the best,
    steps in a row with a loss or gradient that is NaN or infinite, evaluations without a gain; the best so far: its
    step, distance and agreement, and steps of the optimizer now and then; the branch of the probe (0: none), at which
    share of the work it or the schedule began; whether the start was the outcome of stage one. The names are those of
    a checkpoint."""

    step: int = 0
    epoch: int = 0
    place: int = 0
    seconds: float = 0.0
    parts: int = 1
    rate: float = 1.0
    restarts: int = 0
    bad: int = 0
    waited: int = 0
    best_step: int = 0
    best_distance: float = 0.0
    best_agreed: int = 0
    adam_steps: int = 0
    kept_adam_steps: int = 0
    branch: int = 0
    begun: float = 0.0
    layerwise: int = 0
    arrays: dict[str, Array] = field(default_factory=dict, repr=False)  # points, the best payload


class Store(Protocol):
    """The place of the states of one refinement, which `about` identifies."""

    def read(self, about: Mapping[str, Any]) -> State | None:
        """Return the last state, None if there is none. Raises E-STATS if it is of another run."""

    def write(self, about: Mapping[str, Any], state: State) -> None:
        """Keep a state in the place of the last one."""


@dataclass(frozen=True)
class FileStore:
    """States in a file of their own; without `resume` one that is there is not read."""

    path: Path
    resume: bool

    def read(self, about: Mapping[str, Any]) -> State | None:
        """Return the state in the file. Raises E-STATS, and what a damaged file raises."""
        return read(self.path, about) if self.resume and self.path.exists() else None

    def write(self, about: Mapping[str, Any], state: State) -> None:
        """Write the file anew. Raises E-IO-*."""
        write(self.path, about, state)


def write(path: Path, about: Mapping[str, Any], state: State) -> None:
    """Write `state`, atomically, over an earlier one; `about` identifies the run. Raises E-IO-*."""
    scalars = {k: v.hex() if isinstance(v, float) else v for k, v in vars(state).items() if k != "arrays"}
    shapes = {name: list(array.shape) for name, array in state.arrays.items()}
    flat = [(name, _DTYPES[array.dtype.name], array.reshape(-1)) for name, array in state.arrays.items()]
    fields = {"refinement": VERSION, "about": dict(about), "state": scalars, "shapes": shapes}
    statistics_file.write_partial(path, fields, flat, key=KEY)


def read(path: Path, about: Mapping[str, Any]) -> State:
    """Return the state that `write` wrote. Raises E-STATS if it is of another run, and what a damaged file raises."""
    fields, flat = statistics_file.read_partial(path, key=KEY)
    if fields.get("refinement") != VERSION:
        raise StatisticsError(
            "this checkpoint was written by another version of lrconvert",
            fix="finish it with that one, or remove it to start anew",
            path=path,
        )
    if fields.get("about") != dict(about):
        raise StatisticsError(
            "this checkpoint is of another file, teacher, base, data or other options",
            fix="give what it was begun with, or remove it to start anew",
            path=path,
        )
    try:
        state = State()
        for name, value in [(k, v) for k, v in vars(state).items() if k != "arrays"]:
            stored = fields["state"][name]
            setattr(state, name, float.fromhex(stored) if isinstance(value, float) else int(stored))
        state.arrays = {name: np.array(flat[name]).reshape(shape) for name, shape in fields["shapes"].items()}
    except (KeyError, TypeError, ValueError):
        raise StatisticsError("this checkpoint is not complete", fix="remove it", path=path) from None
    return state
