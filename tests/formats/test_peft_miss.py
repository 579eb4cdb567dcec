"""PEFT MiSS folders, out and in: the real PEFT as the oracle of both."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from conftest import ADAPTERS, BASES, random_lora
from safetensors.torch import load_file, save_file
from test_export import dense_reference, load_in_peft, logits

from lrconvert import api
from lrconvert.core import errors
from lrconvert.formats.readers import base as readers
from lrconvert.formats.readers import peft_miss
from lrconvert.lora.adapter import TRANSPOSED, ExtraTensor
from lrconvert.methods import base as methods

OPTIONS = readers.ReadOptions()
STANDARD, MINI = {"init_weights": True}, {"init_weights": "mini", "mini_r": 8}


# --- out ------------------------------------------------------------------------------------------------------------

EXPORTS = {
    "standard": {"rank": 6},
    "cut": {"rank": 7},  # divides no width
    "mini": {"variant": "mini", "rank": 16, "mini_rank": 4},
    "one bit": {"bits": "1", "rank": 16},
    "groups": {"bits": "4", "rank": 8, "group_size": 24},
    "budget": {"peft_compatible": True, "target_ratio": 4},
}


def exported(folder, adapter="llama-plain", **options):
    compact = api.convert(api.load_lora(ADAPTERS / adapter), "bone", **options).compact
    api.export(compact, folder, to="peft-miss", overwrite=True)
    return compact


def close(theirs, ours):
    assert np.abs(theirs - ours).max() <= 1e-5 * np.abs(ours).max()


@pytest.mark.parametrize("options", EXPORTS.values(), ids=EXPORTS)
def test_peft_has_our_logits(options, tmp_path):
    compact = exported(tmp_path / "out", **options)
    close(logits(load_in_peft("tiny-llama", tmp_path / "out")), logits(dense_reference("tiny-llama", compact)))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["init_weights"] == "mini") == (options.get("variant") == "mini")


@pytest.mark.parametrize("options", [{"rank": 6}, {"variant": "mini", "rank": 4, "mini_rank": 8}], ids=["bone", "mini"])
def test_peft_has_our_logits_with_a_head(options, tmp_path):
    compact = exported(tmp_path / "out", "bert-classifier", **options)
    assert compact.extras
    model = {"model_class": "AutoModelForSequenceClassification", "num_labels": 3}
    theirs = logits(load_in_peft("tiny-bert", tmp_path / "out", **model))
    close(theirs, logits(dense_reference("tiny-bert", compact, **model)))


def test_merged_by_peft_it_is_the_same(tmp_path):
    compact = exported(tmp_path / "out", rank=7)
    merged = load_in_peft("tiny-llama", tmp_path / "out").merge_and_unload()
    close(logits(merged), logits(dense_reference("tiny-llama", compact)))


def test_targets_without_a_block_are_left_out(tmp_path):
    compact = api.convert(api.load_lora(ADAPTERS / "llama-plain"), "bone", rank=6).compact
    ranks = list(compact.config.ranks)
    columns = compact.config.columns(0, compact.targets[0])
    ranks[0] = 0
    fewer = {"blocks": compact.tensors["blocks"][6 * columns :]}
    compact = replace(compact, config=replace(compact.config, ranks=tuple(ranks)), tensors=fewer)
    api.export(compact, tmp_path / "out", to="peft-miss")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert compact.targets[0].name.removesuffix(".weight") not in config["target_modules"]
    close(logits(load_in_peft("tiny-llama", tmp_path / "out")), logits(dense_reference("tiny-llama", compact)))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rank": 4, "shard": "out"}, "shards along outputs"),
        ({"rank": 30}, "different ranks"),  # capped at 16 inputs in one target
        ({"target_size": 1500}, "different ranks"),
    ],
)
def test_what_peft_cannot_express_is_refused_by_name(options, reason, tmp_path):
    compact = api.convert(random_lora(), "bone", **options).compact
    with pytest.raises(errors.ExportError, match=reason):
        api.export(compact, tmp_path / "out", to="peft-miss")
    assert list(tmp_path.iterdir()) == []


def test_other_forms_and_layers_are_refused_by_name(tmp_path):
    with pytest.raises(errors.ExportError, match="not bone"):
        api.export(api.convert(random_lora(), "lowrank", bits=4).compact, tmp_path / "out", to="peft-miss")
    turned = api.convert(random_lora(view=TRANSPOSED), "bone", rank=2).compact
    with pytest.raises(errors.ExportError, match="no linear layer"):
        api.export(turned, tmp_path / "out", to="peft-miss")
    plain = api.convert(random_lora(), "bone", rank=2).compact
    magnitude = ExtraTensor("layers.0.proj.weight", "F32", (24,), bytes(96), "magnitude")
    with pytest.raises(errors.ExportError, match="no place"):
        api.export(replace(plain, extras=(magnitude,)), tmp_path / "out", to="peft-miss")
    assert list(tmp_path.iterdir()) == []


# --- in -------------------------------------------------------------------------------------------------------------


def saved(folder, **settings):
    """A MiSS of PEFT on the tiny llama, its blocks random; returns the model."""
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(BASES / "tiny-llama", dtype=torch.float32)
    config = peft.MissConfig(target_modules=["q_proj", "v_proj", "down_proj"], **{"r": 7, **settings})
    model = peft.get_peft_model(base, config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "miss_block" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def read(folder):
    return peft_miss.read_on(folder, BASES / "tiny-llama", OPTIONS)


def as_bone(folder):
    """The same files as PEFT before 0.19 wrote them."""
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({k.replace(".miss_", ".bone_"): v for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    config = {k: v for k, v in config.items() if k not in ("mini_r", "miss_dropout")}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "BONE"}))


MODES = {"true": STANDARD, "false": {"init_weights": False}, "mini": MINI, "mini of one": {"init_weights": "mini"}}


@pytest.mark.parametrize("settings", MODES.values(), ids=MODES)
def test_a_miss_is_read_without_loss(settings, tmp_path):
    model = saved(tmp_path / "miss", **settings)
    assert peft_miss.recognises(tmp_path / "miss")
    compact = read(tmp_path / "miss")
    stored = load_file(tmp_path / "miss" / "adapter_model.safetensors")
    api.write(compact, tmp_path / "x.lrc")
    assert api.validate(tmp_path / "x.lrc", base=BASES / "tiny-llama").ok
    again = api.read(tmp_path / "x.lrc")
    values = methods.values(methods.get("bone"), again)
    for which, target in enumerate(again.targets):
        name = f"base_model.model.{target.name.removesuffix('.weight')}.miss_block"
        ours = methods.get("bone").block(again.config, again.targets, values, which)
        assert np.array_equal(ours, stored.pop(name).numpy())
    assert not stored
    close(logits(dense_reference("tiny-llama", again)), logits(model))
    api.export(again, tmp_path / "again", to="peft-miss")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("miss", "again"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_a_bone_of_before_miss_is_the_same(tmp_path):
    saved(tmp_path / "miss", **STANDARD)
    one = read(tmp_path / "miss")
    as_bone(tmp_path / "miss")
    two = read(tmp_path / "miss")
    assert one.config == two.config and np.array_equal(one.tensors["blocks"], two.tensors["blocks"])
    assert two.provenance.fields["source_format"] == "peft-bone"


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float16, 16), (torch.bfloat16, 16), (torch.float32, 32)])
def test_sixteen_bits_where_they_hold_every_number(dtype, bits, tmp_path):
    saved(tmp_path, **STANDARD)
    tensors = {k: v.to(dtype, copy=True) for k, v in load_file(tmp_path / "adapter_model.safetensors").items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    compact = read(tmp_path)
    assert compact.config.bits == bits
    whole = torch.cat([tensors[k].float().reshape(-1) for k in sorted(tensors)])
    assert np.array_equal(np.sort(compact.tensors["blocks"]), np.sort(whole.numpy()))


def test_numbers_of_any_size_are_kept(tmp_path):
    saved(tmp_path, **STANDARD)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    first = next(iter(tensors.values()))
    first[0, 0], first[0, 1], first[0, 2] = 1e38, 1e-42, -0.0
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    compact = read(tmp_path)
    api.write(compact, tmp_path / "x.lrc")
    assert {np.float32(1e38), np.float32(1e-42)} <= set(api.read(tmp_path / "x.lrc").tensors["blocks"].tolist())


def test_our_own_export_needs_no_base(tmp_path):
    for options in EXPORTS.values():
        compact = exported(tmp_path / "out", **options)
        for path in (tmp_path / "out", tmp_path / "out" / "adapter_model.safetensors"):
            again = peft_miss.read(path, OPTIONS)
            for one, two in zip(methods.expand_all(compact), methods.expand_all(again), strict=True):
                assert one[0] == two[0] and np.array_equal(one[1], two[1]) and np.array_equal(one[2], two[2])


def test_heads_and_pickles_ride_along(tmp_path):
    compact = exported(tmp_path / "out", "bert-classifier", rank=4)
    wanted = {e.name: e.data for e in compact.extras}
    assert {e.name: e.data for e in peft_miss.read(tmp_path / "out", OPTIONS).extras} == wanted
    torch.save(load_file(tmp_path / "out" / "adapter_model.safetensors"), tmp_path / "out" / "adapter_model.bin")
    (tmp_path / "out" / "adapter_model.safetensors").unlink()
    with pytest.raises(errors.PickleError):
        peft_miss.read(tmp_path / "out", OPTIONS)
    again = peft_miss.read(tmp_path / "out", readers.ReadOptions(allow_pickle=True))
    assert {e.name: e.data for e in again.extras} == wanted


def test_it_is_found_by_its_content(tmp_path):
    """... by the first reader that knows it: the reader of LoRAs has to leave it alone."""
    compact = exported(tmp_path / "out", rank=4)
    for path in (tmp_path / "out", tmp_path / "out" / "adapter_model.safetensors"):
        assert api.load(path).config == compact.config
    assert "compact adapter" in api.load_lora(tmp_path / "out").warnings[0]


BLOCK = "base_model.model.model.layers.0.self_attn.q_proj.miss_block"


def block(edit, name=BLOCK):
    """An edit of one block, stored under `name`."""
    return lambda t, c: t.update({name: edit(t[BLOCK]).clone().contiguous()})


def setting(**fields):
    return lambda t, c: c.update(fields)


def resized(rank, columns=None, **fields):
    """Settings, and blocks of another shape."""
    return lambda t, c: (c.update(fields), t.update({k: torch.ones(rank, columns or v.shape[1]) for k, v in t.items()}))


REFUSED = {
    "no block": (lambda t, c: t.clear(), errors.EmptyAdapterError),
    "a column less": (block(lambda b: b[:, 1:]), errors.ShapeError),
    "three dimensions": (block(lambda b: b[None]), errors.ShapeError),
    "a row less": (block(lambda b: b[1:]), errors.PairError),
    "NaN": (block(lambda b: b.fill_(float("nan"))), errors.ValueRangeError),
    "infinity": (block(lambda b: b.fill_(float("inf"))), errors.ValueRangeError),
    "beyond float32": (block(lambda b: b.double() * 1e300), errors.ValueRangeError),
    "finer than float32": (block(lambda b: b.double() / 3), errors.ValueRangeError),
    "integers": (block(lambda b: b.int()), errors.DtypeError),
    "an odd part": (block(lambda b: torch.ones(1), BLOCK.replace("block", "odd")), errors.TensorUnknownError),
    "a part of a bone": (block(lambda b: b, BLOCK.replace("miss", "bone")), errors.TensorUnknownError),
    "no prefix": (block(lambda b: torch.ones(1), "x.weight"), errors.TensorUnknownError),
    "a layer that is not there": (block(lambda b: b, BLOCK.replace("q_proj", "x_proj")), errors.BaseError),
    "no linear layer": (
        block(lambda b: b, BLOCK.replace("self_attn.q_proj", "input_layernorm")),
        errors.BaseError,
    ),
    "r of another": (setting(r=6), errors.PairError),
    "r as text": (setting(r="7"), errors.ConfigError),
    "r of nothing": (setting(r=0), errors.ConfigError),
    "r beyond all": (setting(r=5000), errors.LimitError),
    "r above the inputs": (resized(200, r=200), errors.ShapeError),
    "a bat of other shape": (setting(init_weights="bat"), errors.ShapeError),
    "an unknown variant": (setting(init_weights="maxi"), errors.UnsupportedLoraError),
    "a number as variant": (setting(init_weights=1), errors.UnsupportedLoraError),
    "mini of other width": (setting(init_weights="mini", mini_r=8), errors.ShapeError),
    "mini without width": (setting(init_weights="mini", mini_r=None), errors.ConfigError),
    "mini that does not divide": (resized(7, 7, init_weights="mini", mini_r=7), errors.ShapeError),
    "an unknown field": (setting(rank_pattern={"q_proj": 3}), errors.UnsupportedLoraError),
    "another kind": (setting(peft_type="LOHA"), errors.ConfigError),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case, tmp_path):
    edit, error = REFUSED[case]
    saved(tmp_path, **STANDARD)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    edit(tensors, config)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(error):
        read(tmp_path)


def test_a_bone_has_no_mini(tmp_path):
    saved(tmp_path, **MINI)
    as_bone(tmp_path)
    with pytest.raises(errors.UnsupportedLoraError, match="mini"):
        read(tmp_path)


def test_without_a_base_the_widths_are_asked_for(tmp_path):
    """The base that the configuration names is not opened."""
    saved(tmp_path / "miss", **STANDARD)
    named = json.loads((tmp_path / "miss" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(BASES / "tiny-llama")
    with pytest.raises(errors.BaseError, match="how many inputs"):
        peft_miss.read(tmp_path / "miss", OPTIONS)
    with pytest.raises(errors.ShapeError):
        peft_miss.read_on(tmp_path / "miss", narrow_base(tmp_path), OPTIONS)


def narrow_base(tmp_path):
    """A base with the same names and other widths."""
    shutil.copytree(BASES / "tiny-llama", tmp_path / "base")
    for path in (tmp_path / "base").glob("*.safetensors"):
        tensors = {k: v[: len(v) // 2].clone() if "proj" in k else v for k, v in load_file(path).items()}
        save_file(tensors, path)
    return tmp_path / "base"


@pytest.mark.parametrize(
    ("shapes", "error"),
    [
        (None, errors.BaseError),
        ([], errors.BaseError),
        ({"layers.0.proj": "x"}, errors.ConfigError),
        ({"layers.0.proj": [24, True]}, errors.ConfigError),
        ({"layers.0.proj": [24, 0]}, errors.ConfigError),
        ({"layers.0.proj": [24, 16, 1]}, errors.ConfigError),
        ({"layers.0.proj": [24, 1 << 31]}, errors.LimitError),
        ({"layers.0.proj": [24, (1 << 31) - 1]}, errors.LimitError),  # more than may be expanded
        ({"layers.0.proj": [25, 16]}, errors.ShapeError),
    ],
)
def test_stated_shapes_are_checked(shapes, error, tmp_path):
    api.export(api.convert(random_lora(((24, 16),)), "bone", rank=15).compact, tmp_path / "out", to="peft-miss")
    (tmp_path / "out" / "lrconvert.json").write_text(json.dumps({} if shapes is None else {"shapes": shapes}))
    with pytest.raises(error):
        peft_miss.read(tmp_path / "out", OPTIONS)
