"""The command that takes an adapter out of a fine-tuned model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lrconvert.cli import flags, made_loras
from lrconvert.cli.printing import emit, progress_bar, say, warn
from lrconvert.convert.extract.options import ExtractOptions


@flags.command(
    "extract",
    click.Argument(["finetuned"], type=flags.BASE),
    flags.base("Model folder or hub id that it was trained from.", required=True),
    flags.output("The file to write, or with --to the folder.", required=False),
    *made_loras.options(),
    *flags.of(ExtractOptions),
    click.Option(
        ["--dry-run"], is_flag=True, help="Read headers only; print what would be read, and the most it makes."
    ),
    flags.VERBOSE,
    flags.OVERWRITE,
    flags.QUIET,
    flags.AS_JSON,
)
def extract(finetuned: Path, base: Path, dry_run: bool, **given: Any) -> None:
    """Write what the model FINETUNED has more than its base: as a compact file, or with --to as a LoRA.

    Differences are cut in rank; vectors that changed, small matrices, trained tokens and new heads go along as they
    are. The error is measured on the differences themselves.
    """
    from lrconvert import api
    from lrconvert.report.extraction import extraction_json, extraction_text

    quiet, verbose, as_json = given.pop("quiet"), given.pop("verbose"), given.pop("as_json")
    output = made_loras.Output.of(given, (finetuned, base), dry_run)
    options = flags.chosen(given, ExtractOptions)
    with progress_bar("extract", quiet or as_json) as progress:
        done = api.extract(finetuned, base, output.method, dry_run=dry_run, progress=progress, **options)
    notes = () if done.lora is None else output.write(done.lora, done.compact, base)
    shown = None if output.path is None else str(output.path)
    if as_json:
        named = {"finetuned": str(finetuned), "base": str(base), "output": shown}
        emit({**named, **extraction_json(done), "notes": list(notes)})
        return
    if not quiet:
        say(extraction_text((str(finetuned), str(base)), shown, done, verbose))
    warn([*done.warnings, *notes])
