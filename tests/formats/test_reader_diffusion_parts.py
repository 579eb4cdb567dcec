"""What stands beside the factors of a diffusion model's LoRA: alphas of any dtype, factors of eight bits, the metadata
of diffusers, embeddings of words, names prefixed twice. Files by hand, updates by their formula."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import dense
from models import load_all, save_base, tree
from safetensors import safe_open

from lrconvert import api
from lrconvert.core.dtypes import Stored, round_to
from lrconvert.core.errors import LrcError
from lrconvert.formats.base_class import renamed_by
from lrconvert.formats.lrc import file
from lrconvert.io.quantized.base import EIGHT_BITS
from lrconvert.lora.adapter import LoraAdapter
from lrconvert.testing.raw_files import with_header

FLAT, DOTTED = "lora_unet_mid_block_attentions_0_proj_in", "unet.mid_block.attentions.0.proj_in"
A = np.linspace(-2, 3, 32, dtype=np.float32).reshape(4, 8)
B = np.linspace(1, -4, 64, dtype=np.float32).reshape(16, 4)
Entry = tuple[str, list[int], bytes]


def written(path: Path, tensors: dict[str, Entry], **metadata: str) -> Path:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    path.write_bytes(with_header(header, data))
    return path


def f32(values: Any) -> Entry:
    array = np.asarray(values, "<f4")
    return "F32", list(array.shape), array.tobytes()


def pair(name: str = FLAT, halves: tuple[str, str] = ("lora_down", "lora_up")) -> dict[str, Entry]:
    return {f"{name}.{halves[0]}.weight": f32(A), f"{name}.{halves[1]}.weight": f32(B)}


def update(path: Path, **options: Any) -> np.ndarray:
    lora = api.load_lora(path, **options)
    assert isinstance(lora, LoraAdapter)
    return dense(lora.targets[0])


def alpha_of(dtype: str, shape: list[int]) -> Entry:
    raw = {
        **{"I64": np.int64(2), "I32": np.int32(2), "I16": np.int16(2), "I8": np.int8(2), "U8": np.uint8(2)},
        **{"U16": np.uint16(2), "U32": np.uint32(2), "U64": np.uint64(2)},
        **{kind: round_to(np.array([2.0]), kind) for kind in ("F64", "F32", "F16", "BF16")},
        **{kind: np.uint8(np.flatnonzero(EIGHT_BITS[kind] == 2)[0]) for kind in ("F8_E4M3", "F8_E5M2")},
    }[dtype]
    return dtype, shape, raw.tobytes()


ALPHAS = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8"]


@pytest.mark.parametrize("dtype", ALPHAS)
@pytest.mark.parametrize("shape", ([], [1], [1, 1]))
@pytest.mark.parametrize("name", (FLAT, DOTTED))
def test_an_alpha_of_any_dtype(name: str, shape: list[int], dtype: str, tmp_path: Path) -> None:
    halves = ("lora_down", "lora_up") if name == FLAT else ("lora_A", "lora_B")
    path = written(tmp_path / "x.safetensors", {**pair(name, halves), f"{name}.alpha": alpha_of(dtype, shape)})
    np.testing.assert_allclose(update(path), 0.5 * B.astype(np.float64) @ A, rtol=1e-9)


# --- eight bits -----------------------------------------------------------------------------------------------------


def eight(dtype: str, codes: np.ndarray) -> Entry:
    return dtype, list(codes.shape), codes.tobytes()


def codes(dtype: str, *shape: int) -> np.ndarray:
    finite = np.flatnonzero(np.isfinite(EIGHT_BITS[dtype])).astype(np.uint8)
    return np.resize(finite, shape)


@pytest.mark.parametrize("dtype", ("F8_E4M3", "F8_E5M2"))
def test_factors_of_eight_bits_are_exact(dtype: str, tmp_path: Path) -> None:
    """Every number of the dtype, as the table of its definition has it."""
    a, b = codes(dtype, 4, 64), codes(dtype, 64, 4)
    tensors = {f"{FLAT}.lora_down.weight": eight(dtype, a), f"{FLAT}.lora_up.weight": eight(dtype, b)}
    lora = api.load_lora(written(tmp_path / "x.safetensors", tensors))
    (target,) = lora.targets
    assert np.array_equal(target.A, EIGHT_BITS[dtype][a]) and np.array_equal(target.B, EIGHT_BITS[dtype][b])
    assert any(dtype in warning and "exactly" in warning for warning in lora.warnings)
    tensors[f"{FLAT}.lora_down.weight"] = eight(dtype, np.full((4, 64), 0x7F, np.uint8))  # NaN in both
    with pytest.raises(LrcError, match="NaN") as caught:
        api.load_lora(written(tmp_path / "x.safetensors", tensors))
    assert caught.value.code == "E-VALUE"


@pytest.mark.parametrize("word", ("scale_weight", "weight_scale"))
@pytest.mark.parametrize("rows", (False, True))
def test_scales_of_eight_bits_count(word: str, rows: bool, tmp_path: Path) -> None:
    """As ComfyUI's quantized models have them: one number for the tensor, or one for each row; the mark is none."""
    a, scale = codes("F8_E4M3", 4, 8), np.float32([0.3, 2, 5, 0.01] if rows else 0.3)
    tensors = {f"{FLAT}.lora_down.weight": eight("F8_E4M3", a), f"{FLAT}.lora_up.weight": f32(B)}
    tensors |= {f"{FLAT}.lora_down.{word}": f32(scale), "scaled_fp8": ("F8_E4M3", [0], b"")}
    wanted = EIGHT_BITS["F8_E4M3"][a] * np.reshape(scale, (-1, 1))
    np.testing.assert_allclose(update(written(tmp_path / "x.safetensors", tensors)), B @ wanted, rtol=1e-5, atol=1e-5)
    tensors[f"{FLAT}.lora_down.{word}"] = f32(np.ones(3))
    with pytest.raises(LrcError, match="its scale") as caught:
        api.load_lora(written(tmp_path / "x.safetensors", tensors))
    assert caught.value.code == "E-PAIR"


# --- metadata -------------------------------------------------------------------------------------------------------

TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


def test_metadata_gives_each_model_its_scale(tmp_path: Path) -> None:
    """r, alpha and patterns of each model of the pipeline, as PEFT reads them; rsLoRA of one of them."""
    second = DOTTED.replace("proj_in", "proj_out")
    tensors = {n: e for name in (DOTTED, second, TEXT) for n, e in pair(name, ("lora_A", "lora_B")).items()}
    fields = {"unet.r": 4, "unet.lora_alpha": 2, "unet.alpha_pattern": {"mid_block.attentions.0.proj_out": 12}}
    fields |= {"text_encoder.r": 4, "text_encoder.lora_alpha": 8, "text_encoder.use_rslora": True}
    path = written(tmp_path / "x.safetensors", tensors, lora_adapter_metadata=json.dumps(fields))
    scales = {pair.target.name.removesuffix(".weight"): pair.scale for pair in api.load_lora(path).targets}
    assert scales == {DOTTED: 0.5, second: 3.0, TEXT: 4.0}
    api.export(api.load_lora(path), tmp_path / "out", to="diffusers")
    with safe_open(tmp_path / "out" / "pytorch_lora_weights.safetensors", "np") as opened:
        table = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert table["unet.r"] == table["unet.lora_alpha"] == table["text_encoder.r"] == 4
    again = {p.target.name: dense(p) for p in api.load_lora(tmp_path / "out").targets}
    for one in api.load_lora(path).targets:
        np.testing.assert_allclose(again[one.target.name], dense(one), rtol=1e-5, atol=1e-5)


# --- embeddings of words ---------------------------------------------------------------------------------------------


def words() -> dict[str, Entry]:
    return {f"bundle_emb.{word}.{key}": f32(np.full((2, 4), n)) for n, (word, key) in enumerate(WORDS, 1)}


WORDS = (("cat", "clip_l"), ("cat", "clip_g"), ("dog", "string_to_param.*"))


@pytest.mark.parametrize("layout", ("kohya", "diffusers"))
def test_words_ride_along_and_are_written_back(layout: str, tmp_path: Path) -> None:
    halves = ("lora_down", "lora_up") if layout == "kohya" else ("lora_A", "lora_B")
    pairs = pair(FLAT if layout == "kohya" else DOTTED, halves)
    lora = api.load_lora(written(tmp_path / "x.safetensors", {**pairs, **words()}))
    assert any("'cat', 'dog'" in warning for warning in lora.warnings)
    file.write(api.convert(lora, "lowrank", rank=4, bits=15).compact, tmp_path / "x.lrc")
    for number, adapter in enumerate((lora, api.load(tmp_path / "x.lrc"))):
        assert {extra.name for extra in adapter.extras} == words().keys()
        placed = renamed_by(adapter, lambda name: name if name.startswith("bundle") else f"{DOTTED}.weight")
        api.export(placed, tmp_path / f"{number}", to=layout)
        (out,) = (tmp_path / f"{number}").glob("*.safetensors")
        with safe_open(out, "np") as opened:
            for name, (_, shape, raw) in words().items():
                assert opened.get_tensor(name).tobytes() == raw and list(opened.get_tensor(name).shape) == shape


def test_a_merge_says_what_becomes_of_words(tmp_path: Path) -> None:
    base = save_base(
        tmp_path / "base", [{"mid_block.attentions.0.proj_in.weight": Stored("F32", np.ones((16, 8), "<f4"))}]
    )
    plain = api.load_lora(written(tmp_path / "x.safetensors", pair()), base=base)
    lora = api.load_lora(written(tmp_path / "y.safetensors", {**pair(), **words()}), base=base)
    report = api.merge(base, [lora], tmp_path / "out")
    assert any("3 embeddings of words" in warning for warning in report.warnings)
    api.merge(base, [plain], tmp_path / "goal")
    assert load_all(tmp_path / "out") == load_all(tmp_path / "goal")
    api.unmerge(tmp_path / "out", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(base)


# --- names ----------------------------------------------------------------------------------------------------------

TWICE = {
    "lora_unet_unet_mid_block_attentions_0_proj_in": FLAT,
    "lora_unet_lora_unet_mid_block_attentions_0_proj_in": FLAT,
    "lora_te_text_encoder_text_model_encoder_layers_0_mlp_fc1": "lora_te_text_model_encoder_layers_0_mlp_fc1",
    "lora_te1_te1_text_model_encoder_layers_0_mlp_fc1": "lora_te1_text_model_encoder_layers_0_mlp_fc1",
    "lora_transformer_transformer_transformer_blocks_0_attn_to_q": "lora_transformer_transformer_blocks_0_attn_to_q",
}


@pytest.mark.parametrize("name", TWICE)
def test_names_prefixed_twice_are_read_with_a_warning(name: str, tmp_path: Path) -> None:
    lora = api.load_lora(written(tmp_path / "x.safetensors", pair(name)))
    assert [t.name for t in lora.shapes()] == [f"{TWICE[name]}.weight"]
    (said,) = (warning for warning in lora.warnings if "twice" in warning)
    assert name in said and TWICE[name] in said


@pytest.mark.parametrize("name", ("lora_transformer_transformer_blocks_0_attn_to_q", FLAT))
def test_names_with_one_prefix_stay(name: str, tmp_path: Path) -> None:
    lora = api.load_lora(written(tmp_path / "x.safetensors", pair(name)))
    assert [t.name for t in lora.shapes()] == [f"{name}.weight"]
    assert not any("twice" in warning for warning in lora.warnings)


def test_names_of_which_some_are_prefixed_twice_stay(tmp_path: Path) -> None:
    """One of them may be the name of a module."""
    other = "lora_unet_unet_mid_block_attentions_0_proj_out"
    lora = api.load_lora(written(tmp_path / "x.safetensors", {**pair(), **pair(other)}))
    assert {t.name for t in lora.shapes()} == {f"{FLAT}.weight", f"{other}.weight"}
