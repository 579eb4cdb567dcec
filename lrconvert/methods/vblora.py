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

Stored tensors, in file order (rows: by target, A before B, largest component first; codes: by row, pass, place t):

=============  =====  ============================================================================================
``ranks``      index  (targets,): components of each target; only if they differ
``passes``     index  (rows,): passes of each row, less one; only if a row has more than one
``bank``       half   (h, b) at 16 bit; or ``code`` at 8 or 4 bit, the odd integers times ``scales``
``scales``     half   (h,): one per vector; only at 8 or 4 bit
``indices``    index  (codes, k): heaviest vector first, lower index first among equals, no index twice
``weights``    index  (codes, k - 1): the integers c of all but the first vector, m bit; only for k > 1
``gains``      half   (passes of all rows,); only with gains
=============  =====  ============================================================================================

A weight of zero carries the lowest index that its code does not use otherwise: one spelling per meaning.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from lrconvert import canonical, packing, vectorbank
from lrconvert.adapter import LoraAdapter, LoraTarget, Target
from lrconvert.dtypes import F64, Array
from lrconvert.errors import (
    BudgetError,
    CanonicalError,
    IndexRangeError,
    JsonSyntaxError,
    LimitError,
    MissingFieldError,
    OptionError,
    UnknownFieldError,
    ValueRangeError,
)
from lrconvert.limits import MAX_DIM, MAX_RANK, MAX_VECTORS
from lrconvert.methods.base import Budget, Command, FitContext, Method, Tensors
from lrconvert.packing import TensorSpec
from lrconvert.vectorbank import I64, Rows

if TYPE_CHECKING:
    from torch import Tensor

MAX_TOP_K = 16
MAX_PASSES = 16
MAX_WEIGHT_BITS = 8
BANK_BITS = (16, 8, 4)
_LARGEST = 2.0**127  # what files may expand to

_WEIGHT_BITS = 3  # 2 lose some percent of what is captured, 4 gain none per byte
_ROUNDS = 6  # alternations of codes and bank on the training sample
_SWEEPS = 16  # alternations of A, B and bank on the update itself
_BEAMS = (20, 10, 5)  # partial codes kept in the sweeps: the widest with which all of them stay within
_SWEEP_WORK = 2e10  # scores; a minute or less
_SAMPLE = 1 << 15  # sub-vectors the bank is trained on, or 32 per vector if that is more
_FEW = 1 << 14  # codes of a problem for which planning fits every hopeful form, not only the three best
_MANY = 1 << 17  # codes above which it fits none, and relies on samples
_RESTART_WORK = 5e7  # scores per round up to which a second start is worth its time
_SETTLED = 5e-4  # relative fall of the error below which a sweep was the last
_SEARCH_WORK = 1e9  # codes times vectors: the search leaves out forms whose fit would take minutes
_HOPE = 0.88  # planning tries forms that should keep this share of what the best should
_SEARCHED_PASSES = 8
_VECTORS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 32)
_MIXED = ((8, 64), (8, 256), (16, 256), (32, 512))  # short forms with k = 2 that a search considers, (b, h)
_LONG = ((64, 256), (128, 512), (128, 2048), (256, 256), (256, 2048))  # the published regime


@dataclass(frozen=True)
class VBLoraOptions:
    """What a user may ask for."""

    rank: int | None = field(default=None, metadata={"help": "Components of every target (at most what it has)."})
    vector_length: int | None = field(default=None, metadata={"help": "Numbers per bank vector, b."})
    num_vectors: int | None = field(default=None, metadata={"help": "Vectors in the bank, h."})
    top_k: int | None = field(default=None, metadata={"help": "Bank vectors mixed in one sub-vector, k."})
    bits: int | None = field(default=None, metadata={"help": "Bits per number of the bank: 16, 8 or 4."})
    weight_bits: int | None = field(default=None, metadata={"help": "Bits per mixing weight, 1 to 8; only for k > 1."})
    gain: str = field(
        default="auto",
        metadata={
            "help": "A gain per coded row: on, off, or auto (on unless PEFT-compatible).",
            "choices": ("auto", "on", "off"),
        },
    )
    passes: int | None = field(default=None, metadata={"help": "How often a row is coded at most; needs gains."})
    peft_compatible: bool = field(
        default=False,
        metadata={"help": "Keep to what PEFT's VBLoRA can express: one rank, no gains, no cut sub-vectors."},
    )


@dataclass(frozen=True)
class Form:
    """Everything but the allocation: the bank is (num_vectors, vector_length) at `bits`; codes mix `top_k` vectors with
    weights of `weight_bits`; `gains`: rows are scaled."""

    vector_length: int
    num_vectors: int
    top_k: int = 1
    bits: int = 16
    weight_bits: int = 0
    gains: bool = True

    @property
    def denominator(self) -> int:
        """Weights are multiples of 1 / denominator."""
        return 2 << self.weight_bits

    @property
    def code_bits(self) -> int:
        """Bits of one coded sub-vector."""
        return self.top_k * packing.index_bits(self.num_vectors) + (self.top_k - 1) * self.weight_bits

    @property
    def bank_bits(self) -> int:
        scales = 16 * self.num_vectors if self.bits < 16 else 0
        return self.num_vectors * self.vector_length * self.bits + scales

    def row_bits(self, length: Any) -> Any:
        """Bits of one pass over a row of `length` numbers."""
        return -(-length // self.vector_length) * self.code_bits + (16 if self.gains else 0)


@dataclass(frozen=True)
class Config:
    """`ranks`: components of each target. `passes`: of each row, empty if every row has one. `padded`: some row is not
    a multiple of the vector length, so that its last sub-vector is cut."""

    form: Form
    ranks: tuple[int, ...]
    passes: tuple[int, ...] = ()
    padded: bool = False

    @property
    def rows(self) -> int:
        return 2 * sum(self.ranks)


_FIELDS = {
    "vector_length": (1, MAX_DIM),
    "num_vectors": (1, MAX_VECTORS),
    "top_k": (1, MAX_TOP_K),
    "bits": (4, 16),
    "weight_bits": (0, MAX_WEIGHT_BITS),
    "rank": (1, MAX_RANK),
    "passes": (1, MAX_PASSES),
    "rows": (2, 1 << 40),
}
_FLAGS = ("gains", "uniform", "padded")


@lru_cache(maxsize=8)
def _starts(config: Config, targets: tuple[Target, ...]) -> tuple[tuple[int, int, int], ...]:
    """(row, pass, code) where each target begins; the last entry holds the totals. Grows with targets and `passes`."""
    b = config.form.vector_length
    row = turn = code = 0
    starts = []
    for target, rank in zip(targets, config.ranks, strict=True):
        starts.append((row, turn, code))
        out, inner = target.matrix_shape
        for length in (inner, out):
            turns = sum(config.passes[row : row + rank]) if config.passes else rank
            code += turns * -(-length // b)
            turn += turns
            row += rank
    return (*starts, (row, turn, code))


def _complete(form: Form, targets: Sequence[Target], ranks: Sequence[int], passes: Sequence[int]) -> Config:
    """The one Config of an allocation."""
    b = form.vector_length
    padded = any(rank and any(n % b for n in t.matrix_shape) for t, rank in zip(targets, ranks, strict=True))
    return Config(form, tuple(ranks), tuple(passes) if max(passes, default=1) > 1 else (), padded)


def _rows(config: Config, targets: Sequence[Target]) -> Rows:
    """The rows of a fit, in file order."""
    shapes = np.array([t.matrix_shape for t in targets], np.int64).reshape(-1, 2)
    sizes = np.repeat(shapes[:, ::-1].reshape(-1), np.repeat(config.ranks, 2))
    passes = np.array(config.passes or [1] * len(sizes), np.int64)
    return Rows.of(sizes, passes, config.form.vector_length)


class VBLora(Method):
    """See the module's docstring."""

    id = "vblora"
    version = 1
    title = "VB-LoRA: one vector bank"
    commands = (Command("lora-to-vblora", "Code all factors with one shared bank of short vectors (VB-LoRA)."),)
    Options = VBLoraOptions
    examples = (
        {"vector_length": 4, "num_vectors": 64, "passes": 3},
        {"vector_length": 16, "num_vectors": 24, "top_k": 2, "rank": 3, "bits": 8},
        {"vector_length": 8, "num_vectors": 16, "top_k": 3, "weight_bits": 5, "gain": "off"},
        {"vector_length": 7, "num_vectors": 32, "top_k": 2, "bits": 4, "passes": 2},
        {"peft_compatible": True, "rank": 2, "num_vectors": 32},
    )

    # --- what the file holds ---

    def header(self, config: Config) -> dict[str, Any]:
        form = config.form
        return {
            "vector_length": form.vector_length,
            "num_vectors": form.num_vectors,
            "top_k": form.top_k,
            "bits": form.bits,
            "weight_bits": form.weight_bits,
            "gains": form.gains,
            "padded": config.padded,
            "rank": max(config.ranks),
            "uniform": min(config.ranks) == max(config.ranks),
            "passes": max(config.passes, default=1),
            "rows": config.rows,
        }

    def layout_specs(self, header: Mapping[str, Any], targets: Sequence[Target]) -> tuple[TensorSpec, ...]:
        known = {*_FIELDS, *_FLAGS}
        if set(header) != known:
            wrong = sorted(set(header) ^ known)[0]
            raise (UnknownFieldError if wrong in header else MissingFieldError)(f"method.config: field {wrong!r}")
        for name in _FLAGS:
            if type(header[name]) is not bool:
                raise JsonSyntaxError(f"method.config.{name} is {header[name]!r:.40}; true or false is allowed")
        for name, (least, most) in _FIELDS.items():
            if type(header[name]) is not int or not least <= header[name] <= most:
                raise LimitError(f"method.config.{name} is {header[name]!r:.40}; {least} to {most} are allowed")
        if header["bits"] not in BANK_BITS:
            raise LimitError(f"method.config.bits is {header['bits']}; 16, 8 and 4 are allowed")
        if header["top_k"] > header["num_vectors"]:
            raise LimitError(f"method.config.top_k is {header['top_k']}, more than the {header['num_vectors']} vectors")
        if (header["weight_bits"] == 0) != (header["top_k"] == 1):
            raise LimitError("method.config.weight_bits must be 0 for top_k 1, and at least 1 for more")
        if header["passes"] > 1 and not header["gains"]:
            raise LimitError("method.config.passes is more than 1 without gains")
        ranks = () if header["uniform"] else (packing.index("ranks", (len(targets),), header["rank"] + 1),)
        if header["passes"] == 1:
            return ranks
        return (*ranks, packing.index("passes", (header["rows"],), header["passes"]))

    def layout(self, config: Config) -> dict[str, Array]:
        tensors: dict[str, Array] = {}
        if min(config.ranks) != max(config.ranks):
            tensors["ranks"] = np.array(config.ranks, np.uint32)
        if config.passes:
            tensors["passes"] = np.array(config.passes, np.uint32) - np.uint32(1)
        return tensors

    def config(self, header: Mapping[str, Any], layout: Tensors, targets: Sequence[Target]) -> Config:
        if header["uniform"]:
            ranks = (header["rank"],) * len(targets)
        else:
            ranks = tuple(layout["ranks"].tolist())
            if max(ranks) != header["rank"] or min(ranks) == max(ranks):
                raise CanonicalError("method.config: rank and uniform do not describe the tensor 'ranks'")
        for target, rank in zip(targets, ranks, strict=True):
            if rank > min(target.matrix_shape):
                raise LimitError(f"target {target.name!r} has rank {rank}, more than its shape {target.matrix_shape}")
        if header["rows"] != 2 * sum(ranks):
            raise LimitError(f"method.config.rows is {header['rows']}; the ranks add up to {2 * sum(ranks)}")
        passes = tuple((layout["passes"] + np.uint32(1)).tolist()) if header["passes"] > 1 else ()
        if passes and max(passes) != header["passes"]:
            raise CanonicalError("method.config.passes is not the largest number of passes")
        names = ("vector_length", "num_vectors", "top_k", "bits", "weight_bits", "gains")
        config = _complete(Form(*(header[name] for name in names)), targets, ranks, passes)
        if config.padded != header["padded"]:
            raise CanonicalError("method.config.padded does not say whether sub-vectors are cut")
        return config

    def specs(self, config: Config, targets: Sequence[Target]) -> tuple[TensorSpec, ...]:
        form = config.form
        _, passes, codes = _starts(config, tuple(targets))[-1]
        shape = (form.num_vectors, form.vector_length)
        found = [packing.half("bank", shape)]
        if form.bits < 16:
            found = [packing.code("bank", shape, form.bits), packing.half("scales", (form.num_vectors,))]
        found.append(packing.index("indices", (codes, form.top_k), form.num_vectors))
        if form.top_k > 1:
            found.append(packing.index("weights", (codes, form.top_k - 1), 1 << form.weight_bits))
        if form.gains:
            found.append(packing.half("gains", (passes,)))
        return tuple(found)

    def ranks(self, config: Config, targets: Sequence[Target]) -> Sequence[int]:
        return config.ranks

    def check(self, config: Config, targets: Sequence[Target], tensors: Tensors) -> None:
        form = config.form
        if form.bits < 16 and bool((tensors["scales"] < 0).any()):
            raise ValueRangeError("tensor scales: a vector has a negative scale")
        largest = float(np.abs(tensors["bank"]).max()) if form.bits == 16 else float(2**form.bits - 1)
        for name in ("scales", "gains"):
            if name in tensors:
                largest *= float(np.abs(tensors[name]).max(initial=0.0))
        if largest * max(config.passes, default=1) >= _LARGEST:
            raise ValueRangeError("bank, scales and gains multiply to 2^127 or more, beyond float32")
        if form.top_k == 1:
            return
        step = 1 << 20
        for start in range(0, len(tensors["indices"]), step):
            indices = tensors["indices"][start : start + step].astype(np.int64)
            units = tensors["weights"][start : start + step].astype(np.int64)
            units = np.concatenate([form.denominator - units.sum(1, keepdims=True), units], axis=1)
            ordered = np.sort(indices, axis=1)
            if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
                raise IndexRangeError("tensor indices: a code names one vector twice")
            if bool((units[:, 0] < units[:, 1]).any()):
                raise ValueRangeError("tensor weights: the weights of a code leave too little for its first vector")
            again = _canonical_codes(indices, units)
            if not np.array_equal(again[0], indices) or not np.array_equal(again[1], units):
                raise CanonicalError("tensor indices: a code is not in canonical order")

    # --- using it ---

    def expand(
        self, config: Config, targets: Sequence[Target], values: Mapping[str, Any], which: int, xp: Any
    ) -> tuple[Any, Any]:
        def double(numbers: Any) -> Any:
            return numbers.astype(np.float64) if xp is np else numbers.double()

        form, rank = config.form, config.ranks[which]
        out, inner = targets[which].matrix_shape
        row, turn, code = _starts(config, tuple(targets))[which]
        bank = double(values["bank"])
        if form.bits < 16:
            bank = bank * double(values["scales"])[:, None]
        sides = []
        for length in (inner, out):
            passes = config.passes[row : row + rank] if config.passes else (1,) * rank
            turns, cuts = sum(passes), -(-length // form.vector_length)
            codes = slice(code, code + turns * cuts)
            indices = values["indices"][codes]
            vectors = bank[indices[:, 0]]
            if form.top_k > 1:
                small = double(values["weights"][codes]) * (1.0 / form.denominator)
                rest = 1.0 - small[:, 0]
                for s in range(1, form.top_k - 1):
                    rest = rest - small[:, s]
                vectors = vectors * rest[:, None]
                for s in range(1, form.top_k):
                    vectors = vectors + bank[indices[:, s]] * small[:, s - 1, None]
            numbers = vectors.reshape(turns, cuts * form.vector_length)[:, :length]
            if form.gains:
                numbers = numbers * double(values["gains"][turn : turn + turns])[:, None]
            sides.append(_add_passes(numbers, passes, xp))
            row, turn, code = row + rank, turn + turns, code + turns * cuts
        a, b = (side.astype(np.float32) if xp is np else side.float() for side in sides)
        return a, b.T

    # --- making it ---

    def plan(self, lora: LoraAdapter, options: VBLoraOptions, budget: Budget | None, context: FitContext) -> Config:
        _check_options(lora, options)
        targets = lora.shapes()
        spectra = [canonical.singular_values(pair) for pair in lora.targets]
        limits = [min(len(s), options.rank or MAX_RANK) for s in spectra]
        if options.peft_compatible:
            limits = [min(limits)] * len(limits)
        if budget is None:
            form = _default_form(targets, limits, options)
            return _complete(form, targets, limits, [options.passes or 1] * (2 * sum(limits)))
        return _Search(lora, spectra, limits, options, budget, context).best()

    def fit(self, lora: LoraAdapter, config: Config, context: FitContext) -> dict[str, Array]:
        return _fit(lora, config, context)


METHOD = VBLora()


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


def _canonical_codes(indices: I64, units: I64) -> tuple[I64, I64]:
    """Codes (n, k) as the format spells them: heaviest first, lower index first among equals; a weight of zero has the
    lowest index that is free."""
    order = np.lexsort((indices, -units), axis=1)
    indices, units = np.take_along_axis(indices, order, 1), np.take_along_axis(units, order, 1)
    used = np.where(units > 0, indices, -1)
    free = np.zeros(len(indices), np.int64)
    for s in range(1, indices.shape[1]):
        empty = units[:, s] == 0
        if not empty.any():
            continue
        for _ in range(indices.shape[1]):
            free += empty & (used == free[:, None]).any(1)
        indices[:, s] = np.where(empty, free, indices[:, s])
        free += empty
    return indices, units


# --- options and defaults -------------------------------------------------------------------------------------------


def _check_options(lora: LoraAdapter, options: VBLoraOptions) -> None:
    """Raises E-OPTION on options that are out of range or contradict each other."""
    ranges = {
        "rank": (1, MAX_RANK),
        "vector_length": (1, MAX_DIM),
        "num_vectors": (1, MAX_VECTORS),
        "top_k": (1, MAX_TOP_K),
        "weight_bits": (1, MAX_WEIGHT_BITS),
        "passes": (1, MAX_PASSES),
    }
    for name, (least, most) in ranges.items():
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            raise OptionError(f"--{name.replace('_', '-')} is {value}; {least} to {most} are allowed")
    if options.bits not in (None, *BANK_BITS):
        raise OptionError(f"--bits is {options.bits}; the bank takes 16, 8 or 4")
    if options.gain not in ("auto", "on", "off"):
        raise OptionError(f"--gain is {options.gain!r}; auto, on and off are allowed")
    if options.top_k is not None and options.num_vectors is not None and options.top_k > options.num_vectors:
        raise OptionError(
            f"--top-k {options.top_k} needs at least as many vectors; --num-vectors is {options.num_vectors}"
        )
    if options.weight_bits is not None and options.top_k == 1:
        raise OptionError("--weight-bits has no meaning with --top-k 1")
    if not _scaled(options) and (options.passes or 1) > 1:
        raise OptionError("--passes above 1 need gains", fix="leave out --gain off and --peft-compatible, or --passes")
    if options.peft_compatible and options.gain == "on":
        raise OptionError("--peft-compatible and --gain on contradict each other")
    b = options.vector_length
    if options.peft_compatible:
        common = int(np.gcd.reduce([n for t in lora.shapes() for n in t.matrix_shape]))
        if common % (b or common):
            raise OptionError(
                f"--peft-compatible: {b} does not divide every dimension", fix=f"choose a divisor of {common}"
            )
        if common == 1:
            raise OptionError("--peft-compatible: no vector length divides every dimension")


def _scaled(options: VBLoraOptions) -> bool:
    return options.gain == "on" or (options.gain == "auto" and not options.peft_compatible)


def _divides(b: int, targets: Sequence[Target]) -> bool:
    return not any(n % b for t in targets for n in t.matrix_shape)


def _default_form(targets: Sequence[Target], limits: Sequence[int], options: VBLoraOptions) -> Form:
    """The form without a size to meet: 8 numbers per vector (a divisor in PEFT-compatible mode), k = 1, and a small
    bank beside the codes; from 64 numbers per vector on the published k = 2 and up to 2048 vectors."""
    b = options.vector_length
    if b is None:
        b = next((n for n in (8, 4, 2, 16, 3, 5, 6, 7) if _divides(n, targets)), 8)
        if options.peft_compatible and not _divides(b, targets):
            b = int(np.gcd.reduce([n for t in targets for n in t.matrix_shape]))
    k = options.top_k or (2 if b >= 64 and (options.num_vectors or 2) > 1 else 1)
    h = options.num_vectors
    if h is None:
        codes = sum(rank * -(-n // b) for t, rank in zip(targets, limits, strict=True) for n in t.matrix_shape)
        h = 1 << max(4, min(11 if b >= 64 else 8, int(np.log2(max(codes / (2 * b), 1)))))
        h = max(h, 1 << (k - 1).bit_length())
    return Form(b, h, k, options.bits or 16, 0 if k == 1 else options.weight_bits or _WEIGHT_BITS, _scaled(options))


# --- planning under a budget ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Choice:
    """An allocation under an assumed loss per pass: `kept` is the energy it should keep."""

    kept: float
    ranks: tuple[int, ...]
    passes: tuple[int, ...]


class _Search:
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
        """Raises E-BUDGET if nothing fits, E-OPTION if no form suits the options."""
        if not self.smallest:
            raise OptionError("no vector length of those tried suits these options", fix="give --vector-length")
        size, _, least = self.smallest[0]
        if size > self.budget.limit:
            raise BudgetError(
                f"{self.budget.limit} bytes cannot be reached; the smallest possible file has {size} bytes"
            )
        payload = sum(spec.nbytes for spec in METHOD.specs(least, self.targets))
        self.overhead = 8 * (size - payload) + 2 * len(self.targets)  # bits, about
        ranked: dict[int, tuple[float, Form]] = {}  # the most promising form for each number of vectors
        for _, _, config in self.smallest:
            form = config.form
            choice = self._allocate(form, self._rule_of_thumb(form), self._room(form))
            if choice is not None and choice.kept > ranked.get(form.num_vectors, (0.0, form))[0]:
                ranked[form.num_vectors] = choice.kept, form
        hopeful = _HOPE * max((kept for kept, _ in ranked.values()), default=0.0)
        forms = [form for kept, form in sorted(ranked.values(), key=lambda entry: -entry[0]) if kept >= hopeful]
        found = [filled for form in forms if (filled := self._fill(form, self._rule_of_thumb(form))) is not None]
        if len(found) > 1:
            most = np.array([config.ranks for _, config in found]).max(0)
            factors = [_top(pair, int(rank)) for pair, rank in zip(self.lora.targets, most, strict=True)]
            codes = max(_starts(config, self.targets)[-1][2] for _, config in found)
            if codes > _FEW:
                found = sorted((self._sample(config, factors) for _, config in found), key=lambda entry: -entry[0])[:3]
            if codes <= _MANY:
                found = [self._try(config, factors) for _, config in found]
        return max(found, key=lambda entry: entry[0], default=(0.0, least))[1]

    def _forms(self) -> Iterator[Form]:
        """Every form that the options leave open."""
        options, scaled = self.options, _scaled(self.options)
        b, h, k = options.vector_length, options.num_vectors, options.top_k
        known = [(length, vectors, 1) for length in _LENGTHS for vectors in _VECTORS]
        known += [(length, vectors, 2) for length, vectors in (*_MIXED, *_LONG)]
        for length, vectors, top_k in dict.fromkeys(
            (b or i, h or j, k or (min(n, h) if h else n)) for i, j, n in known
        ):
            if top_k > vectors or (options.peft_compatible and not _divides(length, self.targets)):
                continue
            if b is None and top_k == 1 and not 0.3 <= np.log2(vectors) / length <= 3:
                continue
            for bits in BANK_BITS if options.bits is None else (options.bits,):
                if options.bits is None and length < {16: 0, 8: 4, 4: 32}[bits]:
                    continue  # the scales eat what the bits save
                weight_bits = 0 if top_k == 1 else options.weight_bits or _WEIGHT_BITS
                form = Form(length, vectors, top_k, bits, weight_bits, scaled)
                if h is None and vectors > 4 and 8 * self.budget.limit / form.code_bits * vectors > _SEARCH_WORK:
                    continue
                yield form

    def _least(self, form: Form) -> Config:
        """The smallest Config of a form."""
        if self.options.rank is not None or self.options.peft_compatible:
            ranks = [n if self.options.rank is not None else 1 for n in self.limits]
        else:
            ranks = [0] * len(self.limits)
            ranks[int(self.owner[np.argmin(form.row_bits(self.inner) + form.row_bits(self.out))])] = 1
        return _complete(form, self.targets, ranks, ())

    def _room(self, form: Form) -> float:
        """Bits that codes and gains may take, about."""
        return 8.0 * self.budget.limit - form.bank_bits - self.overhead

    def _allocate(self, form: Form, loss: float, bits: float) -> _Choice | None:
        """The passes that keep the most energy if each leaves the share `loss`, at no more than `bits`; None if even
        the least does not fit. A component of energy e with p and q passes on its sides keeps
        e (1 - loss^p) (1 - loss^q).

        Each component takes what pays at one common price per bit (Lagrange); what is left is spent greedily.
        """
        cost_a, cost_b = form.row_bits(self.inner), form.row_bits(self.out)
        if self.options.peft_compatible:
            return self._uniform(cost_a + cost_b, loss, bits)
        most = (self.options.passes or _SEARCHED_PASSES) if form.gains else 1
        steps = [(p, q) for p in range(1, most + 1) for q in range(1, most + 1) if abs(p - q) <= 2]
        if self.options.rank is None:
            steps.insert(0, (0, 0))
        p, q = np.array(steps).T
        cost = cost_a[:, None] * p + cost_b[:, None] * q
        gain = self.energy[:, None] * ((1 - loss**p) * (1 - loss**q))
        everyone = np.arange(len(cost))
        if cost[:, 0].sum() > bits:
            return None
        high = 1.01 * float((gain[:, -1] / cost[:, min(1, len(steps) - 1)]).max()) + 1e-300  # nobody buys
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
        return self._choice(p[taken], q[taken], float(gain[everyone, taken].sum()))

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

    def _try(self, config: Config, factors: Sequence[canonical.Factors]) -> tuple[float, Config]:
        """(energy kept, Config) by a short fit."""
        problem = _Problem(self.lora, config, "cpu", factors)
        refit = problem.refit(problem.train(self.context.seed, 3, 1)[0])
        for _ in range(3):
            refit.sweep(0)
            refit.sweep(1)
            error = refit.improve_bank(refit.error())
        return refit.energy - error, config

    def _sample(self, config: Config, factors: Sequence[canonical.Factors]) -> tuple[float, Config]:
        """(energy kept, Config) for the loss per pass of a bank trained on a sample of the rows."""
        problem = _Problem(self.lora, config, "cpu", factors)
        h, everything = config.form.num_vectors, int(problem.rows.starts[-1])
        enough = max(16 * h, 128 * len(problem.rows.counts) // config.form.vector_length)  # for bank, and gains
        coder, x = problem.train(self.context.seed, 4, 1, max(_FEW // 2, enough))
        power = vectorbank.row_sums((x * x).sum(1), coder.rows.counts) * problem.weight
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
            config = _complete(form, self.targets, choice.ranks, choice.passes)
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


# --- fitting --------------------------------------------------------------------------------------------------------


class _Problem:
    """What a fit works on: the rows to code as sub-vectors `x` (n, b), scaled to mean square 1 if there are gains; what
    a squared error of each row costs in the update (`weight`); and the sources (`updates`)."""

    def __init__(
        self, lora: LoraAdapter, config: Config, device: str, factors: Sequence[canonical.Factors] | None = None
    ) -> None:
        import torch

        self.form, self.rows = config.form, _rows(config, lora.shapes())
        b, gains = self.form.vector_length, self.form.gains
        x = np.zeros((int(self.rows.starts[-1]), b), np.float32)
        self.weight = np.zeros(len(self.rows.counts))
        self.scale = np.ones(len(self.rows.counts))  # what a row of x must be multiplied with
        self.updates: list[vectorbank.Update] = []
        row = 0
        for which, (pair, rank) in enumerate(zip(lora.targets, config.ranks, strict=True)):
            left, right = _tensor(pair.B, device), _tensor(pair.A, device)
            self.updates.append(vectorbank.Update(left, right, pair.scale, row, rank))
            if rank == 0:
                continue
            top = _top(pair, rank) if factors is None else factors[which]
            s = top.s[:rank]
            for side in (top.Vt[:rank], top.U[:, :rank].T):
                length = side.shape[1]
                here = x[int(self.rows.starts[row]) : int(self.rows.starts[row + rank])].reshape(rank, -1)
                here[: len(s), :length] = side * (np.sqrt(length) if gains else np.sqrt(s)[:, None])
                some = slice(row, row + len(s))
                self.weight[some] = s * s / length if gains else s
                self.scale[some] = np.sqrt(s / length) if gains else 1.0
                row += rank
        self.x = torch.from_numpy(x).to(device)

    def train(self, seed: int, rounds: int, restarts: int, sample: int = MAX_DIM) -> tuple[vectorbank.Coder, Tensor]:
        """A bank for at most about `sample` sub-vectors, with the codes of these; and these."""
        form = self.form
        rows, x = self.rows, self.x
        if len(x) > 2 * sample:
            rows, kept = rows.thinned(len(x) // sample)
            x = x[_tensor(kept, str(x.device))]
        if rows.codes * form.num_vectors > _RESTART_WORK:
            restarts = 1
        shape = (form.num_vectors, form.top_k, form.denominator, form.gains)
        rng = np.random.default_rng(seed)
        return vectorbank.train_bank(x, rows, self.weight, shape, rng, rounds, restarts), x

    def refit(self, coder: vectorbank.Coder) -> vectorbank.Refit:
        """The codes of all rows, at the size that the update needs."""
        if coder.scaled:
            coder.gains *= np.repeat(self.scale, self.rows.passes)
        return vectorbank.Refit(coder, self.updates)


def _top(pair: LoraTarget, rank: int) -> canonical.Factors:
    """The largest `rank` components of a target."""
    if rank == 0:
        out, inner = pair.target.matrix_shape
        return canonical.Factors(np.zeros((out, 0)), np.zeros(0), np.zeros((0, inner)))
    whole = canonical.svd(pair)
    return canonical.Factors(whole.U[:, :rank].copy(), whole.s[:rank], whole.Vt[:rank].copy())


def _tensor(array: Array, device: str) -> Tensor:
    """As float32 (integers as they are), without a copy where that can be."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a read-only array is only read
        kind = np.float32 if array.dtype.kind == "f" else array.dtype
        return torch.from_numpy(np.ascontiguousarray(array, kind)).to(device)


def _fit(lora: LoraAdapter, config: Config, context: FitContext) -> dict[str, Array]:
    """Trains a bank on the canonical rows (a sample if there are many), codes all rows, and refits codes, gains and
    bank on the update itself; the last sweeps run on the bank as it will be stored."""
    form = config.form
    problem = _Problem(lora, config, context.device)
    context.progress(0.1, "training the bank")
    coder, x = problem.train(context.seed, _ROUNDS, 2, max(_SAMPLE, 32 * form.num_vectors))
    if len(x) < len(problem.x):
        coder = vectorbank.Coder.new(problem.rows, coder.bank, form.top_k, form.denominator, form.gains)
        coder.recode(np.arange(len(problem.rows.counts)), problem.x, fresh=True)
    refit = problem.refit(coder)
    del problem, x
    context.progress(0.4, "refitting")
    work = 2.0 * coder.rows.codes * form.num_vectors * (1 if form.top_k == 1 else 12)  # one sweep of both sides
    for coder.beam in _BEAMS if config.passes and form.top_k == 1 else (1,):
        if coder.beam * work * _SWEEPS <= _SWEEP_WORK:
            break
    sweeps = int(min(_SWEEPS, max(1, _SWEEP_WORK / (coder.beam * work + 1))))
    error = refit.error()
    for turn in range(sweeps):
        before = error
        refit.sweep(0)
        refit.sweep(1)
        error = refit.improve_bank(refit.error())
        context.progress(0.4 + 0.4 * (turn + 1) / sweeps, "refitting")
        if error > before * (1 - _SETTLED):
            break
    tensors = _store_bank(coder, form)
    coder.exact = True
    refit.refresh()
    for _ in range(2 if sweeps > 1 else 1):
        refit.sweep(0)
        refit.sweep(1)
    return {**tensors, **_store_codes(coder, form)}


def _store_bank(coder: vectorbank.Coder, form: Form) -> dict[str, Array]:
    """The bank as stored; from now on the coder works with these very numbers."""
    bank = coder.bank.cpu().numpy()
    if form.bits == 16:
        stored = packing.round_half(bank)
        coder.bank = coder.tensor(stored)
        return {"bank": stored}
    codes, scales = packing.quantize_rows(bank, form.bits)
    scales = packing.round_half(scales)
    coder.bank = coder.tensor(packing.code_values(codes, form.bits) * scales[:, None])
    return {"bank": codes, "scales": scales}


def _store_codes(coder: vectorbank.Coder, form: Form) -> dict[str, Array]:
    indices = coder.indices.cpu().numpy()
    tensors: dict[str, Array] = {}
    if form.top_k > 1:
        units = np.rint(coder.weights.cpu().numpy() * form.denominator).astype(np.int64)
        indices, units = _canonical_codes(indices, units)
        tensors["weights"] = units[:, 1:].astype(np.uint32)
    tensors["indices"] = indices.astype(np.uint32)
    if form.gains:
        tensors["gains"] = packing.round_half(coder.gains)
    return tensors
