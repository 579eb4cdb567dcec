"""Version 1 of NOLA: one basis for a whole factor, coefficients of one width. Read forever, no longer made.

Every factor is a sum of seeded vectors, of which a file holds the coefficients and the seed.

    delta_W = B @ A
    vec(A) = s_A * sum over i < k_A of n_A[i] P_A[i]  (+ t Z)        vec(B) = s_B * sum over i < k_B of n_B[i] P_B[i]

A (r, in) and B (out, r) are flattened row by row; n are odd integers of 1, 2, 3, 4, 8 or 16 bits, s one scale per
factor. The vectors P[i] have as many numbers d as the factor, and follow from the seed, the role and d. Families of
them (`basis`): ``hadamard``, signs times the rows of an integer orthogonal transform in a seeded order, expanded in
O(d log d); ``dense``, the paper's, numbers of a seeded stream, in O(k d). Z is the seeded matrix that the paper's A
begins with, optional.

Arithmetic: sums of integers in float64, exact below 2^53 and so in any order; then one product per number and one
rounding to float32. numpy and torch agree to the last bit.

Stored tensors, in declaration order (targets without a rank have no coefficients):

===============  =====  ==========================================================================================
``ranks``        index  (targets,): only if they differ
``counts``       index  (targets, 2): k_A and k_B, 0 for all d; only if they differ
``codes``        code   (n,): by target, A before B; ``index`` at 16 bits
``scales``       half   (targets with a rank, 2): s_A, s_B
``base_scales``  half   (targets with a rank,): t; only with a base term
===============  =====  ==========================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np

from lrconvert.core.dtypes import Array
from lrconvert.core.errors import CanonicalError, JsonSyntaxError, LimitError, ValueRangeError
from lrconvert.core.limits import MAX_DIM, MAX_DRAWN, MAX_RANK
from lrconvert.io import fields
from lrconvert.io.fields import between, one_of
from lrconvert.lora import packing, prng
from lrconvert.lora.adapter import CompactAdapter, Target
from lrconvert.lora.packing import TensorSpec
from lrconvert.methods.base import Tensors
from lrconvert.methods.nola.basis import HADAMARD, Basis
from lrconvert.methods.shared.beside import beside_config
from lrconvert.methods.shared.earlier import EarlierMethod
from lrconvert.methods.shared.ranks import check_ranks
from lrconvert.methods.shared.widths import WIDTHS

if TYPE_CHECKING:
    from lrconvert.lora.trainable import TrainableAdapter

_LARGEST = 2.0**127  # what files may expand to
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


@beside_config
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


class Nola(EarlierMethod):
    """See the module's docstring."""

    id = "nola"
    version = 1
    title = "NOLA: coefficients of seeded bases"

    # --- what the file holds ---

    def header(self, config: Config) -> dict[str, Any]:
        form = config.form
        return {
            "family": form.family,
            "map": form.value_map,
            "bits": form.bits,
            "seed": str(form.seed),
            "base_term": form.base_term,
            "rank": config.rank,
            "ranks": bool(config.ranks),
            "num_basis": config.num_basis,
            "counts": bool(config.counts),
        }

    def layout_specs(self, header: Mapping[str, Any], targets: Sequence[Target]) -> tuple[TensorSpec, ...]:
        read = fields.read(Header, header, "method.config")
        if read.map not in (("sign",) if read.family == HADAMARD else tuple(prng.MAPS)):
            raise JsonSyntaxError(f"method.config.map is {read.map!r:.40}, which {read.family} does not have")
        prng.parse_seed(read.seed)
        ranks = packing.index("ranks", (len(targets),), read.rank + 1)
        counts = packing.index("counts", (len(targets), 2), read.num_basis + 1)
        return (*([ranks] if read.ranks else []), *([counts] if read.counts else []))

    def layout(self, config: Config) -> dict[str, Array]:
        tensors = {"ranks": config.ranks, "counts": config.counts}
        return {name: np.array(values, np.uint32) for name, values in tensors.items() if values}

    def config(self, header: Mapping[str, Any], layout: Tensors, targets: Sequence[Target]) -> Config:
        read = fields.read(Header, header, "method.config")
        form = Form(read.family, read.map, read.bits, prng.parse_seed(read.seed), read.base_term)
        ranks = tuple(layout["ranks"].tolist()) if read.ranks else ()
        counts = tuple((a, b) for a, b in layout["counts"].tolist()) if read.counts else ()
        config = Config(form, read.rank, read.num_basis, ranks, counts)
        all_places = places(config, tuple(targets))[:-1]
        check_ranks(targets, [place.rank for place in all_places])
        if config != complete(form, targets, [p.rank for p in all_places], [p.counts for p in all_places]):
            raise CanonicalError("method.config does not spell ranks and counts in the one way that it should")
        check_work(config, targets)
        return config

    def specs(self, config: Config, targets: Sequence[Target]) -> tuple[TensorSpec, ...]:
        return specs(config, targets)

    def ranks(self, config: Config, targets: Sequence[Target]) -> Sequence[int]:
        return [place.rank for place in places(config, tuple(targets))[:-1]]

    def notes(self, config: Config, targets: Sequence[Target]) -> tuple[str, ...]:
        """Return how much of the factors the subspaces hold: fits cannot keep much more."""
        pairs = list(zip(targets, places(config, tuple(targets)), strict=False))
        shares = []
        for side, name in enumerate("AB"):
            k = sum(place.counts[side] for _, place in pairs)
            d = sum(lengths(target, place.rank)[side] for target, place in pairs)
            shares.append(f"{k:,} coefficients for {d:,} numbers of {name} (k/d {k / max(d, 1):.2f})")
        return (f"{', '.join(shares)}: a random subspace holds about that share of a factor",)

    def check(self, config: Config, targets: Sequence[Target], tensors: Tensors) -> None:
        for target, place in zip(targets, places(config, tuple(targets)), strict=False):
            if not place.rank:
                continue
            scales = np.abs(tensors["scales"][place.number]).astype(np.float64)
            for basis, scale in zip(bases(config.form, target, place), scales, strict=True):
                largest = float(scale) * basis.largest * basis.count * 2.0**config.form.bits
                if "base_scales" in tensors:
                    largest += float(np.abs(tensors["base_scales"][place.number]))
                if largest >= _LARGEST:
                    raise ValueRangeError(f"target {target.name!r:.80}: coefficients and scales are beyond float32")

    # --- using it ---

    def expand(
        self, config: Config, targets: Sequence[Target], values: Mapping[str, Any], which: int, xp: Any
    ) -> tuple[Any, Any]:
        def double(numbers: Any) -> Any:
            return numbers.astype(np.float64) if xp is np else numbers.double()

        place = places(config, tuple(targets))[which]
        out, inner = targets[which].matrix_shape
        if not place.rank:
            return xp.zeros((0, inner), dtype=xp.float32), xp.zeros((out, 0), dtype=xp.float32)
        scales = values["scales"][place.number]
        sides, code = [], place.code
        for side, basis in enumerate(bases(config.form, targets[which], place)):
            numbers = double(values["codes"][code : code + basis.count])
            if config.form.bits == 16:
                numbers = 2 * numbers - 65535
            flat = basis.combine(numbers, xp)
            if config.form.base_term and side == 0:
                flat = double(flat) * double(scales)[side]
                flat = flat + basis.base_term(numbers, xp) * double(values["base_scales"])[place.number]
            else:
                flat = flat * scales[side]  # one rounding, in float32 as in float64
            sides.append(flat.astype(np.float32, copy=False) if xp is np else flat.float())
            code += basis.count
        return sides[0].reshape(place.rank, inner), sides[1].reshape(out, place.rank)

    # --- training it ---

    def student(self, compact: CompactAdapter) -> TrainableAdapter:
        from lrconvert.lora.trainable import Rates, TrainableAdapter

        wide = compact.config.form.bits == 16  # stored as an index, as bytes have no room for them
        return TrainableAdapter(self, compact, Rates(), numbers=("codes",) if wide else ())


METHOD = Nola()
