"""Every variant of PEFT's LoRA that is read, against the real PEFT: outputs of the model that it loads, and its own
updates. The models are made on the spot, with factors that are nowhere near zero."""

from __future__ import annotations

import json
import shutil

import numpy as np
import peft_oracle as oracle
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from conftest import ADAPTERS, BASES, asset
from peft_oracle import Maker, seeded, transformer
from torch import nn

from lrconvert import api
from lrconvert.core import errors
from lrconvert.formats.readers.base import load
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.lora.adapter import USES

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's

NET = seeded(oracle.Net)
LAYERS = ["emb", "conv1", "point", "conv2", "lin", "head"]
LLAMA = transformer("LlamaForCausalLM")
TIED = transformer("LlamaForCausalLM", tie_word_embeddings=True)
FILM = seeded(oracle.Film)
GPT2 = transformer("GPT2LMHeadModel", n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=1)
QWEN = transformer("Qwen3MoeForCausalLM", moe_intermediate_size=12, num_experts=3, num_experts_per_tok=2)
GPT_OSS = transformer("GptOssForCausalLM", num_local_experts=3, num_experts_per_tok=2)
LLAMA4 = transformer("Llama4ForCausalLM", num_local_experts=3, intermediate_size_mlp=20)
MIXTRAL = transformer("MixtralForCausalLM", num_local_experts=3)
STACK = ["experts.gate_up_proj", "experts.down_proj"]
WHOLE = {"save_embedding_layers": True}

# name: (model, target_modules, the rest of LoraConfig, targets, use -> extras)
_TABLE: dict[str, tuple[Maker, list[str], dict, int, dict[str, int]]] = {
    "every layer": (NET, LAYERS, {}, 6, {}),
    "convolutions, rsLoRA": (NET, ["conv1", "conv2"], {"use_rslora": True}, 2, {}),
    "convolutions, patterns": (NET, ["conv1", "conv2"], {"rank_pattern": {"conv2": 3}, "alpha_pattern": {"conv1": 1}},
        2, {}),
    "convolutions of films": (FILM, ["patch", "mix"], {}, 2, {}),
    "DoRA, convolutions of films": (FILM, ["patch", "mix"], {"use_dora": True}, 2, {"magnitude": 2}),
    "lora_bias": (NET, ["conv1", "conv2", "lin"], {"lora_bias": True}, 3, {"add": 3}),
    "lora_bias, Conv1D": (GPT2, ["c_attn", "c_proj"], {"lora_bias": True, "fan_in_fan_out": True}, 3, {"add": 3}),
    "trained biases": (NET, ["conv1", "lin"], {"bias": "all"}, 2, {"replace": 4}),
    "both biases": (NET, ["conv1", "lin"], {"bias": "lora_only", "lora_bias": True}, 2, {"replace": 2, "add": 2}),
    "DoRA": (NET, LAYERS, {"use_dora": True}, 6, {"magnitude": 6}),
    "DoRA, rsLoRA": (NET, LAYERS, {"use_dora": True, "use_rslora": True}, 6, {"magnitude": 6}),
    "DoRA, Conv1D": (GPT2, ["c_attn", "c_proj", "wte"], {"use_dora": True, "fan_in_fan_out": True}, 4,
        {"magnitude": 4}),
    "DoRA, embedding and head": (LLAMA, ["embed_tokens", "lm_head", "q_proj"], {"use_dora": True}, 3,
        {"magnitude": 3, "replace": 2}),
    "embedding": (LLAMA, ["embed_tokens", "q_proj"], {}, 2, {"replace": 1}),
    "embedding, tied": (TIED, ["embed_tokens", "q_proj"], {}, 2, {"replace": 1}),
    "embedding and head": (LLAMA, ["embed_tokens", "lm_head"], {}, 2, {"replace": 2}),
    "embedding and head, tied": (TIED, ["embed_tokens", "lm_head"], {}, 2, {"replace": 2}),
    "embedding and head, tied adapters": (TIED, ["embed_tokens", "lm_head"], {"ensure_weight_tying": True}, 2,
        {"replace": 2}),
    "trained module": (NET, ["conv1"], {"modules_to_save": ["head"]}, 1, {"replace": 1}),
    "trained embedding": (LLAMA, ["q_proj"], {"modules_to_save": ["embed_tokens"]}, 1, {"replace": 1}),
    "trained embedding, saved thrice": (LLAMA, ["q_proj"], {"modules_to_save": ["embed_tokens"], "save": WHOLE}, 1,
        {"replace": 2}),
    "tokens, dict": (NET, ["lin"], {"trainable_token_indices": {"emb": [5, 1, 3]}}, 1, {"rows": 1, "row_indices": 1}),
    "tokens, list": (LLAMA, ["q_proj"], {"trainable_token_indices": [7, 2]}, 1, {"rows": 1, "row_indices": 1}),
    "tokens, tied": (TIED, ["q_proj"], {"trainable_token_indices": [7, 2]}, 1, {"rows": 1, "row_indices": 1}),
    "tokens, two layers": (LLAMA, ["q_proj"], {"trainable_token_indices": {"embed_tokens": [7, 2], "lm_head": [3]}}, 1,
        {"rows": 2, "row_indices": 2}),
    "tokens, two tied layers": (TIED, ["q_proj"],
        {"trainable_token_indices": {"embed_tokens": [7, 2], "lm_head": [7, 2]}}, 1, {"rows": 1, "row_indices": 1}),
    "tokens in a saved embedding": (LLAMA, ["q_proj"], {"trainable_token_indices": [7, 2], "save": WHOLE}, 1,
        {"replace": 2}),
    "tokens in a saved embedding, tied": (TIED, ["q_proj"], {"trainable_token_indices": [7, 2], "save": WHOLE}, 1,
        {"replace": 2}),
    "MiCA": (NET, ["lin", "emb"], {"init_lora_weights": "mica"}, 2, {}),
    "VeLoRA": (NET, ["lin"], {"velora_config": {"num_groups": 2}}, 1, {}),
    "experts (experts, out, in)": (seeded(lambda: oracle.Mixture(False)), ["lin"], {"target_parameters": STACK}, 7, {}),
    "experts, ranks by pattern": (QWEN, ["q_proj"],
        {"target_parameters": [*STACK, "gate.weight"], "rank_pattern": {"experts.down_proj": 2}}, 8, {}),
    "experts, bare names": (QWEN, ["q_proj"], {"target_parameters": ["gate_up_proj", "down_proj"]}, 7, {}),
    "experts and biases of gpt-oss": (GPT_OSS, ["q_proj"],
        {"target_parameters": [*STACK, "experts.gate_up_proj_bias", "router.weight"]}, 9, {}),
    "one stack of mixtral": (MIXTRAL, ["q_proj"], {"target_parameters": STACK[1:]}, 4, {}),
    "experts of llama4": (LLAMA4, ["q_proj"], {"target_parameters": STACK}, 7, {}),
}  # fmt: skip
CASES = {
    name: (make, {"target_modules": modules, **config}, *rest)
    for name, (make, modules, config, *rest) in _TABLE.items()
}


def inputs(make: Maker) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    model = make()
    if isinstance(model, oracle.Film):
        return torch.randn(2, 3, 4, 6, 6, generator=generator)
    if isinstance(model, oracle.Mixture):
        return torch.randn(4, 6, generator=generator)
    return torch.randint(1, 11, (2, 16), generator=generator)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.medium
def test_variants_are_those_of_peft(name, tmp_path):
    make, config, targets, uses = CASES[name]
    oracle.train(make, tmp_path, **{"init_lora_weights": False, **config})
    lora = load(tmp_path)
    assert len(lora.targets) == targets
    assert {
        use: sum(e.use == use for e in lora.extras) for use in USES if any(e.use == use for e in lora.extras)
    } == uses
    x, loaded = inputs(make), oracle.peft_model(make, tmp_path)
    theirs = oracle.outputs(loaded, x)
    assert oracle.difference(oracle.outputs(make(), x), theirs) > 0.1  # it does something
    assert oracle.difference(oracle.outputs(oracle.merged(lora, make()), x), theirs) <= 1e-5
    ours, wanted = oracle.deltas(lora), oracle.their_deltas(loaded)
    assert ours.keys() == wanted.keys()
    for parameter, delta in wanted.items():
        assert delta.shape == ours[parameter].shape
        assert np.linalg.norm(ours[parameter] - delta) <= 1e-6 * np.linalg.norm(delta)


@pytest.mark.parametrize("name", ["every layer", "DoRA", "lora_bias", "tokens, dict", "experts (experts, out, in)"])
def test_stored_bits_are_kept(name, tmp_path):
    """The same adapter in bfloat16: factors, magnitudes and rows have the bits of the file, whatever their shape."""
    make, config, _, _ = CASES[name]
    oracle.train(make, tmp_path, **{"init_lora_weights": False, **config})
    path = tmp_path / "adapter_model.safetensors"
    halves = {k: v.to(torch.bfloat16) for k, v in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(halves, path)
    bits = sorted(v.view(torch.int16).numpy().tobytes() for k, v in halves.items() if not k.endswith(".bias"))
    lora = load(tmp_path)
    ours = [e.data for e in lora.extras if e.use in ("magnitude", "rows")]
    if "experts" not in name:
        ours += [half.array.tobytes() for pair in lora.targets for half in (pair.a, pair.b)]
        if "tokens" in name:
            assert sorted(map(len, ours)) == sorted(map(len, bits))  # rows are reordered
        else:
            assert sorted(ours) == bits
    assert {half.dtype for pair in lora.targets for half in (pair.a, pair.b)} == {"BF16"}
    assert {e.dtype for e in lora.extras} <= {"BF16", "F32", "I64"}
    assert all(e.dtype == "F32" for e in lora.extras if e.use == "add")


def test_views(tmp_path):
    oracle.train(NET, tmp_path, target_modules=LAYERS, init_lora_weights=False)
    views = {p.target.name: (p.target.view.text, p.target.shape) for p in load(tmp_path).targets}
    assert views == {
        "conv1.weight": ("conv:3:1", (8, 6, 3)),
        "conv2.weight": ("conv:3x2:1", (10, 8, 3, 2)),
        "emb.weight": ("transposed", (11, 6)),
        "head.weight": ("matrix", (5, 7)),
        "lin.weight": ("matrix", (7, 10)),
        "point.weight": ("conv:1x1:1", (8, 8, 1, 1)),
    }


def test_a_trained_dora():
    """The logits that PEFT gave when the fixture was made."""
    import transformers

    wanted = safetensors.torch.load_file(ADAPTERS / "llama-dora" / "expected.safetensors")
    base = transformers.AutoModelForCausalLM.from_pretrained(BASES / "tiny-llama", dtype=torch.float32).eval()
    changed = oracle.merged(load(ADAPTERS / "llama-dora"), base)
    with torch.no_grad():
        logits = changed(**{k: v for k, v in wanted.items() if k != "logits"}).logits
    assert oracle.difference(logits.double(), wanted["logits"].double()) <= 1e-5


@pytest.mark.parametrize(
    ("name", "part"),
    [("DoRA", "magnitude_vector"), ("lora_bias", ".bias"), ("tokens, dict", "tokens_delta"), ("DoRA", "embedding_A")],
)
def test_nan_is_found_wherever_it_is(name, part, tmp_path):
    make, config, _, _ = CASES[name]
    oracle.train(make, tmp_path, **config)
    path = tmp_path / "adapter_model.safetensors"
    stored = safetensors.torch.load_file(path)
    key = next(k for k in stored if part in k)
    stored[key].reshape(-1)[0] = torch.nan
    safetensors.torch.save_file(stored, path)
    with pytest.raises(errors.ValueRangeError, match=key):
        load(tmp_path)


def test_token_rows_that_do_not_fit_are_refused(tmp_path):
    oracle.train(LLAMA, tmp_path, target_modules=["q_proj"], trainable_token_indices=[7, 2])
    for rows, error, text in [
        ([7, 7], errors.IndexRangeError, "twice"),
        ([7], errors.PairError, "names 1 rows"),
        ({"other": [7, 2]}, errors.ConfigError, "does not say which"),
    ]:
        with pytest.raises(error, match=text):
            load(edited(tmp_path, trainable_token_indices=rows))
    oracle.train(LLAMA, tmp_path, target_modules=["q_proj"], trainable_token_indices=[7, 2], save=WHOLE)
    with pytest.raises(errors.IndexRangeError, match="row 32"):
        load(edited(tmp_path, trainable_token_indices=[7, 32]))


def test_dora_says_that_the_update_is_not_all(tmp_path):
    oracle.train(NET, tmp_path, target_modules=["lin"], use_dora=True)
    made = api.convert(load(tmp_path), "lowrank", bits=12)
    assert any("low-rank part" in line for line in made.warnings)


def test_rows_rise(tmp_path):
    oracle.train(LLAMA, tmp_path, target_modules=["q_proj"], trainable_token_indices=[7, 2, 30])
    stored = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    values = stored["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    extras = {e.use: e for e in load(tmp_path).extras}
    assert np.frombuffer(extras["row_indices"].data, "<i8").tolist() == [2, 7, 30]
    assert extras["rows"].data == values[[1, 0, 2]].tobytes()
    assert {e.name for e in extras.values()} == {"model.embed_tokens.weight"}


# --- stacks of experts ----------------------------------------------------------------------------------------------


def edited(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    "changes",
    [{"peft_version": "0.18.1"}, {"peft_version": None}],
    ids=str,
)
def test_experts_that_are_stored_in_out(changes, tmp_path):
    """What PEFT before 0.19 did with every stack, it does now where the model asks for it: (experts, in, out)."""
    make = seeded(lambda: oracle.Mixture(True))
    oracle.train(make, tmp_path, target_modules=["lin"], target_parameters=STACK, init_lora_weights=False)
    lora = load(edited(tmp_path, auto_mapping=None, **changes))
    assert {p.target.view.kind for p in lora.targets} == {"matrix", "expert_transposed"} and lora.warnings == ()
    x, loaded = inputs(make), oracle.peft_model(make, tmp_path)
    theirs = oracle.outputs(loaded, x)
    assert oracle.difference(oracle.outputs(oracle.merged(lora, make()), x), theirs) <= 1e-5
    for name, delta in oracle.their_deltas(loaded).items():
        assert np.linalg.norm(oracle.deltas(lora)[name] - delta) <= 1e-6 * np.linalg.norm(delta)


def test_experts_whose_layout_only_the_base_knows(tmp_path):
    oracle.train(QWEN, tmp_path, target_modules=["q_proj"], target_parameters=STACK)
    assert not any("check with the base" in line for line in load(tmp_path).warnings)
    assert any("check with the base" in line for line in load(edited(tmp_path, auto_mapping=None)).warnings)


EXPERTS = "base_model.model.model.layers.0.mlp.experts"
WRONG_STACKS = {
    "too few names": ({"target_parameters": STACK[:1]}, errors.ConfigError, "2 of its parameters"),
    "too many names": ({"target_parameters": [*STACK, "experts.bias"]}, errors.ConfigError, "names 3"),
    "unknown order": ({"target_parameters": ["experts.a", "experts.b"]}, errors.UnsupportedLoraError, "order"),
    "no names": ({"target_parameters": None}, errors.UnsupportedLoraError, "wrapper"),
    "not a list": ({"target_parameters": "experts.a"}, errors.ConfigError, "target_parameters"),
    "rank does not divide": ({"r": 5, "rank_pattern": {"q_proj": 4}}, errors.PairError, "multiple"),
    "no rank": ({"r": 0.5, "rank_pattern": {"q_proj": 4}}, errors.PairError, "multiple"),
    "DoRA": ({"use_dora": True}, errors.LrcError, "use_dora"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_STACKS)
def test_stacks_that_are_not_understood_are_refused(case, tmp_path):
    changes, error, text = WRONG_STACKS[case]
    oracle.train(QWEN, tmp_path, target_modules=["q_proj"], target_parameters=STACK)
    with pytest.raises(error, match=text):
        load(edited(tmp_path, **changes))


def test_a_stack_of_too_many_experts_is_not_made(tmp_path, monkeypatch):
    from lrconvert.formats.readers.peft import experts

    oracle.train(QWEN, tmp_path, target_modules=["q_proj"], target_parameters=STACK)
    monkeypatch.setattr(experts, "FOREIGN", type("Few", (), {"tensors": 5}))
    with pytest.raises(errors.LimitError, match="6 experts"):
        load(tmp_path)


# --- what PEFT makes and no update of a weight describes ------------------------------------------------------------


class Odd(nn.Module):
    """Layers whose LoRA is refused."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lin = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(self.mha(x, x, x, need_weights=False)[0])


ODD = {
    "convolution in groups": ({"target_modules": ["grouped"]}, "grouped: lora_B has 2 of 4 channels"),
    "MultiheadAttention": ({"target_modules": ["mha"]}, "mha is an nn.MultiheadAttention"),
    "KaSA": ({"target_modules": ["lin"], "kasa_config": {}}, "kasa_config is set: KaSA"),
    "BD-LoRA": ({"target_modules": ["lin"], "use_bdlora": {"nblocks": 2, "match_strict": False}}, "use_bdlora is set"),
    "PiSSA": ({"target_modules": ["lin"], "init_lora_weights": "pissa"}, "PiSSA changes the base"),
    "OLoRA": ({"target_modules": ["lin"], "init_lora_weights": "olora"}, "OLoRA changes the base"),
    "Activated LoRA": ({"target_modules": ["lin"], "alora_invocation_tokens": [1, 2]}, "Activated LoRA acts only"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_variants_that_are_refused_as_peft_saves_them(name, tmp_path):
    config, text = ODD[name]
    config = {key: peft_value(key, value) for key, value in config.items()}
    oracle.train(seeded(Odd), tmp_path, **config)
    with pytest.raises(errors.UnsupportedLoraError, match=text) as caught:
        load(tmp_path)
    assert caught.value.fix


def peft_value(key, value):
    from peft.tuners.lora.config import BdLoraConfig, KasaConfig

    return {"kasa_config": KasaConfig, "use_bdlora": BdLoraConfig}[key](**value) if isinstance(value, dict) else value


def test_why_a_multihead_attention_is_refused(tmp_path):
    """PEFT's forward has the update of out_proj twice. If this fails, PEFT was repaired, and the layer can be read."""
    make = seeded(Odd)
    oracle.train(make, tmp_path, target_modules=["mha"], init_lora_weights=False)
    loaded = oracle.peft_model(make, tmp_path)
    x = torch.randn(2, 5, 8)
    layer = loaded.base_model.model.mha
    plain = make()
    with torch.no_grad():
        plain.mha.in_proj_weight += layer.get_delta_weight("default")
        plain.mha.out_proj.weight += 2 * layer.base_layer.out_proj.get_delta_weight("default")
    assert oracle.difference(oracle.outputs(plain, x), oracle.outputs(loaded, x)) <= 1e-5


# --- PEFT 0.2: some slices of a fused layer -------------------------------------------------------------------------


def merged_linear(a, b, enabled, scale):
    """The update of PEFT 0.2's MergedLinear, from its formula: lora_A, a convolution of single pixels in groups, and
    zeros for the slices that are not enabled. PEFT of today does not load it."""
    after_a = torch.eye(a.shape[1]) @ a.T  # one row per input
    after_b = nn.functional.conv1d(after_a.T[None], b, groups=a.shape[0] // b.shape[1])[0]  # (rows, in)
    where = torch.zeros(len(enabled), len(after_b) // sum(enabled), dtype=torch.bool)
    where[torch.tensor(enabled)] = True
    whole = torch.zeros(where.numel(), a.shape[1])
    whole[where.reshape(-1)] = after_b
    return (scale * whole).numpy()


def legacy(folder, module, a, b, **config):
    name = f"base_model.model.{module}.lora_{{}}.weight"
    safetensors.torch.save_file({name.format("A"): a, name.format("B"): b}, folder / "adapter_model.safetensors")
    common = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "merge_weights": False, "fan_in_fan_out": False}
    (folder / "adapter_config.json").write_text(json.dumps({**common, **config}))
    return folder


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("module", ["h.0.query_key_value", "h.0.c_attn"])
@pytest.mark.parametrize(
    ("enabled", "groups"),
    [((True, False, True), 2), ((False, True, False), 1), ((True, True, True), 3), ((True, True, True), 2)],
)
def test_slices_of_fused_layers(enabled, groups, module, transposed, tmp_path):
    """One target a slice; three slices in two groups, as PEFT 0.2 would make them, are cut at both."""
    torch.manual_seed(0)
    n = sum(enabled)
    a, b = torch.randn(4 * n, 10), torch.randn(6 * n, 4 * n // groups, 1)
    lora = load(legacy(tmp_path, module, a, b, enable_lora=list(enabled), fan_in_fan_out=transposed))
    (delta,) = oracle.deltas(lora).values()
    whole = transposed and module.endswith("c_attn")
    wanted = merged_linear(a, b, enabled, 1.5)
    assert np.allclose(delta, wanted.T if whole else wanted, rtol=1e-5, atol=1e-5)
    assert {p.target.view.kind for p in lora.targets} == ({"transposed"} if whole else {"rows"})
    assert len(lora.targets) == (1 if whole else 4 if (n, groups) == (3, 2) else n)
    if not whole and groups == n:
        texts = {f"rows:{6 * i}:{6 * i + 6}" for i, on in enumerate(enabled) if on}
        assert {p.target.view.text for p in lora.targets} == texts


LEGACY_WRONG = {
    "not a list": ({"enable_lora": True}, errors.ConfigError, "enable_lora is True"),
    "numbers": ({"enable_lora": [1, 0, 1]}, errors.ConfigError, "list of true and false"),
    "nothing": ({"enable_lora": [False, False]}, errors.ConfigError, "no slice"),
    "does not divide": ({"enable_lora": [True] * 5}, errors.PairError, "do not divide"),
    "with DoRA": ({"enable_lora": [True, False, True], "use_dora": True}, errors.ConfigError, "PEFT 0.2"),
    "not said": ({}, errors.PairError, "do not fit"),
    "other rank": ({"enable_lora": [True, False, True], "r": 3}, errors.PairError, "rank 4"),
}  # fmt: skip


@pytest.mark.parametrize("case", LEGACY_WRONG)
def test_slices_that_do_not_fit_are_refused(case, tmp_path):
    config, error, text = LEGACY_WRONG[case]
    with pytest.raises(error, match=text):
        load(legacy(tmp_path, "h.0.qkv", torch.randn(8, 10), torch.randn(12, 4, 1), **config))


def test_slices_of_a_real_adapter():
    folder = asset("adapters/bloom_lora")
    stored = torch.load(folder / "adapter_model.bin", weights_only=True, map_location="cpu")
    lora = load(folder, ReadOptions(allow_pickle=True))
    assert {p.target.view.text for p in lora.targets} == {"rows:0:1024", "rows:2048:3072"}
    name = "transformer.h.7.self_attention.query_key_value"
    a, b = (stored[f"base_model.model.{name}.lora_{half}.weight"] for half in "AB")
    ours = sum(oracle.stored_delta(p) for p in lora.targets if p.target.name == f"{name}.weight")
    wanted = merged_linear(a, b, (True, False, True), 2.0)
    assert np.linalg.norm(ours - wanted) <= 1e-6 * np.linalg.norm(wanted)


# --- adapters of another name ---------------------------------------------------------------------------------------


def test_an_adapter_of_another_name(tmp_path):
    """PEFT puts it into a folder of its name. A file of the whole state keeps the name in its keys."""
    import peft

    config = {"r": 4, "lora_alpha": 6, "target_modules": LAYERS, "use_dora": True, "init_lora_weights": False}
    torch.manual_seed(0)
    model = peft.get_peft_model(NET(), peft.LoraConfig(**config), adapter_name="mine")
    model.save_pretrained(str(tmp_path))
    inside = load(tmp_path / "mine")
    outside = load(tmp_path)
    assert outside.targets == inside.targets and outside.extras == inside.extras
    assert outside.warnings == (*inside.warnings, "read from the folder 'mine' inside")
    state = {k: v.contiguous() for k, v in model.state_dict().items() if ".lora_" in k}
    assert any(k.endswith("lora_A.mine.weight") for k in state) and any(k.endswith(".mine") for k in state)
    safetensors.torch.save_file(state, tmp_path / "mine" / "adapter_model.safetensors")
    named = load(tmp_path / "mine")
    assert named.targets == inside.targets and named.extras == inside.extras
    shutil.copytree(tmp_path / "mine", tmp_path / "yours")
    with pytest.raises(errors.ConfigError, match="2 adapters: 'mine', 'yours'"):
        load(tmp_path)


def test_several_adapters_in_one_file_are_refused(tmp_path):
    oracle.train(NET, tmp_path, target_modules=["lin"])
    path = tmp_path / "adapter_model.safetensors"
    stored = safetensors.torch.load_file(path)
    named = {k.replace(".weight", f".{name}.weight"): v.clone() for k, v in stored.items() for name in ("a", "b")}
    safetensors.torch.save_file(named, path)
    with pytest.raises(errors.UnsupportedLoraError, match="2 adapters: 'a', 'b'"):
        load(tmp_path)
    safetensors.torch.save_file({**stored, **{k: v for k, v in named.items() if ".a." in k}}, path)
    with pytest.raises(errors.UnsupportedLoraError, match="one without a name, 'a'"):
        load(tmp_path)
