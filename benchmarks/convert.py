"""Converters on an adapter shaped like Llama-3-8B rank 16 on all linear layers (42 M numbers), beside PEFT.

    python benchmarks/convert.py             measures what is missing, each cell in a process of its own
    python benchmarks/convert.py --render    writes the table of docs/benchmarks.md

The adapter is random with a decaying spectrum, fp32 as PEFT saves it (168 MB). Time is the clock's, left out where the
machine has other work, beside processor time. Memory is the peak resident size of the whole process above that of the
idle interpreter with the package imported; numba, where a command loads it, is 130 MB of it. Bat reads a base of that
shape, 14 GB of random bf16 weights. PEFT's way from LoRA to a lower rank, `peft.convert_to_lora`, forms every dense
update; it runs on a few modules of the same shapes and is scaled up.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cells
import numpy as np
from decoders import LLAMA_8B

LAYERS, RANK = 32, 16
SHAPES = LLAMA_8B.matrices
CELLS = {
    "lowrank rank 4": ["lora-to-lowrank", "--rank", "4"],
    "lowrank 1.6 %": ["lora-to-lowrank", "--target-ratio", "62.5"],
    "vblora b 256 h 2048 k 2 rank 4": [
        "lora-to-vblora",
        *("--vector-length", "256", "--num-vectors", "2048", "--top-k", "2", "--rank", "4"),
    ],
    "vblora 1.6 %": ["lora-to-vblora", "--target-ratio", "62.5"],
    "nola 1.6 %": ["lora-to-nola", "--target-ratio", "62.5"],
    "nola 10 %": ["lora-to-nola", "--target-ratio", "10"],
    "sbora 1.6 %": ["lora-to-sbora", "--target-ratio", "62.5"],
    "sbora 10 %": ["lora-to-sbora", "--target-ratio", "10"],
    "bone 1.6 %": ["lora-to-bone", "--target-ratio", "62.5"],
    "bone 10 %": ["lora-to-bone", "--target-ratio", "10"],
    "bat 1.6 %, on the base": ["lora-to-bat", "--target-ratio", "62.5", "--base", "BASE"],
    "alora 224 ranks": ["lora-to-alora", "--total-rank", "224"],
}


def make_adapter(folder: Path) -> None:
    """Write the random adapter, as a PEFT folder."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    decay = (0.8 ** np.arange(RANK, dtype=np.float32))[:, None]
    tensors = {}
    for layer in range(LAYERS):
        for name, (out, inner) in SHAPES.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = rng.standard_normal((RANK, inner), np.float32) * decay
            tensors[f"{prefix}.lora_B.weight"] = rng.standard_normal((out, RANK), np.float32) * np.float32(0.01)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(cells.peft_config(RANK, 32, SHAPES))


def make_base(folder: Path) -> Path:
    """Write a base with these layers, a file for each; the weights of all layers are the same."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    torch.manual_seed(0)
    weights = {name: torch.randn(shape).mul_(0.02).bfloat16() for name, shape in SHAPES.items()}
    weight_map = {}
    for layer in range(LAYERS):
        file = f"model-{layer + 1:05}-of-{LAYERS:05}.safetensors"
        named = {f"model.layers.{layer}.{name}.weight": weight for name, weight in weights.items()}
        save_file(named, folder / file)
        weight_map.update(dict.fromkeys(named, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


_RUN = (
    cells.PEAK
    + """
import lrconvert.api, lrconvert.cli
if "vblora" in sys.argv[1]:
    import torch
idle = peak()
start, cpu = time.perf_counter(), time.process_time()
lrconvert.cli.cli.main(args=[*sys.argv[1:], "-q"], standalone_mode=False)
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
measured = {"seconds": seconds, "cpu_seconds": cpu, "peak_mb": (peak() - idle) / 1000}
print(json.dumps({name: round(value, 2 if "seconds" in name else None) for name, value in measured.items()}))
"""
)


def run(adapter: Path, words: list[str]) -> dict[str, Any]:
    """Return time and peak memory of one command, and what its output keeps."""
    from lrconvert import api

    output = adapter / "out.lrc"
    output.unlink(missing_ok=True)
    base = adapter / "base"
    if "BASE" in words and not base.exists():
        make_base(base)
    words = [str(base) if word == "BASE" else word for word in words]
    is_busy = os.getloadavg()[0] > len(os.sched_getaffinity(0)) / 2
    row = cells.child("-c", _RUN, words[0], str(adapter), "-o", str(output), *words[1:])
    if "failed" in row:
        return row
    if is_busy:
        del row["seconds"]
    compact = api.read(output)
    row["adapter_mb"] = round((adapter / "adapter_model.safetensors").stat().st_size / 1e6)
    row["bytes"] = output.stat().st_size
    row["captured"] = float(compact.provenance.fields["captured"])
    return row


_PEFT = """
import json, sys, time, torch, peft
from torch import nn
torch.set_num_threads(2)
class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = {"model_type": "custom"}
        self.q_proj = nn.Linear(4096, 4096, bias=False)
        self.k_proj = nn.Linear(4096, 1024, bias=False)
    def forward(self, x):
        return self.q_proj(x), self.k_proj(x)
config = peft.LoraConfig(r=16, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
model = peft.get_peft_model(Layer(), config)
start = time.perf_counter()
peft.convert_to_lora(model, 4, progressbar=False)
seconds = round(time.perf_counter() - start, 2)
print(json.dumps({"seconds": seconds, "modules": 2, "numbers": 16 * (4096 * 2 + 4096 + 1024)}))
"""


def all_cells() -> Iterator[cells.Cell]:
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder)
        make_adapter(adapter)
        for name, words in CELLS.items():
            yield name, lambda w=words: run(adapter, w)
    yield "peft convert_to_lora rank 4, q and k of one layer", lambda: cells.child("-c", _PEFT)


def table() -> str:
    done = cells.read("convert")
    rows = []
    for name in [*CELLS, "peft convert_to_lora rank 4, q and k of one layer"]:
        cell = done.get(name)
        if cell is None or "failed" in cell:
            rows.append([name, "not run" if cell is None else cell["failed"], "", "", "", ""])
            continue
        times = [f"{cell[key]:.1f} s" if key in cell else "" for key in ("seconds", "cpu_seconds")]
        memory = f"{cell['peak_mb']} MB ({cell['peak_mb'] / cell['adapter_mb']:.1f}x)" if "peak_mb" in cell else ""
        size = f"{cell['bytes']:,}" if "bytes" in cell else ""
        rows.append([name, *times, memory, size, cell.get("captured", "")])
    return cells.markdown(["conversion", "time", "CPU", "peak memory above idle", "bytes", "captured"], rows)


if __name__ == "__main__":
    cells.main("convert", __doc__, all_cells, table)
