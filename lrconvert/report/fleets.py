"""Fleets as `pack` prints them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lrconvert.core.errors import printable
from lrconvert.formats.lrc.one_tensor import VERSION
from lrconvert.report.tables import counted, fact, picked, share, table

if TYPE_CHECKING:
    from lrconvert.formats.fleet.facts import FleetMember, FleetSummary
    from lrconvert.formats.fleet.writing import Taken

_DIGITS = 12  # of a digest in a table


def fleet_json(fleet: FleetSummary) -> dict[str, Any]:
    """Return what a fleet is as a JSON value."""
    return {"fleet": str(fleet.path), **picked(fleet, "members", "bytes", "dead")}


def fleet_text(fleet: FleetSummary) -> str:
    """Return what a fleet is as text."""
    count = fleet.members
    each = f", {fleet.bytes / count:,.0f} each" if count else ""
    dead = f"; {fleet.dead:,} of them are dead, `lrconvert pack gc` frees them" if fleet.dead else ""
    return f"{printable(str(fleet.path))}: {counted(count)}, {fleet.bytes:,} bytes{each}{dead}"


def members_text(fleet: FleetSummary, members: Sequence[FleetMember]) -> str:
    """Return one row for each member, and the sums."""
    rows = [
        [printable(m.name), m.method, m.targets, f"{m.bytes:,}", f"{m.whole:,}", share(m.captured), m.digest[:_DIGITS]]
        for m in members
    ]
    total = f"{sum(m.bytes for m in members):,}", f"{sum(m.whole for m in members):,}"
    rows.append([counted(len(members)), "", "", *total, "", ""])
    head = ["member", "method", "targets", "bytes", "as a file", "captured", "sha256"]
    return f"{table(head, rows)}\n{fleet_text(fleet)}"


def member_text(fleet: FleetSummary, member: FleetMember) -> str:
    """Return all that is known of a member."""
    lines = [
        printable(f"{fleet.path}#{member.name}"),
        fact("form", f"{member.method}, {member.targets} targets"),
        fact("bytes", f"{member.bytes:,} in the fleet, {member.whole:,} as a file of its own"),
        fact("shared", f"{member.shared} tensors with other members" if member.shared else "no tensor"),
        fact("captured", f"{share(member.captured)} of the update's energy" if member.captured is not None else "-"),
        fact("base", printable(member.base_model) or "not recorded"),
        fact("sha256", member.digest),
        fact("file", origin(member)),
    ]
    return "\n".join(lines)


def origin(member: FleetMember) -> str:
    """Return what the file that `get` gives is to the one that went in."""
    if member.version == VERSION:
        return "byte for byte the one that went in"
    return f"upgraded from container version {member.version}, with the same factors"


def added_text(taken: Sequence[Taken]) -> str:
    """Return what became of each adapter that was given."""
    rows = [[printable(t.name), f"{t.nbytes:,}", f"{t.whole:,}", t.state] for t in taken]
    return table(["member", "bytes", "as a file", "state"], rows)
