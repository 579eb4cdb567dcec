"""Verbs that make one form of another: convert, compress, allocate, refine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrconvert.api.shared import (
    AnyCompact,
    AnyLora,
    AnyPath,
    Progress,
    check_data,
    compact_of,
    is_remote,
    lora_of,
    method_of,
    model_or_folder,
    output_of,
    path_of,
    published,
    refuse_rest,
    refuse_resume,
    silent,
    take_reading,
)
from lrconvert.convert import compress as ranking
from lrconvert.convert import convert as conversion
from lrconvert.convert import rank_allocation
from lrconvert.convert.compress import Compression, Keep
from lrconvert.convert.convert import Conversion
from lrconvert.convert.options import AllocateOptions, CompressOptions, ConvertOptions
from lrconvert.convert.rank_allocation import Allocation
from lrconvert.core.errors import (
    ArgumentError,
    AttachError,
    BaseError,
    BudgetError,
    DataError,
    OptionError,
    OutputExistsError,
    StatisticsError,
)
from lrconvert.core.options import described, make, take
from lrconvert.core.wording import spelled
from lrconvert.formats.fleet import places as fleet_places
from lrconvert.formats.lrc import file
from lrconvert.io.checkpoint import KnownContent, open_checkpoint
from lrconvert.io.durable import check_output, delete_leftover, partial_path
from lrconvert.lora.adapter import LoraAdapter
from lrconvert.lora.input_statistics import InputStatistics
from lrconvert.methods.base import DEFAULT_RATIO

if TYPE_CHECKING:
    from torch import nn

    from lrconvert.refine.refine import Refinement
    from lrconvert.refine.settings import Settings

_RANKED = 0.8  # of the progress of `compress` by fit: behind when the forms are ranked


def convert(
    lora: AnyLora,
    method: str,
    options: ConvertOptions | None = None,
    *,
    dry_run: bool = False,
    base_content: KnownContent | None = None,
    progress: Progress | None = None,
    **more: Any,
) -> Conversion:
    """Refit `lora`, loaded or a path, into the compact form `method` ("vblora", "lowrank", ...; "alora" is `allocate`).

    `more` are single fields of `ConvertOptions` (``target_ratio=50``, ``target_size="8KB"``), of the method's own
    ``Options`` (``bits=4``), and `allow_pickle`, `layout` and `alpha` as in `load`. Without a size or ratio, and
    without any of the method's own options, a method takes its default ratio. `dry_run` plans only: sizes are exact.
    `base_content` (`Checkpoint.known_content`) saves digesting a base of which many adapters are converted.

    Raises E-BUDGET (with the smallest possible size), E-OPTION, E-EMPTY, E-BASE, E-ORIENT, E-STATS, E-FPR,
    E-IO-CHANGED.

    >>> from lrconvert import demo, load_lora
    >>> result = convert(load_lora(demo.ADAPTER), "lowrank", target_ratio=20)
    >>> result.ratio >= 20
    True

    >>> convert("my-adapter", "lowrank", target_ratio=4)
    <Conversion: lowrank, 8,5... bytes, 4.0 times smaller, captured 0.99...>
    """
    progress = progress or silent
    if method == "alora":
        return allocate(lora, options, dry_run=dry_run, base_content=base_content, progress=progress, **more)
    form, fixed = method_of(method)
    for name, value in fixed.items():
        if more.setdefault(name, value) != value:
            raise OptionError(f"{method} is {form} with {name}={value!r}, and {name}={more[name]!r:.40} was given")
    loaded, settled = _taken(lora, options, more, "convert")
    return conversion.convert(
        loaded, form, settled, more, dry_run=dry_run, base_content=base_content, progress=progress
    )


def compress(
    lora: AnyLora,
    options: ConvertOptions | None = None,
    *,
    out: AnyPath | None = None,
    overwrite: bool = False,
    base_content: KnownContent | None = None,
    progress: Progress | None = None,
    **more: Any,
) -> Compression:
    """Try all forms and take the best under a size or ratio (50 if nothing is asked for), or the smallest that keeps a
    share or loses no more than `max_loss`; `chosen` of the result is the winner's conversion, `verdict` whether to ship
    it, and why.

    `more` are single fields of `ConvertOptions` and `CompressOptions`. With a base the best is what answers most as the
    LoRA does on held-out data: all forms are fitted under the moments of its inputs and in the plain norm, whichever
    answers better, at the strength at which it does (`ConvertOptions`). They are refined a little, the better half
    twice as long, and so on; the winner, refined by as much and by `steps` more, is what is chosen. By fit it is what
    keeps most in the metric of the fits; so without a base, without its weights, and for an encoder without data. It is
    then fitted anew at the strength that its captured share asks for (`stronger`), unless `strength` or `min_captured`
    is given.

    With `out` it is written there. What a ranking by answers, which takes minutes, has measured is kept beside it then,
    as ``<out>.partial``, until it ends, and `resume` goes on with that: the result is that of a run without a pause.

    Raises E-BUDGET, saying what would do, if nothing meets the request, E-OPTION, E-OUT-*, what `convert` raises, and
    ranking by answers what `refine` raises, E-STATS for unfinished work of something else.

    >>> compress("my-adapter", min_captured=0.8, forms=["lowrank", "sbora"]).chosen.compact.method
    'lowrank'
    """
    progress = progress or silent
    if is_remote(out):
        refuse_resume(more, "compress")
        with published(out, overwrite=overwrite) as local:
            return compress(lora, options, out=local, base_content=base_content, progress=progress, **more)
    loaded, settled = _taken(lora, options, more, "compress")
    request = take(CompressOptions, None, more, "compress")
    refuse_rest(more, "compress", ConvertOptions, CompressOptions)
    for name in request.forms:
        method_of(name)
    is_sized = ranking.check_request(settled, request)
    if not is_sized or request.loss_bound:  # the size from which a loss is searched
        settled = replace(settled, target_ratio=DEFAULT_RATIO)
    target, kept = _output(out, overwrite, (lora, settled.base), request)
    try:
        done = _compressed(loaded, settled, request, base_content, progress, kept)
    except BudgetError as error:
        raise error if is_sized else conversion.default_too_small(error) from None
    done = replace(done, by_default=not is_sized)
    if target is not None and kept is not None:
        file.write(done.compact, target, overwrite=overwrite)
        delete_leftover(kept, target)
    return done


def _output(
    out: AnyPath | None, overwrite: bool, inputs: Sequence[object], request: CompressOptions
) -> tuple[Path | None, Path | None]:
    """Return where the result goes, and the unfinished work beside it; None without an output. Raises E-OPTION,
    E-OUT-*."""
    if out is None:
        if request.resume:
            what = "resume goes on with unfinished work, which lies beside the output"
            raise OptionError(what, fix=f"name the output with {spelled('out', ..., '--output')}")
        return None, None
    target = output_of(out)
    places = [fleet_places.read_from(path_of(item, "input")) for item in inputs if isinstance(item, (str, PathLike))]
    check_output(target, overwrite, inputs=[file for place in places for file in _files_of(place)])
    kept = partial_path(target)
    if kept.exists() and not request.resume:
        raise OutputExistsError(
            "is unfinished work for this output",
            fix=f"pass {spelled('resume', True)} to go on with it, or remove it",
            path=kept,
        )
    return target, kept


def _files_of(place: Path) -> list[Path]:
    """The parts of an input that must not be replaced: of a folder not its compact files, which are earlier outputs."""
    return [path for path in place.iterdir() if path.suffix != ".lrc"] if place.is_dir() else [place]


def _taken(
    lora: AnyLora, options: ConvertOptions | None, more: dict[str, Any], verb: str
) -> tuple[LoraAdapter, ConvertOptions]:
    """Return the LoRA, read if it is a path, and the options without those of `more` that are taken."""
    own: dict[str, Any] = {
        name: more.pop(name) for name in ("allow_pickle", "layout", "alpha", "source_rank") if name in more
    }
    settled = take(ConvertOptions, options, more, verb).resolved()
    return lora_of(lora, take_reading(own, settled.base)), settled


def _compressed(
    lora: LoraAdapter,
    settled: ConvertOptions,
    request: CompressOptions,
    base_content: KnownContent | None,
    progress: Progress,
    kept: Path | None,
) -> Compression:
    """Compress under `settled` options that say how small, by answers where they can rank the forms, else by fits; what
    answers take long for is in the file `kept`, if that is given."""

    def fit(
        lora: LoraAdapter, measured: InputStatistics | None, progress: Progress, keep: Keep = ranking.compute
    ) -> Compression:
        under = replace(settled, statistics=measured)
        return ranking.compress(lora, under, request, base_content=base_content, progress=progress, keep=keep)

    def by_fit(note: str) -> Compression:
        ranked = fit(lora, settled.input_statistics, lambda done, text: progress(_RANKED * done, text))
        if request.min_captured is not None:
            return replace(ranked, note=note)
        chosen = ranking.with_strength(
            lora,
            settled,
            ranked,
            base_content=base_content,
            progress=lambda done, text: progress(_RANKED + (1 - _RANKED) * done, text),
        )
        return replace(chosen, note=note)

    def refit(
        lora: LoraAdapter,
        measured: InputStatistics | None,
        candidate: ranking.Candidate,
        strength: float,
        nbytes: int | None,
    ) -> ranking.Candidate:
        under = replace(settled, statistics=measured, strength=(settled.strength or 1.0) * strength)
        if nbytes is not None:
            under = replace(under, target_size=nbytes, target_ratio=None)
        return ranking.refitted(lora, under, candidate, base_content=base_content, progress=silent)

    reason = ranking.no_answers(settled, request)
    if reason is not None or settled.base is None:
        if kept is not None and kept.exists():
            what = "is unfinished work of a ranking by answers, which this is not"
            raise StatisticsError(what, fix="give what it was begun with, or remove it", path=kept)
        return by_fit(reason or "")
    from lrconvert.refine import successive_halving
    from lrconvert.refine.kept_work import KeptWork
    from lrconvert.refine.settings import Settings

    if base_content is None:  # it is read once for all fits
        with open_checkpoint(settled.base, quantized=True) as checkpoint:
            base_content = checkpoint.known_content()

    settings = Settings(
        length=request.length, batch_tokens=request.batch_tokens, max_tokens=request.max_tokens, seed=settled.seed
    )
    rules = successive_halving.Rules(request.budget_minutes, request.steps, settled.device, request.loss_bound)
    work = KeptWork.opened(kept, _depends_on(settled, request, base_content), lora)
    try:
        return successive_halving.compress(
            lora,
            successive_halving.Fits(fit, refit, settled.input_statistics),
            settled.base,
            request.data,
            settings,
            rules,
            work=work,
            progress=progress,
        )
    except (AttachError, BaseError, DataError) as error:  # no such model, or nothing to learn
        work.end()
        if request.rank_by == "answers" or request.data is not None or request.loss_bound:
            raise
        return by_fit(ranking.RANKED_BY_FIT.format(error.what))
    except BudgetError:  # there is nothing to go on with
        work.end()
        raise


def _depends_on(settled: ConvertOptions, request: CompressOptions, base: KnownContent) -> dict[str, str]:
    """All that a compression by answers depends on beside the LoRA and the data."""
    measured = settled.input_statistics
    about = {"base": base.digest}
    about["statistics"] = "" if measured is None else repr((measured.content, measured.data, measured.tokens))
    elsewhere = ("base", "statistics", "data", "resume")
    for name, value in (*vars(settled).items(), *vars(request).items()):
        if name not in elsewhere:
            about[name] = repr(value)
    return about


def allocate(
    lora: AnyLora,
    options: ConvertOptions | None = None,
    *,
    retrain: Mapping[str, Any] | None = None,
    dry_run: bool = False,
    base_content: KnownContent | None = None,
    progress: Progress | None = None,
    **more: Any,
) -> Allocation:
    """Give every module the rank it deserves (ALoRA) under one budget: `total_rank` components, `target_size` bytes or
    `target_ratio`. The result is of the form ``lowrank``.

    `more` are single fields of `ConvertOptions` and `AllocateOptions`. Components are scored by their energy, under
    `statistics` by that of the outputs. With `base` (which may be a live model then) and `data` (files, or batches of
    model inputs; `labels` count if a batch has them) they are scored by ablation on data that the LoRA was better not
    trained on.

    With `retrain`, fields of `lrconvert.refine.settings.Settings` (``{"steps": 300}``), and a `base` the result is
    trained as `refine` does it, on `data` or, without any, on texts of the LoRA's own; nothing of what is held out is
    scored or trained on. The size of the file is part of what is trained, so that components move between modules. The
    result is what is best on held-out data, and never worse than the first allocation (`training` and `rounds` of it
    say what happened).

    Raises E-BUDGET (with the smallest possible size), E-OPTION, E-DATA, E-ATTACH, E-BASE, and what `convert` raises.
    """
    progress = progress or silent
    base = more.get("base")
    model = None if base is None or isinstance(base, (str, PathLike)) else more.pop("base")
    loaded, settled = _taken(lora, options, more, "allocate")
    request = take(AllocateOptions, None, more, "allocate")
    refuse_rest(more, "allocate", ConvertOptions, AllocateOptions)
    if retrain is None:
        return rank_allocation.allocate(
            loaded, settled, request, model=model, dry_run=dry_run, base_content=base_content, progress=progress
        )
    from lrconvert.refine import rank_training
    from lrconvert.refine.settings import Settings

    if not isinstance(retrain, Mapping):
        raise ArgumentError(
            f"retrain is {described(retrain)}; settings by name were expected", fix="such as {'steps': 300}"
        )
    settings = make(Settings, {"length": request.length, "batch_tokens": request.batch_tokens, **retrain}, "retrain")
    return rank_training.allocate(
        loaded, settled, request, settings, model=model, dry_run=dry_run, base_content=base_content, progress=progress
    )


def refine(
    adapter: AnyCompact,
    teacher: AnyLora,
    base: AnyPath | nn.Module,
    data: AnyPath | Sequence[AnyPath] | Iterable[Mapping[str, Any]] | None = None,
    out: AnyPath | None = None,
    settings: Settings | None = None,
    *,
    progress: Progress | None = None,
    **more: Any,
) -> Refinement:
    """Bring the answers of a compact adapter nearer to those of its `teacher`, the LoRA it was made from: a short
    distillation on `data` (as in `statistics`; without data a decoder's teacher writes texts of its own).

    Two stages: the method's own fit under the moments of the teacher's inputs, then training end to end with the
    quantizers in the loop. What is best on held-out data is the result, and never worse than the input (`improved`
    says). With `out` it is written there, unfinished work beside it as ``<out>.partial``, with which `resume` goes on:
    on one device the result is that of a run without a pause.

    `more` are single fields of `lrconvert.refine.settings.Settings` and `RunOptions`, and `allow_pickle`, `layout` and
    `alpha` as in `load`, for the teacher. Under torchrun or accelerate all processes work on one adapter, and the first
    one writes. Raises E-DATA, E-OPTION, E-BASE, E-FPR, E-ATTACH, E-STATS (a checkpoint of other work), E-DEPENDENCY,
    E-OUT-*.
    """
    progress = progress or silent
    if is_remote(out):
        refuse_resume(more, "refine")
        with published(out, overwrite=bool(more.get("overwrite"))) as local:
            return refine(adapter, teacher, base, data, local, settings, progress=progress, **more)
    from lrconvert.refine import refine as refining
    from lrconvert.refine.settings import RunOptions, Settings

    model = model_or_folder(base)
    where = model if isinstance(model, Path) else None
    reading = take_reading(more, where)
    if data is not None:
        check_data(data)
    run = take(RunOptions, None, more, "refine")
    chosen = take(Settings, settings, more, "refine")
    refuse_rest(more, "refine", Settings, RunOptions)
    target = None if out is None else output_of(out)
    if target is not None:
        check_output(target, run.overwrite, inputs=[] if where is None else [where])
    refined = refining.refine(
        compact_of(adapter),
        lora_of(teacher, reading, "teacher"),
        model,
        data,
        chosen,
        run,
        partial=None if target is None else partial_path(target),
        progress=progress,
    )
    if target is not None and refined.leads:
        file.write(refined.compact, target, overwrite=run.overwrite)
        delete_leftover(partial_path(target), target)
    return refined
