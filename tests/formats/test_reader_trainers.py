"""Files of today's trainers, the scales that they state, and advice that gives what it says when it is followed."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from conftest import dense
from test_base_names import make_base
from test_reader_layouts import FLAT, TEXT, _tensors, check, known, put, refused, stored, unet_shapes

from lrconvert import api
from lrconvert.core import errors
from lrconvert.formats.readers.base import load
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.testing import layouts
from lrconvert.testing.layouts import safetensors_file

# --- what today's trainers write ------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["transformer_blocks.0.attn.to_q", "diffusion_model.blocks.0.self_attn.q"])
def test_dotted_names_with_down_and_up(module, tmp_path):
    """Of distilled Qwen-Image and Wan, and of ComfyUI: with alpha, or with a scale of 1, as ComfyUI has it."""
    k = known("x")
    tensors = {f"{module}.lora_down.weight": k.a, f"{module}.lora_up.weight": k.b}
    name = module if module.startswith("diffusion_model") else f"transformer.{module}"
    check(load(stored(tmp_path / "x", tensors)), {f"{name}.weight": k}, 1.0)
    check(load(stored(tmp_path / "y", {**tensors, f"{module}.alpha": np.float32([3.0])})), {f"{name}.weight": k})
    split = {n.replace(".weight", ".0.weight"): v for n, v in tensors.items()}
    refused("E-LORA-FEATURE", stored(tmp_path / "z", split), "slice")


@pytest.mark.parametrize("model", ["diffusion_model", "transformer"])
def test_diffusion_models_whose_blocks_are_called_layers(model, tmp_path):
    """Z-Image and Lumina, which a language model's `transformer.layers` is not."""
    k = known(f"{model}.layers.0.attention.to_q")
    for alphas in ({}, {f"{k.module}.alpha": np.float32([3.0])}):
        tensors = {f"{k.module}.lora_A.weight": k.a, f"{k.module}.lora_B.weight": k.b, **alphas}
        lora = load(stored(tmp_path / f"x{len(alphas)}", tensors))
        assert lora.provenance.fields["source_format"] == "diffusers"
        check(lora, {f"{k.module}.weight": k}, None if alphas else 1.0)
    text = {f"transformer.layers.0.self_attention.q.lora_{h}.weight": v for h, v in (("A", k.a), ("B", k.b))}
    refused("E-CONFIG", stored(tmp_path / "text", text), "alpha=")


def test_the_third_text_encoder_of_flux_is_the_second_of_its_pipeline(tmp_path):
    """T5, which sd-scripts numbers as it does in SD 3; a third one that is there goes first."""
    t5 = known("encoder.block.0.layer.0.SelfAttention.q")
    folder = put(tmp_path / "x", layouts.kohya([t5], "lora_te3"))
    pipeline = put(tmp_path / "pipeline", {"model_index.json": b"{}"})
    make_base(pipeline / "text_encoder_2", unet_shapes([t5]), {"model_type": "t5"})
    (pair,) = load(folder, ReadOptions(base=pipeline)).targets
    assert pair.target.name == f"text_encoder_2.{t5.module}.weight"
    make_base(pipeline / "text_encoder_3", unet_shapes([t5]), {"model_type": "t5"})
    (pair,) = load(folder, ReadOptions(base=pipeline)).targets
    assert pair.target.name == f"text_encoder_3.{t5.module}.weight"


# --- scales that a file states --------------------------------------------------------------------------------------


def test_raw_takes_the_alpha_that_the_file_states(tmp_path):
    """Of single modules or of all; an alpha of the user is for those that state none, never instead."""
    one, two = TEXT
    arrays = _tensors(layouts.raw(TEXT))
    own = {f"{one.module}.alpha": np.float32(1), f"{two.module}.alpha": np.float32(3)}
    lora = load(stored(tmp_path / "own", {**arrays, **own, "head.weight": np.ones((3, 4), "<f4")}))
    assert [pair.scale for pair in lora.targets] == [0.5, 1.5] and [e.name for e in lora.extras] == ["head.weight"]
    refused("E-OPTION", tmp_path / "own", "states its alpha", alpha=4.0)
    part = {**arrays, f"{one.module}.alpha": np.float32(1)}
    refused("E-CONFIG", stored(tmp_path / "part", part), two.module)
    lora = load(tmp_path / "part", ReadOptions(alpha=4.0))
    assert [pair.scale for pair in lora.targets] == [0.5, 2.0] and any("state their alpha" in w for w in lora.warnings)
    said = put(tmp_path / "said", {"x.safetensors": safetensors_file(arrays, {"lora_alpha": "3", "r": "2"})})
    assert [pair.scale for pair in load(said).targets] == [1.5, 1.5]
    refused("E-OPTION", said, "lora_alpha", alpha=4.0)
    stable = {"lora_alpha": "3", "use_rslora": "True"}
    stable = put(tmp_path / "stable", {"x.safetensors": safetensors_file(arrays, stable)})
    assert load(stable).targets[0].scale == 3 / math.sqrt(2)
    rank = put(tmp_path / "rank", {"x.safetensors": safetensors_file(arrays, {"lora_alpha": "3", "rank": "5"})})
    refused("E-PAIR", rank, "states 5")


@pytest.mark.parametrize("alpha", [1e-300, 5e-324, 1e300, 1.7e308, -1e300])
def test_scales_beyond_float32_are_refused(alpha, tmp_path):
    refused("E-CONFIG", put(tmp_path / "x", layouts.raw(TEXT)), "beyond the range of float32", alpha=alpha)


def test_updates_beyond_float32_are_refused_before_a_fit(tmp_path):
    """Each number is one of float32, their product is not."""
    big = {name: np.full_like(value, 3e38) for name, value in _tensors(layouts.raw(TEXT)).items()}
    lora = load(stored(tmp_path / "x", big), ReadOptions(alpha=2.0))
    with pytest.raises(errors.ValueRangeError, match="beyond the range of float32"):
        api.convert(lora, "lowrank", bits=12)


# --- advice ---------------------------------------------------------------------------------------------------------

_TURNED = {
    "raw": ("m.q.lora_A", "m.q.lora_B", {"alpha": 2.0}),
    "kohya": (f"{FLAT}to_q.lora_down.weight", f"{FLAT}to_q.lora_up.weight", {}),
    "diffusers": ("unet.mid_block.to_q.lora_A.weight", "unet.mid_block.to_q.lora_B.weight", {}),
    "peft": ("base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight", {}),
    "mlx": ("m.q.lora_a", "m.q.lora_b", {"alpha": 2.0}),
}


@pytest.mark.parametrize("layout", _TURNED)
def test_advice_for_turned_factors_gives_the_update_that_it_says(layout, tmp_path):
    """On a square layer, which takes both remedies: transposing gives x @ A @ B, exchanging adds A @ B."""
    first, second, options = _TURNED[layout]
    rng = np.random.default_rng(1)
    left, right = rng.standard_normal((6, 2)).astype("<f4"), rng.standard_normal((2, 6)).astype("<f4")
    if layout == "mlx":  # which stores (in, r) and (r, out), so that PEFT's form is the turned one
        left, right = right, left
    config = {"adapter_config.json": json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}).encode()}

    def written(a, b):
        path = put(tmp_path / str(len(list(tmp_path.iterdir()))), config if layout == "peft" else {})
        file = "adapter_model.safetensors" if layout == "peft" else "x.safetensors"
        (path / file).write_bytes(safetensors_file({first: np.ascontiguousarray(a), second: np.ascontiguousarray(b)}))
        return path

    refused("E-PAIR", written(left, right), "ranspose both", **options)
    refused("E-PAIR", written(left, right), "exchange their names", **options)
    product = left.astype(float) @ right.astype(float) if layout != "mlx" else right.astype(float) @ left.astype(float)
    (pair,) = load(written(left.T, right.T), ReadOptions(**options)).targets
    transposed = dense(pair)
    (pair,) = load(written(right, left), ReadOptions(**options)).targets
    exchanged = dense(pair)
    if layout == "mlx":  # transposed: PEFT's B @ A; exchanged: x @ lora_b @ lora_a
        np.testing.assert_allclose(transposed, product, rtol=1e-12)
        np.testing.assert_allclose(exchanged, product.T, rtol=1e-12)
    else:
        np.testing.assert_allclose(transposed, product.T, rtol=1e-12)
        np.testing.assert_allclose(exchanged, product, rtol=1e-12)


def test_the_format_before_gguf_is_named(tmp_path):
    """llama.cpp's old adapters are called .bin and are no pickles."""
    (tmp_path / "ggml-adapter-model.bin").write_bytes(b"algg" + bytes(80))
    for options in ({}, {"allow_pickle": True}):
        refused("E-LAYOUT", tmp_path / "ggml-adapter-model.bin", "before GGUF", **options)


def test_advice_for_slices_of_a_fused_layer_reads_them(tmp_path):
    """loralib's MergedLinear: the rows of each adapted slice are those of B times the rows of A that are its own."""
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((4, 5)).astype("<f4"), rng.standard_normal((8, 2)).astype("<f4")
    file = safetensors_file({"h.0.attn.c_attn.lora_A": a, "h.0.attn.c_attn.lora_B": b})
    folder = put(tmp_path / "x", {"adapter_model.safetensors": file})
    refused("E-LORA-FEATURE", folder, "adapter_config.json that holds peft_type (LORA), r, lora_alpha", alpha=2.0)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "enable_lora": [True, False, True]}
    lora = load(put(folder, {"adapter_config.json": json.dumps(config).encode()}))
    assert [pair.target.view.text for pair in lora.targets] == ["rows:0:4", "rows:8:12"]
    for n, pair in enumerate(lora.targets):
        assert pair.target.name == "h.0.attn.c_attn.weight" and pair.target.shape == (12, 5)
        wanted = 1.5 * b[4 * n : 4 * n + 4].astype(float) @ a[2 * n : 2 * n + 2].astype(float)
        np.testing.assert_allclose(dense(pair), wanted, rtol=1e-12)


def test_advice_for_square_factors_of_lora_vit_reads_them(tmp_path):
    """Renamed, with the rank as alpha, the update is B @ A."""
    rng = np.random.default_rng(3)
    halves = {half: rng.standard_normal((4, 4)).astype("<f4") for half in "ab"}
    named = {f"w_{half}_{n:03d}": value for half, value in halves.items() for n in range(2)}
    refused("E-ORIENT", stored(tmp_path / "x", named), "with the rank as alpha")
    renamed = {f"blocks.0.q.lora_{half.upper()}": value for half, value in halves.items()}
    (pair,) = load(stored(tmp_path / "y", renamed), ReadOptions(alpha=4.0)).targets
    np.testing.assert_allclose(dense(pair), halves["b"].astype(float) @ halves["a"].astype(float), rtol=1e-12)


def test_factors_in_a_module_called_lora_are_of_the_one_around_it(tmp_path):
    k = known("h.0.c_proj")
    tensors = {f"{k.module}.lora.lora_{half}": value for half, value in (("A", k.a), ("B", k.b))}
    check(load(stored(tmp_path / "x", tensors), ReadOptions(alpha=3.0)), {"h.0.c_proj.weight": k})
    check(
        load(stored(tmp_path / "y", {**tensors, f"{k.module}.lora.alpha": np.float32([3])})), {"h.0.c_proj.weight": k}
    )
