"""UNets by their configuration: modules, shapes, the order of a walk, names in Stability AI's code; what is numbered by
that order (cloneofsimo's lora) and what is named by it (sd-scripts' LoRAs of SDXL)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ASSETS, asset, dense
from hypothesis import given
from hypothesis import strategies as st
from models import one_target
from peers import oracle
from safetensors.numpy import load_file
from test_base_names import make_base
from test_reader_layouts import put, refused

from lrconvert import api
from lrconvert.core import errors
from lrconvert.formats import unet_names
from lrconvert.formats.readers.base import load
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.lora.adapter import LoraAdapter, Target, View
from lrconvert.methods import base as methods
from lrconvert.testing.layouts import safetensors_file

Config = dict[str, Any]
SD1: Config = {
    "_class_name": "UNet2DConditionModel",
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
}
SDXL: Config = {
    "_class_name": "UNet2DConditionModel",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 2,
    "projection_class_embeddings_input_dim": 2816,
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
}
TINY: Config = {
    **SD1,
    "block_out_channels": [8, 16, 24],
    "cross_attention_dim": 12,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": [1, 2, 1],
    "transformer_layers_per_block": [2, 1, 3],
    "norm_num_groups": 4,
}
CLIP: Config = {
    "model_type": "clip_text_model", "architectures": ["CLIPTextModel"], "num_hidden_layers": 2, "hidden_size": 8,
    "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 10,
}  # fmt: skip
ALL = (unet_names.ATTENTION, unet_names.GATE, unet_names.RESNET)


def test_modules_of_stable_diffusion() -> None:
    """Counted and read off the model: sixteen transformer blocks of nine layers, the shapes of well-known ones."""
    shapes = unet_names.modules(SD1)
    assert len(unet_names.walk(shapes, (unet_names.ATTENTION, unet_names.GATE), True)) == 144
    assert shapes["down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_v"] == (320, 768)
    assert shapes["up_blocks.1.attentions.2.transformer_blocks.0.ff.net.0.proj"] == (10240, 1280)
    assert shapes["up_blocks.0.resnets.2.conv_shortcut"] == (1280, 2560, 1, 1)
    assert shapes["up_blocks.2.resnets.0.conv1"] == (640, 1920, 3, 3)
    assert shapes["up_blocks.3.resnets.2.conv1"] == (320, 640, 3, 3)
    assert shapes["mid_block.resnets.1.time_emb_proj"] == (1280, 1280)
    assert "down_blocks.3.resnets.0.conv_shortcut" not in shapes and "up_blocks.0.attentions.0" not in str(shapes)
    assert shapes == unet_names.modules({"cross_attention_dim": 768})  # diffusers' own defaults
    large = unet_names.modules(SDXL)
    assert large["down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k"] == (1280, 2048)
    assert unet_names.is_sdxl(SDXL) and not unet_names.is_sdxl(SD1)
    assert not unet_names.is_sdxl({**SDXL, "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 3})


@pytest.mark.parametrize("change", [
    {"down_block_types": ["AttnDownBlock2D"] * 4}, {"mid_block_type": "UNetMidBlock2D"}, {"only_cross_attention": True},
    {"block_out_channels": [320, 0]}, {"block_out_channels": "wide"}, {"layers_per_block": [2, 2]},
    {"layers_per_block": 10**6}, {"transformer_layers_per_block": True}, {"up_block_types": [["UpBlock2D"]] * 4},
    {"block_out_channels": [8] * 100}, {"cross_attention_dim": -1},
], ids=str)  # fmt: skip
def test_other_unets_are_refused(change: Config) -> None:
    with pytest.raises(errors.BaseError):
        unet_names.modules({**SD1, **change})


SCALARS = st.none() | st.booleans() | st.integers(-2, 1 << 40) | st.floats() | st.text(max_size=4)
VALUES = SCALARS | st.lists(SCALARS | st.lists(SCALARS, max_size=2), max_size=9)


@given(st.dictionaries(st.sampled_from([*SD1, *SDXL, "only_cross_attention", "mid_block_type"]), VALUES))
def test_whatever_a_configuration_says(change: Config) -> None:
    """There are modules, or a refusal by name; nothing else, and nothing endless."""
    config = {**SD1, **change}
    unet_names.is_sdxl(config)
    try:
        shapes = unet_names.modules(config)
    except errors.BaseError as error:
        assert str(error).isprintable()
    else:
        assert set(unet_names.walk(shapes, ALL, True)) == set(shapes)


@pytest.mark.slow
@pytest.mark.parametrize("config", [SD1, SDXL, TINY], ids=["sd1", "sdxl", "tiny"])
def test_diffusers_makes_them_so(config: Config, tmp_path: Path) -> None:
    oracle.needed("diffusers")
    (answer,) = oracle.ask("diffusers", [(tmp_path, {"unet": config})])
    assert answer["outcome"] == "loads", answer
    ours = unet_names.modules(config)
    assert [name for name, _ in answer["walk"]] == unet_names.walk(ours, ALL, gate_last=True)
    assert {name: tuple(shape) for name, shape in answer["walk"]} == ours


# --- cloneofsimo ----------------------------------------------------------------------------------------------------


def numbered(shapes: Mapping[str, Sequence[tuple[int, ...]]], rank: int = 2) -> dict[str, np.ndarray]:
    """The tensors of a file whose modules have these shapes."""
    rng = np.random.default_rng(0)
    tensors = {}
    for model, walk in shapes.items():
        for n, (out, *inner) in enumerate(walk):
            tensors[f"{model}:{n}:up"] = rng.standard_normal((out, rank, *(1 for _ in inner[1:]))).astype("<f4")
            tensors[f"{model}:{n}:down"] = rng.standard_normal((rank, *inner)).astype("<f4")
    return tensors


def written(folder: Path, tensors: Mapping[str, np.ndarray], **classes: Sequence[str]) -> Path:
    notes = {model: json.dumps(list(names)) for model, names in classes.items()}
    return put(folder, {"lora.safetensors": safetensors_file(tensors, notes)})


def pipeline(folder: Path, unet: Config = TINY, text: Config | None = CLIP) -> Path:
    """A diffusers pipeline of configurations alone."""
    put(folder, {"model_index.json": b"{}"})
    put(folder / "unet", {"config.json": json.dumps(unet).encode()})
    if text is not None:
        put(folder / "text_encoder", {"config.json": json.dumps(text).encode()})
    return folder


def walked(config: Config, parts: Sequence[str], gate_last: bool) -> list[tuple[str, tuple[int, ...]]]:
    shapes = unet_names.modules(config)
    return [(name, shapes[name]) for name in unet_names.walk(shapes, parts, gate_last)]


USUAL = ["CrossAttention", "Attention", "GEGLU"]
TRAINED = {
    "usual": (USUAL, ALL[:2]),
    "attention": (["Attention"], ALL[:1]),
    "extended": ([*USUAL, "ResnetBlock2D"], ALL),
}


@pytest.mark.parametrize("gate_last", [False, True], ids=["old", "new"])
@pytest.mark.parametrize("kind", TRAINED)
def test_numbers_become_names(kind: str, gate_last: bool, tmp_path: Path) -> None:
    """By the headers of a UNet and by its configuration; the order of the release that trained it shows in the file."""
    classes, parts = TRAINED[kind]
    walk = walked(TINY, parts, gate_last)
    folder = written(tmp_path / "x", numbered({"unet": [shape for _, shape in walk]}), unet=classes)
    plain = {p.target.name: p for p in load(folder).targets}
    shapes = {f"{name}.weight": shape for name, shape in unet_names.modules(TINY).items()}
    for base, stem in ((pipeline(tmp_path / "p"), "unet."), (make_base(tmp_path / "unet", shapes, TINY), "")):
        lora = load(folder, ReadOptions(base=base))
        assert not lora.warnings
        by_name = {p.target.name: p for p in lora.targets}
        assert set(by_name) == {f"{stem}{name}.weight" for name, _ in walk}
        for n, (name, shape) in enumerate(walk):
            pair = by_name[f"{stem}{name}.weight"]
            assert (pair.a, pair.b) == (plain[f"unet:{n}.weight"].a, plain[f"unet:{n}.weight"].b)
            assert pair.target.shape == shape


def test_text_encoders_and_lists(tmp_path: Path) -> None:
    """CLIP makes k before v before q; a .pt says neither model nor classes."""
    torch = pytest.importorskip("torch")
    base = pipeline(tmp_path / "p")
    both = numbered({"text_encoder": [(8, 8)] * 8, "unet": [shape for _, shape in walked(TINY, ALL[:2], False)]})
    folder = written(tmp_path / "x", both, unet=USUAL, text_encoder=["CLIPAttention"])
    plain = {p.target.name: p.a for p in load(folder).targets}
    named = {p.target.name: p.a for p in load(folder, ReadOptions(base=base)).targets}
    for n, leaf in enumerate(("k_proj", "v_proj", "q_proj", "out_proj")):
        (name,) = [name for name in named if name.endswith(f"layers.1.self_attn.{leaf}.weight")]
        assert name.startswith("text_encoder.") and named[name] == plain[f"text_encoder:{4 + n}.weight"]
    for stem, model in (("unet.", "unet"), ("text_encoder.", "text_encoder")):
        values = [torch.from_numpy(both[f"{model}:{n}:{half}"]) for n in range(sum(model in k for k in both) // 2)
                  for half in ("up", "down")]  # fmt: skip
        torch.save(values, tmp_path / f"{model}.pt")
        listed = load(tmp_path / f"{model}.pt", ReadOptions(allow_pickle=True, base=base))
        assert {p.target.name: p.a for p in listed.targets} == {k: v for k, v in named.items() if k.startswith(stem)}


def test_what_does_not_fit_the_base(tmp_path: Path) -> None:
    base = pipeline(tmp_path / "p")
    walk = [shape for _, shape in walked(TINY, ALL[:2], False)]
    tensors = numbered({"unet": walk})
    wrong = {**tensors, "unet:7:down": np.ones((2, 13), "<f4")}
    cases: dict[str, tuple[dict[str, np.ndarray], Any, str]] = {
        "a shape": (wrong, USUAL, "unet:7 is [8, 13], and"),
        "a count": (numbered({"unet": walk[:-1]}), USUAL, f"numbers {len(walk) - 1} modules of 'unet', the base has"),
        "classes": (tensors, ["Attention", "Transformer2DModel"], "the class 'Transformer2DModel'"),
        "no classes": (tensors, ["CLIPAttention"], "could be numbered"),
        "a list": (tensors, [1], "expected a list of classes"),
        "another model": (numbered({"prior": walk}), USUAL, "belongs to prior"),
    }
    for n, (arrays, classes, text) in enumerate(cases.values()):
        folder = written(tmp_path / str(n), arrays, unet=classes)
        refused("E-BASE", folder, text, base=base)
    gap = {name.replace("unet:9:", "unet:999:"): value for name, value in tensors.items()}
    refused("E-PAIR", written(tmp_path / "gap", gap, unet=USUAL), "unet:9 is missing", base=base)
    twice = {name.replace("unet:9:", "unet:03:"): value for name, value in tensors.items()}
    refused("E-PAIR", written(tmp_path / "twice", twice, unet=USUAL), "two modules of the number 3", base=base)
    other = pipeline(tmp_path / "other", {**TINY, "mid_block_type": "UNetMidBlock2D"})
    refused("E-BASE", written(tmp_path / "x", tensors, unet=USUAL), "not known here", base=other)


REAL = {
    "cloneofsimo_safetensors/analog_svd_rank4.safetensors": (192, SD1),
    "cloneofsimo_safetensors/lora_disney.safetensors": (192, SD1),
    "cloneofsimo_safetensors/lora_disney_inpainting.safetensors": (192, SD1),
    "cloneofsimo_pt/lora_pop.pt": (128, {**SD1, "cross_attention_dim": 1024}),  # of Stable Diffusion 2
}


@pytest.mark.skipif(not ASSETS.is_dir(), reason="no real adapters here")
@pytest.mark.parametrize("name", REAL)
def test_real_ones_fit_stable_diffusion(name: str, tmp_path: Path) -> None:
    """Every shape agrees with the model's configuration, in one order alone."""
    count, unet = REAL[name]
    clip = {**CLIP, "num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    base = pipeline(tmp_path / "p", unet, clip)
    lora = load(asset(f"adapters/{name}"), ReadOptions(allow_pickle=True, base=base))
    assert isinstance(lora, LoraAdapter) and len(lora.targets) == count
    assert not [warning for warning in lora.warnings if "base" in warning]
    assert sum(p.target.name.startswith("unet.mid_block") for p in lora.targets) in (8, 9)
    other = pipeline(tmp_path / "q", {**unet, "cross_attention_dim": 512})
    refused("E-BASE", asset(f"adapters/{name}"), "in the base", base=other, allow_pickle=True)


# --- SDXL in sd-scripts ---------------------------------------------------------------------------------------------

BLOCK = "transformer_blocks.0"
EXPECTED = {
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj":
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
    "text_encoder_2.text_model.encoder.layers.31.mlp.fc1": "lora_te2_text_model_encoder_layers_31_mlp_fc1",
    f"unet.down_blocks.1.attentions.0.{BLOCK}.attn1.to_q": "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    "unet.down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj":
        "lora_unet_input_blocks_8_1_transformer_blocks_9_ff_net_0_proj",
    "unet.down_blocks.2.attentions.1.proj_in": "lora_unet_input_blocks_8_1_proj_in",
    f"unet.mid_block.attentions.0.{BLOCK}.attn2.to_out.0":
        "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_out_0",
    f"unet.up_blocks.0.attentions.2.{BLOCK}.attn2.to_k": "lora_unet_output_blocks_2_1_transformer_blocks_0_attn2_to_k",
    f"unet.up_blocks.1.attentions.0.{BLOCK}.attn2.to_v": "lora_unet_output_blocks_3_1_transformer_blocks_0_attn2_to_v",
    "unet.add_embedding.linear_2": "lora_unet_label_emb_0_2",
    "unet.time_embedding.linear_1": "lora_unet_time_embed_0",
    "unet.conv_in": "lora_unet_input_blocks_0_0",
    "unet.conv_out": "lora_unet_out_2",
    "unet.down_blocks.0.resnets.1.conv1": "lora_unet_input_blocks_2_0_in_layers_2",
    "unet.down_blocks.0.downsamplers.0.conv": "lora_unet_input_blocks_3_0_op",
    "unet.down_blocks.1.resnets.0.conv_shortcut": "lora_unet_input_blocks_4_0_skip_connection",
    "unet.mid_block.resnets.1.conv2": "lora_unet_middle_block_2_out_layers_3",
    "unet.up_blocks.1.upsamplers.0.conv": "lora_unet_output_blocks_5_2_conv",
    "unet.up_blocks.2.resnets.2.time_emb_proj": "lora_unet_output_blocks_8_0_emb_layers_1",
}  # fmt: skip


def of_names(names: Sequence[str], context: int = 2048) -> LoraAdapter:
    """Small layers of these names; what takes texts is `context` wide."""
    pairs = []
    for n, name in enumerate(sorted(names)):
        inner = context if name.endswith((".attn2.to_k", ".attn2.to_v")) else 8
        conv = "conv" in name or name.endswith("downsamplers.0.conv")
        shape: tuple[int, ...] = (8, inner, 3, 3) if conv else (8, inner)
        pairs.append(one_target(Target(f"{name}.weight", shape, View("conv:3x3:1" if conv else "matrix")), 2, seed=n))
    return LoraAdapter(tuple(pairs))


def names_in(folder: Path) -> set[str]:
    return {name.partition(".")[0] for name in load_file(folder / "lora.safetensors")}


def test_sdxl_names_of_sd_scripts(tmp_path: Path) -> None:
    """As sd-scripts' own UNet of SDXL is called; told by the width of its texts or by the base, and read again."""
    compact = api.convert(of_names(list(EXPECTED)), "lowrank", bits=12).compact
    api.export(compact, tmp_path / "without", to="kohya")
    assert names_in(tmp_path / "without") == set(EXPECTED.values())
    base = put(tmp_path / "pipeline", {"model_index.json": b"{}"})
    put(base / "unet", {"config.json": json.dumps(SDXL).encode()})
    for encoder in ("text_encoder", "text_encoder_2"):
        names = [name.removeprefix(f"{encoder}.") for name in EXPECTED if name.startswith(f"{encoder}.")]
        make_base(base / encoder, {f"{name}.weight": (8, 8) for name in names}, {"model_type": "clip_text_model"})
    api.export(compact, tmp_path / "with base", to="kohya", base=base)
    one, two = ((tmp_path / name / "lora.safetensors").read_bytes() for name in ("with base", "without"))
    assert one == two
    again = api.load_lora(tmp_path / "without", base=base)
    assert {p.target.name for p in again.targets} == {f"{name}.weight" for name in EXPECTED}
    wanted = {target.name: b @ a for target, a, b in methods.expand_all(compact)}
    for pair in again.targets:
        np.testing.assert_allclose(dense(pair), wanted[pair.target.name], rtol=1e-5, atol=1e-7)
    text_only = api.convert(
        of_names([k for k in EXPECTED if k.startswith("text_encoder.")]), "lowrank", bits=12
    ).compact
    for known, prefix in ((base, "lora_te1_"), (None, "lora_te_")):
        out = tmp_path / prefix
        api.export(text_only, out, to="kohya", base=known)
        assert all(name.startswith(prefix) for name in names_in(out))


def test_names_stay_diffusers_for_other_unets(tmp_path: Path) -> None:
    names = [f"unet.mid_block.attentions.0.{BLOCK}.attn2.to_k", "unet.down_blocks.0.resnets.0.conv1"]
    expected = {f"lora_{name.replace('.', '_')}" for name in names}
    small = put(tmp_path / "sd1", {"config.json": json.dumps(SD1).encode()})
    for n, (context, base) in enumerate(((768, None), (1280, None), (768, small), (2048, small))):
        compact = api.convert(of_names(names, context), "lowrank", bits=12).compact
        api.export(compact, tmp_path / str(n), to="kohya", base=base)
        assert names_in(tmp_path / str(n)) == expected
    odd = api.convert(of_names([*names, "unet.class_embedding.linear_1"]), "lowrank", bits=12).compact
    with pytest.raises(errors.ExportError, match="has no name in the code"):
        api.export(odd, tmp_path / "odd", to="kohya")
    empty = put(tmp_path / "empty", {"model_index.json": b"{}"})
    with pytest.raises(errors.FileKindError, match="neither a UNet"):
        api.export(odd, tmp_path / "odd", to="kohya", base=empty)


def test_the_two_directions_are_one_table() -> None:
    table = unet_names.stability_names(levels=3)
    back = {theirs: ours for ours, theirs in table.items()}
    assert len(back) == len(table)
    for name in unet_names.modules(SDXL):
        other = unet_names.renamed(name, table, ".")
        assert other is not None and other != name and unet_names.renamed(other, back, ".") == name
    assert unet_names.renamed("down_blocks.1.attentions", table, ".") is None
