"""The PEFT reader against PEFT itself, and every refusal by name."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from conftest import ADAPTERS, ASSETS, BASES, asset, dense

from lrconvert import errors
from lrconvert.readers import peft as reader
from lrconvert.readers.base import load

READ = {
    "llama-plain": "tiny-llama",
    "llama-rslora": "tiny-llama",
    "llama-patterns": "tiny-llama",
    "llama-bf16": "tiny-llama",
    "llama-lmhead": "tiny-llama",
    "llama-tied-bf16": "tiny-llama-bf16",
    "gpt2-conv1d": "tiny-gpt2",
    "bert-classifier": "tiny-bert",
    "vit-plain": "tiny-vit",
}
MODELS = {
    "bert-classifier": ("AutoModelForSequenceClassification", {"num_labels": 3}),
    "vit-plain": ("AutoModelForImageClassification", {}),
}


def peft_model(adapter: str):
    import peft
    import torch
    import transformers

    class_name, extra = MODELS.get(adapter, ("AutoModelForCausalLM", {}))
    base = getattr(transformers, class_name).from_pretrained(BASES / READ[adapter], dtype=torch.float32, **extra)
    return peft.PeftModel.from_pretrained(base, ADAPTERS / adapter).eval()


@pytest.mark.parametrize("name", READ)
def test_delta_is_pefts(name):
    """get_delta_weight of every adapted layer, within 1e-6 of its norm."""
    model = peft_model(name)
    lora = load(ADAPTERS / name)
    layers = {
        n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")
    }
    assert {f"{n}.weight" for n in layers} == {p.target.name for p in lora.targets}
    for pair in lora.targets:
        layer = layers[pair.target.name.removesuffix(".weight")]
        theirs = layer.get_delta_weight("default").detach().double().numpy()
        ours = dense(pair)
        if pair.target.view.kind == "transposed":
            ours = ours.T
        assert ours.shape == theirs.shape == pair.target.shape
        assert np.linalg.norm(ours - theirs) <= 1e-6 * np.linalg.norm(theirs)


@pytest.mark.parametrize("name", READ)
def test_every_tensor_is_accounted_for(name):
    stored = (
        safetensors.numpy.load_file(ADAPTERS / name / "adapter_model.safetensors")
        if name
        not in (
            "llama-bf16",
            "llama-tied-bf16",
        )
        else None
    )
    lora = load(ADAPTERS / name)
    if stored is not None:
        assert 2 * len(lora.targets) + len(lora.extras) == len(stored)
        for extra in lora.extras:
            assert extra.data == stored[f"base_model.model.{extra.name}"].tobytes()
    assert lora.warnings == ()
    assert all(p.a.dtype == p.b.dtype for p in lora.targets)
    assert len(lora.provenance.source) == 64


def test_bf16_is_kept():
    assert {p.a.dtype for p in load(ADAPTERS / "llama-bf16").targets} == {"BF16"}


@pytest.fixture
def folder(tmp_path):
    """A copy of a plain adapter, with an editor for its config and tensors."""
    shutil.copytree(ADAPTERS / "llama-plain", tmp_path / "a")
    path = tmp_path / "a"

    class Folder:
        root = path

        def config(self, **changes):
            config = json.loads((path / "adapter_config.json").read_text())
            config.update(changes)
            (path / "adapter_config.json").write_text(json.dumps(config))
            return path

        def tensors(self, edit):
            values = safetensors.numpy.load_file(path / "adapter_model.safetensors")
            values = edit(values) or values
            safetensors.numpy.save_file(values, path / "adapter_model.safetensors")
            return path

    return Folder()


FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_{}.weight"

FEATURES = {
    "use_dora": True,
    "lora_bias": True,
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 1},
    "layer_replication": [[0, 2]],
    "target_parameters": ["experts.w1"],
    "trainable_token_indices": [3],
    "enable_lora": [True, False, True],
    "init_lora_weights": "pissa",
    "some_future_field": 3,
}


@pytest.mark.parametrize("field", FEATURES)
def test_features_are_refused_by_name(field, folder):
    with pytest.raises(errors.UnsupportedLoraError, match=field):
        load(folder.config(**{field: FEATURES[field]}))


@pytest.mark.parametrize("init", ["olora", "corda", "loftq", "lora_ga", "pissa_niter_4"])
def test_unconverted_initializations_are_refused(init, folder):
    with pytest.raises(errors.UnsupportedLoraError, match="initialization"):
        load(folder.config(init_lora_weights=init))


def test_unset_unknown_fields_are_harmless(folder):
    assert load(folder.config(some_future_field=None, another=False)).targets


@pytest.mark.parametrize("kind", ["IA3", "ADALORA", "VBLORA", None, 7])
def test_other_kinds_are_refused(kind, folder):
    with pytest.raises(errors.NotLoraError):
        load(folder.config(peft_type=kind))


def drop(name):
    return lambda values: {k: v for k, v in values.items() if k != name}


def put(name, value):
    return lambda values: {**values, name: value}


def nan(values):
    values[FIRST.format("A")][0, 0] = np.nan


TENSORS = {
    "missing A": (drop(FIRST.format("A")), errors.PairError, "down_proj"),
    "missing B": (drop(FIRST.format("B")), errors.PairError, "down_proj"),
    "shapes disagree": (put(FIRST.format("A"), np.ones((3, 5), np.float32)), errors.PairError, "down_proj"),
    "rank unlike the config": (
        lambda v: {
            **v,
            FIRST.format("A"): v[FIRST.format("A")][:2],
            FIRST.format("B"): v[FIRST.format("B")][:, :2].copy(),
        },
        errors.PairError,
        "configuration says 8",
    ),
    "NaN": (nan, errors.ValueRangeError, "down_proj"),
    "integers": (put(FIRST.format("A"), np.ones((8, 96), np.int64)), errors.DtypeError, "I64"),
    "other name": (put("unknown.weight", np.ones(1, np.float32)), errors.TensorUnknownError, "unknown.weight"),
    "embedding": (
        put("base_model.model.model.embed_tokens.lora_embedding_A", np.ones((8, 4), np.float32)),
        errors.UnsupportedLoraError,
        "embedding",
    ),
    "DoRA magnitude": (
        put(FIRST.format("magnitude_vector"), np.ones(4, np.float32)),
        errors.UnsupportedLoraError,
        "magnitude",
    ),
    "other adapter name": (
        put("base_model.model.x.lora_A.other.weight", np.ones((8, 4), np.float32)),
        errors.UnsupportedLoraError,
        "another name",
    ),
    "convolution": (
        lambda v: {
            **v,
            FIRST.format("A"): np.ones((8, 3, 3, 3), np.float32),
            FIRST.format("B"): np.ones((4, 8, 1, 1), np.float32),
        },
        errors.UnsupportedLoraError,
        "convolution",
    ),
    "empty": (lambda v: {"base_model.model.x.weight": np.ones(1, np.float32)}, errors.EmptyAdapterError, "no lora_A"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_broken_tensors(case, folder):
    edit, error, text = TENSORS[case]
    with pytest.raises(error, match=text) as caught:
        load(folder.tensors(edit))
    assert str(folder.root) in str(caught.value)


def test_all_zero_b_is_accepted_with_a_warning(folder):
    lora = load(folder.tensors(lambda v: {k: v[k] * (0 if ".lora_B." in k else 1) for k in v}))
    assert len(lora.warnings) == 1 and "all-zero" in lora.warnings[0]


def test_patterns_that_match_nothing_are_reported(folder):
    lora = load(folder.config(alpha_pattern={"no_such_module": 4}))
    assert any("no_such_module" in w for w in lora.warnings)


def test_null_base_name_and_single_file(folder):
    lora = load(folder.config(base_model_name_or_path=None) / "adapter_model.safetensors")
    assert lora.provenance.base_model == "" and lora.targets


def test_no_config_no_guess(folder):
    (folder.root / "adapter_config.json").unlink()
    with pytest.raises(errors.ConfigError, match="alpha"):
        load(folder.root / "adapter_model.safetensors")


def test_pickles_are_not_opened(folder):
    (folder.root / "adapter_model.safetensors").rename(folder.root / "adapter_model.bin")
    with pytest.raises(errors.PickleError, match="run code"):
        load(folder.root)


@pytest.mark.parametrize("path", ["absent", "text"])
def test_unknown_layouts(path, tmp_path):
    (tmp_path / "text").write_text("hello")
    with pytest.raises(errors.UnknownLayoutError):
        load(tmp_path / path)


# --- patterns -------------------------------------------------------------------------------------------------------

MODULES = ["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.down_proj", "q_proj", "lm_head", "xq_proj"]
PATTERNS = [
    "q_proj",
    r"model\.layers\.0\..*",
    r".*q_proj",
    r"layers.[0-9]+.mlp.down_proj",
    "^model.*proj$",
    "(q|k)_proj",
    "lm_head$",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_match_as_in_peft(pattern):
    from peft.utils.other import get_pattern_key

    for module in MODULES:
        theirs = get_pattern_key([pattern], module) == pattern
        assert bool(reader.compile_pattern(pattern).match(module)) == theirs or module == pattern


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+", "(a|a)*b", "(.*)*", r"(\w+\.)*x", "a" * 2000, "(", r"(a)\1", "(?=a)b", ".*.*.*.*x", "(a{1,9}){1,99}"],
)
def test_hostile_patterns_never_reach_the_matcher(pattern, folder):
    with pytest.raises(errors.PatternError):
        load(folder.config(rank_pattern={pattern: 4}))


# --- real adapters --------------------------------------------------------------------------------------------------

REAL = {
    "gpt2_tigrinya": 36,
    "gemma3_270m_svg_adapter": 72,
    "monteclora_roberta_mrpc_230": 24,
    "distilbert_imdb": 12,
    "deltacompression_poc": 24,
    "phi1_5_r4": 48,
    "ih_bloom560m_r10": 24,
    "ih_gpt2_r4_a16_biaslora": 36,
    "ih_tinygpt2_r4": 6,
    "mountain_v1_binary": 36,
    "bloom_lora": errors.UnsupportedLoraError,
    "cloneofsimo_pt": errors.UnknownLayoutError,
    "cloneofsimo_safetensors": errors.UnknownLayoutError,
    "lerobot_bin": errors.NotLoraError,
    "lycoris_lokr": errors.UnknownLayoutError,
    "mlx_cli": errors.UnknownLayoutError,
    "mlx_vtboyarc": errors.UnknownLayoutError,
    "mt0_large_ia3": errors.NotLoraError,
    "peft_regression_adalora_mlp": errors.NotLoraError,
    "peft_regression_ia3_mlp": errors.NotLoraError,
    "peft_regression_lora_conv2d": errors.PickleError,
    "peft_regression_lora_mlp": errors.PickleError,
    "peft_regression_lora_mlp_modules_to_save": errors.PickleError,
    "peft_regression_lora_opt-125m_bnb_4bit": errors.PickleError,
    "sam_lora": errors.UnknownLayoutError,
    "sd_lora_pokemon": errors.UnknownLayoutError,
    "t5_small_rec": errors.PickleError,
}


@pytest.mark.parametrize("name", REAL)
def test_real_adapters(name):
    path = asset(f"adapters/{name}")
    expected = REAL[name]
    if isinstance(expected, int):
        assert len(load(path).targets) == expected
    else:
        with pytest.raises(expected):
            load(path)


def test_the_table_of_real_adapters_is_complete():
    asset("adapters")
    assert {p.name for p in (ASSETS / "adapters").iterdir() if p.is_dir()} == set(REAL)
