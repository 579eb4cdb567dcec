"""Merges, and how they are undone and verified: what `merge`, `unmerge`, `recover` and `verify` print."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lrconvert.core.errors import printable
from lrconvert.report.tables import count_bytes, picked, table

if TYPE_CHECKING:
    from lrconvert.merge import MergeReport, Recovery, UnmergeReport, VerifyReport

_ROWS = 12  # differences shown


def merge_json(report: MergeReport) -> dict[str, Any]:
    """Return what a merge did to each tensor and file, and what undoes it."""
    return {
        "dry_run": report.dry_run,
        "tensors": [
            {
                "name": t.name,
                "dtype": t.dtype,
                "shape": list(t.shape),
                "updates": t.updates,
                **picked(t.stats, "elements", "changed", "unmoved"),
                "max_rounding_error": t.stats.max_error,
                "mean_rounding_error": t.stats.mean_error,
            }
            for t in report.tensors
        ],
        "placed": list(report.placed),
        "added": list(report.added),
        "dropped": list(report.dropped),
        "config": dict(report.config),
        "files": [{"name": name, "bytes": size} for name, size in report.files],
        "left_out": list(report.left_out),
        **picked(report, "touched_bytes", "record", "record_bytes", "can_undo", "already_done"),
        "warnings": list(report.warnings),
    }


def merge_text(output: str, report: MergeReport, verbose: bool) -> str:
    """Return what a merge did as text."""
    if report.already_done:
        return (
            f"{printable(output)} holds this merge already ({report.record}): nothing was changed\n"
            "again     merges the same once more: --again"
        )
    total = report.stats
    done = "would write" if report.dry_run else "wrote"
    lines = [f"{done} {printable(output)}: {len(report.files)} files, {count_bytes(report.total_bytes)}"]
    lines.append(f"{len(report.tensors)} tensors merged, {total.elements:,} weights, one correct rounding each")
    if not report.dry_run and total.elements:
        lines.append(
            f"changed   {total.changed:,} weights; {total.unmoved:,} have an update below half a step and did not move"
        )
        lines.append(
            f"rounding  at most {total.max_error:.3g}, on average {total.mean_error:.3g} from the exact result"
        )
    if report.record:
        share = 100 * report.record_bytes / max(1, report.touched_bytes)
        size = f"{count_bytes(report.record_bytes)}, {share:.1f} % of the merged bytes"
        how = "undoes the merge bit for bit" if report.can_undo else "has digests only; undoing needs the base itself"
        lines.append(f"record    {size}: {how}")
    for what, names in (("replaced", report.placed), ("added", report.added), ("removed", report.dropped)):
        if names:
            lines.append(f"{what.ljust(9)} {', '.join(map(printable, names))}")
    if report.config:
        lines.append(f"config    {', '.join(sorted(report.config))} changed")
    if report.left_out:
        lines.append(f"left out  {', '.join(map(printable, report.left_out))}: weights of the unmerged base")
    if verbose:
        rows = [
            [
                *(printable(t.name), t.dtype, f"{t.stats.changed:,}", f"{t.stats.unmoved:,}"),
                *(f"{t.stats.max_error:.3g}", f"{t.stats.mean_error:.3g}"),
            ]
            for t in report.tensors
        ]
        lines += ["", table(["tensor", "dtype", "changed", "did not move", "rounding error", "mean"], rows)]
    return "\n".join(lines)


def unmerge_text(output: str, report: UnmergeReport) -> str:
    """Return what undoing a merge did as text."""
    if report.already_done:
        lines = [f"{printable(output)}: {report.record or 'the merge'} is undone already, nothing was changed"]
        if report.remaining:
            lines.append(f"merges    {report.remaining} are left; undo the last of them: --merge {report.remaining}")
        return "\n".join(lines)
    lines = [f"wrote {printable(output)}: {len(report.files)} files, {count_bytes(report.total_bytes)}"]
    if report.restored:
        lines.append(f"restored  {len(report.restored)} tensors")
    if report.removed:
        lines.append(f"removed   {', '.join(map(printable, report.removed))}")
    lines.append(
        "verified  every tensor has the digest that it had before the merge"
        if report.verified
        else "verified  nothing: there is no record to compare with"
    )
    if report.remaining:
        lines.append(f"remaining {report.remaining} earlier merge{'s' if report.remaining > 1 else ''}")
    return "\n".join(lines)


def recovery_text(recovered: Recovery) -> str:
    """Return what was done about a merge that was broken off."""
    state = {
        "clean": "holds nothing that was broken off",
        "old": "is as it was before: what was broken off is taken back",
        "new": "is done: what was broken off is finished",
    }[recovered.state]
    lines = [f"{printable(recovered.path)} {state}"]
    if recovered.removed:
        lines.append(f"removed   {', '.join(map(printable, recovered.removed))}")
    for name in recovered.unfinished:
        lines.append(f"unfinished work is in {printable(name)}: the same command with --resume goes on; or delete it")
    return "\n".join(lines)


def verification_text(merged: str, report: VerifyReport) -> str:
    """Return whether a model is the merge it should be, and where it differs."""
    if report.ok:
        size = f"{report.tensors} tensors, {count_bytes(report.nbytes)}, {report.recomputed} of them computed again"
        return f"{printable(merged)} is the merge, bit for bit: {size}"
    lines = [f"{printable(merged)} is not the merge: {len(report.differences)} differences"]
    shown = report.differences[:_ROWS]
    lines += [f"  {printable(d.name)} {printable(d.what)}" for d in shown]
    if len(shown) < len(report.differences):
        lines.append(f"  ... and {len(report.differences) - len(shown)} more")
    lines += [f"note      {printable(report.hint, 1000)}"] if report.hint else []
    return "\n".join(lines)
