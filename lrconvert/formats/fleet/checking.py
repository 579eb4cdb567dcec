"""Every damage of a fleet, each with what it concerns: its files, and every member against the format of its file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from lrconvert.core import errors
from lrconvert.core.errors import LrcError
from lrconvert.formats.fleet import head as heads
from lrconvert.formats.fleet.index import Entry
from lrconvert.formats.fleet.names import HEAD
from lrconvert.formats.fleet.opened import OpenFleet
from lrconvert.formats.fleet.records import MEMBER, REMOVAL
from lrconvert.formats.fleet.scanning import scan
from lrconvert.formats.lrc import file
from lrconvert.formats.lrc.validation import Finding, Validation, check_base
from lrconvert.methods import base as methods


def check_all(root: Path, base: Path | None = None) -> Iterator[Validation]:
    """Yield what is found in each file of a fleet, then in each member, one after the other. Raises what opening the
    fleet raises."""
    with OpenFleet(root) as fleet:
        yield from _files(fleet)
        count = 0
        try:
            for entry in fleet.entries():
                count += 1
                yield check_member(fleet, entry, base)
        except LrcError as error:
            yield _validation(root, [Finding("structure", error.code, f"no members behind this can be told: {error}")])
            return
        if count != fleet.head.members:
            what = f"states {fleet.head.members} members, its index has {count}"
            yield _validation(root / HEAD, [_finding(errors.CoverageError(what, path=root / HEAD))])


def check_member(fleet: OpenFleet, entry: Entry, base: Path | None = None) -> Validation:
    """Return what is found in one member: its record, what it shares, and its file by every rule of that."""
    name = entry.key.decode(errors="replace")
    shown = fleet.shown(name)
    findings: list[Finding] = []

    def report(level: str, error: LrcError) -> None:
        findings.append(Finding(level, error.code, str(error.at(shown))))

    try:
        data = fleet.file_bytes(entry)
    except LrcError as error:
        report("structure", error)
        return _validation(shown, findings)
    compact = file.examine_bytes(data, shown, report)
    if compact is None:
        return _validation(shown, findings)
    if base is not None:
        _attempt(lambda: check_base(compact, base), "base", report)
    facts = {"method": methods.form(compact)[0], "targets": len(compact.targets), "bytes": len(data)}
    return Validation(str(shown), tuple(findings), facts)


def _files(fleet: OpenFleet) -> Iterator[Validation]:
    """Return what is found in the runs of the index, and in the data file."""
    for tree in fleet.trees:
        path = fleet.root / heads.index_name(tree.run)
        found = [item for item in tree.check() if isinstance(item, LrcError)]
        yield _validation(path, [_finding(error.at(path)) for error in found])
    path = fleet.root / fleet.head.data_name
    findings = []
    total = 0
    for record in scan(path, fleet.head.bytes):
        total += record.entry.length if record.kind in (MEMBER, REMOVAL) else 0
        error = record.error or _misplaced(fleet, record.kind, record.entry)
        if error is not None:
            findings.append(_finding(error.at(path)))
    if not findings:
        try:
            live = sum(entry.length for entry in fleet.entries())
        except LrcError:
            live = total - fleet.head.dead  # the index has findings of its own
        if total - live != fleet.head.dead:
            what = f"states {fleet.head.dead} dead bytes, there are {total - live}"
            findings.append(_finding(errors.CoverageError(what, path=fleet.root / HEAD)))
    yield _validation(path, findings)


def _misplaced(fleet: OpenFleet, kind: int, entry: Entry) -> LrcError | None:
    """The error of a record that members share and the index does not know by its digest."""
    if kind in (MEMBER, REMOVAL):
        return None
    try:
        known = fleet.find(entry.key)
    except LrcError:
        return None  # the index has findings of its own
    if known is None:
        return errors.DigestError(f"what members share at byte {entry.offset} is not in the index")
    return None


def _attempt(step: Callable[[], object], level: str, report: Callable[[str, LrcError], None]) -> None:
    try:
        step()
    except LrcError as error:
        report(level, error)


def _finding(error: LrcError) -> Finding:
    return Finding("structure", error.code, str(error))


def _validation(path: Path, findings: list[Finding]) -> Validation:
    return Validation(str(path), tuple(findings), {})
