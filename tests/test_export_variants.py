"""Every kind of PEFT's LoRA exported again: the real PEFT loads it key by key and computes the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

import peft_oracle as oracle  # noqa: E402
from conftest import random_lora  # noqa: E402
from models import extra, one_target  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from test_reader_variants import CASES, LLAMA, NET, QWEN, inputs  # noqa: E402

from lrconvert import api, errors  # noqa: E402
from lrconvert.adapter import LoraAdapter, Target, View  # noqa: E402
from lrconvert.dtypes import Stored  # noqa: E402
from lrconvert.methods import base as methods  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's


def exported(folder: Path, lora: LoraAdapter, **options: Any) -> Path:
    made = api.convert(lora, "lowrank", bits=16)
    api.export(made.compact, folder, to="peft-lora", **options)
    return folder


def configured(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return value


def loaded(make: Any, folder: Path) -> Any:
    """The model that PEFT loads; fails on keys that are missing or left over, and on shapes."""
    model = peft.get_peft_model(make(), peft.LoraConfig.from_pretrained(folder))
    stored = load_file(folder / "adapter_model.safetensors")
    state = peft.get_peft_model_state_dict(model)
    whole = {name for name in {*stored, *state} if name.endswith("base_layer.weight")}  # embeddings that PEFT may add
    assert set(stored) - whole == set(state) - whole
    assert not peft.set_peft_model_state_dict(model, stored).unexpected_keys
    return model.eval()


def same_parts(one: LoraAdapter, other: LoraAdapter) -> None:
    """Equal targets and extra tensors, the update within the rounding of 16 bits."""
    assert [p.target for p in one.targets] == [p.target for p in other.targets]
    ours, theirs = oracle.deltas(one), oracle.deltas(other)
    for name, delta in theirs.items():
        assert np.linalg.norm(ours[name] - delta) <= 2e-3 * np.linalg.norm(delta), name
    assert [(e.name, e.use) for e in one.extras] == [(e.name, e.use) for e in other.extras]
    for mine, yours in zip(one.extras, other.extras, strict=True):
        assert mine.data == yours.data, mine.name


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("keep_ranks", (False, True))
def test_exports_of_variants(name: str, keep_ranks: bool, tmp_path: Path) -> None:
    make, config, _, _ = CASES[name]
    oracle.train(make, tmp_path / "in", **{"init_lora_weights": False, **config})
    lora = api.load_lora(tmp_path / "in")
    folder = exported(tmp_path / "out", lora, keep_ranks=keep_ranks)
    same_parts(api.load_lora(folder), lora)
    x = inputs(make)
    theirs = oracle.outputs(oracle.peft_model(make, tmp_path / "in"), x)
    assert oracle.difference(oracle.outputs(loaded(make, folder), x), theirs) <= 5e-3
    settings = configured(folder)
    assert bool(settings["rank_pattern"]) <= keep_ranks


@pytest.mark.parametrize("config", ({"use_dora": True}, {"lora_bias": True}), ids=str)
def test_pruned_layers_keep_what_stands_beside_them(config: dict[str, Any], tmp_path: Path) -> None:
    """A target of rank 0 still has its DoRA magnitude, or its bias."""
    oracle.train(NET, tmp_path / "in", target_modules=["lin", "conv1"], **config)
    lora = api.load_lora(tmp_path / "in")
    first, second = lora.targets
    small = replace(first, b=Stored(first.b.dtype, first.b.array * np.float32(1e-6)))
    made = api.convert(replace(lora, targets=(small, second)), "lowrank", target_size=1290).compact
    ranks = methods.get("lowrank").ranks(made.config, made.targets)
    assert ranks[0] == 0 < ranks[1]
    api.export(made, tmp_path / "out", to="peft-lora")
    again = api.load_lora(tmp_path / "out")
    assert [p.target for p in again.targets] == [p.target for p in lora.targets]
    assert not oracle.deltas(again)[first.target.name].any()
    assert [(e.name, e.data) for e in again.extras] == [(e.name, e.data) for e in lora.extras]
    loaded(NET, tmp_path / "out")


def placed(name: str, shape: tuple[int, ...], view: str) -> LoraAdapter:
    return LoraAdapter((one_target(Target(name, shape, View(view))),))


REFUSED = {
    "in rows 12:24": placed("h.0.qkv.weight", (36, 16), "rows:12:24"),
    "in groups": placed("c.weight", (12, 8, 2), "conv:2:2"),
    "for all or none": replace(
        random_lora(), extras=(replace(extra("layers.0.proj.weight", np.ones(24)), use="magnitude"),)
    ),
    "biases of LoRAs": LoraAdapter(
        (*placed("m.embed.weight", (9, 6), "transposed").targets, *placed("m.lin.weight", (4, 6), "matrix").targets),
        (replace(extra("m.lin.bias", np.ones(4)), use="add"),),
    ),
    "is not known": LoraAdapter(
        (*placed("m.first", (4, 6), "matrix").targets, *placed("m.second", (4, 6), "matrix").targets)
    ),
    "stored \\(experts, in, out\\)": placed("m.experts.w", (3, 4, 6), "expert_transposed:1"),
}


@pytest.mark.parametrize("match", REFUSED)
def test_what_peft_cannot_express_is_refused_by_name(match: str, tmp_path: Path) -> None:
    with pytest.raises(errors.ExportError, match=match):
        exported(tmp_path / "out", REFUSED[match])
    assert not (tmp_path / "out").exists()


OTHERS = {
    "no linear layer; PEFT's VB-LoRA has": ({"target_modules": ["emb"]}, {"target_modules": ["conv1"]}),
    "no place for a part": ({"target_modules": ["lin"], "lora_bias": True}, {"target_modules": ["lin"], "bias": "all"}),
}


@pytest.mark.parametrize("match", OTHERS)
def test_what_vblora_of_peft_cannot_express(match: str, tmp_path: Path) -> None:
    for n, config in enumerate(OTHERS[match]):
        oracle.train(NET, tmp_path / str(n), **config)
        lora = api.load_lora(tmp_path / str(n))
        made = api.convert(lora, "vblora", gain="off", vector_length=1, num_vectors=8, top_k=1)
        with pytest.raises(errors.ExportError, match=match):
            api.export(made.compact, tmp_path / "out", to="peft-vblora")


def test_names_are_exact(tmp_path: Path) -> None:
    """Modules are listed in full, so that PEFT's matching by ending takes no others."""
    oracle.train(LLAMA, tmp_path / "in", target_modules=["q_proj"])
    settings = json.loads(
        (exported(tmp_path / "out", api.load_lora(tmp_path / "in")) / "adapter_config.json").read_text()
    )
    assert settings["target_modules"] == ["model.layers.0.self_attn.q_proj"]
    oracle.train(QWEN, tmp_path / "moe", **CASES["experts, bare names"][1])
    settings = json.loads(
        (exported(tmp_path / "two", api.load_lora(tmp_path / "moe")) / "adapter_config.json").read_text()
    )
    assert settings["target_parameters"] == [f"model.layers.0.mlp.experts.{n}" for n in ("down_proj", "gate_up_proj")]
