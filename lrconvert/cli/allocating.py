"""`lora-to-alora`: the converters' options, the options of the allocation, and the table of ranks."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import click

from lrconvert.cli import many
from lrconvert.cli.converting import check_paths, common_options
from lrconvert.cli.measuring import DATA_HELP
from lrconvert.cli.refining import refinement_json, shown
from lrconvert.cli.shared import device_of, emit, progress_bar, warn
from lrconvert.core.errors import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lrconvert.convert.rank_allocation import Allocation, Module
    from lrconvert.refine.rank_training import TrainedAllocation

NAME = "lora-to-alora"
_ABOUT = "Give every module the rank it deserves under one budget (ALoRA); the file is of the form lowrank."
_BAR = 20
_LAYERS = 48  # ranks of one kind of module that are shown one by one


def command() -> click.Command:
    """The command: it needs no model without --data."""
    from lrconvert.convert.rank_allocation import BITS, EXACT, MAX_TOKENS, MOVES, ROUNDS

    params = [param for param in common_options() if param.name != "seed"]  # without training nothing is random
    params[3:3] = [
        click.Option(["--total-rank"], type=click.IntRange(1), help="Keep this many components over all modules."),
        click.Option(
            ["--bits"],
            type=click.Choice([str(q) for q in BITS]),
            default="16",
            show_default=True,
            help="Bits per number.",
        ),
        click.Option(
            ["--data"],
            multiple=True,
            type=click.Path(path_type=Path),
            help=f"With --base: score by ablation on held-out texts instead of by energy. {DATA_HELP}",
        ),
        click.Option(
            ["--length"], type=click.IntRange(1), default=512, show_default=True, help="Tokens of a text, at most."
        ),
        click.Option(
            ["--max-tokens"],
            type=click.IntRange(0),
            default=MAX_TOKENS,
            show_default=True,
            help="Tokens of --data in all; 0: all.",
        ),
        click.Option(
            ["--rounds"], type=click.IntRange(1), default=ROUNDS, show_default=True, help="Rounds of pruning on data."
        ),
        click.Option(
            ["--exact"],
            type=click.IntRange(0),
            default=EXACT,
            show_default=True,
            help="Components next to the cut that are ablated in each round, two forward passes each.",
        ),
        click.Option(
            ["--train-steps"],
            type=click.IntRange(0),
            default=0,
            show_default=True,
            help="With --base: train the result for so many steps, as refine does, while ranks move on.",
        ),
        click.Option(
            ["--moves"],
            type=click.IntRange(0),
            default=MOVES,
            show_default=True,
            help="How often components change places in the first half of --train-steps.",
        ),
        click.Option(
            ["--seed"],
            type=int,
            default=0,
            show_default=True,
            help="Of what --train-steps holds out, and the order of texts.",
        ),
    ]
    return click.Command(NAME, params=params, callback=_allocate_any, help=_ABOUT, short_help=_ABOUT)


def _allocate_any(*, train_steps: int, moves: int, seed: int, **given: Any) -> None:
    if train_steps:
        given |= {"retrain": {"steps": train_steps, "seed": seed}, "moves": moves}
    if many.are_meant(given):
        data = given.pop("data")
        many.run("allocate", NAME, "", {"data": list(data) or None}, **given)
    else:
        _allocate(**many.single(given))


def _allocate(
    *,
    source: Path,
    output: Path | None,
    data: tuple[Path, ...],
    allow_pickle: bool,
    layout: str | None,
    alpha: float | None,
    dry_run: bool,
    overwrite: bool,
    quiet: bool,
    verbose: bool,
    as_json: bool,
    device: str,
    **common: Any,
) -> None:
    from lrconvert import api
    from lrconvert.report import text_and_json

    where = check_paths(source, output, overwrite, needed=not dry_run)
    lora = api.load_lora(where, allow_pickle=allow_pickle, base=common["base"], layout=layout, alpha=alpha)
    with progress_bar(NAME, quiet or as_json) as progress:
        done = api.allocate(
            lora,
            data=data or None,
            device=device_of(device),
            dry_run=dry_run,
            progress=progress,
            **common,
        )
    if output is not None and not dry_run:
        api.write(done.compact, output, overwrite=overwrite)
    if as_json:
        emit({"source": str(source), "output": None if dry_run else str(output), **allocation_json(done)})
        return
    warn(done.warnings)
    if not quiet:
        told = text_and_json.conversion(str(source), None if dry_run else str(output), done, verbose)
        click.echo(f"{told}\n\n{ranks(done, verbose)}{_training(done)}")


def is_trained(done: Allocation) -> TypeGuard[TrainedAllocation]:
    """Whether an allocation was trained; its class is not asked, which would load torch."""
    return hasattr(done, "training")


def allocation_json(done: Allocation) -> dict[str, Any]:
    from lrconvert.report import text_and_json

    trained = {}
    if is_trained(done):
        moves = [vars(move) for move in done.moves]
        trained = {"training": {**refinement_json(done.training), "moves": moves}}
    return {
        **text_and_json.conversion_json(done),
        **trained,
        "scores": {"of": done.scores, "items": done.items, "ablated": done.ablated},
        "modules": [
            {"name": m.name, "kind": m.kind, "layer": list(m.layer), "rank_before": m.before, "rank_after": m.after}
            for m in done.modules
        ],
    }


def _training(done: Allocation) -> str:
    """What training did to the answers of the first allocation; nothing without one."""
    if not is_trained(done):
        return ""
    moved = "; ".join(f"{m.came} for {m.went} after step {m.step}" for m in done.moves)
    return f"\n\n{shown('first allocation', 'trained', done.training)}\n\ncomponents exchanged: {moved or 'none'}"


def ranks(done: Allocation, verbose: bool) -> str:
    """Ranks before and after: a row for each kind of module with a bar and the ranks by layer; then each module."""
    from lrconvert.report import text_and_json

    before, after = sum(m.before for m in done.modules), sum(m.after for m in done.modules)
    told = f"by {done.scores}"
    if done.items:
        told += f" on {done.items:,} answers, {done.ablated} components ablated"
    kinds = [(kind, list(members)) for kind, members in groupby(done.modules, key=lambda m: m.kind)]
    rows = []
    for name, (_, members) in zip(_short([kind for kind, _ in kinds]), kinds, strict=True):
        one, two = sum(m.before for m in members), sum(m.after for m in members)
        filled = round(_BAR * two / max(1, one))
        rows.append([printable(name), len(members), one, two, "#" * filled + "." * (_BAR - filled), _by_layer(members)])
    head = ["module", "count", "rank before", "after", "of it kept", "after, layer by layer"]
    parts = [
        f"rank      {before:,} -> {after:,} over {len(done.modules)} modules, {told}",
        "",
        text_and_json.table(head, rows),
    ]
    if verbose:
        each = [[printable(m.name), m.before, m.after] for m in done.modules]
        parts += ["", text_and_json.table(["module", "rank before", "after"], each)]
    return "\n".join(parts)


def _by_layer(members: Sequence[Module]) -> str:
    found = [m.after for m in members]
    return " ".join(map(str, found)) if len(found) <= _LAYERS else f"{min(found)}..{max(found)}"


def _short(kinds: Sequence[str]) -> list[str]:
    """What comes after the last number of each name, if that tells them apart."""
    found = [kind.rpartition("*.")[2].removesuffix(".weight") for kind in kinds]
    return found if len(set(found)) == len(found) else list(kinds)
