"""The verbs: the same as the commands of the CLI, as typed functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrconvert import (
    allocating,
    compressing,
    converting,
    file,
    hub,
    loading,
    merging,
    report,
    statistics_file,
    validation,
)
from lrconvert.adapter import CompactAdapter, LoraAdapter
from lrconvert.allocating import Allocation
from lrconvert.compressing import Compression
from lrconvert.consumers import base as consumer_base
from lrconvert.consumers.base import Finding
from lrconvert.container import KnownContent
from lrconvert.converting import Conversion, ExtraDtype
from lrconvert.durable import atomic_directory, check_output, delete_leftover
from lrconvert.errors import AttachError, BaseError, DataError, LrcError, OptionError
from lrconvert.exporters import base as exporters
from lrconvert.exporters.base import Exported
from lrconvert.merging import MergeReport, Recovery, Scaled, UnmergeReport, VerifyReport
from lrconvert.methods import base as methods
from lrconvert.moments import InputStatistics
from lrconvert.readers.base import ReadOptions
from lrconvert.report import Fidelity
from lrconvert.validation import Validation

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lrconvert.attaching import AttachedAdapter
    from lrconvert.refining.refine import Refinement
    from lrconvert.refining.settings import Settings

AnyPath = str | PathLike[str]
Progress = Callable[[float, str], None]


def _silent(fraction: float, text: str) -> None:
    """The progress callback of a caller who wants none."""


# --- reading --------------------------------------------------------------------------------------------------------


def load_lora(
    path: AnyPath,
    *,
    allow_pickle: bool = False,
    base: AnyPath | None = None,
    layout: str | None = None,
    alpha: float | None = None,
) -> LoraAdapter:
    """The LoRA at `path`: a folder or file in any layout that a reader knows. The options are those of `load`.

    `allow_pickle`, here and below: load ``.bin`` and ``.pt`` files too, with torch's loader that builds tensors only.
    A compact adapter is expanded, with a warning: what is fitted to it is a second generation. Raises E-LAYOUT if no
    reader knows the layout, and the reader's refusals (an `LrcError` with a stable code each).
    """
    return loading.lora(path, loading.options(allow_pickle, base, layout, alpha))


def load(
    path: AnyPath,
    *,
    allow_pickle: bool = False,
    base: AnyPath | None = None,
    layout: str | None = None,
    alpha: float | None = None,
) -> LoraAdapter | CompactAdapter:
    """A LoRA in any known layout, or the compact adapter of an lrconvert file or of a compact layout (PEFT VB-LoRA,
    PEFT MiSS).

    `base` (a model folder or diffusers pipeline) resolves the names of layouts that spell them in their own way, and is
    needed where a file does not say how wide layers are; headers are read, or its config.json alone. `layout` names the
    reader (``"kohya"``; see `lrconvert.readers`) instead of the content. `alpha` is for layouts that do not state one.
    Raises E-OPTION for an unknown layout, and for an alpha that the layout states itself.

    `layout` and `alpha` mean this wherever a verb takes adapters by their path, and hold for all of these that are not
    lrconvert files; E-OPTION if there is none. Wherever an adapter or a base is asked for, `path` may be a hub id
    (``org/name``, ``org/name@revision``) that is in the local Hugging Face cache; see `lrconvert.hub`.
    """
    return loading.load(path, loading.options(allow_pickle, base, layout, alpha))


def load_all(
    paths: Sequence[AnyPath],
    *,
    allow_pickle: bool = False,
    base: AnyPath | None = None,
    layout: str | None = None,
    alpha: float | None = None,
) -> list[LoraAdapter | CompactAdapter]:
    """Several adapters, as for a merge. The options are those of `load`."""
    return loading.load_all(paths, loading.options(allow_pickle, base, layout, alpha))


def read(path: AnyPath) -> CompactAdapter:
    """The compact adapter of an lrconvert file, every rule checked. Raises the first finding of `validate`."""
    return file.read(Path(path))


def write(compact: CompactAdapter, path: AnyPath, *, overwrite: bool = False) -> file.Sizes:
    """Write an lrconvert file, atomically. The same content gives the same bytes everywhere. Returns its sizes."""
    return file.write(compact, hub.output(path), overwrite=overwrite)


def upgrade(path: AnyPath, out: AnyPath, *, overwrite: bool = False) -> file.Sizes:
    """Write the file at `path`, of whatever container version, as one of the newest; every factor stays as it is.
    A file of the newest version gives the same bytes again."""
    check_output(hub.output(out), overwrite, inputs=[Path(path)])
    return file.write(file.read(Path(path)), Path(out), overwrite=overwrite)


def inspect(
    path: AnyPath,
    *,
    allow_pickle: bool = False,
    base: AnyPath | None = None,
    layout: str | None = None,
    alpha: float | None = None,
) -> dict[str, Any]:
    """What an adapter is, as JSON values: ``targets`` (shapes, ranks, spectra), bytes, extras, base hint, warnings. The
    options are those of `load`."""
    adapter = load(path, allow_pickle=allow_pickle, base=base, layout=layout, alpha=alpha)
    return report.inspect_lora(adapter) if isinstance(adapter, LoraAdapter) else report.inspect_compact(adapter)


def validate(path: AnyPath, *, base: AnyPath | None = None) -> Validation:
    """Check an lrconvert file, and against its base if one is given; every finding is in the result."""
    return validation.validate(Path(path), None if base is None else hub.locate(base))


def check(
    path: AnyPath,
    consumers: Sequence[str] = ("all",),
    *,
    base: AnyPath | None = None,
    layout: str | None = None,
    alpha: float | None = None,
    **options: Any,
) -> tuple[Finding, ...]:
    """What `consumers` ("vllm", "sglang", "llamacpp", "mlx", "peft", or "all") would refuse, get wrong or warn of,
    given the adapter at `path`: a folder or file of any kind. Nothing is run and no weight is read.

    `base` (a model folder; its config.json is enough) decides what depends on the base. `layout` and `alpha` are those
    of `load`: what a program makes of the adapter does not depend on them, what is said of it may. `options` are fields
    of the consumers' ``Options``, such as `max_lora_rank`. Raises E-OPTION, E-LAYOUT, E-PATTERN and errors of broken
    files.
    """
    said = loading.options(base=base, layout=layout, alpha=alpha)
    return consumer_base.check(hub.locate(path), consumers, said, options)


# --- converting -----------------------------------------------------------------------------------------------------


def convert(
    lora: LoraAdapter,
    method: str,
    *,
    target_size: int | None = None,
    target_ratio: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    base: AnyPath | None = None,
    statistics: AnyPath | InputStatistics | None = None,
    bake_dora: int | None = None,
    extra_dtype: ExtraDtype | None = None,
    seed: int = 0,
    device: str = "cpu",
    dry_run: bool = False,
    base_content: KnownContent | None = None,
    progress: Progress = _silent,
    **options: Any,
) -> Conversion:
    """Refit `lora` into the compact form `method` ("vblora", "lowrank", ...).

    `target_size` (bytes) or `target_ratio` (factors at 16 bit over our bytes) bound the file without its extra tensors;
    without either, and without any of the method's own options, a method takes its default ratio. `include` and
    `exclude` are regular expressions searched in target names. `base` settles the orientation of square weights and
    adds the digest of its contents. `statistics` (see the verb of that name) makes the fit minimize the mean squared
    error of the layers' outputs, not of their weights. `bake_dora` turns DoRA's magnitudes, which are carried along
    otherwise, into plain updates of that rank; it needs `base`. `base_content` (`Checkpoint.known_content`) saves
    digesting a base of which many adapters are converted. `options` are fields of the method's ``Options``.

    Raises E-BUDGET (with the smallest possible size), E-OPTION, E-EMPTY, E-BASE, E-ORIENT, E-STATS, E-FPR,
    E-IO-CHANGED.
    """
    return converting.convert(
        lora,
        method,
        target_size=target_size,
        target_ratio=target_ratio,
        include=include,
        exclude=exclude,
        base=None if base is None else hub.locate(base),
        statistics=_statistics(statistics),
        bake_dora=bake_dora,
        extra_dtype=extra_dtype,
        seed=seed,
        device=device,
        dry_run=dry_run,
        base_content=base_content,
        progress=progress,
        options=options,
    )


def compress(
    lora: LoraAdapter,
    *,
    target_size: int | None = None,
    target_ratio: float | None = None,
    min_captured: float | None = None,
    forms: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    base: AnyPath | None = None,
    data: AnyPath | Sequence[AnyPath] | None = None,
    statistics: AnyPath | InputStatistics | None = None,
    rank_by: str = "auto",
    budget_minutes: float | None = None,
    steps: int = 0,
    length: int = 512,
    batch_tokens: int = 1024,
    max_tokens: int = 0,
    bake_dora: int | None = None,
    extra_dtype: ExtraDtype | None = None,
    seed: int = 0,
    device: str = "cpu",
    base_content: KnownContent | None = None,
    progress: Progress = _silent,
) -> Compression:
    """Try `forms` (all without) and take the best under `target_size` or `target_ratio`, or the smallest that keeps
    `min_captured`: of the outputs' energy if there are `statistics`, else of the weights'. `chosen` of the result is
    the winner's conversion. The options that are not named here are those of `convert`.

    With a `base` the best is what answers most as the LoRA does (`rank_by` "answers") on held-out `data`, files as in
    `refine`, or texts that a decoder writes: all forms are fitted under the moments of its inputs and refined a little,
    the better half twice as long, and so on, for `budget_minutes` or a stated number of steps; the winner, refined by
    as much and by `steps` more, is what is chosen. By "fit" it is what keeps most in the metric of the fits; "auto"
    takes that without a base, without its weights, and for an encoder without data.

    Raises E-BUDGET, saying what would do, if nothing meets the request, E-OPTION, what `convert` raises, and ranking by
    answers what `refine` raises.
    """
    there = None if base is None else hub.locate(base)
    known = _statistics(statistics)

    def fit(lora: LoraAdapter, statistics: InputStatistics | None, progress: Progress) -> Compression:
        return compressing.compress(
            lora,
            target_size=target_size,
            target_ratio=target_ratio,
            min_captured=min_captured,
            forms=forms,
            include=include,
            exclude=exclude,
            base=there,
            base_content=base_content,
            bake_dora=bake_dora,
            statistics=statistics,
            extra_dtype=extra_dtype,
            seed=seed,
            device=device,
            progress=progress,
        )

    reason = compressing.no_answers(rank_by, there, data is not None, min_captured, bake_dora)
    if reason is not None or there is None:
        return replace(fit(lora, known, progress), note=reason or "")
    from lrconvert.refining import contest

    settings = _settings(
        "compress", {"length": length, "batch_tokens": batch_tokens, "max_tokens": max_tokens, "seed": seed}
    )
    rules = contest.Rules(budget_minutes, steps)
    try:
        return contest.compress(
            lora, fit, there, data, settings, rules, statistics=known, device=device, progress=progress
        )
    except (AttachError, BaseError, DataError) as error:  # no such model, or nothing to learn
        if rank_by == "answers" or data is not None:
            raise
        return replace(fit(lora, known, progress), note=compressing.RANKED_BY_FIT.format(error.what))


def allocate(
    lora: LoraAdapter,
    *,
    total_rank: int | None = None,
    target_size: int | None = None,
    target_ratio: float | None = None,
    bits: str | int = 16,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    base: AnyPath | nn.Module | None = None,
    data: AnyPath | Sequence[AnyPath] | Iterable[Mapping[str, Any]] | None = None,
    statistics: AnyPath | InputStatistics | None = None,
    bake_dora: int | None = None,
    extra_dtype: ExtraDtype | None = None,
    rounds: int = allocating.ROUNDS,
    exact: int = allocating.EXACT,
    length: int = 512,
    batch_tokens: int = 1024,
    max_tokens: int = allocating.MAX_TOKENS,
    retrain: Mapping[str, Any] | None = None,
    moves: int = allocating.MOVES,
    device: str = "cpu",
    dry_run: bool = False,
    base_content: KnownContent | None = None,
    progress: Progress = _silent,
) -> Allocation:
    """Give every module the rank it deserves (ALoRA) under one budget: `total_rank` components, `target_size` bytes or
    `target_ratio`. The result is of the form ``lowrank``, its numbers of `bits` (16, 8, 4, 3, 2, 1).

    Components are scored by their energy, under `statistics` by that of the outputs. With `base` (which may be a live
    model then) and `data` (files, or batches of model inputs; `labels` count if a batch has them) they are scored by
    ablation on data that the LoRA was better not trained on, in `rounds` of pruning; in each the `exact` components
    next to the cut are ablated, two forward passes each. The other options are those of `convert` and `compare`.

    With `retrain`, fields of `lrconvert.refining.settings.Settings` (``{"steps": 300}``), and a `base` the result is
    trained as `refine` does it, on `data` or, without any, on texts of the LoRA's own; nothing of what is held out is
    scored or trained on. In the first half of the steps components change places up to `moves` times, of `exact` that
    are there and `exact` that may come. The result is what is best on held-out data, and never worse than the first
    allocation (`training` and `moves` of it say what happened); see `lrconvert.retraining` for what to expect.

    Raises E-BUDGET (with the smallest possible size), E-OPTION, E-DATA, E-ATTACH, E-BASE, and what `convert` raises.
    """
    if retrain is None:
        verb: Callable[..., Allocation] = allocating.allocate
        given: dict[str, Any] = {"length": length, "batch_tokens": batch_tokens}
    else:
        from lrconvert import retraining

        verb = retraining.allocate
        settings = _settings("retrain", {"length": length, "batch_tokens": batch_tokens, **retrain})
        given = {"settings": settings, "moves": moves}
    return verb(
        lora,
        total_rank=total_rank,
        target_size=target_size,
        target_ratio=target_ratio,
        bits=bits,
        include=include,
        exclude=exclude,
        base=hub.locate(base) if isinstance(base, (str, PathLike)) else base,
        data=data,
        statistics=_statistics(statistics),
        bake_dora=bake_dora,
        extra_dtype=extra_dtype,
        rounds=rounds,
        exact=exact,
        max_tokens=max_tokens,
        device=device,
        dry_run=dry_run,
        base_content=base_content,
        progress=progress,
        **given,
    )


def _settings(verb: str, given: Mapping[str, Any]) -> Settings:
    """Raises E-OPTION for what is no setting."""
    from lrconvert.refining.settings import Settings

    known = {field.name for field in fields(Settings)}
    unknown = sorted(set(given) - known)
    if unknown:
        raise OptionError(f"{verb} has no option {unknown[0]!r:.40}", fix=f"it has: {', '.join(sorted(known))}")
    return Settings(**given)


def _statistics(given: AnyPath | InputStatistics | None) -> InputStatistics | None:
    return statistics_file.read(Path(given)) if isinstance(given, (str, PathLike)) else given


# --- comparing, exporting, merging ----------------------------------------------------------------------------------


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
    progress: Progress = _silent,
) -> list[Fidelity]:
    """Measure lrconvert files against the LoRA they came from: captured energy per target and in total, bytes, ratio.
    `base`, `layout` and `alpha` are also those of `load`, for a source that is a path.

    `statistics` adds the captured energy of the layers' outputs. `base` and `data` (as in `statistics`; better not the
    data of the fit) add what is true on it: the error of each layer's output, the KL distance of the logits from the
    LoRA's own, agreement. An adapter whose updates depend on the base's weights (Bat) needs the folder of the base.
    Raises E-STATS, E-DATA, E-OPTION, E-FPR, and E-BASE for targets that are not the source's.
    """
    known = _statistics(statistics)
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
    from lrconvert import gathering

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
    progress: Progress = _silent,
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
    return merging.merge(
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
    progress: Progress = _silent,
) -> UnmergeReport:
    """Undo the last merge of a model: every byte of the base's weights comes back, verified by digest, in `out`, or in
    place of `merged` in one step; with `in_place` file by file, with one file of extra space, journalled.

    `number` insists on a certain merge, which must be the last. `from_base` takes the bytes from the base, where the
    record is gone or was made without undo. `device` as for `merge`. Raises E-UNDO, E-UNDO-ORDER, E-DIGEST, E-FPR,
    E-OPTION, E-DEVICE, E-OUT-*; nothing is changed then.
    """
    return merging.unmerge(
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
    return merging.recover(hub.output(path))


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
    progress: Progress = _silent,
) -> VerifyReport:
    """Whether `merged` is the merge of `base` and `adapters`: every value is computed again, every bit compared.
    `layout`, `alpha` and `device` are those of `merge`."""
    inputs = _loaded(adapters, loading.options(allow_pickle, base, layout, alpha))
    return merging.verify(
        hub.locate(merged), hub.locate(base), inputs, dequantize=dequantize, device=device, progress=progress
    )


# --- live models ----------------------------------------------------------------------------------------------------


def attach(
    model: nn.Module,
    adapter: AnyPath | LoraAdapter | CompactAdapter,
    *,
    name: str = "default",
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    trainable: bool = False,
    base: AnyPath | None = None,
    allow_pickle: bool = False,
    layout: str | None = None,
    alpha: float | None = None,
) -> AttachedAdapter:
    """Put an adapter (lrconvert file, LoRA folder, or loaded) on a live torch model, unmerged, beside those it has.

    Its numbers are held in `dtype` (float32 without it), in a module of their own that is returned; `trainable` takes
    their gradients. Heads, biases and token rows are installed. `base` (the model's folder), `layout` and `alpha` are
    those of `load`. Raises E-ATTACH, E-BASE, E-PLACE; the model is untouched then.
    """
    import torch

    from lrconvert import attaching

    found = loading.adapter(adapter, loading.options(allow_pickle, base, layout, alpha))
    return attaching.attach(model, found, name=name, scale=scale, dtype=dtype or torch.float32, trainable=trainable)


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter, or all, off a live model; without adapters it is the object that it was. Raises E-ATTACH."""
    from lrconvert import attaching

    attaching.detach(model, name)


def set_active(model: nn.Module, names: str | Sequence[str]) -> None:
    """Choose which attached adapters a live model uses; their updates add up. Raises E-ATTACH."""
    from lrconvert import attaching

    attaching.set_active(model, names)


def disabled(model: nn.Module) -> AbstractContextManager[None]:
    """A context in which a live model computes without its adapters."""
    from lrconvert import attaching

    return attaching.disabled(model)


# --- input statistics -----------------------------------------------------------------------------------------------


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
    progress: Progress = _silent,
) -> InputStatistics:
    """Second moments E[x x^T] of the inputs of a base's layers, the metric for fits and for `compare`.

    `base`: a model folder, hub id, or live model. `data`: files of texts (``.txt``, ``.jsonl``), or any iterable of
    model inputs (dicts of tensors; the way for vision models). Texts are cut to `length` tokens, `batch_tokens` of them
    at a time, `max_tokens` in all (0: everything). All layers, or those of `adapter` (`layout` and `alpha` as in
    `load`), or those that `include` and `exclude` choose. Inputs wider than `exact_width` keep a sketch of `rank` rows.
    With `out` the statistics are written there, and unfinished work beside it every `checkpoint_seconds`: the same call
    goes on with it. Raises E-DATA, E-STATS, E-BASE, E-VALUE, E-OUT-*.
    """
    from lrconvert import gathering

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


# --- refining -------------------------------------------------------------------------------------------------------


def refine(
    adapter: AnyPath | CompactAdapter,
    teacher: AnyPath | LoraAdapter,
    base: AnyPath | nn.Module,
    data: AnyPath | Sequence[AnyPath] | Iterable[Mapping[str, Any]] | None = None,
    out: AnyPath | None = None,
    *,
    device: str = "cpu",
    resume: bool = False,
    log: AnyPath | None = None,
    load_in_4bit: bool = False,
    overwrite: bool = False,
    allow_pickle: bool = False,
    layout: str | None = None,
    alpha: float | None = None,
    progress: Progress = _silent,
    **settings: Any,
) -> Refinement:
    """Bring the answers of a compact adapter nearer to those of its `teacher`, the LoRA it was made from: a short
    distillation on `data` (as in `statistics`; without data a decoder's teacher writes texts of its own).

    Two stages: the method's own fit under the moments of the teacher's inputs, then training end to end with the
    quantizers in the loop. What is best on held-out data is the result, and never worse than the input (`improved`
    says). With `out` it is written there, unfinished work beside it as ``<out>.partial``, with which `resume` goes on:
    on one device the result is that of a run without a pause. `settings` are the fields of
    `lrconvert.refining.settings.Settings`; `log` takes JSON lines; `load_in_4bit` quantizes the base to NF4. `layout`
    and `alpha` are those of `load` for the teacher.

    Under torchrun or accelerate all processes work on one adapter, and the first one writes. Raises E-DATA, E-OPTION,
    E-BASE, E-FPR, E-ATTACH, E-STATS (a checkpoint of other work), E-DEPENDENCY, E-OUT-*.
    """
    from lrconvert.refining import refine as refining

    chosen = _settings("refine", settings)
    where = base if isinstance(base, (str, PathLike)) else None
    target = None if out is None else hub.output(out)
    if target is not None:
        check_output(target, overwrite, inputs=[hub.locate(where)] if where is not None else [])
    done = refining.refine(
        adapter if isinstance(adapter, CompactAdapter) else read(adapter),
        loading.lora(teacher, loading.options(allow_pickle, where, layout, alpha)),
        base if not isinstance(base, (str, PathLike)) else hub.locate(base),
        data,
        chosen,
        device=device,
        partial=None if target is None else target.with_name(f"{target.name}.partial"),
        resume=resume,
        log_to=None if log is None else Path(log),
        load_in_4bit=load_in_4bit,
        progress=progress,
    )
    if target is not None and done.leads:
        file.write(done.compact, target, overwrite=overwrite)
        delete_leftover(target.with_name(f"{target.name}.partial"), target)
    return done
