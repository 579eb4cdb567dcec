"""Compiled loops (the extra `fast`) beside numpy and torch, in one process, processor time on one core.

    python benchmarks/kernels.py            measures and writes benchmarks/results/kernels.jsonl
    python benchmarks/kernels.py --render   writes the table of docs/kernels.md

Numbers of an adapter shaped like a model of 8 billion at rank 16. Compiling and loading are not counted in the rows;
both have rows of their own. The best of three runs counts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cells
import numpy as np

from lrconvert.kernels import jit

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "kernels.jsonl"
NUMBERS = 1 << 21


def seconds(function: Callable[[], Any]) -> float:
    """The least processor time of three calls after one that compiles."""
    function()
    times = []
    for _ in range(3):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def both(name: str, function: Callable[[], Any], count: int) -> dict[str, Any]:
    """Nanoseconds of `function` for each of `count` numbers, without compiled loops and with them."""
    row: dict[str, Any] = {"name": name}
    jit._LOADING = 0.0
    for key, spec in (("numpy", None), ("numba", True)):
        jit.find_spec = lambda name, spec=spec: spec  # type: ignore
        row[key] = round(1e9 * seconds(function) / count, 2)
    return row


def rows() -> list[dict[str, Any]]:
    """Every kernel, as the functions that call it see it."""
    import torch

    from lrconvert.lora.adapter import MATRIX, Target
    from lrconvert.lora.coded import stream
    from lrconvert.lora.coded.choice import best_models
    from lrconvert.methods.lowrank import rate, rounding
    from lrconvert.methods.lowrank.components import Components, Side
    from lrconvert.methods.vblora.subvectors import beam_search

    rng = np.random.default_rng(0)
    scaled = rng.standard_normal((NUMBERS >> 12, 1 << 12), np.float32) * np.geomspace(0.05, 8, NUMBERS >> 12)[:, None]
    side = Side(scaled.astype(np.float32), np.arange(len(scaled)), 1.0)
    parts = Components(np.zeros(len(scaled)), np.ones(len(scaled)), ((side,), (side,)))
    codes = rounding.integers(side.rows, 1.0)
    lengths = [(int(model), codes.shape[1]) for model in best_models(codes)[0]]
    numbers = codes.reshape(-1)
    data = stream.encode(numbers, lengths)
    measured = [
        both("rounding with models, a number", lambda: rounding.round_all(parts, 1.0), 2 * NUMBERS),
        both("coded integers to bytes, a number", lambda: stream.encode(numbers, lengths), NUMBERS),
        both("coded integers from bytes, a number", lambda: stream.decode(data, lengths), NUMBERS),
    ]
    blocks = rate.blocks([Target("t", (1 << 11, 1 << 11), MATRIX)], [NUMBERS >> 12])
    ranges, latents = rate.Rows.of(blocks), side.rows.reshape(-1)
    models = torch.from_numpy(rate.coded(ranges, latents).models)
    measured += [
        both("rounding of latents with models, a number", lambda: rate.coded(ranges, latents), NUMBERS),
        both("slopes of latents, a number", lambda: rate.slopes(ranges, torch.from_numpy(latents), models), NUMBERS),
    ]
    measured += merging_rows()
    torch.manual_seed(0)
    for b, h, depth, beam in ((2, 16, 3, 20), (8, 256, 2, 5), (16, 512, 3, 5)):
        n = NUMBERS * 8 // (h * beam * depth)
        x, bank, gains = torch.randn(n, b), torch.randn(h, b), torch.rand(n, depth) * 0.6 ** torch.arange(depth)
        previous = torch.zeros(n, depth, dtype=torch.int64)

        def search(x=x, bank=bank, gains=gains, previous=previous, beam=beam) -> Any:  # type: ignore[no-untyped-def]
            return beam_search(x, bank, gains, previous, beam, None, jit.load("beam", 1.0))

        name = f"VB-LoRA's beam search, b {b}, h {h}, {depth} passes, beam {beam}, a score"
        measured.append(both(name, search, n * h * ((depth - 1) * beam + 1)))
    return measured


def merging_rows() -> list[dict[str, Any]]:
    """Rank 16 into random bfloat16, the update some 8 % of the size of the weights."""
    from lrconvert.core.dtypes import round_to
    from lrconvert.merge.arithmetic.exact import Term, Update
    from lrconvert.merge.arithmetic.workspace import Workspace
    from lrconvert.merge.undo import residual

    rng = np.random.default_rng(0)
    shape = (NUMBERS >> 12, 1 << 12)
    base = round_to(rng.standard_normal(shape) * 0.02, "BF16")
    update = Update([Term(2.0, rng.standard_normal((shape[0], 16)) * 0.01, rng.standard_normal((16, shape[1])) * 0.02)])
    merged, predicted, _ = update.add_and_predict(base, "BF16")
    assert predicted is not None
    sides = base.reshape(-1), predicted.reshape(-1), merged.reshape(-1)
    data, mode = residual.encode(*sides)

    def loops() -> Any:
        return jit.load("merging", 1.0)

    with Workspace(1) as workspace:

        def added(function: Callable[..., Any], **options: bool) -> Callable[[], Any]:
            def call() -> None:
                workspace.loops = loops()
                function(base, "BF16", workspace=workspace, **options)

            return call

        return [
            both("merged weights with the product, a weight", added(update.add, measure=False), NUMBERS),
            both("the same with predictions and counts, a weight", added(update.add_and_predict), NUMBERS),
            both("undo code, a weight", lambda: residual.encode(*sides, loops()), NUMBERS),
            both("weights from an undo code, a weight", lambda: restored(data, mode, sides, loops()), NUMBERS),
        ]


def restored(data: bytes, mode: int, sides: tuple[Any, Any, Any], loops: Any) -> Any:
    from lrconvert.merge.undo import residual

    return residual.decode(data, mode, sides[1].copy(), sides[2], loops)


def first_calls() -> list[dict[str, Any]]:
    """Processor seconds in which a process loads a kernel: the first one, which compiles it, and a later one."""
    code = "from lrconvert.kernels import jit\nimport numpy as np\n"
    load = "assert jit.load('rans', 1e9).encode\n"
    clock = "import time; print(time.process_time())\n"
    with TemporaryDirectory() as folder:
        environment = os.environ | {"NUMBA_CACHE_DIR": folder}
        bare = _last(code + clock, environment)
        first, later = (_last(code + load + clock, environment) for _ in range(2))
    return [
        {"name": "loading a kernel, compiled, s", "numba": round(first - bare, 2)},
        {"name": "loading a kernel, from disk, s", "numba": round(later - bare, 2)},
    ]


def _last(code: str, environment: dict[str, str]) -> float:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout)


def table() -> str:
    """Return the table of the page."""
    lines = ["| what | numpy, torch | numba | times |", "|---|---|---|---|"]
    for line in RESULTS.read_text().splitlines():
        row = json.loads(line)
        if "numpy" in row:
            lines.append(
                f"| {row['name']} | {row['numpy']:.1f} ns | {row['numba']:.1f} ns | {row['numpy'] / row['numba']:.1f} |"
            )
        else:
            lines.append(f"| {row['name'].removesuffix(', s')} | | {row['numba']:.2f} s | |")
    return "\n".join(lines)


if __name__ == "__main__":
    if "--render" not in sys.argv:
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in [*rows(), *first_calls()]))
    cells.render("kernels", table())
