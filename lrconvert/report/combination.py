"""Combinations: what `combine` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lrconvert.core.errors import printable
from lrconvert.report.conversion import conversion_json, size_line
from lrconvert.report.tables import share, span, table

if TYPE_CHECKING:
    from lrconvert.convert.combine.combine import Combination

_OF_THE_SUM = ("svd", "linear")


def combination_json(done: Combination) -> dict[str, Any]:
    """Return a combination with its ranks and errors."""
    value: dict[str, Any] = {
        "mode": done.mode,
        "adapters": [{"name": name, "weight": weight} for name, weight in done.weights],
        "targets": [
            {"name": t.target.name, "view": t.target.view.text, "rank": t.rank, "energy": t.energy, "error": t.error}
            for t in done.targets
        ],
        "extras": [extra.name for extra in done.lora.extras],
        "captured": done.captured,
        "warnings": list(done.warnings),
    }
    if done.conversion is not None:
        value["conversion"] = conversion_json(done.conversion)
    return value


def combination_text(output: str | None, done: Combination, verbose: bool) -> str:
    """Return a combination as text; `output` is None after a dry run."""
    parts = " ".join(f"{printable(name)}={weight:g}" for name, weight in done.weights)
    lines = [f"{parts} -> {printable(output) if output else '(dry run, nothing written)'}"]
    ranks = span(t.rank for t in done.targets)
    lines.append(f"mode      {done.mode}: {len(done.targets)} targets, rank {ranks}")
    if done.mode in _OF_THE_SUM:
        lines.append(f"captured  {share(done.captured)} of the energy of the weighted sum")
    elif done.mode.endswith("_svd"):
        lines.append(f"captured  {share(done.captured)} of the energy of what {done.mode.removesuffix('_svd')} makes")
    if done.lora.extras:
        lines.append(f"extras    {len(done.lora.extras)} tensors carried along")
    if done.conversion is not None:
        kept = None if done.conversion.fidelity is None else done.conversion.fidelity.captured
        lines.append(f"form      {done.conversion.compact.method}, of the combination it keeps {share(kept)}")
        lines.append(size_line(done.conversion.sizes, done.conversion.ratio, done.conversion.source_bytes))
        lines += [f"note      {printable(note, 1000)}" for note in done.conversion.notes]
    if verbose:
        rows = [(printable(t.target.name), t.rank, f"{t.energy:.4g}", f"{t.error:.4g}") for t in done.targets]
        lines += ["", table(("target", "rank", "energy", "error"), rows)]
    return "\n".join(lines)
