"""NOLA: every factor is a sum of seeded vectors, of which a file holds the coefficients and the seed.

    delta_W = B @ A
    vec(A) = s_A * sum over i < k_A of n_A[i] P_A[i]  (+ t Z)        vec(B) = s_B * sum over i < k_B of n_B[i] P_B[i]

A (r, in) and B (out, r) are flattened row by row; n are odd integers of 1, 2, 3, 4, 8 or 16 bits, s one scale per
factor. The vectors P[i] have as many numbers d as the factor, and follow from the seed, the role and d. Families of
them (`basis`): ``hadamard``, signs times the rows of an integer orthogonal transform in a seeded order, expanded and
fitted in O(d log d); ``dense``, the paper's, numbers of a seeded stream, in O(k d). Z is the seeded matrix that the
paper's A begins with, optional. Paper: NOLA, arXiv 2310.02556 (ICLR 2024).

A random subspace holds k / d of a factor, however the coefficients are chosen. A lower rank r makes d smaller: with
Hadamard bases up to k = d, where they are a rotation that makes all numbers of a factor alike before they are coded.

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
from typing import TYPE_CHECKING, Any

import numpy as np

from lrconvert.core.dtypes import Array
from lrconvert.core.errors import CanonicalError, JsonSyntaxError, ValueRangeError
from lrconvert.io import fields
from lrconvert.lora import packing, prng
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter, Target
from lrconvert.lora.packing import TensorSpec
from lrconvert.methods.base import Budget, Command, FitContext, Method, Tensors
from lrconvert.methods.nola.basis import HADAMARD
from lrconvert.methods.nola.fit import fit
from lrconvert.methods.nola.form import Config, Form, Header, bases, check_work, complete, lengths, places, specs
from lrconvert.methods.nola.plan import NolaOptions, plan
from lrconvert.methods.shared.ranks import check_ranks

if TYPE_CHECKING:
    from lrconvert.lora.trainable import TrainableAdapter

_LARGEST = 2.0**127  # what files may expand to


class Nola(Method):
    """See the module's docstring."""

    id = "nola"
    version = 1
    title = "NOLA: coefficients of seeded bases"
    commands = (Command("lora-to-nola", "Sum seeded random bases, and store only the coefficients (NOLA)."),)
    Options = NolaOptions
    searches = ({},)
    uses = ("seed", "statistics")
    examples = (
        {"target_size": 2400},
        {"num_basis": 200, "rank": 3, "bits": "16"},
        {"num_basis": 96, "bits": "8", "base_term": True},
        {"bits": "4", "target_size": 1900},
        {"family": "dense", "num_basis": 60, "rank": 1, "bits": "16", "map": "u24"},
        {"family": "dense", "num_basis": 150, "rank": 2, "bits": "4", "base_term": True},
        {"family": "dense", "map": "sign", "target_size": 2100},
    )

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
        scales = double(values["scales"][place.number])
        sides, code = [], place.code
        for side, basis in enumerate(bases(config.form, targets[which], place)):
            numbers = double(values["codes"][code : code + basis.count])
            if config.form.bits == 16:
                numbers = 2 * numbers - 65535
            flat = basis.combine(numbers, xp) * scales[side]
            if config.form.base_term and side == 0:
                flat = flat + basis.base_term(numbers, xp) * double(values["base_scales"])[place.number]
            sides.append(flat.astype(np.float32) if xp is np else flat.float())
            code += basis.count
        return sides[0].reshape(place.rank, inner), sides[1].reshape(out, place.rank)

    # --- making it ---

    def plan(self, lora: LoraAdapter, options: NolaOptions, budget: Budget | None, context: FitContext) -> Config:
        config = plan(lora, options, budget, context)
        check_work(config, lora.shapes())
        return config

    def fit(self, lora: LoraAdapter, config: Config, context: FitContext) -> dict[str, Array]:
        return fit(lora, config, context)

    def student(self, compact: CompactAdapter) -> TrainableAdapter:
        from lrconvert.lora.trainable import Rates, TrainableAdapter

        wide = compact.config.form.bits == 16  # stored as an index, as bytes have no room for them
        return TrainableAdapter(self, compact, Rates(), numbers=("codes",) if wide else ())


METHOD = Nola()
