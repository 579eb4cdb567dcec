"""A GPU's part in lrconvert: each piece of work that takes a device, there and on a processor.

    python benchmarks/gpu.py                     measures what is missing, each cell in a process of its own
    python benchmarks/gpu.py --device cpu        measures the cells of one device alone
    python benchmarks/gpu.py --tiny              runs every cell at a toy's size, here, and records nothing
    python benchmarks/gpu.py --render            writes the table

Statistics of a model's layers; steps of `refine`, of the first epoch and of later ones, beside PEFT's plain step of
distillation (`refining.py`); the fit of VB-LoRA; the expansion of NOLA. Models and adapters are random, in bf16 and in
the shapes of Llama-3.2-1B, Llama-3.2-3B and Llama-3-8B; on a processor, where seconds are processor time on one thread,
only the smallest runs. Cells of a GPU are skipped by name without one. Merges are no part: they compute on the
processor alone, since their rounding must give the same bytes everywhere.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cells
import numpy as np
import refining
from decoders import LLAMA_1B, LLAMA_3B, LLAMA_8B, Decoder

DEVICES = ("cuda", "cpu")
SHAPES = {"1b": LLAMA_1B, "3b": LLAMA_3B, "8b": LLAMA_8B, "tiny": Decoder(32, 64, 2, 96, (4, 2))}
SMALLEST = "1b"
TASKS = ("statistics", "refine PEFT LoRA", "refine lowrank", "refine vblora", "vblora fit", "nola expansion")
_RATIO = 62.5  # of the fits: 1.6 % of the LoRA
_REPEATS = 3


def _statistics(shape: str, device: str) -> dict[str, Any]:
    from lrconvert import api

    model, batches = refining._model(shape), refining._batches(shape)
    api.statistics(model, batches[:1])
    start = refining._now(device)
    api.statistics(model, batches)
    return {"seconds": round(refining._now(device) - start, 4)}


def _lora(shape: str) -> Any:
    """A random LoRA of a shape, with a decaying spectrum."""
    from lrconvert.lora.adapter import LoraAdapter, LoraTarget, Stored, Target

    decoder = SHAPES[shape]
    rng, pairs = np.random.default_rng(0), []
    decay = 0.8 ** np.arange(refining.RANK, dtype=np.float32)[:, None]
    for n in range(decoder.layers):
        for name, (out, inner) in decoder.matrices.items():
            a = rng.standard_normal((refining.RANK, inner), np.float32) * decay
            b = rng.standard_normal((out, refining.RANK), np.float32) * np.float32(0.01)
            target = Target(f"model.layers.{n}.{name}.weight", (out, inner))
            pairs.append(LoraTarget(target, Stored("F32", a), Stored("F32", b), 1.0))
    return LoraAdapter(tuple(sorted(pairs, key=lambda pair: pair.target.name)))


def _fit(shape: str, device: str) -> dict[str, Any]:
    from lrconvert import api

    ratio = 8 if shape == "tiny" else _RATIO
    start = refining._now(device)
    made = api.convert(_lora(shape), "vblora", target_ratio=ratio, device=device)
    seconds = round(refining._now(device) - start, 4)
    return {"seconds": seconds, "captured": round(made.fidelity.captured, 5)}


def _expansion(shape: str, device: str) -> dict[str, Any]:
    import torch

    from lrconvert import api
    from lrconvert.methods import base as methods

    compact = api.convert(_lora(shape), "nola", target_ratio=8 if shape == "tiny" else _RATIO).compact
    method = methods.get(compact.method)
    values = {name: value.to(device) for name, value in methods.values(method, compact, torch).items()}
    times = []
    for _ in range(_REPEATS):
        start = refining._now(device)
        for which in range(len(compact.targets)):
            method.expand(compact.config, compact.targets, values, which, torch)
        times.append(refining._now(device) - start)
    return {"seconds": round(min(times), 4)}


def measured(task: str, shape: str, device: str) -> dict[str, Any]:
    """Measure a cell in this process."""
    batch = (2, 12) if shape == "tiny" else (4, 512)
    refining.MODELS[shape] = refining.Model(SHAPES[shape], batch, device=device)
    if task == "statistics":
        return _statistics(shape, device)
    if task == "vblora fit":
        return _fit(shape, device)
    if task == "nola expansion":
        return _expansion(shape, device)
    form = task.removeprefix("refine ")
    return refining.plain(shape) if form == "PEFT LoRA" else refining.ours(shape, form)


def why_skipped(task: str, shape: str, device: str) -> str:
    """Return why a cell is not measured on this machine; nothing if it is."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return "no GPU"
    if device == "cpu" and shape != SMALLEST and task != "nola expansion":
        return f"on a processor only {SMALLEST} runs"
    return ""


def all_cells(devices: tuple[str, ...] = DEVICES) -> Iterator[cells.Cell]:
    """Yield every cell of real size that this machine measures, and say which it does not: those are not recorded, so
    that another machine measures them."""
    for task in TASKS:
        for shape in SHAPES:
            for device in devices if shape != "tiny" else ():
                name, words = f"{task}, {shape}, {device}", (task, shape, device)
                if why := why_skipped(*words):
                    print(f"{name}: skipped, {why}", flush=True)
                else:
                    yield name, lambda words=words: cells.child(__file__, "--child", *words)


def table() -> str:
    """Return the table: a row for each task and shape, a column for each device."""
    done, rows = cells.read("gpu"), []
    for task in TASKS:
        for shape in [shape for shape in SHAPES if shape != "tiny"]:
            cell = {device: done.get(f"{task}, {shape}, {device}", {}) for device in DEVICES}
            names = [row.get("gpu", "") for row in cell.values() if "gpu" in row]
            rows.append([f"{task}, {shape}", *(_shown(row) for row in cell.values()), ", ".join(names)])
    return cells.markdown(["work, shape", "GPU", "processor, one thread", "which GPU"], rows)


def _shown(row: dict[str, Any]) -> str:
    if "seconds" not in row:
        return row.get("failed", "not run")
    later = f", later epochs {row['again']:.2f} s" if "again" in row else ""
    return f"{row['seconds']:.2f} s{later}"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a pattern that cell names must contain")
    parser.add_argument("--again", action="store_true", help="measure cells that are there, too")
    parser.add_argument("--device", choices=DEVICES, help="the cells of one device alone")
    parser.add_argument("--tiny", action="store_true", help="run every cell at a toy's size; nothing is recorded")
    parser.add_argument("--render", action="store_true", help="write the table and measure nothing")
    arguments = parser.parse_args()
    if arguments.render:
        cells.render("gpu", table())
    elif arguments.tiny:
        for task in TASKS:
            print(f"{task}, tiny", measured(task, "tiny", arguments.device or "cpu"), flush=True)
    else:
        devices = (arguments.device,) if arguments.device else DEVICES
        cells.measure("gpu", all_cells(devices), only=arguments.only, again=arguments.again)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        import torch

        row = measured(*sys.argv[2:])
        name = {"gpu": torch.cuda.get_device_name()} if sys.argv[4] == "cuda" else {}
        print(json.dumps(row | name))
    else:
        main()
