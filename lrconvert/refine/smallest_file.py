"""The smallest file whose answers lose no more than a bound: bisection over size, measured on held-out texts.

All forms are fitted once, at the size that the search starts from, and the one with the nearest answers goes on. At
every size it is fitted anew, at the strength that brings its answers nearest. A size does if the whole 95 % interval of
what it loses is within the bound: the search picks by these texts, and a mean that just meets it would not hold on
others.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from lrconvert.convert.compress import Candidate, Compression
from lrconvert.convert.verdict import Judged, LossBound
from lrconvert.core.errors import BudgetError, DataError
from lrconvert.core.wording import spelled
from lrconvert.formats.fidelity import Answers, Interval
from lrconvert.refine import judging
from lrconvert.refine.kept_work import KeptWork
from lrconvert.refine.session import Progress, RefineSession

_FINE = 1.05  # between the smallest size that does and the largest that does not
PIECES = "search, "  # begins the names of what is kept
_TRIALS = 12  # about as many sizes are tried, for the progress

Sized = Callable[[Candidate, int], Candidate]


@dataclass(frozen=True)
class _Trial:
    candidate: Candidate
    judged: Judged


@dataclass(frozen=True, eq=False)
class Search:
    """A search under `bound`; `sized` fits a form to a size. It ends at the time `end` with what it has; what it has
    tried is kept in `work`."""

    session: RefineSession
    bound: LossBound
    batch_tokens: int
    sized: Sized
    end: float
    work: KeptWork = field(default_factory=KeptWork)

    def run(self, fitted: Compression, most: int, progress: Progress) -> Compression:
        """Return `fitted` with the smallest file in the place of its form, the winner. `most` is the largest size.

        Raises E-BUDGET, naming the least loss that was reached, if nothing is within the bound; E-DATA for a bound on
        accuracy where no text has a class."""
        made = {n: c for n, c in enumerate(fitted.candidates) if c.conversion is not None}
        first = {n: self._kept(f"at first {n}", partial(self._measured, candidate)) for n, candidate in made.items()}
        trials = {n: trial for n, trial in first.items() if trial is not None}
        winner = max(trials, key=lambda n: self._worth(trials[n]))
        if self.bound.accuracy is not None and trials[winner].judged.accuracy is None:
            raise DataError(
                "accuracy needs texts with classes that the model knows",
                fix="give `text` and `label`, or ask for another loss",
            )
        count = 0

        def at(nbytes: int) -> _Trial | None:
            nonlocal count
            count += 1
            progress(min(0.95, count / _TRIALS), f"{fitted.candidates[winner].method} at {nbytes:,} bytes")

            def trial() -> _Trial | None:
                candidate = self.sized(fitted.candidates[winner], nbytes)
                return None if candidate.conversion is None else self._measured(candidate)

            return self._kept(f"size {nbytes}", trial)

        best = self._smallest(trials[winner], at, most)
        candidates = list(fitted.candidates)
        answers = _answers(best.judged)
        candidates[winner] = replace(best.candidate, before=answers, after=answers)
        for n, trial in trials.items():
            if n != winner:
                answers = _answers(trial.judged)
                candidates[n] = replace(trial.candidate, before=answers, after=answers)
        over = f"smaller sizes (the time was over; more with {spelled('budget_minutes')})"
        late = (over,) if time.monotonic() >= self.end else ()
        return replace(fitted, candidates=tuple(candidates), winner=winner, left_out=(*fitted.left_out, *late))

    def _smallest(self, start: _Trial, at: Callable[[int], _Trial | None], most: int) -> _Trial:
        """Bracket the size from `start`, then bisect its logarithm."""
        best, floor, tried = (start, 0, [start]) if self._does(start) else (None, start.candidate.nbytes, [start])
        while best is None:  # larger, until it does
            size = min(2 * floor, most)
            trial = at(size) if floor < most and time.monotonic() < self.end else None
            if trial is None or trial.candidate.nbytes <= floor:
                raise self._impossible(tried)
            tried.append(trial)
            if self._does(trial):
                best = trial
            else:
                floor = trial.candidate.nbytes
        while not floor and time.monotonic() < self.end:  # smaller, until it does not
            half = best.candidate.nbytes // 2
            trial = at(half)
            if trial is not None and self._does(trial):
                best = trial
            else:
                floor = half
        while floor and best.candidate.nbytes > _FINE * floor and time.monotonic() < self.end:
            middle = int((floor * best.candidate.nbytes) ** 0.5)
            trial = at(middle)
            if trial is not None and self._does(trial):
                best = trial
            else:
                floor = middle
        return best

    def _kept(self, name: str, compute: Callable[[], _Trial | None]) -> _Trial | None:
        """A trial as it is kept, or as it is computed."""

        def pair() -> tuple[Candidate, Judged] | None:
            trial = compute()
            return None if trial is None else (trial.candidate, trial.judged)

        kept = self.work.piece(f"{PIECES}{name}", pair)
        return None if kept is None else _Trial(*kept)

    def _measured(self, candidate: Candidate) -> _Trial:
        assert candidate.conversion is not None
        pool = self.session.split.held_out
        judged = judging.judge(self.session, pool, candidate.conversion.compact, self.batch_tokens, is_fresh=False)
        return _Trial(candidate, judged)

    def _does(self, trial: _Trial) -> bool:
        return self.bound.is_met(trial.judged, surely=True)

    def _worth(self, trial: _Trial) -> float:
        """The measure that ranks trials: accuracy where only that is bounded, else what is closed."""
        judged = trial.judged
        if self.bound.left_open is None and judged.accuracy is not None:
            return judged.accuracy.change.value
        return judged.closed.value

    def _impossible(self, tried: list[_Trial]) -> BudgetError:
        best = max(tried, key=self._worth)
        judged, reached = best.judged, []
        if self.bound.left_open is not None:
            still_open = Interval(1 - judged.closed.value, 1 - judged.closed.high, 1 - judged.closed.low)
            reached.append(f"leaves {_percent(still_open)} of the {judged.kind} open")
        if self.bound.accuracy is not None and judged.accuracy is not None:
            change = judged.accuracy.change
            reached.append(f"loses {_percent(Interval(-change.value, -change.high, -change.low))} of accuracy")
        what = f"no size is surely within the bound; {best.candidate.method} {' and '.join(reached)} at "
        return BudgetError(
            f"{what}{best.candidate.nbytes:,} bytes, the least",
            fix="allow more, or give more data: the whole interval has to be within it",
        )


def _percent(share: Interval) -> str:
    return f"{share.value:.1%} ({share.low:.1%} to {share.high:.1%})"


def _answers(judged: Judged) -> Answers:
    agreement, base_agreement = (None if x is None else x.value for x in (judged.agreement, judged.base_agreement))
    return Answers(
        judged.kind,
        judged.items,
        judged.distance.value,
        judged.base_distance.value,
        agreement,
        base_agreement,
        interval=(judged.closed.low, judged.closed.high),
    )
