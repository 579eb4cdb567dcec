"""Commands about adapters and the programs that load them: `export`, `check`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from lrconvert.cli import flags
from lrconvert.cli.printing import command_line, emit, say, warn
from lrconvert.core.errors import EXIT_REFUSED, printable
from lrconvert.formats.compat import base as consumers
from lrconvert.formats.exporters import base as exporters
from lrconvert.formats.readers.shared.options import ReadOptions


@flags.command(
    "export",
    click.Argument(["file"], type=flags.PATH),
    flags.output("The folder to write."),
    click.Option(
        ["--to"],
        required=True,
        metavar="LAYOUT",
        help="; ".join(f"{name}: {exporters.get(name).title}" for name in exporters.ids()) + ".",
    ),
    flags.base("Base model folder or hub id, for gguf and the names of --source; its config.json is enough."),
    click.Option(["--source"], type=flags.PATH, help="The LoRA it came from: adds the error table to the card."),
    *flags.of(exporters.ExportOptions),
    *flags.reading(),
    flags.OVERWRITE,
    flags.QUIET,
)
def export(file: Path, output: Path, to: str, quiet: bool, overwrite: bool, **given: Any) -> None:
    """Write an lrconvert FILE as a folder that other tools load."""
    from lrconvert import api

    options = flags.chosen(given, exporters.ExportOptions, ReadOptions)
    done = api.export(file, output, to=to, overwrite=overwrite, command=command_line(), **options, **given)
    warn(done.notes)
    if not quiet:
        say(f"wrote {printable(str(output))}: {', '.join(done.files)}")


@flags.command(
    "check",
    click.Argument(["path"], type=flags.PATH),
    click.Option(
        ["--for", "consumers"],
        multiple=True,
        required=True,
        type=click.Choice([*consumers.ids(), "all"]),
        help="Who would load it; repeatable.",
    ),
    flags.base("Base model folder or hub id; its config.json is enough."),
    *(option for option in flags.reading() if option.name != "allow_pickle"),
    *flags.of(*(consumer.Options for consumer in consumers.chosen(["all"]))),
    flags.AS_JSON,
    help="Say what a server or library would refuse or silently get wrong in an adapter. Runs nothing, reads no "
    "weights; exits 1 if there is such a finding.",
)
def check(path: Path, base: Path | None, as_json: bool, **given: Any) -> None:
    from lrconvert import api

    programs = consumers.chosen(given.pop("consumers"))
    options = {name: value for name, value in given.items() if value is not None}
    findings = api.check(path, [consumer.id for consumer in programs], base=base, **options)
    ok = all(finding.severity == "warns" for finding in findings)
    if as_json:
        named = [{"id": c.id, "title": c.title, "version": c.version} for c in programs]
        rows = [dataclasses.asdict(finding) for finding in findings]
        emit({"path": str(path), "ok": ok, "consumers": named, "findings": rows})
    else:
        for consumer in programs:
            lines = [str(finding) for finding in findings if finding.consumer == consumer.id]
            say("\n".join(lines or [f"{consumer.id} {consumer.version}: nothing found"]))
    if not ok:
        raise click.exceptions.Exit(EXIT_REFUSED)
