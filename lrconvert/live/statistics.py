"""From a base and data to statistics, or to batches: what `statistics` and `compare` ask of texts and models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from lrconvert.io.checkpoint import open_checkpoint
from lrconvert.io.durable import check_output, delete_leftover, partial_path
from lrconvert.live import collect_statistics, collector, compare_outputs, load_model, texts
from lrconvert.live.attached_adapter import Adapter, targets_of
from lrconvert.live.compare_outputs import Measured
from lrconvert.live.layer_inputs import expert_stacks, known_layers, token_count
from lrconvert.live.options import CompareOptions, StatisticsOptions
from lrconvert.lora import statistics_file
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter
from lrconvert.lora.base_names import NameIndex, name_filter
from lrconvert.lora.input_statistics import InputStatistics

Progress = Callable[[float, str], None]
Data = str | PathLike[str] | Sequence[str | PathLike[str]] | Iterable[Mapping[str, Any]]


def statistics(
    base: Path | nn.Module,
    data: Data,
    out: Path | None,
    options: StatisticsOptions,
    *,
    adapter: Adapter | None,
    progress: Progress,
) -> InputStatistics:
    """Measure the inputs of a base's layers; see `lrconvert.api.statistics`."""
    where = base if isinstance(base, Path) else None
    if out is not None:
        check_output(out, options.overwrite, inputs=[] if where is None else [where])
    progress(0.0, "loading the base")
    content = ""
    if where is not None:
        with open_checkpoint(where, quantized=True) as checkpoint:
            content = checkpoint.content_digest()
    model = load_model.load_model(base, options.device, adapter=adapter) if isinstance(base, Path) else base
    inputs = batches(model, where, data, _packing(options), progress)
    measured = collect_statistics.collect(
        model,
        inputs,
        settings=collector.Settings(options.exact_width, options.rank, options.seed),
        wanted=wanted(model, adapter, options.include, options.exclude),
        content=content,
        partial=None if out is None else partial_path(out),
        every=options.checkpoint_seconds,
        progress=_counting(inputs, progress),
    )
    if out is not None:
        statistics_file.write(measured, out, overwrite=options.overwrite)
        delete_leftover(partial_path(out), out)  # not before the result is there
    return measured


def measured(
    lora: LoraAdapter,
    compacts: Sequence[CompactAdapter],
    base: Path | nn.Module,
    data: Data,
    options: CompareOptions,
    progress: Progress,
) -> Measured:
    """Measure what the adapters do to the base's outputs on data; see `lrconvert.api.compare`."""
    progress(0.0, "loading the base")
    where = base if isinstance(base, Path) else None
    model = load_model.load_model(base, options.device, adapter=lora) if isinstance(base, Path) else base
    packing = replace(_packing(options, answers=True), labels=True)
    inputs = batches(model, where, data, packing, progress)
    return compare_outputs.measure(model, lora, compacts, inputs, _counting(inputs, progress))


def _counting(batches: Any, progress: Progress) -> Callable[[int], None]:
    """Turn tokens that are done into a share of all, if all are known."""
    total = sum(map(token_count, batches)) if isinstance(batches, list) else 0
    done = 0

    def count(tokens: int) -> None:
        nonlocal done
        done += tokens
        progress(done / total if total else 0.0, f"{done:,} tokens")

    return count


def _packing(options: StatisticsOptions | CompareOptions, answers: bool = False) -> texts.Packing:
    return texts.Packing("", options.length, options.batch_tokens, options.max_tokens, answers)


def batches(
    model: nn.Module, base: Path | None, data: Data, packing: texts.Packing, progress: Progress
) -> list[dict[str, Any]] | Iterable[Mapping[str, Any]]:
    """Return the model inputs of `data`: texts are read with the base's own tokenizer, and put into the form of
    `packing` but for the kind of the model and what it can read. `progress` is told what was read. Raises E-DATA."""
    written, model_inputs = texts.open_texts(data)
    if written is None:
        return model_inputs  # type: ignore[no-any-return]
    tokenizer = load_model.tokenizer_of(model, base)
    length = load_model.longest_input(model, tokenizer, packing.length)
    kind = load_model.kind_of(model)
    classes = load_model.classes_of(model) if packing.labels and kind == "encoder" else {}
    packing = replace(packing, kind=kind, length=length, classes=classes)
    packed = texts.batches(written.texts, tokenizer, packing, written.tally)
    progress(0.0, written.tally.notice())
    return packed


def wanted(
    model: nn.Module, adapter: Adapter | None, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[str] | None:
    """Return the parameters whose inputs are asked for; None for all. Raises E-BASE for a target that the model lacks,
    E-OPTION."""
    if adapter is None and not include and not exclude:
        return None
    names = [*known_layers(model), *expert_stacks(model)]
    if adapter is not None:
        index = NameIndex(names, load_model.families_of(model))
        places = {target.name: index.find(target.name) for target in targets_of(adapter)}
        for name, place in places.items():
            if place is None:
                raise index.missing(name)
        names = sorted({place for place in places.values() if place is not None})
    keeps = name_filter(include, exclude)
    return [name for name in names if keeps(name)]
