"""`validate` and `upgrade`: lrconvert files as they are."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from lrconvert.cli import flags
from lrconvert.cli.printing import emit, say
from lrconvert.core.errors import EXIT_REFUSED, printable


@flags.command(
    "validate",
    click.Argument(["files"], nargs=-1, required=True, type=flags.PATH),
    flags.base("Model folder or hub id; its names, shapes and contents are checked."),
    flags.AS_JSON,
)
def validate(files: tuple[Path, ...], base: Path | None, as_json: bool) -> None:
    """Check lrconvert files and input statistics; prints every finding and exits 1 if there is any."""
    from lrconvert.formats.lrc import validation

    if base is not None:
        from lrconvert.io import hub

        base = hub.locate(base)
    results = [validation.validate(path, base) for path in files]
    if as_json:
        emit({"ok": all(r.ok for r in results), "files": [{**dataclasses.asdict(r), "ok": r.ok} for r in results]})
    else:
        for result in results:
            for finding in result.findings:
                say(f"{printable(finding.message, 2000)} [{finding.level}]")
            if result.ok:
                facts = result.summary
                what = "inputs" if facts["method"] == "statistics" else "targets"
                size = f"{facts['targets']} {what}, {facts['bytes']:,} bytes"
                say(f"ok: {printable(str(result.path))}: {facts['method']}, {size}")
    if not all(r.ok for r in results):
        raise click.exceptions.Exit(EXIT_REFUSED)


@flags.command(
    "upgrade",
    click.Argument(["path"], metavar="FILE", type=flags.PATH),
    flags.output("The file to write."),
    flags.OVERWRITE,
)
def upgrade(path: Path, output: Path, overwrite: bool) -> None:
    """Write an lrconvert FILE in the newest version of the format."""
    from lrconvert import api

    sizes = api.upgrade(path, output, overwrite=overwrite)
    say(f"wrote {printable(str(output))}: {sizes.total:,} bytes, the update unchanged")
