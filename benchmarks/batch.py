"""Many adapters at once: how many a minute, from a folder, by one and by two processes, and when they are finished.

    python benchmarks/batch.py            measures what is missing
    python benchmarks/batch.py --render   writes the table of docs/benchmarks.md

The adapters are random, made here: rank 16 on the 7 linear layers of each of 8 blocks, 1024 wide, 2.3 million numbers
each, in bf16. ``one by one`` is a command for each adapter, ``again`` the same folder when every output is there.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cells
import numpy as np

from lrconvert.core.dtypes import round_to
from lrconvert.io.container import encode_header

COUNT = 16
RANK, BLOCKS, WIDTH, WIDE = 16, 8, 1024, 2816
LAYERS = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (WIDTH // 4, WIDTH),
    "self_attn.v_proj": (WIDTH // 4, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (WIDE, WIDTH),
    "mlp.up_proj": (WIDE, WIDTH),
    "mlp.down_proj": (WIDTH, WIDE),
}
METHODS = {"lowrank": "lora-to-lowrank", "nola": "lora-to-nola", "vblora": "lora-to-vblora"}
WAYS = {"one by one": [], "--jobs 1": ["--jobs", "1"], "--jobs 2": ["--jobs", "2"]}


def adapter(
    folder: Path, seed: int, rank: int = RANK, blocks: int = BLOCKS, layers: Mapping[str, tuple[int, int]] = LAYERS
) -> Path:
    """Write a PEFT folder with a decaying spectrum."""
    rng = np.random.default_rng(seed)
    decay = (0.8 ** np.arange(rank)).astype(np.float32)
    entries, data = [], []
    for block in range(blocks):
        for layer, (out, inner) in layers.items():
            halves = {
                "A": rng.standard_normal((rank, inner), np.float32) * decay[:, None],
                "B": rng.standard_normal((out, rank), np.float32),
            }
            for half, values in halves.items():
                name = f"base_model.model.model.layers.{block}.{layer}.lora_{half}.weight"
                entries.append((name, "BF16", values.shape))
                data.append(round_to(values, "BF16").tobytes())
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(encode_header(entries, {"format": "pt"}) + b"".join(data))
    (folder / "adapter_config.json").write_text(cells.peft_config(rank, rank, layers))
    return folder


def command(words: Sequence[Any]) -> float:
    """Return the seconds that a command takes. Raises CalledProcessError if it fails."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "lrconvert.cli", *map(str, words), "-q"], check=True, capture_output=True)
    return time.perf_counter() - start


def measure(method: str, way: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        root, out = Path(scratch) / "in", Path(scratch) / "out"
        folders = [adapter(root / f"adapter-{n:03}", n) for n in range(COUNT)]
        if way == "one by one":
            out.mkdir()
            words = [[METHODS[method], f, "-o", out / f"{f.name}.lrc", "--target-ratio", "50"] for f in folders]
            return {"per_minute": round(60 * COUNT / sum(map(command, words)), 1)}
        whole = [METHODS[method], root, "-o", out, "--target-ratio", "50", *WAYS[way]]
        first, again = command(whole), command(whole)
        return {"per_minute": round(60 * COUNT / first, 1), "again_per_minute": round(60 * COUNT / again)}


def all_cells() -> Iterator[cells.Cell]:
    for method in METHODS:
        for way in WAYS:
            yield f"{method} {way}", lambda m=method, w=way: measure(m, w)


def table() -> str:
    done = cells.read("batch")
    rows = []
    for method in METHODS:
        row: list[Any] = [f"{method}, ratio 50"]
        row += [f"{done[c]['per_minute']:,}" if (c := f"{method} {way}") in done else "not run" for way in WAYS]
        last = done.get(f"{method} --jobs 2")
        rows.append([*row, f"{last['again_per_minute']:,}" if last else "not run"])
    return cells.markdown(["adapters per minute", *WAYS, "again, --jobs 2"], rows)


if __name__ == "__main__":
    cells.main("batch", __doc__, all_cells, table)
