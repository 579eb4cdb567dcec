"""From a LoRA to a compact adapter: what is left out, what the base settles, the budget, the fit, what it kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lrconvert.convert.bake_dora import bake_dora as baked_dora
from lrconvert.convert.options import ConvertOptions, ExtraDtype
from lrconvert.core import dtypes
from lrconvert.core.devices import resolved, torch_device
from lrconvert.core.errors import BudgetError, EmptyAdapterError, FingerprintError, OptionError
from lrconvert.core.limits import OWN
from lrconvert.core.notebook import html_table
from lrconvert.core.options import make
from lrconvert.core.wording import spelled
from lrconvert.formats import base_class, config_shapes
from lrconvert.formats.fidelity import Fidelity, dropped_note
from lrconvert.formats.fidelity import fidelity as measure_fidelity
from lrconvert.formats.lrc import budgets, file
from lrconvert.io import hub, strictjson
from lrconvert.io.checkpoint import KnownContent, is_without_weights, open_checkpoint
from lrconvert.io.container import read_json
from lrconvert.lora import base_names, float_range
from lrconvert.lora.adapter import MAGNITUDES, CompactAdapter, ExtraTensor, LoraAdapter, Provenance, Target
from lrconvert.lora.base_names import name_filter
from lrconvert.lora.base_weights import BaseWeights
from lrconvert.lora.fingerprint import fingerprint
from lrconvert.lora.input_statistics import InputStatistics
from lrconvert.methods import base as methods
from lrconvert.methods.base import Budget, FitContext

_NAMES_ONLY = (
    "the base holds no model.safetensors: it gave names alone; orientations stay as the adapter has them, and no "
    "digest is recorded"
)


@dataclass(frozen=True)
class Conversion:
    """A planned or finished conversion. `compact` has no tensors and `fidelity` is None after a dry run; `sizes` are
    exact either way. `by_default`: no size was asked for."""

    compact: CompactAdapter
    sizes: file.Sizes
    source_bytes: int
    fidelity: Fidelity | None
    warnings: tuple[str, ...]
    by_default: bool = field(default=False, kw_only=True)

    def __repr__(self) -> str:
        kept = "" if self.fidelity is None else f", captured {self.fidelity.captured:.4f}"
        size = f"{self.sizes.adapter:,} bytes, {self.ratio:.1f} times smaller"
        return f"<{type(self).__name__}: {self.compact.method}, {size}{kept}>"

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        kept = "not fitted" if self.fidelity is None else f"{self.fidelity.captured:.4f}"
        row = (self.compact.method, f"{self.sizes.adapter:,}", f"{self.ratio:.1f}", kept, len(self.dropped))
        head = ("form", "bytes", "times smaller", "captured", "modules dropped")
        return html_table(type(self).__name__, head, [row], [*self.warnings, *self.notes])

    @property
    def ratio(self) -> float:
        """Source factors at 16 bit over the file's bytes, extras counted on neither side."""
        return self.source_bytes / self.sizes.adapter

    @property
    def dropped(self) -> tuple[str, ...]:
        """The targets of which nothing is kept; after a dry run those of rank 0."""
        if self.fidelity is not None:
            return self.fidelity.dropped
        ranks = methods.get(self.compact.method).ranks(self.compact.config, self.compact.targets)
        return tuple(t.name for t, rank in zip(self.compact.targets, ranks, strict=True) if not rank)

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what a user should know of the loss, as `Fidelity.notes`."""
        if self.fidelity is not None:
            return self.fidelity.notes
        return (dropped_note(self.dropped, len(self.compact.targets)),) if self.dropped else ()


# What is fitted in place of a LoRA, and the Config, where it is not the LoRA itself and the method's own plan.
Choose = Callable[[LoraAdapter, Budget | None, FitContext], tuple[LoraAdapter, Any]]
Progress = Callable[[float, str], None]


@dataclass(frozen=True, eq=False)
class PreparedSource:
    """A LoRA ready for conversions: the chosen targets, as the base stores them, and the base's opened weights, if
    there is one. `source_bytes`: the factors at 16 bit."""

    lora: LoraAdapter
    source_bytes: int
    weights: BaseWeights | None
    options: ConvertOptions
    warnings: tuple[str, ...]


@contextmanager
def prepare_source(
    lora: LoraAdapter, options: ConvertOptions, base_content: KnownContent | None
) -> Iterator[PreparedSource]:
    """Choose targets and settle them on the base, which is read once for its digest, if that is not known, and is open
    meanwhile."""
    lora, warnings = _select(lora, options.include, options.exclude)
    float_range.check(lora)
    if hub.is_private(lora.provenance.base_model):
        short = hub.last_part(lora.provenance.base_model)
        warnings += (f"the source names its base by a private path; only {short!r:.80} of it is kept in the file",)
    source_bytes = lora.half_bytes
    with _on_base(lora, options.base, options.bake_dora, base_content) as (lora, weights, notes):
        warnings += notes
        if any(extra.use in MAGNITUDES for extra in lora.extras):
            warnings += (_dora_note(),)
        yield PreparedSource(lora, source_bytes, weights, options, warnings)


def convert(
    lora: LoraAdapter,
    method: str,
    options: ConvertOptions,
    method_options: Mapping[str, Any],
    *,
    dry_run: bool = False,
    base_content: KnownContent | None = None,
    progress: Progress,
    choose: Choose | None = None,
) -> Conversion:
    """Convert `lora`; see `lrconvert.api.convert`. With `choose` it says what is fitted; what is kept is measured
    against the LoRA."""
    make(methods.get(method).Options, method_options, method)  # before a base is read
    with prepare_source(lora, options, base_content) as source:
        return convert_prepared(source, method, method_options, dry_run=dry_run, progress=progress, choose=choose)


def convert_prepared(
    source: PreparedSource,
    method: str,
    method_options: Mapping[str, Any],
    *,
    dry_run: bool = False,
    progress: Progress,
    choose: Choose | None = None,
) -> Conversion:
    """Convert what `source` holds, under its options. With `choose` as `convert`."""
    form, options = methods.get(method), source.options
    chosen = make(form.Options, method_options, method)
    lora, weights = source.lora, source.weights
    content = "" if weights is None else weights.content
    statistics = options.input_statistics
    if statistics is not None and content and statistics.content not in ("", content):
        raise FingerprintError(
            "the statistics are of a base with other contents", fix="collect them from this base", path=options.base
        )
    warnings = (*source.warnings, *_not_measured(lora, statistics))
    wanted = _times(lora, options.strength)
    default = not method_options and options.target_size is None and options.target_ratio is None
    ratio = form.default_ratio if default else options.target_ratio
    budget_bytes = _budget_bytes(source.source_bytes, options.target_size, ratio)
    default = default and budget_bytes is not None
    skeleton = CompactAdapter(
        method=form.id,
        config=None,
        targets=lora.shapes(),
        tensors={},
        extras=tuple(_cast_extra(extra, options.extra_dtype) for extra in lora.extras),
        provenance=_provenance(lora.provenance, budget_bytes),
        base=replace(fingerprint(lora.shapes()), content=content),
    )
    device = resolved(options.device)
    if device != "cpu":
        torch_device(device)  # what is not there is refused before the work
    context = FitContext(options.seed, device, progress, statistics, weights)

    def plan(skeleton: CompactAdapter, limit: int | None = budget_bytes) -> tuple[LoraAdapter, Any]:
        budget = None
        if limit is not None:
            sizes = file.sizer(skeleton)
            budget = Budget(limit, lambda config: sizes(config).adapter)
        return (
            (wanted, form.plan(wanted, chosen, budget, context)) if choose is None else choose(wanted, budget, context)
        )

    try:
        fitted, config = plan(budgets.with_room(skeleton))
    except BudgetError:
        try:
            fitted, config = plan(skeleton)  # a size at the limit: a refinement then adds no note
        except BudgetError as error:
            named = _with_ratio(_reachable(error, skeleton, plan), source.source_bytes)
            raise default_too_small(named) if default else named from None
    planned = replace(skeleton, config=config)
    sizes = file.sizes(planned)
    file.check(planned)  # before the work: a file that could not be written is not worth fitting
    if dry_run:
        return Conversion(planned, sizes, source.source_bytes, None, warnings, by_default=default)
    compact = replace(planned, tensors=form.fit(fitted, config, context))
    fidelity = measure_fidelity(lora, compact, statistics, weights)
    compact = _with_captured(compact, fidelity.captured)
    return Conversion(compact, sizes, source.source_bytes, fidelity, warnings, by_default=default)


def default_too_small(error: BudgetError) -> BudgetError:
    """Return the error of a size that cannot be reached where nobody asked for one."""
    what = f"no size was asked for, and {methods.DEFAULT_RATIO} times smaller is too small here: {error.what}"
    fix = error.fix or f"ask for one: {spelled('target_size')} or {spelled('target_ratio')}"
    return BudgetError(what, fix=fix, smallest=error.smallest)


def _times(lora: LoraAdapter, strength: float | None) -> LoraAdapter:
    """The LoRA with its updates times `strength`. Raises E-OPTION for one that is not above 0."""
    if strength is None:
        return lora
    if not strength > 0:
        raise OptionError(f"{spelled('strength')} is {strength}; it must be above 0", fix="leave it out for 1")
    return replace(lora, targets=tuple(replace(pair, scale=pair.scale * strength) for pair in lora.targets))


def _not_measured(lora: LoraAdapter, statistics: InputStatistics | None) -> Iterator[str]:
    """Yield a warning if there are statistics, but not of all targets. Raises E-STATS if they are of none."""
    names = () if statistics is None else statistics.unknown(lora.shapes())
    if names:
        yield (
            f"the statistics have no input of {len(names)} of {len(lora.targets)} targets, {names[0]!r:.100} for one: "
            "these are fitted in the plain norm of their weights; for all of them, collect statistics anew, without "
            f"{spelled('include')} and {spelled('exclude')}, on data that reaches these layers"
        )


def _select(lora: LoraAdapter, include: Sequence[str], exclude: Sequence[str]) -> tuple[LoraAdapter, tuple[str, ...]]:
    """The LoRA with the targets that the patterns choose, and its warnings, the left-out targets named."""
    keeps = name_filter(include, exclude)
    kept, names = [], []
    for pair in lora.targets:
        if keeps(pair.target.name):
            kept.append(pair)
        else:
            names.append(pair.target.name)
    if not kept:
        raise EmptyAdapterError(f"{spelled('include')} and {spelled('exclude')} leave no target")
    warnings = lora.warnings
    if names:
        warnings += (f"{len(names)} of {len(lora.targets)} targets are left out as asked, {names[0]} for one",)
    gone = set(names)
    extras = tuple(e for e in lora.extras if e.use == "replace" or _owner(e) not in gone)
    return replace(lora, targets=tuple(kept), extras=extras), warnings


def _owner(extra: ExtraTensor) -> str:
    """The target that a part of an update belongs to: a LoRA's bias goes with its layer."""
    return extra.name.removesuffix(".bias") + ".weight" if extra.use == "add" else extra.name


@contextmanager
def _on_base(
    lora: LoraAdapter, base: Path | None, bake_dora: int | None, known_content: KnownContent | None
) -> Iterator[tuple[LoraAdapter, BaseWeights | None, tuple[str, ...]]]:
    """The LoRA with shapes and views as the base stores them, the base's weights, and warnings, while it is open.

    Names stay those of the adapter, which it is compared with; what the base's class calls them is noted for exports.
    """
    if base is None:
        if bake_dora is not None:
            raise OptionError("baking DoRA needs the weights of the base", fix=f"give it with {spelled('base', ...)}")
        yield lora, None, ()
        return
    if bake_dora is None and is_without_weights(base):
        config = base / "config.json"
        config_shapes.check(lora, base)
        yield (base_class.noted(lora, read_json(config)) if config.is_file() else lora), None, (_NAMES_ONLY,)
        return
    with open_checkpoint(base, quantized=True) as checkpoint:
        resolved = base_names.resolve(lora, checkpoint)
        pairs = [
            replace(pair, target=Target(pair.target.name, stored.target.shape, stored.target.view))
            for pair, stored in zip(lora.targets, resolved.targets, strict=True)
        ]
        lora = replace(lora, targets=tuple(sorted(pairs, key=lambda pair: pair.target)))
        lora = base_class.noted(lora, checkpoint.config, checkpoint.tensors.keys())
        notes: tuple[str, ...] = ()
        if bake_dora is not None:
            baked = baked_dora(lora, checkpoint, bake_dora)
            lora, notes = baked.lora, (baked.note,)
        yield lora, BaseWeights(lora, checkpoint, checkpoint.content_digest(known_content)), notes


def _reachable(
    error: BudgetError, skeleton: CompactAdapter, plan: Callable[[CompactAdapter, int], object]
) -> BudgetError:
    """The error with the smallest size that is met if it is asked for: a file states the size that was asked for."""
    smallest = error.smallest
    while smallest:
        fields = {**skeleton.provenance.fields, budgets.FIELD: budgets.text(smallest)}
        try:
            plan(replace(skeleton, provenance=replace(skeleton.provenance, fields=fields)), smallest)
            break
        except BudgetError as larger:
            if larger.smallest <= smallest:
                return error
            smallest = larger.smallest
    what = error.what.replace(f"{error.smallest} bytes", f"{smallest} bytes")
    return BudgetError(what, fix=error.fix, smallest=smallest)


def _with_ratio(error: BudgetError, source_bytes: int) -> BudgetError:
    """The error with the largest ratio that can be reached beside the smallest size."""
    if not error.smallest:
        return error
    ratio = f"{math.floor(10 * source_bytes / error.smallest) / 10:g}"
    fix = f"ask for at most {ratio} times smaller, or for {error.smallest:,} bytes"
    return BudgetError(f"{error.what}, {ratio} times smaller", fix=fix, smallest=error.smallest)


def _dora_note() -> str:
    return (
        "DoRA: the low-rank part is refitted; the magnitudes, to which its sum with the base is scaled, are carried "
        f"along ({spelled('bake_dora', ...)} turns both into plain updates)"
    )


def _budget_bytes(source: int, size: int | None, ratio: float | None) -> int | None:
    if size is not None and ratio is not None:
        raise OptionError(f"{spelled('target_size')} and {spelled('target_ratio')} exclude each other")
    if (size is not None and size <= 0) or (ratio is not None and not ratio > 0):
        raise BudgetError("a size or ratio of zero or less cannot be reached")
    if size is not None:
        return size
    return None if ratio is None else int(source / ratio)


def _cast_extra(extra: ExtraTensor, dtype: ExtraDtype | None) -> ExtraTensor:
    """An extra in a narrower float dtype; untouched without `dtype`, or if it is not wider than that."""
    if dtype is None or extra.dtype not in dtypes.FLOATS or dtypes.itemsize(extra.dtype) <= dtypes.itemsize(dtype):
        return extra
    values = dtypes.decode(np.frombuffer(extra.data, dtypes.STORAGE[extra.dtype]), extra.dtype)
    return replace(extra, dtype=dtype, data=dtypes.round_to(values, dtype).tobytes())


def _provenance(source: Provenance, budget: int | None) -> Provenance:
    """The source's provenance without private paths, with the budget if there is one, and with room for the captured
    share (filled in after the fit).

    Its texts are notes from a configuration: they are brought into the form that a file holds rather than refused.
    """
    fields = {key: _note(text) for key, text in source.fields.items() if key != budgets.FIELD}
    fields |= {} if budget is None else {budgets.FIELD: budgets.text(budget)}
    fields["captured"] = _share(0.0)
    return Provenance(
        source=source.source,
        base_model=_note(hub.last_part(source.base_model)),
        revision=_note(source.revision),
        task_type=_note(source.task_type),
        fields=fields,
    )


def _note(text: str) -> str:
    """`text` as a file can hold it; nothing if it is too long, since a part of a name is another name."""
    clean = strictjson.canonical_text(text)
    return clean if len(clean.encode()) <= OWN.string_bytes else ""


def _share(value: float) -> str:
    """A share as text of fixed width, so that sizes are known before it is."""
    return f"{min(max(value, 0.0), 1.0):.4f}"


def _with_captured(compact: CompactAdapter, captured: float) -> CompactAdapter:
    provenance = compact.provenance
    return replace(compact, provenance=replace(provenance, fields={**provenance.fields, "captured": _share(captured)}))
