"""The verdict on a file that `compress` made: ship it or not, why, and what to try. Pure rules on what was measured.

docs/guides/choosing.md states them, with what they rest on. With answers the file must surely close most of the
distance between base and LoRA, on texts that chose nothing. Without, what it keeps of the weights must be as much as in
files whose answers were measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from lrconvert.convert.strength import FORMS
from lrconvert.core.errors import OptionError
from lrconvert.core.wording import spelled
from lrconvert.formats.fidelity import FEWEST, Fidelity, Interval, Scores

CLOSED = 0.95  # of the distance between base and LoRA: what the lower end of the interval must reach
KEPT = 0.8  # of the weights' energy, where no answers were measured
_CLOSED_BY_KEPT = 0.9  # of the distance, at least, by all files that kept as much and whose answers were measured
POINT = 0.01  # of accuracy, beyond which a loss that is no chance counts


@dataclass(frozen=True)
class Judged:
    """Answers with a file, on `texts` with `items` places that count.

    `kind` and `distance` are those of `lrconvert.formats.fidelity.Answers`; `closed` is the share of the base's
    distance that is gone. `loss` (nats) where texts have right answers, `accuracy` where these are classes. `is_fresh`:
    the texts chose nothing, else form and strength were chosen by them, too. `by_lora`: the LoRA wrote them itself.
    """

    kind: str
    texts: int
    items: int
    distance: Interval
    base_distance: Interval
    closed: Interval
    agreement: Interval | None = None
    base_agreement: Interval | None = None
    loss: Scores | None = None
    accuracy: Scores | None = None
    is_fresh: bool = True
    by_lora: bool = False


@dataclass(frozen=True)
class LossBound:
    """The most that may be lost: of the distance between base and LoRA (`left_open`), and of accuracy, a share of all
    texts."""

    left_open: float | None = None
    accuracy: float | None = None

    def check(self) -> None:
        """Raise E-OPTION for what is no share above 0, below 1."""
        for name, share in (("max_loss", self.left_open), ("max_accuracy_loss", self.accuracy)):
            if share is not None and not 0 < share < 1:
                what = f"{spelled(name)} is {share:g}; a share above 0, below 1, is allowed"
                raise OptionError(what, fix="write 5% or 0.05")

    def is_met(self, judged: Judged, *, surely: bool) -> bool:
        """Return whether what was measured is within the bound; `surely`: the whole interval."""
        if self.left_open is not None:
            closed = judged.closed.low if surely else judged.closed.value
            if not closed >= 1 - self.left_open:
                return False
        if self.accuracy is not None:
            change = None if judged.accuracy is None else judged.accuracy.change
            if change is None or not (change.low if surely else change.value) >= -self.accuracy:
                return False
        return True


@dataclass(frozen=True)
class Verdict:
    """A verdict: to `ship` a file or not, why, and what to try where it is not to be shipped."""

    ship: bool
    because: str
    advice: str = ""


def from_weights(method: str, fidelity: Fidelity) -> Verdict:
    """Return the verdict where only weights were compared."""
    kept = fidelity.captured
    if not any(target.energy for target in fidelity.targets):
        return Verdict(False, "the LoRA's update is zero, there is nothing to keep", "a LoRA that was trained")
    if method not in FORMS:
        what = f"what {method} keeps of the weights does not say how it answers"
        return Verdict(False, what, f"{_with_data()}, which measure that")
    shown = kept if kept >= KEPT else min(kept, KEPT - 0.001)  # 79.96 % is not shown as 80.0
    share = f"it keeps {shown:.1%} of the weights' energy"
    if kept >= KEPT:
        measured = f"files that kept as much closed over {_CLOSED_BY_KEPT:.0%} of the distance to the LoRA's answers"
        return Verdict(True, f"{share}, and where answers were measured, {measured}")
    why = f"{share}, and below {KEPT:.0%} only answers can tell how good it is"
    enough = f"{spelled('min_captured', KEPT)}, the smallest file that keeps so much"
    return Verdict(False, why, f"{enough}, or {_with_data()}, which measure and refine a small one")


def from_answers(judged: Judged, bound: LossBound | None, ratio: float) -> Verdict:
    """Return the verdict on answers, under the `bound` that was asked for, if any."""
    if judged.texts < FEWEST:
        few = f"{judged.texts} texts" if judged.texts > 1 else "1 text"
        return Verdict(False, f"{few} measured it, and fewer than {FEWEST} say too little", f"more {spelled('data')}")
    bigger, more, longer = _larger(ratio), f"more {spelled('data')}", spelled("steps", 300)
    if bound is not None:
        if bound.is_met(judged, surely=False):
            return Verdict(True, f"{_reached(judged)}, within what was asked for")
        return Verdict(
            False, f"{_reached(judged)}, short of what was asked for", f"{more}, or a smaller loss to aim at"
        )
    if judged.closed.high < CLOSED:
        return Verdict(False, f"{_reached(judged)}, and {CLOSED:.0%} is asked for", f"{bigger}, or {longer}")
    if judged.closed.low < CLOSED:
        why = f"{_reached(judged)}: too wide an interval to be sure of {CLOSED:.0%}"
        return Verdict(False, why, f"{more}, or {bigger}")
    if judged.accuracy is not None and judged.accuracy.change.high < 0 and judged.accuracy.change.value < -POINT:
        return Verdict(False, f"{_reached(judged)}, but accuracy is lost", f"{bigger}, or {longer}")
    return Verdict(True, _reached(judged))


def _reached(judged: Judged) -> str:
    """Return what a file reaches, as a clause."""
    closed = judged.closed
    interval = f"[{100 * closed.low:.1f}, {100 * closed.high:.1f}]"
    text = f"it closes {closed.value:.1%} {interval} of the distance to the LoRA's answers"
    if judged.accuracy is not None:
        change = judged.accuracy.change
        points = ", ".join(f"{100 * x:+.1f}" for x in (change.low, change.high))
        text += f", accuracy {100 * change.value:+.1f} points [{points}]"
    return text


def _with_data() -> str:
    return f"{spelled('base')} and {spelled('data')}"


def _larger(ratio: float) -> str:
    """Return the request of a file about twice as large."""
    half = ratio / 2
    return spelled("target_ratio", round(half) if half >= 3 else round(max(half, 1.0), 1))
