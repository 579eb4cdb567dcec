"""The verdict at the head of the page: the file to take, and why, by the bounds of `compress`'s own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lrconvert.convert.verdict import CLOSED, KEPT
from lrconvert.report.html.measures import File, tenths, times
from lrconvert.report.tables import count_bytes

_LITTLE = 1.1  # times as large is no reason to take the worse of two


@dataclass(frozen=True)
class Verdict:
    """A verdict: ship the file or not, why, and what to try otherwise; all of it sentences."""

    file: File
    ship: bool
    because: tuple[str, ...]
    advice: str = ""


def verdict(files: Sequence[File]) -> Verdict | None:
    """Return the verdict on the best of the files: by answers if any were measured, else by weights; None of none."""
    answered = [f for f in files if f.closed is not None]
    if answered:
        return _by_answers(answered)
    return _by_weights(files) if files else None


def _by_answers(files: Sequence[File]) -> Verdict:
    """The smallest file that surely closes enough, or a better one of about its size; else the one that closes most."""
    enough = [f for f in files if _low(f) >= CLOSED]
    best = max(_smallest(enough) or files, key=_low)
    answers = best.kept.answers
    assert answers is not None
    interval = f" ({tenths(best.interval[0])} to {tenths(best.interval[1])})" if best.interval else ""
    what = "KL distance" if answers.kind == "KL" else "distance"
    closed = f"It closes {tenths(best.closed)}{interval} of the {what} between the answers of the base and the LoRA."
    agreed = (
        f"Its first choice is the LoRA's in {tenths(answers.agreement)} of {answers.items:,} places; "
        f"the base's is in {tenths(answers.base_agreement)}."
        if answers.agreement is not None
        else f"{answers.items:,} places were compared."
    )
    because = (_size(best), closed, agreed)
    if enough:
        return Verdict(best, True, because)
    bigger = f"a larger file (--target-ratio {max(best.kept.ratio / 2, 1):.0f})"
    if not best.kept.is_refined:
        return Verdict(best, False, because, f"Train it with lrconvert refine, or make {bigger}.")
    return Verdict(best, False, because, f"Refine it for more steps or on more data, or make {bigger}.")


def _by_weights(files: Sequence[File]) -> Verdict:
    enough = [f for f in files if f.kept.captured >= KEPT]
    best = max(_smallest(enough) or files, key=lambda f: f.kept.captured)
    kept = f"It keeps {tenths(best.kept.captured)} of the energy of the weights. Answers were not measured."
    return Verdict(best, bool(enough), (_size(best), kept), "Measure the answers: --base with --data.")


def _smallest(files: Sequence[File]) -> list[File]:
    """The smallest of the files, and those that are little larger."""
    most = _LITTLE * min((f.kept.adapter_bytes for f in files), default=0)
    return [f for f in files if f.kept.adapter_bytes <= most]


def _low(file: File) -> float:
    """Return the share that a file closes at least, as far as one knows."""
    assert file.closed is not None
    return file.closed if file.interval is None else file.interval[0]


def _size(file: File) -> str:
    kept = file.kept
    return f"{count_bytes(kept.adapter_bytes)} instead of {count_bytes(kept.source_bytes)}, {times(kept.ratio)}."
