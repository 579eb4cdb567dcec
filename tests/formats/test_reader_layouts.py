"""Layouts of other tools: what is read is what was written, to the bit; or it is refused by name.

Files are written by `lrconvert.testing.layouts`, or here, from the definitions of the layouts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from conftest import BASES, FIXTURES, dense
from test_base_names import make_base

from lrconvert import api, cli
from lrconvert.core import errors
from lrconvert.formats.readers.base import all_readers, load
from lrconvert.formats.readers.shared.naming import parses
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.lora.adapter import LoraAdapter
from lrconvert.testing import layouts
from lrconvert.testing.layouts import Known, safetensors_file

PICKLES = ReadOptions(allow_pickle=True)
ATTENTION = "down_blocks.0.attentions.1.transformer_blocks.0.attn1"
UNET = {"_class_name": "UNet2DConditionModel", "layers_per_block": 2}


def put(folder: Path, files: Mapping[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def stored(folder: Path, tensors: Mapping[str, Any]) -> Path:
    """A folder with one safetensors file."""
    return put(folder, {"x.safetensors": safetensors_file(tensors)})


def known(module: str, out: int = 6, inner: int = 5, rank: int = 2, alpha: float = 3.0, kernel: tuple[int, ...] = (),
          dtype: str = "<f4") -> Known:  # fmt: skip
    rng = np.random.default_rng(len(module) + 10 * out + inner)
    a = rng.standard_normal((rank, inner, *kernel)).astype(dtype)
    return Known(module, a, rng.standard_normal((out, rank)).astype(dtype), alpha)


def check(lora: Any, wanted: Mapping[str, Known], scale: float | None = None) -> None:
    """The targets have these names, factors to the bit, and scales."""
    assert isinstance(lora, LoraAdapter)
    assert [pair.target.name for pair in lora.targets] == sorted(wanted)
    for pair in lora.targets:
        source = wanted[pair.target.name]
        assert pair.a.array.tobytes() == source.a.tobytes() and pair.b.array.tobytes() == source.b.tobytes()
        assert pair.a.dtype == pair.b.dtype == {4: "F32", 2: "F16"}[source.a.dtype.itemsize]
        assert pair.scale == (source.scale if scale is None else scale)
        assert pair.target.matrix_shape == (source.b.shape[0], math.prod(source.a.shape[1:]))


def refused(code: str, path: Path, text: str = "", **options: Any) -> None:
    with pytest.raises(errors.LrcError) as caught:
        load(path, ReadOptions(**options))
    assert caught.value.code == code and text in str(caught.value), caught.value
    named = (path, options.get("base", path))
    assert str(caught.value).isprintable() and any(where.name in str(caught.value) for where in named)


def rewritten(files: Mapping[str, bytes], change: Any, metadata: dict[str, str] | None = None) -> dict[str, bytes]:
    """The safetensors file of a folder with `change` made to its arrays."""
    (name,) = files
    return {name: safetensors_file(change(_tensors(files)), metadata)}


# --- every layout ---------------------------------------------------------------------------------------------------

PAIR = [known(f"{ATTENTION}.to_q", dtype="<f2"), known(f"{ATTENTION}.to_out.0", out=4, rank=3, alpha=1.5)]
TEXT = [known("model.layers.6.self_attn.q_proj"), known("model.layers.7.mlp.down_proj", 4, 9)]
BLOCKS = [known("blk.6.attn_v"), known("blk.7.ffn_down", 4, 9)]
FLAT = "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_"
ENCODER = [known("text_model.encoder.layers.0.self_attn.q_proj")]
VIT = [known("q"), known("v")]


def named(pairs: list[Known], form: str = "{module}") -> dict[str, Known]:
    """The pairs by the names of their targets."""
    return {f"{form.format(n=n, module=k.module)}.weight": k for n, k in enumerate(pairs)}


KOHYA_NAMES = {f"{FLAT}to_q.weight": PAIR[0], f"{FLAT}to_out_0.weight": PAIR[1]}
IN_UNET, IN_TEXT, ON_VIT = named(PAIR, "unet.{module}"), named(TEXT), named(VIT, "w_{n:05d}")
ALPHA = {"alpha": 3.0}
# Name: the folder, {target: known}, options; the scale where the layout states none.
WRITTEN: dict[str, tuple[dict[str, bytes], dict[str, Known], dict[str, Any], float | None]] = {
    "kohya": (layouts.kohya(PAIR), KOHYA_NAMES, {}, None),
    "diffusers": (layouts.diffusers(PAIR), IN_UNET, {}, None),
    "diffusers, lora.down": (layouts.diffusers(PAIR, form="lora"), IN_UNET, {}, None),
    "diffusers, text encoder": (
        layouts.diffusers(ENCODER, "text_encoder", "linear"), named(ENCODER, "text_encoder.{module}"), {}, None),
    "diffusers, processors": (layouts.diffusers(PAIR, form="processor"), IN_UNET, {}, 1.0),
    "diffusers, with alpha": (
        layouts.diffusers(PAIR[:1], form="processor"), named(PAIR[:1], "unet.{module}"), ALPHA, None),
    "mlx": (layouts.mlx(TEXT), IN_TEXT, {}, None),
    "mlx npz": (layouts.mlx(TEXT, npz=True), IN_TEXT, {}, None),
    "raw": (layouts.raw(TEXT), IN_TEXT, ALPHA, None),
    "raw with .weight": (layouts.raw(TEXT, ".weight"), IN_TEXT, ALPHA, None),
    "raw with a name": (layouts.raw(TEXT, ".default.weight"), IN_TEXT, ALPHA, None),
    "cloneofsimo": (layouts.cloneofsimo(PAIR), named(PAIR, "unet:{n}"), {}, 1.0),
    "lora_vit": (layouts.lora_vit(VIT), ON_VIT, {}, 1.0),
    "lora_vit turned": (layouts.lora_vit(VIT, turned=True), ON_VIT, {}, 1.0),
    "gguf": (layouts.gguf(BLOCKS), named(BLOCKS), {}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_what_was_written_is_read(name, tmp_path):
    files, wanted, options, scale = WRITTEN[name]
    lora = load(put(tmp_path / "x", files), ReadOptions(**options))
    check(lora, wanted, scale)
    layout = name.replace(" ", ",").partition(",")[0]
    assert lora.provenance.fields["source_format"] == layout and len(lora.provenance.source) == 64
    assert any("names" in line for line in lora.warnings)  # not those of a base
    forced = ReadOptions(**options, layout=layout)
    assert load(tmp_path / "x", forced) == lora


@pytest.mark.parametrize("name", WRITTEN)
def test_layouts_are_told_by_content_alone(name, tmp_path):
    """Under another file name, alone in a folder, the same reader takes it."""
    files, wanted, options, scale = WRITTEN[name]
    weights = next(n for n in files if n != "adapter_config.json")
    folder = put(tmp_path / "x", {f"something{Path(weights).suffix}": files[weights]})
    if name.startswith("mlx"):
        options = {"alpha": 3.0}  # its scale was in the configuration
    check(load(folder, ReadOptions(**options)), wanted, scale)
    names = [info.name for info in _infos(folder / f"something{Path(weights).suffix}")]
    if not name.startswith("gguf"):
        assert [r.id for r in all_readers() if r.knows(names)] == [name.replace(" ", ",").partition(",")[0]]


def _infos(path: Path) -> Any:
    from lrconvert.formats.readers.gguf.file import GgufFile
    from lrconvert.formats.readers.shared.weights import open_weights

    with GgufFile(path) if path.suffix == ".gguf" else open_weights(path, ReadOptions()) as file:
        return file.tensors


def test_the_reader_and_alpha_can_be_asked_for(tmp_path):
    folder = put(tmp_path / "x", layouts.raw(TEXT))
    refused("E-CONFIG", folder, "alpha=")
    refused("E-OPTION", folder, "there is no reader 'koya'", layout="koya")
    refused("E-TENSOR", folder, "no known meaning", layout="kohya")
    refused("E-OPTION", put(tmp_path / "k", layouts.kohya(PAIR)), "states its alpha", alpha=2.0)
    refused("E-OPTION", put(tmp_path / "m", layouts.mlx(TEXT)), "states the scale", alpha=2.0)
    compact = next((FIXTURES / "golden" / "v1" / "lowrank").glob("*.lrc"))
    for option in ({"layout": "raw"}, {"alpha": 2.0}):
        with pytest.raises(errors.OptionError, match="states its layout"):
            api.load(compact, **option)
    for number in ("inf", "nan"):
        refused("E-CONFIG", folder, "not finite", alpha=float(number))


def test_options_of_the_commands(tmp_path, capsys):
    folder = put(tmp_path / "x", layouts.raw([known("model.layers.0.self_attn.q_proj", 64, 48)]))
    out = tmp_path / "x.lrc"
    options = ["--from", "raw", "--alpha", "8"]
    cli.cli(["lora-to-lowrank", str(folder), "-o", str(out), "-q", "--bits", "12", *options], standalone_mode=False)
    assert api.read(out).targets[0].name == "model.layers.0.self_attn.q_proj.weight"
    capsys.readouterr()
    cli.cli(["compare", str(folder), str(out), "--json", *options], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["files"][0]["captured"] > 0.999


# --- kohya ----------------------------------------------------------------------------------------------------------


def test_kohya_convolutions(tmp_path):
    """One pixel, three by three, and LyCORIS' middle factor, whose update is the one of its definition."""
    plain = [known("conv_in", kernel=(3, 3)), known("mid_block.attentions.0.proj_in", kernel=(1, 1))]
    lora = load(put(tmp_path / "x", layouts.kohya(plain)))
    one, three = (
        next(p for p in lora.targets if p.target.name.endswith(e)) for e in ("proj_in.weight", "conv_in.weight")
    )
    assert (one.target.shape, one.target.view.text) == ((6, 5, 1, 1), "conv:1x1:1")
    assert (three.target.shape, three.target.view.text) == ((6, 5, 3, 3), "conv:3x3:1")
    wanted = 1.5 * np.einsum("or,rikl->oikl", plain[0].b.astype(float), plain[0].a.astype(float))
    np.testing.assert_allclose(dense(three).reshape(6, 5, 3, 3), wanted, rtol=1e-12)

    rng = np.random.default_rng(0)
    up, mid, down = (rng.standard_normal(s).astype("<f4") for s in ((6, 2, 1, 1), (2, 2, 3, 3), (2, 5, 1, 1)))
    stem = "lora_unet_conv_in"
    tensors = {f"{stem}.lora_up.weight": up, f"{stem}.lora_mid.weight": mid, f"{stem}.lora_down.weight": down}
    pair = load(stored(tmp_path / "y", tensors)).targets[0]
    wanted = np.einsum(
        "op,pqkl,qi->oikl", up[..., 0, 0].astype(float), mid.astype(float), down[..., 0, 0].astype(float)
    )
    np.testing.assert_allclose(dense(pair).reshape(6, 5, 3, 3), wanted, rtol=1e-12)
    wrong = {**tensors, f"{stem}.lora_mid.weight": mid[:1]}
    refused("E-PAIR", stored(tmp_path / "z", wrong), "lora_mid")


def test_kohya_without_alpha_has_a_scale_of_one(tmp_path):
    files = rewritten(layouts.kohya(PAIR), lambda t: {n: v for n, v in t.items() if not n.endswith("alpha")})
    lora = load(put(tmp_path / "x", files))
    assert [pair.scale for pair in lora.targets] == [1.0, 1.0]
    assert any("state no alpha" in line for line in lora.warnings)
    assert [p.scale for p in load(tmp_path / "x", ReadOptions(alpha=6.0)).targets] == [2.0, 3.0]


def unet_shapes(pairs: list[Known]) -> dict[str, tuple[int, ...]]:
    return {f"{k.module}.weight": (k.b.shape[0], *k.a.shape[1:]) for k in pairs}


def test_kohya_names_on_a_base(tmp_path):
    """By the headers of one model and of a pipeline, and by the configuration alone."""
    (text,), wanted = ENCODER, named(PAIR)
    one = put(tmp_path / "one", layouts.kohya(PAIR))
    check(load(one, ReadOptions(base=make_base(tmp_path / "unet", unet_shapes(PAIR), UNET))), wanted)
    bare = put(tmp_path / "bare", {"config.json": json.dumps(UNET).encode()})
    lora = load(one, ReadOptions(base=bare))
    check(lora, wanted)
    assert not [line for line in lora.warnings if "base=" in line]

    both = {**_tensors(layouts.kohya(PAIR)), **_tensors(layouts.kohya([text], "lora_te"))}
    two = stored(tmp_path / "two", both)
    pipeline = put(tmp_path / "pipeline", {"model_index.json": b"{}"})
    put(pipeline / "scheduler", {"scheduler_config.json": b"{}"})
    make_base(pipeline / "unet", unet_shapes(PAIR), UNET)
    make_base(pipeline / "text_encoder", unet_shapes([text]), {"model_type": "clip_text_model"})
    check(load(two, ReadOptions(base=pipeline)), {**IN_UNET, f"text_encoder.{text.module}.weight": text})
    refused("E-BASE", put(tmp_path / "te3", layouts.kohya([text], "lora_te3")), "text_encoder_3", base=pipeline)
    refused("E-BASE", two, "no module of the base", base=tmp_path / "unet")
    with pytest.raises(errors.OptionError):
        load(two, ReadOptions(base=pipeline, alpha=1.0))


def _tensors(files: Mapping[str, bytes]) -> dict[str, Any]:
    return safetensors.numpy.load(next(iter(files.values())))


def test_kohya_names_by_a_configuration_of_transformers(tmp_path):
    clip = {"model_type": "clip_text_model", "architectures": ["CLIPTextModel"], "num_hidden_layers": 1,
            "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 10}  # fmt: skip
    base = put(tmp_path / "base", {"config.json": json.dumps(clip).encode()})
    text = known("text_model.encoder.layers.0.mlp.fc1", 16, 8)
    lora = load(put(tmp_path / "x", layouts.kohya([text], "lora_te1")), ReadOptions(base=base))
    assert lora.targets[0].target.name.endswith("encoder.layers.0.mlp.fc1.weight")
    assert lora.targets[0].target.shape == (16, 8)
    wrong = known("text_model.encoder.layers.0.mlp.fc1", 15, 8)
    refused("E-BASE", put(tmp_path / "y", layouts.kohya([wrong], "lora_te1")), "in the base", base=base)
    (base / "config.json").write_text(json.dumps({**clip, "num_hidden_layers": 10**9}))
    refused("E-BASE", tmp_path / "x", "at most", base=base)
    (base / "config.json").write_text(json.dumps({**clip, "num_hidden_layers": "two"}))
    refused("E-BASE", tmp_path / "x", "cannot build", base=base)


def test_an_ambiguous_name_lists_its_candidates(tmp_path):
    shapes = {"a.b_c.weight": (6, 5), "a_b.c.weight": (6, 5), "a.d.weight": (6, 5)}
    base = make_base(tmp_path / "base", shapes, {})
    folder = put(tmp_path / "x", layouts.kohya([known("a.b.c")]))
    refused("E-BASE", folder, "may be any of a.b_c, a_b.c", base=base)
    check(
        load(put(tmp_path / "y", layouts.kohya([known("a.d")])), ReadOptions(base=base)), {"a.d.weight": known("a.d")}
    )
    assert parses("proj_in") == ["proj_in"] and parses("time_embedding_linear_1") == ["time_embedding.linear_1"]
    assert sorted(parses("a_b_c", ("a", "b", "c", "a_b", "b_c"))) == ["a.b.c", "a.b_c", "a_b.c"]
    assert parses("a_x", ("a",)) == [] and len(parses("_".join("aaaaaaaaaa"), ("a", "a_a"))) == 16


SGM = {
    "input_blocks_0_0": "conv_in",
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_1_proj_in": "down_blocks.1.attentions.0.proj_in",
    "input_blocks_8_1_transformer_blocks_9_attn2_to_k": "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k",
    "middle_block_0_emb_layers_1": "mid_block.resnets.0.time_emb_proj",
    "middle_block_1_transformer_blocks_0_ff_net_0_proj": "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "output_blocks_0_0_skip_connection": "up_blocks.0.resnets.0.conv_shortcut",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_5_1_transformer_blocks_1_attn1_to_q": "up_blocks.1.attentions.2.transformer_blocks.1.attn1.to_q",
    "time_embed_0": "time_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
    "out_2": "conv_out",
}  # fmt: skip


@pytest.mark.parametrize("spelled", SGM)
def test_sdxl_names_of_sd_scripts(spelled, tmp_path):
    """As sd-scripts' make_unet_conversion_map pairs them."""
    base = put(tmp_path / "base", {"config.json": json.dumps(UNET).encode()})
    lora = load(put(tmp_path / "x", layouts.kohya([known(spelled)])), ReadOptions(base=base))
    assert lora.targets[0].target.name == f"{SGM[spelled]}.weight"


# --- diffusers ------------------------------------------------------------------------------------------------------


def test_diffusers_on_a_pipeline(tmp_path):
    pipeline = put(tmp_path / "pipeline", {"model_index.json": b"{}"})
    make_base(pipeline / "unet", unet_shapes(PAIR), UNET)
    (pipeline / "unet" / "model.safetensors").rename(pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    for form, scale in (("peft", None), ("lora", None), ("processor", 1.0)):
        folder = put(tmp_path / form, layouts.diffusers(PAIR, form=form))
        check(load(folder, ReadOptions(base=pipeline)), IN_UNET, scale)
    other = put(tmp_path / "other", layouts.diffusers([known("mid_block.attentions.0.proj_in")]))
    refused("E-BASE", other, "not in the base", base=pipeline)
    text = put(tmp_path / "text", layouts.diffusers(PAIR[:1], "text_encoder", "linear"))
    refused("E-BASE", text, "belongs to text_encoder", base=pipeline)


def test_a_linear_layer_on_a_convolution_of_one_pixel(tmp_path):
    """SD 1 keeps proj_in as a convolution, later releases as a linear layer."""
    pixel, flat = known("mid_block.attentions.0.proj_in", kernel=(1, 1)), known("mid_block.attentions.0.proj_in")
    for written, stored in ((pixel, flat), (flat, pixel)):
        folder = put(tmp_path / f"x{written.a.ndim}", layouts.diffusers([written]))
        base = make_base(tmp_path / f"base{stored.a.ndim}", unet_shapes([stored]), UNET)
        (pair,) = load(folder, ReadOptions(base=base)).targets
        assert pair.target.shape == (6, 5, *stored.a.shape[2:])
        api.merge(base, load(folder, ReadOptions(base=base)), tmp_path / f"m{written.a.ndim}")


def test_old_text_encoder_processors(tmp_path):
    stem = "text_encoder.text_model.encoder.layers.0.self_attn"
    k = known("x")
    tensors = {}
    for leaf in ("to_q", "to_out"):
        tensors |= {f"{stem}.{leaf}_lora.down.weight": k.a, f"{stem}.{leaf}_lora.up.weight": k.b}
    lora = load(stored(tmp_path / "x", tensors))
    assert [p.target.name for p in lora.targets] == [f"{stem}.out_proj.weight", f"{stem}.q_proj.weight"]


def metadata(**config: Any) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in config.items()})}


def test_diffusers_metadata(tmp_path):
    """The configuration that newer releases store, by PEFT's rules."""
    same = [known(f"{ATTENTION}.{leaf}", alpha=2.0) for leaf in ("to_q", "to_k")]
    files = layouts.diffusers(same)

    def written(**config: Any) -> Path:
        return put(tmp_path / f"{len(list(tmp_path.iterdir()))}", rewritten(files, lambda t: t, metadata(**config)))

    lora = load(written(r=2, lora_alpha=5, alpha_pattern={"attn1.to_k": 7}))
    assert [pair.scale for pair in lora.targets] == [3.5, 2.5]
    assert load(written(r=2, lora_alpha=5, use_rslora=True)).targets[0].scale == 5 / math.sqrt(2)
    refused("E-PAIR", written(r=3, lora_alpha=5), "rank 2")
    refused("E-LORA-FEATURE", written(r=2, lora_alpha=5, init_lora_weights="pissa"), "PiSSA")
    refused("E-CONFIG", written(r=2, lora_alpha=5, use_dora=True), "use_dora")
    refused("E-OPTION", written(r=2, lora_alpha=5), "states its alpha", alpha=1.0)
    bad = put(tmp_path / "bad", rewritten(files, lambda t: t, {"lora_adapter_metadata": "{"}))
    refused("E-CONFIG", bad, "no JSON")


def test_diffusers_magnitudes_and_biases_ride_along(tmp_path):
    k = known(f"{ATTENTION}.to_q")
    extra = {f"unet.{k.module}.lora_magnitude_vector": np.arange(6, dtype="<f4"),
             f"unet.{k.module}.lora_B.bias": np.arange(6, dtype="<f4")}  # fmt: skip
    lora = load(put(tmp_path / "x", rewritten(layouts.diffusers([k]), lambda t: {**t, **extra})))
    extras = {(e.name, e.use): np.frombuffer(e.data, "<f4").tolist() for e in lora.extras}
    magnitudes, biases = [0, 1, 2, 3, 4, 5], [0, 1.5, 3, 4.5, 6, 7.5]
    stem = f"unet.{k.module}"
    assert extras == {(f"{stem}.weight", "magnitude"): magnitudes, (f"{stem}.bias", "add"): biases}
    short = {name: value[:5] for name, value in extra.items()}
    refused("E-PAIR", put(tmp_path / "y", rewritten(layouts.diffusers([k]), lambda t: {**t, **short})), "6 outputs")


# --- cloneofsimo ----------------------------------------------------------------------------------------------------


def test_a_list_is_read_like_the_safetensors_file(tmp_path):
    named = load(put(tmp_path / "x", layouts.cloneofsimo(PAIR)))
    values = [torch.from_numpy(half.copy()) for k in PAIR for half in (k.b, k.a)]
    torch.save(values, tmp_path / "lora.pt")
    refused("E-PICKLE", tmp_path / "lora.pt")
    listed = load(tmp_path / "lora.pt", PICKLES)
    check(listed, {f"lora:{n}.weight": k for n, k in enumerate(PAIR)}, 1.0)
    assert [(p.a, p.b) for p in listed.targets] == [(p.a, p.b) for p in named.targets]
    assert [(e.name, e.shape) for e in named.extras] == [("<s1>", (4,))] and "<s1>" in named.warnings[-1]
    torch.save(values[:3], tmp_path / "lora.pt")
    refused("E-PAIR", tmp_path / "lora.pt", "incomplete", allow_pickle=True)
    torch.save(values[::-1], tmp_path / "lora.pt")
    refused("E-PAIR", tmp_path / "lora.pt", "swapped", allow_pickle=True)
    refused("E-BASE", tmp_path / "x", "could be numbered", base=BASES / "tiny-llama")


def test_a_rank_that_the_metadata_denies(tmp_path):
    files = rewritten(layouts.cloneofsimo(PAIR), lambda t: t, {"unet:0:rank": "3", "<s1>": "<embed>"})
    refused("E-PAIR", put(tmp_path / "x", files), "the metadata says '3'")


# --- raw ------------------------------------------------------------------------------------------------------------


def test_raw_extras_embeddings_and_bases(tmp_path):
    emb, lin = known("model.embed_tokens", 6, 9), known("model.layers.0.self_attn.q_proj", 6, 6, 2)
    arrays = {**_tensors(layouts.raw([emb, lin])), "model.layers.0.self_attn.q_proj.bias": np.ones(6, "<f4")}
    folder = stored(tmp_path / "x", arrays)
    lora = load(folder, ReadOptions(alpha=3.0))
    assert lora.targets[0].target.shape == (9, 6) and lora.targets[0].target.view.text == "transposed"
    assert [e.name for e in lora.extras] == ["model.layers.0.self_attn.q_proj.bias"]
    shapes = {"embed_tokens.weight": (9, 6), "layers.0.self_attn.q_proj.weight": (6, 6)}
    named = load(folder, ReadOptions(alpha=3.0, base=make_base(tmp_path / "base", shapes, {"model_type": "llama"})))
    assert [p.target.name for p in named.targets] == sorted(shapes)
    whole = {**arrays, "model.layers.0.self_attn.q_proj.weight": np.ones((6, 6), "<f4")}
    refused("E-TENSOR", stored(tmp_path / "w", whole), "beside its factors", alpha=1.0)
    merged = {"c_attn.lora_A": np.ones((4, 5), "<f4"), "c_attn.lora_B": np.ones((8, 2), "<f4")}
    folder = stored(tmp_path / "m", {f"h.0.{n}": v for n, v in merged.items()})
    refused("E-LORA-FEATURE", folder, "MergedLinear", alpha=1.0)


# --- refused by name ------------------------------------------------------------------------------------------------


def one(name: str) -> dict[str, Any]:
    return {name: np.ones((2, 2), "<f4")}


KOHYA = "lora_unet_mid_block_attentions_0_proj_in"
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "a part of LoHa": (one(f"{KOHYA}.hada_w1_a"), "E-PAIR", "has no hada_w1_b"),
    "a part of LoKr": (one(f"{KOHYA}.lokr_w1"), "E-PAIR", "has no lokr_w2"),
    "OFT": (one(f"{KOHYA}.oft_blocks"), "E-NOT-LORA", "OFT"),
    "PEFT's OFT": (one("model.layers.0.q_proj.oft_R.weight"), "E-NOT-LORA", "OFT"),
    "IA3": (one("encoder.0.k.ia3_l"), "E-NOT-LORA", "IA"),
    "AdaLoRA": ({**one("m.lora_A"), **one("m.lora_B"), **one("m.lora_E")}, "E-NOT-LORA", "AdaLoRA"),
    "prompts": (one("prompt_embeddings"), "E-NOT-LORA", "prompt"),
    "VeRA": (one("m.vera_lambda_b"), "E-NOT-LORA", "VeRA"),
    "NOLA of a language model": (
        {"m.lora_A.weight": np.ones((2, 2), "<f4"), "m.lora_A.coefficients": np.ones(3, "<f4"),
         "m.lora_A.seed": np.ones(1, "<i8")}, "E-NOT-LORA", "GPU"),
    "NeMo": (one("m.self_attention.adapter_layer.lora_kqv_adapter.linear_in.weight"), "E-LORA-FEATURE", "NeMo"),
    "a part of CLIP-LoRA": (one("layer_0.q_proj.w_lora_A"), "E-PAIR", "not one w_lora_B"),
    "split layers": (one(f"{KOHYA}.lora_down.0.weight"), "E-LORA-FEATURE", "slice"),
    "only downs": (one(f"{KOHYA}.lora_down.weight"), "E-PAIR", "not one lora_up"),
    "only A": (one("m.x.lora_A"), "E-PAIR", "not one lora_B"),
    "only a": (one("m.x.lora_a"), "E-PAIR", "not one lora_b"),
    "one up missing": ({n: v for n, v in _tensors(layouts.kohya(PAIR)).items() if "to_q.lora_up" not in n},
                       "E-PAIR", "has no lora_up"),
    "only alphas": ({f"{KOHYA}.alpha": np.float32([1])}, "E-EMPTY", "no matrices"),
    "only settings": ({"model.q.alpha": np.float32([1]), "model.q.dropout": np.float32([0])}, "E-EMPTY", "no matrices"),
    "swapped kohya": ({f"{KOHYA}.lora_down.weight": np.ones((6, 2), "<f4"),
                       f"{KOHYA}.lora_up.weight": np.ones((2, 5), "<f4")}, "E-PAIR", "swapped"),
    "swapped square": ({f"{KOHYA}.lora_down.weight": np.ones((6, 2), "<f4"),
                        f"{KOHYA}.lora_up.weight": np.ones((2, 6), "<f4")}, "E-PAIR", "swapped"),
    "swapped raw": ({"m.q.lora_A": np.ones((6, 2), "<f4"), "m.q.lora_B": np.ones((2, 5), "<f4")}, "E-PAIR", "swapped"),
    "a tensor without a meaning": ({**_tensors(layouts.kohya(PAIR)), **one("something.else")}, "E-TENSOR", "something"),
    "NaN": ({n: v * np.float32("nan") for n, v in _tensors(layouts.kohya(PAIR)).items()}, "E-VALUE", "NaN"),
    "integers": ({n: v.astype("<i4") for n, v in _tensors(layouts.kohya(PAIR)).items()}, "E-DTYPE", "I32"),
    "nothing that is known": (one("model.norm.weight"), "E-LAYOUT", "whole weights"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name, tmp_path):
    tensors, code, text = REFUSED[name]
    folder = stored(tmp_path / "x", tensors)
    alpha = {"alpha": 1.0} if "raw" in name or name == "AdaLoRA" else {}
    refused(code, folder, text, **alpha)


def test_folders_of_several_files(tmp_path):
    data = next(iter(layouts.kohya(PAIR).values()))
    put(tmp_path / "x", {"a.safetensors": data, "b.safetensors": data})
    refused("E-CONFIG", tmp_path / "x", "2 adapters: 'a.safetensors', 'b.safetensors'")
    put(tmp_path / "x", {"pytorch_lora_weights.safetensors": data})
    assert len(load(tmp_path / "x").targets) == 2
    assert len(load(tmp_path / "x" / "a.safetensors").targets) == 2


def test_a_conversion_with_the_configuration_of_the_base_alone(tmp_path):
    """Names from config.json, and a file that says that no digest was recorded."""
    folder = put(tmp_path / "x", layouts.kohya([known(f"{ATTENTION}.to_q", 320, 320)]))
    base = put(tmp_path / "base", {"config.json": json.dumps(UNET).encode()})
    lora = api.load_lora(folder, base=base)
    done = api.convert(lora, "lowrank", bits=12, base=base)
    assert done.compact.base.content == "" and any("names alone" in line for line in done.warnings)
    assert done.compact.targets[0].name == f"{ATTENTION}.to_q.weight"
