"""Answers of a chat model with refits at several strengths: what a fit that is larger than the nearest one brings.

    python benchmarks/strength.py BASE e2e 40 1.6,0.4,0.2      a task, texts held out, sizes in %

BASE, LoRAs and tasks are those of evidence.py. A row is a size: captured (without a strength), then the share of the
KL closed at each strength, the updates of one refit times that.
"""

from __future__ import annotations

import sys
from pathlib import Path

import cells
import evidence
from chat import answers

STRENGTHS = (1.0, 1.25, 1.5, 2.0, 2.5)


def rows(run: evidence.Run, task: str, sizes: list[float], method: str = "lowrank") -> None:
    """Print a table of a task."""
    from lrconvert import api
    from lrconvert.live.load_model import load_model, load_tokenizer
    from lrconvert.live.zero_point import without_updates

    teacher = evidence.teacher_of(run, task)
    if isinstance(teacher, str):
        print(f"skipped: {teacher}")
        return
    lora, statistics = api.load_lora(teacher.adapter), evidence.statistics_of(run, teacher)
    model, tokenizer = load_model(run.base), load_tokenizer(run.base)
    held = answers.Held.of(teacher.task, tokenizer, teacher.split.held[: run.held])
    logs, base, _ = answers.reference(teacher.folder, model, tokenizer, held, without_updates(lora), lora)
    print(f"| {task} | captured | {' | '.join(f'{s:g}' for s in STRENGTHS)} |\n|---{'|---:' * (1 + len(STRENGTHS))}|")
    for size in sizes:
        made = api.convert(lora, method, target_size=int(lora.half_bytes * size / 100), statistics=statistics)
        closed = []
        for strength in STRENGTHS:
            api.attach(model, made.compact, scale=strength)
            kl = answers.measure(model, tokenizer, held, logs, scored=False).kl
            api.detach(model)
            closed.append(f"{1 - kl.sum() / base.kl.sum():.1%}")
        print(f"| {size:g} % | {made.fidelity.captured:.3f} | {' | '.join(closed)} |", flush=True)


def main() -> None:
    base, task, held, sizes = sys.argv[1:5]
    folder = Path(sys.argv[5]) if len(sys.argv) > 5 else cells.HERE / ".cache" / "chat"
    rows(evidence.Run(Path(base), folder, int(held)), task, [float(size) for size in sizes.split(",")])


if __name__ == "__main__":
    main()
