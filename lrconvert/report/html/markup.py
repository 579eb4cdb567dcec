"""Words, numbers and tables as HTML, and what the sections of the page have in common."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from lrconvert.core.errors import printable
from lrconvert.formats.fidelity import Fidelity, TargetFidelity


@dataclass(frozen=True)
class File:
    """One compared file: its number on the page from 1, its name, and what was measured."""

    number: int
    name: str
    kept: Fidelity


@dataclass(frozen=True)
class Measure:
    """One way to say what was kept: `prefix` leads the names of the fields of `Fidelity` and `TargetFidelity`."""

    key: str
    prefix: str
    column: str
    title: str

    def of(self, kept: Fidelity | TargetFidelity) -> float | None:
        """What was captured; None where it was not measured, or is no number."""
        value = getattr(kept, f"{self.prefix}captured")
        return None if value is None or not math.isfinite(value) else float(value)

    def pooled(self, targets: Sequence[TargetFidelity]) -> float | None:
        """Of several targets together, summed as `Fidelity` sums them; None where none of them was measured."""
        pairs = [(getattr(t, f"{self.prefix}error"), getattr(t, f"{self.prefix}energy")) for t in targets]
        known = [(float(error), float(energy)) for error, energy in pairs if error is not None and energy is not None]
        if not known or not all(math.isfinite(error + energy) for error, energy in known):
            return None
        energy = sum(energy for _, energy in known)
        return 1.0 - sum(error for error, _ in known) / energy if energy else 1.0


# From what says least of a model's answers to what says most.
MEASURES = (
    Measure("w", "", "captured", "in the weight norm"),
    Measure("o", "output_", "of outputs", "of the outputs, under the statistics"),
    Measure("d", "data_", "on the data", "of the outputs, on the data"),
)


def best_measure(measures: Sequence[Measure]) -> Measure:
    """The one nearest to what a model answers."""
    return measures[-1] if measures else MEASURES[0]


# --- words and numbers ----------------------------------------------------------------------------------------------


def text(raw: str, limit: int = 300) -> str:
    return escape(printable(raw, limit))


def name(raw: str) -> str:
    """A name in running text: its direction of writing does not reorder what stands beside it."""
    return f"<bdi>{text(raw)}</bdi>"


def short(raw: str, limit: int) -> str:
    """The start and the end of a name, for labels. Not escaped yet."""
    shown = printable(raw)
    return shown if len(shown) <= limit else f"{shown[: limit // 2 - 1]}…{shown[-(limit - limit // 2) :]}"


def row_name(file: File) -> str:
    return f"{file.number}. {name(file.name)}"


def percent(value: float | None) -> str:
    """Two decimals, and never a rounded 100: what is not lossless does not look it. A dash for what is not known."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{min(100 * value, 99.99) if value < 1 else 100 * value:.2f}"


def brief(value: float | None) -> str:
    """Percent for a narrow cell, with the same rule."""
    if value is None:
        return "-"
    if value < 0.99:
        return f"{100 * value:.0f}" if value > -9.995 else "&lt;-999"
    return "100" if value >= 1 else f"{math.floor(1000 * value) / 10:.1f}"


def times(ratio: float) -> str:
    return f"{ratio:.3g} times smaller" if ratio < 1000 else f"{ratio:,.0f} times smaller"


# --- blocks ---------------------------------------------------------------------------------------------------------


def section(title: str, parts: Iterable[str]) -> str:
    return "\n".join([f"<section><h2>{title}</h2>", *parts, "</section>"])


def scrolling(label: str, lines: Iterable[str]) -> str:
    """What may be wider than a phone scrolls by itself, with the keyboard too. `label` is plain text, not escaped."""
    return "\n".join(
        [f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0">', *lines, "</div>"]
    )


def table(label: str, caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A table of cells that are HTML already; the first heads its row, the first `words` columns hold words."""
    classes = [' class="word"' if n < words else "" for n in range(len(head))]
    cells = "".join(f'<th scope="col"{c}>{cell}</th>' for c, cell in zip(classes, head, strict=True))
    lines = [f"<table><caption>{caption}</caption>", f"<thead><tr>{cells}</tr></thead><tbody>"]
    for row in rows:
        cells = "".join(f"<td{c}>{cell}</td>" for c, cell in zip(classes[1:], row[1:], strict=True))
        lines.append(f'<tr><th scope="row" class="word">{row[0]}</th>{cells}</tr>')
    return scrolling(label, [*lines, "</tbody></table>"])
