"""The search for a form and an allocation under a byte budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lrconvert.core.dtypes import F64
from lrconvert.core.errors import OptionError
from lrconvert.lora.adapter import LoraAdapter
from lrconvert.methods.base import Budget, FitContext
from lrconvert.methods.shared.options import within
from lrconvert.methods.vblora.coder import row_sums
from lrconvert.methods.vblora.fit import Components, Problem, top_components
from lrconvert.methods.vblora.form import Config, Form, complete, specs, starts
from lrconvert.methods.vblora.plan import FITTED_BITS, VBLoraOptions, common_divisor
from lrconvert.methods.vblora.rows import I64

_FEW = 1 << 14  # codes of a problem for which every hopeful form is fitted, not only the three best
_MANY = 1 << 17  # codes above which none is fitted: samples decide
_WORK = 1e9  # codes times vectors: forms whose fit would take minutes are left out
_HOPE = 0.88  # forms are tried that should keep this share of what the best should
_PASSES = 8
_VECTORS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 32)
_MIXED = ((8, 64), (8, 256), (16, 256), (32, 512))  # short forms with k = 2, (b, h)
_LONG = ((64, 256), (128, 512), (128, 2048), (256, 256), (256, 2048))  # the published regime


@dataclass(frozen=True)
class _Choice:
    """An allocation under an assumed loss per pass: `kept` is the energy it should keep."""

    kept: float
    ranks: tuple[int, ...]
    passes: tuple[int, ...]


class Search:
    """Finds the form and allocation that keep the most energy within the budget.

    All forms are ranked by a rule of thumb for the energy that a pass loses. The best few are tried: small problems are
    fitted, with few sweeps; in large ones a bank is trained on a sample of the very rows that would be coded.
    """

    def __init__(
        self,
        lora: LoraAdapter,
        spectra: Sequence[F64],
        limits: Sequence[int],
        options: VBLoraOptions,
        budget: Budget,
        context: FitContext,
    ) -> None:
        self.lora, self.targets = lora, lora.shapes()
        self.options, self.budget, self.context = options, budget, context
        self.limits = limits
        self.owner = np.repeat(np.arange(len(limits)), limits)  # target of each component
        self.energy = np.concatenate([s[:n] ** 2 for s, n in zip(spectra, limits, strict=True)])
        shapes = np.array([t.matrix_shape for t in self.targets], np.int64)[self.owner]
        self.out, self.inner = shapes[:, 0], shapes[:, 1]
        self.smallest = sorted(
            ((budget.size(config), number, config) for number, config in enumerate(map(self._least, self._forms()))),
            key=lambda entry: entry[:2],
        )

    def best(self) -> Config:
        """Return the config that keeps most. Raise E-BUDGET if nothing fits, E-OPTION if no form suits the options."""
        if not self.smallest:
            raise OptionError("no vector length of those tried suits these options", fix="give --vector-length")
        size, _, least = self.smallest[0]
        within(self.budget, least)
        payload = sum(spec.nbytes for spec in specs(least, self.targets))
        self.overhead = 8 * (size - payload) + 2 * len(self.targets)  # bits, about
        fills = [self._fill(form, self._rule_of_thumb(form)) for form in self._hopeful()]
        candidates = [filled for filled in fills if filled is not None]
        if len(candidates) > 1:
            most = np.array([config.ranks for _, config in candidates]).max(0)
            pairs = zip(self.lora.targets, most, strict=True)
            factors = [top_components(pair, int(rank), self.context) for pair, rank in pairs]
            codes = max(starts(config, self.targets)[-1][2] for _, config in candidates)
            if codes > _FEW:
                sampled = [self._sample(config, factors) for _, config in candidates]
                candidates = sorted(sampled, key=lambda entry: -entry[0])[:3]
            if codes <= _MANY:
                candidates = [self._try(config, factors) for _, config in candidates]
        return max(candidates, key=lambda entry: entry[0], default=(0.0, least))[1]

    def _hopeful(self) -> list[Form]:
        """The forms that should keep nearly as much as the best, best first; one for each number of vectors."""
        ranked: dict[int, tuple[float, Form]] = {}
        for _, _, config in self.smallest:
            form = config.form
            choice = self._allocate(form, self._rule_of_thumb(form), self._room(form))
            if choice is not None and choice.kept > ranked.get(form.num_vectors, (0.0, form))[0]:
                ranked[form.num_vectors] = choice.kept, form
        least = _HOPE * max((kept for kept, _ in ranked.values()), default=0.0)
        return [form for kept, form in sorted(ranked.values(), key=lambda entry: -entry[0]) if kept >= least]

    def _forms(self) -> Iterator[Form]:
        """Every form that the options leave open."""
        options = self.options
        b, h, k = options.vector_length, options.num_vectors, options.top_k
        shapes = [(length, vectors, 1) for length in _LENGTHS for vectors in _VECTORS]
        shapes += [(length, vectors, 2) for length, vectors in (*_MIXED, *_LONG)]
        allowed = dict.fromkeys((b or i, h or j, k or (min(n, h) if h else n)) for i, j, n in shapes)
        for length, vectors, top_k in allowed:
            if top_k > vectors or (options.peft_compatible and common_divisor(self.targets) % length):
                continue
            if b is None and top_k == 1 and not 0.3 <= np.log2(vectors) / length <= 3:
                continue
            for bits in FITTED_BITS if options.bits is None else (options.bits,):
                if options.bits is None and length < {16: 0, 8: 4, 4: 32}[bits]:
                    continue  # the scales eat what the bits save
                form = options.form(length, vectors, top_k, bits)
                if h is None and vectors > 4 and 8 * self.budget.limit / form.code_bits * vectors > _WORK:
                    continue
                yield form

    def _least(self, form: Form) -> Config:
        """The smallest Config of a form."""
        if self.options.rank is not None or self.options.peft_compatible:
            ranks = [n if self.options.rank is not None else 1 for n in self.limits]
        else:
            ranks = [0] * len(self.limits)
            ranks[int(self.owner[np.argmin(form.row_bits(self.inner) + form.row_bits(self.out))])] = 1
        return complete(form, self.targets, ranks, ())

    def _room(self, form: Form) -> float:
        """Bits that codes and gains may take, about."""
        return 8.0 * self.budget.limit - form.bank_bits - self.overhead

    def _allocate(self, form: Form, loss: float, bits: float) -> _Choice | None:
        """The passes that keep the most energy if each leaves the share `loss`, at no more than `bits`; None if even
        the least does not fit. A component of energy e with p and q passes on its sides keeps
        e (1 - loss^p) (1 - loss^q)."""
        cost_a, cost_b = form.row_bits(self.inner), form.row_bits(self.out)
        if self.options.peft_compatible:
            return self._uniform(cost_a + cost_b, loss, bits)
        most = (self.options.passes or _PASSES) if form.gains else 1
        steps = [(p, q) for p in range(1, most + 1) for q in range(1, most + 1) if abs(p - q) <= 2]
        if self.options.rank is None:
            steps.insert(0, (0, 0))
        p, q = np.array(steps).T
        cost = cost_a[:, None] * p + cost_b[:, None] * q
        gain = self.energy[:, None] * ((1 - loss**p) * (1 - loss**q))
        if cost[:, 0].sum() > bits:
            return None
        taken = self._spend(cost, gain, bits)
        return self._choice(p[taken], q[taken], float(gain[np.arange(len(cost)), taken].sum()))

    def _spend(self, cost: F64, gain: F64, bits: float) -> I64:
        """The step that each component takes, of those in the columns of `cost` and `gain`: what pays at one common
        price per bit (Lagrange); what is left of the `bits` is spent greedily."""
        everyone = np.arange(len(cost))
        high = 1.01 * float((gain[:, -1] / cost[:, min(1, cost.shape[1] - 1)]).max()) + 1e-300  # nobody buys
        low = 1e-12 * high
        taken = np.zeros(len(cost), np.int64)
        for _ in range(28):
            price = np.sqrt(low * high)
            now = (gain - price * cost).argmax(1)
            if cost[everyone, now].sum() <= bits:
                taken, high = now, price
            else:
                low = price
        for _ in range(4):
            left = bits - cost[everyone, taken].sum()
            more_gain = gain - gain[everyone, taken][:, None]
            more_cost = cost - cost[everyone, taken][:, None]
            ratio = np.where((more_cost > 0) & (more_cost <= left), more_gain / np.maximum(more_cost, 1), 0)
            best = ratio.argmax(1)
            for who in np.argsort(-ratio[everyone, best], kind="stable"):
                extra = more_cost[who, best[who]]
                if ratio[who, best[who]] > 0 and extra <= left:
                    taken[who] = best[who]
                    left -= extra
        return taken

    def _choice(self, p: I64, q: I64, kept: float) -> _Choice | None:
        """In every target the passes go to the largest components: they are sorted, larger first."""
        ranks, passes = [], []
        start = 0
        for limit in self.limits:
            part = slice(start, start + limit)
            used = np.flatnonzero(p[part])
            order = used[np.argsort(-(p[part] + q[part])[used], kind="stable")]
            ranks.append(len(order))
            passes += [*p[part][order].tolist(), *q[part][order].tolist()]
            start += limit
        return _Choice(kept, tuple(ranks), tuple(passes)) if passes else None

    def _uniform(self, cost: F64, loss: float, bits: float) -> _Choice | None:
        """One rank for all targets, as large as fits (or the one asked for)."""
        number = np.concatenate([np.arange(n) for n in self.limits])  # of each component within its target
        rank = 0
        while rank < self.limits[0] and cost[number <= rank].sum() <= bits:
            rank += 1
        if rank == 0 or (self.options.rank is not None and rank < self.limits[0]):
            return None
        kept = float(self.energy[number < rank].sum()) * (1 - loss) ** 2
        return _Choice(kept, (rank,) * len(self.limits), (1,) * (2 * rank * len(self.limits)))

    def _try(self, config: Config, factors: Sequence[Components]) -> tuple[float, Config]:
        """(energy kept, Config) by a short fit."""
        problem = Problem(self.lora, config, replace(self.context, device="cpu"), factors)
        refit = problem.refit(problem.train(self.context.seed, 3, 1)[0])
        for _ in range(3):
            refit.sweep(0)
            refit.sweep(1)
            error = refit.improve_bank(refit.error())
        return refit.energy - error, config

    def _sample(self, config: Config, factors: Sequence[Components]) -> tuple[float, Config]:
        """(energy kept, Config) for the loss per pass of a bank trained on a sample of the rows."""
        problem = Problem(self.lora, config, replace(self.context, device="cpu"), factors)
        h, everything = config.form.num_vectors, int(problem.rows.starts[-1])
        enough = max(16 * h, 128 * len(problem.rows.counts) // config.form.vector_length)  # for bank, and gains
        coder, x = problem.train(self.context.seed, 4, 1, max(_FEW // 2, enough))
        power = row_sums(coder.squares(x), coder.rows.counts) * problem.weight
        lost = coder.trace[-1] / max(power.sum(), 1e-300)
        low, high = 0.0, 1.0  # bisection: the loss per pass that explains what all passes together leave
        for _ in range(30):
            middle = (low + high) / 2
            above = float(power @ middle**coder.rows.passes) >= lost * power.sum()
            low, high = (low, middle) if above else (middle, high)
        # A bank fits its own sample better than all the data, by about its share of the sub-vectors.
        loss = min(1.0, high * (1 - h / max(everything, 2 * h)) / (1 - h / max(len(x), 2 * h)))
        return self._fill(config.form, loss) or (0.0, config)

    def _fill(self, form: Form, loss: float) -> tuple[float, Config] | None:
        """(energy kept, Config) of the largest allocation whose file fits the budget."""
        room = self._room(form)
        best: tuple[float, Config] | None = None
        for _ in range(8):
            choice = self._allocate(form, loss, room)
            if choice is None:
                break
            config = complete(form, self.targets, choice.ranks, choice.passes)
            spare = self.budget.limit - self.budget.size(config)
            if spare >= 0 and (best is None or choice.kept > best[0]):
                best = choice.kept, config
            if 0 <= spare < 16:
                break
            room += 8 * spare if spare < 0 else 4 * spare
        return best

    def _rule_of_thumb(self, form: Form) -> float:
        """The share of a row's energy that one pass loses: the Gaussian rate-distortion bound at a rate cut by an
        efficiency that was measured on independent Gaussian numbers (0.81 at 16 vectors, 0.91 at 256, 0.94 at 1024)."""
        h, b, k = form.num_vectors, form.vector_length, form.top_k
        efficiency = (1 - 0.3 * h ** (-1 / 4.5)) * (1.0 if k == 1 else 0.85) * (1.0 if h > 2 * b or b == 1 else 0.7)
        loss = float(2.0 ** (-2 * efficiency * (form.code_bits - (k > 1) * np.log2(k)) / b))
        codes = 8.0 * self.budget.limit / form.code_bits
        loss *= max(0.5, 1 - h / max(codes, 1.0))  # the bank itself carries information
        return min(1.0, loss + {16: 0.0, 8: 1.5e-4, 4: 0.012}[form.bits] + (0.0 if form.gains else 0.1 * (1 - loss)))
