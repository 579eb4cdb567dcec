"""How the work grows with the number of targets: every command on adapters of few and of many modules.

    python benchmarks/scale.py            measures what is missing, each command in a process of its own
    python benchmarks/scale.py --render   writes the table of docs/scale.md

The adapters are random, made here, with a decaying spectrum: `COUNTS` small modules as a mixture of experts has them
(rank 4 on 64 x 96), a mixture of experts of 1,152 modules (rank 8 on 256 x 512), and Llama-3-8B's seven linear layers
at rank 16. Processor time is user and system time of the whole process, start of the interpreter included; memory the
peak resident size. ``growth`` is the processor time for a target of 20,000 over that for one of 4,608, above that of
``--version``: 1 is linear.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import cells
import numpy as np
from convert import LAYERS as DEPTH
from convert import SHAPES

from lrconvert.core.dtypes import round_to
from lrconvert.io.container import encode_header

Shapes = Mapping[str, tuple[int, int]]
_SCRATCH = tempfile.TemporaryDirectory()

COUNTS = (224, 4_608, 20_000)
_SMALL, _EXPERT = (64, 96), (256, 512)
METHODS = ("lowrank", "nola", "sbora", "bone")
RATIO = ("--target-ratio", "20")
# IN is the LoRA, LRC the same as lowrank, OUT what is written
COMMANDS = {
    "inspect": ["inspect", "IN"],
    **{name: [f"lora-to-{name}", "IN", "-o", "OUT", *RATIO] for name in METHODS},
    "lowrank --exclude": ["lora-to-lowrank", "IN", "-o", "OUT", *RATIO, "--exclude", r"layers\.0\."],
    "inspect, compact": ["inspect", "LRC"],
    "validate": ["validate", "LRC"],
    "export": ["export", "LRC", "-o", "OUT", "--to", "peft-lora"],
    "compare": ["compare", "IN", "LRC"],
    "check": ["check", "IN", "--for", "all"],
}
RUN = """
from lrconvert.cli import main
try:
    main()
except SystemExit as end:
    if end.code and sys.argv[1] != "check":  # what it finds is not the matter
        raise
print()
print(json.dumps({"cpu_seconds": round(time.process_time(), 2), "peak_mib": peak() // 1024}))
"""


def small(count: int) -> Shapes:
    """`count` modules of equal shapes."""
    layers = max(n for n in range(1, 33) if count % n == 0)
    return {f"model.layers.{n % layers}.mlp.experts.{n // layers}.up_proj": _SMALL for n in range(count)}


def experts() -> Shapes:
    """24 layers of 16 experts with three modules each."""
    out, inner = _EXPERT
    sides = {"gate_proj": (out, inner), "up_proj": (out, inner), "down_proj": (inner, out)}
    return {
        f"model.layers.{layer}.mlp.experts.{expert}.{name}": shape
        for layer in range(24)
        for expert in range(16)
        for name, shape in sides.items()
    }


def dense() -> Shapes:
    return {f"model.layers.{layer}.{name}": shape for layer in range(DEPTH) for name, shape in SHAPES.items()}


ADAPTERS: dict[str, tuple[Callable[[], Shapes], int]] = {
    **{f"{count:,} small": (partial(small, count), 4) for count in COUNTS},
    "1,152 experts": (experts, 8),
    "8B": (dense, 16),
}


def write(folder: Path, shapes: Shapes, rank: int) -> Path:
    """Write a PEFT folder in bf16, tensor after tensor."""
    rng = np.random.default_rng(0)
    decay = (0.8 ** np.arange(rank)).astype(np.float32)
    folder.mkdir(parents=True)
    entries = []
    for module, (out, inner) in shapes.items():
        entries.append((f"base_model.model.{module}.lora_A.weight", "BF16", (rank, inner)))
        entries.append((f"base_model.model.{module}.lora_B.weight", "BF16", (out, rank)))
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(encode_header(entries, {"format": "pt"}))
        for _, dtype, shape in entries:
            scale = decay[:, None] if shape[0] == rank else np.float32(0.01)
            file.write(round_to(rng.standard_normal(shape, np.float32) * scale, dtype).tobytes())
    (folder / "adapter_config.json").write_text(cells.peft_config(rank, rank, shapes))
    return folder


@cache
def source(name: str) -> Path:
    """The adapter, made once."""
    make, rank = ADAPTERS[name]
    return write(Path(_SCRATCH.name) / name / "in", make(), rank)


@cache
def compact(name: str) -> Path:
    """The same as a file of low rank, made once."""
    path = source(name).parent / "in.lrc"
    cells.child("-c", cells.PEAK + RUN, "lora-to-lowrank", str(source(name)), "-o", str(path), *RATIO)
    return path


def measure(name: str, words: Sequence[str]) -> dict[str, Any]:
    """Processor seconds and peak memory of one command on one adapter."""
    with tempfile.TemporaryDirectory() as scratch:
        places: dict[str, Callable[[str], Path]] = {"IN": source, "LRC": compact}
        places["OUT"] = lambda name: Path(scratch) / "out"
        return cells.child("-c", cells.PEAK + RUN, *(str(places[w](name)) if w in places else w for w in words))


def all_cells() -> Iterator[cells.Cell]:
    yield "start", lambda: cells.child("-c", cells.PEAK + RUN, "--version")
    for name in ADAPTERS:
        for command, words in COMMANDS.items():
            yield f"{command}, {name}", partial(measure, name, words)


def table() -> str:
    done = cells.read("scale")
    start = done["start"]["cpu_seconds"] if "start" in done else 0.0
    counts = [f"{count:,} small" for count in COUNTS]
    rows = []
    for command in COMMANDS:
        measured = {name: done.get(f"{command}, {name}", {}) for name in ADAPTERS}
        seconds = {name: cell.get("cpu_seconds") for name, cell in measured.items()}
        growth: Any = "not run"
        few, many = seconds[counts[-2]], seconds[counts[-1]]
        if few and many:
            growth = f"{(many - start) / (few - start) * COUNTS[-2] / COUNTS[-1]:.2f}"
        peak = measured[counts[-1]].get("peak_mib", "not run")
        rows.append([command, *(seconds[name] or "not run" for name in ADAPTERS), growth, peak])
    return cells.markdown(["processor seconds", *ADAPTERS, "growth", f"MiB, {counts[-1]}"], rows)


if __name__ == "__main__":
    cells.main("scale", __doc__, all_cells, table)
