"""Verbs that make one form of another: convert, compress, allocate, refine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrconvert.api.adapters import read
from lrconvert.api.shared import AnyPath, Progress, settings_of, silent, statistics_of
from lrconvert.convert import compress as compressing
from lrconvert.convert import convert as converting
from lrconvert.convert import rank_allocation
from lrconvert.convert.compress import Compression
from lrconvert.convert.convert import Conversion, ExtraDtype
from lrconvert.convert.rank_allocation import Allocation
from lrconvert.core.errors import AttachError, BaseError, DataError
from lrconvert.formats import loading
from lrconvert.formats.lrc import file
from lrconvert.io import hub
from lrconvert.io.container import KnownContent
from lrconvert.io.durable import check_output, delete_leftover
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter
from lrconvert.lora.input_statistics import InputStatistics

if TYPE_CHECKING:
    from torch import nn

    from lrconvert.refine.refine import Refinement


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
    progress: Progress = silent,
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
        statistics=statistics_of(statistics),
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
    progress: Progress = silent,
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
    known = statistics_of(statistics)

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
    from lrconvert.refine import successive_halving

    settings = settings_of(
        "compress", {"length": length, "batch_tokens": batch_tokens, "max_tokens": max_tokens, "seed": seed}
    )
    rules = successive_halving.Rules(budget_minutes, steps)
    try:
        return successive_halving.compress(
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
    rounds: int = rank_allocation.ROUNDS,
    exact: int = rank_allocation.EXACT,
    length: int = 512,
    batch_tokens: int = 1024,
    max_tokens: int = rank_allocation.MAX_TOKENS,
    retrain: Mapping[str, Any] | None = None,
    moves: int = rank_allocation.MOVES,
    device: str = "cpu",
    dry_run: bool = False,
    base_content: KnownContent | None = None,
    progress: Progress = silent,
) -> Allocation:
    """Give every module the rank it deserves (ALoRA) under one budget: `total_rank` components, `target_size` bytes or
    `target_ratio`. The result is of the form ``lowrank``, its numbers of `bits` (16, 8, 4, 3, 2, 1).

    Components are scored by their energy, under `statistics` by that of the outputs. With `base` (which may be a live
    model then) and `data` (files, or batches of model inputs; `labels` count if a batch has them) they are scored by
    ablation on data that the LoRA was better not trained on, in `rounds` of pruning; in each the `exact` components
    next to the cut are ablated, two forward passes each. The other options are those of `convert` and `compare`.

    With `retrain`, fields of `lrconvert.refine.settings.Settings` (``{"steps": 300}``), and a `base` the result is
    trained as `refine` does it, on `data` or, without any, on texts of the LoRA's own; nothing of what is held out is
    scored or trained on. In the first half of the steps components change places up to `moves` times, of `exact` that
    are there and `exact` that may come. The result is what is best on held-out data, and never worse than the first
    allocation (`training` and `moves` of it say what happened): `lrconvert.refine.rank_training` says what to expect.

    Raises E-BUDGET (with the smallest possible size), E-OPTION, E-DATA, E-ATTACH, E-BASE, and what `convert` raises.
    """
    if retrain is None:
        verb: Callable[..., Allocation] = rank_allocation.allocate
        given: dict[str, Any] = {"length": length, "batch_tokens": batch_tokens}
    else:
        from lrconvert.refine import rank_training

        verb = rank_training.allocate
        settings = settings_of("retrain", {"length": length, "batch_tokens": batch_tokens, **retrain})
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
        statistics=statistics_of(statistics),
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
    progress: Progress = silent,
    **settings: Any,
) -> Refinement:
    """Bring the answers of a compact adapter nearer to those of its `teacher`, the LoRA it was made from: a short
    distillation on `data` (as in `statistics`; without data a decoder's teacher writes texts of its own).

    Two stages: the method's own fit under the moments of the teacher's inputs, then training end to end with the
    quantizers in the loop. What is best on held-out data is the result, and never worse than the input (`improved`
    says). With `out` it is written there, unfinished work beside it as ``<out>.partial``, with which `resume` goes on:
    on one device the result is that of a run without a pause. `settings` are the fields of
    `lrconvert.refine.settings.Settings`; `log` takes JSON lines; `load_in_4bit` quantizes the base to NF4. `layout`
    and `alpha` are those of `load` for the teacher.

    Under torchrun or accelerate all processes work on one adapter, and the first one writes. Raises E-DATA, E-OPTION,
    E-BASE, E-FPR, E-ATTACH, E-STATS (a checkpoint of other work), E-DEPENDENCY, E-OUT-*.
    """
    from lrconvert.refine import refine as refining

    chosen = settings_of("refine", settings)
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
