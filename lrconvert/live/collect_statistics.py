"""Input statistics of a live model: forward passes whose sums can be kept in a file and taken up again."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lrconvert.core.dtypes import Array
from lrconvert.core.errors import DataError, StatisticsError
from lrconvert.live.collector import Collector, Key, Settings, Sum, sort_key
from lrconvert.live.layer_inputs import Batch, add_digest, on_device, token_count
from lrconvert.live.load_model import families_of
from lrconvert.live.watch import watched
from lrconvert.lora import statistics_file
from lrconvert.lora.input_statistics import InputStatistics

_Checkpoint = tuple[dict[str, Any], dict[str, Array]]  # fields, and sums by name


def collect(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    settings: Settings | None = None,
    wanted: Iterable[str] | None = None,
    content: str = "",
    partial: Path | None = None,
    every: float = 600.0,
    progress: Callable[[int], None] = lambda tokens: None,
) -> InputStatistics:
    """Return the statistics of a model's inputs over `batches` (model inputs each): of all its layers, or of those
    whose parameters are `wanted`. `content`: the digest of its base.

    With a path `partial` the sums are kept there every so many seconds, and an earlier run is resumed from there: the
    result is that of a run without a pause. The file stays: whoever has put the result away removes it. `progress` is
    told how many tokens a batch had. Raises E-STATS, E-DATA, E-VALUE.
    """
    collector = Collector(settings or Settings())
    device = next(iter(model.parameters())).device
    hasher, tokens, done = hashlib.sha256(), 0, 0
    checkpoint = _read(partial, collector.settings, content)
    to_skip = 0 if checkpoint is None else checkpoint[0]["batches"]
    written = time.monotonic()
    with watched(model, collector, wanted) as names:
        about = {
            "settings": asdict(collector.settings),
            "content": content,
            "names": hashlib.sha256("\n".join(names).encode()).hexdigest(),
        }
        for done, batch in enumerate(batches, 1):
            add_digest(hasher, batch)
            if checkpoint is not None and done <= to_skip:
                if done == to_skip:
                    tokens = _resume(collector, checkpoint, {**about, "data": hasher.hexdigest()}, device, partial)
            else:
                collector.run(model, on_device(batch, device))
                tokens += token_count(batch)
            progress(token_count(batch))
            if partial is not None and time.monotonic() - written > every:
                _write(collector, {**about, "data": hasher.hexdigest(), "batches": done, "tokens": tokens}, partial)
                written = time.monotonic()
    if done < to_skip:
        raise _other_run(partial)
    inputs = list(collector.inputs())
    if not inputs:
        raise DataError("no token reached a layer", fix="is the data empty?")
    moments = [moment for _, moment in inputs]
    return InputStatistics(
        tuple(entry for entry, _ in inputs),
        moments.__getitem__,
        content,
        hasher.hexdigest(),
        tokens,
        families_of(model),
    )


# --- checkpoints ----------------------------------------------------------------------------------------------------


def _write(collector: Collector, about: Mapping[str, Any], path: Path) -> None:
    keys = sorted(collector.sums, key=sort_key)
    numbers = {key: n for n, key in enumerate(keys)}
    sums = [[*sort_key(key), collector.sums[key].width, collector.sums[key].tokens] for key in keys]
    leaders = [[*sort_key(key), numbers[collector.leaders[key]]] for key in sorted(collector.leaders, key=sort_key)]
    dtypes = {torch.float64: "F64", torch.float32: "F32"}
    arrays = [
        (f"{name}.{numbers[key]}", dtypes[value.dtype], value.cpu().numpy())
        for key in keys
        for name, value in collector.sums[key].tensors().items()
    ]
    statistics_file.write_partial(path, {**about, "sums": sums, "leaders": leaders}, arrays)


def _read(path: Path | None, settings: Settings, content: str) -> _Checkpoint | None:
    """The checkpoint of an earlier run, if there is one. Raises E-STATS if it is not of the same kind."""
    if path is None or not path.exists():
        return None
    fields, arrays = statistics_file.read_partial(path)
    same = fields.get("settings") == asdict(settings) and fields.get("content") == content
    if not same or type(fields.get("batches")) is not int:
        raise _other_run(path)
    return fields, arrays


def _other_run(path: Path | None) -> StatisticsError:
    return StatisticsError(
        "this checkpoint is of another base, other data or other options",
        fix="remove the file to start anew, or give what it was begun with",
        path=path,
    )


def _resume(
    collector: Collector, checkpoint: _Checkpoint, about: Mapping[str, Any], device: torch.device, path: Path | None
) -> int:
    """Take up the sums of a checkpoint; returns the tokens they are of. Raises E-STATS if the batches until here were
    other ones, or the sums are not those of our own program."""
    fields, arrays = checkpoint
    if any(fields.get(name) != value for name, value in about.items()):
        raise _other_run(path)
    keys: list[Key] = []
    try:
        for n, (name, expert, width, tokens) in enumerate(fields["sums"]):
            parts = {
                part: torch.from_numpy(arrays[f"{part}.{n}"].copy()).to(device)
                for part in ("square", "diagonal", "sketch")
                if f"{part}.{n}" in arrays
            }
            keys.append((name, None if expert < 0 else expert))
            collector.sums[keys[-1]] = Sum(width, tokens, **parts)
        for name, expert, leader in fields["leaders"]:
            collector.leaders[name, None if expert < 0 else expert] = keys[leader]
        return int(fields["tokens"])
    except (KeyError, IndexError, TypeError, ValueError):
        raise _other_run(path) from None
