"""Extractions: what `extract` prints."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from lrconvert.core.errors import printable
from lrconvert.report.conversion import conversion_json, size_line
from lrconvert.report.tables import count_bytes, percent, share, span, table

if TYPE_CHECKING:
    from lrconvert.convert.extract.extract import ExtractedTarget, Extraction

_ROUNDED = 0.001  # a share of rounding that is worth a line
_NAMES = 3


def extraction_json(done: Extraction) -> dict[str, Any]:
    """Return an extraction with its errors, in all and of each target."""
    value: dict[str, Any] = {
        "dry_run": done.lora is None,
        "targets": [_row(target, done) for target in done.targets],
        "carried": [{"name": e.name, "use": e.use, "dtype": e.dtype, "shape": list(e.shape)} for e in done.carried],
        "unchanged": done.unchanged,
        "tied": list(done.tied),
        "absent": list(done.absent),
        "left_out": list(done.left_out),
        "read_bytes": done.read_bytes,
        "factor_bytes": done.factor_bytes,
        "warnings": list(done.warnings),
    }
    if done.lora is not None:
        value |= {
            "captured": done.captured,
            "relative_error": done.relative_error,
            "rounding": done.rounding,
        }
    if done.conversion is not None:
        value["conversion"] = conversion_json(done.conversion)
    return value


def _row(row: ExtractedTarget, done: Extraction) -> dict[str, Any]:
    out, inner = row.target.matrix_shape
    value: dict[str, Any] = {"name": row.target.name, "view": row.target.view.text, "out": out, "in": inner}
    value["rank"] = row.rank
    if done.lora is not None:
        value |= {"energy": row.energy, "relative_error": row.relative_error, "above_rounding": row.above}
        value["rounding"] = row.rounding / row.energy
    return value


def extraction_text(sources: tuple[str, str], output: str | None, done: Extraction, verbose: bool) -> str:
    """Return an extraction as text; `sources` are the fine-tuned model and its base, `output` is None after a dry
    run."""
    tuned, base = map(printable, sources)
    lines = [f"{tuned} - {base} -> {printable(output) if output else '(dry run, nothing written)'}"]
    lines.append(f"read      {count_bytes(done.read_bytes)} of both models; {_equal(done)}")
    ranks = span(row.rank for row in done.targets) if done.targets else "0"
    most = "at most " if done.lora is None else ""
    lines.append(f"LoRA      {len(done.targets)} modules, rank {most}{ranks}, {most}{count_bytes(done.factor_bytes)}")
    if done.carried:
        names = list(dict.fromkeys(printable(extra.name) for extra in done.carried))
        more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
        what = "to compare, and to carry as they are where they changed" if done.lora is None else "as they are"
        lines.append(f"carried   {len(names)} tensors {what}: {', '.join(names[:_NAMES])}{more}")
    if done.conversion is not None:
        method, sizes = done.conversion.compact.method, done.conversion.sizes
        lines.append(f"form      {method}, of the LoRA it keeps {share(_kept(done))}")
        lines.append(size_line(sizes, done.conversion.ratio, done.conversion.source_bytes))
        lines += [f"note      {printable(note, 1000)}" for note in done.conversion.notes]
    if done.lora is not None:
        lines += _measured(done)
    if verbose and done.targets:
        lines += ["", _table(done)]
    return "\n".join(lines)


def _equal(done: Extraction) -> str:
    if done.lora is None:
        return "headers were read, no weights"
    tied = f", {len(done.tied)} repeat another one" if done.tied else ""
    out = f", {len(done.left_out)} left out" if done.left_out else ""
    return f"{done.unchanged} tensors equal the base's{tied}{out}"


def _kept(done: Extraction) -> float | None:
    assert done.conversion is not None
    return None if done.conversion.fidelity is None else done.conversion.fidelity.captured


def _measured(done: Extraction) -> list[str]:
    """The lines of what was measured."""
    lines = [
        f"captured  {done.captured:.4f} of the difference's energy; error ||D - BA|| / ||D|| {done.relative_error:.3g}"
    ]
    worst = max(done.targets, key=lambda row: row.relative_error)
    lines.append(f"worst     error {worst.relative_error:.3g} in {printable(worst.target.name)}")
    if done.rounding > _ROUNDED:
        above = statistics.median(row.above for row in done.targets)
        lines.append(
            f"rounding  about {percent(done.rounding)} of the difference is the rounding of the fine-tuned model"
        )
        lines.append(
            f"          {above:g} components stand above it in the median module; the next ones are like rounding"
        )
    return lines


def _table(done: Extraction) -> str:
    rows = [
        (printable(row.target.name), row.rank, row.above, f"{row.relative_error:.4f}", f"{row.energy:.4g}")
        for row in done.targets
    ]
    return table(("module", "rank", "above rounding", "error", "energy"), rows)
