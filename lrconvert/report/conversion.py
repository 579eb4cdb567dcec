"""Conversions: what a converter prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lrconvert.core.errors import printable
from lrconvert.methods import base as methods
from lrconvert.report.comparison import fidelity_json, fidelity_table, worst_first
from lrconvert.report.tables import listed, picked, share

if TYPE_CHECKING:
    from lrconvert.convert.convert import Conversion
    from lrconvert.formats.lrc.file import Sizes


def sizes_json(size: Sizes) -> dict[str, int]:
    """Return the sizes of a file, in bytes."""
    return picked(size, "total", "adapter", "payload", "overhead", "extras")


def size_line(size: Sizes, ratio: float, source_bytes: int) -> str:
    """Return the size of a file beside that of its source as a line of text."""
    return (
        f"size      {size.adapter:,} bytes = payload {size.payload:,} + overhead {size.overhead:,}; "
        f"{ratio:.1f} times smaller than {source_bytes:,} at 16 bit"
    )


def conversion_json(done: Conversion) -> dict[str, Any]:
    """Return a conversion with its sizes, ratio and captured energy, in all and of each target."""
    method = methods.get(done.compact.method)
    value: dict[str, Any] = {
        "method": {"id": method.id, "version": method.version, "config": method.header(done.compact.config)},
        "bytes": sizes_json(done.sizes),
        "source_bytes_at_16_bit": done.source_bytes,
        "ratio": done.ratio,
        "dropped": list(done.dropped),
        "notes": list(done.notes),
        "warnings": list(done.warnings),
    }
    if done.fidelity is not None:
        value["captured"] = done.fidelity.captured
        value["targets"] = fidelity_json(done.fidelity)["targets"]
    return value


BY_DEFAULT = f"No size was asked for: at least {methods.DEFAULT_RATIO} times smaller."


def conversion_text(source: str, output: str | None, done: Conversion, verbose: bool) -> str:
    """Return a conversion as text; `output` is None after a dry run."""
    method, size = methods.get(done.compact.method), done.sizes
    lines = [
        f"{printable(source)} -> {printable(output) if output else '(dry run, nothing written)'}",
        f"method    {method.id}: {listed(method.header(done.compact.config))}",
        size_line(size, done.ratio, done.source_bytes),
        *([f"          {BY_DEFAULT}"] if done.by_default else []),
    ]
    if size.extras:
        lines.append(
            f"extras    {size.extras:,} bytes carried along unchanged, not counted above; file {size.total:,} bytes"
        )
    lines += [f"note      {note}" for note in method.notes(done.compact.config, done.compact.targets)]
    lines += [f"note      {printable(note, 1000)}" for note in done.notes]
    if done.fidelity is not None:
        lines.append(f"captured  {done.fidelity.captured:.4f} of the update's energy (weight norm; 1 is lossless)")
        if done.fidelity.output_captured is not None:
            lines.append(f"          {done.fidelity.output_captured:.4f} of the outputs' energy (under the statistics)")
        kept = [t for t in done.fidelity.targets if not t.is_dropped and t.captured is not None]
        if kept:
            worst = min(kept, key=worst_first)
            lines.append(f"worst     {share(worst.captured)} {printable(worst.name)}")
        if verbose:
            lines += ["", fidelity_table(done.fidelity, len(done.fidelity.targets))]
    return "\n".join(lines)
