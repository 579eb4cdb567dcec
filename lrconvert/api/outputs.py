"""Verbs that carry adapters elsewhere: export for other programs, merge, unmerge, recover, verify."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any

from lrconvert.api.shared import (
    AnyAdapter,
    AnyCompact,
    AnyLora,
    AnyPath,
    Progress,
    adapter_of,
    compact_of,
    located,
    lora_of,
    output_of,
    path_of,
    refuse_rest,
    silent,
    take_reading,
)
from lrconvert.core.errors import ArgumentError, LrcError
from lrconvert.core.options import described, take
from lrconvert.formats import fidelity as fidelity_report
from lrconvert.formats import loading
from lrconvert.formats.compat import base as consumers
from lrconvert.formats.exporters import base as exporters
from lrconvert.formats.exporters.base import Exported, Exporter, ExportOptions
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.io import hub
from lrconvert.io.durable import atomic_directory, check_output
from lrconvert.merge import MergeReport, Recovery, Scaled, UnmergeReport, VerifyReport
from lrconvert.merge import merge as merge_models
from lrconvert.merge import recover as recover_model
from lrconvert.merge import unmerge as unmerge_model
from lrconvert.merge import verify as verify_model
from lrconvert.merge.options import MergeOptions, UnmergeOptions


def export(
    adapter: AnyCompact,
    out: AnyPath,
    to: str,
    *,
    source: AnyLora | None = None,
    base: AnyPath | None = None,
    overwrite: bool = False,
    **more: Any,
) -> Exported:
    """Write `adapter` as a folder that other tools load: `to` is "peft-lora", "kohya", "gguf" or another exporter's id.

    `more` are single fields of `ExportOptions`, and `allow_pickle`, `layout` and `alpha` as in `load`, for the source.
    All modules get one rank, the largest or `pad_rank`, unless `keep_ranks`. `base` (its config.json is enough)
    decides the names, which programs compare as a whole, and is needed for "gguf"; `keep_names` keeps those of the
    source. `source` (the LoRA it came from) adds the error table to the model card. With `overwrite` a folder that an
    export wrote is replaced, no other. Returns the names of the files written, and notes: also what `check` finds for
    the programs that load the layout. Raises E-EXPORT for what the target format cannot express, E-OPTION for a rank
    that does not do, E-OUT-EXISTS, E-OUT-PATH.

    >>> from lrconvert import convert
    >>> small = convert("my-adapter", "lowrank", target_size=6000)
    >>> export(small, "for-servers", to="peft-lora").files
    ('README.md', 'adapter_config.json', 'adapter_model.safetensors', 'lrconvert.json')
    """
    exporter = exporters.get(to)
    reading = take_reading(more, base)
    options = take(ExportOptions, None, more, "export")
    refuse_rest(more, "export", ExportOptions)
    compact, notes = exporters.public(compact_of(adapter), options.base_model_id)
    if source is None:
        loading.refuse_options(reading)
        fidelity = None
    else:
        fidelity = fidelity_report.fidelity_on(lora_of(source, reading, "source"), compact, None, reading.base)
    target = output_of(out)
    check_output(target, overwrite, directory=True)
    exporters.check_replaceable(target)
    config = None if reading.base is None else exporters.base_config(reading.base)
    made = exporter.folder(compact, replace(options, base_config=config), fidelity)
    with atomic_directory(target, overwrite=overwrite) as folder:
        for name, chunks in made.files.items():
            with folder.create(name) as handle:
                for chunk in chunks:
                    handle.write(chunk)
    return Exported(tuple(sorted(made.files)), (*notes, *made.notes, *_findings(target, exporter, reading)))


def _findings(folder: Path, exporter: Exporter, reading: ReadOptions) -> Iterator[str]:
    """Yield what the programs that load the layout would do with what was written, a note each."""
    if not exporter.consumers:
        return
    is_known = reading.base is not None and (reading.base / "config.json").is_file()
    options = ReadOptions(base=reading.base if is_known else None)
    try:
        findings = consumers.check(folder / exporter.weights, exporter.consumers, options, {})
    except LrcError as error:  # of the base: what was written is complete
        yield f"what programs make of it was not checked: {error}"
        return
    for finding in findings:
        program = f"{consumers.get(finding.consumer).title} {finding.version}"
        yield f"{program} {_DOES[finding.severity]}: {finding.what}; {finding.fix}"


_DOES = {"refuses": "refuses this", "wrong": "gets this wrong", "warns": "may get this wrong"}


Mergeable = AnyAdapter | Scaled


def merge(
    base: AnyPath,
    adapters: Mergeable | Sequence[Mergeable],
    out: AnyPath | None = None,
    options: MergeOptions | None = None,
    *,
    progress: Progress | None = None,
    **more: Any,
) -> MergeReport:
    """Bake adapters (lrconvert files, LoRA folders, or loaded ones) into a copy of a base at `out`, or with `in_place`
    into the base itself, correctly rounded.

    Every element of the result is the value of the base's dtype nearest to the exact ``W + scale * B @ A``, summed over
    all adapters; give ``Scaled(adapter, 0.5)`` to weigh one. `more` are single fields of `MergeOptions`, and
    `allow_pickle`, `layout` and `alpha` as in `load`, which hold for all adapters that are read, but for lrconvert
    files. The output holds a record with which `unmerge` restores every byte of the base; with `undo` False, only
    digests. Raises E-BASE, E-ORIENT, E-FPR, E-PLACE, E-NO-EFFECT, E-OVERFLOW, E-BASE-QUANT, E-OPTION, E-OUT-EXISTS,
    E-OUT-PATH, E-OUT-SPACE, E-LOCKED, E-IO-WRITE: nothing is changed then; E-UNFINISHED: see `recover`.

    >>> report = merge("base-model", "my-adapter", "merged-model")
    >>> verify("merged-model", "base-model", "my-adapter").ok
    True
    >>> unmerge("merged-model", "base-again").verified
    True
    """
    progress = progress or silent
    reading = take_reading(more, base)
    chosen = take(MergeOptions, options, more, "merge")
    refuse_rest(more, "merge", MergeOptions)
    model = output_of(base, "base") if chosen.in_place else located(base, "base")
    return merge_models(model, _loaded(adapters, reading), None if out is None else output_of(out), chosen, progress)


def _loaded(adapters: Mergeable | Sequence[Mergeable], reading: ReadOptions) -> list[Scaled]:
    """Return what to merge, every path read."""
    several = isinstance(adapters, Sequence) and not isinstance(adapters, str)
    items: list[Mergeable] = list(adapters) if several else [adapters]  # type: ignore[arg-type,list-item]
    scaled = [item if isinstance(item, Scaled) else Scaled(item) for item in items]  # type: ignore[arg-type]
    for item in scaled:
        if isinstance(item.scale, bool) or not isinstance(item.scale, Real):
            raise ArgumentError(f"the scale of an adapter is {described(item.scale)}; a number was expected")
        if isinstance(item.adapter, Real):
            raise ArgumentError(f"an adapter is {described(item.adapter)}", fix="Scaled(adapter, 0.5) weighs one")
    paths = [item.adapter for item in scaled if isinstance(item.adapter, (str, PathLike))]
    read = iter(loading.load_all([path_of(path, "adapters") for path in paths], reading))
    return [
        replace(item, adapter=next(read), name=item.name or hub.hint(item.adapter))
        if isinstance(item.adapter, (str, PathLike))
        else replace(item, adapter=adapter_of(item.adapter, ReadOptions(), "adapters"))
        for item in scaled
    ]


def unmerge(
    merged: AnyPath,
    out: AnyPath | None = None,
    options: UnmergeOptions | None = None,
    *,
    progress: Progress | None = None,
    **more: Any,
) -> UnmergeReport:
    """Undo the last merge of a model: every byte of the base's weights comes back, verified by digest, in `out`, or in
    place of `merged` in one step; with `in_place` file by file, with one file of extra space, journalled.

    `more` are single fields of `UnmergeOptions`. Raises E-UNDO, E-UNDO-ORDER, E-DIGEST, E-FPR, E-OPTION, E-OUT-*;
    nothing is changed then.
    """
    progress = progress or silent
    chosen = take(UnmergeOptions, options, more, "unmerge")
    refuse_rest(more, "unmerge", UnmergeOptions)
    if chosen.from_base is not None:
        chosen = replace(chosen, from_base=located(chosen.from_base, "from_base"))
    if out is None:
        return unmerge_model(output_of(merged, "merged"), None, chosen, progress)
    return unmerge_model(Path(path_of(merged, "merged")), output_of(out), chosen, progress)


def recover(path: AnyPath) -> Recovery:
    """Bring what a merge or unmerge in place left at `path` to the old state or the new one, verified by digests, and
    remove what killed runs have left of an output. The state is "clean", "old" or "new". Raises E-LOCKED, E-DIGEST,
    E-IO-*."""
    return recover_model(output_of(path, "path"))


def verify(
    merged: AnyPath,
    base: AnyPath,
    adapters: Mergeable | Sequence[Mergeable],
    *,
    dequantize: bool = False,
    progress: Progress | None = None,
    **more: Any,
) -> VerifyReport:
    """Compute the merge of `base` and `adapters` again and compare every bit with `merged`. `dequantize` and `more`
    (`allow_pickle`, `layout`, `alpha`) are those of `merge`."""
    progress = progress or silent
    inputs = _loaded(adapters, take_reading(more, base))
    refuse_rest(more, "verify", ReadOptions)
    return verify_model(
        located(merged, "merged"), located(base, "base"), inputs, dequantize=dequantize, progress=progress
    )
