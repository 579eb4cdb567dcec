"""The search for a form and an allocation under a byte budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lrconvert.core.dtypes import F64
from lrconvert.core.errors import OptionError
from lrconvert.core.wording import spelled
from lrconvert.lora.adapter import LoraAdapter
from lrconvert.methods.base import Budget, FitContext
from lrconvert.methods.shared.options import within
from lrconvert.methods.vblora.bank import alternate
from lrconvert.methods.vblora.coder import row_sums
from lrconvert.methods.vblora.fit import Components, Problem, top_components
from lrconvert.methods.vblora.form import Config, Form, complete, specs
from lrconvert.methods.vblora.plan import FITTED_BITS, VBLoraOptions, common_divisor
from lrconvert.methods.vblora.rows import I64

_SAMPLE = 1 << 16  # numbers on which a form is tried, or 16 sub-vectors per vector if that is more
_ROUNDS = 4  # alternations of codes and bank on them
_VECTORS_TRIED, _SCALARS_TRIED = 4, 2  # forms
_BEAM = (4, 16)  # partial codes kept when the loss is measured: the more, the fewer vectors there are
_HEADERS = 64  # bytes by which the headers of forms may differ
_WORK = 1e9  # codes times vectors: forms whose fit would take minutes are left out
_PASSES = 8
_VECTORS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 32)
_MIXED = ((8, 64), (8, 256), (16, 256), (32, 512))  # short forms with k = 2, (b, h)
_LONG = ((64, 256), (128, 512), (128, 2048), (256, 256), (256, 2048))  # the published regime


@dataclass(frozen=True)
class _Choice:
    """Passes of each component's rows, `p` of A's and `q` of B's; `kept` is the energy that they should keep."""

    kept: float
    p: I64
    q: I64


class Search:
    """Finds the form and allocation that keep the most energy within the budget.

    All forms are ranked by a rule of thumb for the energy that a pass loses. Among vectors it was measured to find the
    best form to a thousandth of the energy. Scalars (b = 1) do better than it says where rows are far from Gaussian:
    so the best forms of vectors and of scalars are tried on a sample of the very rows that they would code.
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
        shapes = np.array([t.matrix_shape for t in self.targets], np.int64).reshape(-1, 2)
        distinct, shape = np.unique(shapes, axis=0, return_inverse=True)
        self.out, self.inner = distinct.T  # of each distinct shape
        self.shape = shape.reshape(-1)[self.owner]  # which of them, for each component
        self.forms = list(self._forms())

    def best(self) -> Config:
        """Return the config that keeps most. Raise E-BUDGET if nothing fits, E-OPTION if no form suits the options."""
        if not self.forms:
            raise OptionError(
                "no vector length of those tried suits these options", fix=f"give {spelled('vector_length', ...)}"
            )
        size, least = self._smallest()
        within(self.budget, least)
        self.overhead = 8 * (size - self._payload(least)) + 2 * len(self.targets)  # bits, about
        fills = [self._fill(form, self._rule_of_thumb(form)) for form in self._hopeful()]
        candidates = [filled for filled in fills if filled is not None]
        if len(candidates) > 1:
            most = np.array([config.ranks for _, config in candidates]).max(0)
            pairs = zip(self.lora.targets, most, strict=True)
            factors = [top_components(pair, int(rank), self.context) for pair, rank in pairs]
            candidates = [self._sample(config, factors) for _, config in candidates]
        return max(candidates, key=lambda entry: entry[0], default=(0.0, least))[1]

    def _hopeful(self) -> list[Form]:
        """The forms of vectors and of scalars which should keep most, each with another number of vectors."""
        ranked: dict[tuple[bool, int], tuple[float, Form]] = {}
        for form in self.forms:
            choice = self._allocate(form, self._rule_of_thumb(form), self._room(form))
            kind = form.vector_length == 1, form.num_vectors
            if choice is not None and choice.kept > ranked.get(kind, (0.0, form))[0]:
                ranked[kind] = choice.kept, form
        best = [form for _, form in sorted(ranked.values(), key=lambda entry: -entry[0])]
        vectors, scalars = ([form for form in best if (form.vector_length == 1) == one] for one in (False, True))
        return vectors[:_VECTORS_TRIED] + scalars[:_SCALARS_TRIED]

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

    def _smallest(self) -> tuple[int, Config]:
        """The smallest file, and its Config; the header is written only for those that may be the one."""
        configs = [self._least(form) for form in self.forms]
        payloads = [(self._payload(config), number, config) for number, config in enumerate(configs)]
        most = min(payload for payload, _, _ in payloads) + _HEADERS
        sizes = [(self.budget.size(config), number, config) for payload, number, config in payloads if payload <= most]
        size, _, least = min(sizes, key=lambda entry: entry[:2])
        return size, least

    def _payload(self, config: Config) -> int:
        return sum(spec.nbytes for spec in specs(config, self.targets))

    def _least(self, form: Form) -> Config:
        """The smallest Config of a form."""
        if self.options.rank is not None or self.options.peft_compatible:
            ranks = [n if self.options.rank is not None else 1 for n in self.limits]
        else:
            ranks = [0] * len(self.limits)
            cost = form.row_bits(self.inner) + form.row_bits(self.out)
            ranks[int(self.owner[np.argmin(cost[self.shape])])] = 1
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
            return self._uniform((cost_a + cost_b)[self.shape], loss, bits)
        most = (self.options.passes or _PASSES) if form.gains else 1
        steps = [(p, q) for p in range(1, most + 1) for q in range(1, most + 1) if abs(p - q) <= 2]
        if self.options.rank is None:
            steps.insert(0, (0, 0))
        p, q = np.array(steps).T
        cost = cost_a[:, None] * p + cost_b[:, None] * q
        gain = (1 - loss**p) * (1 - loss**q)
        room = bits - float(cost[self.shape, 0].sum())
        if room < 0:
            return None
        taken = self._spend(cost, gain, room)
        return _Choice(float(self.energy @ gain[taken]), p[taken], q[taken])

    def _spend(self, cost: F64, gain: F64, room: float) -> I64:
        """The step (column) that each component takes if steps (shapes, steps) cost `cost` and keep `gain` (steps,) of
        its energy: the best ones for their price on the concave hull of gain over cost, until `room` is spent; then
        what still fits."""
        hull = _hull(cost, gain)
        more_cost = np.diff(np.take_along_axis(cost, hull, 1), axis=1)
        worth = np.diff(gain[hull], axis=1) / np.maximum(more_cost, 1)
        value = self.energy[:, None] * worth[self.shape]
        who, place = np.nonzero(value > 0)
        order = np.argsort(-value[who, place], kind="stable")
        who, place = who[order], place[order]
        price = more_cost[self.shape[who], place]
        number = int(np.searchsorted(np.cumsum(price), room, side="right"))
        taken = np.bincount(who[:number], minlength=len(self.energy))
        room -= float(price[:number].sum())
        rest = np.arange(number, len(who))
        while len(rest := rest[price[rest] <= room]):
            ready = np.flatnonzero(taken[who[rest]] == place[rest])
            if len(ready) == 0:
                break
            chosen = rest[ready[0]]
            taken[who[chosen]] += 1
            room -= float(price[chosen])
            rest = rest[ready[0] + 1 :]
        return np.asarray(hull[self.shape, taken], np.int64)

    def _config(self, form: Form, choice: _Choice) -> Config | None:
        """The Config of a choice. In every target the passes go to the largest components: they are sorted, larger
        first."""
        used = np.flatnonzero(choice.p)
        used = used[np.lexsort((-(choice.p + choice.q)[used], self.owner[used]))]
        ranks = np.bincount(self.owner[used], minlength=len(self.limits))
        place = np.arange(len(used)) + np.repeat(np.cumsum(ranks) - ranks, ranks)  # A's rows lie before B's
        passes = np.empty(2 * len(used), np.int64)
        passes[place], passes[place + np.repeat(ranks, ranks)] = choice.p[used], choice.q[used]
        return complete(form, self.targets, ranks.tolist(), passes.tolist()) if len(used) else None

    def _uniform(self, cost: F64, loss: float, bits: float) -> _Choice | None:
        """One rank for all targets, as large as fits (or the one asked for)."""
        number = np.concatenate([np.arange(n) for n in self.limits])  # of each component within its target
        rank = 0
        while rank < self.limits[0] and cost[number <= rank].sum() <= bits:
            rank += 1
        if rank == 0 or (self.options.rank is not None and rank < self.limits[0]):
            return None
        kept = float(self.energy[number < rank].sum()) * (1 - loss) ** 2
        one = (number < rank).astype(np.int64)
        return _Choice(kept, one, one)

    def _sample(self, config: Config, factors: Sequence[Components]) -> tuple[float, Config]:
        """(energy kept, Config) for the loss per pass of a bank trained on a sample of the rows."""
        problem = Problem(self.lora, config, replace(self.context, device="cpu"), factors)
        h, everything = config.form.num_vectors, int(problem.rows.starts[-1])
        numbers = max(_SAMPLE, 128 * len(problem.rows.counts))  # enough for the bank, and for the gains
        enough = max(16 * h, numbers // config.form.vector_length)
        coder, x = problem.train(self.context.seed, _ROUNDS, enough)
        coder.beam = int(np.clip(1024 // h, *_BEAM))
        power = row_sums(coder.squares(x), coder.rows.counts) * problem.weight
        lost = alternate(coder, x, problem.weight, 0) / max(power.sum(), 1e-300)
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
            config = self._config(form, choice)
            if config is None:
                break
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


def _hull(cost: F64, gain: F64) -> I64:
    """Return which steps lie on the upper concave hull of gain over cost, from the first on, for each row of `cost`
    (shapes, steps): (shapes, places), its last step repeated."""
    places = [np.zeros(len(cost), np.int64)]
    while True:
        last = places[-1]
        more = cost - np.take_along_axis(cost, last[:, None], 1)
        slope = np.where(more > 0, (gain - gain[last][:, None]) / np.maximum(more, 1), -1.0)
        best = slope.argmax(1)
        best = np.where(np.take_along_axis(slope, best[:, None], 1)[:, 0] > 0, best, last)
        if (best == last).all():
            return np.stack(places, 1)
        places.append(best)
