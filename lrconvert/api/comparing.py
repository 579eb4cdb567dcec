"""Verbs about what a conversion keeps: compare, and the statistics that fits and reports see by."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrconvert.api.shared import (
    AnyAdapter,
    AnyCompact,
    AnyLora,
    AnyPath,
    Progress,
    adapter_at,
    adapter_of,
    check_data,
    compact_of,
    located,
    lora_of,
    model_or_folder,
    output_of,
    path_of,
    refuse_rest,
    silent,
    take_reading,
)
from lrconvert.core.errors import LrcError, OptionError
from lrconvert.core.options import take
from lrconvert.formats import fidelity as fidelity_report
from lrconvert.formats import loading
from lrconvert.formats.fidelity import Comparison, Fidelity
from lrconvert.formats.fleet import places as fleet_places
from lrconvert.formats.lrc.file import is_lrconvert
from lrconvert.live.options import CompareOptions, StatisticsOptions
from lrconvert.lora import statistics_file
from lrconvert.lora.adapter import LoraAdapter
from lrconvert.lora.input_statistics import InputStatistics
from lrconvert.methods import base as methods

if TYPE_CHECKING:
    from torch import nn


def compare(
    source: AnyLora,
    files: AnyCompact | Sequence[AnyCompact],
    options: CompareOptions | None = None,
    *,
    statistics: AnyPath | InputStatistics | None = None,
    base: AnyPath | nn.Module | None = None,
    data: AnyPath | Sequence[AnyPath] | Iterable[Mapping[str, Any]] | None = None,
    progress: Progress | None = None,
    **more: Any,
) -> Comparison:
    """Measure lrconvert files, compact adapters or results of verbs, one or several, against the LoRA they came from:
    captured energy per target and in total, bytes, ratio.

    `statistics` adds the captured energy of the layers' outputs. `base` and `data` (as in `statistics`; better not the
    data of the fit) add what is true on it: the error of each layer's output, the KL distance of the logits from the
    LoRA's own, agreement. An adapter whose updates depend on the base's weights (Bat) needs the folder of the base.
    `more` are single fields of `CompareOptions`, and `allow_pickle`, `layout` and `alpha` as in `load`, which, as
    `base`, are also for a source that is a path. Raises E-STATS, E-DATA, E-OPTION, E-FPR, and E-BASE for targets that
    are not the source's.

    >>> from lrconvert import convert, load_lora
    >>> lora = load_lora("my-adapter")
    >>> files = [convert(lora, "lowrank", target_size=size) for size in (6000, 9000)]
    >>> small, large = compare(lora, files)
    >>> small.captured < large.captured
    True
    """
    progress = progress or silent
    model = None if base is None else model_or_folder(base)
    where = model if isinstance(model, Path) else None
    reading = take_reading(more, where)
    chosen = take(CompareOptions, options, more, "compare")
    refuse_rest(more, "compare", CompareOptions)
    if data is not None:
        check_data(data)
    input_statistics = None if statistics is None else load_statistics(statistics)
    several = isinstance(files, Sequence) and not isinstance(files, str)
    items: Sequence[AnyCompact] = files if several else [files]  # type: ignore[assignment,list-item]
    for item in (source, *items):
        if isinstance(item, (str, PathLike)):
            path_of(item, "source" if item is source else "files")
    _check_order(source, items)
    lora = lora_of(source, reading, "source")
    compacts, rows = [], []
    for item in items:
        try:
            compacts.append(compact_of(item, "files"))
            rows.append(_as_stored(fidelity_report.fidelity_on(lora, compacts[-1], input_statistics, where), item))
        except LrcError as error:
            raise (error.at(item) if isinstance(item, (str, PathLike)) else error) from None
    named = not isinstance(source, LoraAdapter)  # the base may have been for names alone
    if data is None and (base is None or named or any(methods.needs_base(compact) for compact in compacts)):
        return Comparison(rows)
    if model is None or data is None:
        raise OptionError("base and data go together", fix="give both")
    from lrconvert.live import statistics as measuring

    measured = measuring.measured(lora, compacts, model, data, chosen, progress)
    return Comparison(measured.added_to(fidelity, n) for n, fidelity in enumerate(rows))


def _as_stored(row: Fidelity, item: object) -> Fidelity:
    """Return a row with the bytes that its file has: an older lrconvert may have written it in more."""
    if not isinstance(item, (str, PathLike)):
        return row
    with adapter_at(item, "files") as where:
        if not where.is_file():
            return row
        return replace(row, overhead_bytes=row.overhead_bytes + where.stat().st_size - row.total_bytes)


def _is_ours(path: AnyPath) -> bool:
    return fleet_places.is_member(path) or is_lrconvert(Path(path))


def _check_order(source: AnyLora, items: Sequence[AnyCompact]) -> None:
    """Raise E-OPTION if the source is an lrconvert file, and what is measured against it is none."""
    if not isinstance(source, (str, PathLike)) or not _is_ours(source):
        return
    other = next((i for i in items if isinstance(i, (str, PathLike)) and not _is_ours(i)), None)
    if other is not None:
        what = f"is an lrconvert file, and {os.fspath(other)} is none: they are the wrong way round"
        raise OptionError(what, fix="give the LoRA first, and then the files that came from it", path=source)


def statistics(
    base: AnyPath | nn.Module,
    data: AnyPath | Sequence[AnyPath] | Iterable[Mapping[str, Any]],
    out: AnyPath | None = None,
    options: StatisticsOptions | None = None,
    *,
    adapter: AnyAdapter | None = None,
    progress: Progress | None = None,
    **more: Any,
) -> InputStatistics:
    """Measure the second moments E[x x^T] of the inputs of a base's layers, the metric for fits and for `compare`.

    `base`: a model folder, hub id, or live model. `data`: what trainers take (files, folders, names of data sets in the
    local cache, rows of text such as a `datasets.Dataset`), or any iterable of model inputs (dicts of tensors; the way
    for vision models). All layers, or those of `adapter`, or those that `include` and `exclude` choose. With `out` the
    statistics are written there, and unfinished work beside it: the same call goes on with it. `more` are single fields
    of `StatisticsOptions`, and `allow_pickle`, `layout` and `alpha` as in `load`, for the adapter. Raises E-DATA,
    E-STATS, E-BASE, E-VALUE, E-OUT-*.
    """
    progress = progress or silent
    from lrconvert.live import statistics as measuring

    model = model_or_folder(base)
    reading = take_reading(more, model if isinstance(model, Path) else None)
    chosen = take(StatisticsOptions, options, more, "statistics")
    refuse_rest(more, "statistics", StatisticsOptions)
    if adapter is None:
        loading.refuse_options(reading)
    check_data(data)
    return measuring.statistics(
        model,
        data,
        None if out is None else output_of(out),
        chosen,
        adapter=None if adapter is None else adapter_of(adapter, reading),
        progress=progress,
    )


def load_statistics(path: AnyPath | InputStatistics) -> InputStatistics:
    """Read a file of statistics; moments are read when they are needed. Raises E-MISSING, E-DIGEST, ..."""
    return path if isinstance(path, InputStatistics) else statistics_file.read(located(path, "statistics"))
