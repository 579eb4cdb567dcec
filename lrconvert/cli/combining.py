"""The command that makes one adapter of several."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from lrconvert.cli import flags, made_loras
from lrconvert.cli.printing import emit, progress_bar, say, warn
from lrconvert.convert.combine.options import CombineOptions
from lrconvert.convert.options import ConvertOptions
from lrconvert.formats.readers.shared.options import ReadOptions

_OF_FILES = ("target_size", "target_ratio", "base")  # of a conversion's options


@flags.command(
    "combine",
    click.Argument(["adapters"], nargs=-1, required=True, type=flags.ScaledPath(), metavar="ADAPTER[=WEIGHT]..."),
    flags.output("The file to write, or with --to the folder."),
    *made_loras.options(),
    *flags.of(CombineOptions),
    *flags.of(ConvertOptions, skip={field.name for field in fields(ConvertOptions)} - {*_OF_FILES}),
    *flags.reading(),
    flags.VERBOSE,
    flags.OVERWRITE,
    flags.QUIET,
    flags.AS_JSON,
)
def combine(adapters: tuple[tuple[str, float], ...], **given: Any) -> None:
    """Make one adapter of several ADAPTERs of one base, each with its WEIGHT, 1 without.

    The mode sum is the weighted sum of their updates, exactly; the others are those of PEFT's add_weighted_adapter.
    What follows the last = is the weight, unless the whole is a path that exists.
    """
    from lrconvert import api
    from lrconvert.report.combination import combination_json, combination_text

    quiet, verbose, as_json = given.pop("quiet"), given.pop("verbose"), given.pop("as_json")
    output = made_loras.Output.of(given, [Path(name) for name, _ in adapters])
    base = given["base"]
    if output.layout is not None and (given["target_size"], given["target_ratio"]) != (None, None):
        raise click.UsageError(
            "--target-size and --target-ratio are of a compact file; --mode svd --rank bounds a LoRA"
        )
    options = flags.chosen(given, CombineOptions, ConvertOptions, ReadOptions)
    with progress_bar("combine", quiet or as_json) as progress:
        done = api.combine(list(adapters), method=output.method, progress=progress, **options)
    notes = output.write(done.lora, done.compact, base)
    conversion = () if done.conversion is None else done.conversion.warnings
    warnings = list(dict.fromkeys([*done.warnings, *conversion, *notes]))
    if as_json:
        emit({"output": str(output.path), **combination_json(done), "warnings": warnings})
        return
    if not quiet:
        say(combination_text(str(output.path), done, verbose))
    warn(warnings)
