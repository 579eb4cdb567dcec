"""The cost of loading an adapter of an 8B model to bf16 factors in memory, beside safetensors and the LoRA itself.

    python benchmarks/loading.py             measures what is missing, each cell in a process of its own
    python benchmarks/loading.py --render    writes the table of docs/loading.md

The LoRA is that of `scale.py`: rank 16 on the seven linear layers of Llama-3-8B, random, bf16. Its compact files are
read, every rule checked, expanded, and rounded to bf16, by a process that has loaded one before: imports and tables are
apart, and the file is in the cache of the system. The least of five counts. Processor time is user and system time on
one thread; numbers are those that the file stores, and nanoseconds are for each of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import cells
import scale

RATIOS = {"1.6 %": "62.5", "10 %": "10"}
FORMS = [
    *((method, "1.6 %") for method in ("lowrank", "nola", "vblora", "sbora", "bone")),
    ("lowrank", "10 %"),
    ("nola", "10 %"),
]
PEER = "safetensors, the LoRA"
_MEASURE = """
path, kind = sys.argv[1:]
if kind == "peer":
    from safetensors.torch import load_file
    def load():
        factors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        return sum(factor.numel() for factor in factors.values())
else:
    if kind == "numba":
        import numba
    from lrconvert.api import read
    from lrconvert.core.dtypes import round_to
    from lrconvert.methods.base import expand_all
    def load():
        compact = read(path)
        factors = [round_to(factor, "BF16") for _, a, b in expand_all(compact) for factor in (a, b)]
        return max(tensor.size for tensor in compact.tensors.values())
load()
rows = []
for _ in range(5):
    cpu, wall = time.process_time(), time.perf_counter()
    numbers = load()
    rows.append((time.process_time() - cpu, time.perf_counter() - wall))
least = [min(column) for column in zip(*rows)]
print(json.dumps({"cpu_seconds": round(least[0], 4), "least_wall_seconds": round(least[1], 4), "numbers": numbers}))
"""


@cache
def compact(method: str, share: str) -> Path:
    """The LoRA in a compact form, made once."""
    source = scale.source("8B")
    path = source.parent / f"{method} {share}.lrc"
    words = (f"lora-to-{method}", str(source), "-o", str(path), "--target-ratio", RATIOS[share])
    cells.child("-c", cells.PEAK + scale.RUN, *words)
    return path


def measure(method: str, share: str, kind: str) -> dict[str, Any]:
    path = compact(method, share)
    return {**cells.child("-c", cells.PEAK + _MEASURE, str(path), kind), "bytes": path.stat().st_size}


def peer() -> dict[str, Any]:
    path = scale.source("8B") / "adapter_model.safetensors"
    return {**cells.child("-c", cells.PEAK + _MEASURE, str(path), "peer"), "bytes": path.stat().st_size}


def all_cells() -> Iterator[cells.Cell]:
    yield PEER, peer
    for method, share in FORMS:
        for kind in ("numpy", "numba"):
            yield f"{method} {share}, {kind}", partial(measure, method, share, kind)


def table() -> str:
    done, rows = cells.read("loading"), []
    for name in (PEER, *(f"{method} {share}" for method, share in FORMS)):
        plain, fast = (done.get(f"{name}{kind}", {}) for kind in (("", "") if name == PEER else (", numpy", ", numba")))
        if "cpu_seconds" not in plain or "cpu_seconds" not in fast:
            rows.append([name, *["not run"] * 7])
            continue
        times = [f"{cell[key]:.3f}" for cell in (plain, fast) for key in ("cpu_seconds", "least_wall_seconds")]
        each = f"{1e9 * fast['cpu_seconds'] / fast['numbers']:.1f}"
        rows.append([name, f"{plain['bytes'] / 1e6:.1f} MB", f"{plain['numbers'] / 1e6:.1f} M", *times, each])
    head = ["file", "bytes", "numbers", "CPU s", "wall s", "CPU s, numba", "wall s, numba", "ns a number, numba"]
    return cells.markdown(head, rows)


if __name__ == "__main__":
    cells.main("loading", __doc__, all_cells, table)
