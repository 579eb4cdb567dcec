"""Fleets: what became of many adapters, from the manifest of their batch alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lrconvert.cli import flags
from lrconvert.cli.printing import command_line, emit, say, warn
from lrconvert.core.errors import EXIT_REFUSED
from lrconvert.io.durable import check_output

if TYPE_CHECKING:
    from lrconvert.api.batch.manifest import Asked, Record
    from lrconvert.report.html import Adapter


@click.group(help="Say what became of many adapters.")
def fleet() -> None:
    """Hold the commands about manifests."""


def _report(*, manifest: Path, html: Path | None, verbose: bool, overwrite: bool, as_json: bool) -> None:
    """Print what became of the adapters of a batch. All is from its MANIFEST: how many are done, failed and left, their
    bytes, captured shares and time, the worst, and the failures by their code. The exit status is 1 if any failed."""
    from lrconvert.api.batch import parquet
    from lrconvert.api.batch.manifest import Manifest
    from lrconvert.report import batches as report

    if html is not None:
        check_output(html, overwrite)
    if parquet.is_parquet(manifest):
        lines = parquet.read(manifest)
    else:
        opened = Manifest(manifest, asks=True)
        warn(opened.notes)
        lines = list(opened.records())
    summary = report.summary(lines)
    if html is not None:
        _write_page(html, lines, overwrite)
    if as_json:
        emit(report.fleet_json(summary, lines))
    else:
        say(report.fleet_text(summary, lines, verbose))
    if summary.failed:
        raise click.exceptions.Exit(EXIT_REFUSED)


def _write_page(path: Path, lines: list[Record | Asked], overwrite: bool) -> None:
    from lrconvert.cli import pages
    from lrconvert.report.html import fleet_page

    title = f"{len(lines):,} adapter{'' if len(lines) == 1 else 's'} made smaller"
    text = fleet_page(title, [_row(line) for line in lines], command_line(), pages.versions(torch=False))
    pages.write_page(path, text, overwrite)


def _row(line: Any) -> Adapter:
    from lrconvert.report.html import Adapter

    state = getattr(line, "state", "left")
    if state == "left":
        return Adapter(line.source, state, failure="not done yet")
    return Adapter(
        line.source,
        state,
        line.method,
        line.adapter_bytes,
        line.ratio,
        line.captured,
        dropped=line.dropped,
        verdict=line.verdict,
        failure=line.message,
    )


def _table(*, manifest: Path, output: Path, overwrite: bool) -> None:
    """Write a MANIFEST as a table. It has a row for each output, with its last state: Parquet, or JSON lines, as OUTPUT
    ends in .parquet or .jsonl."""
    from lrconvert.api.batch import parquet
    from lrconvert.api.batch.manifest import Manifest

    opened = Manifest(manifest, asks=True)
    warn(opened.notes)
    rows = parquet.write(opened.records(), output, overwrite)
    say(f"{output}: {rows:,} rows")


_MANIFEST = click.Argument(["manifest"], metavar="MANIFEST", type=flags.PATH)
fleet.add_command(
    flags.command(
        "report",
        _MANIFEST,
        click.Option(["--html"], type=flags.PATH, help="Write an HTML page, too."),
        click.Option(["-v", "--verbose"], is_flag=True, help="Every adapter and every failure."),
        flags.OVERWRITE,
        flags.AS_JSON,
    )(_report)
)
fleet.add_command(
    flags.command("table", _MANIFEST, flags.output("The table to write.", is_local=True), flags.OVERWRITE)(_table)
)
