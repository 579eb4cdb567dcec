"""Ranking forms by what the model answers: all are refined a little, equally, and the better half goes on.

Successive halving (arXiv 1502.07943): a fit alone says little of what refinement makes of a form, and to refine every
form to its end costs several times what finding the best one does. All forms see the same texts in the same order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from lrconvert.convert.compress import Candidate, Compression, Keep
from lrconvert.convert.verdict import LossBound
from lrconvert.core.errors import OptionError
from lrconvert.core.notices import Notice
from lrconvert.core.wording import spelled
from lrconvert.formats import fidelity
from lrconvert.formats.lrc import file
from lrconvert.lora.adapter import LoraAdapter
from lrconvert.lora.input_statistics import InputStatistics
from lrconvert.refine import answered_fits, judging, layerwise, smallest_file, time_limits
from lrconvert.refine.checkpoint import State
from lrconvert.refine.kept_work import KeptWork, UnderWay
from lrconvert.refine.refine import note_warnings, with_provenance
from lrconvert.refine.run import RefineResult, RefineRun
from lrconvert.refine.self_generated_data import OwnTexts
from lrconvert.refine.session import Progress, RefineSession, open_session, part
from lrconvert.refine.settings import RunOptions, Settings

STEPS = 32  # of the first round; every further one has twice as many
MINUTES = 30.0  # for the rounds at most, where no minutes are given
_OFTEN = 8  # steps between states of a training that may be kept
_MORE = 8  # times as many steps at most where minutes decide
_OPENING, _FITS, _ANSWERS, _ROUNDS = 0.08, 0.12, 0.22, 0.97  # of the progress: what is behind then

Fit = Callable[[LoraAdapter, InputStatistics | None, Progress, Keep], Compression]
# One form anew, at a strength, and of a size where one is given.
Refit = Callable[[LoraAdapter, InputStatistics | None, Candidate, float, int | None], Candidate]


@dataclass(frozen=True)
class Fits:
    """The ways to fit all forms, and `one` anew; `statistics`: those that were given."""

    every: Fit
    one: Refit
    statistics: InputStatistics | None


@dataclass(frozen=True)
class Rules:
    """`minutes` for the rounds, or as many steps as stated, if they take no longer than `MINUTES`; `steps` of
    refinement for the winner afterwards. With a `bound` the winner is the smallest file that keeps it."""

    minutes: float | None = None
    steps: int = 0
    device: str = "cpu"
    bound: LossBound | None = None

    def check(self) -> None:
        """Raise E-OPTION for numbers that make no sense."""
        if self.minutes is not None and not 0 < self.minutes < float("inf"):
            raise OptionError(f"{spelled('budget_minutes')} is {self.minutes}; it must be above 0")
        if self.steps < 0:
            raise OptionError(f"{spelled('steps')} is {self.steps}; it must be at least 0")


def compress(
    lora: LoraAdapter,
    fits: Fits,
    base: Path,
    data: object,
    settings: Settings,
    rules: Rules,
    *,
    work: KeptWork,
    progress: Progress,
) -> Compression:
    """Fit all forms, under the statistics given or those of the LoRA's own inputs on `data` and without any, whichever
    brings answers nearer, at the strength that does, and rank them by what the model answers with them; see
    `lrconvert.api.compress`. The winner is refined, and says so; its answers are measured on texts that were set aside
    before. What takes long is kept in `work`."""
    rules.check()
    settings.check()
    opening, fitting = part(progress, 0.0, _OPENING), part(progress, _OPENING, _FITS)
    minutes, bound = rules.minutes or MINUTES, "sizes are searched" if rules.bound else "forms are ranked by answers"
    progress(0.0, Notice(f"{bound} for at most {minutes:g} minutes ({spelled('budget_minutes')})"))
    given = OwnTexts(partial(work.piece, "texts"), work.under_way("texts")) if data is None else data
    with open_session(base, lora, given, settings, RunOptions(device=rules.device), progress=opening) as whole:
        work.check("data", whole.split.digest)
        session, fresh = judging.set_aside(whole, settings.seed)
        fitting(0.0, "inputs of the layers")
        inputs = fits.statistics or layerwise.teacher_statistics(session, lora, settings)
        keep: list[Keep] = [lambda name, fit: work.piece(f"outputs {name}", fit)]
        keep.append(lambda name, fit: work.piece(f"weights {name}", fit))
        by_outputs = fits.every(lora, inputs, part(fitting, 0.0, 0.5), keep[0])
        by_weights = fits.every(lora, None, part(fitting, 0.5, 1.0), keep[1])
        forms = [c for c in by_outputs.candidates if c.conversion is not None]
        stride = work.piece("stride", lambda: time_limits.stride_of_choosing(session, len(forms), minutes))
        session, cut = time_limits.cut_choosing(session, stride, minutes)
        fitter = _Fitter(session, lora, inputs, fits.one)
        pairs = list(zip(by_outputs.candidates, by_weights.candidates, strict=True))
        strong = []
        for n, pair in enumerate(pairs):
            part(progress, _FITS, _ANSWERS)(n / len(pairs), f"answers of {pair[0].method}")
            strong.append(work.piece(f"answers {n}", partial(fitter.nearest, *pair)))
        fitted = replace(by_outputs, candidates=tuple(strong), left_out=(*by_outputs.left_out, *cut))
        ranking = part(progress, _ANSWERS, _ROUNDS)
        winner = None
        if rules.bound is not None:
            end = time.monotonic() + 60 * minutes - work.spent(smallest_file.PIECES)
            search = smallest_file.Search(session, rules.bound, settings.batch_tokens, fitter.sized, end, work)
            fitted = search.run(fitted, lora.half_bytes, part(ranking, 0.0, 0.8 if rules.steps else 1.0))
            ranking, winner = part(ranking, 0.8, 1.0), fitted.winner
        done = _SuccessiveHalving(session, fitted, inputs, settings, ranking, work).run(rules, winner)
        progress(_ROUNDS, "measuring the winner")
        pool, is_fresh = (session.split.held_out, False) if fresh is None else (fresh, True)
        tokens, by_lora = settings.batch_tokens, data is None
        judged = judging.judge(session, pool, done.compact, tokens, is_fresh=is_fresh, by_lora=by_lora)
        return replace(done, judged=judged, bound=rules.bound)


@dataclass(frozen=True, eq=False)
class _Fitter:
    """Fits of single forms under a session, `inputs` being its statistics."""

    session: RefineSession
    lora: LoraAdapter
    inputs: InputStatistics | None
    refit: Refit

    def nearest(self, by_outputs: Candidate, by_weights: Candidate) -> Candidate:
        """Return the fit whose answers are nearer, at the strength at which they are nearest."""
        return self._strengthened(answered_fits.nearer(self.session, by_outputs, by_weights), None)

    def sized(self, candidate: Candidate, nbytes: int) -> Candidate:
        """Return the form fitted to another size, at its own strength there; refused if it cannot have that size."""
        plain = replace(candidate, strength=1.0, plain=None, other=None)
        again = replace(self._refit(plain, 1.0, nbytes), norm=candidate.norm)
        return self._strengthened(again, nbytes)

    def _strengthened(self, candidate: Candidate, nbytes: int | None) -> Candidate:
        return answered_fits.strengthened(self.session, candidate, lambda one, s: self._refit(one, s, nbytes))

    def _refit(self, candidate: Candidate, strength: float, nbytes: int | None) -> Candidate:
        inputs = self.inputs if candidate.norm == answered_fits.OUTPUTS else None
        return self.refit(self.lora, inputs, candidate, strength, nbytes)


@dataclass(frozen=True)
class _States:
    """The states of a training as pieces that are under way."""

    under_way: UnderWay

    def read(self, about: Mapping[str, Any]) -> State | None:
        kept = self.under_way.read()
        return None if kept is None or kept[0] != dict(about) else kept[1]

    def write(self, about: Mapping[str, Any], state: State) -> None:
        self.under_way.write(lambda: (dict(about), state))


@dataclass(eq=False)
class _SuccessiveHalving:
    session: RefineSession
    fitted: Compression
    statistics: InputStatistics | None
    settings: Settings
    progress: Progress
    work: KeptWork
    _results: dict[int, RefineResult] = field(default_factory=dict)  # by the number of a candidate, over all rounds

    def run(self, rules: Rules, winner: int | None = None) -> Compression:
        """Return all candidates as they are after the rounds, and the winner; with a `winner` there are no rounds."""
        alive = [n for n, c in enumerate(self.fitted.candidates) if c.conversion is not None]
        rounds = max(1, (len(alive) - 1).bit_length()) if winner is None else 0
        alive = alive if winner is None else [winner]
        parts = rounds + (rules.steps > 0)
        minutes = rules.minutes
        cut: tuple[str, ...] = ()
        if minutes is None and rounds:
            steps = [STEPS << n for n in range(rounds)]
            limit = partial(time_limits.minutes_of_rounds, self.session, steps, len(alive), MINUTES)
            minutes, cut = self.work.piece("minutes", limit)
        end = time.monotonic() + 60 * (minutes or 0) - self.work.spent("round")
        for n in range(rounds):
            settings = replace(self.settings, layerwise=False, end_to_end=True, minutes=None, steps=STEPS << n)
            if minutes is not None:
                each = max(0.01, (end - time.monotonic()) / 60 / (rounds - n) / len(alive))
                settings = replace(settings, minutes=each, steps=settings.steps * _MORE)
            settings = replace(settings, eval_every=settings.steps)
            for place, number in enumerate(alive):
                start, share = (n + place / len(alive)) / parts, 1 / len(alive) / parts
                self._refine(f"round {n}", number, settings, (start, start + share))
            alive = sorted(alive, key=self._rank)[: (len(alive) + 1) // 2]
        best = alive[0]
        if rules.steps:
            settings = replace(self.settings, layerwise=False, steps=rules.steps)
            self._refine("winner", best, settings, (rounds / parts, (rounds + 1) / parts))
        ranked = [self._refined(n, candidate) for n, candidate in enumerate(self.fitted.candidates)]
        left_out = (*self.fitted.left_out, *cut)
        return replace(self.fitted, candidates=tuple(ranked), winner=best, left_out=left_out)

    def _refine(self, stage: str, number: int, settings: Settings, shares: tuple[float, float]) -> None:
        """Train a candidate further, with rates of its own that rise and fall, from one share of the progress to
        another. By the clock a training goes on as it is, so that it is kept only as a whole."""
        candidate, before = self.fitted.candidates[number], self._results.get(number)
        assert candidate.conversion is not None
        compact = candidate.conversion.compact if before is None else before.compact
        piece = f"{stage}, {number}"
        under_way = self.work.under_way(piece)
        store = _States(under_way) if under_way.is_kept and settings.minutes is None else None
        settings = settings if store is None else replace(settings, checkpoint_every=_OFTEN)
        run = RefineRun(self.session, compact, settings, store)
        name = ", ".join([candidate.method, *(f"{k} {v}" for k, v in candidate.options.items())])
        training = part(lambda done, text: self.progress(done, f"{name}: {text}"), *shares)
        result = self.work.piece(piece, lambda: run.run(training))
        if before is not None:
            result = replace(
                result,
                before=before.before,
                improved=result.improved or before.improved,
                steps=before.steps + result.steps,
                best_step=before.best_step + result.best_step,
                warnings=tuple(dict.fromkeys((*before.warnings, *result.warnings))),
            )
        self._results[number] = result

    def _rank(self, number: int) -> tuple[float, int]:
        return self._results[number].after.distance, self.fitted.candidates[number].nbytes

    def _refined(self, number: int, candidate: Candidate) -> Candidate:
        """A candidate as it is now, with what was done to it: whichever of them is written says the truth."""
        if number not in self._results:
            return candidate
        result, conversion, session = self._results[number], candidate.conversion, self.session
        assert conversion is not None
        compact = with_provenance(session, result, self.settings.seed)
        teacher = layerwise.aligned(session.teacher, compact)
        refined = replace(
            conversion,
            compact=compact,
            sizes=file.sizes(compact),
            fidelity=fidelity.fidelity_on(teacher, compact, self.statistics, session.base),
            warnings=(*conversion.warnings, *result.warnings, *note_warnings(compact)),
        )
        return replace(candidate, conversion=refined, before=result.before, after=result.after, steps=result.steps)
