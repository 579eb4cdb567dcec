"""PEFT VB-LoRA folders: read without loss, the real PEFT as the oracle."""

from __future__ import annotations

import json

import numpy as np
import peft
import pytest
import torch
from conftest import random_lora
from safetensors.torch import load_file, save_file

from lrconvert import api
from lrconvert.core import errors
from lrconvert.methods import base as methods


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.config = {"model_type": "custom"}
        self.up, self.down = torch.nn.Linear(16, 24), torch.nn.Linear(24, 16)

    def forward(self, x):
        return self.down(self.up(x))


def saved(folder, *, top_k, only_topk):
    """A VB-LoRA of PEFT with random logits; the updates it has by PEFT's own account."""
    torch.manual_seed(0)
    settings = {"r": 3, "num_vectors": 9, "vector_length": 8, "topk": top_k, "vblora_dropout": 0.0}
    config = peft.VBLoRAConfig(target_modules=["up", "down"], save_only_topk_weights=only_topk, **settings)
    model = peft.get_peft_model(Model(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vblora" in name:
                parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(folder)
    layers = model.base_model.model
    return {f"{n}.weight": getattr(layers, n).get_delta_weight("default").detach().double() for n in ("up", "down")}


@pytest.mark.parametrize("only_topk", [True, False])
@pytest.mark.parametrize("top_k", [2, 3])
def test_updates_are_those_of_peft(tmp_path, top_k, only_topk):
    wanted = saved(tmp_path / "vb", top_k=top_k, only_topk=only_topk)
    compact = api.load(tmp_path / "vb")
    api.write(compact, tmp_path / "x.lrc")
    assert {t.name for t in compact.targets} == set(wanted)
    for target, a, b in methods.expand_all(api.read(tmp_path / "x.lrc")):
        error = np.linalg.norm(b.astype(np.float64) @ a - wanted[target.name].numpy())
        assert error < 1e-6 * torch.linalg.norm(wanted[target.name])
    bank = load_file(tmp_path / "vb" / "adapter_model.safetensors")["base_model.vblora_vector_bank"]
    assert np.array_equal(compact.tensors["bank"], bank.numpy())


@pytest.mark.parametrize("top_k", [2, 3])
def test_out_again_is_the_same_file(tmp_path, top_k):
    saved(tmp_path / "vb", top_k=top_k, only_topk=True)
    one = api.load(tmp_path / "vb")
    api.export(one, tmp_path / "again", to="peft-vblora")
    two = api.load(tmp_path / "again")
    assert all(np.array_equal(one.tensors[k], two.tensors[k]) for k in one.tensors) and one.config == two.config


def test_an_export_is_read_back(tmp_path):
    compact = api.convert(random_lora(), "vblora", peft_compatible=True, top_k=2, rank=2).compact
    api.export(compact, tmp_path / "vb", to="peft-vblora")
    again = api.load(tmp_path / "vb")
    for one, two in zip(methods.expand_all(compact), methods.expand_all(again), strict=True):
        assert np.allclose(one[1], two[1], atol=1e-7) and np.allclose(one[2], two[2], atol=1e-7)
    assert "compact adapter" in api.load_lora(tmp_path / "vb").warnings[0]


@pytest.mark.parametrize(
    ("edit", "error"),
    [
        (lambda t, c: t.pop("base_model.vblora_vector_bank"), errors.ShapeError),
        (lambda t, c: t.pop("base_model.model.up.vblora_logits_A_topk_weights"), errors.PairError),
        (lambda t, c: t["base_model.model.up.vblora_logits_A_topk_weights"].fill_(1.5), errors.ValueRangeError),
        (lambda t, c: t["base_model.model.up.vblora_logits_A_topk_indices"].fill_(3), errors.IndexRangeError),
        (lambda t, c: t["base_model.vblora_vector_bank"].fill_(float("nan")), errors.ValueRangeError),
        (lambda t, c: t.update({"base_model.model.up.vblora_odd": torch.ones(1)}), errors.TensorUnknownError),
        (lambda t, c: c.update(r=2), errors.PairError),
        (lambda t, c: c.update(topk="2"), errors.ConfigError),
    ],
)
def test_refusals(tmp_path, edit, error):
    saved(tmp_path, top_k=2, only_topk=True)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    edit(tensors, config)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(error):
        api.load(tmp_path)
