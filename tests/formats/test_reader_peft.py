"""The PEFT reader against PEFT itself, and every refusal by name."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import peft_oracle as oracle
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from conftest import ADAPTERS, BASES

from lrconvert.core import errors
from lrconvert.formats.readers.base import load
from lrconvert.formats.readers.peft import config, patterns
from lrconvert.io.checkpoint import open_checkpoint
from lrconvert.lora import base_names

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
}  # fmt: skip
MODELS = {
    "bert-classifier": ("AutoModelForSequenceClassification", {"num_labels": 3}),
    "vit-plain": ("AutoModelForImageClassification", {}),
}  # fmt: skip


def peft_model(adapter: str):
    import peft
    import transformers

    class_name, extra = MODELS.get(adapter, ("AutoModelForCausalLM", {}))
    base = getattr(transformers, class_name).from_pretrained(BASES / READ[adapter], dtype=torch.float32, **extra)
    return peft.PeftModel.from_pretrained(base, ADAPTERS / adapter).eval()


@pytest.mark.parametrize("name", READ)
def test_delta_is_pefts(name):
    """get_delta_weight of every adapted layer, within 1e-6 of its norm."""
    theirs, ours = oracle.their_deltas(peft_model(name)), oracle.deltas(load(ADAPTERS / name))
    assert theirs.keys() == ours.keys()
    for parameter, delta in theirs.items():
        assert ours[parameter].shape == delta.shape
        assert np.linalg.norm(ours[parameter] - delta) <= 1e-6 * np.linalg.norm(delta)


@pytest.mark.parametrize("name", READ)
def test_every_tensor_is_accounted_for(name):
    stored = safetensors.torch.load_file(ADAPTERS / name / "adapter_model.safetensors")
    lora = load(ADAPTERS / name)
    assert 2 * len(lora.targets) + len(lora.extras) == len(stored)
    for extra in lora.extras:
        assert extra.data == stored[f"base_model.model.{extra.name}"].view(torch.uint8).numpy().tobytes()
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
            stated = json.loads((path / "adapter_config.json").read_text())
            (path / "adapter_config.json").write_text(json.dumps({**stated, **changes}))
            return path

        def tensors(self, edit):
            values = safetensors.numpy.load_file(path / "adapter_model.safetensors")
            values = edit(values) or values
            safetensors.numpy.save_file(values, path / "adapter_model.safetensors")
            return path

    return Folder()


FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_{}.weight"

FEATURES = {
    "use_qalora": (True, "QA-LoRA pools"),
    "use_bdlora": ({"nblocks": 2}, "BD-LoRA"),
    "alora_invocation_tokens": ([1, 2], "Activated LoRA"),
    "arrow_config": ({"top_k": 2}, "Arrow routes"),
    "kasa_config": ({"beta": 1}, "KaSA"),
    "layer_replication": ([[0, 2]], "replicated"),
    "some_future_field": (3, "not known"),
    "another": ({"a": 1}, "not known"),
    "rotation": ("on", "not known"),
}  # fmt: skip


@pytest.mark.parametrize("field", FEATURES)
def test_features_are_refused_by_name(field, folder):
    value, text = FEATURES[field]
    with pytest.raises(errors.UnsupportedLoraError, match=rf"{field}.*{text}") as caught:
        load(folder.config(**{field: value}))
    assert caught.value.fix and str(folder.root / "adapter_config.json") in str(caught.value)


INITS = {
    "pissa": "PiSSA",
    "pissa_niter_4": "PiSSA",
    "PiSSA": "PiSSA",
    "olora": "OLoRA",
    "corda": "CorDA",
    "lora_ga": "LoRA-GA",
    "loftq": "LoftQ",
    "future": "not known",
    3: "not known",
}  # fmt: skip


@pytest.mark.parametrize("init", INITS)
def test_initializations_that_change_the_base_are_refused(init, folder):
    with pytest.raises(errors.UnsupportedLoraError, match=rf"initialization.*{INITS[init]}|{INITS[init]}") as caught:
        load(folder.config(init_lora_weights=init))
    assert "initialization" in caught.value.what and caught.value.fix


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "orthogonal", "eva", "mica", "MiCA"])
def test_initializations_that_leave_the_base_alone_are_read(init, folder):
    assert load(folder.config(init_lora_weights=init)).targets


def test_unset_unknown_fields_are_harmless(folder):
    """What a newer PEFT writes for features that are not used: read without a word."""
    unset = {"some_future_field": None, "another": False, "more": {}, "list": [], "text": "", "number": 0}
    assert load(folder.config(**unset)).warnings == ()


def test_every_field_of_this_peft_is_known(folder):
    """With all defaults that PEFT writes, and a version of its own."""
    import peft

    defaults = {**peft.LoraConfig(r=8, lora_alpha=16).to_dict(), "peft_type": "LORA", "peft_version": "0.99.0"}
    plain = {k: v for k, v in defaults.items() if v is None or isinstance(v, (bool, int, float, str, list, dict))}
    assert set(plain) >= set(defaults) - {"target_modules", "exclude_modules"}
    assert load(folder.config(**plain)).targets


CONTRADICTIONS = {
    "DoRA without magnitudes": ({"use_dora": True}, errors.PairError, "use_dora.*lora_magnitude_vector"),
    "a bias that is not there": ({"lora_bias": True}, errors.PairError, "lora_bias.*lora_B.bias"),
    "tokens that are not there": ({"trainable_token_indices": [3]}, errors.ConfigError, "trainable_token_indices"),
    "tokens beyond any row": ({"trainable_token_indices": [2**31]}, errors.ConfigError, "trainable_token_indices"),
    "negative tokens": ({"trainable_token_indices": [-3]}, errors.ConfigError, "trainable_token_indices"),
    "tokens that are true": ({"trainable_token_indices": {"a": True}}, errors.ConfigError, "trainable_token_indices"),
    "slices of linear layers": ({"enable_lora": [True, False]}, errors.PairError, "enable_lora"),
    "text for true": ({"use_rslora": "false"}, errors.ConfigError, "use_rslora is 'false'"),
    "a number for true": ({"fan_in_fan_out": 1}, errors.ConfigError, "fan_in_fan_out is 1"),
    "no r": ({"r": None}, errors.ConfigError, "r is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_settings_that_contradict_the_file_are_refused(case, folder):
    changes, error, text = CONTRADICTIONS[case]
    with pytest.raises(error, match=text):
        load(folder.config(**changes))


ELSEWHERE = {"LORA", "VBLORA", "MISS", "LOHA", "LOKR", "VERA", "ADALORA", "IA3"}  # by readers of their own, the latter


def test_every_other_kind_of_peft_is_refused_by_name(folder):
    import peft

    for kind in sorted({k.value for k in peft.PeftType} - ELSEWHERE):
        with pytest.raises(errors.NotLoraError, match=f"the adapter is {kind}, not LORA") as caught:
            load(folder.config(peft_type=kind))
        assert caught.value.fix
    assert set(config.OTHER_KINDS) <= {k.value for k in peft.PeftType}


@pytest.mark.parametrize("kind", ["LORAX", "", None, 7])
def test_unknown_kinds_are_refused(kind, folder):
    with pytest.raises(errors.NotLoraError):
        load(folder.config(peft_type=kind))


A, B = (FIRST.format(half) for half in "AB")
MAGNITUDE, BIAS = FIRST.format("magnitude_vector"), B.replace(".weight", ".bias")
ROOT = "base_model.model."


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


def put(tensors):
    return lambda values: {**values, **tensors}


def drop(name):
    return lambda values: {k: v for k, v in values.items() if k != name}


def only(half):
    return lambda values: {k: v for k, v in values.items() if f".lora_{half}." in k}


def nan(values):
    values[A][0, 0] = np.nan


def scalars(values):
    return {k.replace(".weight", ".alpha").replace("lora_A", "q").replace("lora_B", "v"): ones(1) for k in values}


TENSORS = {
    "missing A": (drop(A), errors.PairError, "down_proj"),
    "missing B": (drop(B), errors.PairError, "down_proj"),
    "shapes disagree": (put({A: ones(3, 5)}), errors.PairError, "down_proj"),
    "rank unlike the config": (
        lambda v: {**v, A: v[A][:2], B: v[B][:, :2].copy()}, errors.PairError, "configuration says 8"),
    "NaN": (nan, errors.ValueRangeError, "down_proj"),
    "integers": (put({A: ones(8, 96, dtype=np.int64)}), errors.DtypeError, "I64"),
    "other name": (put({"unknown.weight": ones(1)}), errors.TensorUnknownError, "unknown.weight"),
    "A alone": (only("A"), errors.PairError, "lora_A.weight has no lora_B.weight"),
    "B alone": (only("B"), errors.PairError, "lora_B.weight has no lora_A.weight"),
    "scalars alone": (scalars, errors.EmptyAdapterError, "no lora_A / lora_B pair"),
    "swapped halves": (lambda v: {**v, A: v[B], B: v[A]}, errors.PairError, "transposed or"),
    "swapped halves of a square weight": (put({A: ones(64, 8), B: ones(8, 64)}), errors.PairError, "transposed or"),
    "half an embedding": (
        put({ROOT + "model.embed_tokens.lora_embedding_A": ones(8, 4)}),
        errors.PairError, "lora_embedding_A has no lora_embedding_B"),
    "embedding and linear": (
        put({FIRST.format("embedding_A").removesuffix(".weight"): ones(8, 4)}), errors.PairError, "down_proj"),
    "DoRA that is not announced": (put({MAGNITUDE: ones(4)}), errors.ConfigError, "use_dora"),
    "a bias that is not announced": (put({BIAS: ones(4)}), errors.ConfigError, "lora_bias"),
    "two spellings": (
        put({MAGNITUDE: ones(4), MAGNITUDE[:-7]: ones(4)}), errors.TensorUnknownError, "mean the same"),
    "another variant": (put({FIRST.format("diag"): ones(4)}), errors.UnsupportedLoraError, "lora_diag"),
    "other adapter name": (
        put({ROOT + "x.lora_A.other.weight": ones(8, 4)}),
        errors.UnsupportedLoraError, "2 adapters: one without a name, 'other'"),
    "adapter of the whole model": (put({ROOT + "lora_A.weight": ones(4)}), errors.TensorUnknownError, "whole model"),
    "rows nobody announced": (
        put({ROOT + "x.token_adapter.trainable_tokens_delta": ones(2, 4)}), errors.ConfigError, "rows were trained"),
    "unknown part of a token adapter": (
        put({ROOT + "x.token_adapter.scale": ones(4)}), errors.TensorUnknownError, "trained tokens"),
    "two trained modules": (
        put({ROOT + "x.weight": ones(4), ROOT + "x.modules_to_save.weight": 2 * ones(4)}),
        errors.TensorUnknownError, "differ"),
    "kernel of B": (put({A: ones(8, 3, 3, 3), B: ones(4, 8, 3, 3)}), errors.PairError, "do not fit"),
    "giant kernel": (put({A: ones(8, 1, 10_000), B: ones(4, 8, 1)}), errors.LimitError, "kernel"),
    "giant rank": (put({A: ones(5000, 2), B: ones(3, 5000)}), errors.LimitError, "5000"),
    "a scalar": (put({A: np.array(1, np.float32)}), errors.PairError, "down_proj"),
    "wrapper inside": (
        lambda v: {k.replace("down_proj", "down_proj.base_layer"): x for k, x in v.items()},
        errors.UnsupportedLoraError, "wrapper"),
    "empty": (lambda v: {ROOT + "x.weight": ones(1)}, errors.EmptyAdapterError, "no lora_A"),
}  # fmt: skip


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
    for path in (folder.root, folder.root / "adapter_model.bin"):
        with pytest.raises(errors.PickleError, match="run code") as caught:
            load(path)
        assert "allow_pickle=True" in caught.value.fix


@pytest.mark.parametrize(("name", "base"), [("gpt2-conv1d", "tiny-gpt2"), ("llama-plain", "tiny-llama")])
def test_the_base_settles_an_orientation_that_the_configuration_gets_wrong(name, base, tmp_path):
    """`fan_in_fan_out` the wrong way round: the base has the last word, for square weights too."""
    right = load(ADAPTERS / name)
    shutil.copytree(ADAPTERS / name, tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    stated = json.loads(path.read_text())
    path.write_text(json.dumps({**stated, "fan_in_fan_out": not stated["fan_in_fan_out"]}))
    wrong = load(tmp_path / "a")
    assert wrong.shapes() != right.shapes()
    with open_checkpoint(BASES / base) as checkpoint:
        settled, expected = base_names.resolve(wrong, checkpoint), base_names.resolve(right, checkpoint)
        assert settled.shapes() == expected.shapes() == right.shapes()
        assert all(checkpoint.tensors[t.name].shape == t.shape for t in settled.shapes())
    assert [(p.a, p.b, p.scale) for p in settled.targets] == [(p.a, p.b, p.scale) for p in right.targets]


def test_a_refused_feature_on_the_command_line(folder, tmp_path):
    words = ["lora-to-lowrank", str(folder.config(use_qalora=True)), "-o", str(tmp_path / "x.lrc")]
    done = subprocess.run([sys.executable, "-m", "lrconvert.cli", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("E-LORA-FEATURE") and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "x.lrc").exists()


def test_modules_of_an_older_wrapper(folder):
    """The wrapper around a trained module left in the names, with and without the adapter's name."""
    prefix = "base_model.model.score.modules_to_save."
    for name in ("weight", "default.weight", "default.dense.weight", "dense.weight"):
        folder.tensors(lambda v: {k: x for k, x in v.items() if prefix not in k})
        path = folder.tensors(put({prefix + name: ones(4)}))
        (extra,) = load(path).extras
        assert extra.name == f"score.{name.removeprefix('default.')}" and extra.use == "replace"


def test_state_of_the_training_is_left_out_with_a_warning(folder):
    path = folder.tensors(put({FIRST.format("monteclora_sampler.std_prior").removesuffix(".weight"): ones(4)}))
    assert any("left out" in line and "std_prior" in line for line in load(path).warnings)


@pytest.mark.parametrize("path", ["absent", "text"])
def test_unknown_layouts(path, tmp_path):
    (tmp_path / "text").write_text("hello")
    with pytest.raises(errors.UnknownLayoutError):
        load(tmp_path / path)


def test_names_of_a_compiled_model(tmp_path):
    """torch.compile puts a module around the model, whose name PEFT saves; without it the adapter is the same."""
    source = ADAPTERS / "llama-plain"
    stored = safetensors.numpy.load_file(source / "adapter_model.safetensors")
    prefix = "base_model.model."
    renamed = {prefix + "_orig_mod." + name.removeprefix(prefix): value for name, value in stored.items()}
    shutil.copy(source / "adapter_config.json", tmp_path)
    safetensors.numpy.save_file(renamed, tmp_path / "adapter_model.safetensors")
    ours, plain = load(tmp_path), load(source)
    assert ours.targets == plain.targets and ours.extras == plain.extras
    name = next(iter(stored))
    safetensors.numpy.save_file(renamed | {name: stored[name]}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(errors.TensorUnknownError, match="mean the same"):
        load(tmp_path)


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
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_match_as_in_peft(pattern):
    from peft.utils.other import get_pattern_key

    for module in MODULES:
        theirs = get_pattern_key([pattern], module) == pattern
        assert bool(patterns.compile_pattern(pattern).match(module)) == theirs or module == pattern


def test_patterns_that_take_long_on_long_names_are_refused(tmp_path):
    """Each is allowed, and fine on the names of models; on a name of thousands of characters it is not."""
    patterns.check_work([".*.*.*x"] * 20, ["model.layers.0.self_attn.q_proj"] * 500)
    module = "." * 3000 + "m"
    tensors = {f"base_model.model.{module}.lora_{h}.weight": np.ones((2, 2), np.float32) for h in "AB"}
    safetensors.numpy.save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [module]}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "rank_pattern": {".*.*.*x": 2}}))
    with pytest.raises(errors.PatternError, match="may take"):
        load(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ".*.*.*x"}))
    load(tmp_path)


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+", "(a|a)*b", "(.*)*", r"(\w+\.)*x", "a" * 2000, "(", r"(a)\1", "(?=a)b", ".*.*.*.*x", "(a{1,9}){1,99}"],
)
def test_hostile_patterns_never_reach_the_matcher(pattern, folder):
    with pytest.raises(errors.PatternError):
        load(folder.config(rank_pattern={pattern: 4}))
