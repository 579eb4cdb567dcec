"""`pack`: fleets, many compact adapters in one folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from lrconvert.cli import flags
from lrconvert.cli.printing import emit, emit_line, progress_bar, say
from lrconvert.core.errors import EXIT_REFUSED, LrcError, printable
from lrconvert.formats.fleet.names import MARK
from lrconvert.report.tables import counted

_FLEET = click.Argument(["fleet"], type=flags.PATH, metavar="FLEET")
_ADAPTERS = click.Argument(["adapters"], nargs=-1, required=True, type=flags.ADAPTER, metavar="ADAPTERS...")
_SHARE = click.Option(
    ["--share"],
    multiple=True,
    metavar="TENSOR",
    help="Store this payload tensor once even if a single adapter has it. What two have is shared anyway. Repeatable.",
)
_NAME = click.Option(["--name"], help="The name of the member, of a single adapter.  [default: that of its file]")


class _InOrder(click.Group):
    """Commands in the order of a user's work."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group("pack", cls=_InOrder)
def pack() -> None:
    """Keep many compact adapters in one folder, a fleet: what they have in common lies once, and each costs its payload
    and at most 256 bytes. Every other command takes a member as FLEET#NAME; `lrconvert validate FLEET` checks all."""


def _command(name: str, *params: click.Parameter) -> Callable[[Callable[..., None]], click.Command]:
    def made(callback: Callable[..., None]) -> click.Command:
        command = flags.command(name, *params)(callback)
        pack.add_command(command)
        return command

    return made


@_command(
    "build",
    _ADAPTERS,
    flags.output("The folder of the fleet, which is written whole or not at all."),
    _NAME,
    _SHARE,
    flags.OVERWRITE,
    flags.AS_JSON,
    flags.QUIET,
)
def build(output: Path, adapters: Sequence[Path], as_json: bool, quiet: bool, **given: Any) -> None:
    """Make a fleet of ADAPTERS: lrconvert files, folders of them, other fleets, or FLEET#NAME."""
    from lrconvert.api.fleets import Fleet
    from lrconvert.report import fleets

    members = _named(adapters, given.pop("name"))
    with progress_bar("pack", as_json or quiet) as progress:
        fleet = Fleet.build(output, members, progress=progress, **given)
    with fleet:
        if as_json:
            emit(fleets.fleet_json(fleet.summary))
        elif not quiet:
            say(f"wrote {fleets.fleet_text(fleet.summary)}")


@_command("add", _FLEET, _ADAPTERS, _NAME, _SHARE, flags.OVERWRITE, flags.AS_JSON, flags.QUIET)
def add(fleet: Path, adapters: Sequence[Path], as_json: bool, quiet: bool, **given: Any) -> None:
    """Add ADAPTERS to FLEET, all or none; what is there keeps every byte. One that is there already is left."""
    from lrconvert.api.fleets import Fleet
    from lrconvert.report import fleets

    members = _named(adapters, given.pop("name"))
    with Fleet(fleet) as opened, progress_bar("pack", as_json or quiet) as progress:
        taken = opened.add(members, progress=progress, **given)
        if as_json:
            emit({"added": [dataclasses.asdict(one) for one in taken], **fleets.fleet_json(opened.summary)})
        elif not quiet:
            say(fleets.added_text(taken))


def _named(adapters: Sequence[Path], name: str | None) -> Any:
    if name is None:
        return list(adapters)
    if len(adapters) != 1:
        raise click.UsageError("--name is for a single adapter; others are named as their files")
    return {name: adapters[0]}


@_command(
    "list",
    _FLEET,
    click.Argument(["names"], nargs=-1, metavar="[NAME]..."),
    click.Option(["--prefix"], default="", help="Only members whose names begin so, such as team/."),
    flags.AS_JSON,
)
def list_members(fleet: Path, names: Sequence[str], prefix: str, as_json: bool) -> None:
    """Show the members of FLEET, or all that is known of those that are named: bytes in the fleet and of a file of
    their own, form, what they captured, digest."""
    from lrconvert.api.fleets import Fleet
    from lrconvert.report import fleets

    with Fleet(fleet) as opened:
        damaged: list[LrcError] = []
        members = [opened.member(name) for name in names] or list(opened.members(prefix, damaged.append))
        if as_json:
            emit({**fleets.fleet_json(opened.summary), "listed": [dataclasses.asdict(member) for member in members]})
        elif names:
            say("\n\n".join(fleets.member_text(opened.summary, member) for member in members))
        else:
            say(fleets.members_text(opened.summary, members))
    for error in damaged:
        say(str(error), err=True)
    if damaged:
        raise click.exceptions.Exit(EXIT_REFUSED)


@_command(
    "get",
    _FLEET,
    click.Argument(["name"]),
    flags.output("The file to write.  [default: NAME.lrc here]", required=False),
    flags.OVERWRITE,
    flags.QUIET,
)
def get(fleet: Path, name: str, output: Path | None, overwrite: bool, quiet: bool) -> None:
    """Write the member NAME of FLEET as a file of its own: the bytes that went in, or of a file of an older container
    version the same factors in the newest."""
    from lrconvert.api.fleets import Fleet
    from lrconvert.report import fleets

    with Fleet(fleet) as opened:
        member = opened.member(name)
        target = output if output is not None else Path(f"{name.rpartition('/')[2]}.lrc")
        opened.get(name, target, overwrite=overwrite)
        if not quiet:
            say(f"wrote {printable(str(target))}: {member.whole:,} bytes, {fleets.origin(member)}")


@_command("remove", _FLEET, click.Argument(["names"], nargs=-1, required=True, metavar="NAME..."), flags.QUIET)
def remove(fleet: Path, names: Sequence[str], quiet: bool) -> None:
    """Remove members of FLEET, all or none. `pack gc` frees their bytes."""
    from lrconvert.api.fleets import Fleet

    with Fleet(fleet) as opened:
        nbytes = opened.remove(*names)
        if not quiet:
            left = f"{counted(len(opened))} left; `lrconvert pack gc` frees {opened.dead:,} bytes"
            say(f"removed {counted(len(set(names)))} of {nbytes:,} bytes, {left}")


@_command("gc", _FLEET, flags.QUIET)
def gc(fleet: Path, quiet: bool) -> None:
    """Write FLEET anew without what was removed or replaced, and without shared parts that nothing needs."""
    from lrconvert.api.fleets import Fleet

    with Fleet(fleet) as opened:
        done = opened.gc()
        if not quiet:
            say(f"{printable(str(fleet))}: {counted(len(opened))}, {done.before:,} bytes before, {done.after:,} now")


@_command("reindex", _FLEET, flags.QUIET)
def reindex(fleet: Path, quiet: bool) -> None:
    """Make the index of FLEET anew from its data, where `validate` found it damaged."""
    from lrconvert.formats.fleet import writing

    count = writing.reindex(fleet)
    if not quiet:
        say(f"{printable(str(fleet))}: {counted(count)}")


def check_fleet(fleet: Path, names: Sequence[str], base: Path | None, as_json: bool) -> None:
    """Print what is found in a fleet, or in the members that are named, as it comes; exit 1 if there is any."""
    from lrconvert.api.fleets import Fleet

    with Fleet(fleet) as opened:
        checked = refused = 0
        for result in opened.validate(*names, base=base):
            is_member = MARK in result.path.removeprefix(str(fleet))
            checked, refused = checked + is_member, refused + (not result.ok)
            if as_json:
                emit_line({**dataclasses.asdict(result), "ok": result.ok})
                continue
            for finding in result.findings:
                say(f"{printable(finding.message, 2000)} [{finding.level}]")
    if refused:
        if not as_json:
            say(f"{refused} of the fleet's files and members are refused", err=True)
        raise click.exceptions.Exit(EXIT_REFUSED)
    if not as_json:
        say(f"ok: {printable(str(fleet))}: {counted(checked)}")
