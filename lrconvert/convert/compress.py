"""The budget chooses: every form that can meet a request is tried, and the one that keeps most is taken.

With input statistics the forms are ranked in the metric of the fits, which came nearest to what models answer; without,
by what they capture in the weight norm, which favours low rank. `lrconvert.refine.successive_halving` ranks them by
answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lrconvert.convert.convert import Conversion, PreparedSource, Progress, convert_prepared, prepare_source
from lrconvert.convert.options import CompressOptions, ConvertOptions
from lrconvert.convert.strength import strength_without_data
from lrconvert.convert.verdict import Judged, LossBound, Verdict, from_answers, from_weights
from lrconvert.core.errors import BudgetError, LrcError, OptionError
from lrconvert.core.notebook import html_table
from lrconvert.core.notices import Notice
from lrconvert.core.wording import either, spelled
from lrconvert.formats.fidelity import Answers, Fidelity
from lrconvert.io.checkpoint import KnownContent, is_without_weights, open_checkpoint
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter
from lrconvert.methods import base as methods

_STEPS = 5  # bisections of a size, in its logarithm: to 3 % of the bytes
RANKED_BY_FIT = "Ranked by what fits keep, not by answers: {}."
_MINUTES, _SEARCH_MINUTES = 1.0, 10.0  # for all fits, and where each form is fitted at many sizes
_SEARCH_FITS = 12  # so many, about
_WORTH_SAYING = 10.0  # seconds
_FIRST = "lowrank"  # the cheapest fit; the others then only have to beat it


@dataclass(frozen=True)
class Candidate:
    """A form that was tried: its conversion, or why there is none.

    Where forms are ranked by answers, `before` is how far those of the fit are from the LoRA's on held-out data, and
    `after` those after `steps` of refinement, which its `conversion` then holds. Each form is fitted in two norms
    there, that of the outputs under statistics and the plain one of the weights: `norm` is the one whose answers are
    nearer, and is refined; `other` how far those of the other fit are. `strength` is what brings its answers nearest
    (see `ConvertOptions`), `plain` how far they are without it.
    """

    method: str
    options: Mapping[str, Any]
    conversion: Conversion | None
    refused: LrcError | None = None
    before: Answers | None = None
    after: Answers | None = None
    steps: int = 0
    norm: str = ""
    other: Answers | None = None
    strength: float = 1.0
    plain: Answers | None = None

    @property
    def captured(self) -> float:
        """The share that `min_captured` asks for: of the outputs under statistics, else of the weights."""
        fidelity = self._fidelity
        return fidelity.captured if fidelity.output_captured is None else fidelity.output_captured

    @property
    def score(self) -> float:
        """The share that ranks candidates."""
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
    """The candidates, in the order they were tried, and the winner among it. `note`: why answers did not rank it, if
    they were expected to. `stronger`: the winner at the strength by which it is chosen without data
    (`lrconvert.convert.strength`), if that is not 1; the candidates are nearest fits then. `by_default`: no size was
    asked for. `left_out`: what was not tried, a line each. `judged`: the winner's answers, measured where there were
    base and data; `bound` is what they were to keep."""

    candidates: tuple[Candidate, ...]
    winner: int
    note: str = ""
    stronger: Candidate | None = None
    by_default: bool = False
    left_out: tuple[str, ...] = ()
    judged: Judged | None = None
    bound: LossBound | None = None

    def __repr__(self) -> str:
        return f"<Compression: the best of {len(self.candidates)} is {self.chosen!r}>"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: a row for each form, the winner's marked."""
        rows: list[tuple[object, ...]] = []
        for number, candidate in enumerate(self.candidates):
            made, chosen = candidate.conversion, "chosen" if number == self.winner else ""
            if made is None or made.fidelity is None:
                rows.append((candidate.method, "", "", "" if candidate.refused is None else candidate.refused.what, ""))
                continue
            closed = "" if candidate.after is None else f"{candidate.after.closed:.1%}"
            size = f"{made.sizes.adapter:,}"
            rows.append((candidate.method, size, f"{candidate.captured:.4f}", closed, chosen))
        chosen_size = f"{self.chosen.sizes.adapter:,} bytes, {self.chosen.ratio:.1f} times smaller"
        caption = f"Compression: {self.chosen.compact.method}, {chosen_size}"
        head = ("form", "bytes", "captured", "of the answers' distance closed", "")
        return html_table(caption, head, rows, [*([self.note] if self.note else []), *self.chosen.notes])

    @property
    def compact(self) -> CompactAdapter:
        """The winner's."""
        return self.chosen.compact

    @property
    def chosen(self) -> Conversion:
        conversion = (self.stronger or self.candidates[self.winner]).conversion
        assert conversion is not None
        return conversion

    @property
    def nearest(self) -> Conversion:
        """The winner as it was ranked: without `stronger`, at the strength of the LoRA."""
        conversion = self.candidates[self.winner].conversion
        assert conversion is not None
        return conversion

    @property
    def verdict(self) -> Verdict:
        """The verdict: ship the file or not, why, and what to try where not."""
        if self.judged is not None:
            return from_answers(self.judged, self.bound, self.chosen.ratio)
        fidelity = self.nearest.fidelity
        assert fidelity is not None
        return from_weights(self.compact.method, fidelity)


def no_answers(options: ConvertOptions, compress_options: CompressOptions) -> str | None:
    """Return why forms are not ranked by what the model answers; None if they are. Raises E-OPTION where that was asked
    for and cannot be."""
    base, rank_by, has_data = options.base, compress_options.rank_by, compress_options.data is not None
    if has_data and base is None:
        raise OptionError(
            "data is for ranking by answers, which needs the base", fix=f"give it with {spelled('base', ...)}"
        )
    if rank_by == "fit" and compress_options.loss_bound is None:
        return ""
    if base is None:
        reason = "answers need the base"
    elif compress_options.min_captured is not None:
        reason = f"{spelled('min_captured')} asks for the smallest file"
    elif options.bake_dora is not None:
        reason = "the answers of a baked DoRA would be compared with those of the DoRA"
    elif is_without_weights(base):
        reason = "the base has no weights"
    elif not has_data and not _writes(base):
        reason = f"only a decoder with its tokenizer can write texts of its own: give {spelled('data', ...)}"
    else:
        return None
    if compress_options.loss_bound is not None:
        bounds = f"{spelled('max_loss')} and {spelled('max_accuracy_loss')}"
        raise OptionError(f"{bounds} are bounds on what answers lose, which cannot be measured here: {reason}")
    if rank_by == "answers" or has_data:
        raise OptionError(f"answers cannot rank forms here: {reason}")
    return "" if base is None else RANKED_BY_FIT.format(reason)


def _writes(base: Path) -> bool:
    """Return true if a base is, by its configuration, a decoder with a tokenizer."""
    with open_checkpoint(base, quantized=True) as checkpoint:
        named = checkpoint.config.get("architectures")
    first = str(named[0]) if isinstance(named, list) and named else ""
    return first.endswith(("ForCausalLM", "LMHeadModel")) and any(base.glob("tokenizer*"))


Keep = Callable[[str, Callable[[], Candidate]], Candidate]


def compute(name: str, candidate: Callable[[], Candidate]) -> Candidate:
    """Return a candidate where none are kept: the `Keep` of what is never resumed."""
    return candidate()


def compress(
    lora: LoraAdapter,
    options: ConvertOptions,
    compress_options: CompressOptions,
    *,
    base_content: KnownContent | None = None,
    progress: Progress,
    keep: Keep = compute,
) -> Compression:
    """Fit every form under `options`, and choose by what the fits keep; see `lrconvert.api.compress`. `keep` returns
    the candidate that is kept under a name, or computes and keeps it."""
    wanted = compress_options.min_captured
    plans, left_out = _affordable(list(_plans(compress_options.forms)), lora, options, compress_options)
    candidates: list[Candidate] = []
    costs = [methods.get(method).fit_seconds for method, _ in plans]
    seconds = sum(costs) * lora.numel / 1e6 * (1 if wanted is None else _SEARCH_FITS)
    if options.base is None and seconds > _WORTH_SAYING:
        progress(0.0, Notice(f"{len(plans)} forms are fitted, about {_span(seconds)} on one core"))
    with prepare_source(lora, options, base_content) as source:
        for n, (method, method_options) in enumerate(plans):
            start, share = sum(costs[:n]) / sum(costs), costs[n] / sum(costs)

            def advance(
                fraction: float, text: str, start: float = start, share: float = share, method: str = method
            ) -> None:
                progress(start + share * fraction, f"{method} {text}")

            trial = _Trial(source, method, method_options, advance)
            if wanted is None:
                candidates.append(keep(f"{n} {method}", partial(trial.at, options)))
            else:
                bound = min((c.nbytes for c in candidates if _meets(c, wanted)), default=None)
                candidates.append(trial.smallest(wanted, bound))
    return Compression(tuple(candidates), _winner(candidates, wanted), left_out=left_out)


def check_request(options: ConvertOptions, compress_options: CompressOptions) -> bool:
    """Return whether something says how small the file is to be. Raises E-OPTION for more than one such request, and
    for numbers that make no sense."""
    wanted, bound = compress_options.min_captured, compress_options.loss_bound
    sizes = [options.target_size, options.target_ratio, wanted, bound]
    if sum(value is not None for value in sizes) > 1:
        one = ", ".join(map(spelled, ("target_size", "target_ratio", "min_captured")))
        raise OptionError(f"give one of {one} and {spelled('max_loss')}")
    if wanted is not None and not 0 < wanted <= 1:
        raise OptionError(f"{spelled('min_captured')} is {wanted}; a share above 0, at most 1, is allowed")
    if wanted is not None and options.strength is not None:
        what = f"{spelled('min_captured')} measures the nearest fit, which {spelled('strength')} leaves"
        raise OptionError(what, fix="give one of them")
    if bound is not None:
        bound.check()
    return any(value is not None for value in sizes)


def _affordable(
    plans: list[tuple[str, Mapping[str, Any]]],
    lora: LoraAdapter,
    options: ConvertOptions,
    compress_options: CompressOptions,
) -> tuple[list[tuple[str, Mapping[str, Any]]], tuple[str, ...]]:
    """Return the plans that there is time for, by what fits take on one core, and what is left out, a line each.

    The first form is always tried, and so are forms that were asked for by name, unless minutes were given. With a base
    for answers the fits are the smaller part of the work."""
    searched = compress_options.min_captured is not None
    minutes = compress_options.budget_minutes or (_SEARCH_MINUTES if searched else _MINUTES)
    is_bounded = options.base is None and (compress_options.budget_minutes is not None or not compress_options.forms)
    numbers = lora.numel / 1e6
    kept: list[tuple[str, Mapping[str, Any]]] = []
    left_out: list[str] = []
    seconds = 0.0
    for plan in sorted(plans, key=lambda plan: (plan[0] != _FIRST, methods.get(plan[0]).fit_seconds)):
        cost = numbers * methods.get(plan[0]).fit_seconds * (_SEARCH_FITS if searched else 1)
        if is_bounded and kept and seconds + cost > 60 * minutes:
            named = either(f"forms={[plan[0]]}", f"--methods {plan[0]}")
            left_out.append(f"{plan[0]} (about {_span(cost)} more; {named} tries it)")
            continue
        seconds += cost
        kept.append(plan)
    return [plan for plan in plans if plan in kept], tuple(left_out)


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def with_strength(
    lora: LoraAdapter,
    options: ConvertOptions,
    compression: Compression,
    *,
    base_content: KnownContent | None = None,
    progress: Progress,
) -> Compression:
    """Return what was ranked by fits with its winner at the strength that its captured share asks for
    (`lrconvert.convert.strength`); as it is if `options` give a strength, or if that is 1."""
    winner = compression.candidates[compression.winner]
    assert winner.conversion is not None and winner.conversion.fidelity is not None
    strength = strength_without_data(winner.method, winner.conversion.fidelity.captured)
    if options.strength is not None or strength == 1:
        return compression
    under = replace(options, strength=strength)
    again = refitted(lora, under, winner, base_content=base_content, progress=progress)
    return compression if again.conversion is None else replace(compression, stronger=replace(again, strength=strength))


def refitted(
    lora: LoraAdapter,
    options: ConvertOptions,
    candidate: Candidate,
    *,
    base_content: KnownContent | None = None,
    progress: Progress,
) -> Candidate:
    """Return the form of a candidate fitted anew under other `options`."""
    with prepare_source(lora, options, base_content) as source:
        return _Trial(source, candidate.method, candidate.options, progress).at(options)


def _plans(forms: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (method, options) of everything to try, the cheapest first. Raises E-VER for a form that is not known."""
    chosen = [methods.get(name) for name in dict.fromkeys(forms)] if forms else methods.all_methods()
    for form in sorted(chosen, key=lambda form: (form.id != _FIRST, form.id)):
        for options in form.searches or ({},) * bool(forms):
            yield form.id, options


def _meets(candidate: Candidate, min_captured: float) -> bool:
    return candidate.conversion is not None and candidate.captured >= min_captured


def _winner(candidates: Sequence[Candidate], min_captured: float | None) -> int:
    """Return the number of the best candidate. Raises E-BUDGET, saying what would do, if nothing meets the request."""
    made = [n for n, c in enumerate(candidates) if c.conversion is not None]
    if min_captured is not None:
        enough = [n for n in made if candidates[n].captured >= min_captured]
        if not enough:
            best = max(made, key=lambda n: candidates[n].captured, default=None)
            most = (
                "" if best is None else f"; {candidates[best].method} keeps {candidates[best].captured:.8f}, the most"
            )
            raise BudgetError(f"no form keeps {min_captured} at 16 bit per number or less{most}")
        return min(enough, key=lambda n: (candidates[n].nbytes, -candidates[n].score))
    if not made:
        errors = [c.refused for c in candidates if c.refused is not None]
        if not any(isinstance(error, BudgetError) for error in errors):
            raise errors[0]
        small = [
            (c.refused.smallest, c.method, c.refused.fix)
            for c in candidates
            if isinstance(c.refused, BudgetError) and c.refused.smallest
        ]
        if not small:
            reasons = [f"{c.method}: {c.refused.what}" for c in candidates if c.refused is not None]
            raise BudgetError(f"no form can be that small: {'; '.join(reasons)}")
        smallest, method, fix = min(small)
        raise BudgetError(f"no form can be that small; the smallest possible is {method}", fix=fix, smallest=smallest)
    return max(made, key=lambda n: (candidates[n].score, -candidates[n].nbytes))


@dataclass(frozen=True)
class _Trial:
    source: PreparedSource
    method: str
    method_options: Mapping[str, Any]
    progress: Progress

    def at(self, options: ConvertOptions) -> Candidate:
        """Fit the form under a budget; refused if it cannot be that small, or does not suit the adapter."""
        try:
            source = replace(self.source, options=options)
            conversion = convert_prepared(source, self.method, self.method_options, progress=self.progress)
        except (BudgetError, OptionError) as error:
            return Candidate(self.method, self.method_options, None, error)
        return Candidate(self.method, self.method_options, conversion)

    def _of_size(self, nbytes: int) -> Candidate:
        return self.at(replace(self.source.options, target_size=nbytes))

    def smallest(self, min_captured: float, bound: int | None) -> Candidate:
        """Find the smallest size that keeps enough, by bisection; below `bound`, if that is given. Without it from the
        size of the factors at 16 bit on. The last one tried where none keeps enough."""
        high = self.source.source_bytes if bound is None else bound - 1
        best = self._of_size(high)
        if not _meets(best, min_captured):
            return best
        high, low = best.nbytes, 0
        while low == 0:  # halve until it is too little
            half = self._of_size(high // 2)
            if _meets(half, min_captured):
                best, high = half, half.nbytes
            else:
                low = max(1, high // 2)
        for _ in range(_STEPS):
            middle = int((low * high) ** 0.5)
            if middle in (low, high):
                break
            candidate = self._of_size(middle)
            if _meets(candidate, min_captured):
                best, high = candidate, candidate.nbytes
            else:
                low = middle
        return best
