"""Which form answers most as the LoRA does: all are refined a little, equally, and the better half goes on.

Successive halving (arXiv 1502.07943): a fit alone says little of what refinement makes of a form, and to refine every
form to its end costs several times what finding the best one does. All forms see the same texts in the same order.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from lrconvert.convert.compress import Candidate, Compression
from lrconvert.core.errors import LrcError, OptionError
from lrconvert.formats import fidelity
from lrconvert.formats.lrc import file
from lrconvert.lora.adapter import LoraAdapter
from lrconvert.lora.input_statistics import InputStatistics
from lrconvert.refine import distributed, layerwise, session
from lrconvert.refine.refine import signed, with_room
from lrconvert.refine.run import RefineResult, RefineRun
from lrconvert.refine.session import Progress, RefineSession
from lrconvert.refine.settings import Settings

STEPS = 32  # of the first round; every further one has twice as many
_MORE = 8  # times as many steps at most where minutes decide
_OPENING, _FITS = 0.05, 0.3  # of the progress: what is behind then

Fit = Callable[[LoraAdapter, InputStatistics | None, Progress], Compression]


@dataclass(frozen=True)
class Rules:
    """`minutes` for the rounds, or as many steps as stated; `steps` of refinement for the winner afterwards."""

    minutes: float | None = None
    steps: int = 0

    def check(self) -> None:
        """Raises E-OPTION."""
        if self.minutes is not None and not 0 < self.minutes < float("inf"):
            raise OptionError(f"--budget-minutes is {self.minutes}; it must be above 0")
        if self.steps < 0:
            raise OptionError(f"--steps is {self.steps}; it must be at least 0")


def compress(
    lora: LoraAdapter,
    fit: Fit,
    base: Path,
    data: object,
    settings: Settings,
    rules: Rules,
    *,
    statistics: InputStatistics | None,
    device: str,
    progress: Progress,
) -> Compression:
    """`fit` all forms, under `statistics` or the moments of the LoRA's own inputs on `data`, and rank them by what the
    model answers with them; see `lrconvert.api.compress`. The winner is refined, and says so."""
    rules.check()
    settings.check()
    with session.opened(
        base,
        lora,
        data,
        settings,
        device=device,
        here=distributed.Processes(),
        load_in_4bit=False,
        progress=lambda share, text: progress(_OPENING * share, text),
    ) as opened:

        def fitting(share: float, text: str) -> None:
            progress(_OPENING + (_FITS - _OPENING) * share, text)

        fitting(0.0, "inputs of the layers")
        known: InputStatistics | None = statistics or layerwise.moments(opened, lora, settings)
        try:
            found = fit(with_room(lora), known, fitting)
        except LrcError as error:
            if error.code != "E-STATS" or statistics is not None:
                raise
            found = fit(with_room(lora), None, fitting)  # a layer that the data never reached
            known = None
        contest = _SuccessiveHalving(
            opened, found, known, settings, lambda s, text: progress(_FITS + (1 - _FITS) * s, text)
        )
        return contest.run(rules)


@dataclass(eq=False)
class _SuccessiveHalving:
    lesson: RefineSession
    fitted: Compression
    statistics: InputStatistics | None
    settings: Settings
    progress: Progress
    _studied: dict[int, RefineResult] = field(default_factory=dict)  # by the number of a candidate: all it went through

    def run(self, rules: Rules) -> Compression:
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
            for place, one in enumerate(alive):
                start = (n + place / len(alive)) / parts
                self._go_on(one, settings, start, 1 / len(alive) / parts)
            alive = sorted(alive, key=self._rank)[: (len(alive) + 1) // 2]
        winner = alive[0]
        if rules.steps:
            self._go_on(winner, replace(self.settings, layerwise=False, steps=rules.steps), rounds / parts, 1 / parts)
        ranked = [self._told(n, candidate) for n, candidate in enumerate(self.fitted.candidates)]
        return Compression(tuple(ranked), winner)

    def _go_on(self, one: int, settings: Settings, start: float, share: float) -> None:
        """Train a candidate further, with rates of its own that rise and fall."""
        candidate, before = self.fitted.candidates[one], self._studied.get(one)
        assert candidate.conversion is not None
        compact = candidate.conversion.compact if before is None else before.compact
        study = RefineRun(self.lesson, compact, settings)
        name = ", ".join([candidate.method, *(f"{k} {v}" for k, v in candidate.options.items())])
        found = study.run(lambda done, text: self.progress(start + share * done, f"{name}: {text}"))
        if before is not None:
            found = replace(
                found,
                before=before.before,
                improved=found.improved or before.improved,
                steps=before.steps + found.steps,
                best_step=before.best_step + found.best_step,
                warnings=tuple(dict.fromkeys((*before.warnings, *found.warnings))),
            )
        self._studied[one] = found

    def _rank(self, one: int) -> tuple[float, int]:
        return self._studied[one].after.distance, self.fitted.candidates[one].nbytes

    def _told(self, n: int, candidate: Candidate) -> Candidate:
        """A candidate as it is now, with what was done to it: whichever of them is written says the truth."""
        if n not in self._studied:
            return candidate
        found, conversion, there = self._studied[n], candidate.conversion, self.lesson
        assert conversion is not None
        compact = signed(there, found, self.settings.seed)
        done = replace(
            conversion,
            compact=compact,
            sizes=file.sizes(compact),
            fidelity=fidelity.fidelity_on(
                layerwise.aligned(there.teacher, compact), compact, self.statistics, there.base
            ),
            warnings=(*conversion.warnings, *found.warnings),
        )
        return replace(candidate, conversion=done, before=found.before, after=found.after, steps=found.steps)
