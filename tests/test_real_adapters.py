"""Every real PEFT LoRA that is read is converted at two budgets. Skipped, by name, where they are absent."""

from __future__ import annotations

import pytest
from conftest import asset

from lrconvert import api, errors, file
from lrconvert.methods import base as methods

# Smallest captured share that each method reached when this was written, less a little, at 8 % and 4 % of the bytes.
FLOORS = {
    "distilbert_imdb": (0.93, 0.85),
    "gemma3_270m_svg_adapter": (0.72, 0.50),
    "gpt2_tigrinya": (0.93, 0.85),
    "deltacompression_poc": (0.75, 0.65),
}
OTHERS = [
    "monteclora_roberta_mrpc_230",
    "phi1_5_r4",
    "ih_bloom560m_r10",
    "ih_gpt2_r4_a16_biaslora",
    "mountain_v1_binary",
]
SHARES = (0.08, 0.04)


@pytest.mark.parametrize("name", [*FLOORS, *OTHERS])
def test_lowrank(name, tmp_path):
    check(name, "lowrank", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", [m for m in methods.module_names() if m != "lowrank"])
@pytest.mark.parametrize("name", [*FLOORS, *OTHERS])
def test_other_methods(name, method, tmp_path):
    check(name, method, tmp_path)


def check(name: str, method: str, folder) -> None:
    lora = api.load_lora(asset(f"adapters/{name}"))
    for share, floor in zip(SHARES, FLOORS.get(name, (0.0, 0.0)), strict=True):
        limit = int(lora.half_bytes * share)
        done = api.convert(lora, method, target_size=limit)
        assert done.sizes.adapter <= limit and done.fidelity is not None
        assert floor <= done.fidelity.captured <= 1
        path = folder / f"{share}.lrc"
        file.write(done.compact, path)
        assert len(file.read(path).targets) == len(lora.targets)


def test_an_adapter_smaller_than_a_header_says_so():
    lora = api.load_lora(asset("adapters/ih_tinygpt2_r4"))
    with pytest.raises(errors.BudgetError, match="smallest possible"):
        api.convert(lora, "lowrank", target_ratio=10)
    assert api.convert(lora, "lowrank").fidelity.captured > 1 - 1e-6
