"""What compact files keep of an encoder's LoRAs of several ranks, at equal shares of the whole file.

    python benchmarks/encoder_evidence.py                        measures what is missing
    python benchmarks/encoder_evidence.py --only "trec r8, 0.8"  some cells

The teachers are those of `teachers.py` (22 M parameters; TREC in 50 classes, for tuning; SST-2, for testing) at ranks
4, 8 and 32, everything else equal; they are trained where they are missing. The zero point is the base with the LoRA's
own head. A share of bytes does not carry across ranks: the bits a component say what does. Refinement is half of the
LoRA's steps. docs/evidence.md shows it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import accuracy
import cells
import teachers
from forms import statistics_of

NAME = "encoder_evidence"
SHARES = (1.6, 0.8, 0.4, 4.0, 0.2)
FORMS = ("lowrank", "vblora")
MODES = ("refit", "refined")
TASKS = ("trec", "sst2")


LONGER = (2, 4)  # times the steps of refinement: is it steps that a file lacks, or bytes?


def _cell(task: str, rank: int, share: float, form: str, mode: str, seed: int = 0, times: int = 1) -> dict[str, Any]:
    from lrconvert import api
    from lrconvert.core.errors import BudgetError
    from lrconvert.formats.lrc import file

    teacher = teachers.get(task if rank == 8 else f"{task}-r{rank}")
    if isinstance(teacher, str):
        return {"skipped": teacher}
    lora, start, row = api.load_lora(teacher.adapter), time.process_time(), dict[str, Any]()
    size = int(lora.half_bytes * share / 100)
    try:
        compact = api.convert(lora, form, target_size=size, statistics=statistics_of(teacher, teacher.seen)).compact
    except BudgetError as error:
        return {"refused": str(error)}
    if mode == "refined":
        steps, tokens = times * accuracy.STEPS[task], accuracy.BATCH_TOKENS[task]
        made = api.refine(
            compact, lora, teacher.base, teacher.seen, steps=steps, batch_tokens=tokens, seed=seed, layerwise=False
        )
        compact, row = made.compact, {"steps": made.steps, "best_step": made.best_step}
    nbytes = file.sizes(compact).adapter
    row |= {"bytes": nbytes, "share": round(100 * nbytes / lora.half_bytes, 4), "rank": rank}
    row["bits_per_component"] = round(8 * nbytes / sum(pair.rank for pair in lora.targets), 2)
    row["cpu_seconds"] = round(time.process_time() - start, 1)
    return row | accuracy.scores_of(teacher, compact)


def all_cells() -> Iterator[cells.Cell]:
    """One seed of everything, rank 8 first; then two more of what is refined, and longer refinements."""
    for seed in (0, 1, 2):
        for rank in sorted(teachers.RANKS, key=lambda r: r != 8):
            for mode in MODES if seed == 0 else MODES[1:]:
                for task in TASKS:
                    for share in SHARES:
                        for form in FORMS:
                            label = f"{task} r{rank}, {share:g}%, {form}, {mode}" + (f", seed {seed}" if seed else "")
                            yield label, lambda a=(task, rank, share, form, mode, seed): _cell(*a)
    for task in TASKS:
        for share in SHARES:
            for times in LONGER:
                label = f"{task} r8, {share:g}%, lowrank, refined, {times * accuracy.STEPS[task]} steps"
                yield label, partial(_cell, task, 8, share, "lowrank", "refined", times=times)


def _row(name: str, cell: dict[str, Any]) -> list[str]:
    if "closed" not in cell:
        return [name, "too small" if "refused" in cell else "skipped", "", "", "", ""]
    closed, gain = (f"{x:.1%} ({low:.1%} to {high:.1%})" for x, low, high in (cell["closed"], cell["gain"]))
    shown = [f"{cell['bytes']:,}", f"{cell['bits_per_component']:.1f}", closed, f"{cell['agreement'][0]:.1%}", gain]
    return [name, *shown]


def table() -> str:
    done = cells.read(NAME)
    head = ["task, rank of the LoRA, size, form", "bytes", "bits a component", "KL closed", "agreement", "gain"]
    rows = [_row(label, done[label]) for label, _ in all_cells() if label in done]
    return cells.markdown(head, rows) if rows else "Not run."


if __name__ == "__main__":
    cells.main(NAME, __doc__, all_cells, table)
