"""Verbs that carry adapters elsewhere: export for other programs, merge, unmerge, recover, verify."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any

from lrconvert.api.shared import (
    AnyAdapter,
    AnyLora,
    AnyPath,
    Progress,
    adapter_of,
    is_remote,
    located,
    lora_of,
    output_of,
    path_of,
    published,
    refuse_rest,
    silent,
    take_reading,
)
from lrconvert.core.errors import ArgumentError, LrcError, OptionError
from lrconvert.core.options import described, take
from lrconvert.formats import fidelity as fidelity_report
from lrconvert.formats import loading
from lrconvert.formats.compat import base as consumers
from lrconvert.formats.exporters import base as exporters
from lrconvert.formats.exporters.base import Exported, Exporter, ExportOptions, Folder
from lrconvert.formats.exporters.shared import spelled_names
from lrconvert.formats.fidelity import Fidelity
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.io import hub, hub_transfer
from lrconvert.io.durable import atomic_directory, check_output
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter
from lrconvert.merge import MergeReport, Recovery, Scaled, UnmergeReport, VerifyReport
from lrconvert.merge import merge as merge_models
from lrconvert.merge import recover as recover_model
from lrconvert.merge import unmerge as unmerge_model
from lrconvert.merge import verify as verify_model
from lrconvert.merge.options import MergeOptions, UnmergeOptions


def export(
    adapter: AnyAdapter,
    out: AnyPath | None = None,
    to: str | None = None,
    *,
    source: AnyLora | None = None,
    base: AnyPath | None = None,
    overwrite: bool = False,
    **more: Any,
) -> Exported:
    """Write `adapter` as a folder that other tools load: `to` is "peft-lora", "kohya", "gguf" or another exporter's id.

    `adapter` is a compact adapter, the result of a verb, a LoRA, or the path or hub id of any of these. A LoRA keeps
    its factors bit for bit, and its alpha where the layout states one. `more` are single fields of `ExportOptions`, and
    `allow_pickle`, `layout` and `alpha` as in `load`. All modules get one rank, the largest or `pad_rank`, unless
    `keep_ranks`. `base` (its config.json is enough) decides the names, which programs compare as a whole, and is needed
    for "gguf"; `keep_names` keeps those of the source. `source` (the LoRA that a compact adapter came from) adds the
    error table to the model card. With `overwrite` a folder that an export wrote is replaced, no other. With
    `push_to_hub` the folder is uploaded; `out` may be left out then. Returns the names of the files written, and notes:
    also what `check` finds for the programs that load the layout. Raises E-EXPORT for what the target format cannot
    express, E-OPTION for a rank that does not do, E-HUB, E-OUT-EXISTS, E-OUT-PATH.

    >>> from lrconvert import convert
    >>> small = convert("my-adapter", "lowrank", target_size=6000)
    >>> export(small, "for-servers", to="peft-lora").files
    ('README.md', 'adapter_config.json', 'adapter_model.safetensors', 'lrconvert.json')
    """
    if not isinstance(to, str):
        known = f"known: {', '.join(exporters.ids())}"
        raise ArgumentError(f"to is {described(to)}; the name of a layout was expected", fix=known)
    if is_remote(out):
        with published(out, overwrite=overwrite, folder=True) as local:
            return export(adapter, local, to, source=source, base=base, **more)
    exporter = exporters.get(to)
    reading = take_reading(more, base)
    options = take(ExportOptions, None, more, "export")
    refuse_rest(more, "export", ExportOptions)
    _check_places(out, options, overwrite)
    loaded, fidelity = _to_export(adapter, source, reading)
    config = None if reading.base is None else exporters.base_config(reading.base)
    named, spelled = spelled_names.resolved(loaded, exporter.scheme, config, written_flat=exporter.is_flat)
    public, notes = exporters.public(named, options.base_model_id)
    made = exporter.folder(public, replace(options, base_config=config), fidelity)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "export" if out is None else Path(out)
        _write(folder, made, overwrite)
        findings = tuple(_findings(folder, exporter, made.consumers, reading))
        url = ""
        if options.push_to_hub is not None:
            again = "try again" if out is None else hub_transfer.by_hand(folder, options.push_to_hub)
            url = hub_transfer.upload(folder, list(made.files), options.push_to_hub, options.private, again)
    return Exported(tuple(sorted(made.files)), (*loaded.warnings, *spelled, *notes, *made.notes, *findings), url)


def _to_export(
    adapter: AnyAdapter, source: AnyLora | None, reading: ReadOptions
) -> tuple[LoraAdapter | CompactAdapter, Fidelity | None]:
    """Return the adapter, and what it keeps of its source if one is given. Raises E-OPTION for a LoRA with a source."""
    named = [item for item in (adapter, source) if isinstance(item, (str, PathLike))]
    if not named:
        loading.refuse_options(reading)
    read = iter(loading.load_all([path_of(path, "adapter") for path in named], reading))
    loaded = next(read) if isinstance(adapter, (str, PathLike)) else adapter_of(adapter, ReadOptions())
    if source is None:
        return loaded, None
    if isinstance(loaded, LoraAdapter):
        raise OptionError(
            "a source is for compact adapters, and this is a LoRA, of which nothing is lost", fix="leave it out"
        )
    lora = lora_of(next(read) if isinstance(source, (str, PathLike)) else source, ReadOptions(), "source")
    return loaded, fidelity_report.fidelity_on(lora, loaded, None, reading.base)


def _write(out: Path, made: Folder, overwrite: bool) -> None:
    with atomic_directory(out, overwrite=overwrite) as folder:
        for name, chunks in made.files.items():
            with folder.create(name) as handle:
                for chunk in chunks:
                    handle.write(chunk)


def _check_places(out: AnyPath | None, options: ExportOptions, overwrite: bool) -> None:
    """Raise, before any work, E-OUT-EXISTS and E-OUT-PATH for the folder, E-OPTION and E-HUB for the repository."""
    if out is None and options.push_to_hub is None:
        raise OptionError("there is no folder to write", fix="name one, or a repository of the hub to push to")
    if options.private and options.push_to_hub is None:
        raise OptionError("private is for what is pushed to the hub", fix="name a repository, or leave it out")
    if options.push_to_hub is not None:
        hub_transfer.check_repository(options.push_to_hub)
    if out is not None:
        check_output(output_of(out), overwrite, directory=True)
        exporters.check_replaceable(Path(out))


def _findings(folder: Path, exporter: Exporter, programs: Sequence[str] | None, reading: ReadOptions) -> Iterator[str]:
    """Yield what the programs that load the layout would do with what was written, a note each."""
    if not programs:
        return
    is_known = reading.base is not None and (reading.base / "config.json").is_file()
    options = ReadOptions(base=reading.base if is_known else None)
    try:
        findings = consumers.check(folder / exporter.weights, programs, options, {})
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
        replace(item, adapter=next(read), scale=float(item.scale), name=item.name or hub.hint(item.adapter))
        if isinstance(item.adapter, (str, PathLike))
        else replace(item, adapter=adapter_of(item.adapter, ReadOptions(), "adapters"), scale=float(item.scale))
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
    component: str = "",
    progress: Progress | None = None,
    **more: Any,
) -> VerifyReport:
    """Compute the merge of `base` and `adapters` again and compare every bit with `merged`. `dequantize`, `component`
    and `more` (`allow_pickle`, `layout`, `alpha`) are those of `merge`."""
    progress = progress or silent
    inputs = _loaded(adapters, take_reading(more, base))
    refuse_rest(more, "verify", ReadOptions)
    models = located(merged, "merged"), located(base, "base")
    return verify_model(*models, inputs, dequantize=dequantize, component=component, progress=progress)
