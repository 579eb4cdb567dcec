"""ALoRA: how much rank each module deserves, then `lowrank`. An allocator, not a form: its output is a `lowrank` file.

The canonical rank-one components of all targets compete for one budget, of ranks or of bytes. Under input statistics
they are orthogonal in the outputs, so that squared errors add up. Without data the score of a component is its energy
in the metric of the fit, and under a budget of bytes what the coding of `lowrank` keeps is the allocation; on data it
is the ablation score of AB-LoRA (see `ablation`): slopes say who is near the cut, and there the ablation itself
decides, in rounds of pruning. Scores count as far as rounding leaves a component, and are divided by what it costs, so
that a budget only says where one order is cut. What is kept is then coded, within the budget, by `lowrank`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from lrconvert.convert.convert import Conversion, Progress, convert
from lrconvert.convert.options import AllocateOptions, ConvertOptions
from lrconvert.core.dtypes import F64, Array, Stored
from lrconvert.core.errors import BudgetError, OptionError
from lrconvert.core.notices import Notice
from lrconvert.core.wording import spelled
from lrconvert.io.checkpoint import KnownContent
from lrconvert.lora import svd
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter, LoraTarget, Target
from lrconvert.methods import base as methods
from lrconvert.methods import lowrank
from lrconvert.methods.base import Budget, FitContext
from lrconvert.methods.lowrank import components as lowrank_components
from lrconvert.methods.lowrank import rounding
from lrconvert.methods.lowrank.form import Config
from lrconvert.methods.lowrank.plan import LowRankOptions

if TYPE_CHECKING:
    from torch import nn

    from lrconvert.convert.ablation import Trial

_NOTHING = 1e-12  # of a target's largest singular value: what is smaller is no component but rounding
_BACKWARD = 3  # forward passes that slopes take as long as
_EXACT = 3  # passes of an ablation: with all others, without it, and alone
_LEAST_EXACT = 4  # ablations of a round that time is kept for
_SHARE = 0.9  # of the progress: choosing on data; the rest is the fit


@dataclass(frozen=True)
class Module:
    """The rank of one module before and after. `kind`: its name with a star for every number, which modules of one kind
    share; `layer`: the numbers."""

    name: str
    kind: str
    layer: tuple[int, ...]
    before: int
    after: int


@dataclass(frozen=True)
class Allocation(Conversion):
    """A conversion to `lowrank` with ranks by score. `modules` are sorted by kind and layer; `scores` says what was
    measured, on `items` answers of the data; `ablated`: how many components had their ablation computed."""

    modules: tuple[Module, ...]
    scores: str
    items: int
    ablated: int

    __repr__ = Conversion.__repr__


# --- choosing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Components:
    """All components (n,), by target, then largest first: the number of their target, their number in it, energy
    (0 for what is only rounding), cost in bits, and the `share` of each that is left when it is rounded."""

    owner: Array
    place: Array
    energy: F64
    cost: F64
    share: F64

    def order(self, score: F64) -> Array:
        """Best score per cost first; of equal ones the one with more energy per cost, then the first."""
        rate = self.share / self.cost
        order: Array = np.lexsort((np.arange(len(score)), -self.energy * rate, -score * rate))
        return order


def components(lora: LoraAdapter, context: FitContext, coded: Config | None = None) -> Components:
    """Return the components of a LoRA. They cost what they take as `coded` rounds, or as many bits as they have
    numbers."""
    spectra = [svd.singular_values(pair, context.metric(pair)) for pair in lora.targets]
    sizes = [len(s) for s in spectra]
    nonzero = [np.where(s > _NOTHING * s.max(initial=0.0), s, 0.0) for s in spectra]
    owner = np.repeat(np.arange(len(sizes)), sizes)
    cost, share = (
        np.array([sum(pair.target.matrix_shape) for pair in lora.targets], np.float64)[owner],
        np.ones(len(owner)),
    )
    if coded is not None:
        assert coded.quantizer is not None
        rounded = rounding.round_all(lowrank_components.components(lora, sizes, context), coded.quantizer.step)
        cost, share = rounded.bits + rounding.SIDE_BITS, rounded.share
    place = np.concatenate([np.arange(size) for size in sizes])
    return Components(owner, place, np.concatenate(nonzero) ** 2 * (share > 0), cost, share)


def _kept(parts: Components, coded: Config) -> Array:
    """Mark the components (n,) that `coded` keeps."""
    assert coded.quantizer is not None
    kept, firsts = np.zeros(len(parts.owner), bool), np.searchsorted(parts.owner, np.arange(len(coded.counts)))
    for first, places in zip(firsts, coded.quantizer.kept, strict=True):
        kept[first + np.array(places, np.int64)] = True
    return kept


@dataclass(frozen=True)
class Cut:
    """The cut through an order of components: at `total_rank` components, or else at `bits` of cost."""

    parts: Components
    total_rank: int | None
    bits: float = 0.0

    @property
    def amounts(self) -> F64:
        """The share of the budget that each component takes."""
        return self.parts.cost if self.total_rank is None else np.ones(len(self.parts.cost))

    @property
    def limit(self) -> float:
        """The budget, in the unit of `amounts`."""
        return self.bits if self.total_rank is None else float(self.total_rank)

    def first(self, order: Array, limit: float) -> Array:
        """Mark the components (n,) that are kept if the first ones of `order` are taken while their amounts are within
        `limit`; what is too large is left out, and smaller ones after it may still fit."""
        kept, amounts = np.zeros(len(self.parts.cost), bool), self.amounts
        for c in order:
            if amounts[c] <= limit:
                limit -= amounts[c]
                kept[c] = True
        return kept


@dataclass(frozen=True, eq=False)
class Choice:
    """The components that are kept (n,), and how many of all had their ablation computed."""

    kept: Array
    ablated: int = 0
    items: int = 0
    cut: str = ""  # what was left out for want of time


def by_energy(cut: Cut) -> Choice:
    """The components with most energy per cost."""
    order = cut.parts.order(cut.parts.energy)
    candidates = order[cut.parts.energy[order] > 0]
    return Choice(cut.first(candidates if len(candidates) else order[:1], cut.limit))  # all zero: it still makes a file


@dataclass(frozen=True)
class Time:
    """The `minutes` that an ablation in `rounds` may take, and how its passes over the data share them."""

    minutes: float
    rounds: int

    @classmethod
    def of(cls, options: AllocateOptions) -> Time:
        """Return the time that `options` give."""
        return cls(options.budget_minutes, options.rounds)

    @property
    def _slopes(self) -> int:
        return 1 + _BACKWARD * (self.rounds + 1)

    @property
    def of_a_pass(self) -> float:
        """The seconds of one forward pass over the data at most."""
        return 60 * self.minutes / (self._slopes + _EXACT * self.rounds * _LEAST_EXACT)

    def exact(self, wanted: int, seconds: float) -> int:
        """Return how many of the `wanted` ablations in each round there is time for, a pass taking `seconds`."""
        left = 60 * self.minutes - self._slopes * seconds
        return min(wanted, max(0, int(left / (_EXACT * self.rounds * max(seconds, 1e-9)))))

    def needed(self, exact: int, seconds: float) -> float:
        """Return the minutes that all of it takes."""
        return (self._slopes + _EXACT * self.rounds * exact) * seconds / 60


def by_ablation(
    cut: Cut, trial: Trial, rounds: int, exact: int, progress: Callable[[float, str], None] = lambda share, text: None
) -> Choice:
    """The components with the best ablation scores per cost, pruned in `rounds`, each of which leaves the same share.

    In a round the slopes order all that are left, and of the `exact` ones around the cut the ablation itself decides.
    What a component does alone does not depend on the others, and is measured once.
    """
    parts, n, goal = cut.parts, len(cut.parts.cost), cut.limit
    alive = parts.energy > 0
    whole = float(cut.amounts[alive].sum())
    if goal >= whole:
        return Choice(alive) if alive.any() else by_energy(cut)
    alone = trial.slopes(np.zeros(n, bool))
    steps, ablated = rounds * (exact + 1), set[int]()
    for number in range(1, rounds + 1):
        text, finished = f"round {number} of {rounds}", (number - 1) * (exact + 1)
        order = parts.order(trial.slopes(alive) + alone)
        order = order[alive[order]]
        limit = whole * (goal / whole) ** (number / rounds)
        out = np.flatnonzero(~cut.first(order, limit)[order])
        if len(out):
            start = max(0, int(out[0]) - exact // 2)
            near = slice(start, start + exact)
            scores = np.zeros(n)
            for c in map(int, order[near]):
                finished += 1
                progress(finished / steps, text)
                scores[c] = trial.ablation(alive, c)
                ablated.add(c)
            better = np.argsort(parts.order(scores))  # the place of each component among all
            order[near] = sorted(order[near], key=better.__getitem__)
        alive = cut.first(order, limit)
        progress(number / rounds, text)
    return Choice(alive, len(ablated), trial.items) if alive.any() else by_energy(cut)


# --- the LoRA in components -----------------------------------------------------------------------------------------


def canonical_pairs(lora: LoraAdapter, context: FitContext) -> LoraAdapter:
    """The same update with its components as rows of A (r, in) and columns of B (out, r), float32, largest first; under
    statistics orthogonal in the outputs. The scale is 1."""
    return replace(lora, targets=tuple(pair_of(p.target, *_balanced(p, context)) for p in lora.targets))


def _balanced(pair: LoraTarget, context: FitContext) -> tuple[F64, F64]:
    return svd.balanced(svd.svd(pair, context.metric(pair)))


def pair_of(target: Target, a: Array, b: Array) -> LoraTarget:
    """``b @ a`` in float32: `a` (r, in), `b` (out, r)."""
    one, two = (Stored("F32", np.ascontiguousarray(x, np.float32)) for x in (a, b))
    return LoraTarget(target, one, two, 1.0)


def reduced(whole: LoraAdapter, parts: Components, kept: Array) -> LoraAdapter:
    """Only the `kept` components of a LoRA of `canonical_pairs`; a target may be left with rank 0."""
    pairs = []
    for t, pair in enumerate(whole.targets):
        which = parts.place[kept & (parts.owner == t)]
        pairs.append(pair_of(pair.target, pair.A[which], pair.B[:, which]))
    return replace(whole, targets=tuple(pairs))


def modules(source: LoraAdapter, compact: CompactAdapter) -> tuple[Module, ...]:
    """Ranks in the LoRA `source` and in the `lowrank` adapter that was made of it."""
    rows = []
    ranks = methods.get(compact.method).ranks(compact.config, compact.targets)
    for pair, two in zip(source.targets, ranks, strict=True):
        target, one = pair.target, pair.rank
        name, view = target.name, target.view.text
        if target.view.kind not in ("matrix", "transposed"):
            name += f".{view}"
        words = name.replace(":", ".").split(".")
        kind = ".".join("*" if word.isdigit() else word for word in words)
        rows.append(Module(name, kind, tuple(int(word) for word in words if word.isdigit()), one, two))
    return tuple(sorted(rows, key=lambda module: (module.kind, module.layer)))


# --- the conversion -------------------------------------------------------------------------------------------------


OnTrial = Callable[[LoraAdapter], AbstractContextManager["Trial"]]


@dataclass(eq=False)
class Chooser:
    """Choose the components to keep (`lrconvert.convert.convert.Choose`). `trial` puts a LoRA of components on trial
    where there is data. The answer stays in the last two fields."""

    options: AllocateOptions
    trial: OnTrial | None
    progress: Progress
    source: LoraAdapter | None = None
    choice: Choice | None = None

    def __call__(self, lora: LoraAdapter, budget: Budget | None, context: FitContext) -> tuple[LoraAdapter, Config]:
        self.source, form = lora, lowrank.METHOD
        given = LowRankOptions(bits=self.options.bits)
        coded = None if budget is None else form.plan(lora, given, budget, context)  # says whether it can be met
        if coded is not None and self.trial is None:
            self.choice = Choice(np.zeros(0, bool))
            return lora, coded
        parts = components(lora, context, coded)
        bits = 0.0 if coded is None else float(parts.cost[_kept(parts, coded)].sum())
        cut = Cut(parts, self.options.total_rank, bits)
        whole = canonical_pairs(lora, context)
        if self.trial is None:
            self.choice = by_energy(cut)
        else:
            with self.trial(whole) as trial:
                self.choice = self._by_ablation(cut, trial)
        fitted = reduced(whole, parts, self.choice.kept)
        try:
            return fitted, form.plan(fitted, given, budget, context)
        except BudgetError:  # in a file that small there is only one choice
            if coded is None:
                raise
            return lora, coded

    def _by_ablation(self, cut: Cut, trial: Trial) -> Choice:
        """Choose by ablation, of as many texts and components as there is time for."""
        options, limit = self.options, Time.of(self.options)
        exact = limit.exact(options.exact, trial.seconds)
        self.progress(0.0, f"{limit.needed(exact, trial.seconds):.1f} minutes by estimate")
        choice = by_ablation(cut, trial, options.rounds, exact, self.progress)
        if exact == options.exact and not trial.left_out:
            return choice
        used, count = len(trial.questions), len(trial.questions) + trial.left_out
        what = f"{used} of {count} batches of texts and {exact} of {options.exact} ablations a round were used"
        more = f"within {limit.minutes:g} minutes; {spelled('budget_minutes')} gives more"
        return replace(choice, cut=f"{what}, to stay {more}")

    def allocation(self, done: Conversion, scores: str) -> Allocation:
        """Return the choice, with the conversion that it led to."""
        assert self.source is not None and self.choice is not None
        warnings, asked, ranks = done.warnings, self.options.total_rank, methods.get(done.compact.method).ranks
        kept = sum(ranks(done.compact.config, done.compact.targets))
        if asked is not None and kept < asked:
            warnings += (f"{kept} of the {asked} components asked for are kept: there are no more that coding leaves",)
        if self.choice.cut:
            warnings += (self.choice.cut,)
        return Allocation(
            **{**vars(done), "warnings": warnings},
            modules=modules(self.source, done.compact),
            scores=scores,
            items=self.choice.items,
            ablated=self.choice.ablated,
        )


def allocate(
    lora: LoraAdapter,
    options: ConvertOptions,
    allocate_options: AllocateOptions,
    *,
    model: nn.Module | None = None,
    dry_run: bool = False,
    base_content: KnownContent | None = None,
    progress: Progress,
) -> Allocation:
    """Allocate ranks and convert; see `lrconvert.api.allocate`. `model` is the base where it is a live model."""
    check(options, allocate_options)
    data = allocate_options.data
    if data is not None and model is None and options.base is None:
        raise OptionError("scores on data need the base", fix=f"give it with {spelled('base', ...)}")

    def trial(whole: LoraAdapter) -> AbstractContextManager[Trial]:
        from lrconvert.convert import ablation
        from lrconvert.live import statistics
        from lrconvert.live.load_model import load_model
        from lrconvert.live.texts import Packing

        assert data is not None
        live = model
        if live is None:
            assert options.base is not None
            bound = f"{allocate_options.budget_minutes:g} minutes ({spelled('budget_minutes')})"
            progress(0.0, Notice(f"components are scored on data for at most {bound}"))
            progress(0.0, "loading the base")
            live = load_model(options.base, options.device, adapter=lora)
        texts = allocate_options
        packing = Packing("", texts.length, texts.batch_tokens, texts.max_tokens, answers=True)
        batches = statistics.batches(live, options.base, data, packing, progress)
        return ablation.on_trial(live, whole, batches, Time.of(texts).of_a_pass)

    def choosing(share: float, text: str) -> None:
        progress(_SHARE * share, text)

    def fitting(share: float, text: str) -> None:
        progress(share if data is None else _SHARE + (1 - _SHARE) * share, text)

    chooser = Chooser(allocate_options, None if data is None else trial, choosing)
    conversion = converted(lora, options, chooser, dry_run=dry_run, base_content=base_content, progress=fitting)
    scores = "energy" if options.statistics is None else "energy of outputs"
    return chooser.allocation(conversion, scores if data is None else "ablation")


def converted(
    lora: LoraAdapter,
    options: ConvertOptions,
    chooser: Chooser,
    *,
    dry_run: bool = False,
    base_content: KnownContent | None = None,
    progress: Progress,
) -> Conversion:
    """Convert `lora` to what `chooser` chooses; nothing is random here."""
    return convert(
        lora,
        lowrank.METHOD.id,
        replace(options, seed=0),
        {} if chooser.options.total_rank is None else {"bits": chooser.options.bits},  # none: the default ratio
        dry_run=dry_run,
        base_content=base_content,
        progress=progress,
        choose=chooser,
    )


def check(options: ConvertOptions, allocate_options: AllocateOptions) -> None:
    """Raise E-OPTION for more than one budget."""
    budgets = (allocate_options.total_rank, options.target_size, options.target_ratio)
    if sum(budget is not None for budget in budgets) > 1:
        raise OptionError(
            f"give one of {spelled('total_rank')}, {spelled('target_size')} and {spelled('target_ratio')}"
        )
    if not 0 < allocate_options.budget_minutes < math.inf:
        raise OptionError(f"{spelled('budget_minutes')} is {allocate_options.budget_minutes:g}; it must be above 0")
    if allocate_options.bits is not None and not any(budgets):
        raise OptionError(
            f"{spelled('bits')} goes with {spelled('total_rank')}", fix=f"give that too, or leave out {spelled('bits')}"
        )
