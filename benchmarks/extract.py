"""Taking a LoRA out of a fine-tuned model, beside mergekit's extraction and the formula of sd-scripts'.

    SMALL=folder LORA=adapter python benchmarks/extract.py     measures what is missing
    python benchmarks/extract.py --render                      writes the table of docs/benchmarks.md

`SMALL` is a model folder (SmolLM2-135M), `LORA` an adapter of it: merged in the model's own bf16, it is the fine-tuned
model; cells that need it are skipped by name without. Every program is a process of its own, on one thread; the seconds
are those of the processor, imports included, as other work may run beside it, and memory is the peak resident size. The
error is computed here, the same way for all, from what each wrote: ||W - W0 - BA|| / ||W - W0|| over all modules.

mergekit (`mergekit-extract-lora`, of the peers' environment) and sd-scripts (`extract_lora_from_models.py`, whose
formula is computed here: the SVD of each difference in float32, U diag(s) and V cut at the 99 % quantile of their
numbers) take all singular values of a difference; lrconvert the ones that it keeps.

The large model is synthetic: matrices of an 8B model, random, in bf16, with a difference of rank 16 and noise. Memory
is that of the matrices that are worked on and of the LoRA; the time of 8B follows from the numbers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cells
import numpy as np
from decoders import LLAMA_8B

sys.path.insert(0, str(cells.ROOT / "tests"))

from peers import make

from lrconvert import api
from lrconvert.core.dtypes import round_to
from lrconvert.io.checkpoint import Checkpoint, open_checkpoint
from lrconvert.io.container import ContainerFile, encode_header

RANK = 16
NUMBERS_8B = 8.03e9
ROWS_OF_HEAD = 32_768  # a quarter of the vocabulary: more than what is kept in memory
WATCHED = """
import resource, sys, json, time
def report(**more):
    used = resource.getrusage(resource.RUSAGE_SELF)
    peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
    print(json.dumps({"processor_seconds": used.ru_utime + used.ru_stime, "peak_kib": peak, **more}))
"""
OURS = (
    WATCHED
    + """
import lrconvert
done = lrconvert.extract(sys.argv[1], sys.argv[2], rank=int(sys.argv[4]))
said = done.relative_error
lrconvert.export(done, sys.argv[3], to="peft-lora", keep_names=True)
report(said_error=said, rounding=done.rounding)
"""
)
MERGEKIT = (
    WATCHED
    + """
sys.path[:0] = [sys.argv[5]]
import run_mergekit
run_mergekit.extract(sys.argv[2], sys.argv[1], sys.argv[3], sys.argv[4])
report()
"""
)
SD_SCRIPTS = (
    WATCHED
    + """
import torch
from safetensors.torch import safe_open, save_file
tuned, base, out, rank = sys.argv[1:3] + [sys.argv[3], int(sys.argv[4])]
one, other = (safe_open(f"{folder}/model.safetensors", "pt") for folder in (tuned, base))
factors = {}
for name in one.keys():
    if name.endswith("proj.weight"):
        difference = one.get_tensor(name).float() - other.get_tensor(name).float()
        u, s, vh = torch.linalg.svd(difference)
        u, vh = u[:, :rank] @ torch.diag(s[:rank]), vh[:rank]
        high = torch.quantile(torch.cat([u.flatten(), vh.flatten()]), 0.99)
        factors[name + ".A"] = vh.clamp(-high, high).contiguous()
        factors[name + ".B"] = u.clamp(-high, high).contiguous()
import os
os.makedirs(out)
save_file(factors, f"{out}/factors.safetensors")
report()
"""
)


def watched(code: str, *words: object) -> dict[str, Any]:
    """Run code in a process of one thread and return what it reports."""
    limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    environment = {**os.environ, **limits, "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(cells.ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:200]}
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def factors_of(folder: Path, base: Checkpoint) -> dict[str, tuple[Any, Any]]:
    """Return A (r, in) and B (out, r) of every module that an extraction wrote, the scale multiplied into B."""
    plain = folder / "factors.safetensors"
    if not plain.exists():
        lora = api.load_lora(folder, base=base.root)
        return {pair.target.name: (pair.A, pair.scale * pair.B) for pair in lora.targets}
    with ContainerFile(plain) as file:
        numbers = {info.name: file.load(info).decode() for info in file.tensors}
    return {name[:-2]: (numbers[name], numbers[f"{name[:-2]}.B"]) for name in numbers if name.endswith(".A")}


def values(checkpoint: Checkpoint, name: str) -> Any:
    return checkpoint.file_of(checkpoint.tensors[name]).load(checkpoint.tensors[name]).decode().astype(np.float64)


def error_of(folder: Path, tuned: Checkpoint, base: Checkpoint) -> dict[str, float]:
    """Return the relative error over the modules that an adapter has, and how many these are."""
    error = energy = 0.0
    pairs = factors_of(folder, base)
    for name, (a, b) in pairs.items():
        if name not in tuned.tensors:
            continue  # mergekit has factors of the tied head, too
        difference = values(tuned, name) - values(base, name)
        error += float(np.sum((difference - b.astype(np.float64) @ a) ** 2))
        energy += float(np.sum(difference**2))
    return {"error": (error / energy) ** 0.5, "modules": len(pairs)}


def small(code: str, *more: str) -> dict[str, Any]:
    """Measure one program on the small model."""
    where, lora = os.environ.get("SMALL"), os.environ.get("LORA")
    if not where or not lora:
        return {"failed": "skipped: SMALL and LORA name the model and an adapter of it"}
    with tempfile.TemporaryDirectory() as scratch:
        merged, out = Path(scratch) / "merged", Path(scratch) / "out"
        api.merge(where, lora, merged, undo=False)
        measured = watched(code, merged, where, out, RANK, *more)
        if "failed" in measured:
            return measured
        with open_checkpoint(merged) as tuned, open_checkpoint(where) as base:
            return {**measured, **error_of(out, tuned, base)}


def large() -> dict[str, Any]:
    """Measure lrconvert on matrices of an 8B model."""
    shapes = {f"model.layers.0.mlp.{n}_proj.weight": LLAMA_8B.matrices[f"mlp.{n}_proj"] for n in ("gate", "down")}
    shapes["lm_head.weight"] = (ROWS_OF_HEAD, LLAMA_8B.hidden)
    count = sum(out * inner for out, inner in shapes.values())
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("base", "tuned"):
            _write_model(Path(scratch) / name, shapes, name == "tuned")
        measured = watched(OURS, Path(scratch) / "tuned", Path(scratch) / "base", Path(scratch) / "out", RANK)
    if "failed" not in measured:
        measured |= {"numbers": count, "seconds_of_8b": round(measured["processor_seconds"] * NUMBERS_8B / count)}
    return measured


def _write_model(folder: Path, shapes: dict[str, tuple[int, int]], is_tuned: bool) -> None:
    """A model of one file, written in rows; tuned: of the same numbers and a difference of rank 16, with noise."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    rng, more = np.random.default_rng(0), np.random.default_rng(1)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(encode_header([(name, "BF16", shape) for name, shape in shapes.items()], {"format": "pt"}))
        for out, inner in shapes.values():
            right = more.standard_normal((16, inner), np.float32)
            for top in range(0, out, 1024):
                rows = min(1024, out - top)
                weight = rng.standard_normal((rows, inner), np.float32) * np.float32(0.02)
                if is_tuned:
                    weight += more.standard_normal((rows, 16), np.float32) @ right * np.float32(5e-4)
                file.write(round_to(weight, "BF16").tobytes())


def all_cells() -> Iterator[cells.Cell]:
    yield "lrconvert", lambda: small(OURS)
    lib = make.environment("mergekit")
    if lib is None:
        print("mergekit: skipped, python tests/peers/make.py mergekit makes its environment")
    else:
        yield "mergekit", lambda: small(MERGEKIT, str(cells.ROOT / "tests" / "peers"))
    yield "the formula of sd-scripts", lambda: small(SD_SCRIPTS)
    yield "matrices of 8B", large


def table() -> str:
    measured = cells.read("extract")
    head = ["rank 16, 210 modules of 135M", "error", "processor s", "peak MB"]
    rows = [
        [name, f"{row['error']:.4f}", f"{row['processor_seconds']:.0f}", f"{row['peak_kib'] * 1.024e-3:.0f}"]
        for name, row in measured.items()
        if "error" in row
    ]
    lines = [cells.markdown(head, rows)] if rows else []
    row = measured.get("matrices of 8B", {"failed": ""})
    if "failed" not in row:
        lines.append(
            f"{row['numbers'] / 1e6:.0f} million numbers of an 8B model's matrices, rank 16: "
            f"{row['processor_seconds']:.0f} s, {row['peak_kib'] * 1.024e-3:.0f} MB at the peak; by the numbers "
            f"{row['seconds_of_8b'] / 60:.0f} minutes of one core for all of 8B."
        )
    return "\n\n".join(lines) or "Not measured yet."


if __name__ == "__main__":
    cells.main("extract", __doc__, all_cells, table)
