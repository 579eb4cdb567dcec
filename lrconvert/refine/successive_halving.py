"""Ranking forms by what the model answers: all are refined a little, equally, and the better half goes on.

Successive halving (arXiv 1502.07943): a fit alone says little of what refinement makes of a form, and to refine every
form to its end costs several times what finding the best one does. All forms see the same texts in the same order.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from lrconvert.convert.compress import Candidate, Compression
from lrconvert.core.errors import OptionError
from lrconvert.core.wording import spelled
from lrconvert.formats import fidelity
from lrconvert.formats.lrc import file
from lrconvert.live import attach
from lrconvert.live.answers import AnswerSums
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter
from lrconvert.lora.input_statistics import InputStatistics
from lrconvert.refine import layerwise
from lrconvert.refine.attached_student import NAME
from lrconvert.refine.refine import note_warnings, with_provenance
from lrconvert.refine.run import RefineResult, RefineRun
from lrconvert.refine.session import Progress, RefineSession, open_session, part
from lrconvert.refine.settings import RunOptions, Settings

STEPS = 32  # of the first round; every further one has twice as many
_MORE = 8  # times as many steps at most where minutes decide
_OPENING, _FITS = 0.05, 0.3  # of the progress: what is behind then
OUTPUTS, WEIGHTS = "outputs", "weights"  # the norms of a fit: with input statistics, and without

_STRONGER = 1.25  # times the strength that was tried before
_STRONGEST = 4.0

Fit = Callable[[LoraAdapter, InputStatistics | None, Progress], Compression]
Refit = Callable[[LoraAdapter, InputStatistics | None, Candidate, float], Candidate]  # of one form, at a strength


@dataclass(frozen=True)
class Rules:
    """`minutes` for the rounds, or as many steps as stated; `steps` of refinement for the winner afterwards."""

    minutes: float | None = None
    steps: int = 0
    device: str = "cpu"

    def check(self) -> None:
        """Raise E-OPTION for numbers that make no sense."""
        if self.minutes is not None and not 0 < self.minutes < float("inf"):
            raise OptionError(f"{spelled('budget_minutes')} is {self.minutes}; it must be above 0")
        if self.steps < 0:
            raise OptionError(f"{spelled('steps')} is {self.steps}; it must be at least 0")


def compress(
    lora: LoraAdapter,
    fits: tuple[Fit, Refit],
    base: Path,
    data: object,
    settings: Settings,
    rules: Rules,
    *,
    statistics: InputStatistics | None,
    progress: Progress,
) -> Compression:
    """Fit all forms, under `statistics` or those of the LoRA's own inputs on `data` and without any, whichever brings
    answers nearer, at the strength that does, and rank them by what the model answers with them; see
    `lrconvert.api.compress`. `fits` are the ways to fit all of them, and one anew. The winner is refined, and says
    so."""
    fit, refit = fits
    rules.check()
    settings.check()
    opening, fitting = part(progress, 0.0, _OPENING), part(progress, _OPENING, _FITS)
    with open_session(base, lora, data, settings, RunOptions(device=rules.device), progress=opening) as session:
        fitting(0.0, "inputs of the layers")
        inputs = statistics or layerwise.teacher_statistics(session, lora, settings)
        by_outputs = fit(lora, inputs, part(fitting, 0.0, 0.5))
        by_weights = fit(lora, None, part(fitting, 0.5, 1.0))
        pairs = zip(by_outputs.candidates, by_weights.candidates, strict=True)
        nearer = (_nearer(session, *pair) for pair in pairs)
        strong = (
            _strengthened(session, one, lambda one, s: refit(lora, inputs if one.norm == OUTPUTS else None, one, s))
            for one in nearer
        )
        compression = replace(by_outputs, candidates=tuple(strong))
        return _SuccessiveHalving(session, compression, inputs, settings, part(progress, _FITS, 1.0)).run(rules)


def _nearer(session: RefineSession, by_outputs: Candidate, by_weights: Candidate) -> Candidate:
    """The fit of a form whose answers on held-out data are nearer to the LoRA's; the first where both are as near."""
    one, two = _distance(session, by_outputs), _distance(session, by_weights)
    if one is None or two is None:
        norm, chosen, other = (WEIGHTS, by_weights, None) if one is None else (OUTPUTS, by_outputs, None)
    elif one.mean <= two.mean:
        norm, chosen, other = OUTPUTS, by_outputs, two
    else:
        norm, chosen, other = WEIGHTS, by_weights, one
    return replace(chosen, norm=norm, other=None if other is None else other.answers(session.base_distance))


def _distance(session: RefineSession, candidate: Candidate, scale: float = 1.0) -> AnswerSums | None:
    """The distance of the answers with a fit, its updates times `scale`, from the LoRA's; None if there is none."""
    if candidate.conversion is None:
        return None
    adapters: dict[str, CompactAdapter | LoraAdapter] = {NAME: candidate.conversion.compact}
    with attach.temporarily(session.teacher_model.model, adapters, scale=scale):
        return session.evaluator.sums((NAME,))


def _strengthened(
    session: RefineSession, candidate: Candidate, refit: Callable[[Candidate, float], Candidate]
) -> Candidate:
    """A candidate, fitted anew at the strength at which its answers are nearest to the LoRA's."""
    plain = _distance(session, candidate)
    if plain is None:
        return candidate
    best, nearest = 1.0, plain.mean
    while best * _STRONGER <= _STRONGEST:
        stronger = _distance(session, candidate, best * _STRONGER)
        assert stronger is not None
        if not stronger.mean < nearest:
            break
        best, nearest = best * _STRONGER, stronger.mean
    again = candidate if best == 1 else refit(candidate, best)
    distance = None if again is candidate else _distance(session, again)
    if distance is None or not distance.mean < plain.mean:
        return candidate
    measured = plain.answers(session.base_distance)
    return replace(again, norm=candidate.norm, other=candidate.other, strength=best, plain=measured)


@dataclass(eq=False)
class _SuccessiveHalving:
    session: RefineSession
    fitted: Compression
    statistics: InputStatistics | None
    settings: Settings
    progress: Progress
    _results: dict[int, RefineResult] = field(default_factory=dict)  # by the number of a candidate, over all rounds

    def run(self, rules: Rules) -> Compression:
        """Return all candidates as they are after the rounds, and the winner."""
        alive = [n for n, c in enumerate(self.fitted.candidates) if c.conversion is not None]
        rounds = max(1, (len(alive) - 1).bit_length())
        parts = rounds + (rules.steps > 0)
        end = time.monotonic() + 60 * (rules.minutes or 0)
        for n in range(rounds):
            settings = replace(self.settings, layerwise=False, end_to_end=True, minutes=None, steps=STEPS << n)
            if rules.minutes is not None:
                each = max(0.01, (end - time.monotonic()) / 60 / (rounds - n) / len(alive))
                settings = replace(settings, minutes=each, steps=settings.steps * _MORE)
            settings = replace(settings, eval_every=settings.steps)
            for place, number in enumerate(alive):
                start = (n + place / len(alive)) / parts
                self._refine(number, settings, start, 1 / len(alive) / parts)
            alive = sorted(alive, key=self._rank)[: (len(alive) + 1) // 2]
        winner = alive[0]
        if rules.steps:
            self._refine(winner, replace(self.settings, layerwise=False, steps=rules.steps), rounds / parts, 1 / parts)
        ranked = [self._refined(n, candidate) for n, candidate in enumerate(self.fitted.candidates)]
        return replace(self.fitted, candidates=tuple(ranked), winner=winner)

    def _refine(self, number: int, settings: Settings, start: float, share: float) -> None:
        """Train a candidate further, with rates of its own that rise and fall."""
        candidate, before = self.fitted.candidates[number], self._results.get(number)
        assert candidate.conversion is not None
        compact = candidate.conversion.compact if before is None else before.compact
        run = RefineRun(self.session, compact, settings)
        name = ", ".join([candidate.method, *(f"{k} {v}" for k, v in candidate.options.items())])
        result = run.run(part(lambda done, text: self.progress(done, f"{name}: {text}"), start, start + share))
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
