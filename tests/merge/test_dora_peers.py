"""DoRA of LyCORIS, both ways: what its own layers compute after a training is what a merge of its file writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from models import load_all
from peers import oracle

from lrconvert import api

pytestmark = pytest.mark.slow


def test_lycoris_merges_its_dora_as_we_do(tmp_path: Path) -> None:
    oracle.needed("lycoris")
    network = {"algo": "lora", "linear_dim": 3, "linear_alpha": 2, "conv_dim": 2, "conv_alpha": 1, "dora_wd": True}
    folders = [tmp_path / axis for axis in ("outputs", "inputs")]
    jobs = [
        (folder, {"seed": number, "network": {**network, "wd_on_output": folder.name == "outputs"}})
        for number, folder in enumerate(folders)
    ]
    refused = [answer["why"] for answer in oracle.ask("lycoris", jobs) if answer["outcome"] != "loads"]
    assert not refused, refused
    for folder in folders:
        lora = api.load_lora(folder / "lycoris.safetensors", base=folder / "base")
        use = "magnitude" if folder.name == "outputs" else "input_magnitude"
        assert {extra.use for extra in lora.extras} == {use} and len(lora.extras) == len(lora.targets)
        api.merge(folder / "base", [lora], folder / "merged")
        before, after = load_all(folder / "base"), load_all(folder / "merged")
        deltas = dict(np.load(folder / "deltas.npz"))
        assert deltas.keys() == {pair.target.name for pair in lora.targets}
        for name, delta in deltas.items():
            ours = after[name].decode().astype(np.float64) - before[name].decode()
            assert np.abs(ours - delta).max() <= 2e-6 * np.abs(delta).max() + 1e-6
