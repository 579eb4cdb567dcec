"""What it takes to expand a NOLA adapter, which happens whenever one is loaded, beside low rank, which has no bases.

    python benchmarks/nola.py             measures what is missing, each cell in a process of its own
    python benchmarks/nola.py --render    writes the table of docs/benchmarks.md

The adapter has the shape of Llama-2-7B on all linear layers: 224 targets, rank 16, 40 million numbers when expanded, of
coefficients that a decoder has read. Version 1 has k = 512 coefficients of 8 bits in each factor, on a basis as long as
the factor. Processor time on one thread.
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

_EXPAND = """
import json, sys, time
import numpy as np
from lrconvert.lora.adapter import CompactAdapter, Target
from lrconvert.methods import base as methods
from lrconvert.methods.lowrank.form import Config as LowRankConfig
from lrconvert.methods.nola import Config
from lrconvert.methods.nola.v1 import Form, complete
shapes, layers, rank, count = json.loads(sys.argv[1])
method, repeats = sys.argv[3], 3
if sys.argv[2] == "torch":
    import torch
    torch.set_num_threads(1)
xp = torch if sys.argv[2] == "torch" else np
names = [(f"model.layers.{n:02d}.{name}.weight", tuple(shape)) for n in range(layers) for name, shape in shapes]
targets = tuple(Target(*name) for name in names)
rng = np.random.default_rng(0)
if method == "nola.v1":
    form = Form("hadamard", "sign", 8, 0)
    config = complete(form, targets, [rank] * len(targets), [(count, count)] * len(targets))
    codes, scales = (spec.shape for spec in methods.get(method).specs(config, targets))
    tensors = {"codes": rng.integers(0, 256, codes, np.uint8), "scales": np.full(scales, 2.0**-20, np.float32)}
else:
    counts, models = (rank,) * len(targets), ((10, 10),) * (rank * len(targets))
    config = Config(counts, models, 0, seed=0) if method == "nola" else LowRankConfig(counts, models, 0)
    numbers = rank * sum(sum(target.matrix_shape) for target in targets)
    codes = rng.integers(-2, 3, numbers, np.int8).astype(np.int32)
    tensors = {"codes": codes, "gains": np.full(len(models), 2.0**-20, np.float32)}
compact = CompactAdapter(method, config, targets, tensors)
times = []
for _ in range(repeats):
    start = time.process_time()
    numbers = sum(a.size if xp is np else a.numel() for _, a, b in methods.expand_all(compact, xp) for a in (a, b))
    times.append(time.process_time() - start)
print(json.dumps({"seconds": round(min(times), 3), "numbers": numbers}))
"""


def _child(method: str, backend: str) -> dict[str, Any]:
    shape = json.dumps([list(SHAPES.items()), LAYERS, RANK, COUNT])
    return cells.child("-c", _EXPAND, shape, backend, method)


CELLS = {
    f"{method}, {backend}": lambda method=method, backend=backend: _child(method, backend)
    for method in ("nola", "lowrank", "nola.v1")
    for backend in ("numpy", "torch")
}


def all_cells() -> Iterator[cells.Cell]:
    yield from CELLS.items()


def table() -> str:
    done = cells.read("nola")
    rows = []
    for name in CELLS:
        cell = done.get(name, {})
        rows.append([name, f"{cell['seconds']:.2f} s" if "seconds" in cell else cell.get("failed", "not run")])
    return cells.markdown(["expand 448 factors", "time"], rows)


if __name__ == "__main__":
    cells.main("nola", __doc__, all_cells, table)
