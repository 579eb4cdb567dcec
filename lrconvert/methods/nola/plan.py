"""From options and a budget to a form, and to ranks and counts.

A random k-dimensional subspace of R^d holds k/d of a factor, so that a pair of factors keeps about
(k_A / d_A) (k_B / d_B) of the update: less than what the bytes cost, as long as the rank can fall instead. So bytes go
to whole bases of a low rank first, where they keep most, and what is left to a part of one more component.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from lrconvert.core.dtypes import F64
from lrconvert.core.errors import OptionError
from lrconvert.core.limits import MAX_DIM, MAX_RANK
from lrconvert.core.options import option
from lrconvert.lora import prng, svd
from lrconvert.lora.adapter import LoraAdapter
from lrconvert.methods.base import Budget, FitContext
from lrconvert.methods.nola.basis import DENSE, HADAMARD
from lrconvert.methods.nola.form import Config, Form, complete, lengths, specs
from lrconvert.methods.shared.options import bits_option, check_range, within
from lrconvert.methods.shared.widths import ENERGY_LOST, WIDTHS, concave_hull

DEFAULT_COUNT = 512  # of the paper's scripts
_WORTHWHILE = 1e-3  # a basis in part takes a tensor of counts: not for less than this share of what is kept
_FILL = {HADAMARD: 1.0, DENSE: 0.75}  # share of d in use: the vectors of a fuller dense basis are nearly dependent


@dataclass(frozen=True)
class NolaOptions:
    """The options of `lora-to-nola`."""

    num_basis: int | None = option(
        None, "Coefficients per factor, k (at most; 512 without a size). Under a size they go where they keep most."
    )
    rank: int | None = option(None, "Rank of the factors (at most). A lower rank wastes fewer coefficients.")
    family: str = option(
        HADAMARD,
        "Seeded bases: hadamard (orthogonal and fast), or dense (random numbers, the paper's).",
        choices=(HADAMARD, DENSE),
    )
    map: str | None = option(None, "Numbers of dense bases: u8 (default), u24 or sign.", choices=tuple(prng.MAPS))
    bits: str = bits_option("coefficient", "the best")
    base_term: bool = option(False, "Let A begin with a seeded matrix, as the paper does.")


def plan(lora: LoraAdapter, options: NolaOptions, budget: Budget | None, context: FitContext) -> Config:
    """Return the Config that `options` and `budget` lead to; see `Method.plan`."""
    check_range(options, "num_basis", 1, MAX_DIM)
    check_range(options, "rank", 1, MAX_RANK)
    if options.family == HADAMARD and options.map not in (None, "sign"):
        raise OptionError(f"--map {options.map} has no meaning for Hadamard bases", fix="add --family dense")
    most = options.rank or MAX_RANK
    spectra = [svd.singular_values(pair, context.metric(pair))[:most] for pair in lora.targets]
    search = Search(lora, spectra, options, context.seed)
    return search.without_budget() if budget is None else search.within(budget)


@dataclass(frozen=True)
class _Choice:
    """Ranks and counts, and the energy that they should keep."""

    kept: float
    ranks: tuple[int, ...]
    counts: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Step:
    """From one rank of a target to a higher one, where its bits buy most: what it costs and how much more it keeps."""

    which: int
    rank: int
    bits: int
    gain: float


@dataclass(frozen=True, eq=False)
class Search:
    """Finds ranks and counts for `spectra`, the singular values of the targets, cut to the rank that is allowed."""

    lora: LoraAdapter
    spectra: Sequence[F64]
    options: NolaOptions
    seed: int

    def without_budget(self) -> Config:
        """Return as many coefficients as asked for in every target, at the rank asked for, or the one that keeps
        most."""
        bits = 16 if self.options.bits == "auto" else int(self.options.bits)
        most = self.options.num_basis or DEFAULT_COUNT
        ranks, counts = [], []
        for which, s in enumerate(self.spectra):
            sizes = [lengths(self.lora.targets[which].target, rank) for rank in range(1, len(s) + 1)]
            pairs = [(min(most, a), min(most, b)) for a, b in sizes]
            rank = len(s)
            if self.options.rank is None:
                kept = [self._kept(which, rank, pair, bits) for rank, pair in enumerate(pairs, 1)]
                rank = int(np.argmax(kept)) + 1
            ranks.append(rank)
            counts.append(pairs[rank - 1])
        return self._config(bits, ranks, counts)

    def within(self, budget: Budget) -> Config:
        """Return what should keep most of all that fits. Raise E-BUDGET."""
        widths = WIDTHS if self.options.bits == "auto" else (int(self.options.bits),)
        least = within(budget, self._smallest(min(widths)))
        overhead = budget.size(least) - sum(spec.nbytes for spec in specs(least, self.lora.shapes()))
        room = 8 * (budget.limit - overhead)
        hopeful = sorted(widths, key=lambda bits: -self._allocate(bits, room).kept)[:2]
        fills = [filled for bits in hopeful if (filled := self._fill(bits, room, budget)) is not None]
        return max(fills, key=lambda entry: entry[0], default=(0.0, least))[1]

    def _config(self, bits: int, ranks: Sequence[int], counts: Sequence[tuple[int, int]]) -> Config:
        options = self.options
        value_map = "sign" if options.family == HADAMARD else options.map or "u8"
        form = Form(options.family, value_map, bits, prng.Stream(self.seed, "nola").seed, options.base_term)
        return complete(form, self.lora.shapes(), ranks, counts)

    def _fill(self, bits: int, room: int, budget: Budget) -> tuple[float, Config] | None:
        """(energy that should be kept, Config) of the largest allocation at a width that fits."""
        best: tuple[float, Config] | None = None
        for _ in range(10):
            choice = self._allocate(bits, room)
            if not any(choice.ranks):
                break
            config = self._config(bits, choice.ranks, choice.counts)
            spare = budget.limit - budget.size(config)
            if spare >= 0 and (best is None or choice.kept > best[0]):
                best = choice.kept, config
            if 0 <= spare < 8:
                break
            room += 8 * spare
        return best

    def _smallest(self, bits: int) -> Config:
        """One coefficient in each factor of the target where it should keep most."""
        count = len(self.spectra)
        which = max(range(count), key=lambda n: self._kept(n, 1, (1, 1), bits))
        ranks = [int(n == which) for n in range(count)]
        return self._config(bits, ranks, [(rank, rank) for rank in ranks])

    def _allocate(self, bits: int, room: int) -> _Choice:
        """Return the allocation that should keep most in `room` bits of payload: steps in the order of what a bit buys,
        then a part of one more component."""
        ranks, closed = [0] * len(self.spectra), set()
        for step in self._steps[bits]:
            if step.bits > room:
                closed.add(step.which)
            elif step.which not in closed:
                ranks[step.which] = step.rank
                room -= step.bits
        counts = [self._useful(which, rank) if rank else (0, 0) for which, rank in enumerate(ranks)]
        kept = [
            self._kept(which, rank, pair, bits) for which, (rank, pair) in enumerate(zip(ranks, counts, strict=True))
        ]
        best = 0.0, 0, (0, 0)
        for which, rank in enumerate(ranks):
            extra = (room - (0 if rank else self._scale_bits)) // bits
            if rank < len(self.spectra[which]) and extra >= 2:
                whole = self._useful(which, rank + 1)
                one = min((sum(counts[which]) + extra) // 2, min(whole))
                two = min(sum(counts[which]) + extra - one, max(whole))
                pair = (one, two) if whole[0] <= whole[1] else (two, one)
                gain = self._kept(which, rank + 1, pair, bits) - kept[which]
                if gain > best[0]:
                    best = gain, which, pair
        if best[0] > _WORTHWHILE * sum(kept):
            ranks[best[1]] += 1
            counts[best[1]] = best[2]
            kept.append(best[0])
        return _Choice(sum(kept), tuple(ranks), tuple(counts))

    @cached_property
    def _steps(self) -> dict[int, list[_Step]]:
        """For each width the steps of all targets, what buys most first. Those of a target lie on the concave hull of
        what its ranks keep, so that they come in order."""
        all_steps = {}
        for bits in WIDTHS:
            steps = []
            for which, s in enumerate(self.spectra):
                points = [(0, 0.0, 0)]
                for rank in range(1, len(s) + 1):
                    pair = self._useful(which, rank)
                    points.append((sum(pair) * bits + self._scale_bits, self._kept(which, rank, pair, bits), rank))
                hull = concave_hull(points)
                steps += [_Step(which, two[2], two[0] - one[0], two[1] - one[1]) for one, two in pairwise(hull)]
            all_steps[bits] = sorted(steps, key=lambda step: -step.gain / max(step.bits, 1))
        return all_steps

    @property
    def _scale_bits(self) -> int:
        """Bits of the scales of a target that has a rank."""
        return 48 if self.options.base_term else 32

    def _useful(self, which: int, rank: int) -> tuple[int, int]:
        """Coefficients of A and B at a rank: as many as asked for, or all that are of use."""
        fill, most = _FILL[self.options.family], self.options.num_basis or MAX_DIM * MAX_RANK
        a, b = (max(1, min(int(fill * n), most)) for n in lengths(self.lora.targets[which].target, rank))
        return a, b

    def _kept(self, which: int, rank: int, counts: tuple[int, int], bits: int) -> float:
        """Energy that should be kept. The codes of a factor in balanced coordinates lose ``lost (sum s)^2 / rank``; in
        vectors that are not orthogonal more, the more of them there are."""
        s = self.spectra[which][:rank]
        energy = float(s @ s)
        if not energy:
            return 0.0
        lost = min(1.0, ENERGY_LOST[bits] * float(s.sum()) ** 2 / (rank * energy))
        for count, size in zip(counts, lengths(self.lora.targets[which].target, rank), strict=True):
            share = count / size
            if self.options.family == DENSE:
                energy *= max(0.0, 1 - lost / max(1e-9, 1 - share))
            else:
                energy *= 1 - lost
            energy *= share
        return energy
