"""One component for another in a `lowrank` adapter in training: which go, which come, and the numbers of all that stay.

What may come is what the adapter lacks: of every module the largest components of the LoRA's update minus the adapter's
own. As a whole the first of them is the best rank-one correction of the module's update in the metric of the fit; but
an adapter in training has left that update for better answers, so that it comes in damped. (ALoRA, arXiv 2403.16187,
does not say with what a new rank begins; a zero has no gradient on one side, and is a step behind.)

What stays keeps its stored numbers to the bit. At 16 bit the components of a module that loses some are the canonical
ones, as nothing is lost by turning them; below, a turn would round everything anew, and components are as stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lrconvert.convert.rank_allocation import Components, Cut, cost_of, pair_of
from lrconvert.core.dtypes import F64, Array
from lrconvert.lora import svd
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter, LoraTarget
from lrconvert.lora.input_statistics import Moment
from lrconvert.lora.packing import round_half
from lrconvert.methods import base as methods
from lrconvert.methods import lowrank
from lrconvert.methods.base import FitContext

_ROUNDING = 1e-9  # of the energy of a module's update: what is smaller is no component


# --- stored numbers -------------------------------------------------------------------------------------------------

Rows = dict[str, Array]  # the numbers of some components of one target, (components, numbers) by tensor


def split(compact: CompactAdapter) -> list[Rows]:
    """Return the numbers of a `lowrank` adapter of one width with one scale per row and column, by target."""
    bits = compact.config.levels[0]
    at = {"half": 0} if bits == 16 else {f"codes.{bits}": 0, "scales": 0}
    targets: list[Rows] = []
    for target, rank in zip(compact.targets, compact.config.ranks, strict=True):
        rows = {}
        for name, start in at.items():
            width = 2 if name == "scales" else sum(target.matrix_shape)
            at[name] = start + rank * width
            rows[name] = compact.tensors[name][start : at[name]].reshape(rank, width)
        targets.append(rows)
    return targets


def joined(compact: CompactAdapter, rows: Sequence[Rows]) -> CompactAdapter:
    """Return `compact` with these components in place of its own."""
    bits = compact.config.levels[0]
    counts = tuple((len(next(iter(target.values()))),) for target in rows)
    tensors = {n: round_half(a) if a.dtype == np.float32 else a for n, a in flat(rows).items()}
    return replace(compact, config=lowrank.Config((bits,), counts), tensors=tensors)


def flat(rows: Sequence[Rows]) -> dict[str, Array]:
    """Return the numbers of all targets in one array for each tensor."""
    return {name: np.concatenate([target[name].reshape(-1) for target in rows]) for name in rows[0]}


def _fitted(compact: CompactAdapter, pairs: Sequence[LoraTarget], context: FitContext) -> list[Rows]:
    """`pairs`, one for each target, at the width of `compact`."""
    config = lowrank.Config(compact.config.levels, tuple((pair.rank,) for pair in pairs))
    tensors = lowrank.METHOD.fit(LoraAdapter(tuple(pairs)), config, context)
    return split(replace(compact, config=config, tensors=tensors))


# --- components that may come ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Offer:
    """The components of an adapter and, after them in each target, those that may come; `parts` are all of them, and
    `present` (n,) says which are the adapter's."""

    lora: LoraAdapter
    parts: Components
    present: Array


def offer(compact: CompactAdapter, teacher: LoraAdapter, context: FitContext, most: int = 1) -> Offer:
    """Offer at most `most` components more for every target, float32. `teacher` has the targets of `compact`."""
    bits = compact.config.levels[0]
    pairs, present, energies = [], [], []
    for pair, (target, a, b) in zip(teacher.targets, methods.expand_all(compact), strict=True):
        metric = context.metric(pair)
        if bits == 16 and len(a):
            a, b = svd.balanced(svd.svd(pair_of(target, a, b), metric))
        more_a, more_b = lacking(pair, a, b, metric, most)
        a, b = np.concatenate([a, more_a]), np.concatenate([b, more_b], axis=1)
        pairs.append(pair_of(target, a, b))
        present.append(np.arange(len(a)) < len(a) - len(more_a))
        energies.append(_energies(a, b, metric))
    sizes = [len(mask) for mask in present]
    parts = Components(
        np.repeat(np.arange(len(sizes)), sizes),
        np.concatenate([np.arange(size) for size in sizes]),
        np.concatenate(energies),
        np.repeat(np.array([cost_of(pair.target, bits) for pair in pairs], np.float64), sizes),
    )
    return Offer(LoraAdapter(tuple(pairs), compact.extras), parts, np.concatenate(present))


def lacking(pair: LoraTarget, a: Array, b: Array, metric: Moment | None, most: int) -> tuple[F64, F64]:
    """Return A (k, in) and B (out, k) of the largest components of a LoRA's update minus ``b @ a``, in that metric; at
    most `most`, no more than the rank that the target's matrix has left, and none that is only rounding."""
    rest = pair_of(
        pair.target,
        np.concatenate([pair.A.astype(np.float64), -np.asarray(a, np.float64)]),
        np.concatenate([pair.scale * pair.B.astype(np.float64), np.asarray(b, np.float64)], axis=1),
    )
    factors = svd.svd(rest, metric)
    whole = float((svd.singular_values(pair, metric) ** 2).sum())
    count = int((factors.s**2 > _ROUNDING * whole).sum())
    return svd.balanced(factors, max(0, min(most, count, min(pair.target.matrix_shape) - len(a))))


def _energies(a: Array, b: Array, metric: Moment | None) -> F64:
    rows = np.asarray(a, np.float64)
    weighted = rows if metric is None else metric.times(rows)
    energies: F64 = (rows * weighted).sum(1) * np.square(np.asarray(b, np.float64)).sum(0)
    return energies


# --- the exchange ---------------------------------------------------------------------------------------------------


def exchanged(cut: Cut, present: Array, known: Array, scores: F64, share: float) -> Array:
    """Return the mask (n,) of components that are there after an exchange, of those with `known` scores.

    The best per cost of those that may come takes the place of the worst that are there, as long as it is better than
    each of them, what goes is at most `share` of all (or one), and the budget is met. A module that loses a component
    gets none, and the other way round: one whose components all deserve to stay deserves more.
    """
    parts, kept = cut.parts, present.copy()
    worth, amounts = scores / parts.cost, cut.amounts
    left = max(share * float(amounts[present].sum()), float(amounts[present].max()))
    order = [int(c) for c in parts.order(scores) if known[c]]
    worst = [c for c in reversed(order) if present[c]]
    gained, lost = set[int](), set[int]()
    for new in (c for c in order if not present[c]):
        if parts.owner[new] in lost:
            continue
        tried, freed, gone = kept.copy(), 0.0, list[int]()
        tried[new] = True
        for old in worst:
            if cut.meets(tried) or worth[old] >= worth[new] or freed + amounts[old] > left:
                break
            if kept[old] and parts.owner[old] not in gained | {parts.owner[new]}:
                tried[old], freed = False, freed + amounts[old]
                gone.append(old)
        if cut.meets(tried):
            kept, left = tried, left - freed
            gained.add(int(parts.owner[new]))
            lost |= {int(parts.owner[old]) for old in gone}
    return kept


def applied(compact: CompactAdapter, offer: Offer, kept: Array, damping: float, context: FitContext) -> CompactAdapter:
    """Return `compact` with the components `kept` (n,) of an offer; what is new comes in times `damping`."""
    bits, rows = compact.config.levels[0], split(compact)
    coming = _fitted(compact, _of(offer, kept & ~offer.present, damping), context)
    canonical = _fitted(compact, _of(offer, kept & offer.present, 1.0), context) if bits == 16 else rows
    targets = []
    for t, (own, new) in enumerate(zip(rows, coming, strict=True)):
        stays = kept[offer.present & (offer.parts.owner == t)]
        if not stays.all():
            own = canonical[t] if bits == 16 else {name: array[stays] for name, array in own.items()}
        targets.append({name: np.concatenate([own[name], new[name]]) for name in own})
    return joined(compact, targets)


def carried(
    old: Mapping[str, Array],
    new: Mapping[str, Array],
    compact: CompactAdapter,
    changed: CompactAdapter,
    offer: Offer,
    kept: Array,
) -> dict[str, Array]:
    """Return what goes with the numbers of `changed`, which `applied` made of `compact`: components whose stored
    numbers stayed keep theirs, `old` by tensor; all others have those of `new`."""
    befores, afters = split(replace(compact, tensors=old)), split(replace(changed, tensors=new))
    targets = []
    for t, (before, after) in enumerate(zip(befores, afters, strict=True)):
        stays = kept[offer.present & (offer.parts.owner == t)]
        if compact.config.levels[0] == 16 and not stays.all():
            targets.append(after)  # its components are other ones
            continue
        count = int(stays.sum())
        targets.append({name: np.concatenate([before[name][stays], after[name][count:]]) for name in before})
    return flat(targets)


def _of(offer: Offer, which: Array, factor: float) -> list[LoraTarget]:
    pairs = []
    for t, pair in enumerate(offer.lora.targets):
        places = offer.parts.place[which & (offer.parts.owner == t)]
        pairs.append(replace(pair_of(pair.target, pair.A[places], pair.B[:, places]), scale=factor))
    return pairs
