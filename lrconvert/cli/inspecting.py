"""The command `inspect`, which needs nothing of exporters and consumers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lrconvert.cli import flags, several
from lrconvert.cli.printing import emit, progress_bar, say, warn
from lrconvert.core.errors import EXIT_REFUSED, LrcError
from lrconvert.formats.readers.shared.options import ReadOptions


@flags.command(
    "inspect",
    click.Argument(["sources"], nargs=-1, required=True, type=flags.ADAPTER, metavar="SOURCE..."),
    flags.base("Base model folder or hub id: for layouts that do not say shapes, or spell names in their own way."),
    *flags.reading(),
    flags.AS_JSON,
)
def inspect(sources: tuple[Path, ...], base: Path | None, as_json: bool, **given: Any) -> None:
    """Show what adapters are: targets, ranks, spectrum, bytes. Any LoRA layout, lrconvert files, statistics.

    Of several, and of a folder of adapters, it shows a table.
    """
    from lrconvert import api
    from lrconvert.report import inspection

    options = flags.chosen(given, ReadOptions)
    named = several.adapters(sources)
    if len(named) == 1:
        (name, path), *_ = named
        facts = api.inspect(path, base=base, **options)
        if as_json:
            emit({"path": name, **facts})
            return
        say(inspection.inspection_text(name, facts))
        warn(facts["warnings"])
        return
    with progress_bar("inspect", as_json) as progress:
        looked = several.of_each(named, lambda path: api.inspect(path, base=base, **options), progress)
    errors = [error for _, error in looked if isinstance(error, LrcError)]
    shown = [(n, several.refusal(f) if isinstance(f, LrcError) else f) for n, f in looked]
    if as_json:
        totals = inspection.inspection_totals([one for _, one in shown])
        emit({"sources": [{"path": name, **one} for name, one in shown], "totals": totals})
    else:
        for name, one in shown:
            warn(f"{name}: {line}" for line in one.get("warnings", ()))
        for error in errors:
            say(str(error), err=True)
        say(inspection.inspections_text(shown))
    if errors:
        raise click.exceptions.Exit(EXIT_REFUSED)
