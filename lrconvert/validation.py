"""Validation of lrconvert files: every finding, not the first. Loads neither torch nor transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrconvert import file, targets
from lrconvert.adapter import CompactAdapter
from lrconvert.container import open_checkpoint
from lrconvert.errors import FingerprintError, LrcError
from lrconvert.fingerprint import fingerprint

LEVELS = ("structure", "semantics", "values", "base")


@dataclass(frozen=True)
class Finding:
    """One broken rule: its level (`LEVELS`), stable code, and the line that a person reads."""

    level: str
    code: str
    message: str


@dataclass(frozen=True)
class Validation:
    """The outcome for one file. `ok` if nothing was found; `summary` has what the file is, if it could be read."""

    path: str
    findings: tuple[Finding, ...]
    summary: dict[str, Any]

    @property
    def ok(self) -> bool:
        return not self.findings


def validate(path: Path, base: Path | None = None) -> Validation:
    """Check a file against the format and, if `base` is given, against that base (names, shapes, contents)."""
    findings: list[Finding] = []

    def report(level: str, error: LrcError) -> None:
        finding = Finding(level, error.code, str(error))
        if finding not in findings:
            findings.append(finding)

    compact = file.examine(path, report)
    if compact is not None and base is not None:
        try:
            check_base(compact, base)
        except LrcError as error:
            report("base", error.at(path))
    summary = {}
    if compact is not None:
        summary = {"method": compact.method, "targets": len(compact.targets), "bytes": path.stat().st_size}
    return Validation(str(path), tuple(findings), summary)


def check_base(compact: CompactAdapter, base: Path) -> None:
    """Raise E-BASE or E-ORIENT if a target does not fit the base, E-FPR if the base has other contents."""
    with open_checkpoint(base) as checkpoint:
        resolved = targets.resolve(compact, checkpoint)
        if not compact.base.content:
            return
        found = fingerprint(resolved.targets, checkpoint)
    if found.content != compact.base.content:
        raise FingerprintError(
            f"the base {base.name!r} has other contents than the one this file was made for",
            fix="use the same revision of the base",
        )
