"""The converters ``lora-to-...``: found by scanning the methods, their options made from the methods' own."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any

import click

from lrconvert.cli import many
from lrconvert.cli.shared import (
    DEVICE,
    DEVICE_OPTION,
    PICKLE,
    PICKLE_HELP,
    ByteSize,
    device_of,
    emit,
    layout_options,
    progress_bar,
    warn,
)


def method_options(options: type[Any], fixed: typing.Mapping[str, Any]) -> list[click.Option]:
    """Click options from the fields of a method's Options. All default to "not given": the method's own default."""
    found = []
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        if field.name in fixed:
            continue
        kinds = [k for k in _members(hints[field.name]) if k is not type(None)]
        choices = field.metadata.get("choices")
        flag = "--" + field.name.replace("_", "-")
        shown = field.metadata["help"] + ("" if field.default is None else f"  [default: {field.default}]")
        if kinds == [bool]:
            found.append(click.Option([f"{flag}/--no-{flag[2:]}"], default=None, help=shown))
        else:
            found.append(click.Option([flag], type=click.Choice(choices) if choices else kinds[0], help=shown))
    return found


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def common_options() -> list[click.Parameter]:
    path = click.Path(path_type=Path)
    return [
        many.sources_argument(),
        click.Option(
            ["-o", "--output"], type=path, help="The file to write, or the folder for many (not with --dry-run alone)."
        ),
        many.jobs_option(),
        click.Option(
            ["--target-size"], type=ByteSize(), help="At most this many bytes without extra tensors, e.g. 200KB."
        ),
        click.Option(
            ["--target-ratio"], type=float, help="At least this many times smaller than the factors at 16 bit."
        ),
        click.Option(["--include"], multiple=True, help="Only targets whose name this pattern finds; repeatable."),
        click.Option(["--exclude"], multiple=True, help="No targets whose name this pattern finds; repeatable."),
        click.Option(
            ["--base"], type=path, help="Base model folder or hub id: settles orientations, records its digest."
        ),
        click.Option(
            ["--statistics"],
            type=path,
            help="Input statistics of the base (see `statistics`): the fit then minimizes the error of outputs.",
        ),
        click.Option(
            ["--bake-dora"],
            type=click.IntRange(min=1),
            metavar="RANK",
            help="Turn DoRA's magnitudes into plain updates of this rank (needs --base); default: carried along.",
        ),
        click.Option(
            ["--extra-dtype"],
            type=click.Choice(["F32", "F16", "BF16"]),
            help="Narrow extra tensors (heads) to this dtype; carried byte for byte otherwise.",
        ),
        click.Option(["--seed"], type=int, default=0, show_default=True, help="Seed of the fit."),
        click.Option(DEVICE, help="Where the fit computes.", **DEVICE_OPTION),
        click.Option(PICKLE, is_flag=True, help=PICKLE_HELP),
        *layout_options(),
        click.Option(["--dry-run"], is_flag=True, help="Print the plan and the exact size; write nothing."),
        click.Option(["--overwrite"], is_flag=True, help="Replace the output if it exists."),
        click.Option(["-q", "--quiet"], is_flag=True, help="No progress bar, no report."),
        click.Option(["-v", "--verbose"], is_flag=True, help="One line per target."),
        click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object instead of text."),
    ]


def _converter(method_id: str, command: Any, options: type[Any]) -> click.Command:
    """The command of a method."""
    own = method_options(options, command.fixed)
    own_names = [option.name for option in own]

    def run(**given: Any) -> None:
        chosen = {name: value for name in own_names if name and (value := given.pop(name)) is not None}
        settings = {**command.fixed, **chosen}
        if many.are_meant(given):
            many.run("convert", command.name, method_id, settings, **given)
        else:
            _convert(method_id, settings, **many.single(given))

    params = common_options()
    params[3:3] = own  # after sources, output and jobs
    return click.Command(command.name, params=params, callback=run, help=command.help, short_help=command.help)


def _convert(
    method: str,
    options: dict[str, Any],
    *,
    source: Path,
    output: Path | None,
    allow_pickle: bool,
    layout: str | None,
    alpha: float | None,
    dry_run: bool,
    overwrite: bool,
    quiet: bool,
    verbose: bool,
    as_json: bool,
    device: str,
    **common: Any,
) -> None:
    from lrconvert import api
    from lrconvert.report import text_and_json

    where = check_paths(source, output, overwrite, needed=not dry_run)
    lora = api.load_lora(where, allow_pickle=allow_pickle, base=common["base"], layout=layout, alpha=alpha)
    with progress_bar(f"lora-to-{method}", quiet or as_json) as progress:
        done = api.convert(
            lora, method, dry_run=dry_run, device=device_of(device), progress=progress, **common, **options
        )
    if output is not None and not dry_run:
        api.write(done.compact, output, overwrite=overwrite)
    if as_json:
        emit({"source": str(source), "output": None if dry_run else str(output), **text_and_json.conversion_json(done)})
        return
    warn(done.warnings)
    if not quiet:
        click.echo(text_and_json.conversion(str(source), None if dry_run else str(output), done, verbose))


def check_paths(source: Path, output: Path | None, overwrite: bool, needed: bool) -> Path:
    """Where the source is. Raises a usage error without an output that is `needed`, E-OUT-* for a bad one."""
    from lrconvert.io import hub
    from lrconvert.io.durable import check_output

    if output is None and needed:
        raise click.UsageError("Missing option '-o' / '--output'.")
    where = hub.locate(source)
    if output is not None:
        # A compact file beside the adapter is an earlier output, which --overwrite may replace.
        inputs = [p for p in where.iterdir() if p.suffix != ".lrc"] if where.is_dir() else [where]
        check_output(hub.output(output), overwrite, inputs=inputs)
    return where


_RANKING_BASE = "Base model folder or hub id: its answers rank the forms; settles orientations, records its digest."
_RANKING_DATA = "Texts that rank the forms and refine the winner (see `refine`); without, a decoder writes its own."
_NOT_FOR_ALL = ("dry_run", "verbose")


def compress_command() -> click.Command:
    """The command `compress`: the converters' options, and what is asked of the winner."""
    from lrconvert.convert.compress import RANKINGS

    params = [p for p in common_options() if p.name not in _NOT_FOR_ALL]
    params[5:5] = [
        click.Option(
            ["--min-captured"],
            type=float,
            help="The smallest file that keeps this share: of outputs with --statistics, else of weights.",
        ),
        click.Option(
            ["--methods"], help="Forms to try, with commas between; default: all but Bat. For instance lowrank,vblora."
        ),
    ]
    at = next(n for n, p in enumerate(params) if p.name == "base")
    params[at : at + 1] = [
        click.Option(["--base"], type=click.Path(path_type=Path), help=_RANKING_BASE),
        click.Option(["--data"], multiple=True, type=click.Path(path_type=Path), help=_RANKING_DATA),
        click.Option(
            ["--rank-by"],
            type=click.Choice(RANKINGS),
            default="auto",
            show_default=True,
            help="What the model answers after a short refinement, or what fits keep; auto: answers, with --base.",
        ),
        click.Option(
            ["--budget-minutes"], type=float, help="Time for ranking by answers, instead of a number of steps."
        ),
        click.Option(
            ["--steps"], type=click.IntRange(0), default=0, show_default=True, help="Refine the winner by so many more."
        ),
        click.Option(["--length"], type=click.IntRange(2), default=512, show_default=True, help="Tokens of a text."),
        click.Option(
            ["--batch-tokens"], type=click.IntRange(1), default=1024, show_default=True, help="Tokens of a batch."
        ),
        click.Option(
            ["--max-tokens"], type=click.IntRange(0), default=0, show_default=True, help="Tokens of --data; 0: all."
        ),
    ]
    about = "Try every form that can meet a size, a ratio or a share to keep; print them all, write the best."
    return click.Command("compress", params=params, callback=_compress_any, help=about, short_help=about)


def _compress_any(*, data: tuple[Path, ...], methods: str | None, **given: Any) -> None:
    forms = [name.strip() for name in (methods or "").split(",") if name.strip()]
    given["data"] = list(data) or None
    if many.are_meant(given):
        many.run("compress", "compress", "", {"forms": forms}, dry_run=False, verbose=False, **given)
    else:
        _compress(forms=forms, **many.single(given))


def _compress(
    *,
    source: Path,
    output: Path | None,
    forms: list[str],
    allow_pickle: bool,
    layout: str | None,
    alpha: float | None,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
    device: str,
    **common: Any,
) -> None:
    from lrconvert import api
    from lrconvert.report import text_and_json

    where = check_paths(source, output, overwrite, needed=True)
    assert output is not None
    lora = api.load_lora(where, allow_pickle=allow_pickle, base=common["base"], layout=layout, alpha=alpha)
    with progress_bar("compress", quiet or as_json) as progress:
        done = api.compress(lora, forms=forms, device=device_of(device), progress=progress, **common)
    api.write(done.chosen.compact, output, overwrite=overwrite)
    if as_json:
        emit({"source": str(source), "output": str(output), **text_and_json.compression_json(done)})
        return
    warn(done.chosen.warnings)
    if not quiet:
        click.echo(text_and_json.compression(str(source), str(output), done))


def commands() -> list[click.Command]:
    """A command for every way to a compact form."""
    from lrconvert.methods import base as methods

    return [_converter(m.id, command, m.Options) for m in methods.all_methods() for command in m.commands]
