"""What coded payloads bring NOLA, and would bring VB-LoRA. Prints the tables of docs/coded-forms.md, of whole files.

    python benchmarks/coded_forms.py [adapter ...]

NOLA, version 2, is printed beside low rank; version 1 is no longer made, its numbers on the page are of an earlier
commit. For VB-LoRA the codes of today's files are counted: what an ideal coder that knows their frequencies would save,
less 8 bits for each of them.
"""

from __future__ import annotations

import sys

import cells
import numpy as np

from lrconvert import api
from lrconvert.core import errors
from lrconvert.lora.adapter import LoraAdapter

SHARES = (0.08, 0.04, 0.016, 0.008, 0.004)
ADAPTERS = (
    "distilbert_imdb",
    "gemma3_270m_svg_adapter",
    "deltacompression_poc",
    "gpt2_tigrinya",
    "ih_bloom560m_r10",
    "ih_gpt2_r4_a16_biaslora",
    "monteclora_roberta_mrpc_230",
    "mountain_v1_binary",
    "phi1_5_r4",
)
COUNTED = ADAPTERS[:2]  # the search of VB-LoRA takes up to half a minute


def captured(lora: LoraAdapter, method: str, size: int) -> str:
    """Return what a file of at most `size` bytes captures, "-" if there is none."""
    try:
        done = api.convert(lora, method, target_size=size)
    except errors.BudgetError:
        return "-"
    assert done.fidelity is not None
    return f"{done.fidelity.captured:.3f}"


def counted(lora: LoraAdapter, size: int) -> str:
    """Return a table row of what the codes of a VB-LoRA file take, and of what they would as coded."""
    done = api.convert(lora, "vblora", target_size=size)
    assert done.fidelity is not None
    form, indices = done.compact.config.form, done.compact.tensors["indices"].reshape(-1)
    frequencies = np.bincount(indices.astype(np.int64), minlength=form.num_vectors) / len(indices)
    used = frequencies[frequencies > 0]
    entropy = float(-(used * np.log2(used)).sum())
    fixed = max(1, (form.num_vectors - 1).bit_length())
    net = round(len(indices) * (fixed - entropy) / 8) - form.num_vectors
    shape = f"{form.num_vectors} x {form.vector_length}, k = {form.top_k}"
    return f"{done.fidelity.captured:.3f} | {shape} | {fixed} | {entropy:.2f} | {net:,} of {done.sizes.adapter:,}"


def main(names: list[str]) -> None:
    loras = {name: api.load_lora(cells.ASSETS / "adapters" / name) for name in names}
    print("| adapter | " + " | ".join(f"{100 * share:g} %" for share in SHARES) + " |\n" + "|---" * 6 + "|")
    for name, lora in loras.items():
        row = []
        for share in SHARES:
            size = int(lora.half_bytes * share)
            row.append(" / ".join(captured(lora, method, size) for method in ("nola", "lowrank")))
        print(f"| {name} | {' | '.join(row)} |", flush=True)
    print("\n| adapter, share | captured | bank | bits of a code | entropy | bytes saved |\n" + "|---" * 6 + "|")
    for name in [name for name in names if name in COUNTED]:
        for share in SHARES[:4]:
            size = int(loras[name].half_bytes * share)
            print(f"| {name}, {100 * share:g} % | {counted(loras[name], size)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(ADAPTERS))
