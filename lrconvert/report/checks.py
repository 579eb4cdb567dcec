"""Several adapters: the tables of `validate` and `check`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lrconvert.core.errors import printable
from lrconvert.report.tables import relative, table

if TYPE_CHECKING:
    from lrconvert.formats.compat.base import Consumer, Finding
    from lrconvert.formats.lrc.validation import Validation

    Checked = tuple[str, Sequence[Finding] | str]  # an adapter, and what was found, or the code of its refusal

_SHOWN = 3  # adapters named beside what was found in several


def validation_text(results: Sequence[Validation]) -> str:
    """Return one row for each file, and the sums."""
    rows = []
    above, names = relative([result.path for result in results])
    for name, result in zip(names, results, strict=True):
        facts = result.summary
        codes = list(dict.fromkeys(finding.code for finding in result.findings))
        found = ", ".join(codes[:2]) + (f" and {len(codes) - 2} more" if len(codes) > 2 else "")
        size = [f"{facts['targets']:,}", f"{facts['bytes']:,}"] if facts else ["-", "-"]
        rows.append([printable(name), facts.get("method", "-"), *size, found or "ok"])
    totals = validation_totals(results)
    broken = f"{totals['broken']} broken" if totals["broken"] else "all ok"
    rows.append([f"{totals['files']} files", "", "", f"{totals['bytes']:,}", broken])
    return above + table(["file", "form", "targets", "bytes", "found"], rows)


def validation_totals(results: Sequence[Validation]) -> dict[str, int]:
    """Return how many files were checked, how many are broken, and their bytes."""
    return {
        "files": len(results),
        "broken": sum(not result.ok for result in results),
        "bytes": sum(result.summary.get("bytes", 0) for result in results),
    }


_WORST = ("refuses", "wrong", "warns")


def check_text(checked: Sequence[Checked], programs: Sequence[Consumer]) -> str:
    """Return every finding once with the adapters that it is of, and then one row for each adapter."""
    above, names = relative([name for name, _ in checked])
    named = list(zip(names, (findings for _, findings in checked), strict=True))
    grouped: dict[tuple[str, str, str], list[tuple[str, Finding]]] = {}
    for name, findings in named:
        for finding in findings if not isinstance(findings, str) else ():
            grouped.setdefault((finding.consumer, finding.severity, finding.rule), []).append((name, finding))
    lines = [_finding(members) for members in grouped.values()]
    lines += [""] if lines else []
    lines.append(f"by the source of {', '.join(f'{p.id} {p.version}' for p in programs)}")
    head = ["adapter", *(program.id for program in programs)]
    rows = [[printable(name), *_cells(findings, programs)] for name, findings in named]
    totals = check_totals(checked, programs)
    end = [f"{len(checked)} adapters", *(f"{totals[program.id]} of {len(checked)} ok" for program in programs)]
    return "\n".join([*lines, above + table(head, [*rows, end])])


def _finding(members: Sequence[tuple[str, Finding]]) -> str:
    names = list(dict.fromkeys(printable(name) for name, _ in members))
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{members[0][1]} In {', '.join(names[:_SHOWN])}{more}."


def _cells(findings: Sequence[Finding] | str, programs: Sequence[Consumer]) -> list[str]:
    """The worst that each program would do, and how many things were found."""
    if isinstance(findings, str):
        return [findings for _ in programs]
    cells = []
    for program in programs:
        own = [finding.severity for finding in findings if finding.consumer == program.id]
        worst = next((severity for severity in _WORST if severity in own), None)
        cells.append("ok" if worst is None else worst if len(own) == 1 else f"{worst} ({len(own)})")
    return cells


def check_totals(checked: Sequence[Checked], programs: Sequence[Consumer]) -> dict[str, int]:
    """Return how many adapters were checked, could not be read, and are well for each program."""
    totals = {"adapters": len(checked), "refused": sum(isinstance(findings, str) for _, findings in checked)}
    for program in programs:
        totals[program.id] = sum(
            not any(f.consumer == program.id and f.severity != "warns" for f in findings)
            for _, findings in checked
            if not isinstance(findings, str)
        )
    return totals
