"""Validation of lrconvert files and input statistics: every finding, not the first. Loads neither torch nor
transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrconvert.core.errors import FingerprintError, LrcError
from lrconvert.formats.lrc import file
from lrconvert.io.checkpoint import open_checkpoint
from lrconvert.lora.adapter import CompactAdapter
from lrconvert.methods import base as methods

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

    def __repr__(self) -> str:
        found = "valid" if self.ok else "; ".join(finding.code for finding in self.findings)
        return f"<Validation: {Path(self.path).name}, {found}>"

    @property
    def ok(self) -> bool:
        return not self.findings


def validate(path: Path, base: Path | None = None) -> Validation:
    """Check a file, of an adapter or of input statistics, against its format and, if `base` is given, against that base
    (names, shapes, contents)."""
    findings: list[Finding] = []

    def report(level: str, error: LrcError) -> None:
        finding = Finding(level, error.code, str(error))
        if finding not in findings:
            findings.append(finding)

    if not file.is_lrconvert(path):
        from lrconvert.lora import statistics_file  # not loaded for what is most often validated

        if statistics_file.is_statistics(path):
            facts = _examine_statistics(path, base, report)
            return Validation(str(path), tuple(findings), facts)
    compact = file.examine(path, report)
    if compact is not None and base is not None:
        try:
            check_base(compact, base)
        except LrcError as error:
            report("base", error.at(path))
    summary = {}
    if compact is not None:
        summary = {"method": methods.form(compact)[0], "targets": len(compact.targets), "bytes": path.stat().st_size}
    return Validation(str(path), tuple(findings), summary)


def _examine_statistics(path: Path, base: Path | None, report: Callable[[str, LrcError], None]) -> dict[str, Any]:
    """Read all of a statistics file, and compare the contents of its base."""
    from lrconvert.lora import statistics_file

    try:
        statistics = statistics_file.read(path)
    except LrcError as error:
        report("structure", error.at(path))
        return {}
    for n in range(len(statistics.inputs)):
        try:
            statistics.load(n)
        except LrcError as error:
            report("values", error)
    if base is not None and statistics.content:
        try:
            _check_content(base, statistics.content)
        except LrcError as error:
            report("base", error.at(path))
    return {"method": "statistics", "targets": len(statistics.inputs), "bytes": path.stat().st_size}


def _check_content(base: Path, content: str) -> None:
    with open_checkpoint(base, quantized=True) as checkpoint:
        if checkpoint.content_digest() == content:
            return
    raise FingerprintError(
        f"the base {base.name!r} has other contents than the one this file was made for",
        fix="use the same revision of the base",
    )


def check_base(compact: CompactAdapter, base: Path) -> None:
    """Raise E-BASE or E-ORIENT if a target does not fit the base, E-FPR if the base has other contents."""
    from lrconvert.lora import base_names

    with open_checkpoint(base, quantized=True) as checkpoint:
        base_names.resolve(compact, checkpoint)
    if compact.base.content:
        _check_content(base, compact.base.content)
