"""Fleets: what became of many adapters, from the manifest of their batch alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lrconvert.cli import flags
from lrconvert.cli.printing import command_line, emit, say, warn
from lrconvert.core.errors import EXIT_REFUSED, FileReadError
from lrconvert.io.durable import check_output

if TYPE_CHECKING:
    from lrconvert.api.batch.manifest import Asked, Record
    from lrconvert.io.remote import Url
    from lrconvert.report.html import Adapter


@click.group(help="Say what became of many adapters.")
def fleet() -> None:
    """Hold the commands about manifests."""


@contextmanager
def _at_hand(manifest: Path | Url) -> Iterator[Path]:
    """Give a manifest as a file of this machine, that at a URL until the context ends."""
    if isinstance(manifest, Path):
        yield manifest
        return
    from lrconvert.io import remote

    with remote.fetched_file(os.fspath(manifest)) as path:
        if path is None:
            raise FileReadError("there is no such manifest", fix="name one", path=manifest)
        yield path


def _report(*, manifest: Path | Url, html: Path | None, verbose: bool, overwrite: bool, as_json: bool) -> None:
    """Print what became of the adapters of a batch. All is from its MANIFEST: how many are done, failed and left, their
    bytes, captured shares and time, the worst, and the failures by their code. The exit status is 1 if any failed."""
    from lrconvert.api.batch import parquet
    from lrconvert.api.batch.manifest import Manifest
    from lrconvert.report import batches as report

    if html is not None:
        check_output(html, overwrite)
    with _at_hand(manifest) as path:
        if parquet.is_parquet(path):
            lines = parquet.read(path)
        else:
            opened = Manifest(path, asks=True)
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
    from lrconvert.report.html.fleet import LEFT

    if (state := getattr(line, "state", LEFT)) == LEFT:
        return Adapter(line.source, state)
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


def _table(*, manifest: Path | Url, output: Path, overwrite: bool) -> None:
    """Write a MANIFEST as a table. It has a row for each output, with its last state: Parquet, or JSON lines, as OUTPUT
    ends in .parquet or .jsonl."""
    from lrconvert.api.batch import parquet
    from lrconvert.api.batch.manifest import Manifest

    with _at_hand(manifest) as path:
        opened = Manifest(path, asks=True)
        warn(opened.notes)
        rows = parquet.write(opened.records(), output, overwrite)
    say(f"{output}: {rows:,} rows")


_MANIFEST = click.Argument(["manifest"], metavar="MANIFEST", type=flags.PLACE)
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
