"""The budget chooses: every form that can meet a request is tried, and the one that keeps most is taken.

With input statistics the forms are ranked in the metric of the fits, which came nearest to what models answer; without,
by what they capture in the weight norm, which favours low rank. `refining.contest` ranks them by answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrconvert.convert import convert
from lrconvert.convert.convert import Conversion, PreparedSource
from lrconvert.core.errors import BudgetError, LrcError, OptionError
from lrconvert.formats.fidelity import Answers, Fidelity
from lrconvert.io.container import KnownContent, is_without_weights, open_checkpoint
from lrconvert.lora.adapter import LoraAdapter
from lrconvert.methods import base as methods

_STEPS = 5  # bisections of a size, in its logarithm: to 3 % of the bytes
RANKINGS = ("auto", "answers", "fit")
RANKED_BY_FIT = "Ranked by what fits keep, not by answers: {}."
_FIRST = "lowrank"  # the cheapest fit; the others then only have to beat it


@dataclass(frozen=True)
class Candidate:
    """A form that was tried: its conversion, or why there is none.

    Where forms are ranked by answers, `before` is how far those of the fit are from the LoRA's on held-out data, and
    `after` those after `steps` of refinement, which its `conversion` then holds.
    """

    method: str
    options: Mapping[str, Any]
    conversion: Conversion | None
    refused: LrcError | None = None
    before: Answers | None = None
    after: Answers | None = None
    steps: int = 0

    @property
    def captured(self) -> float:
        """What is asked for with `min_captured`: of the outputs under statistics, else of the weights."""
        fidelity = self._fidelity
        return fidelity.captured if fidelity.output_captured is None else fidelity.output_captured

    @property
    def score(self) -> float:
        """What candidates are ranked by."""
        fidelity = self._fidelity
        return fidelity.captured if fidelity.fit_captured is None else fidelity.fit_captured

    @property
    def nbytes(self) -> int:
        assert self.conversion is not None
        return self.conversion.sizes.adapter

    @property
    def _fidelity(self) -> Fidelity:
        assert self.conversion is not None and self.conversion.fidelity is not None
        return self.conversion.fidelity


@dataclass(frozen=True)
class Compression:
    """What was tried, in the order it was, and the winner among it. `note`: why answers did not rank it, if they were
    expected to."""

    candidates: tuple[Candidate, ...]
    winner: int
    note: str = ""

    @property
    def chosen(self) -> Conversion:
        found = self.candidates[self.winner].conversion
        assert found is not None
        return found


def no_answers(
    rank_by: str, base: Path | None, has_data: bool, min_captured: float | None, bake_dora: int | None
) -> str | None:
    """Why forms are not ranked by what the model answers; None if they are. Raises E-OPTION where that was asked for
    and cannot be."""
    if rank_by not in RANKINGS:
        raise OptionError(f"--rank-by is {rank_by!r:.20}; {', '.join(RANKINGS)} are allowed")
    if has_data and base is None:
        raise OptionError("data is for ranking by answers, which needs the base", fix="give it with --base")
    if rank_by == "fit":
        return ""
    if base is None:
        reason = "answers need the base"
    elif min_captured is not None:
        reason = "--min-captured asks for the smallest file"
    elif bake_dora is not None:
        reason = "the answers of a baked DoRA would be compared with those of the DoRA"
    elif is_without_weights(base):
        reason = "the base has no weights"
    elif not has_data and not _writes(base):
        reason = "only a decoder with its tokenizer can write texts of its own: give --data"
    else:
        return None
    if rank_by == "answers" or has_data:
        raise OptionError(f"answers cannot rank forms here: {reason}")
    return "" if base is None else RANKED_BY_FIT.format(reason)


def _writes(base: Path) -> bool:
    """Whether a base is, by its configuration, a decoder with a tokenizer."""
    with open_checkpoint(base, quantized=True) as checkpoint:
        named = checkpoint.config.get("architectures")
    first = str(named[0]) if isinstance(named, list) and named else ""
    return first.endswith(("ForCausalLM", "LMHeadModel")) and any(base.glob("tokenizer*"))


def compress(
    lora: LoraAdapter,
    *,
    target_size: int | None,
    target_ratio: float | None,
    min_captured: float | None,
    forms: Sequence[str],
    include: Sequence[str],
    exclude: Sequence[str],
    base: Path | None,
    base_content: KnownContent | None,
    bake_dora: int | None,
    progress: Callable[[float, str], None],
    **common: Any,
) -> Compression:
    """See `lrconvert.api.compress`; `common` goes to `converting.convert_on`."""
    asked = [value for value in (target_size, target_ratio, min_captured) if value is not None]
    if len(asked) != 1:
        raise OptionError("give one of --target-size, --target-ratio and --min-captured")
    if min_captured is not None and not 0 < min_captured <= 1:
        raise OptionError(f"--min-captured is {min_captured}; a share above 0, at most 1, is allowed")
    plans = list(_plans(forms))
    found: list[Candidate] = []
    with convert.prepare_source(
        lora, include=include, exclude=exclude, base=base, base_content=base_content, bake_dora=bake_dora
    ) as ground:
        for n, (method, options) in enumerate(plans):

            def tell(fraction: float, text: str, n: int = n, method: str = method) -> None:
                progress((n + fraction) / len(plans), f"{method} {text}")

            trial = _Trial(ground, method, options, {**common, "progress": tell})
            if min_captured is None:
                found.append(trial.at(target_size=target_size, target_ratio=target_ratio))
            else:
                bound = min((c.nbytes for c in found if _meets(c, min_captured)), default=None)
                found.append(trial.smallest(min_captured, bound))
    return Compression(tuple(found), _winner(found, min_captured))


def _plans(forms: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(method, options) of everything to try, the cheapest first. Raises E-VER for a form that is not known."""
    chosen = [methods.get(name) for name in dict.fromkeys(forms)] if forms else methods.all_methods()
    for form in sorted(chosen, key=lambda form: (form.id != _FIRST, form.id)):
        for options in form.searches:
            yield form.id, options


def _meets(candidate: Candidate, min_captured: float) -> bool:
    return candidate.conversion is not None and candidate.captured >= min_captured


def _winner(found: Sequence[Candidate], min_captured: float | None) -> int:
    """Raises E-BUDGET, saying what would do, if nothing meets the request."""
    made = [n for n, c in enumerate(found) if c.conversion is not None]
    if min_captured is not None:
        enough = [n for n in made if found[n].captured >= min_captured]
        if not enough:
            best = max(made, key=lambda n: found[n].captured, default=None)
            told = "" if best is None else f"; {found[best].method} keeps {found[best].captured:.8f}, the most"
            raise BudgetError(f"no form keeps {min_captured} at 16 bit per number or less{told}")
        return min(enough, key=lambda n: (found[n].nbytes, -found[n].score))
    if not made:
        errors = [c.refused for c in found if c.refused is not None]
        if not any(isinstance(error, BudgetError) for error in errors):
            raise errors[0]
        reasons = [f"{c.method}: {c.refused.what}" for c in found if c.refused is not None]
        raise BudgetError(f"no form can be that small: {'; '.join(reasons)}")
    return max(made, key=lambda n: (found[n].score, -found[n].nbytes))


@dataclass(frozen=True)
class _Trial:
    ground: PreparedSource
    method: str
    options: Mapping[str, Any]
    common: Mapping[str, Any]

    def at(self, *, target_size: int | None = None, target_ratio: float | None = None) -> Candidate:
        """The form under a budget; refused if it cannot be that small, or does not suit the adapter."""
        try:
            done = convert.convert_on(
                self.ground,
                self.method,
                target_size=target_size,
                target_ratio=target_ratio,
                dry_run=False,
                options=self.options,
                **self.common,
            )
        except (BudgetError, OptionError) as error:
            return Candidate(self.method, self.options, None, error)
        return Candidate(self.method, self.options, done)

    def smallest(self, min_captured: float, bound: int | None) -> Candidate:
        """The smallest size that keeps enough, by bisection; below `bound`, if that is given. Without it from the size
        of the factors at 16 bit on. The last one tried where none keeps enough."""
        high = self.ground.source_bytes if bound is None else bound - 1
        best = self.at(target_size=high)
        if not _meets(best, min_captured):
            return best
        high, low = best.nbytes, 0
        while low == 0:  # halve until it is too little
            half = self.at(target_size=high // 2)
            if _meets(half, min_captured):
                best, high = half, half.nbytes
            else:
                low = max(1, high // 2)
        for _ in range(_STEPS):
            middle = int((low * high) ** 0.5)
            if middle in (low, high):
                break
            there = self.at(target_size=middle)
            if _meets(there, min_captured):
                best, high = there, there.nbytes
            else:
                low = middle
        return best
