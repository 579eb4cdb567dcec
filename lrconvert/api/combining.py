"""The verb that makes one adapter of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from os import PathLike
from typing import Any

from lrconvert.api.shared import (
    AnyAdapter,
    Progress,
    adapter_of,
    method_of,
    path_of,
    refuse_rest,
    silent,
    take_reading,
)
from lrconvert.convert.combine.combine import Combination
from lrconvert.convert.combine.combine import combine as combine_adapters
from lrconvert.convert.combine.options import CombineOptions
from lrconvert.convert.combine.weighted import Weighted
from lrconvert.convert.convert import convert
from lrconvert.convert.options import ConvertOptions
from lrconvert.core.errors import ArgumentError, OptionError
from lrconvert.core.options import described, make, take
from lrconvert.core.wording import spelled
from lrconvert.formats import loading
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.io import hub
from lrconvert.merge.plan.updates import Scaled
from lrconvert.methods import base as methods
from lrconvert.methods.lowrank.plan import DEFAULT_BITS

_COMBINED = 0.5  # of the progress: behind when a compact form is made
Combinable = AnyAdapter | Scaled | tuple[AnyAdapter, float]


def combine(
    adapters: Combinable | Sequence[Combinable],
    mode: str = "sum",
    method: str | None = None,
    options: CombineOptions | None = None,
    *,
    progress: Progress | None = None,
    **more: Any,
) -> Combination:
    """Return several adapters of one base as one LoRA (`lora` of the result), or in the compact form `method`
    (`compact`): each a path, an adapter, or such with its weight, ``("my-adapter", 0.5)`` or ``Scaled``.

    `mode` is "sum", the exact weighted sum by stacking factors, "svd", the best part of it of a `rank`, or one of
    PEFT's `add_weighted_adapter`: "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune", and these with
    "_svd". `more` are single fields of `CombineOptions`, with a method those of `ConvertOptions` and its own options,
    and `allow_pickle`, `layout` and `alpha` as in `load`. Ranks and targets may differ: a target that an adapter lacks
    is zero there. Raises E-OPTION, E-BASE for other shapes, E-FPR for other bases, E-PLACE for extra tensors that
    differ, E-EMPTY, and what loading and converting raise.

    >>> both = combine([("my-adapter", 0.7), ("my-adapter", -0.2)])
    >>> both
    <Combination: sum of 2, ... targets, rank ...>
    >>> combine(["my-adapter", "my-adapter"], "svd", "lowrank", target_size="8KB").compact
    <CompactAdapter: lowrank, ... targets>
    """
    progress = progress or silent
    form, fixed = (None, {}) if method is None else method_of(method)
    base = more.get("base")
    reading = take_reading(more, base)
    more.setdefault("mode", mode)
    chosen = take(CombineOptions, options, more, "combine")
    chosen.check()
    if form is None:
        more.pop("base", None)
        refuse_rest(more, "combine", CombineOptions)
        return combine_adapters(_weighted(adapters, reading), chosen, progress)
    settled = take(ConvertOptions, None, {**more, "seed": chosen.seed}, "combine")
    own = {**fixed, **{name: value for name, value in more.items() if not hasattr(settled, name)}}
    make(methods.get(form).Options, own, form)  # before an adapter is read
    if form == "lowrank" and not own and settled.target_size is None and settled.target_ratio is None:
        own["bits"] = DEFAULT_BITS
    done = combine_adapters(_weighted(adapters, reading), chosen, lambda share, text: progress(_COMBINED * share, text))
    made = convert(
        done.lora,
        form,
        settled.resolved(),
        own,
        progress=lambda share, text: progress(_COMBINED + (1 - _COMBINED) * share, text),
    )
    return replace(done, conversion=made)


def _weighted(adapters: Combinable | Sequence[Combinable], reading: ReadOptions) -> list[Weighted]:
    """Return the adapters, every path read, with their weights."""
    is_pair = isinstance(adapters, tuple) and len(adapters) == 2 and isinstance(adapters[1], Real)
    several = isinstance(adapters, Sequence) and not isinstance(adapters, (str, bytes)) and not is_pair
    items: list[Any] = list(adapters) if several else [adapters]  # type: ignore[arg-type]
    if not items:
        raise OptionError("there is no adapter to combine", fix="give two or more")
    named = [_with_weight(item) for item in items]
    paths = [path_of(item, "adapters") for item, _, _ in named if isinstance(item, (str, PathLike))]
    read = iter(loading.load_all(paths, reading))
    return [
        Weighted(next(read), weight, name or hub.hint(item))
        if isinstance(item, (str, PathLike))
        else Weighted(adapter_of(item, ReadOptions(), "adapters"), weight, name or f"adapter {number}")
        for number, (item, weight, name) in enumerate(named, 1)
    ]


def _with_weight(item: Any) -> tuple[Any, float, str]:
    """Return an adapter, its weight and its name. Raises E-ARGUMENT."""
    if isinstance(item, Scaled):
        item, weight, name = item.adapter, item.scale, item.name
    elif isinstance(item, tuple) and len(item) == 2:
        (item, weight), name = item, ""
    else:
        weight, name = 1.0, ""
    if isinstance(weight, bool) or not isinstance(weight, Real):
        raise ArgumentError(f"the weight of an adapter is {described(weight)}; a number was expected")
    if isinstance(item, Real):
        fix = f"write ({spelled('adapter')}, 0.5) for an adapter and its weight"
        raise ArgumentError(f"an adapter is {described(item)}", fix=fix)
    return item, float(weight), name
