"""Several adapters of one base as one LoRA, target by target."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from lrconvert.convert.combine.arithmetic import combined
from lrconvert.convert.combine.extras import combined_extras
from lrconvert.convert.combine.options import CombineOptions
from lrconvert.convert.combine.weighted import Weighted
from lrconvert.convert.convert import Conversion
from lrconvert.convert.extract import factors
from lrconvert.convert.extract.options import ExtractOptions
from lrconvert.core.dtypes import F64, Array, Stored, round_to
from lrconvert.core.errors import BaseError, EmptyAdapterError, FingerprintError, OptionError
from lrconvert.core.wording import spelled
from lrconvert.formats.fidelity import target_key
from lrconvert.io import hub
from lrconvert.io.container import combined_digest, tensor_digest
from lrconvert.lora import svd
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter, LoraTarget, Provenance, Target
from lrconvert.lora.name_index import NameIndex
from lrconvert.methods import base as methods

Progress = Callable[[float, str], None]
_PRECISE = 1 << 20  # numbers of an update that is small enough to be combined in float64
_EXACT_SIDE = 2048  # the shorter side of an update whose singular values are all computed
_NEAR = ExtractOptions(iterations=4)  # the subspace iteration of larger ones


@dataclass(frozen=True)
class CombinedTarget:
    """A target of a combination: its rank, the `energy` of what it stands for, and the `error` of its factors: of
    ``sum``, ``svd`` and ``linear`` from the weighted sum, of others from what the mode makes of the updates, and 0
    where it makes factors."""

    target: Target
    rank: int
    energy: float
    error: float


@dataclass(frozen=True)
class Combination:
    """Several adapters as one: `lora`, and the `conversion` to a compact form where one was asked for."""

    lora: LoraAdapter
    mode: str
    weights: tuple[tuple[str, float], ...]
    targets: tuple[CombinedTarget, ...]
    warnings: tuple[str, ...]
    conversion: Conversion | None = None

    @property
    def compact(self) -> CompactAdapter | None:
        """The compact form, if one was asked for."""
        return None if self.conversion is None else self.conversion.compact

    @property
    def captured(self) -> float:
        """1 - squared error / squared norm, over all targets, of what `CombinedTarget` says."""
        energy = math.fsum(t.energy for t in self.targets)
        return 1 - math.fsum(t.error for t in self.targets) / energy if energy else 1.0

    def __repr__(self) -> str:
        ranks = sorted({t.rank for t in self.targets})
        return f"<Combination: {self.mode} of {len(self.weights)}, {len(self.targets)} targets, rank {ranks[-1]}>"


class _Source:
    """The factors of one adapter by target, made when they are needed."""

    def __init__(self, number: int, item: Weighted, places: Mapping[tuple[str, str], Target]) -> None:
        self.number, self.item = number, item
        shapes = item.adapter.shapes()
        index = NameIndex({name for name, _ in places}, ())
        self.which: dict[tuple[str, str], int] = {}
        for number, target in enumerate(shapes):
            name, view = target_key(target)
            self.which[index.find(name) or name, view] = number

    @cached_property
    def _values(self) -> Mapping[str, Any]:
        assert isinstance(self.item.adapter, CompactAdapter)
        return methods.values(methods.get(self.item.adapter.method), self.item.adapter)

    def target(self, key: tuple[str, str]) -> Target:
        """Return a target, under the name that the combination has for it."""
        return replace(self.item.adapter.shapes()[self.which[key]], name=key[0])

    def pair(self, key: tuple[str, str]) -> LoraTarget:
        """Return the factors of a target, its scale times the adapter's weight."""
        which, adapter = self.which[key], self.item.adapter
        if isinstance(adapter, LoraAdapter):
            own = adapter.targets[which]
            return replace(own, target=self.target(key), scale=own.scale * self.item.weight)
        method = methods.get(adapter.method)
        a, b = method.expand(adapter.config, adapter.targets, self._values, which, np)
        a, b = (Stored("F32", np.ascontiguousarray(x)) for x in (a, b))
        return LoraTarget(self.target(key), a, b, self.item.weight)


def combine(items: Sequence[Weighted], options: CombineOptions, progress: Progress) -> Combination:
    """Return the combination of several adapters; see `lrconvert.api.combine`."""
    options.check()
    _check(items)
    used = [item for item in items if item.weight]
    if not used:
        raise EmptyAdapterError("all weights are zero: nothing is left")
    sources, keys = _placed(used)
    extras = combined_extras(used, options)
    pairs, rows = [], []
    for number, key in enumerate(keys):
        present = [source for source in sources if key in source.which]
        _check_shapes(key, present)
        pair, energy, error = _target(key, present, options)
        progress((number + 1) / len(keys), key[0])
        if pair is not None:
            pairs.append(pair)
            rows.append(CombinedTarget(pair.target, pair.rank, energy, error))
    if not pairs:
        raise EmptyAdapterError("nothing is left of any target")
    order = sorted(range(len(pairs)), key=lambda n: pairs[n].target)
    warnings = (*_warnings(used, sources, keys), *extras.notes)
    lora = LoraAdapter(tuple(pairs[n] for n in order), extras.extras, _provenance(used, pairs), warnings)
    weights = tuple((item.name, item.weight) for item in items)
    return Combination(lora, options.mode, weights, tuple(rows[n] for n in order), warnings)


def _placed(items: Sequence[Weighted]) -> tuple[list[_Source], list[tuple[str, str]]]:
    """Return the adapters by the names of targets that the first adapter has for them, and all of these names."""
    places: dict[tuple[str, str], Target] = {}
    sources = []
    for number, item in enumerate(items):
        source = _Source(number, item, places)
        sources.append(source)
        for key in source.which:
            places.setdefault(key, source.target(key))
    return sources, sorted(places)


# --- one target -----------------------------------------------------------------------------------------------------


def _target(
    key: tuple[str, str], sources: Sequence[_Source], options: CombineOptions
) -> tuple[LoraTarget | None, float, float]:
    """Return a target's factors, the energy of what they stand for, and their error; None if nothing is left."""
    present = [(source, pair) for source, pair in ((s, s.pair(key)) for s in sources) if pair.rank]
    if not present:
        return None, 0.0, 0.0
    pairs = [pair for _, pair in present]
    labels = [f"combine/{source.number}/{key[0]}/{key[1]}" for source, _ in present]
    if options.mode == "sum":
        return stacked(pairs), _energy(stacked(pairs)), 0.0
    if options.mode == "svd":
        whole = stacked(pairs)
        cut = svd.svd(whole)
        rank = options.rank or max(pair.rank for pair in pairs)
        a, b = svd.balanced(cut, rank)
        made = _made(pairs[0].target, a, b)
        error, energy = svd.distance(whole, made.A, made.B)
        return made, energy, error
    if options.is_dense:
        return _dense(pairs, [source.item.weight for source, _ in present], options, labels)
    made = _of_factors(pairs, options, labels)
    if options.mode == "linear":
        error, energy = svd.distance(stacked(pairs), made.A, made.B)
        return made, energy, error
    return made, _energy(made), 0.0


def stacked(pairs: Sequence[LoraTarget]) -> LoraTarget:
    """Return the sum of the updates as one pair, their ranks one after the other. Factors of one scale and dtype keep
    their bits; otherwise scales are multiplied into B."""
    target = pairs[0].target
    dtypes = {(pair.a.dtype, pair.b.dtype) for pair in pairs}
    scales = {pair.scale for pair in pairs}
    if len(dtypes) == 1 and len(scales) == 1:
        (a, b), scale = next(iter(dtypes)), scales.pop()
        rows = np.concatenate([pair.a.array for pair in pairs], axis=0)
        columns = np.concatenate([pair.b.array for pair in pairs], axis=1)
        return LoraTarget(target, Stored(a, rows), Stored(b, columns), scale)
    wide = "F64" if any("F64" in kinds for kinds in dtypes) else "F32"
    lefts = [pair.B.astype(np.float64) * pair.scale for pair in pairs]
    rows = np.concatenate([pair.A for pair in pairs], axis=0)
    return LoraTarget(target, _stored(rows, wide), _stored(np.concatenate(lefts, axis=1), wide), 1.0)


def _of_factors(pairs: Sequence[LoraTarget], options: CombineOptions, labels: Sequence[str]) -> LoraTarget:
    """PEFT's combination of the factors, A and B each for itself: the root of weight times scale on both of them, its
    sign on A. Raises E-OPTION for different ranks."""
    if len({pair.rank for pair in pairs}) > 1:
        ranks = ", ".join(str(pair.rank) for pair in pairs)
        what = f"{options.mode} combines factors of one rank, and {pairs[0].target.name!r:.100} has ranks {ranks}"
        raise OptionError(what, fix="take sum, svd, or the form of this mode that ends in _svd")
    roots = [math.sqrt(abs(pair.scale)) for pair in pairs]
    signed = [math.copysign(root, pair.scale) for root, pair in zip(roots, pairs, strict=True)]
    a = combined([_wide(pair.A) for pair in pairs], signed, options, [f"{label}/A" for label in labels])
    b = combined([_wide(pair.B) for pair in pairs], roots, options, [f"{label}/B" for label in labels])
    return _made(pairs[0].target, a, b)


def _dense(
    pairs: Sequence[LoraTarget], weights: Sequence[float], options: CombineOptions, labels: Sequence[str]
) -> tuple[LoraTarget, float, float]:
    """PEFT's combination of the updates themselves, cut to a rank by the SVD, and its energy and error."""
    shape = pairs[0].target.matrix_shape
    kind: Any = np.float64 if math.prod(shape) <= _PRECISE else np.float32
    updates = [
        (kind(pair.scale / weight) * np.asarray(pair.B, kind)) @ np.asarray(pair.A, kind)
        for pair, weight in zip(pairs, weights, strict=True)
    ]
    update = combined([np.asarray(u, kind) for u in updates], weights, options, labels)
    rank = min(options.rank or max(pair.rank for pair in pairs), *shape)
    if min(shape) <= _EXACT_SIDE:
        u, s, vt = np.linalg.svd(update, full_matrices=False)
        root = np.sqrt(s[:rank])
        made = _made(pairs[0].target, root[:, None] * vt[:rank], u[:, :rank] * root)
    else:
        cut = factors.cut(factors.Dense(update), labels[0], rank, _NEAR)
        made = _made(pairs[0].target, cut.right, cut.left)
    error, energy = factors.Dense(update).residual(made.B, made.A)
    return made, energy, error


def _made(target: Target, a: Array, b: Array) -> LoraTarget:
    return LoraTarget(target, _stored(a, "F32"), _stored(b, "F32"), 1.0)


def _stored(values: Array, dtype: str) -> Stored:
    return Stored(dtype, round_to(np.ascontiguousarray(values), dtype))


def _wide(values: Array) -> F64:
    return values.astype(np.float64)


def _energy(pair: LoraTarget) -> float:
    out, inner = pair.target.matrix_shape
    return svd.distance(pair, np.zeros((0, inner)), np.zeros((out, 0)))[1]


# --- all of them ----------------------------------------------------------------------------------------------------


def _check(items: Sequence[Weighted]) -> None:
    """Raise E-OPTION for weights that are no numbers, and updates that are no products; E-FPR for different bases."""
    contents: dict[str, str] = {}
    for item in items:
        if not math.isfinite(item.weight):
            raise OptionError(f"the weight of {item.name!r:.100} is {item.weight}; a finite number is needed")
        if methods.needs_base(item.adapter):
            what = f"the updates of {item.name!r:.100} depend on the base's weights: they have no factors to combine"
            raise OptionError(what, fix="merge it into its base, or convert its LoRA to another form")
        if any(extra.use == "magnitude" for extra in item.adapter.extras):
            what = f"{item.name!r:.100} is DoRA, whose update is no sum with others"
            fix = f"make it a plain update first: convert it with {spelled('bake_dora', 32)} and {spelled('base', ...)}"
            raise OptionError(what, fix=fix)
        if isinstance(item.adapter, CompactAdapter) and item.adapter.base.content:
            contents[item.adapter.base.content] = item.name
    if len(contents) > 1:
        one, other = list(contents.values())[:2]
        what = f"{one!r:.100} and {other!r:.100} were made for bases of different contents"
        raise FingerprintError(what, fix="combine adapters of one base")


def _check_shapes(key: tuple[str, str], sources: Sequence[_Source]) -> None:
    """Raise E-BASE where adapters see a target in different shapes."""
    first, *others = [(source.item.name, source.target(key).matrix_shape) for source in sources]
    for name, shape in others:
        if shape != first[1]:
            what = f"{key[0]!r:.100} is {list(first[1])} (out, in) in {first[0]!r:.60}, {list(shape)} in {name!r:.60}"
            raise BaseError(what, fix="combine adapters of one base")


def _warnings(items: Sequence[Weighted], sources: Sequence[_Source], keys: Sequence[tuple[str, str]]) -> list[str]:
    """Return what a user should know of the adapters, a line each."""
    lines = [f"{item.name}: {line}" for item in items for line in item.adapter.warnings]
    bases = {hub.last_part(item.adapter.provenance.base_model) for item in items} - {""}
    if len(bases) > 1:
        lines.append(f"the adapters name different bases: {', '.join(sorted(bases))}; nothing says that they are one")
    for source in sources:
        absent = [key[0] for key in keys if key not in source.which]
        if absent:
            what = (
                f"{source.item.name} has no update of {len(absent)} of {len(keys)} targets, {absent[0]!r:.100} for one"
            )
            lines.append(f"{what}: zero there")
    return list(dict.fromkeys(lines))


def _provenance(items: Sequence[Weighted], pairs: Sequence[LoraTarget]) -> Provenance:
    """The origin of a combination: what its adapters agree on."""
    sources = [item.adapter.provenance for item in items]

    def common(values: Sequence[str]) -> str:
        named = {value for value in values if value}
        return named.pop() if len(named) == 1 else ""

    # Of these every adapter names its own; a module of one is one of all.
    lists = {
        key: sorted({name for p in sources for name in p.fields.get(key, "").split(",") if name})
        for key in ("embeddings", "modules_to_save", "target_parameters")
    }
    fields = {"source_format": "combined"} | {key: ",".join(names) for key, names in lists.items() if names}
    for key in ("base_model_class", "parent_library", "class_names"):
        if value := common([p.fields.get(key, "") for p in sources]):
            fields[key] = value
    digest = combined_digest(
        (text, tensor_digest(text, stored.dtype, stored.shape, [stored.array.tobytes()]))
        for pair in pairs
        for text, stored in (
            (f"{pair.target.name}/{pair.target.view.text}/{leaf}", getattr(pair, leaf)) for leaf in "ab"
        )
    )
    base, revision, task = (
        common([getattr(p, key) for p in sources]) for key in ("base_model", "revision", "task_type")
    )
    return Provenance(digest, base, revision, task, fields)
