"""`refine`: win the accuracy back that a refit has lost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lrconvert.cli.measuring import DATA_HELP
from lrconvert.cli.shared import (
    as_json_option,
    device_of,
    device_option,
    emit,
    overwrite_option,
    progress_bar,
    quiet_option,
    takes_adapters,
    warn,
)

if TYPE_CHECKING:
    from lrconvert.refine.refine import Refinement

_path = click.Path(path_type=Path)
_ABOUT = "Train FILE for a short while to answer as its LoRA does (distillation)."


def command() -> click.Command:
    from lrconvert.refine.settings import AUTOCASTS, Settings

    at = Settings()
    least, none = click.IntRange(1), click.IntRange(0)

    def number(name: str, kind: Any, default: Any, text: str) -> click.Option:
        return click.Option([f"--{name}"], type=kind, default=default, show_default=default is not None, help=text)

    params: list[click.Parameter] = [
        click.Argument(["file"], type=_path),
        click.Option(["--base"], type=_path, required=True, help="Base model folder or hub id."),
        click.Option(["--teacher"], type=_path, required=True, help="The LoRA that FILE was made from."),
        click.Option(
            ["--data"],
            multiple=True,
            type=_path,
            help=f"{DATA_HELP} Without it a decoder's teacher writes texts of its own.",
        ),
        click.Option(["-o", "--output"], type=_path, required=True, help="The file to write."),
        number("steps", least, at.steps, "Steps of the end-to-end stage."),
        number("minutes", float, None, "Stop after that long, rates falling in time."),
        number("length", click.IntRange(2), at.length, "Tokens of a text, at most."),
        number("batch-tokens", least, at.batch_tokens, "Tokens of a batch."),
        number("accumulate", least, at.accumulate, "Batches of a step."),
        number("max-tokens", none, at.max_tokens, "Tokens of --data in all; 0: everything."),
        number("own-tokens", least, at.own_tokens, "Tokens that the teacher writes without --data."),
        number("temperature", float, at.temperature, "Temperature of the answers that are compared."),
        number("hidden", float, at.hidden, "Weight of the error of hidden states beside the KL."),
        number("task-loss", float, at.task_loss, "Weight of the task's own loss, where data has labels."),
        click.Option(["--no-layerwise"], is_flag=True, help="Leave out the fit layer by layer."),
        click.Option(["--no-end-to-end"], is_flag=True, help="Leave out the training end to end."),
        number("lr", float, at.lr, "Multiplies all learning rates."),
        number("seed", int, at.seed, "Seed of the split, the order of texts, and of texts that are written."),
        click.Option(
            ["--autocast"],
            type=click.Choice(AUTOCASTS),
            default=at.autocast,
            show_default=True,
            help="Compute in bf16; auto: on CUDA.",
        ),
        click.Option(["--gradient-checkpointing"], is_flag=True, help="Less memory, a third more time."),
        number("eval-every", least, at.eval_every, "Steps between measurements on held-out data."),
        number("patience", none, at.patience, "Stop after so many measurements without a gain; 0: never."),
        number("checkpoint-every", least, at.checkpoint_every, "Steps between checkpoints."),
        click.Option(["--resume"], is_flag=True, help="Go on with a refinement that was broken off."),
        click.Option(["--log"], type=_path, help="Append what happens to this file, a JSON object a line."),
        click.Option(["--train-heads"], is_flag=True, help="Train the heads that FILE carries, too."),
        click.Option(["--load-in-4bit"], is_flag=True, help="Quantize the base to NF4 (needs bitsandbytes)."),
        click.Option(["--strict"], is_flag=True, help="Exit with 1 if nothing was gained."),
    ]
    made = click.Command("refine", params=params, callback=_refine, help=_ABOUT, short_help=_ABOUT)
    for option in (as_json_option, quiet_option, overwrite_option, takes_adapters, device_option):
        option(made)
    return made


def _refine(
    *,
    file: Path,
    base: Path,
    teacher: Path,
    data: tuple[Path, ...],
    output: Path,
    no_layerwise: bool,
    no_end_to_end: bool,
    strict: bool,
    quiet: bool,
    as_json: bool,
    device: str,
    **common: Any,
) -> None:
    from lrconvert import api

    with progress_bar("refine", quiet or as_json) as progress:
        done = api.refine(
            file,
            teacher,
            base,
            data or None,
            output,
            device=device_of(device),
            layerwise=not no_layerwise,
            end_to_end=not no_end_to_end,
            progress=progress,
            **common,
        )
    if done.leads:
        if as_json:
            emit({"file": str(file), "output": str(output), **refinement_json(done)})
        else:
            warn(done.warnings)
            if not quiet:
                click.echo(shown(str(file), str(output), done))
            if not done.improved:
                what = f"nothing was gained: {output} holds what {file} holds"
                click.echo(f"{what}; try --lr 0.3, or more --steps", err=True)
    if strict and not done.improved:
        raise click.exceptions.Exit(1)


def refinement_json(done: Refinement) -> dict[str, Any]:
    from lrconvert.report.text_and_json import answers_json

    return {
        "improved": done.improved,
        "steps": done.steps,
        "best_step": done.best_step,
        "layerwise": done.layerwise,
        "data": done.data,
        "seconds": round(done.seconds, 1),
        "before": answers_json(done.before),
        "after": answers_json(done.after),
    }


def shown(file: str, output: str, done: Refinement) -> str:
    """A table: the answers before and after, against the LoRA's, on data that was held out."""
    from lrconvert.core.errors import printable
    from lrconvert.report import text_and_json

    rows = []
    for name, some in (("before", done.before), ("after", done.after)):
        agreement = "-" if some.agreement is None else f"{some.agreement:.1%}"
        rows.append([name, f"{some.distance:.4g}", f"{some.closed:.1%}", agreement])
    stages = f"{done.steps} steps" + (", after a fit layer by layer" if done.layerwise else "")
    head = ["", f"{done.before.kind} from the LoRA", "closed", "agreement"]
    told = f"{printable(file)} -> {printable(output)}   {stages}, {done.seconds:.0f} s"
    return f"{told}\n\nOn {done.before.items:,} held-out items:\n\n{text_and_json.table(head, rows)}"
