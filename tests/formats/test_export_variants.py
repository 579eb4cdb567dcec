"""Every kind of PEFT's LoRA exported again: the real PEFT loads it key by key and computes the same."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

import peft_oracle as oracle
from conftest import random_lora
from models import extra, one_target
from peft_oracle import Maker, seeded
from safetensors.torch import load_file
from test_reader_variants import CASES, LLAMA, NET, QWEN, inputs
from torch import nn

from lrconvert import api
from lrconvert.core import errors
from lrconvert.core.dtypes import Stored
from lrconvert.lora.adapter import CompactAdapter, ExtraTensor, LoraAdapter, LoraTarget, Target, Use, View
from lrconvert.methods import base as methods

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.medium]  # PEFT warns


def exported(folder: Path, lora: LoraAdapter, **options: Any) -> Path:
    api.export(converted(lora), folder, to="peft-lora", **options)
    return folder


def converted(lora: LoraAdapter) -> CompactAdapter:
    return api.convert(lora, "lowrank", bits=14).compact


def expanded(compact: CompactAdapter) -> LoraAdapter:
    """The payload as it is, without any rounding."""
    pairs = [
        LoraTarget(target, Stored("F32", np.ascontiguousarray(a)), Stored("F32", np.ascontiguousarray(b)), 1.0)
        for target, a, b in methods.expand_all(compact)
    ]
    return LoraAdapter(tuple(pairs), compact.extras)


def configured(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return value


def loaded(make: Maker, folder: Path) -> Any:
    """The model that PEFT loads; fails on keys that are missing or left over, and on shapes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = oracle.peft_model(make, folder)
    assert not [line for line in map(str, (w.message for w in caught)) if re.search("missing|unexpected", line)]
    stored = load_file(folder / "adapter_model.safetensors")
    state = peft.get_peft_model_state_dict(model)
    whole = {name for name in {*stored, *state} if name.endswith("base_layer.weight")}  # embeddings that PEFT may add
    assert set(stored) - whole == set(state) - whole
    return model


def same_parts(one: LoraAdapter, other: LoraAdapter, bound: float) -> None:
    """Equal targets and extra tensors, and updates within `bound`."""
    assert [p.target for p in one.targets] == [p.target for p in other.targets]
    ours, theirs = oracle.deltas(one), oracle.deltas(other)
    for name, delta in theirs.items():
        assert np.linalg.norm(ours[name] - delta) <= bound * np.linalg.norm(delta), name
    assert one.extras == other.extras


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("keep_ranks", (False, True))
def test_exports_of_variants(name: str, keep_ranks: bool, tmp_path: Path) -> None:
    """Of the payload, exactly; of the source, within what its 16 bits round."""
    make, config, _, _ = CASES[name]
    oracle.train(make, tmp_path / "in", **{"init_lora_weights": False, **config})
    lora = api.load_lora(tmp_path / "in")
    compact = converted(lora)
    api.export(compact, folder := tmp_path / "out", to="peft-lora", keep_ranks=keep_ranks)
    again, exact = api.load_lora(folder), expanded(compact)
    same_parts(again, exact, 0)
    same_parts(again, lora, 2e-3)
    x = inputs(make)
    outputs = oracle.outputs(loaded(make, folder), x)
    assert oracle.difference(outputs, oracle.outputs(oracle.merged(exact, make()), x)) <= 1e-5
    assert oracle.difference(outputs, oracle.outputs(oracle.peft_model(make, tmp_path / "in"), x)) <= 5e-3
    settings = configured(folder)
    ranks = {p.rank for p in exact.targets}
    assert bool(settings["rank_pattern"]) == (keep_ranks and len(ranks) > 1)
    assert not api.check(folder, ("peft",))


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


class Alike(nn.Module):
    """Modules whose names end with those of others."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.head = nn.Linear(6, 6), nn.Linear(6, 6)
        self.block = nn.ModuleDict({"lin": nn.Linear(6, 6), "head": nn.Linear(6, 6)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.lin, self.block["lin"], self.head, self.block["head"]):
            x = layer(x).tanh()
        return x


ALIKE = seeded(Alike)


@pytest.mark.parametrize(("pattern", "wanted"), ((["^lin", 2], "^lin"), (["^block.lin", 2], "block.lin")))
def test_ranks_of_modules_whose_names_end_alike(pattern: list[Any], wanted: str, tmp_path: Path) -> None:
    """PEFT matches a key of rank_pattern to the end of a name."""
    oracle.train(ALIKE, tmp_path / "in", target_modules=["lin"], rank_pattern=dict([pattern]))
    lora = api.load_lora(tmp_path / "in")
    folder = exported(tmp_path / "out", lora, keep_ranks=True)
    assert configured(folder)["rank_pattern"] == configured(folder)["alpha_pattern"] == {wanted: 2}
    loaded(ALIKE, folder)
    assert [p.rank for p in api.load_lora(folder).targets] == [p.rank for p in lora.targets]


def test_a_pruned_module_that_peft_would_adapt_all_the_same(tmp_path: Path) -> None:
    """`block.lin` ends with `lin`, so it is written with zeros; `lin` alone may be left out."""
    oracle.train(ALIKE, tmp_path / "in", target_modules=["lin"])
    lora = api.load_lora(tmp_path / "in")
    for which, wanted in ((0, ["block.lin", "lin"]), (1, ["block.lin"])):
        pairs = list(lora.targets)
        pairs[which] = replace(pairs[which], b=Stored("F32", pairs[which].b.array * np.float32(1e-6)))
        made = api.convert(replace(lora, targets=tuple(pairs)), "lowrank", target_size=1250).compact
        assert [r == 0 for r in methods.get("lowrank").ranks(made.config, made.targets)] == [which == 0, which == 1]
        api.export(made, folder := tmp_path / str(which), to="peft-lora")
        assert configured(folder)["target_modules"] == wanted
        loaded(ALIKE, folder)


def placed(name: str, shape: tuple[int, ...], view: str) -> LoraAdapter:
    return LoraAdapter((one_target(Target(name, shape, View(view))),))


def trained(use: Use, *names: str) -> tuple[ExtraTensor, ...]:
    return tuple(replace(extra(name, np.ones(4)), use=use) for name in names)


LINEAR = placed("m.lin.weight", (4, 6), "matrix")
STACK = placed("m.experts.w", (3, 4, 6), "expert:0")
REFUSED = {
    "rows:12:24": placed("h.0.qkv.weight", (36, 16), "rows:12:24"),
    "in groups": placed("c.weight", (12, 8, 2), "conv:2:2"),
    "for all or none": replace(
        random_lora(), extras=(replace(extra("layers.0.proj.weight", np.ones(24)), use="magnitude"),)
    ),
    "is an embedding, which cannot be in one adapter with biases of LoRAs": LoraAdapter(
        (*placed("m.embed.weight", (9, 6), "transposed").targets, *LINEAR.targets), trained("add", "m.lin.bias")
    ),
    "'m.experts.w' cannot be in one adapter with biases of LoRAs": LoraAdapter(
        (*STACK.targets, *LINEAR.targets), trained("add", "m.lin.bias")
    ),
    "'m.experts.w' cannot be in one adapter with layers that are stored transposed": LoraAdapter(
        (*STACK.targets, *placed("m.lin.weight", (6, 4), "transposed").targets)
    ),
    "DoRA magnitudes cannot be in one adapter with biases": replace(
        LINEAR, extras=(*trained("add", "m.lin.bias"), *trained("magnitude", "m.lin.weight"))
    ),
    "update of 'm.other', which has no factors": replace(LINEAR, extras=trained("add", "m.other.bias")),
    "factors and trained rows": replace(
        placed("m.embed.weight", (9, 4), "transposed"),
        extras=(
            ExtraTensor("m.embed.weight", "I64", (1,), bytes(8), "row_indices"),
            replace(extra("m.embed.weight", np.ones((1, 4))), use="rows"),
        ),
    ),
    "'block.head' has an update, and PEFT would save it whole": replace(
        placed("block.head.weight", (4, 6), "matrix"), extras=(extra("head.weight", np.ones((4, 6))),)
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


VBLORA = {"gain": "off", "vector_length": 1, "num_vectors": 8, "top_k": 1}
OTHERS = {
    "no linear layer; PEFT's VB-LoRA has": ({"target_modules": ["emb"]}, {"target_modules": ["conv1"]}),
    "no place for a part": (
        {"target_modules": ["lin"], "lora_bias": True},
        {"target_modules": ["lin"], "use_dora": True},
        {"target_modules": ["lin"], "trainable_token_indices": {"emb": [1, 3]}},
    ),
}


@pytest.mark.parametrize("match", OTHERS)
def test_what_vblora_of_peft_cannot_express(match: str, tmp_path: Path) -> None:
    for n, config in enumerate(OTHERS[match]):
        oracle.train(NET, tmp_path / str(n), **config)
        made = api.convert(api.load_lora(tmp_path / str(n)), "vblora", **VBLORA)
        with pytest.raises(errors.ExportError, match=match):
            api.export(made.compact, tmp_path / "out", to="peft-vblora")


@pytest.mark.parametrize(
    ("config", "bias", "saved"),
    (
        ({"target_modules": ["lin"], "bias": "all"}, "all", None),
        ({"target_modules": ["lin"], "bias": "lora_only"}, "vblora_only", None),
        ({"target_modules": ["head"], "modules_to_save": ["lin"]}, "none", ["lin"]),  # with its bias
    ),
    ids=str,
)
def test_vblora_of_peft_has_biases_and_whole_modules(
    config: dict[str, Any], bias: str, saved: list[str] | None, tmp_path: Path
) -> None:
    oracle.train(NET, tmp_path / "in", **{"init_lora_weights": False, **config})
    made = api.convert(api.load_lora(tmp_path / "in"), "vblora", **VBLORA).compact
    api.export(made, tmp_path / "out", to="peft-vblora")
    settings = configured(tmp_path / "out")
    assert (settings["bias"], settings["modules_to_save"]) == (bias, saved)
    x = inputs(NET)
    ours = oracle.outputs(oracle.merged(expanded(made), NET()), x)
    assert oracle.difference(ours, oracle.outputs(NET(), x)) > 0.1
    assert oracle.difference(oracle.outputs(loaded(NET, tmp_path / "out"), x), ours) <= 1e-5


def test_names_are_exact(tmp_path: Path) -> None:
    """Modules are listed in full, so that PEFT's matching by ending takes no others."""
    oracle.train(LLAMA, tmp_path / "in", target_modules=["q_proj"])
    settings = configured(exported(tmp_path / "out", api.load_lora(tmp_path / "in")))
    assert settings["target_modules"] == ["model.layers.0.self_attn.q_proj"]
    oracle.train(QWEN, tmp_path / "moe", **CASES["experts, bare names"][1])
    settings = configured(exported(tmp_path / "two", api.load_lora(tmp_path / "moe")))
    assert settings["target_parameters"] == [f"model.layers.0.mlp.experts.{n}" for n in ("down_proj", "gate_up_proj")]
