"""Every kind of PEFT's LoRA merged into a stored base: as PEFT computes, verified, and undone to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

import peft_oracle as oracle
from conftest import ADAPTERS, BASES
from models import load_all, save_base, tree
from test_reader_variants import CASES, inputs

from lrconvert import api
from lrconvert.api import merge, unmerge, verify
from lrconvert.convert.bake_dora import bake_dora
from lrconvert.core.dtypes import Stored, decode, round_to
from lrconvert.core.errors import LrcError
from lrconvert.io.checkpoint import open_checkpoint
from lrconvert.lora import base_names

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's

UNIT = {"F32": 2.0**-20, "BF16": 2.0**-7}
TOLERANCE = {"F32": 1e-5, "BF16": 0.03}


def save_model(model: Any, folder: Path, dtype: str = "F32") -> Path:
    """A base as the module names it; tied weights once, as transformers stores them."""
    state, seen = {}, set()
    for name, value in model.state_dict().items():
        if value.data_ptr() in seen:
            continue
        seen.add(value.data_ptr())
        state[name] = Stored(dtype, round_to(value.numpy().astype(np.float64), dtype))
    config = getattr(model, "config", None)
    fields = {} if config is None else {k: v for k, v in config.to_dict().items() if k in KEPT}
    if config is not None:
        fields["architectures"] = [type(model).__name__]
    names = sorted(state)
    half = len(names) // 2
    return save_base(folder, [{n: state[n] for n in part} for part in (names[:half], names[half:])], fields)


KEPT = ("model_type", "tie_word_embeddings", "vocab_size")


def loaded_with(folder: Path, make: Any) -> Any:
    """The model with the weights of a folder; weights that are stored apart are not tied."""
    model = make()
    for name, stored in load_all(folder).items():
        oracle._set(model, name, torch.from_numpy(stored.decode().astype(np.float32)).reshape(stored.shape))
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None and "lm_head.weight" not in load_all(folder):
        head.weight = model.get_input_embeddings().weight
    return model.eval()


PHI3 = oracle.transformer("Phi3ForCausalLM")
ALL = {**CASES, "fused layers": (PHI3, {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj", "down_proj"]}, 4, {})}

# PEFT merges an update of one end of a tie into both; the model with the adapter attached is the oracle there.
SPLIT_TIES = {"DoRA, Conv1D", "embedding, tied", "embedding and head, tied", "embedding and head, tied adapters"}


@pytest.mark.medium
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", ("F32", "BF16"))
def test_as_peft_and_back(name: str, dtype: str, tmp_path: Path) -> None:
    make, config, _, _ = ALL[name]
    oracle.train(make, tmp_path / "adapter", **{"init_lora_weights": False, **config})
    base = save_model(make(), tmp_path / "base", dtype)
    lora = api.load_lora(tmp_path / "adapter")
    report = merge(base, [lora], tmp_path / "out")
    assert report.can_undo and report.record

    attached = peft.PeftModel.from_pretrained(loaded_with(base, make), str(tmp_path / "adapter")).eval()
    x = inputs(make)
    expected = oracle.outputs(attached, x)
    assert oracle.difference(oracle.outputs(loaded_with(tmp_path / "out", make), x), expected) <= TOLERANCE[dtype]
    if name not in SPLIT_TIES:
        state = attached.merge_and_unload().state_dict()
        for key, stored in load_all(tmp_path / "out").items():
            goal = state[key].double().numpy()
            assert np.abs(stored.decode() - goal).max() <= UNIT[dtype] * np.abs(goal).max() + 1e-9, key

    assert verify(tmp_path / "out", base, [lora]).ok
    undone = unmerge(tmp_path / "out", tmp_path / "back")
    assert undone.verified and tree(tmp_path / "back") == tree(base)
    assert not (tmp_path / "back" / ".lrconvert").exists()


def test_dora_is_the_stated_formula(tmp_path: Path) -> None:
    """float64 operations in the order of formats/merge-v1.md, one by one."""
    make, config, _, _ = CASES["DoRA, Conv1D"]
    oracle.train(make, tmp_path / "adapter", **config)
    base = save_model(make(), tmp_path / "base")
    lora = api.load_lora(tmp_path / "adapter")
    merge(base, [lora], tmp_path / "out")
    before, after = load_all(base), load_all(tmp_path / "out")
    magnitudes = {e.name: decode(np.frombuffer(e.data, "<f4"), "F32") for e in lora.extras if e.use == "magnitude"}
    for pair in lora.targets:
        weight = before[pair.target.name].decode().astype(np.float64)
        weight = weight.T if pair.target.view.kind == "transposed" else weight
        a, b = pair.A.astype(np.float64), pair.B.astype(np.float64)
        total = b[:, :1] * a[0]
        for j in range(1, pair.rank):
            total = total + b[:, j : j + 1] * a[j]
        v = weight + total * pair.scale
        lanes = np.zeros((v.shape[0], 64))
        for i in range(v.shape[1]):
            lanes[:, i % 64] += v[:, i] * v[:, i]
        while lanes.shape[1] > 1:
            lanes = lanes[:, : lanes.shape[1] // 2] + lanes[:, lanes.shape[1] // 2 :]
        factor = magnitudes[pair.target.name].astype(np.float64) / np.sqrt(lanes[:, 0])
        goal = round_to(v * factor[:, None], "F32")
        merged = after[pair.target.name].array
        assert np.array_equal(goal, merged.T if pair.target.view.kind == "transposed" else merged)


@pytest.mark.parametrize("what", ("two adapters", "scaled", "no bias"))
def test_what_has_no_meaning_is_refused(what: str, tmp_path: Path) -> None:
    from lrconvert.merge import Scaled

    case = "lora_bias" if what == "no bias" else "DoRA"
    make, config, _, _ = CASES[case]
    oracle.train(make, tmp_path / "adapter", **config)
    base = save_model(make(), tmp_path / "base")
    lora = api.load_lora(tmp_path / "adapter")
    inputs = {"two adapters": [lora, lora], "scaled": [Scaled(lora, 0.5)], "no bias": [lora]}[what]
    if what == "no bias":
        stored = {n: s for n, s in load_all(base).items() if not n.endswith("lin.bias")}
        base = save_base(tmp_path / "bare", [stored], {})
    with pytest.raises(LrcError) as caught:
        merge(base, inputs, tmp_path / "out")
    assert caught.value.code == {"two adapters": "E-PLACE", "scaled": "E-OPTION", "no bias": "E-PLACE"}[what]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ("experts, ranks by pattern", "one stack of mixtral"))
def test_experts_that_the_base_stores_one_by_one(name: str, tmp_path: Path) -> None:
    """Checkpoints on the hub hold each expert's layers apart; models since transformers 5 hold stacks of them, and the
    adapters of those too."""
    make, config, _, _ = CASES[name]
    oracle.train(make, tmp_path / "adapter", **{"init_lora_weights": False, **config})
    make().save_pretrained(tmp_path / "base")
    with open_checkpoint(tmp_path / "base") as checkpoint:
        apart = [n for n in checkpoint.tensors if ".experts.2." in n]
        assert len(apart) == 3 and not any(n.endswith("experts.down_proj") for n in checkpoint.tensors)
    report = api.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert set(apart) & {t.name for t in report.tensors}
    x = inputs(make)
    expected = oracle.outputs(oracle.peft_model(make, tmp_path / "adapter"), x)
    merged = oracle.outputs(type(make()).from_pretrained(tmp_path / "out").eval(), x)
    assert oracle.difference(merged, expected) <= 1e-5
    api.unmerge(tmp_path / "out", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(tmp_path / "base")
    made = api.convert(api.load_lora(tmp_path / "adapter"), "lowrank", bits=14, base=tmp_path / "base")
    api.merge(tmp_path / "base", made.compact, tmp_path / "compact")
    merged = oracle.outputs(type(make()).from_pretrained(tmp_path / "compact").eval(), x)
    assert oracle.difference(merged, expected) <= 2e-3


# --- DoRA as a plain LoRA -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("DoRA", "DoRA, Conv1D"))
def test_baked_dora_of_full_rank_is_the_dora(name: str, tmp_path: Path) -> None:
    """With enough rank the plain LoRA merges into the same model; with less, the share that the note states is that of
    the best approximation."""
    make, config, _, _ = CASES[name]
    oracle.train(make, tmp_path / "adapter", **{"init_lora_weights": False, **config})
    base = save_model(make(), tmp_path / "base")
    lora = api.load_lora(tmp_path / "adapter")
    merge(base, [lora], tmp_path / "goal")
    goal, before = load_all(tmp_path / "goal"), load_all(base)
    made = api.convert(lora, "lowrank", bits=15, base=base, bake_dora=64)
    assert not [e for e in made.compact.extras if e.use == "magnitude"]
    assert made.source_bytes == lora.half_bytes and "DoRA baked" in made.warnings[-1]
    merge(base, [made.compact], tmp_path / "out")
    for key, stored in load_all(tmp_path / "out").items():
        assert np.abs(stored.decode() - goal[key].decode()).max() <= 2e-3 * np.abs(goal[key].decode()).max()
    with open_checkpoint(base) as checkpoint:
        baked = bake_dora(base_names.resolve(lora, checkpoint), checkpoint, 2)
    for pair, (key, share) in zip(baked.lora.targets, baked.shares, strict=True):
        delta = goal[key].decode().astype(np.float64) - before[key].decode()
        s = np.linalg.svd(delta.T if pair.target.view.kind == "transposed" else delta.reshape(len(delta), -1))[1]
        assert pair.rank == 2 and share == pytest.approx(np.sum(s[:2] ** 2) / np.sum(s**2), abs=1e-3)


def test_baking_needs_a_base_and_a_dora(tmp_path: Path) -> None:
    lora = api.load_lora(ADAPTERS / "llama-dora")
    with pytest.raises(LrcError, match="base="):
        api.convert(lora, "lowrank", bits=12, bake_dora=4)
    plain = api.load_lora(ADAPTERS / "llama-plain")
    with pytest.raises(LrcError, match="no DoRA magnitudes"):
        api.convert(plain, "lowrank", bits=12, bake_dora=4, base=BASES / "tiny-llama")
