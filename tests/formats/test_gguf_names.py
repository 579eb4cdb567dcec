"""llama.cpp's names and orders of rows, for every family that is claimed: against its own ``gguf`` package and its own
converter (peers: skipped by name without their environment), and there and back through our exporter and reader."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from conftest import dense
from models import one_target
from peers import oracle
from test_base_names import make_base

from lrconvert import api
from lrconvert.core import errors
from lrconvert.formats import gguf_names
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter, Target, View
from lrconvert.methods import base as methods
from lrconvert.testing.layouts import Known, gguf

WIDTH, HEADS, KV, WIDE, TOKENS = 64, 8, 4, 96, 128
CONFIG: dict[str, Any] = {
    "hidden_size": WIDTH, "n_embd": WIDTH, "n_embed": WIDTH, "intermediate_size": WIDE, "num_hidden_layers": 2,
    "n_layer": 2, "num_attention_heads": HEADS, "n_head": HEADS, "num_key_value_heads": KV, "vocab_size": TOKENS,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "num_experts": 4,
    "num_local_experts": 4, "rope_theta": 1e4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8,
    "num_kv_heads": KV, "new_decoder_architecture": True, "layer_norm_epsilon": 1e-5,
}  # fmt: skip
FAMILIES = gguf_names.FAMILIES
# What the converter cannot do for an adapter; the tables and our own way back are checked for these as well.
NO_CONVERTER = {
    "GPT2LMHeadModel": "it swaps the factors of Conv1D layers",
    "Ministral3ForCausalLM": "it sets out to write the base",
    "Mistral3ForConditionalGeneration": "it sets out to write the base",
}


def gguf_package() -> Any:
    sys.path.insert(0, str(oracle.needed("llamacpp") / "gguf-py"))
    try:
        import gguf  # type: ignore[import-not-found,unused-ignore]
    finally:
        sys.path.pop(0)
    return gguf


def rows_of(leaf: str, order: str | None) -> int:
    if order == gguf_names.GATHERED:
        return 3 * WIDTH
    if order == gguf_names.GROUPED:
        return WIDTH // HEADS * (HEADS + 2 * KV)
    return {"attn_k": WIDTH // HEADS * KV, "attn_v": WIDTH // HEADS * KV}.get(leaf, WIDTH)


def targets_of(name: str, unadapted: bool = False) -> tuple[Target, ...]:
    """Every layer of the last block, the shapes as the rows need them, and the whole-model modules; with `unadapted`
    those whose LoRA llama.cpp leaves out."""
    family = FAMILIES[name]
    targets = [
        Target(f"{family.stems[0]}1.{layer}.weight", (rows_of(leaf, family.rows.get(leaf)), WIDTH))
        for layer, leaf in family.layers.items()
    ]
    for module, theirs in list(family.whole.items()):
        if list(family.whole.values()).index(theirs) == list(family.whole).index(module):  # the first of its meaning
            embedding = theirs == "token_embd"
            targets.append(Target(f"{module}.weight", (TOKENS, WIDTH), View("transposed" if embedding else "matrix")))
    named = ((target, family.named(target.name.removesuffix(".weight")) or "") for target in targets)
    return tuple(sorted(target for target, theirs in named if family.is_adapted(theirs) != unadapted))


@functools.cache
def adapter(name: str) -> CompactAdapter:
    pairs = tuple(one_target(target, rank=3, seed=n) for n, target in enumerate(targets_of(name)))
    return api.convert(LoraAdapter(pairs), "lowrank", bits=14).compact


def base_of(name: str, folder: Path) -> Path:
    """A base of these names, its headers and config.json."""
    family = FAMILIES[name]
    config = {**CONFIG, "model_type": family.kind, "architectures": [name]}
    return make_base(folder, {target.name: target.shape for target in targets_of(name)}, config)


@pytest.mark.parametrize("name", FAMILIES)
def test_names_are_those_of_the_gguf_package(name: str) -> None:
    gguf = gguf_package()
    family = FAMILIES[name]
    (arch,) = [key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == family.id]
    table = gguf.get_tensor_name_map(arch, 2)
    for target in (*targets_of(name), *targets_of(name, unadapted=True)):
        module = target.name.removesuffix(".weight")
        # What llama.cpp's converter takes out of a name before it asks its table.
        asked = module.replace("language_model.", "")
        if family.id == "bloom":
            asked = asked.replace("transformer.", "")
        assert family.named(module) == table.get_name(asked, try_suffixes=(".weight",)), module
        assert module in family.modules(family.named(module) or "")
    for leaf in family.layers.values():
        assert f"blk.{{bid}}.{leaf}" in {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[arch]}


@pytest.mark.parametrize("name", FAMILIES)
def test_out_and_in_again(name: str, tmp_path: Path) -> None:
    """What is exported for a base is the same update when it is read on that base."""
    base = base_of(name, tmp_path / "base")
    api.export(adapter(name), tmp_path / "out", to="gguf", base=base)
    again = {pair.target.name: dense(pair) for pair in api.load_lora(tmp_path / "out", base=base).targets}
    wanted = {target.name: b.astype(np.float64) @ a for target, a, b in methods.expand_all(adapter(name))}
    assert set(again) == set(wanted)
    for target, delta in wanted.items():
        np.testing.assert_allclose(again[target], delta, rtol=1e-6, atol=1e-9, err_msg=target)


@pytest.mark.slow
def test_the_converter_of_llamacpp_makes_the_same(tmp_path: Path) -> None:
    """Tensor by tensor, bit by bit, and the same fields, for every family."""
    oracle.needed("llamacpp")
    jobs: list[tuple[Path, dict[str, Any]]] = []
    names = [name for name in FAMILIES if name not in NO_CONVERTER]
    for name in names:
        base = base_of(name, tmp_path / f"{name} base")
        api.export(adapter(name), tmp_path / f"{name} peft", to="peft-lora")
        api.export(adapter(name), tmp_path / f"{name} ours", to="gguf", base=base)
        written = str(tmp_path / f"{name} ours" / "adapter.gguf")
        options = {"base": str(base), "outtype": "f32"}
        jobs.append((tmp_path / f"{name} peft", {**options, "out": str(tmp_path / f"{name} 1.npz")}))
        jobs.append((tmp_path, {**options, "out": str(tmp_path / f"{name} 2.npz"), "written": written}))
    answers = oracle.ask("llamacpp", jobs)
    wrong = {}
    for n, name in enumerate(names):
        theirs, ours = answers[2 * n : 2 * n + 2]
        assert ours["outcome"] == "loads"
        if theirs["outcome"] != "loads":
            wrong[name] = theirs["why"]
            continue
        wanted, written = (dict(np.load(tmp_path / f"{name} {k}.npz")) for k in (1, 2))
        odd = sorted(set(written) ^ set(wanted))
        odd += [key for key in wanted if key in written and not np.array_equal(written[key], wanted[key])]
        odd += [key for key in oracle.GGUF_FIELDS if ours["fields"][key] != theirs["fields"][key]]
        if odd:
            wrong[name] = str(odd)
    assert not wrong


def test_orders_of_rows() -> None:
    """By hand: two heads of four numbers, whose halves become pairs; two heads of one query, key and value each."""
    config = {"num_attention_heads": 2, "num_key_value_heads": 1}
    assert gguf_names.row_order(gguf_names.QUERIES, 8, config).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert gguf_names.row_order(gguf_names.KEYS, 4, config).tolist() == [0, 2, 1, 3]
    assert gguf_names.row_order(gguf_names.GATHERED, 6, {"n_head": 2}).tolist() == [0, 3, 1, 4, 2, 5]
    assert gguf_names.row_order(gguf_names.KEYS, 4, {"text_config": config}).tolist() == [0, 2, 1, 3]
    for broken in ({}, {"num_attention_heads": True}, {"num_attention_heads": 0}, {"num_attention_heads": "8"}):
        with pytest.raises(errors.ConfigError, match="heads"):
            gguf_names.row_order(gguf_names.QUERIES, 8, broken)
    falcon = {"num_attention_heads": 4, "num_kv_heads": 2, "new_decoder_architecture": True}
    assert gguf_names.row_order(gguf_names.GROUPED, 8, falcon).tolist() == [0, 1, 4, 5, 2, 6, 3, 7]
    older = {"n_head": 2, "multi_query": True, "num_kv_heads": 2}
    assert gguf_names.row_order(gguf_names.GROUPED, 4, older).tolist() == [0, 1, 2, 3]
    with pytest.raises(errors.ConfigError, match="4 heads, 3 of them of keys"):
        gguf_names.row_order(gguf_names.GROUPED, 8, {**falcon, "num_kv_heads": 3})
    with pytest.raises(errors.ConfigError, match="do not divide 9"):
        gguf_names.row_order(gguf_names.QUERIES, 9, config)


def test_families_are_told_by_class_or_kind() -> None:
    family_of = gguf_names.family_of
    assert family_of({"architectures": ["Olmo3ForCausalLM"], "model_type": "llama"}) is FAMILIES["Olmo3ForCausalLM"]
    assert family_of({"model_type": "stablelm"}) is FAMILIES["StableLmForCausalLM"]
    assert family_of({"model_type": "bert"}) is None and family_of({"architectures": ["X"]}) is None
    kinds = [family.kind for family in FAMILIES.values()]
    assert len(set(kinds)) == len(kinds)


def test_models_with_eyes(tmp_path: Path) -> None:
    """The decoder's level has one of two names in transformers, which llama.cpp leaves out; the eyes are refused."""
    base = base_of("Qwen2_5_VLForConditionalGeneration", tmp_path / "base")
    pair = one_target(Target("model.visual.blocks.0.attn.qkv.weight", (8, 8)), 2)
    seen = api.convert(LoraAdapter((pair,)), "lowrank", bits=12).compact
    with pytest.raises(errors.ExportError, match="takes no LoRA on"):
        api.export(seen, tmp_path / "out", to="gguf", base=base)
    family = FAMILIES["Gemma3ForConditionalGeneration"]
    for stem in ("model.language_model.layers.7", "language_model.model.layers.7", "model.layers.7"):
        assert family.named(f"{stem}.self_attn.q_proj") == "blk.7.attn_q"
        assert f"{stem}.self_attn.q_proj" in family.modules("blk.7.attn_q")


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.unadapted])
def test_layers_that_llamacpp_computes_without(name: str, tmp_path: Path) -> None:
    """A LoRA on one of them is refused by the exporter, and `check` says so of what llama.cpp's own converter makes,
    before and after."""
    base = base_of(name, tmp_path / "base")
    targets = targets_of(name, unadapted=True)
    assert len(targets) >= 3
    for target in targets:
        compact = api.convert(LoraAdapter((one_target(target, 2),)), "lowrank", bits=12).compact
        with pytest.raises(errors.ExportError, match="computes without it"):
            api.export(compact, tmp_path / "out", to="gguf", base=base)
    pairs = tuple(one_target(target, rank=2) for target in (targets[0], targets_of(name)[0]))
    api.export(LoraAdapter(pairs), tmp_path / "peft", to="peft-lora")
    (found,) = [one for one in api.check(tmp_path / "peft", ("llamacpp",), base=base) if "left out" in one.what]
    module = targets[0].name.removesuffix(".weight")
    assert found.severity == "wrong" and module in found.what
    known = Known(FAMILIES[name].named(module) or "", np.ones((2, 4), "<f4"), np.ones((4, 2), "<f4"), 2.0)
    (tmp_path / "theirs.gguf").write_bytes(gguf([known], FAMILIES[name].id)["lora.gguf"])
    assert any("left out" in one.what for one in api.check(tmp_path / "theirs.gguf", ("llamacpp",)))


EXPERTS_OF = [
    "MixtralForCausalLM",
    "GptOssForCausalLM",
    "Qwen3MoeForCausalLM",
    "Llama4ForCausalLM",
    "Glm4MoeForCausalLM",
]


@pytest.mark.parametrize("name", EXPERTS_OF)
@pytest.mark.parametrize("stacked", [True, False])
def test_experts_out_and_in_again(name: str, stacked: bool, tmp_path: Path) -> None:
    """Stacks of three dimensions, gates and ups apart, from a stack of transformers or from modules of their own; an
    expert without an update has zeros, and is none when it is read."""
    family = FAMILIES[name]
    spelled = [layer for layer in family.experts if ("*" in layer) != stacked]
    if not spelled:
        pytest.skip("this family has stacks alone")
    kind = "expert_transposed" if name in ("GptOssForCausalLM", "Llama4ForCausalLM") else "expert"
    targets, shapes = [], {}
    for layer in spelled:
        for number in range(4):
            out = 2 * WIDE if "gate_up" in layer else WIDTH if layer.endswith(("down_proj", "w2")) else WIDE
            inner = WIDE if out == WIDTH else WIDTH
            module = f"model.layers.1.{layer.replace('*', str(number))}"
            shape = (4, inner, out) if kind == "expert_transposed" else (4, out, inner)
            target = (
                Target(module, shape, View(f"{kind}:{number}")) if stacked else Target(f"{module}.weight", (out, inner))
            )
            targets += [target] if number in (1, 3) else []
            shapes[target.name] = target.shape
    config = {**CONFIG, "model_type": family.kind, "architectures": [name]}
    base = make_base(tmp_path / "base", shapes, config)
    lora = LoraAdapter(tuple(one_target(target, rank=3, seed=n) for n, target in enumerate(sorted(targets))))
    api.export(lora, tmp_path / "out", to="gguf", base=base, keep_names=True)
    again = {(p.target.name, p.target.view.text): dense(p) for p in api.load_lora(tmp_path / "out", base=base).targets}
    assert again.keys() == {(pair.target.name, pair.target.view.text) for pair in lora.targets}
    for pair in lora.targets:
        wanted = dense(pair)
        np.testing.assert_allclose(again[pair.target.name, pair.target.view.text], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [n for n, family in FAMILIES.items() if any("*" in one for one in family.experts)])
def test_every_class_says_how_many_experts_it_has(name: str, tmp_path: Path) -> None:
    """A stack has zeros for experts that are not adapted, so their number is needed: each class has its own word."""
    family = FAMILIES[name]
    config = transformers.AutoConfig.for_model(family.kind)
    if getattr(config, "n_routed_experts", 0) is None:  # not every class has a default
        config.n_routed_experts = 4
    config.architectures = [name]
    config.save_pretrained(tmp_path / "base")
    layer = next(layer for layer in family.experts if layer.endswith(("down_proj", "w2")) and "*" in layer)
    target = Target(f"model.layers.1.{layer.replace('*', '3')}.weight", (4, 6))
    api.export(LoraAdapter((one_target(target),)), tmp_path / "out", to="gguf", base=tmp_path / "base")
    made = api.load_lora(tmp_path / "out").targets  # without the base all are there
    stated = (getattr(config, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts"))
    assert len(made) == next(count for count in stated if count)
