"""Verbs about what a conversion keeps: compare, and the statistics that fits and reports see by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrconvert.api.adapters import read
from lrconvert.api.shared import AnyPath, Progress, silent, statistics_of
from lrconvert.core.errors import LrcError, OptionError
from lrconvert.formats import fidelity as report
from lrconvert.formats import loading
from lrconvert.formats.fidelity import Fidelity
from lrconvert.io import hub
from lrconvert.lora import statistics_file
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter
from lrconvert.lora.input_statistics import InputStatistics
from lrconvert.methods import base as methods

if TYPE_CHECKING:
    from torch import nn


def compare(
    source: AnyPath | LoraAdapter,
    files: Sequence[AnyPath | CompactAdapter],
    *,
    statistics: AnyPath | InputStatistics | None = None,
    base: AnyPath | nn.Module | None = None,
    data: AnyPath | Sequence[AnyPath] | Iterable[Mapping[str, Any]] | None = None,
    length: int = 512,
    batch_tokens: int = 1024,
    max_tokens: int = 1 << 15,
    device: str = "cpu",
    allow_pickle: bool = False,
    layout: str | None = None,
    alpha: float | None = None,
    progress: Progress = silent,
) -> list[Fidelity]:
    """Measure lrconvert files against the LoRA they came from: captured energy per target and in total, bytes, ratio.
    `base`, `layout` and `alpha` are also those of `load`, for a source that is a path.

    `statistics` adds the captured energy of the layers' outputs. `base` and `data` (as in `statistics`; better not the
    data of the fit) add what is true on it: the error of each layer's output, the KL distance of the logits from the
    LoRA's own, agreement. An adapter whose updates depend on the base's weights (Bat) needs the folder of the base.
    Raises E-STATS, E-DATA, E-OPTION, E-FPR, and E-BASE for targets that are not the source's.
    """
    known = statistics_of(statistics)
    where = base if isinstance(base, (str, PathLike)) else None
    lora = loading.lora(source, loading.options(allow_pickle, where, layout, alpha))
    compacts, found = [], []
    for item in files:
        try:
            compacts.append(item if isinstance(item, CompactAdapter) else read(item))
            found.append(report.fidelity_on(lora, compacts[-1], known, None if where is None else hub.locate(where)))
        except LrcError as error:
            raise (error if isinstance(item, CompactAdapter) else error.at(item)) from None
    named = not isinstance(source, LoraAdapter)  # the base may have been for names alone
    if data is None and (base is None or named or any(methods.needs_base(compact) for compact in compacts)):
        return found
    if base is None or data is None:
        raise OptionError("base and data go together", fix="give both")
    from lrconvert.live import statistics as gathering

    measured = gathering.measured(
        lora,
        compacts,
        hub.locate(base) if isinstance(base, (str, PathLike)) else base,
        data,
        length=length,
        batch_tokens=batch_tokens,
        max_tokens=max_tokens,
        device=device,
        progress=progress,
    )
    return [measured.told(n, fidelity) for n, fidelity in enumerate(found)]


def statistics(
    base: AnyPath | nn.Module,
    data: AnyPath | Sequence[AnyPath] | Iterable[Mapping[str, Any]],
    out: AnyPath | None = None,
    *,
    adapter: AnyPath | LoraAdapter | CompactAdapter | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    length: int = 512,
    batch_tokens: int = 4096,
    max_tokens: int = 1 << 18,
    exact_width: int = 1024,
    rank: int = 256,
    seed: int = 0,
    device: str = "cpu",
    checkpoint_seconds: float = 600.0,
    overwrite: bool = False,
    allow_pickle: bool = False,
    layout: str | None = None,
    alpha: float | None = None,
    progress: Progress = silent,
) -> InputStatistics:
    """Second moments E[x x^T] of the inputs of a base's layers, the metric for fits and for `compare`.

    `base`: a model folder, hub id, or live model. `data`: files of texts (``.txt``, ``.jsonl``), or any iterable of
    model inputs (dicts of tensors; the way for vision models). Texts are cut to `length` tokens, `batch_tokens` of them
    at a time, `max_tokens` in all (0: everything). All layers, or those of `adapter` (`layout` and `alpha` as in
    `load`), or those that `include` and `exclude` choose. Inputs wider than `exact_width` keep a sketch of `rank` rows.
    With `out` the statistics are written there, and unfinished work beside it every `checkpoint_seconds`: the same call
    goes on with it. Raises E-DATA, E-STATS, E-BASE, E-VALUE, E-OUT-*.
    """
    from lrconvert.live import statistics as gathering

    said = loading.options(allow_pickle, base, layout, alpha)
    if adapter is None:
        loading.refuse_said(said)
    return gathering.statistics(
        base if not isinstance(base, (str, PathLike)) else hub.locate(base),
        data,
        None if out is None else hub.output(out),
        adapter=None if adapter is None else loading.adapter(adapter, said),
        include=include,
        exclude=exclude,
        length=length,
        batch_tokens=batch_tokens,
        max_tokens=max_tokens,
        exact_width=exact_width,
        rank=rank,
        seed=seed,
        device=device,
        checkpoint_seconds=checkpoint_seconds,
        overwrite=overwrite,
        progress=progress,
    )


def load_statistics(path: AnyPath) -> InputStatistics:
    """The statistics of a file; moments are read when they are needed. Raises E-MISSING, E-DIGEST, ..."""
    return statistics_file.read(Path(path))
