"""`validate` and `upgrade`: lrconvert files as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lrconvert.cli import flags
from lrconvert.cli.printing import emit, say
from lrconvert.cli.several import Place
from lrconvert.core.errors import EXIT_REFUSED, OptionError, UnknownLayoutError, printable
from lrconvert.io.remote import Url

if TYPE_CHECKING:
    from lrconvert.formats.lrc.validation import Validation


@flags.command(
    "validate",
    click.Argument(["files"], nargs=-1, required=True, type=flags.PLACE),
    flags.base("Model folder or hub id; its names, shapes and contents are checked."),
    flags.AS_JSON,
)
def validate(files: tuple[Path, ...], base: Path | None, as_json: bool) -> None:
    """Check lrconvert files and input statistics, and all in the folders that are given; prints every finding and exits
    1 if there is any. Of several it shows a table. FLEET [NAME]... checks a fleet, or members of it: findings as they
    come, with --json a line for each file and member."""
    from lrconvert.formats.fleet import names
    from lrconvert.report import checks

    first = files[0]
    if isinstance(first, Path) and names.is_fleet(first) and not any(Path(file).exists() for file in files[1:]):
        from lrconvert.cli import packing

        packing.check_fleet(files[0], [str(file) for file in files[1:]], base, as_json)
        return
    results = [_checked(path, base) for path in _inside(files)]
    ok = all(result.ok for result in results)
    if as_json:
        rows = [{**dataclasses.asdict(result), "ok": result.ok} for result in results]
        emit({"ok": ok, "files": rows, "totals": checks.validation_totals(results)})
    else:
        for result in results:
            for finding in result.findings:
                say(f"{printable(finding.message, 2000)} [{finding.level}]")
        if len(results) > 1:
            say(checks.validation_text(results))
        elif ok:
            (result,), facts = results, results[0].summary
            what = "inputs" if facts["method"] == "statistics" else "targets"
            size = f"{facts['targets']} {what}, {facts['bytes']:,} bytes"
            say(f"ok: {printable(str(result.path))}: {facts['method']}, {size}")
    if not ok:
        raise click.exceptions.Exit(EXIT_REFUSED)


def _checked(place: Place, base: Path | None) -> Validation:
    """Check one file. What is a file on this machine needs none of the ways to other places."""
    from lrconvert.formats.fleet import places
    from lrconvert.formats.lrc import validation
    from lrconvert.io import hub

    if isinstance(place, Url) or places.is_member(place):
        from lrconvert import api

        return api.validate(place, base=base)
    return validation.validate(place, None if base is None else hub.locate(base))


def _inside(sources: Sequence[Place]) -> list[Place]:
    """The files that are meant: those of ours in a folder. Raises E-LAYOUT for a folder without any."""
    from lrconvert.formats.fleet import names

    meant: list[Place] = []
    for source in sources:
        if isinstance(source, Url):
            meant.append(source)
            continue
        if names.is_fleet(source):
            raise OptionError("is a fleet, which is checked by itself", fix="leave the other files out", path=source)
        own: Sequence[Place] = _own(source) if source.is_dir() else [source]
        if not own:
            fix = "`lrconvert inspect` shows adapters of other tools"
            raise UnknownLayoutError("holds no lrconvert file and no input statistics", fix=fix, path=source)
        meant += own
    return meant


def _own(folder: Path) -> list[Path]:
    from lrconvert.formats.lrc import file
    from lrconvert.lora import statistics_file  # not loaded for what is most often validated

    every = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return [p for p in every if p.suffix == ".lrc" or file.is_lrconvert(p) or statistics_file.is_statistics(p)]


@flags.command(
    "upgrade",
    click.Argument(["path"], metavar="FILE", type=flags.PLACE),
    flags.output("The file to write."),
    flags.OVERWRITE,
)
def upgrade(path: Path, output: Path, overwrite: bool) -> None:
    """Write an lrconvert FILE in the newest version of the format."""
    from lrconvert import api

    sizes = api.upgrade(path, output, overwrite=overwrite)
    say(f"wrote {printable(str(output))}: {sizes.total:,} bytes, the update unchanged")
