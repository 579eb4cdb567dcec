"""`refine`: win the accuracy back that a refit has lost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lrconvert.cli import flags
from lrconvert.cli.printing import emit, progress_bar, say, unfinished_is_said, warn
from lrconvert.core.errors import printable
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.refine.settings import RunOptions, Settings

if TYPE_CHECKING:
    from lrconvert.refine.refine import Refinement


@flags.command(
    "refine",
    click.Argument(["file"], type=flags.PLACE),
    flags.base("Base model folder or hub id.", required=True),
    click.Option(["--teacher"], type=flags.ADAPTER, required=True, help="The LoRA that FILE was made from."),
    flags.data(f"{flags.DATA_HELP} Without it a decoder's teacher writes texts of its own."),
    flags.output("The file to write."),
    *flags.of(Settings, RunOptions),
    click.Option(["--strict"], is_flag=True, help="Exit with 1 if nothing was gained."),
    flags.AS_JSON,
    flags.QUIET,
    flags.OVERWRITE,
    *flags.reading(),
    help="Train FILE for a short while to answer as its LoRA does (distillation).",
)
def refine(file: Path, base: Path, teacher: Path, data: tuple[Path, ...], output: Path, **given: Any) -> None:
    from lrconvert import api

    quiet, as_json, strict = given.pop("quiet"), given.pop("as_json"), given.pop("strict")
    with unfinished_is_said(output), progress_bar("refine", quiet or as_json) as progress:
        done = api.refine(
            file,
            teacher,
            base,
            data or None,
            output,
            progress=progress,
            **flags.chosen(given, Settings, RunOptions, ReadOptions),
        )
    if done.leads:
        if as_json:
            emit({"file": str(file), "output": str(output), **refinement_json(done)})
        else:
            warn(done.warnings)
            if not quiet:
                say(refinement_text(str(file), str(output), done))
            if not done.improved:
                what = f"nothing was gained: {printable(str(output))} holds what {printable(str(file))} holds"
                say(f"{what}; try more --steps, or other data", err=True)
    if strict and not done.improved:
        raise click.exceptions.Exit(1)


def refinement_json(done: Refinement) -> dict[str, Any]:
    from lrconvert.report.comparison import answers_json
    from lrconvert.report.conversion import sizes_json

    return {
        "bytes": sizes_json(done.sizes),
        "source_bytes_at_16_bit": done.source_bytes,
        "ratio": done.ratio,
        "improved": done.improved,
        "steps": done.steps,
        "best_step": done.best_step,
        "layerwise": done.layerwise,
        "data": done.data,
        "seconds": round(done.seconds, 1),
        "before": answers_json(done.before),
        "after": answers_json(done.after),
    }


def refinement_text(file: str, output: str, done: Refinement) -> str:
    """Show the size, and the answers before and after, against the LoRA's, on data that was held out, as a table."""
    from lrconvert.report.conversion import size_line
    from lrconvert.report.tables import table

    rows = []
    for name, answers in (("before", done.before), ("after", done.after)):
        agreement = "-" if answers.agreement is None else f"{answers.agreement:.1%}"
        rows.append([name, f"{answers.distance:.4g}", f"{answers.closed:.1%}", agreement])
    stages = f"{done.steps} steps" + (", after a fit layer by layer" if done.layerwise else "")
    head = ["", f"{done.before.kind} from the LoRA", "closed", "agreement"]
    title = f"{printable(file)} -> {printable(output)}   {stages}, {done.seconds:.0f} s"
    title += f"\n{size_line(done.sizes, done.ratio, done.source_bytes)}"
    return f"{title}\n\nOn {done.before.items:,} held-out items:\n\n{table(head, rows)}"
