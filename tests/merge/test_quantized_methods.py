"""Quantized bases of every method: values as their definitions have them, merged, verified and undone as bf16."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from models import load_all, one_target, tree
from quantized_bases import METHODS, Made, Q, base_of, broken, changed, fp8, gpt_oss, gptq, modelopt, plain

from lrconvert.api import export, merge, unmerge, verify
from lrconvert.core import registry
from lrconvert.core.dtypes import Stored, round_to
from lrconvert.core.errors import LrcError, QuantizedBaseError
from lrconvert.io import quantized
from lrconvert.io.checkpoint import open_checkpoint
from lrconvert.io.quantized import base as contract
from lrconvert.lora.adapter import LoraAdapter, Target, View
from lrconvert.merge import quantized_base
from lrconvert.merge.quantized_base import open_base


def adapter(made: Made) -> LoraAdapter:
    """An update of every weight; of a stack, of its last entry."""
    targets = []
    for n, (name, values) in enumerate(made.values.items()):
        if values.ndim == 2:
            view = View("matrix")
        else:
            kind = "expert_transposed" if made.settings["quant_method"] in ("mxfp4", "fbgemm_fp8") else "expert"
            view = View(f"{kind}:{len(values) - 1}")
        targets.append(one_target(Target(name, values.shape, view), scale=0.002, seed=n))
    return LoraAdapter(tuple(targets))


def test_every_method_has_a_sample() -> None:
    """A method without one fails by its name."""
    sampled = {make().settings["quant_method"].replace("-", "_") for make in METHODS.values()}
    assert {*sampled, "bitsandbytes"} == set(registry.names(quantized.__name__))


@pytest.mark.parametrize("kind", METHODS)
def test_values_are_those_of_the_definition(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole and in parts, however few are computed at a time."""
    made = METHODS[kind]()
    base = base_of(tmp_path / "base", made)
    for panel in (contract.PANEL, 100):
        monkeypatch.setattr(contract, "PANEL", panel)
        with open_base(base, dequantize=True) as checkpoint:
            assert set(checkpoint.tensors) == {*made.values, "model.norm.weight"}
            for name, expected in made.values.items():
                info = checkpoint.tensors[name]
                assert (info.dtype, info.shape) == ("BF16", expected.shape)
                goal = round_to(expected, "BF16").reshape(-1)
                assert np.array_equal(np.frombuffer(checkpoint.read(info), "<u2"), goal)
                for first, count in ((0, 1), (1, 2), (37, 66), (goal.size - 1, 1), (7, goal.size - 9)):
                    part = np.frombuffer(checkpoint.read(info, 2 * first, 2 * count), "<u2")
                    assert np.array_equal(part, goal[first : first + count])


@pytest.mark.parametrize("kind", METHODS)
def test_merge_verify_undo(kind: str, tmp_path: Path) -> None:
    """As into a base that is stored as bf16, whatever file describes a weight; the undo gives that base."""
    made = METHODS[kind]()
    base = base_of(tmp_path / "base", made, shards=3)
    before = tree(base)
    lora = adapter(made)
    report = merge(base, [lora], tmp_path / "out", dequantize=True)
    method = made.settings["quant_method"]
    assert f"{len(made.values)} tensors are dequantized from {method} to bf16" in report.warnings[-1]
    left_out = f"{len(made.left_out)} that quantize activations are left out"
    assert (left_out in report.warnings[-1]) == bool(made.left_out)
    unpacked = plain(tmp_path / "plain", made)
    merge(unpacked, [lora], tmp_path / "goal")
    merged, goal = load_all(tmp_path / "out"), load_all(tmp_path / "goal")
    assert merged.keys() == goal.keys() and all(merged[name] == goal[name] for name in goal)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"model_type": "llama", "torch_dtype": "bfloat16"}
    assert verify(tmp_path / "out", base, [lora], dequantize=True).ok
    assert verify(tmp_path / "out", unpacked, [lora]).ok
    unmerge(tmp_path / "out", tmp_path / "back")
    back, whole = load_all(tmp_path / "back"), load_all(unpacked)
    assert back.keys() == whole.keys() and all(back[name] == whole[name] for name in whole)
    assert tree(base) == before


@pytest.mark.parametrize("kind", ["gptq, 4 bits", "compressed, 4 bits", "modelopt, NVFP4", "fp8, blocks"])
def test_names_are_resolved_on_quantized_bases(kind: str, tmp_path: Path) -> None:
    """A layout that is read with its base finds the weights that codes stand for, with their shapes."""
    made = METHODS[kind]()
    base = base_of(tmp_path / "base", made)
    export(adapter(made), tmp_path / "lora", "raw")
    merge(base, [tmp_path / "lora"], tmp_path / "out", dequantize=True)
    assert verify(tmp_path / "out", base, [adapter(made)], dequantize=True).ok
    with pytest.raises(QuantizedBaseError, match=r"q_proj.*stored quantized, by .*pass dequantize=True"):
        merge(base, [tmp_path / "lora"], tmp_path / "no")


def read_all(folder: Path) -> dict[str, bytes]:
    """As strangers' files are read: a warning of numpy fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with open_base(folder, dequantize=True) as checkpoint:
            return {name: bytes(checkpoint.read(info)) for name, info in checkpoint.tensors.items()}


@pytest.mark.parametrize("kind", METHODS)
def test_tensors_that_do_not_fit(kind: str, tmp_path: Path) -> None:
    """A tensor that is missing, cut, doubled or of another dtype is refused by its weight's name. Where it is no part
    that every weight has (zero points, an order), the rest may stand for another weight, which is read."""
    made = METHODS[kind]()
    optional = ("zero_point", "g_idx")
    for n, (what, tensors) in enumerate(broken(made)):
        folder = changed(tmp_path / str(n), made, tensors)
        if what.startswith("no ") and what.endswith(optional):
            read_all(folder)
            continue
        with pytest.raises(QuantizedBaseError, match=r"Use the unquantized parent|Leave out"):
            read_all(folder)
            pytest.fail(what)


def number(dtype: str, shape: tuple[int, ...], value: float) -> Stored:
    return Stored(dtype, np.full(shape, value, "<f4"))


W = f"{Q}.weight"
REFUSED = {
    "NaN": (fp8(), {f"{W}_scale_inv": number("F32", (2, 3), np.nan)}, {}, "holds NaN or infinity"),
    "infinite": (fp8(), {f"{W}_scale_inv": number("F32", (2, 3), np.inf)}, {}, "holds NaN or infinity"),
    "no exponent": (
        *(gpt_oss(), {"model.layers.0.mlp.experts.down_proj_scales": Stored("U8", np.full((2, 64, 1), 255, np.uint8))}),
        *({}, "holds NaN or infinity"),
    ),
    "two scales": (fp8(), {f"{W}_scale": number("F32", (), 1)}, {}, "it has"),
    "of a float": (
        *(METHODS["fp8, experts of four bits"](), {W: Stored("BF16", np.zeros((24, 40), np.uint16))}),
        *({}, "q_proj.weight_scale_inv.*it describes none"),
    ),
    "a grid": (fp8(), {f"{W}_scale_inv": number("F32", (5, 7), 1)}, {}, r"\[5, 7\] for a weight of \[24, 40\]"),
    "one block size": (fp8(), {}, {"weight_block_size": [128]}, "not two numbers"),
    "a group too many": (
        *(gptq(4), {f"{Q}.g_idx": Stored("I32", np.full(96, 3, "<i4"))}, {}, "names a group that is not one of 3"),
    ),
    "a negative group": (gptq(4), {f"{Q}.g_idx": Stored("I32", np.full(96, -1, "<i4"))}, {}, "names a group"),
    "marlin": (gptq(4), {}, {"checkpoint_format": "marlin"}, "its format is 'marlin'"),
    "the weight, too": (gptq(4), {W: Stored("BF16", np.zeros((64, 96), np.uint16))}, {}, "it is there, and so is"),
    "another order": (METHODS["awq"](), {}, {"version": "gemv"}, "its version is 'gemv'"),
    "five bits": (METHODS["awq"](), {}, {"bits": 5}, "5 bits, not 4"),
    "smoothing": (modelopt("NVFP4"), {f"{Q}.pre_quant_scale": number("F32", (48,), 1)}, {}, "which is not undone"),
    "sparse": (METHODS["compressed, 4 bits"](), {}, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse"),
    "unknown": (METHODS["compressed, 4 bits"](), {}, {"format": "marlin-24"}, "'marlin-24' is not read"),
    "transforms": (METHODS["compressed, 4 bits"](), {}, {"transform_config": {"R3": 1}}, "transformed"),
    "no bits": (METHODS["compressed, 4 bits"](), {}, {"config_groups": {}}, "with no bits"),
    "a lying shape": (
        *(METHODS["compressed, 4 bits"](), {f"{W}_shape": Stored("I64", np.array([24, -64]))}, {}, "a weight of"),
    ),
    "divides by zero": (METHODS["compressed, NVFP4"](), {f"{W}_global_scale": number("F32", (1,), 0)}, {}, "divides"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, tmp_path: Path) -> None:
    made, tensors, settings, why = REFUSED[case]
    with pytest.raises(QuantizedBaseError, match=rf"{why}.*Use the unquantized parent"):
        read_all(changed(tmp_path / "base", made, tensors, **settings))


def test_scales_of_zero_stand_for_zeros(tmp_path: Path) -> None:
    base = changed(tmp_path / "base", fp8(), {f"{W}_scale_inv": number("F32", (2, 3), 0)})
    values = np.frombuffer(read_all(base)[W], "<u2")
    assert not (values & 0x7FFF).any()


def test_blocks_that_end_within_a_weight(tmp_path: Path) -> None:
    """24 rows in blocks of 16: the second block is short, and the parts are not equal ones of 12."""
    made = fp8()
    scale = made.tensors[f"{W}_scale_inv"].array
    codes = np.full((24, 40), 0x38, np.uint8)  # ones
    base = changed(tmp_path / "base", made, {W: Stored("F8_E4M3", codes)})
    values = np.frombuffer(read_all(base)[W], "<u2").reshape(24, 40)
    assert np.array_equal(values[15], np.repeat(round_to(scale[0], "BF16"), 16)[:40])
    assert np.array_equal(values[16], np.repeat(round_to(scale[1], "BF16"), 16)[:40])


def test_a_method_that_is_not_read(tmp_path: Path) -> None:
    """Its name, what to do, and which methods are read; without --dequantize it is not promised."""
    made = fp8()
    base = changed(tmp_path / "base", made, {}, quant_method="hqq")
    with pytest.raises(
        QuantizedBaseError, match=r"by hqq.*unquantized parent.*dequantize=True takes awq, bitsandb.*gptq"
    ):
        merge(base, [adapter(made)], tmp_path / "out", dequantize=True)
    for n, name in enumerate(("base", "shared", "../fp8", "no such")):
        odd = changed(tmp_path / f"odd-{n}", made, {}, quant_method=name)
        with pytest.raises(QuantizedBaseError):
            open_base(odd, dequantize=True)
    assert not (tmp_path / "out").exists()


def test_an_index_that_lies(tmp_path: Path) -> None:
    """Scales that are in another file than the index says, or that it does not name."""
    base = base_of(tmp_path / "base", METHODS["fp8, experts of four bits"](), shards=2)
    index = base / "model.safetensors.index.json"
    text = json.loads(index.read_text())
    for place in ("model-00001-of-00002.safetensors", None):
        weight_map = dict(text["weight_map"])
        if place is None:
            del weight_map[f"{W}_scale_inv"]
        else:
            weight_map[f"{W}_scale_inv"] = place
        index.write_text(json.dumps({**text, "weight_map": weight_map}))
        with pytest.raises(LrcError, match="E-INDEX-MAP"):
            open_base(base, dequantize=True)


def test_settings_of_the_language_model(tmp_path: Path) -> None:
    """Models of text and pictures say it in text_config."""
    base = base_of(tmp_path / "base", fp8())
    config = json.loads((base / "config.json").read_text())
    settings = config.pop("quantization_config")
    config["text_config"] = {"hidden_size": 40, "quantization_config": settings}
    (base / "config.json").write_text(json.dumps(config))
    with open_base(base, dequantize=True) as checkpoint:
        assert checkpoint.config["text_config"] == {"hidden_size": 40}
    with pytest.raises(QuantizedBaseError, match=r"by fp8\. Use the unquantized parent.*dequantize=True"):
        open_checkpoint(base)


def test_files_that_describe_the_stored_weights(tmp_path: Path) -> None:
    """ModelOpt's own file is enough to know a base by, and no such file is in the output, which is not quantized."""
    made = modelopt("NVFP4")
    base = base_of(tmp_path / "base", made)
    config = json.loads((base / "config.json").read_text())
    del config["quantization_config"]
    (base / "config.json").write_text(json.dumps(config))
    (base / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "modelopt"}}))
    report = merge(base, [adapter(made)], tmp_path / "out", dequantize=True)
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    assert report.left_out == ("hf_quant_config.json",)
    assert "from modelopt to bf16" in report.warnings[-1]


def test_memory_is_that_of_a_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are stored transposed are computed some rows at a time, each row once."""
    made = gptq(4)
    base = base_of(tmp_path / "base", made)
    monkeypatch.setattr(contract, "PANEL", 300)  # three rows
    counts: list[int] = []
    with open_base(base, dequantize=True) as checkpoint:
        assert isinstance(checkpoint, quantized_base.DequantizedCheckpoint)
        weight = checkpoint.weights[W]
        real = weight.values
        object.__setattr__(weight, "values", lambda first, count: counts.append(count) or real(first, count))
        info = checkpoint.tensors[W]
        for offset in range(0, info.nbytes, 64):
            checkpoint.read(info, offset, 64)
    assert max(counts) == 288 and sum(counts) == made.values[W].size
