"""The command line: each command parses, calls the API, and renders text or JSON.

Exit 0 done, 1 refused or failed (one line: code, file, what, what to do), 2 usage.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from lrconvert import __version__
from lrconvert.errors import EXIT_REFUSED, LrcError, printable

SCHEMA_VERSION = 1
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


class ByteSize(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A size such as 200KB, 1.5MiB or 4096. KB = 1000 bytes, KiB = 1024."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = str(value).strip().lower()
        number = text.rstrip("bikmg")
        try:
            return int(float(number) * _UNITS[text[len(number) :].strip()])
        except (ValueError, KeyError, OverflowError):
            self.fail(f"{value!r} is not a size; write 200KB, 1.5MiB or 4096", param, ctx)


class Group(click.Group):
    """Commands in the order of a user's work; converter commands are found by scanning the methods."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in self.commands if name != "merge"]


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="lrconvert")
def cli() -> None:
    """Make LoRA adapters 10 to 100 times smaller, with the loss measured.

    Every command takes -h. Sizes: 1 KB = 1000 bytes. Exit status: 0 done, 1 refused or failed, 2 usage.
    """


def main() -> None:
    """Run the CLI; our errors become one line on stderr and exit status 1."""
    try:
        code = cli(standalone_mode=False)  # what a command raised as Exit comes back as its code
        sys.exit(code if isinstance(code, int) else 0)
    except LrcError as error:
        click.echo(str(error), err=True)
        sys.exit(EXIT_REFUSED)
    except click.exceptions.Abort:
        click.echo("aborted", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(EXIT_REFUSED)


# --- shared options and output --------------------------------------------------------------------------------------

_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
_overwrite = click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
_quiet = click.option("-q", "--quiet", is_flag=True, help="No progress bar, no report.")
_verbose = click.option("-v", "--verbose", is_flag=True, help="One line per target.")
_source = click.argument("source", type=click.Path(path_type=Path))
_PICKLE = ["--allow-pickle"]
_PICKLE_HELP = "Read .bin and .pt adapters too, with torch's tensors-only loader; only files that you trust."
_pickle = click.option(*_PICKLE, is_flag=True, help=_PICKLE_HELP)


def _emit(value: dict[str, Any]) -> None:
    click.echo(json.dumps({"schema": SCHEMA_VERSION, **value}, indent=1))


def _warn(warnings: typing.Iterable[str]) -> None:
    for line in warnings:
        click.echo(f"warning: {printable(line, 1000)}", err=True)


@contextmanager
def _progress(title: str, quiet: bool) -> Iterator[Callable[[float, str], None]]:
    """A progress callback drawn by tqdm on stderr; silent when quiet or not on a terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda fraction, text: None
        return
    from tqdm import tqdm

    with tqdm(total=100, desc=title, unit="%", bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}") as bar:

        def update(fraction: float, text: str) -> None:
            bar.set_postfix_str(text[-40:], refresh=False)
            bar.update(min(int(100 * fraction), 100) - bar.n)

        yield update


def _command_line() -> str:
    """What the user typed, without private folders: hub ids, and only the last part of each path."""
    from lrconvert import hub

    words = [hub.hint(w) if "/" in w else w for w in sys.argv[1:]]
    return shlex.join(["lrconvert", *words])


# --- looking --------------------------------------------------------------------------------------------------------


@cli.command()
@_source
@_pickle
@_json
def inspect(source: Path, allow_pickle: bool, as_json: bool) -> None:
    """Show what an adapter is: targets, ranks, spectrum, bytes. Any LoRA layout, and lrconvert files."""
    from lrconvert import api, render

    found = api.inspect(source, allow_pickle=allow_pickle)
    if as_json:
        _emit({"path": str(source), **found})
        return
    click.echo(render.inspection(str(source), found))
    _warn(found["warnings"])


@cli.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    help="Model folder or hub id; its names, shapes and contents are checked.",
)
@_json
def validate(files: tuple[Path, ...], base: Path | None, as_json: bool) -> None:
    """Check lrconvert files; prints every finding and exits 1 if there is any."""
    from lrconvert import api

    results = [api.validate(path, base=base) for path in files]
    if as_json:
        _emit({"ok": all(r.ok for r in results), "files": [{**dataclasses.asdict(r), "ok": r.ok} for r in results]})
    else:
        for result in results:
            for finding in result.findings:
                click.echo(f"{finding.message} [{finding.level}]")
            if result.ok:
                facts = result.summary
                click.echo(
                    f"ok: {result.path}: {facts['method']}, {facts['targets']} targets, {facts['bytes']:,} bytes"
                )
    if not all(r.ok for r in results):
        raise click.exceptions.Exit(EXIT_REFUSED)


@cli.command()
@click.argument("path", metavar="FILE", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The file to write.")
@_overwrite
def upgrade(path: Path, output: Path, overwrite: bool) -> None:
    """Write an lrconvert FILE in the newest version of the format."""
    from lrconvert import api

    sizes = api.upgrade(path, output, overwrite=overwrite)
    click.echo(f"wrote {printable(str(output))}: {sizes.total:,} bytes, the update unchanged")


@cli.command()
@_source
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@_pickle
@_verbose
@_json
def compare(source: Path, files: tuple[Path, ...], allow_pickle: bool, verbose: bool, as_json: bool) -> None:
    """Measure lrconvert FILES against the LoRA SOURCE they came from: captured energy, bytes, ratio."""
    from lrconvert import api, render

    found = api.compare(source, files, allow_pickle=allow_pickle)
    if as_json:
        rows = [{"path": str(p), **render.fidelity_json(f)} for p, f in zip(files, found, strict=True)]
        _emit({"source": str(source), "files": rows})
        return
    click.echo(render.comparison([(p.name, f) for p, f in zip(files, found, strict=True)], verbose))


# --- converting -----------------------------------------------------------------------------------------------------


def _method_options(options: type[Any], fixed: typing.Mapping[str, Any]) -> list[click.Option]:
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


def _common_options() -> list[click.Parameter]:
    path = click.Path(path_type=Path)
    return [
        click.Argument(["source"], type=path),
        click.Option(["-o", "--output"], type=path, help="The file to write (required unless --dry-run)."),
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
        click.Option(
            ["--device"],
            type=click.Choice(["auto", "cpu", "cuda"]),
            default="auto",
            show_default=True,
            help="Where the fit computes.",
        ),
        click.Option(_PICKLE, is_flag=True, help=_PICKLE_HELP),
        click.Option(["--dry-run"], is_flag=True, help="Print the plan and the exact size; write nothing."),
        click.Option(["--overwrite"], is_flag=True, help="Replace the output if it exists."),
        click.Option(["-q", "--quiet"], is_flag=True, help="No progress bar, no report."),
        click.Option(["-v", "--verbose"], is_flag=True, help="One line per target."),
        click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object instead of text."),
    ]


def _converter(method_id: str, command: Any, options: type[Any]) -> click.Command:
    """The command of a method."""
    own = _method_options(options, command.fixed)
    own_names = [option.name for option in own]

    def run(**given: Any) -> None:
        chosen = {name: value for name in own_names if name and (value := given.pop(name)) is not None}
        _convert(method_id, {**command.fixed, **chosen}, **given)

    params = _common_options()
    params[2:2] = own  # after source and output
    return click.Command(command.name, params=params, callback=run, help=command.help, short_help=command.help)


def _convert(
    method: str,
    options: dict[str, Any],
    *,
    source: Path,
    output: Path | None,
    allow_pickle: bool,
    dry_run: bool,
    overwrite: bool,
    quiet: bool,
    verbose: bool,
    as_json: bool,
    device: str,
    **common: Any,
) -> None:
    from lrconvert import api, hub, render
    from lrconvert.durable import check_output

    if output is None and not dry_run:
        raise click.UsageError("Missing option '-o' / '--output'.")
    where = hub.locate(source)
    if output is not None:
        # A compact file beside the adapter is an earlier output, which --overwrite may replace.
        inputs = [p for p in where.iterdir() if p.suffix != ".lrc"] if where.is_dir() else [where]
        check_output(hub.output(output), overwrite, inputs=inputs)
    lora = api.load_lora(where, allow_pickle=allow_pickle)
    with _progress(f"lora-to-{method}", quiet or as_json) as progress:
        done = api.convert(
            lora, method, dry_run=dry_run, device=_device(device), progress=progress, **common, **options
        )
    if output is not None and not dry_run:
        api.write(done.compact, output, overwrite=overwrite)
    if as_json:
        _emit({"source": str(source), "output": None if dry_run else str(output), **render.conversion_json(done)})
        return
    _warn(done.warnings)
    if not quiet:
        click.echo(render.conversion(str(source), None if dry_run else str(output), done, verbose))


def _device(name: str) -> str:
    """`auto` means CUDA if torch has been asked for and sees a GPU; plain CPU fits need no torch, so it is not loaded
    to find out where no driver is installed."""
    if name != "auto":
        return name
    if not (Path("/proc/driver/nvidia").exists() or Path("/dev/nvidia0").exists()):
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _add_converters() -> None:
    from lrconvert.methods import base as methods

    for method in methods.all_methods():
        for command in method.commands:
            cli.add_command(_converter(method.id, command, method.Options))


# --- going out ------------------------------------------------------------------------------------------------------


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@click.option("--to", required=True, help="peft-lora or peft-vblora.")
@click.option(
    "--source", type=click.Path(path_type=Path), help="The LoRA it came from: adds the error table to the card."
)
@click.option("--keep-ranks", is_flag=True, help="Write rank_pattern and alpha_pattern instead of one padded rank.")
@click.option(
    "--dtype", type=click.Choice(["F32", "F16", "BF16"]), default="F32", show_default=True, help="Of the factors."
)
@_pickle
@_overwrite
@_quiet
def export(
    file: Path,
    output: Path,
    to: str,
    source: Path | None,
    keep_ranks: bool,
    dtype: str,
    allow_pickle: bool,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Write an lrconvert FILE as a folder that other tools load."""
    from lrconvert import api

    names = api.export(
        file,
        output,
        to=to,
        source=source,
        keep_ranks=keep_ranks,
        dtype=dtype,
        allow_pickle=allow_pickle,
        overwrite=overwrite,
        command=_command_line(),
    )
    if not quiet:
        click.echo(f"wrote {output}: {', '.join(names)}")


def _check(path: Path, consumers: tuple[str, ...], base: Path | None, as_json: bool, **given: Any) -> None:
    from lrconvert import api
    from lrconvert.consumers import base as known

    options = {name: value for name, value in given.items() if value is not None}
    findings = api.check(path, consumers, base=base, **options)
    ok = all(finding.severity == "warns" for finding in findings)
    used = known.chosen(consumers)
    if as_json:
        looked = [{"id": c.id, "title": c.title, "version": c.version} for c in used]
        _emit(
            {
                "path": str(path),
                "ok": ok,
                "consumers": looked,
                "findings": [dataclasses.asdict(finding) for finding in findings],
            }
        )
    else:
        for consumer in used:
            lines = [str(finding) for finding in findings if finding.consumer == consumer.id]
            click.echo("\n".join(lines or [f"{consumer.id} {consumer.version}: nothing found"]))
    if not ok:
        raise click.exceptions.Exit(EXIT_REFUSED)


def _check_command() -> click.Command:
    """The command `check`: its choices and options are those of the consumers."""
    from lrconvert.consumers import base as known

    path = click.Path(path_type=Path)
    own = {o.name: o for c in known.chosen(["all"]) for o in _method_options(c.Options, {})}
    return click.Command(
        "check",
        params=[
            click.Argument(["path"], type=path),
            click.Option(
                ["--for", "consumers"],
                multiple=True,
                required=True,
                type=click.Choice([*known.ids(), "all"]),
                help="Who would load it; repeatable.",
            ),
            click.Option(["--base"], type=path, help="Base model folder or hub id; its config.json is enough."),
            *own.values(),
            click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object instead of text."),
        ],
        callback=_check,
        help="Say what a server or library would refuse or silently get wrong in an adapter. Runs nothing, reads no "
        "weights; exits 1 if there is such a finding.",
        short_help="Say what a server would refuse or get wrong in an adapter.",
    )


def _weighted(text: str, allow_pickle: bool) -> Any:
    """The adapter that ``path`` or ``path=scale`` means, loaded."""
    from lrconvert import api, hub
    from lrconvert.merging import Scaled

    name, equals, number = text.rpartition("=")
    if equals and not Path(text).exists():
        try:
            scale = float(number)
        except ValueError:
            raise click.UsageError(f"{text!r}: what follows the last '=' is not a scale") from None
    else:
        name, scale = text, 1.0
    return Scaled(api.load(name, allow_pickle=allow_pickle), scale, hub.hint(name))


_dequantize = click.option("--dequantize", is_flag=True, help="Take a base that bitsandbytes has quantized as bf16.")


@click.command("merge-into-base")
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[=SCALE]...")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The model folder to write.")
@click.option("--dry-run", is_flag=True, help="Print what would be written; write nothing.")
@click.option("--no-undo", is_flag=True, help="Write no undo record: only the base itself can undo it then.")
@click.option("--out-shard-size", type=ByteSize(), help="Largest weight file, as 5GB; default: cut as the base is.")
@click.option("--allow-no-op", is_flag=True, help="Write a copy of the base even if the adapter changes nothing.")
@_dequantize
@_pickle
@_overwrite
@_quiet
@_verbose
@_json
def merge_into_base(
    base: Path,
    adapters: tuple[str, ...],
    output: Path,
    dry_run: bool,
    no_undo: bool,
    out_shard_size: int | None,
    allow_no_op: bool,
    dequantize: bool,
    allow_pickle: bool,
    overwrite: bool,
    quiet: bool,
    verbose: bool,
    as_json: bool,
) -> None:
    """Bake one or more ADAPTERs (lrconvert files, LoRA folders) into a copy of the model folder BASE.

    Their sum, each times its SCALE, is added to the weights and rounded once, correctly. `unmerge` takes it out again.
    """
    from lrconvert import api, render

    with _progress("merge", quiet or as_json) as progress:
        report = api.merge(
            base,
            [_weighted(text, allow_pickle) for text in adapters],
            output,
            overwrite=overwrite,
            dry_run=dry_run,
            undo=not no_undo,
            shard_bytes=out_shard_size,
            allow_no_op=allow_no_op,
            dequantize=dequantize,
            progress=progress,
        )
    if as_json:
        _emit({"base": str(base), "adapters": list(adapters), "output": str(output), **render.merge_json(report)})
        return
    if not quiet:
        click.echo(render.merging(str(output), report, verbose))
    _warn(report.warnings)


@click.command()
@click.argument("merged", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The folder to write; default: in its place.")
@click.option("--merge", "number", type=int, help="Insist on this merge; only the last one can be undone.")
@click.option("--from-base", type=click.Path(path_type=Path), help="Take the bytes from this base.")
@_overwrite
@_quiet
@_json
def unmerge(
    merged: Path,
    output: Path | None,
    number: int | None,
    from_base: Path | None,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Undo the last merge of the model folder MERGED: every byte of the base comes back, verified."""
    from lrconvert import api, render

    with _progress("unmerge", quiet or as_json) as progress:
        report = api.unmerge(merged, output, number=number, from_base=from_base, overwrite=overwrite, progress=progress)
    place = str(output or merged)
    if as_json:
        _emit({"merged": str(merged), "output": place, **dataclasses.asdict(report)})
        return
    if not quiet:
        click.echo(render.unmerging(place, report))
    _warn(report.warnings)


@click.command()
@click.argument("merged", type=click.Path(path_type=Path))
@click.option("--base", required=True, type=click.Path(path_type=Path), help="Model folder or hub id of the base.")
@click.option(
    "--adapter", "adapters", required=True, multiple=True, metavar="ADAPTER[=SCALE]", help="As merged; repeatable."
)
@_dequantize
@_pickle
@_quiet
@_json
def verify(
    merged: Path,
    base: Path,
    adapters: tuple[str, ...],
    dequantize: bool,
    allow_pickle: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Confirm that MERGED is BASE with the ADAPTERs merged in: computes it again and compares every bit."""
    from lrconvert import api, render

    with _progress("verify", quiet or as_json) as progress:
        inputs = [_weighted(text, allow_pickle) for text in adapters]
        report = api.verify(merged, base, inputs, dequantize=dequantize, progress=progress)
    if as_json:
        _emit({"merged": str(merged), "base": str(base), "ok": report.ok, **dataclasses.asdict(report)})
    elif not (quiet and report.ok):
        click.echo(render.verification(str(merged), report))
    if not report.ok:
        raise click.exceptions.Exit(EXIT_REFUSED)


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Keep the files in this new folder.")
def demo(output: Path | None) -> None:
    """Run the whole pipeline on the bundled model and LoRA, and print what it measures."""
    from lrconvert.demo.run import run

    run(output, click.echo)


_add_converters()
for _command in (export, _check_command(), merge_into_base, unmerge, verify, demo):
    cli.add_command(_command)
cli.add_command(merge_into_base, "merge")

if __name__ == "__main__":
    main()
