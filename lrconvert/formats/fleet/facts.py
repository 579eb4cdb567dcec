"""A fleet and its members as they are listed: of each member its fields and its manifest are read, no payload."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrconvert.core.errors import LrcError
from lrconvert.formats.fleet import names
from lrconvert.formats.fleet.index import Entry
from lrconvert.formats.fleet.opened import OpenFleet
from lrconvert.formats.lrc import manifest


@dataclass(frozen=True)
class FleetMember:
    """A member of a fleet as it is listed: its `method` and how many `targets`; the bytes that it takes in the fleet,
    its share of the index among them, and that its own file has (`whole`); the sha256 of that file; what it captured of
    its LoRA, and the base model, where its file says so; the container `version` of the file that went in, which
    `Fleet.get` gives byte for byte if it was the newest; and how many tensors it shares. None of that is checked
    against the payload."""

    name: str
    method: str
    targets: int
    bytes: int
    whole: int
    digest: str
    captured: float | None
    base_model: str
    version: int
    shared: int


@dataclass(frozen=True)
class FleetSummary:
    """The place of a fleet, how many members it has, the bytes of all its files, and how many of these `gc` frees."""

    path: Path
    members: int
    bytes: int
    dead: int


def of_fleet(fleet: OpenFleet) -> FleetSummary:
    """Return what a fleet is."""
    head = fleet.head
    nbytes = (fleet.root / names.HEAD).stat().st_size + head.bytes + sum(run.bytes for run in head.runs)
    return FleetSummary(fleet.root, head.members, nbytes, head.dead)


def of_member(fleet: OpenFleet, entry: Entry) -> FleetMember:
    """Return what is known of a member. Raises what a damaged one is refused with."""
    runs = fleet.head.runs
    share = round(sum(run.bytes for run in runs) / max(1, sum(run.entries for run in runs)))
    try:
        member = fleet.member(entry)
        stated = fleet.manifest(member)
    except LrcError as error:
        raise error.at(fleet.shown(entry.key.decode(errors="replace"))) from None
    provenance: Mapping[str, Any] = stated["provenance"]
    return FleetMember(
        name=member.name,
        method=stated["method"]["id"],
        targets=manifest.count_targets(stated["targets"]),
        bytes=entry.length + share,
        whole=member.nbytes,
        digest=member.digest.hex(),
        captured=_number(provenance.get("fields", {}).get("captured", "")),
        base_model=provenance.get("base_model", ""),
        version=member.version,
        shared=len(member.references),
    )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
