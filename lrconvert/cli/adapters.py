"""Commands that look at adapters and files, and that write files for others."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from lrconvert.cli.converting import method_options
from lrconvert.cli.shared import (
    as_json_option,
    command_line,
    emit,
    layout_options,
    overwrite_option,
    quiet_option,
    source_argument,
    takes_adapters,
    warn,
)
from lrconvert.core.errors import EXIT_REFUSED, printable


@click.command()
@source_argument
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    help="Base model folder or hub id: for layouts that do not say shapes, or spell names in their own way.",
)
@takes_adapters
@as_json_option
def inspect(source: Path, base: Path | None, as_json: bool, **reading: Any) -> None:
    """Show what an adapter is: targets, ranks, spectrum, bytes. Any LoRA layout, lrconvert files, statistics."""
    from lrconvert import api
    from lrconvert.report import text_and_json

    found = api.inspect(source, base=base, **reading)
    if as_json:
        emit({"path": str(source), **found})
        return
    click.echo(text_and_json.inspection(str(source), found))
    warn(found["warnings"])


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    help="Model folder or hub id; its names, shapes and contents are checked.",
)
@as_json_option
def validate(files: tuple[Path, ...], base: Path | None, as_json: bool) -> None:
    """Check lrconvert files and input statistics; prints every finding and exits 1 if there is any."""
    from lrconvert import api

    results = [api.validate(path, base=base) for path in files]
    if as_json:
        emit({"ok": all(r.ok for r in results), "files": [{**dataclasses.asdict(r), "ok": r.ok} for r in results]})
    else:
        for result in results:
            for finding in result.findings:
                click.echo(f"{finding.message} [{finding.level}]")
            if result.ok:
                facts = result.summary
                what = "inputs" if facts["method"] == "statistics" else "targets"
                click.echo(f"ok: {result.path}: {facts['method']}, {facts['targets']} {what}, {facts['bytes']:,} bytes")
    if not all(r.ok for r in results):
        raise click.exceptions.Exit(EXIT_REFUSED)


@click.command()
@click.argument("path", metavar="FILE", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The file to write.")
@overwrite_option
def upgrade(path: Path, output: Path, overwrite: bool) -> None:
    """Write an lrconvert FILE in the newest version of the format."""
    from lrconvert import api

    sizes = api.upgrade(path, output, overwrite=overwrite)
    click.echo(f"wrote {printable(str(output))}: {sizes.total:,} bytes, the update unchanged")


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@click.option("--to", required=True, help="peft-lora, peft-vblora, peft-miss, kohya, diffusers, mlx, gguf or raw.")
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    help="Base model folder or hub id, for gguf and the names of --source; its config.json is enough.",
)
@click.option("--base-model-id", help="How the output names the base: org/name, or org/name@revision.")
@click.option(
    "--source", type=click.Path(path_type=Path), help="The LoRA it came from: adds the error table to the card."
)
@click.option("--keep-ranks", is_flag=True, help="Write rank_pattern and alpha_pattern instead of one padded rank.")
@click.option(
    "--pad-rank",
    type=click.IntRange(1),
    help="Pad with zeros to this rank; without it to the largest. vLLM's --max-lora-rank has few values.",
)
@click.option(
    "--dtype", type=click.Choice(["F32", "F16", "BF16"]), default="F32", show_default=True, help="Of the factors."
)
@takes_adapters
@overwrite_option
@quiet_option
def export(
    file: Path,
    output: Path,
    to: str,
    base: Path | None,
    base_model_id: str | None,
    source: Path | None,
    keep_ranks: bool,
    pad_rank: int | None,
    dtype: str,
    overwrite: bool,
    quiet: bool,
    **reading: Any,
) -> None:
    """Write an lrconvert FILE as a folder that other tools load."""
    from lrconvert import api

    done = api.export(
        file,
        output,
        to=to,
        source=source,
        base=base,
        base_model_id=base_model_id,
        keep_ranks=keep_ranks,
        pad_rank=pad_rank,
        dtype=dtype,
        overwrite=overwrite,
        command=command_line(),
        **reading,
    )
    warn(done.notes)
    if not quiet:
        click.echo(f"wrote {output}: {', '.join(done.files)}")


def _check(path: Path, consumers: tuple[str, ...], base: Path | None, as_json: bool, **given: Any) -> None:
    from lrconvert import api
    from lrconvert.formats.compat import base as known

    options = {name: value for name, value in given.items() if value is not None}
    findings = api.check(path, consumers, base=base, **options)
    ok = all(finding.severity == "warns" for finding in findings)
    used = known.chosen(consumers)
    if as_json:
        looked = [{"id": c.id, "title": c.title, "version": c.version} for c in used]
        emit(
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


def check_command() -> click.Command:
    """The command `check`: its choices and options are those of the consumers."""
    from lrconvert.formats.compat import base as known

    path = click.Path(path_type=Path)
    own = {o.name: o for c in known.chosen(["all"]) for o in method_options(c.Options, {})}
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
            *layout_options(),
            *own.values(),
            click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object instead of text."),
        ],
        callback=_check,
        help="Say what a server or library would refuse or silently get wrong in an adapter. Runs nothing, reads no "
        "weights; exits 1 if there is such a finding.",
        short_help="Say what a server would refuse or get wrong in an adapter.",
    )
