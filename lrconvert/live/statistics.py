"""From a base and data to statistics, or to batches: what `statistics` and `compare` ask of texts and models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from lrconvert.io.container import open_checkpoint
from lrconvert.io.durable import check_output, delete_leftover
from lrconvert.live import collect_statistics, compare_outputs, load_model, texts
from lrconvert.live.compare_outputs import Measured
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
    adapter: LoraAdapter | CompactAdapter | None,
    progress: Progress,
) -> InputStatistics:
    """Measure the inputs of a base's layers; see `lrconvert.api.statistics`."""
    where = base if isinstance(base, Path) else None
    if out is not None:
        check_output(out, options.overwrite, inputs=[] if where is None else [where])
    progress(0.0, "loading the base")
    content = ""
    if where is not None:
        with open_checkpoint(where) as checkpoint:
            content = checkpoint.content_digest()
    model = load_model.load_model(base, options.device) if isinstance(base, Path) else base
    inputs = batches(model, where, data, options.length, options.batch_tokens, options.max_tokens)
    measured = collect_statistics.collect(
        model,
        inputs,
        settings=collect_statistics.Settings(options.exact_width, options.rank, options.seed),
        wanted=wanted(model, adapter, options.include, options.exclude),
        content=content,
        partial=None if out is None else out.with_name(f"{out.name}.partial"),
        every=options.checkpoint_seconds,
        progress=_counting(inputs, progress),
    )
    if out is not None:
        statistics_file.write(measured, out, overwrite=options.overwrite)
        delete_leftover(out.with_name(f"{out.name}.partial"), out)  # not before the result is there
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
    model = load_model.load_model(base, options.device) if isinstance(base, Path) else base
    inputs = batches(model, where, data, options.length, options.batch_tokens, options.max_tokens)
    return compare_outputs.measure(model, lora, compacts, inputs, _counting(inputs, progress))


def _counting(fed: Any, progress: Callable[[float, str], None]) -> Callable[[int], None]:
    """Turns tokens that are done into a share of all, if all are known."""
    total = sum(map(collect_statistics.token_count, fed)) if isinstance(fed, list) else 0
    done = 0

    def tell(tokens: int) -> None:
        nonlocal done
        done += tokens
        progress(done / total if total else 0.0, f"{done:,} tokens")

    return tell


def batches(
    model: nn.Module, base: Path | None, data: Data, length: int, batch_tokens: int, max_tokens: int
) -> list[dict[str, Any]] | Iterable[Mapping[str, Any]]:
    """The model inputs of `data`: files are read with the base's own tokenizer. Raises E-DATA."""
    paths = [data] if isinstance(data, (str, PathLike)) else data
    if not isinstance(paths, Sequence) or not paths or not all(isinstance(path, (str, PathLike)) for path in paths):
        return data  # type: ignore[return-value]
    where = base if base is not None else Path(str(getattr(getattr(model, "config", None), "name_or_path", "")))
    tokenizer = load_model.load_tokenizer(where)
    packing = texts.Packing(
        load_model.kind_of(model), load_model.longest_input(model, tokenizer, length), batch_tokens, max_tokens
    )
    return texts.batches(texts.read([Path(path) for path in paths]), tokenizer, packing)


def wanted(
    model: nn.Module, adapter: LoraAdapter | CompactAdapter | None, include: Sequence[str], exclude: Sequence[str]
) -> list[str] | None:
    """The parameters whose inputs are asked for; None for all."""
    if adapter is None and not include and not exclude:
        return None
    names = [*collect_statistics.known_layers(model), *collect_statistics.expert_stacks(model)]
    if adapter is not None:
        index = NameIndex(names, collect_statistics.families_of(model))
        targets = adapter.shapes() if isinstance(adapter, LoraAdapter) else adapter.targets
        found = [(target.name, index.find(target.name)) for target in targets]
        for asked, name in found:
            if name is None:
                raise index.missing(asked)
        names = sorted({name for _, name in found if name is not None})
    keeps = name_filter(include, exclude)
    return [name for name in names if keeps(name)]
