"""The files of the page, the measures of what they keep, and how the numbers are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lrconvert.core.errors import printable
from lrconvert.formats.fidelity import Fidelity, TargetFidelity


@dataclass(frozen=True)
class File:
    """One compared file: its number on the page from 1, its name, what was measured, the number of its colour, and the
    day it was written, if that is known."""

    number: int
    name: str
    kept: Fidelity
    colour: int = 0
    date: str = ""

    @property
    def closed(self) -> float | None:
        """The share of the distance to the LoRA's answers that is closed; None where answers were not measured."""
        answers = self.kept.answers
        return None if answers is None or not math.isfinite(answers.closed) else answers.closed

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of `closed`, where it was measured."""
        return None if self.closed is None or self.kept.answers is None else self.kept.answers.interval


@dataclass(frozen=True)
class Measure:
    """One way to say what was kept: `prefix` leads the names of the fields of `Fidelity` and `TargetFidelity`."""

    key: str
    prefix: str
    column: str
    title: str

    def of(self, kept: Fidelity | TargetFidelity) -> float | None:
        """Return the share that was captured; None where it was not measured, or is NaN or infinite."""
        value = getattr(kept, f"{self.prefix}captured")
        return None if value is None or not math.isfinite(value) else float(value)

    def pooled(self, targets: Sequence[TargetFidelity]) -> float | None:
        """Return the share of several targets together, summed as `Fidelity` sums them; None if none was measured."""
        pairs = [(getattr(t, f"{self.prefix}error"), getattr(t, f"{self.prefix}energy")) for t in targets]
        measured = [(error, energy) for error, energy in pairs if error is not None and energy is not None]
        if not measured or not all(math.isfinite(error + energy) for error, energy in measured):
            return None
        total = float(sum(energy for _, energy in measured))
        return 1.0 - float(sum(error for error, _ in measured)) / total if total else None


# From what says least of a model's answers to what says most.
MEASURES = (
    Measure("w", "", "captured", "in the weight norm"),
    Measure("o", "output_", "of outputs", "of the outputs, under the statistics"),
    Measure("d", "data_", "on the data", "of the outputs, on the data"),
)


def percent(value: float | None) -> str:
    """Return percent with two decimals, never a rounded 100: only what is lossless looks it. A dash without a value."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{min(100 * value, 99.99) if value < 1 else 100 * value:.2f}"


def tenths(value: float | None) -> str:
    """Return percent with one decimal and its sign, by the same rule, for sentences."""
    if value is None or not math.isfinite(value):
        return "-"
    percent = min(100 * value, 99.9) if value < 1 else 100 * value
    return f"{round(percent, 1) + 0.0:.1f} %"  # never -0.0


def brief(value: float | None) -> str:
    """Return percent for a narrow cell, by the same rule."""
    if value is None:
        return "-"
    if value < 0.99:
        return f"{100 * value:.0f}" if value > -9.995 else "<-999"
    return "100" if value >= 1 else f"{math.floor(1000 * value) / 10:.1f}"


def times(ratio: float) -> str:
    """Return a ratio of sizes in words."""
    return f"{ratio:.3g} times smaller" if ratio < 1000 else f"{ratio:,.0f} times smaller"


def short(raw: str, limit: int) -> str:
    """Return the start and the end of a name, for labels."""
    shown = printable(raw)
    return shown if len(shown) <= limit else f"{shown[: limit // 2 - 1]}…{shown[-(limit - limit // 2) :]}"
