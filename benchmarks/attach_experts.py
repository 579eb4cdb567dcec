"""What an adapter on stacks of experts costs a forward pass, beside the same adapter in PEFT, in one run.

    python benchmarks/attach_experts.py            measures what is missing
    python benchmarks/attach_experts.py --render   writes the table of docs/benchmarks.md

A random Qwen3-MoE (two layers, 128 wide, experts of 128) with a rank-8 LoRA on both stacks, by `target_parameters`: the
median time of a pass over 256 tokens on one thread, without an adapter, in PEFT, and with `lrconvert.attach` of the
same files. The passes of the three take turns, so that all see the same machine.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from typing import Any

import cells
import torch

import lrconvert

_COUNTS = (8, 32, 64)
_PASSES = 25


def measure(experts: int, implementation: str) -> dict[str, Any]:
    """Return milliseconds of a pass in each of the three ways, and how far PEFT's answers and ours are apart."""
    import peft

    tokens = torch.randint(0, 64, (2, 128), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        config = peft.LoraConfig(r=8, target_modules=["q_proj"], target_parameters=stacks, init_lora_weights=False)
        models = [_model(experts, implementation) for _ in range(4)]
        peft.get_peft_model(models.pop(), config).save_pretrained(folder)
        models[1] = peft.PeftModel.from_pretrained(models[1], folder).eval()
        lrconvert.attach(models[2], folder)
    times: list[list[float]] = [[], [], []]
    answers: list[Any] = [None] * 3
    for turn in range(_PASSES + 2):
        for n, model in enumerate(models):
            start = time.perf_counter()
            with torch.no_grad():
                answers[n] = model(tokens, use_cache=False).logits
            if turn >= 2:
                times[n].append(1e3 * (time.perf_counter() - start))
    base, theirs, ours = (round(statistics.median(each), 2) for each in times)
    distance = float((answers[2] - answers[1]).norm() / (answers[1] - answers[0]).norm())
    return {"base_ms": base, "peft_ms": theirs, "attach_ms": ours, "distance": distance}


def all_cells() -> Iterator[cells.Cell]:
    for implementation in ("eager", "grouped_mm"):
        for count in _COUNTS:
            yield f"{implementation} {count}", lambda c=count, i=implementation: measure(c, i)


def table() -> str:
    rows = []
    for name, cell in cells.read("attach_experts").items():
        implementation, count = name.split()
        ratio = f"{cell['attach_ms'] / cell['peft_ms']:.2f}x"
        rows.append([f"{count}, {implementation}", cell["base_ms"], cell["peft_ms"], cell["attach_ms"], ratio])
    return cells.markdown(["experts", "base, ms", "PEFT, ms", "attach, ms", "attach / PEFT"], rows)


def _model(experts: int, implementation: str) -> Any:
    """The same random model at every call."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    widths = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128, "vocab_size": 64}
    config = Qwen3MoeConfig(num_hidden_layers=2, num_experts=experts, num_experts_per_tok=4, **heads, **widths)
    config._experts_implementation = implementation
    return Qwen3MoeForCausalLM(config).eval()


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    cells.main("attach_experts", __doc__, all_cells, table)
