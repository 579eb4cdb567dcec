"""Answers of a chat model with refits at several strengths: what a fit that is larger than the nearest one brings.

    python benchmarks/strength.py BASE e2e 40 1.6,0.4,0.2      a task, texts held out, sizes in %
    python benchmarks/strength.py BASE e2e 40 0.4 --plain --method vblora

BASE, LoRAs and tasks are those of evidence.py. A row is a size: captured (without a strength), then the share of the
KL closed at each strength, the updates of one refit times that; the last one is that of `strength_without_data`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cells
import evidence
from chat import answers

STRENGTHS = (1.0, 1.25, 1.5, 2.0, 2.5)


def rows(run: evidence.Run, task: str, sizes: list[float], method: str, plain: bool) -> None:
    """Print a table of a task, of refits with its statistics or, `plain`, without."""
    from lrconvert import api
    from lrconvert.convert.strength import strength_without_data
    from lrconvert.live.load_model import load_model, load_tokenizer
    from lrconvert.live.zero_point import without_updates

    teacher = evidence.teacher_of(run, task)
    if isinstance(teacher, str):
        print(f"skipped: {teacher}")
        return
    lora = api.load_lora(teacher.adapter)
    statistics = None if plain else evidence.statistics_of(run, teacher)
    model, tokenizer = load_model(run.base), load_tokenizer(run.base)
    held = answers.Held.of(teacher.task, tokenizer, teacher.split.held[: run.held])
    logs, base, _ = answers.reference(teacher.folder, model, tokenizer, held, without_updates(lora), lora)
    print(f"| {task} | captured | {' | '.join(f'{s:g}' for s in STRENGTHS)} | chosen |")
    print(f"|---{'|---:' * (2 + len(STRENGTHS))}|")
    for size in sizes:
        made = api.convert(lora, method, target_size=int(lora.half_bytes * size / 100), statistics=statistics)
        chosen = strength_without_data(method, made.fidelity.captured)
        closed = []
        for strength in (*STRENGTHS, chosen):
            api.attach(model, made.compact, scale=strength)
            kl = answers.measure(model, tokenizer, held, logs, scored=False).kl
            api.detach(model)
            closed.append(f"{1 - kl.sum() / base.kl.sum():.1%}")
        print(f"| {size:g} % | {made.fidelity.captured:.3f} | {' | '.join(closed)} at {chosen:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("task")
    parser.add_argument("held", type=int)
    parser.add_argument("sizes", help="in %%, with commas")
    parser.add_argument("--method", default="lowrank")
    parser.add_argument("--plain", action="store_true", help="fits without statistics")
    parser.add_argument("--folder", type=Path, default=cells.HERE / ".cache" / "chat", help="that of evidence.py")
    given = parser.parse_args()
    run = evidence.Run(given.base, given.folder, given.held)
    rows(run, given.task, [float(size) for size in given.sizes.split(",")], given.method, given.plain)


if __name__ == "__main__":
    main()
