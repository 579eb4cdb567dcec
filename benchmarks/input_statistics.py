"""What input statistics cost, and what they bring.

Collecting them beside a plain forward pass of the same model over the same tokens; and, on the bundled pair, the
answers of refitted adapters with and without them, at equal bytes, on texts that neither the LoRA nor the statistics
have seen.

    python benchmarks/input_statistics.py             measures what is missing, each cell in a process of its own
    python benchmarks/input_statistics.py --render    writes the table of docs/benchmarks.md

Models are random, shaped like Llama-3 with fewer layers; the narrow one keeps most moments exactly, the wide ones
sketch them. Each way runs once unmeasured and three times measured, in turn; the medians count. Memory is the peak
resident size above that of the process with the model loaded and the plain pass done.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import cells

# hidden, intermediate, heads, key-value heads, layers, batch rows, batch length, batches
SHAPES = {
    "512 wide": (512, 1376, 8, 4, 8, 8, 512, 4),
    "2048 wide": (2048, 8192, 32, 8, 4, 4, 512, 2),
    "4096 wide": (4096, 14336, 32, 8, 2, 4, 512, 2),
}

_CHILD = (
    cells.PEAK
    + """
import statistics
import torch, transformers
from lrconvert.live.collect_statistics import collect
hidden, inner, heads, kv, layers, rows, length, count = json.loads(sys.argv[1])
torch.manual_seed(0)
config = transformers.LlamaConfig(
    hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads, num_key_value_heads=kv,
    num_hidden_layers=layers, vocab_size=32000, max_position_embeddings=length,
)
model = transformers.LlamaForCausalLM(config).float().eval().to(sys.argv[2])
batches = [{"input_ids": torch.randint(0, 32000, (rows, length))} for _ in range(count)]

def plain():
    with torch.no_grad():
        for batch in batches:
            model(**{k: v.to(sys.argv[2]) for k, v in batch.items()})
    if sys.argv[2] == "cuda":
        torch.cuda.synchronize()

def ours():
    return collect(model, batches)

plain()
before = peak()
moments = ours()
above = (peak() - before) / 1024
times = {plain: [], ours: []}
for _ in range(3):
    for way in times:
        start = time.perf_counter()
        way()
        times[way].append(time.perf_counter() - start)
tokens = rows * length * count
values = sum(m.matrix.nbytes if m.matrix is not None else m.diagonal.nbytes + (0 if m.rows is None else m.rows.nbytes)
             for m in map(moments.load, range(len(moments.inputs))))
print(json.dumps({
    "plain": tokens / statistics.median(times[plain]), "ours": tokens / statistics.median(times[ours]),
    "above_mib": above, "held_mib": values / 2**20, "inputs": len(moments.inputs),
}))
"""
)


def _cells(device: str) -> Iterator[cells.Cell]:
    for name, shape in SHAPES.items():
        yield f"{name}, {device}", lambda shape=shape: _run(shape, device)


def _run(shape: tuple[int, ...], device: str) -> dict[str, Any]:
    row = cells.child("-c", _CHILD, json.dumps(shape), device)
    return {name: round(value, 1) if isinstance(value, float) else value for name, value in row.items()}


ANSWERS = [(method, ratio) for method in ("lowrank", "vblora") for ratio in (10, 20, 50)]


def _answers(method: str, ratio: int) -> dict[str, Any]:
    """Return the share of the KL distance between base and LoRA that an adapter closes, agreement, captured: without
    statistics, and with them."""
    import tempfile
    from pathlib import Path

    import lrconvert
    from lrconvert import api

    demo = Path(lrconvert.__file__).parent / "demo"
    with tempfile.TemporaryDirectory() as folder:
        measured = api.statistics(demo / "base", demo / "train.jsonl", Path(folder) / "demo.stats")
        lora = api.load_lora(demo / "adapter")
        made = [api.convert(lora, method, target_ratio=ratio, statistics=moments) for moments in (None, measured)]
        files = [done.compact for done in made]
        rows = api.compare(lora, files, statistics=measured, base=demo / "base", data=demo / "heldout.jsonl")
    cell: dict[str, Any] = {"items": rows[0].answers.items}
    for name, done, row in zip(("without", "with"), made, rows, strict=True):
        cell[name] = {
            "bytes": done.sizes.adapter,
            "captured": round(row.captured, 4),
            "output_captured": round(row.output_captured, 4),
            "closed": round(row.answers.closed, 4),
            "agreement": round(row.answers.agreement, 4),
        }
    return cell


def all_cells() -> Iterator[cells.Cell]:
    import torch

    for method, ratio in ANSWERS:
        yield f"answers, {method}, ratio {ratio}", lambda m=method, r=ratio: _answers(m, r)
    yield from _cells("cpu")
    if torch.cuda.is_available():
        yield from _cells("cuda")


def table() -> str:
    done = cells.read("statistics")
    rows = []
    for device in ("cpu", "cuda"):
        for name, shape in SHAPES.items():
            cell = done.get(f"{name}, {device}")
            if cell is None or "failed" in cell:
                rows.append([f"{name}, {shape[4]} layers, {device}", *["not run"] * 3, "", ""])
                continue
            rows.append([
                f"{name}, {shape[4]} layers, {device}", f"{cell['plain']:,.0f}", f"{cell['ours']:,.0f}",
                f"{cell['plain'] / cell['ours']:.2f}x", f"{cell['above_mib']:,.0f} MiB", f"{cell['held_mib']:,.0f} MiB",
            ])  # fmt: skip
    head = ["model", "tokens/s, plain pass", "with statistics", "time", "peak memory above", "moments"]
    return f"{cells.markdown(head, rows)}\n\n{_answer_table(done)}"


def _answer_table(done: dict[str, Any]) -> str:
    rows = []
    for method, ratio in ANSWERS:
        cell = done.get(f"answers, {method}, ratio {ratio}")
        if cell is None:
            rows.append([f"{method}, {ratio} times smaller", *["not run"] * 4, "", ""])
            continue
        one, two = cell["without"], cell["with"]
        rows.append([
            f"{method}, {ratio} times smaller", f"{one['closed']:.1%}", f"{two['closed']:.1%}",
            f"{one['agreement']:.1%}", f"{two['agreement']:.1%}", f"{one['captured']:.3f}", f"{two['captured']:.3f}",
        ])  # fmt: skip
    head = ["bundled pair", "KL closed, without", "with statistics", "agreement, without", "with",
            "captured, without", "with"]  # fmt: skip
    return cells.markdown(head, rows)


if __name__ == "__main__":
    cells.main("statistics", __doc__, all_cells, table)
