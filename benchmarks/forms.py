"""Every form at equal bytes: what it captures of the weights and of the outputs, and what the model then answers.

    python benchmarks/forms.py                       measures what is missing (teachers are trained at the first run)
    python benchmarks/forms.py --only "trec.*1.6"    some cells
    python benchmarks/forms.py --render              writes the table of docs/benchmarks.md

A size is the payload's share of the LoRA's factors at 16 bit. Fits use input statistics of texts that trained the LoRA;
outputs and answers are measured on texts that neither has seen. Beside our fits, at the same bytes: the papers' random
choices (SBoRA's random columns with the best numbers for them) and ComPEFT's ternary LoRA (the largest numbers of each
factor as a sign times one size, counted at their entropy, without an overhead).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cells
import numpy as np
import teachers

TEACHERS = ("trec", "e2e")
SHARES = (8.0, 4.0, 1.6)
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "lowrank": ("lowrank", {}),
    "vblora": ("vblora", {}),
    "nola": ("nola", {}),
    "sbora": ("sbora", {}),
    "bone": ("bone", {"shard": "auto"}),
    "bone, as MiSS": ("bone", {"peft_compatible": True}),
    "bat": ("bone", {"variant": "bat"}),
}
PEERS = ("sbora, random columns", "ternary (ComPEFT)")


def statistics_of(teacher: teachers.Teacher, data: Path) -> Any:
    """Return the statistics of a part of a teacher's data, kept in the cache."""
    from lrconvert import api

    path = teacher.base.parent / f"{data.stem}.stats"
    if not path.exists():
        api.statistics(teacher.base, data, path, adapter=teacher.adapter, max_tokens=1 << 16)
    return api.load_statistics(path)


def converted(lora: Any, method: str, options: dict[str, Any], share: float, statistics: Any) -> Any:
    """Return the conversion whose payload is at most `share` percent, as near as two sizes lead to it."""
    from lrconvert import api

    goal = int(lora.half_bytes * share / 100)
    overhead = 0
    for _ in range(2):
        planned = api.convert(lora, method, target_size=goal + overhead, statistics=statistics, dry_run=True, **options)
        overhead += goal - planned.sizes.payload
    size = goal + overhead
    done = api.convert(lora, method, target_size=size, statistics=statistics, **options)
    while done.sizes.payload > goal:
        size -= done.sizes.payload - goal
        done = api.convert(lora, method, target_size=size, statistics=statistics, **options)
    return done


def _ternary(lora: Any, nbytes: int) -> tuple[Any, int]:
    """Return the signs of the largest numbers of every factor, times one size per factor, and the bytes at their
    entropy."""
    from lrconvert.core.dtypes import Stored

    def bits(share: float) -> float:
        return -share * math.log2(share / 2) - (1 - share) * math.log2(1 - share) if 0 < share < 1 else 1.0

    low, high = 1e-4, 0.7
    for _ in range(30):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if lora.numel * bits(middle) / 8 + 4 * len(lora.targets) <= nbytes else (low, middle)

    def cut(factor: Any) -> Any:
        size = np.abs(factor)
        kept = size >= np.quantile(size, 1 - low)
        value = np.where(kept, np.sign(factor) * size[kept].mean(), 0).astype(np.float32)
        return Stored("F32", np.ascontiguousarray(value))

    pairs = tuple(replace(p, a=cut(p.A), b=cut(p.B)) for p in lora.targets)
    return replace(lora, targets=pairs), int(lora.numel * bits(low) / 8 + 4 * len(lora.targets))


def _random_columns(lora: Any, nbytes: int, statistics: Any) -> tuple[Any, int]:
    """SBoRA-FA as published: random columns, as many in every target; the numbers are the best for them, at 16 bit."""
    from lrconvert.core.dtypes import Stored
    from lrconvert.lora import svd

    def size(rank: int) -> int:
        return sum(2 * rank * t.out_features + 2 * rank for t in lora.shapes())

    rank = max((r for r in range(1, 4096) if size(r) <= nbytes), default=0)
    if rank == 0:
        return None, size(1)
    rng, pairs = np.random.default_rng(0), []
    for pair in lora.targets:
        inner = pair.target.in_features
        metric = svd.fit_metric(pair, statistics.of(pair.target))
        unit = np.zeros((min(rank, inner), inner), np.float32)
        unit[np.arange(len(unit)), np.sort(rng.choice(inner, len(unit), replace=False))] = 1
        right = metric.times(unit) @ (pair.scale * pair.A.astype(np.float64)).T
        numbers = np.linalg.lstsq(metric.gram(unit), right, rcond=1e-12)[0]
        b = Stored("F32", np.ascontiguousarray(pair.B.astype(np.float64) @ numbers.T, np.float32))
        pairs.append(replace(pair, a=Stored("F32", unit), b=b, scale=1.0))
    return replace(lora, targets=tuple(pairs)), size(rank)


def _cell(name: str, form: str, share: float) -> dict[str, Any]:
    import torch

    from lrconvert import api

    torch.set_num_threads(2)
    teacher = teachers.get(name)
    if isinstance(teacher, str):
        return {"skipped": teacher}
    lora = api.load_lora(teacher.adapter)
    seen, held = statistics_of(teacher, teacher.seen), statistics_of(teacher, teacher.held)
    goal = int(lora.half_bytes * share / 100)
    start = time.perf_counter()
    if form in FORMS:
        method, options = FORMS[form]
        options = options | ({"base": teacher.base} if form == "bat" else {})
        try:
            done = converted(lora, method, options, share, seen)
        except api.LrcError as error:
            return {"refused": str(error)}
        compact, payload, overhead = done.compact, done.sizes.payload, done.sizes.overhead
    else:
        made, payload = _ternary(lora, goal) if form.startswith("ternary") else _random_columns(lora, goal, seen)
        if made is None:
            return {"refused": f"one column of every target takes {payload} bytes"}
        compact, overhead = api.convert(made, "lowrank", bits=14).compact, 0
    seconds = time.perf_counter() - start
    (fidelity,) = api.compare(lora, [compact], statistics=held, base=teacher.base, data=teacher.held, max_tokens=0)
    assert fidelity.answers is not None
    return {
        "seconds": round(seconds, 1), "goal": goal, "payload": payload, "overhead": overhead,
        "captured": round(fidelity.captured, 4), "outputs": round(fidelity.output_captured, 4),
        "closed": round(fidelity.answers.closed, 4), "agreement": round(fidelity.answers.agreement, 4),
        "base_agreement": round(fidelity.answers.base_agreement, 4), "items": fidelity.answers.items,
    }  # fmt: skip


def all_cells() -> Iterator[cells.Cell]:
    for name in TEACHERS:
        for share in SHARES:
            for form in (*FORMS, *PEERS):
                yield f"{name}, {share}%, {form}", lambda n=name, f=form, s=share: _cell(n, f, s)


def _shown(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "not run"
    if "closed" not in cell:
        return "too small" if "refused" in cell else "skipped"
    return f"{cell['closed']:.0%} ({cell['captured']:.2f}, {cell['outputs']:.2f})"


def table() -> str:
    done = cells.read("forms")
    rows = []
    for form in (*FORMS, *PEERS):
        row = [form]
        for name in TEACHERS:
            row += [_shown(done.get(f"{name}, {share}%, {form}")) for share in SHARES]
        rows.append(row)
    head = ["form", *(f"{name} {share}%" for name in TEACHERS for share in SHARES)]
    return cells.markdown(head, rows)


if __name__ == "__main__":
    cells.main("forms", __doc__, all_cells, table)
