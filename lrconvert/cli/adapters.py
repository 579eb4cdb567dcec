"""Commands about adapters and the programs that load them: `export`, `check`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from lrconvert.cli import flags, several
from lrconvert.cli.printing import command_line, emit, progress_bar, say, warn
from lrconvert.core.errors import EXIT_REFUSED, LrcError, printable
from lrconvert.formats.compat import base as consumers
from lrconvert.formats.exporters import base as exporters
from lrconvert.formats.readers.shared.options import ReadOptions


@flags.command(
    "export",
    click.Argument(["adapter"], type=flags.ADAPTER),
    flags.output("The folder to write; may be left out with --push-to-hub.", required=False),
    click.Option(
        ["--to"],
        required=True,
        metavar="LAYOUT",
        help="; ".join(f"{name}: {exporters.get(name).title}" for name in exporters.ids()) + ".",
    ),
    flags.base("Base model folder or hub id, for gguf and for names; its config.json is enough.", config_only=True),
    click.Option(["--source"], type=flags.ADAPTER, help="The LoRA it came from: adds the error table to the card."),
    *flags.of(exporters.ExportOptions),
    *flags.reading(),
    flags.OVERWRITE,
    flags.QUIET,
)
def export(adapter: Path, output: Path | None, to: str, quiet: bool, overwrite: bool, **given: Any) -> None:
    """Write ADAPTER, an lrconvert file or a LoRA in any known layout, as a folder that other tools load."""
    from lrconvert import api

    options = flags.chosen(given, exporters.ExportOptions, ReadOptions)
    done = api.export(adapter, output, to=to, overwrite=overwrite, command=command_line(), **options, **given)
    warn(done.notes)
    if not quiet:
        if output is not None:
            say(f"wrote {printable(str(output))}: {', '.join(done.files)}")
        if done.url:
            say(f"uploaded to {printable(done.url)}")


@flags.command(
    "check",
    click.Argument(["adapters"], nargs=-1, required=True, type=flags.ADAPTER, metavar="ADAPTER..."),
    click.Option(
        ["--for", "consumers"],
        multiple=True,
        required=True,
        type=click.Choice([*consumers.ids(), "all"]),
        help="Who would load it; repeatable.",
    ),
    flags.base("Base model folder or hub id; its config.json is enough.", config_only=True),
    *(option for option in flags.reading() if option.name != "allow_pickle"),
    *flags.of(*(consumer.Options for consumer in consumers.chosen(["all"]))),
    flags.AS_JSON,
    help="Say what a server or library would refuse or silently get wrong in an adapter. Runs nothing, reads no "
    "weights; exits 1 if there is such a finding.",
)
def check(adapters: tuple[Path, ...], base: Path | None, as_json: bool, **given: Any) -> None:
    from lrconvert import api

    programs = consumers.chosen(given.pop("consumers"))
    options = {name: value for name, value in given.items() if value is not None}
    named = several.adapters(adapters)

    def look(path: several.Place) -> tuple[consumers.Finding, ...]:
        return api.check(path, [consumer.id for consumer in programs], base=base, **options)

    if len(named) == 1:
        ok = _show_check(named[0][0], look(named[0][1]), programs, as_json)
    else:
        with progress_bar("check", as_json) as progress:
            ok = _show_checks(several.of_each(named, look, progress), programs, as_json)
    if not ok:
        raise click.exceptions.Exit(EXIT_REFUSED)


def _is_ok(findings: Sequence[consumers.Finding]) -> bool:
    return all(finding.severity == "warns" for finding in findings)


def _show_check(
    name: str, findings: Sequence[consumers.Finding], programs: Sequence[consumers.Consumer], as_json: bool
) -> bool:
    """Print what was found in one adapter, and return whether it is well."""
    if as_json:
        emit({"path": name, "ok": _is_ok(findings), "consumers": _listed(programs), "findings": _rows(findings)})
        return _is_ok(findings)
    for consumer in programs:
        lines = [str(finding) for finding in findings if finding.consumer == consumer.id]
        say("\n".join(lines or [f"{consumer.id} {consumer.version}: nothing found"]))
    return _is_ok(findings)


def _show_checks(looked: Sequence[tuple[str, Any]], programs: Sequence[consumers.Consumer], as_json: bool) -> bool:
    """Print what was found in several adapters, and return whether all are well."""
    from lrconvert.report import checks

    errors = [error for _, error in looked if isinstance(error, LrcError)]
    checked = [(name, found.code if isinstance(found, LrcError) else found) for name, found in looked]
    ok = not errors and all(_is_ok(found) for _, found in looked)
    if as_json:
        rows = [
            {"path": name, "ok": False, **several.refusal(found)}
            if isinstance(found, LrcError)
            else {"path": name, "ok": _is_ok(found), "findings": _rows(found)}
            for name, found in looked
        ]
        totals = checks.check_totals(checked, programs)
        emit({"ok": ok, "consumers": _listed(programs), "adapters": rows, "totals": totals})
        return ok
    for error in errors:
        say(str(error), err=True)
    say(checks.check_text(checked, programs))
    return ok


def _listed(programs: Sequence[consumers.Consumer]) -> list[dict[str, str]]:
    return [{"id": c.id, "title": c.title, "version": c.version} for c in programs]


def _rows(findings: Sequence[consumers.Finding]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(finding) for finding in findings]
