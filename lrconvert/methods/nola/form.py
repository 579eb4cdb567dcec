"""The configuration of a NOLA file: the basis, ranks and counts, and where the codes of each target lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal

from lrconvert.core.errors import LimitError
from lrconvert.core.limits import MAX_DIM, MAX_DRAWN, MAX_RANK
from lrconvert.io.fields import between, one_of
from lrconvert.lora import packing, prng
from lrconvert.lora.adapter import Target
from lrconvert.lora.packing import TensorSpec
from lrconvert.methods.nola.basis import Basis
from lrconvert.methods.shared.widths import WIDTHS

_EXACT = 1 << 53  # integers below it add up exactly in float64


@dataclass(frozen=True)
class Header:
    """The JSON part of a config. `ranks` and `counts` say whether the tensors of these names are there."""

    family: Literal["hadamard", "dense"]
    map: str
    bits: Annotated[int, one_of(WIDTHS, LimitError)]
    seed: str
    base_term: bool
    rank: Annotated[int, between(1, MAX_RANK)]
    ranks: bool
    num_basis: Annotated[int, between(0, MAX_DIM)]
    counts: bool


@dataclass(frozen=True)
class Form:
    """The form that all factors share: the `family` of bases, the `value_map` of seeded numbers, `bits` of a
    coefficient, the `seed`, and whether A begins with a seeded matrix (`base_term`)."""

    family: str
    value_map: str
    bits: int
    seed: int
    base_term: bool = False


@dataclass(frozen=True)
class Config:
    """`ranks` of the targets, empty if each is `rank`, or all that its shape allows; `counts`: vectors in the bases of
    A and B, 0 for all d of them, empty if each is `num_basis`, or all d. The largest count is `num_basis`, 0 if all
    bases are whole."""

    form: Form
    rank: int
    num_basis: int
    ranks: tuple[int, ...] = ()
    counts: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Place:
    """Of one target: its rank, how many coefficients A and B have, where its codes begin, and its number among the
    targets that have a rank."""

    rank: int
    counts: tuple[int, int]
    code: int
    number: int


def lengths(target: Target, rank: int) -> tuple[int, int]:
    """Return how many numbers A and B have."""
    out, inner = target.matrix_shape
    return rank * inner, out * rank


def _even_rank(rank: int, target: Target) -> int:
    return min(rank, *target.matrix_shape)


@lru_cache(maxsize=8)
def places(config: Config, targets: tuple[Target, ...]) -> tuple[Place, ...]:
    """Return the place of each target; the last entry holds the totals."""
    places, code, number = [], 0, 0
    for which, target in enumerate(targets):
        rank = config.ranks[which] if config.ranks else _even_rank(config.rank, target)
        sizes = lengths(target, rank)
        limits = config.counts[which] if config.counts else (config.num_basis,) * 2
        counts = min(limits[0] or sizes[0], sizes[0]), min(limits[1] or sizes[1], sizes[1])
        places.append(Place(rank, counts, code, number))
        code, number = code + sum(counts), number + (rank > 0)
    return (*places, Place(0, (0, 0), code, number))


def complete(form: Form, targets: Sequence[Target], ranks: Sequence[int], counts: Sequence[tuple[int, int]]) -> Config:
    """Return the one Config of these ranks and counts; a count of d or more is all of them."""
    spelled = [
        tuple(0 if count >= size else count for count, size in zip(pair, lengths(target, rank), strict=True))
        for pair, target, rank in zip(counts, targets, ranks, strict=True)
    ]
    rank, most = max(ranks), max(max(pair) for pair in spelled)
    even = Config(form, rank, most)
    if any(_even_rank(rank, target) != own for target, own in zip(targets, ranks, strict=True)):
        even = Config(form, rank, most, tuple(ranks))
    spelled_out = Config(form, rank, most, even.ranks, tuple((one, two) for one, two in spelled))
    pairs = zip(places(even, tuple(targets)), places(spelled_out, tuple(targets)), strict=True)
    return even if all(one.counts == two.counts for one, two in pairs) else spelled_out


def bases(form: Form, target: Target, place: Place) -> tuple[Basis, Basis]:
    """Return the bases of A and of B."""
    sizes = lengths(target, place.rank)
    return (
        Basis(form.family, form.value_map, form.seed, "A", sizes[0], place.counts[0]),
        Basis(form.family, form.value_map, form.seed, "B", sizes[1], place.counts[1]),
    )


def check_work(config: Config, targets: Sequence[Target]) -> None:
    """Raise E-LIMIT on bases that are too long, that would take too long to draw, or whose sums would not be exact."""
    drawn = 0
    for target, place in zip(targets, places(config, tuple(targets)), strict=False):
        if not place.rank:
            continue
        for basis in bases(config.form, target, place):
            prng.check_size(config.form.value_map, basis.length, basis.count)
            if basis.growth * basis.count << config.form.bits >= _EXACT:
                what = f"sums of {basis.count} coefficients of {config.form.bits} bits are not exact"
                raise LimitError(f"target {target.name!r:.80}: {what}")
            drawn += basis.drawn
    if drawn > MAX_DRAWN:
        raise LimitError(f"the bases have {drawn} numbers to draw; at most {MAX_DRAWN} are allowed")


def specs(config: Config, targets: Sequence[Target]) -> tuple[TensorSpec, ...]:
    """Return the payload tensors, in declaration order."""
    total = places(config, tuple(targets))[-1]
    bits = config.form.bits
    codes = packing.index("codes", (total.code,), 1 << 16) if bits == 16 else packing.code("codes", (total.code,), bits)
    scales = packing.half("scales", (total.number, 2))
    return (codes, scales, *([packing.half("base_scales", (total.number,))] if config.form.base_term else []))
