"""What it takes to expand a NOLA adapter, which happens whenever one is loaded: the two families of bases.

    python benchmarks/nola.py             measures what is missing, each cell in a process of its own
    python benchmarks/nola.py --render    writes the README table

The adapter has the shape of Llama-2-7B on all linear layers: 224 targets, rank 16, k = 512 coefficients of 8 bits per
factor, 40 million numbers when expanded. Everything runs on two threads. Dense bases, the paper's way, are expanded for
the four sizes of factors that there are, one of each, and the time is scaled up to all 448. The last rows are what
expanding rests on: drawing the signs and orders of all Hadamard bases, which is what targets of one size could share.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import cells

LAYERS, RANK, COUNT = 32, 16, 512
SHAPES = {
    **{f"self_attn.{name}_proj": (4096, 4096) for name in "qkvo"},
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}

_HEAD = """
import json, sys, time
import numpy as np
import lrconvert.methods.nola as nola
from lrconvert.lora.adapter import CompactAdapter, Target
from lrconvert.methods import base as methods
from lrconvert.methods.nola.form import Config, Form, bases, complete, places
family, shapes, layers, rank, count = json.loads(sys.argv[1])
if sys.argv[2] == "torch":
    import torch
    torch.set_num_threads(2)
xp = torch if sys.argv[2] == "torch" else np
names = [(f"model.layers.{n:02d}.{name}.weight", tuple(shape)) for n in range(layers) for name, shape in shapes]
targets = tuple(Target(*name) for name in names)
form = Form(family, "sign" if family == "hadamard" else "u8", 8, 0)
config = complete(form, targets, [rank] * len(targets), [(count, count)] * len(targets))
rng = np.random.default_rng(0)
codes, scales = (spec.shape for spec in nola.METHOD.specs(config, targets))
tensors = {"codes": rng.integers(0, 256, codes, np.uint8), "scales": np.full(scales, 2.0**-20, np.float32)}
compact = CompactAdapter("nola", config, targets, tensors)
"""

_EXPAND = (
    _HEAD
    + """
times = []
for _ in range(int(sys.argv[3])):
    start = time.perf_counter()
    numbers = sum(a.size if xp is np else a.numel() for _, a, b in methods.expand_all(compact, xp) for a in (a, b))
    times.append(time.perf_counter() - start)
print(json.dumps({"seconds": round(min(times), 3), "numbers": numbers}))
"""
)

_DRAW = (
    _HEAD
    + """
start = time.perf_counter()
for target, place in zip(targets, places(config, targets)):
    for basis in bases(form, target, place):
        basis._signs, basis._order
print(json.dumps({"seconds": round(time.perf_counter() - start, 3)}))
"""
)


def _child(code: str, family: str, layers: int, shapes: list[Any], backend: str, repeats: int) -> dict[str, Any]:
    shape = json.dumps([family, shapes, layers, RANK, COUNT])
    return cells.child("-c", code, shape, backend, str(repeats), two_threads=True)


def hadamard(backend: str) -> dict[str, Any]:
    """Expand all 224 targets."""
    return _child(_EXPAND, "hadamard", LAYERS, list(SHAPES.items()), backend, 3)


def dense(backend: str) -> dict[str, Any]:
    """Expand two targets whose factors have the sizes of all others, scaled up by numbers to draw."""
    cell = _child(_EXPAND, "dense", 1, [("gate", (11008, 4096)), ("down", (4096, 11008))], backend, 1)
    if "failed" in cell:
        return cell
    numbers = LAYERS * sum(RANK * (out + inner) for out, inner in SHAPES.values())
    seconds = cell["seconds"] * numbers / cell["numbers"]
    return {
        "seconds": round(seconds, 1),
        "measured_seconds": cell["seconds"],
        "measured_targets": 2,
        "numbers": numbers,
    }


CELLS = {
    "hadamard, numpy": lambda: hadamard("numpy"),
    "hadamard, torch": lambda: hadamard("torch"),
    "dense u8, numpy (from 2 of 224 targets)": lambda: dense("numpy"),
    "dense u8, torch (from 2 of 224 targets)": lambda: dense("torch"),
    "hadamard, only signs and orders": lambda: _child(_DRAW, "hadamard", LAYERS, list(SHAPES.items()), "numpy", 1),
}


def all_cells() -> Iterator[cells.Cell]:
    yield from CELLS.items()


def table() -> str:
    done = cells.read("nola")
    rows = []
    for name in CELLS:
        cell = done.get(name, {})
        rows.append([name, f"{cell['seconds']:.2f} s" if "seconds" in cell else cell.get("failed", "not run")])
    return cells.markdown(["expand 448 factors, k = 512", "time"], rows)


if __name__ == "__main__":
    cells.main("nola", __doc__, all_cells, table)
