"""The contract of a method, and the registry that finds methods by scanning this folder.

A method is one file here that defines one subclass of `Method` and binds an instance to ``METHOD``. Everything else
follows from it: the CLI command, the validator's tensor list, size prediction, the writer, the law tests. The id and
version name the bytes and their meaning: two programs that know the same id and version decode the same update.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from lrconvert.core import registry
from lrconvert.core.dtypes import Array
from lrconvert.core.errors import FingerprintError, OptionError, VersionError
from lrconvert.lora import packing
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter, LoraTarget, Target
from lrconvert.lora.packing import TensorSpec

DEFAULT_RATIO = 50

if TYPE_CHECKING:
    from lrconvert.lora.base_weights import BaseWeights
    from lrconvert.lora.input_statistics import InputStatistics, Moment
    from lrconvert.lora.trainable import TrainableAdapter

Tensors = Mapping[str, Array]


@dataclass(frozen=True)
class FitContext:
    """The means of a fit besides the LoRA: a seed, a torch device name, a progress callback (fraction, text), input
    statistics, in whose metric it then works, and the weights of the base, for forms whose updates depend on them."""

    seed: int = 0
    device: str = "cpu"
    progress: Callable[[float, str], None] = field(default=lambda fraction, text: None)
    statistics: InputStatistics | None = None
    base: BaseWeights | None = None

    def metric(self, pair: LoraTarget) -> Moment | None:
        """Return the metric that a fit measures the error of a target in, None without statistics: the plain norm.
        Raises E-STATS."""
        if self.statistics is None:
            return None
        from lrconvert.lora import svd

        return svd.fit_metric(pair, self.statistics.of(pair.target))


@dataclass(frozen=True)
class Budget:
    """A byte budget: `size(config)` is the exact size of the file that a config leads to, extras not counted."""

    limit: int
    size: Callable[[Any], int]

    def fits(self, config: Any) -> bool:
        return self.size(config) <= self.limit


@dataclass(frozen=True)
class Command:
    """A CLI command that leads to a method: its name, one help line, and options that it fixes."""

    name: str
    help: str
    fixed: Mapping[str, Any] = field(default_factory=dict)


class Method(ABC):
    """One compact form. Stateless; everything is a pure function of its arguments.

    `Options` (a frozen dataclass) is what a user asks for; its fields, with ``metadata={"help": ...}``, become CLI
    options. `Config` (a frozen dataclass) is what the file needs to decode the tensors; its JSON part is `header`, and
    per-target integers that would bloat JSON are stored as packed *layout* tensors.
    """

    id: ClassVar[str]
    version: ClassVar[int] = 1
    earlier: ClassVar[tuple[int, ...]] = ()  # versions that are read forever and no longer made: `v<version>.py`
    title: ClassVar[str]
    commands: ClassVar[tuple[Command, ...]]
    Options: ClassVar[type[Any]]
    examples: ClassVar[tuple[Mapping[str, Any], ...]]  # option sets that the law tests and golden files run over
    searches: ClassVar[tuple[Mapping[str, Any], ...]] = ()  # option sets that `compress` tries; none: it passes by
    uses: ClassVar[tuple[str, ...]] = ("statistics",)  # which of seed, device and statistics mean something to its fit
    fit_seconds: ClassVar[float] = 0.1  # of one core, of a fit to a million numbers, about
    default_ratio: ClassVar[int | None] = DEFAULT_RATIO  # when no size is asked for; None: its size is no choice

    # --- what the file holds ---

    @abstractmethod
    def header(self, config: Any) -> dict[str, Any]:
        """The JSON part of `config`: integers, booleans, short strings, flat lists."""

    def layout_specs(self, header: Mapping[str, Any], targets: Sequence[Target]) -> tuple[TensorSpec, ...]:
        """The index tensors that complete `header`, as they are declared. Raises our errors on a header out of bounds.

        Tensors are declared in the order of the method's page, layout before payload; the manifest's ``exponents``
        follow it. How tensors lie in the file is another order, and the container's business.
        """
        return ()

    def layout(self, config: Any) -> dict[str, Array]:
        """The values (uint32) of the layout tensors of `config`."""
        return {}

    @abstractmethod
    def config(self, header: Mapping[str, Any], layout: Tensors, targets: Sequence[Target]) -> Any:
        """The Config of a file. Checks every field and bound; raises our errors, never builtin ones."""

    @abstractmethod
    def specs(self, config: Any, targets: Sequence[Target]) -> tuple[TensorSpec, ...]:
        """The payload tensors of `config` in the order of their declaration, without empty ones."""

    @abstractmethod
    def ranks(self, config: Any, targets: Sequence[Target]) -> Sequence[int]:
        """The rank of the update of each target; what an expansion costs follows from it."""

    def check(self, config: Any, targets: Sequence[Target], tensors: Tensors) -> None:  # noqa: B027 -- most have none
        """Rules on values beyond what the specs say. Raises our errors."""

    def needs_base(self, config: Any) -> bool:
        """Return true if updates depend on the base's weights. They are no products of factors then: `rows_on` says
        what they are, and a file must name the contents of its base."""
        return False

    # --- making it ---

    def wants_base(self, options: Any) -> bool:
        """Return true if these `options` lead to updates that depend on the base."""
        return False

    @abstractmethod
    def plan(self, lora: LoraAdapter, options: Any, budget: Budget | None, context: FitContext) -> Any:
        """The Config that `options` and `budget` lead to; cheap beside `fit`. The size of the output follows from it.

        Raises E-BUDGET (naming the smallest possible size) if nothing fits, E-OPTION on impossible options.
        """

    @abstractmethod
    def fit(self, lora: LoraAdapter, config: Any, context: FitContext) -> dict[str, Array]:
        """The payload tensors that represent `lora` best under `config`; in-memory form of `packing`."""

    def refit(
        self, lora: LoraAdapter, compact: CompactAdapter, size: Callable[[Any], int], context: FitContext
    ) -> CompactAdapter:
        """Return `compact` fitted anew to `lora`, in a file that is no larger; `size` as in `Budget`. The default keeps
        its Config."""
        return replace(compact, tensors=self.fit(lora, compact.config, context))

    def form(self, config: Any) -> tuple[str, str]:
        """Return the name and the title of the form that `config` is of: those of the method, if it has one form."""
        return self.id, self.title

    def notes(self, config: Any, targets: Sequence[Target]) -> tuple[str, ...]:
        """Return facts that a user should know of this configuration, a line each: a bound that it cannot exceed,
        say."""
        return ()

    # --- using it ---

    @abstractmethod
    def expand(
        self, config: Any, targets: Sequence[Target], values: Mapping[str, Any], which: int, xp: Any
    ) -> tuple[Any, Any]:
        """Factors (A (r, in), B (out, r)) in float32 of target number `which`; the update is exactly ``B @ A``.

        `values` are the payload tensors as numbers (see `values`); `xp` is the numpy or torch module that they belong
        to. The only formula of the method, the same bits on both. Where updates depend on the base, their part that
        does not.
        """

    def rows_on(
        self, config: Any, targets: Sequence[Target], which: int, factors: tuple[Any, Any], weight: Any, first: int
    ) -> Any:
        """Return, where updates depend on the base, rows `first` and on of the update of target number `which`, in the
        shape and dtype of `weight` (n, m), the same rows of the base's matrix. `factors` are those that `expand` gives.

        `weight` may be a part of the columns: any that begins and ends at a multiple of the target's rank. With numpy
        in float64 the operations and their order are those of the method's page, so that every machine merges the same
        bits; torch tensors, whole multiples of the rank in rows too, give the same numbers up to rounding, with
        gradients.
        """
        raise NotImplementedError

    # --- training it ---

    def student(self, compact: CompactAdapter) -> TrainableAdapter:
        """`compact` in training, for `refining`. The default moves all numbers and no index."""
        from lrconvert.lora.trainable import Rates, TrainableAdapter

        return TrainableAdapter(self, compact, Rates())


def module_names() -> list[str]:
    """Ids of the methods: the file names of this folder."""
    return registry.names("lrconvert.methods")


@cache
def get(name: str) -> Method:
    """The method of that name: an id, or for an earlier version ``<id>.v<version>``. Raises E-VER for an unknown
    one."""
    method_id, _, version = name.partition(".v")
    if method_id not in module_names():
        known = ", ".join(module_names())
        raise VersionError(f"the method {name!r} is not known", fix=f"known: {known}; is lrconvert too old?")
    method: Method = registry.load("lrconvert.methods", method_id, "METHOD")
    if not version:
        return method
    if version not in map(str, method.earlier):
        raise VersionError(f"the method {method_id} has no version {version!r:.20}", fix="update lrconvert")
    earlier: Method = registry.load("lrconvert.methods", name, "METHOD")
    return earlier


def name_of(method_id: str, version: Any) -> str:
    """Return the name of the method of this id and version, as files state them. Raises E-VER for one that is not
    known."""
    if method_id not in module_names():
        get(f"{method_id!r:.80}")  # refuses it
    method = get(method_id)
    if type(version) is int and version in (method.version, *method.earlier):
        return method_id if version == method.version else f"{method_id}.v{version}"
    versions = ", ".join(str(n) for n in sorted((method.version, *method.earlier)))
    what = f"method {method_id} has version {version!r:.20} in the file, this program knows {versions}"
    raise VersionError(what, fix="update lrconvert")


def all_methods() -> list[Method]:
    """Return the methods, each in its last version."""
    return [get(name) for name in module_names()]


def values(method: Method, compact: CompactAdapter, xp: Any = np) -> dict[str, Any]:
    """The payload tensors of `compact` as numbers: codes as odd integers (int8, or int16 at 8 bits), halves as float32,
    indices as int64, coded integers in sixteenths of a step, float32; numpy arrays, and what gives slices of one for
    coded integers (`packing.CodedNumbers`), or torch tensors if `xp` is torch."""
    numbers: dict[str, Any] = {}
    for spec in method.specs(compact.config, compact.targets):
        array: Any = compact.tensors[spec.name]
        if spec.kind == "code":
            array = packing.odd_integers(array, spec.bits)
        elif spec.kind == "coded":
            array = packing.CodedNumbers(array) if xp is np else packing.coded_values(array)
        elif spec.kind == "index":
            array = array.astype(np.int64)
        numbers[spec.name] = array if xp is np else xp.from_numpy(np.ascontiguousarray(array))
    return numbers


def form(compact: CompactAdapter) -> tuple[str, str]:
    """Return the name and the title of the form that an adapter is of."""
    return get(compact.method).form(compact.config)


def needs_base(adapter: LoraAdapter | CompactAdapter) -> bool:
    """Return true if the updates of an adapter depend on the base's weights."""
    return isinstance(adapter, CompactAdapter) and get(adapter.method).needs_base(adapter.config)


def expand_all(compact: CompactAdapter, xp: Any = np) -> Iterator[tuple[Target, Any, Any]]:
    """(target, A, B) of every target of a compact adapter, one at a time; ``delta_W = B @ A``. Raises E-OPTION if there
    are no such factors: if updates depend on the base."""
    if needs_base(compact):
        what = f"the updates of this {compact.method} adapter depend on the base's weights: it has no factors"
        raise OptionError(what, fix="merge it into its base, attach it, or export it to peft-miss")
    yield from without_base(compact, xp)


def without_base(compact: CompactAdapter, xp: Any = np) -> Iterator[tuple[Target, Any, Any]]:
    """(target, A, B) as `Method.expand` gives them: of updates that depend on the base their part that does not."""
    method = get(compact.method)
    numbers = values(method, compact, xp)
    for which, target in enumerate(compact.targets):
        a, b = method.expand(compact.config, compact.targets, numbers, which, xp)
        yield target, a, b


def updates_on(compact: CompactAdapter, base: BaseWeights) -> Iterator[tuple[Target, int, Iterator[tuple[int, Array]]]]:
    """(target, rank, rows of its update) of every target of an adapter whose updates depend on the base: rows as (first
    row, (n, in) in float64). Raises E-FPR if the adapter was made for other weights."""
    method = get(compact.method)
    if compact.base.content != base.content:
        raise FingerprintError("the adapter was made for a base of other contents", fix="its updates are of that base")
    ranks = method.ranks(compact.config, compact.targets)

    def rows(which: int, target: Target, factors: tuple[Any, Any]) -> Iterator[tuple[int, Array]]:
        for top, weight in base.blocks(target, max(1, ranks[which])):
            wide = weight.astype(np.float64)
            yield top, method.rows_on(compact.config, compact.targets, which, factors, wide, top)

    for which, (target, a, b) in enumerate(without_base(compact)):
        yield target, ranks[which], rows(which, target, (a, b))
