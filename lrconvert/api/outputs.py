"""Verbs that carry adapters elsewhere: export for other programs, merge, unmerge, recover, verify."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from lrconvert.api.adapters import read
from lrconvert.api.shared import AnyPath, Progress, silent
from lrconvert.formats import fidelity as report
from lrconvert.formats import loading
from lrconvert.formats.compat import base as consumer_base
from lrconvert.formats.exporters import base as exporters
from lrconvert.formats.exporters.base import Exported
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.io import hub
from lrconvert.io.durable import atomic_directory, check_output
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter
from lrconvert.merge import MergeReport, Recovery, Scaled, UnmergeReport, VerifyReport
from lrconvert.merge import merge as merge_models
from lrconvert.merge import recover as recover_model
from lrconvert.merge import unmerge as unmerge_model
from lrconvert.merge import verify as verify_model


def export(
    adapter: AnyPath | CompactAdapter,
    out: AnyPath,
    *,
    to: str,
    source: AnyPath | LoraAdapter | None = None,
    base: AnyPath | None = None,
    base_model_id: str | None = None,
    keep_ranks: bool = False,
    pad_rank: int | None = None,
    dtype: str = "F32",
    allow_pickle: bool = False,
    layout: str | None = None,
    alpha: float | None = None,
    overwrite: bool = False,
    command: str = "",
) -> Exported:
    """Write `adapter` as a folder that other tools load: `to` is "peft-lora", "peft-vblora", "peft-miss", "kohya",
    "diffusers", "mlx", "gguf" or "raw".

    All modules get one rank, the largest or `pad_rank`, unless `keep_ranks`. `base_model_id` names the base in the
    output, instead of the source's own hint. `base` (its config.json is enough) is needed for "gguf", and decides the
    names of "kohya". `source` (the
    LoRA it came from) adds the error table to the model card; `base`, `layout` and `alpha` are also those of `load`
    for it. Returns the names of the files written, and notes.
    Raises E-EXPORT for what the target format cannot express, E-OPTION for a rank that does not do.
    """
    exporter = exporters.get(to)
    compact = adapter if isinstance(adapter, CompactAdapter) else read(adapter)
    compact, notes = exporters.public(compact, base_model_id)
    said = loading.options(allow_pickle, base, layout, alpha)
    if source is None:
        loading.refuse_said(said)
    fidelity = None if source is None else report.fidelity_on(loading.lora(source, said), compact, None, said.base)
    check_output(hub.output(out), overwrite, directory=True)
    options = exporters.ExportOptions(
        keep_ranks=keep_ranks,
        dtype=dtype,
        command=command,
        pad_rank=pad_rank,
        base_config=None if base is None else exporters.base_config(hub.locate(base)),
    )
    files = exporter.files(compact, options, fidelity)
    with atomic_directory(Path(out), overwrite=overwrite) as folder:
        for name, chunks in files.items():
            with folder.create(name) as handle:
                for chunk in chunks:
                    handle.write(chunk)
    return Exported(tuple(sorted(files)), (*notes, *_servers(Path(out), to)))


def _servers(folder: Path, to: str) -> tuple[str, ...]:
    """What vLLM has to be started with for a PEFT folder, where its defaults do not do."""
    if to != "peft-lora":
        return ()
    found = consumer_base.check(folder, ("vllm",), loading.options(), {})
    return tuple(f"vLLM: {finding.what}; {finding.fix}" for finding in found if finding.rule == "max-rank")


Mergeable = AnyPath | LoraAdapter | CompactAdapter | Scaled


def merge(
    base: AnyPath,
    adapters: Mergeable | Sequence[Mergeable],
    out: AnyPath | None = None,
    *,
    in_place: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    allow_no_op: bool = False,
    undo: bool = True,
    shard_bytes: int | None = None,
    dequantize: bool = False,
    allow_pickle: bool = False,
    layout: str | None = None,
    alpha: float | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> MergeReport:
    """Bake adapters (lrconvert files, LoRA folders, or loaded ones) into a copy of a base at `out`, or with `in_place`
    into the base itself, correctly rounded.

    Every element of the result is the value of the base's dtype nearest to the exact ``W + scale * B @ A``, summed over
    all adapters; give ``Scaled(adapter, 0.5)`` to weigh one. `layout` and `alpha` (see `load`) hold for all
    adapters that are read, but for lrconvert files. The output holds a record with which `unmerge` restores
    every byte of the base; with `undo` False, only digests. `shard_bytes` bounds the weight files;
    `dequantize` takes a base that bitsandbytes has quantized as bf16. With `resume` a merge that is broken off keeps
    what it has finished, and goes on from there. `device`, as torch names it, computes the products; the bytes do not
    depend on it. Raises E-BASE, E-ORIENT, E-FPR, E-PLACE, E-NO-EFFECT, E-OVERFLOW, E-BASE-QUANT, E-OPTION,
    E-OUT-EXISTS, E-OUT-PATH, E-OUT-SPACE, E-LOCKED, E-DEVICE, E-IO-WRITE: nothing is changed then; E-UNFINISHED: see
    `recover`.
    """
    return merge_models(
        hub.output(base) if in_place else hub.locate(base),
        _loaded(adapters, loading.options(allow_pickle, base, layout, alpha)),
        None if out is None else hub.output(out),
        in_place=in_place,
        resume=resume,
        overwrite=overwrite,
        dry_run=dry_run,
        allow_no_op=allow_no_op,
        undo=undo,
        shard_bytes=shard_bytes,
        dequantize=dequantize,
        device=device,
        progress=progress,
    )


def _loaded(adapters: Mergeable | Sequence[Mergeable], said: ReadOptions) -> list[Scaled]:
    """What to merge, every path read."""
    several = isinstance(adapters, Sequence) and not isinstance(adapters, str)
    items: list[Mergeable] = list(adapters) if several else [adapters]  # type: ignore[arg-type,list-item]
    paths = [item for item in items if isinstance(item, (str, PathLike))]
    read = iter(zip(paths, loading.load_all(paths, said), strict=True))
    found = []
    for item in items:
        if isinstance(item, (str, PathLike)):
            path, adapter = next(read)
            found.append(Scaled(adapter, name=hub.hint(path)))
        else:
            found.append(item if isinstance(item, Scaled) else Scaled(item))
    return found


def unmerge(
    merged: AnyPath,
    out: AnyPath | None = None,
    *,
    in_place: bool = False,
    resume: bool = False,
    number: int | None = None,
    from_base: AnyPath | None = None,
    overwrite: bool = False,
    device: str = "cpu",
    progress: Progress = silent,
) -> UnmergeReport:
    """Undo the last merge of a model: every byte of the base's weights comes back, verified by digest, in `out`, or in
    place of `merged` in one step; with `in_place` file by file, with one file of extra space, journalled.

    `number` insists on a certain merge, which must be the last. `from_base` takes the bytes from the base, where the
    record is gone or was made without undo. `device` as for `merge`. Raises E-UNDO, E-UNDO-ORDER, E-DIGEST, E-FPR,
    E-OPTION, E-DEVICE, E-OUT-*; nothing is changed then.
    """
    return unmerge_model(
        hub.output(merged) if out is None else Path(merged),
        None if out is None else hub.output(out),
        in_place=in_place,
        resume=resume,
        number=number,
        from_base=None if from_base is None else hub.locate(from_base),
        overwrite=overwrite,
        device=device,
        progress=progress,
    )


def recover(path: AnyPath) -> Recovery:
    """Bring what a merge or unmerge in place left at `path` to the old state or the new one, verified by digests, and
    remove what killed runs have left of an output. The state is "clean", "old" or "new". Raises E-LOCKED, E-DIGEST,
    E-IO-*."""
    return recover_model(hub.output(path))


def verify(
    merged: AnyPath,
    base: AnyPath,
    adapters: Mergeable | Sequence[Mergeable],
    *,
    dequantize: bool = False,
    allow_pickle: bool = False,
    layout: str | None = None,
    alpha: float | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> VerifyReport:
    """Whether `merged` is the merge of `base` and `adapters`: every value is computed again, every bit compared.
    `layout`, `alpha` and `device` are those of `merge`."""
    inputs = _loaded(adapters, loading.options(allow_pickle, base, layout, alpha))
    return verify_model(
        hub.locate(merged), hub.locate(base), inputs, dequantize=dequantize, device=device, progress=progress
    )
