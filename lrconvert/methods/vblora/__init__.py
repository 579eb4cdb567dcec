"""VB-LoRA: every factor is a mosaic of short vectors from one bank shared by all targets.

    delta_W = B @ A
    A[j] = sum over passes p of gain[j, p] * concat_t u[j, p, t]          (each B[:, j] likewise)
    u    = sum over s < k of w[s] * V[i[s]],   w[0] = 1 - w[1] - ... - w[k-1],   w[s] = c[s] / 2^(m+1)

The bank V is (h, b): h vectors of length b. A row of n numbers takes ceil(n / b) sub-vectors u; where b does not divide
n, the last one is cut. Paper: VB-LoRA, arXiv 2405.15179 (NeurIPS 2024): one pass, no gains, b = 256, h = 2048, k = 2,
b divides every dimension; ``peft_compatible`` keeps to that. Two additions make the form a good quantizer of an
existing LoRA: a gain per coded row, so that the bank codes rows of one size, and further passes over rows that deserve
more bits, each coding what the earlier ones left with the same bank. Short vectors (b of 2 to 16, k = 1) then spend
0.3 to 1 bit per number and pass, where the published long ones spend 0.1.

Arithmetic: float64, sums in order of s, then of p, rounded once to float32. All products are elementwise, so that numpy
and torch agree to the last bit.

Stored tensors, in declaration order (rows by target, A before B, largest component first; codes by row, pass, place t):

=============  =====  ============================================================================================
``ranks``      index  (targets,): components of each target; only if they differ
``passes``     index  (rows,): passes of each row, less one; only if a row has more than one
``bank``       half   (h, b) at 16 bit; ``single`` at 32; ``code`` at 8 or 4, the odd integers times ``scales``
``scales``     half   (h,): one per vector; only at 8 or 4 bit
``indices``    index  (codes, k): heaviest vector first, lower index first among equals, no index twice
``weights``    index  (codes, k - 1): the integers c of all but the first vector, m bit; only for k > 1;
                      ``single`` if m is 32: the weights themselves
``gains``      half   (passes of all rows,); only with gains
=============  =====  ============================================================================================

A weight of zero carries the lowest index that its code does not use otherwise: one spelling per meaning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from lrconvert.core.devices import one_thread
from lrconvert.core.dtypes import Array
from lrconvert.core.errors import CanonicalError, IndexRangeError, LimitError, ValueRangeError
from lrconvert.core.limits import MAX_RANK
from lrconvert.io import fields
from lrconvert.lora import packing, svd
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter, Target
from lrconvert.lora.packing import TensorSpec
from lrconvert.methods.base import Budget, Command, FitContext, Method, Tensors
from lrconvert.methods.shared.ranks import check_ranks, ranks_layout, ranks_specs, read_ranks
from lrconvert.methods.vblora.form import Config, Form, Header, canonical_codes, complete, specs, starts
from lrconvert.methods.vblora.plan import VBLoraOptions, check_options, default_form
from lrconvert.methods.vblora.rows import I64

if TYPE_CHECKING:
    from lrconvert.lora.trainable import TrainableAdapter

_LARGEST = 2.0**127  # what files may expand to
_CHUNK = 1 << 20  # codes that are checked at a time


class VBLora(Method):
    """See the module's docstring."""

    id = "vblora"
    version = 1
    title = "VB-LoRA: one vector bank"
    commands = (Command("lora-to-vblora", "Code all factors with one shared bank of short vectors (VB-LoRA)."),)
    Options = VBLoraOptions
    searches = ({},)
    fit_seconds = 0.45
    uses = ("seed", "device", "statistics")
    examples = (
        {"vector_length": 4, "num_vectors": 64, "passes": 3},
        {"vector_length": 16, "num_vectors": 24, "top_k": 2, "rank": 3, "bits": 8},
        {"vector_length": 8, "num_vectors": 16, "top_k": 3, "weight_bits": 5, "gain": "off"},
        {"vector_length": 7, "num_vectors": 32, "top_k": 2, "bits": 4, "passes": 2},
        {"peft_compatible": True, "rank": 2, "num_vectors": 32},
    )

    # --- what the file holds ---

    def header(self, config: Config) -> dict[str, Any]:
        return {
            **asdict(config.form),
            "padded": config.padded,
            "rank": max(config.ranks),
            "uniform": min(config.ranks) == max(config.ranks),
            "passes": max(config.passes, default=1),
            "rows": config.rows,
        }

    def layout_specs(self, header: Mapping[str, Any], targets: Sequence[Target]) -> tuple[TensorSpec, ...]:
        read = fields.read(Header, header, "method.config")
        read.check()
        ranks = ranks_specs(read.rank, read.uniform, targets)
        return ranks if read.passes == 1 else (*ranks, packing.index("passes", (read.rows,), read.passes))

    def layout(self, config: Config) -> dict[str, Array]:
        passes = {"passes": np.array(config.passes, np.uint32) - np.uint32(1)} if config.passes else {}
        return ranks_layout(config.ranks) | passes

    def config(self, header: Mapping[str, Any], layout: Tensors, targets: Sequence[Target]) -> Config:
        read = fields.read(Header, header, "method.config")
        ranks = read_ranks(read.rank, read.uniform, layout, targets)
        check_ranks(targets, ranks)
        if read.rows != 2 * sum(ranks):
            raise LimitError(f"method.config.rows is {read.rows}; the ranks add up to {2 * sum(ranks)}")
        passes = tuple((layout["passes"] + np.uint32(1)).tolist()) if read.passes > 1 else ()
        if passes and max(passes) != read.passes:
            raise CanonicalError("method.config.passes is not the largest number of passes")
        config = complete(read.form, targets, ranks, passes)
        if config.padded != read.padded:
            raise CanonicalError("method.config.padded does not say whether sub-vectors are cut")
        return config

    def specs(self, config: Config, targets: Sequence[Target]) -> tuple[TensorSpec, ...]:
        return specs(config, targets)

    def ranks(self, config: Config, targets: Sequence[Target]) -> Sequence[int]:
        return config.ranks

    def check(self, config: Config, targets: Sequence[Target], tensors: Tensors) -> None:
        form = config.form
        if form.bits < 16 and bool((tensors["scales"] < 0).any()):
            raise ValueRangeError("tensor scales: a vector has a negative scale")
        largest = float(np.abs(tensors["bank"]).max()) if form.bits >= 16 else float(2**form.bits - 1)
        for name in ("scales", "gains"):
            if name in tensors:
                largest *= float(np.abs(tensors[name]).max(initial=0.0))
        if largest * max(config.passes, default=1) >= _LARGEST:
            raise ValueRangeError("bank, scales and gains multiply to 2^127 or more, beyond float32")
        for start in range(0, len(tensors["indices"]) if form.top_k > 1 else 0, _CHUNK):
            chunk = slice(start, start + _CHUNK)
            _check_codes(form, tensors["indices"][chunk].astype(np.int64), tensors["weights"][chunk])

    # --- using it ---

    def expand(
        self, config: Config, targets: Sequence[Target], values: Mapping[str, Any], which: int, xp: Any
    ) -> tuple[Any, Any]:
        begins = starts(config, tuple(targets))
        vectors = _vectors(config.form, values, slice(begins[which][2], begins[which + 1][2]), xp)
        return self.assembled(config, targets, which, vectors, values, xp)

    def assembled(
        self, config: Config, targets: Sequence[Target], which: int, vectors: Any, values: Mapping[str, Any], xp: Any
    ) -> tuple[Any, Any]:
        """Return what `expand` does, for the `vectors` (codes of the target, b), in float64, that its codes name."""
        form, rank = config.form, config.ranks[which]
        out, inner = targets[which].matrix_shape
        row, turn, _ = starts(config, tuple(targets))[which]
        sides, code = [], 0
        for length in (inner, out):
            passes = config.passes[row : row + rank] if config.passes else (1,) * rank
            turns, cuts = sum(passes), -(-length // form.vector_length)
            part = vectors[code : code + turns * cuts]
            numbers = part.reshape(turns, cuts * form.vector_length)[:, :length]
            if form.gains:
                numbers = numbers * _double(values["gains"][turn : turn + turns], xp)[:, None]
            sides.append(_add_passes(numbers, passes, xp))
            row, turn, code = row + rank, turn + turns, code + turns * cuts
        a, b = (side.astype(np.float32) if xp is np else side.float() for side in sides)
        return a, b.T

    # --- making it ---

    def plan(self, lora: LoraAdapter, options: VBLoraOptions, budget: Budget | None, context: FitContext) -> Config:
        check_options(lora, options)
        targets = lora.shapes()
        spectra = [svd.singular_values(pair, context.metric(pair)) for pair in lora.targets]
        limits = [min(len(s), options.rank or MAX_RANK) for s in spectra]
        if options.peft_compatible:
            limits = [min(limits)] * len(limits)
        if budget is None:
            form = default_form(targets, limits, options)
            return complete(form, targets, limits, [options.passes or 1] * (2 * sum(limits)))
        from lrconvert.methods.vblora.search import Search

        with one_thread():
            return Search(lora, spectra, limits, options, budget, context).best()

    def fit(self, lora: LoraAdapter, config: Config, context: FitContext) -> dict[str, Array]:
        from lrconvert.methods.vblora.fit import fit  # torch

        with one_thread():
            return fit(lora, config, context)

    def student(self, compact: CompactAdapter) -> TrainableAdapter:
        from lrconvert.lora.trainable import Rates
        from lrconvert.methods.vblora.training import TrainableBank

        return TrainableBank(self, compact, Rates())


METHOD = VBLora()


def _double(numbers: Any, xp: Any) -> Any:
    return numbers.astype(np.float64) if xp is np else numbers.double()


def _vectors(form: Form, values: Mapping[str, Any], codes: slice, xp: Any) -> Any:
    """Return the vectors (codes, b) that codes name, in float64. The work is that of the bank or that of the codes,
    whichever has less: a target may have few of many codes, or of many vectors."""
    indices, bank, scales = values["indices"][codes], values["bank"], values.get("scales")

    def scaled(rows: Any, factors: Any) -> Any:
        return _double(rows, xp) if factors is None else _double(rows, xp) * _double(factors, xp)[:, None]

    is_whole = len(bank) <= len(indices)
    whole: Any = scaled(bank, scales) if is_whole else None

    def named(places: Any) -> Any:
        return whole[places] if is_whole else scaled(bank[places], None if scales is None else scales[places])

    vectors = named(indices[:, 0])
    if form.top_k > 1:
        small = _double(values["weights"][codes], xp) * form.weight_unit
        vectors = vectors * _first_weight(small)[:, None]
        for s in range(1, form.top_k):
            vectors = vectors + named(indices[:, s]) * small[:, s - 1, None]
    return vectors


def _check_codes(form: Form, indices: I64, small: Array) -> None:
    """Raise E-VALUE, E-INDEX or E-CANON on codes (n, k) of mixtures that no file may hold."""
    rest = _first_weight(small.astype(np.float64) * form.weight_unit)
    if bool((small < 0).any()) or bool((rest < 0).any()):
        raise ValueRangeError("tensor weights: a code has a negative weight")
    if not form.exact_weights and bool((rest < small[:, 0] * form.weight_unit).any()):
        raise ValueRangeError("tensor weights: the weights of a code leave too little for its first vector")
    first = np.full(len(rest), np.inf) if form.exact_weights else rest / form.weight_unit
    units = np.concatenate([first[:, None], small], axis=1)
    ordered = np.sort(indices, axis=1)
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        raise IndexRangeError("tensor indices: a code names one vector twice")
    again = canonical_codes(indices, units)
    if not np.array_equal(again[0], indices) or not np.array_equal(again[1], units):
        raise CanonicalError("tensor indices: a code is not in canonical order")


def _first_weight(small: Any) -> Any:
    """1 less the weights of the other vectors (n, k - 1), one after the other."""
    rest = 1.0 - small[:, 0]
    for s in range(1, small.shape[1]):
        rest = rest - small[:, s]
    return rest


def _add_passes(numbers: Any, passes: Sequence[int], xp: Any) -> Any:
    """Rows from their passes, first to last: (passes, n) to (rows, n)."""
    most = max(passes, default=1)
    if most == 1:
        return numbers
    starts = np.concatenate([[0], np.cumsum(passes)])
    extended = xp.concatenate([numbers, xp.zeros_like(numbers[:1])])
    total = None
    for p in range(most):
        index = np.where(np.array(passes) > p, starts[:-1] + p, starts[-1])  # a row without this pass adds zero
        part = extended[index if xp is np else xp.as_tensor(index, device=numbers.device)]
        total = part if total is None else total + part
    return total
