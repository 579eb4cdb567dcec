"""ALoRA: how much rank each module deserves, then `lowrank`. An allocator, not a form: its output is a `lowrank` file.

The canonical rank-one components of all targets compete for one budget, of ranks or of bytes. Under input statistics
they are orthogonal in the outputs, so that squared errors add up. Without data the score of a component is its energy
in the metric of the fit, and one sort over all targets is the optimum; on data it is the ablation score of AB-LoRA
(see `ablation`): slopes say who is near the cut, and there the ablation itself decides, in rounds of pruning. Either is
divided by what a component costs, so that a budget only says where one order is cut. A module that deserves more than
its share gets it from the tail of its spectrum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from lrconvert.convert.convert import Conversion, Progress, convert
from lrconvert.convert.options import AllocateOptions, ConvertOptions
from lrconvert.core.dtypes import F64, Array, Stored
from lrconvert.core.errors import BudgetError, OptionError
from lrconvert.io.checkpoint import KnownContent
from lrconvert.lora import svd
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter, LoraTarget, Target
from lrconvert.methods import lowrank
from lrconvert.methods.base import Budget, FitContext

if TYPE_CHECKING:
    from torch import nn

    from lrconvert.convert.ablation import Trial

_NOTHING = 1e-12  # of a target's largest singular value: what is smaller is no component but rounding
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


# --- choosing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Components:
    """All components (n,), by target, then largest first: the number of their target, their number in it, energy
    (0 for what is only rounding), and cost in bits."""

    owner: Array
    place: Array
    energy: F64
    cost: F64

    def order(self, score: F64) -> Array:
        """Best score per cost first; of equal ones the one with more energy per cost, then the first."""
        order: Array = np.lexsort((np.arange(len(score)), -self.energy / self.cost, -score / self.cost))
        return order


def cost_of(target: Target, bits: int) -> int:
    """Bits of a component of that width: below 16 it has two scales; see `lowrank`."""
    return sum(target.matrix_shape) * bits + 32 * (bits < 16)


def components(lora: LoraAdapter, spectra: Sequence[F64], bits: int) -> Components:
    """The components whose singular values are `spectra`, at that width."""
    sizes = [len(s) for s in spectra]
    nonzero = [np.where(s > _NOTHING * s.max(initial=0.0), s, 0.0) for s in spectra]
    costs = [cost_of(pair.target, bits) for pair in lora.targets]
    return Components(
        np.repeat(np.arange(len(sizes)), sizes),
        np.concatenate([np.arange(size) for size in sizes]),
        np.concatenate(nonzero) ** 2,
        np.repeat(np.array(costs, np.float64), sizes),
    )


@dataclass(frozen=True)
class Cut:
    """The cut through an order of components: at `total_rank` components, or where the file is as large as `budget`."""

    parts: Components
    targets: Sequence[Target]
    bits: int
    total_rank: int | None
    budget: Budget | None

    @property
    def amounts(self) -> F64:
        """The share of the budget that each component takes."""
        return np.ones(len(self.parts.cost)) if self.budget is None else self.parts.cost

    def first(self, order: Array, limit: float) -> Array:
        """Mark the components (n,) that are kept if the first ones of `order` are taken while their amounts are within
        `limit`; what is too large is left out, and smaller ones after it may still fit."""
        kept, amounts = np.zeros(len(self.parts.cost), bool), self.amounts
        for c in order:
            if amounts[c] <= limit:
                limit -= amounts[c]
                kept[c] = True
        return kept

    def config(self, kept: Array) -> lowrank.Config:
        counts: Array = np.bincount(self.parts.owner[kept], minlength=len(self.targets))
        return lowrank.Config((self.bits,), tuple((int(n),) for n in counts))

    def meets(self, kept: Array) -> bool:
        """Return true if the components `kept` (n,) are within the budget."""
        if self.budget is None:
            return int(kept.sum()) <= (self.total_rank or 0)
        return self.budget.fits(self.config(kept))

    def final(self, order: Array) -> Array:
        """The components (n,) of the best of `order` that meet the budget. Raises E-BUDGET.

        The overhead of a file depends a little on the ranks, so bytes of payload are found by bisection, as `lowrank`
        does it.
        """
        if self.budget is None:
            return self.first(order, float(self.total_rank or 0))
        low, high = 0.0, 8.0 * self.budget.limit  # `high` is out of reach: a file of only payload
        best: Array | None = None
        while high - low >= 64:
            middle = (low + high) / 2
            kept = self.first(order, middle)
            if not kept.any():
                low = middle
            elif self.budget.fits(self.config(kept)):
                best, low = kept, middle
            else:
                high = middle
        if best is not None:
            return best
        cheapest = order[self.parts.cost[order] == self.parts.cost[order].min()][0]
        best = np.arange(len(self.parts.cost)) == cheapest
        smallest = self.budget.size(self.config(best))
        if smallest > self.budget.limit:
            raise BudgetError(
                f"{self.budget.limit} bytes cannot be reached; the smallest possible file has {smallest} bytes"
            )
        return best


@dataclass(frozen=True, eq=False)
class Choice:
    """The components that are kept (n,), and how many of all had their ablation computed."""

    kept: Array
    ablated: int = 0
    items: int = 0


def by_energy(cut: Cut) -> Choice:
    """The components with most energy per cost."""
    order = cut.parts.order(cut.parts.energy)
    candidates = order[cut.parts.energy[order] > 0]
    return Choice(cut.final(candidates if len(candidates) else order[:1]))  # an all-zero adapter still makes a file


def by_ablation(
    cut: Cut, trial: Trial, rounds: int, exact: int, progress: Callable[[float, str], None] = lambda share, text: None
) -> Choice:
    """The components with the best ablation scores per cost, pruned in `rounds`, each of which leaves the same share.

    In a round the slopes order all that are left, and of the `exact` ones around the cut the ablation itself decides.
    What a component does alone does not depend on the others, and is measured once.
    """
    parts, n = cut.parts, len(cut.parts.cost)
    alive = parts.energy > 0
    goal = float(cut.amounts[by_energy(cut).kept].sum())
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
        alive = cut.final(order) if number == rounds else cut.first(order, limit)
        progress(number / rounds, text)
    return Choice(alive, len(ablated), trial.items)


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
    for pair, two in zip(source.targets, compact.config.ranks, strict=True):
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
    where there is data. What was asked, and the answer, stay in the last four fields."""

    options: AllocateOptions
    trial: OnTrial | None
    progress: Progress
    source: LoraAdapter | None = None
    cut: Cut | None = None
    choice: Choice | None = None
    context: FitContext | None = None

    def __call__(
        self, lora: LoraAdapter, budget: Budget | None, context: FitContext
    ) -> tuple[LoraAdapter, lowrank.Config]:
        options, bits = self.options, int(self.options.bits)
        spectra = [svd.singular_values(pair, context.metric(pair)) for pair in lora.targets]
        cut = Cut(components(lora, spectra, bits), lora.shapes(), bits, options.total_rank, budget)
        choice = by_energy(cut)  # cheap, and says whether the budget can be met
        fitted = lora  # what is kept begins each spectrum: the fit cuts it there
        if self.trial is not None:
            whole = canonical_pairs(lora, context)
            with self.trial(whole) as trial:
                choice = by_ablation(cut, trial, options.rounds, options.exact, self.progress)
            fitted = reduced(whole, cut.parts, choice.kept)
        self.source, self.cut, self.choice, self.context = lora, cut, choice, context
        return fitted, cut.config(choice.kept)

    def allocation(self, done: Conversion, scores: str) -> Allocation:
        """Return the choice, with the conversion that it led to."""
        assert self.source is not None and self.choice is not None
        kept, warnings = int(self.choice.kept.sum()), done.warnings
        total_rank = self.options.total_rank
        if total_rank is not None and kept < total_rank:
            what = f"the LoRA has {kept} components, fewer than the {total_rank} asked for: all are kept"
            warnings += (what,)
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
        raise OptionError("scores on data need the base", fix="give it with --base")

    def trial(whole: LoraAdapter) -> AbstractContextManager[Trial]:
        from lrconvert.convert import ablation
        from lrconvert.live import statistics
        from lrconvert.live.load_model import load_model

        assert data is not None
        live = model
        if live is None:
            assert options.base is not None
            progress(0.0, "loading the base")
            live = load_model(options.base, options.device)
        texts = allocate_options
        batches = statistics.batches(live, options.base, data, texts.length, texts.batch_tokens, texts.max_tokens)
        return ablation.on_trial(live, whole, batches)

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
        {"bits": chooser.options.bits},
        dry_run=dry_run,
        base_content=base_content,
        progress=progress,
        choose=chooser,
    )


def check(options: ConvertOptions, allocate_options: AllocateOptions) -> None:
    """Raise E-OPTION unless exactly one budget is given."""
    budgets = (allocate_options.total_rank, options.target_size, options.target_ratio)
    if sum(budget is not None for budget in budgets) != 1:
        raise OptionError("give one of --total-rank, --target-size and --target-ratio")
