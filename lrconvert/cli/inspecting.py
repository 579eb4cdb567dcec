"""The command `inspect`, which needs nothing of exporters and consumers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lrconvert.cli import flags
from lrconvert.cli.printing import emit, say, warn
from lrconvert.formats.readers.shared.options import ReadOptions


@flags.command(
    "inspect",
    click.Argument(["source"], type=flags.PATH),
    flags.base("Base model folder or hub id: for layouts that do not say shapes, or spell names in their own way."),
    *flags.reading(),
    flags.AS_JSON,
)
def inspect(source: Path, base: Path | None, as_json: bool, **given: Any) -> None:
    """Show what an adapter is: targets, ranks, spectrum, bytes. Any LoRA layout, lrconvert files, statistics."""
    from lrconvert import api
    from lrconvert.report.inspection import inspection_text

    facts = api.inspect(source, base=base, **flags.chosen(given, ReadOptions))
    if as_json:
        emit({"path": str(source), **facts})
        return
    say(inspection_text(str(source), facts))
    warn(facts["warnings"])
