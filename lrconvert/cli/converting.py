"""The ways to a compact form: ``lora-to-...`` for every method, `compress`, and `lora-to-alora`.

Commands and options are those that the methods and the dataclasses of `lrconvert.convert.options` declare.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lrconvert.api.batch.job import Work
from lrconvert.cli import batch, flags
from lrconvert.cli.printing import emit, progress_bar, say, unfinished_is_said, warn
from lrconvert.cli.request import Request
from lrconvert.convert.options import AllocateOptions, CompressOptions, ConvertOptions
from lrconvert.methods import base as methods

if TYPE_CHECKING:
    from lrconvert.convert.convert import Conversion, Progress
    from lrconvert.lora.adapter import LoraAdapter

_USES = ("seed", "device", "statistics")  # options that mean something to some methods
_MANY = "The file to write, or the folder for many (not with --dry-run alone)."


@dataclass(frozen=True)
class Result:
    """A conversion, and how it is shown."""

    conversion: Conversion
    json: Mapping[str, Any]
    text: str
    is_written: bool = False


def _command(
    name: str, about: str, own: list[click.Option], run: Callable[..., None], skip: Collection[str] = ()
) -> click.Command:
    """Make a converter: its `own` options, those of every conversion but for `skip`, and what is printed."""
    plan = click.Option(["--dry-run"], is_flag=True, help="Print the plan and the exact size; write nothing.")
    common = flags.of(ConvertOptions, skip=[*skip, *(str(option.name) for option in own)])
    params: list[click.Parameter] = [
        click.Argument(["sources"], metavar="SOURCE...", nargs=-1, type=flags.ADAPTER),
        click.Option(["-o", "--output"], type=flags.PLACE, help=_MANY),
        *batch.options(),
        *own,
        *common,
        *flags.reading(),
        *(option for option in (plan, flags.VERBOSE) if option.name not in skip),
        flags.OVERWRITE,
        flags.QUIET,
        flags.AS_JSON,
    ]
    return flags.command(name, *params, help=about)(run)


def method_command(name: str) -> click.Command:
    """Make the converter of that name, which a method declares."""
    method, declared = next((m, c) for m in methods.all_methods() for c in m.commands if c.name == name)

    def run(**given: Any) -> None:
        options = {**declared.fixed, **flags.chosen(given, method.Options, ConvertOptions)}
        request = Request.of(given)
        if batch.is_meant(request):
            batch.run(request, Work("convert", method.id, options), name)
            return

        def convert(lora: LoraAdapter, progress: Progress) -> Result:
            from lrconvert import api

            done = api.convert(lora, method.id, dry_run=request.dry_run, progress=progress, **options)
            return _shown(request, done)

        _one(request, name, options, convert)

    own = flags.of(method.Options, skip=declared.fixed)
    return _command(name, declared.help, own, run, skip=[use for use in _USES if use not in method.uses])


def _one(
    request: Request, title: str, options: Mapping[str, Any], convert: Callable[[LoraAdapter, Progress], Result]
) -> None:
    """Convert one adapter, write it, and print what became of it."""
    from lrconvert import api

    if request.html is not None:
        raise click.UsageError("--html is for several sources; `lrconvert compare --html` writes it for one.")
    where = _check_paths(request)
    lora = api.load_lora(where, base=options.get("base"), **request.reading)
    with progress_bar(title, request.quiet or request.as_json) as progress:
        result = convert(lora, progress)
    output = None if request.dry_run else request.output
    if output is not None and not result.is_written:
        api.write(result.conversion.compact, output, overwrite=request.overwrite)
    if request.as_json:
        shown = None if output is None and request.dry_run else str(output)
        emit({"source": str(request.sources[0]), "output": shown, **result.json})
        return
    warn(result.conversion.warnings)
    if not request.quiet:
        say(result.text)


def _shown(request: Request, conversion: Conversion) -> Result:
    from lrconvert.report.conversion import conversion_json, conversion_text

    output = None if request.dry_run else str(request.output)
    text = conversion_text(str(request.sources[0]), output, conversion, request.verbose)
    return Result(conversion, conversion_json(conversion), text)


def _check_paths(request: Request) -> Path:
    """Return where the source is. Raises a usage error without an output that is needed, E-OUT-* for a bad one."""
    from lrconvert.formats.fleet import places as fleet_places
    from lrconvert.io import hub, remote
    from lrconvert.io.durable import check_output

    if request.output is None and not request.dry_run:
        raise click.UsageError("Missing option '-o' / '--output'.")
    source = request.sources[0]
    where = fleet_places.read_from(source)
    if isinstance(request.output, remote.Url):
        remote.check_output(request.output, request.overwrite)
    elif request.output is not None:
        # A compact file beside the adapter is an earlier output, which --overwrite may replace.
        inputs = [p for p in where.iterdir() if p.suffix != ".lrc"] if where.is_dir() else [where]
        check_output(hub.output(request.output), request.overwrite, inputs=inputs)
    return Path(source) if fleet_places.is_member(source) else where


# --- compress -------------------------------------------------------------------------------------------------------


def compress_command() -> click.Command:
    """Make `compress`: the converters' options, and what is asked of the winner."""
    about = (
        "Try every form under a size, a ratio (50 by default) or a share to keep; print all, write the best, and say "
        "whether to ship it. The exit status is 0 whatever that verdict is, and 1 where nothing was written."
    )
    forms = "Forms to try, with commas between; default: all but Bat. For instance lowrank,vblora."
    base = "Base model folder or hub id: its answers rank the forms; settles orientations, records its digest."
    own = [
        click.Option(["--methods"], help=forms),
        *flags.of(CompressOptions),
        *flags.of(ConvertOptions, skip={field.name for field in fields(ConvertOptions)} - {"base"}, base=base),
    ]
    return _command("compress", about, own, _compress, skip=("dry_run",))


def _compress(*, methods: str | None, **given: Any) -> None:
    options = flags.chosen(given, CompressOptions, ConvertOptions)
    forms = [name.strip() for name in (methods or "").split(",") if name.strip()]
    options |= {"forms": tuple(forms)} if forms else {}
    request = Request.of(given)
    if batch.is_meant(request):
        batch.run(request, Work("compress", "", options), "compress")
        return

    def compress(lora: LoraAdapter, progress: Progress) -> Result:
        from lrconvert import api
        from lrconvert.report.compression import compression_json, compression_text

        out, overwrite = request.output, request.overwrite
        done = api.compress(lora, out=out, overwrite=overwrite, progress=progress, **options)
        text = compression_text(str(request.sources[0]), str(request.output), done, request.verbose)
        return Result(done.chosen, compression_json(done), text, is_written=True)

    with unfinished_is_said(request.output):
        _one(request, "compress", options, compress)


# --- lora-to-alora --------------------------------------------------------------------------------------------------

ALORA = "lora-to-alora"


def allocate_command() -> click.Command:
    """Make `lora-to-alora`: the converters' options, and those of the allocation. It needs no model without --data."""
    about = "Give every module the rank it deserves under one budget (ALoRA); the file is of the form lowrank."
    data = f"With --base: score by ablation on held-out texts instead of by energy. {flags.DATA_HELP}"
    own = [
        *flags.of(AllocateOptions, data=data),
        click.Option(
            ["--train-steps"],
            type=click.IntRange(0),
            default=0,
            show_default=True,
            help="With --base: train the result for so many steps, as refine does; components move between modules.",
        ),
        click.Option(
            ["--seed"],
            type=int,
            default=0,
            show_default=True,
            help="Of what --train-steps holds out, and the order of texts.",
        ),
    ]
    return _command(ALORA, about, own, _allocate)


def _allocate(*, train_steps: int, seed: int, **given: Any) -> None:
    options = flags.chosen(given, AllocateOptions, ConvertOptions)
    if train_steps:
        options["retrain"] = {"steps": train_steps, "seed": seed}
    request = Request.of(given)
    if batch.is_meant(request):
        batch.run(request, Work("allocate", "", options), ALORA)
        return

    def allocate(lora: LoraAdapter, progress: Progress) -> Result:
        from lrconvert import api
        from lrconvert.cli import allocating

        done = api.allocate(lora, dry_run=request.dry_run, progress=progress, **options)
        text = f"{_shown(request, done).text}\n\n{allocating.allocation_text(done, request.verbose)}"
        return Result(done, allocating.allocation_json(done), text)

    _one(request, ALORA, options, allocate)


compress, allocate = compress_command(), allocate_command()
