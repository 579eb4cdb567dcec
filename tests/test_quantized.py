"""Bases that bitsandbytes has quantized: values as it computes them, merged, verified and undone as bf16."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ADAPTERS, BASES
from hypothesis import given, settings
from hypothesis import strategies as st
from models import load_all, one_target, save_base, tree

from lrconvert import api, quantized
from lrconvert.adapter import LoraAdapter, Target
from lrconvert.container import open_checkpoint
from lrconvert.dtypes import Stored, round_to
from lrconvert.errors import LrcError, QuantizedBaseError
from lrconvert.merging import merge, unmerge, verify
from lrconvert.quantized import open_base

NF4 = np.array(
    [
        *(-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0),
        *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
    ],
    np.float32,
)
FOUR_BIT = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
EIGHT_BIT = {"quant_method": "bitsandbytes", "load_in_8bit": True}


def state(**fields: Any) -> Stored:
    return Stored("U8", np.frombuffer(json.dumps(fields).encode(), np.uint8))


def four_bit(name: str, w: np.ndarray, block: int = 64, nested: bool = False) -> tuple[dict[str, Stored], np.ndarray]:
    """(stored tensors, values) of a matrix, one element after the other: the definition."""
    flat = w.reshape(-1)
    blocks = [flat[i : i + block] for i in range(0, flat.size, block)]
    absmax = np.array([np.abs(b).max() for b in blocks], np.float32)
    parts = {f"{name}.quant_map": Stored("F32", NF4)}
    fields: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": list(w.shape)}
    if nested:
        table = np.linspace(-1, 1, 256).astype(np.float32)
        offset = np.float32(absmax.mean())
        outer = np.array([np.abs(absmax[i : i + 4] - offset).max() for i in range(0, absmax.size, 4)], np.float32)
        codes = np.array([np.abs(table * outer[i // 4] + offset - a).argmin() for i, a in enumerate(absmax)], np.uint8)
        absmax = np.array([table[c] * outer[i // 4] + offset for i, c in enumerate(codes)], np.float32)
        parts[f"{name}.absmax"] = Stored("U8", codes)
        parts[f"{name}.nested_absmax"] = Stored("F32", outer)
        parts[f"{name}.nested_quant_map"] = Stored("F32", table)
        fields |= {"nested_blocksize": 4, "nested_dtype": "float32", "nested_offset": float(offset)}
    else:
        parts[f"{name}.absmax"] = Stored("F32", absmax)
    codes = np.array([np.abs(NF4 - x / absmax[i // block]).argmin() for i, x in enumerate(flat)], np.uint8)
    padded = np.append(codes, np.zeros(codes.size % 2, np.uint8))
    parts[name] = Stored("U8", ((padded[::2] << 4) | padded[1::2]).reshape(-1, 1))
    parts[f"{name}.quant_state.bitsandbytes__nf4"] = state(**fields)
    values = np.array([np.float32(NF4[c] * absmax[i // block]) for i, c in enumerate(codes)], np.float32)
    return parts, values.reshape(w.shape)


def eight_bit(name: str, w: np.ndarray) -> tuple[dict[str, Stored], np.ndarray]:
    scale = np.abs(w).max(axis=1).astype(np.float32)
    codes = np.rint(w / scale[:, None] * 127).astype(np.int8)
    parts = {
        name: Stored("I8", codes),
        name.replace("weight", "SCB"): Stored("F32", scale),
        name.replace("weight", "weight_format"): Stored("U8", np.zeros((), np.uint8)),
    }
    return parts, codes.astype(np.float32) * scale[:, None] * np.float32(7.874015718698502e-3)


KINDS = {
    "nf4": lambda name, w: four_bit(name, w),
    "nf4, nested": lambda name, w: four_bit(name, w, nested=True),
    "nf4, blocks over rows": lambda name, w: four_bit(name, w, block=256),
    "int8": eight_bit,
}
SHAPES = {"model.layers.0.q.weight": (24, 20), "model.layers.0.up.weight": (33, 21)}


def base_of(folder: Path, kind: str, shards: int = 1) -> tuple[Path, dict[str, np.ndarray]]:
    """A quantized base with a norm that is not, and what its weights are."""
    rng = np.random.default_rng(0)
    parts: list[dict[str, Stored]] = [{} for _ in range(shards)]
    values = {}
    for n, (name, shape) in enumerate(SHAPES.items()):
        stored, values[name] = KINDS[kind](name, (rng.standard_normal(shape) * 0.02).astype(np.float32))
        parts[n % shards] |= stored
    parts[-1]["model.norm.weight"] = Stored("F16", np.ones(7, np.float16))
    config = {
        "model_type": "llama",
        "torch_dtype": "float16",
        "quantization_config": EIGHT_BIT if kind == "int8" else FOUR_BIT,
    }
    return save_base(folder, parts, config), values


def adapter(scale: float = 0.002) -> LoraAdapter:
    return LoraAdapter(tuple(one_target(Target(n, s), scale=scale, seed=i) for i, (n, s) in enumerate(SHAPES.items())))


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_the_definition(kind: str, tmp_path: Path) -> None:
    base, values = base_of(tmp_path / "base", kind)
    with open_base(base, dequantize=True) as checkpoint:
        assert set(checkpoint.tensors) == {*SHAPES, "model.norm.weight"}
        assert "quantization_config" not in checkpoint.config and checkpoint.config["torch_dtype"] == "bfloat16"
        for name, expected in values.items():
            info = checkpoint.tensors[name]
            assert (info.dtype, info.shape) == ("BF16", SHAPES[name])
            goal = round_to(expected, "BF16").reshape(-1)
            whole = np.frombuffer(checkpoint.read(info), "<u2")
            assert np.array_equal(whole, goal)
            for first, count in ((0, 1), (1, 2), (63, 66), (goal.size - 1, 1), (7, goal.size - 9)):
                some = np.frombuffer(checkpoint.read(info, 2 * first, 2 * count), "<u2")
                assert np.array_equal(some, goal[first : first + count])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shards", (1, 2))
def test_merge_verify_undo(kind: str, shards: int, tmp_path: Path) -> None:
    """As into a base that is stored as bf16; the undo gives that base."""
    base, values = base_of(tmp_path / "base", kind, shards)
    before = tree(base)
    report = merge(base, [adapter()], tmp_path / "out", dequantize=True)
    assert "2 tensors were dequantized from bitsandbytes" in report.warnings[-1]
    plain = {name: Stored("BF16", round_to(v, "BF16")) for name, v in values.items()}
    plain["model.norm.weight"] = Stored("F16", np.ones(7, np.float16))
    unpacked = save_base(tmp_path / "plain", [plain], {"model_type": "llama", "torch_dtype": "bfloat16"})
    merge(unpacked, [adapter()], tmp_path / "goal")
    ours, goal = load_all(tmp_path / "out"), load_all(tmp_path / "goal")
    assert ours.keys() == goal.keys() and all(ours[name] == goal[name] for name in goal)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"model_type": "llama", "torch_dtype": "bfloat16"}
    assert verify(tmp_path / "out", base, [adapter()], dequantize=True).ok
    assert verify(tmp_path / "out", unpacked, [adapter()]).ok
    unmerge(tmp_path / "out", tmp_path / "back")
    back = load_all(tmp_path / "back")
    assert back.keys() == plain.keys() and all(back[name] == plain[name] for name in plain)
    assert tree(base) == before


def test_refusals_name_the_method(tmp_path: Path) -> None:
    base, _ = base_of(tmp_path / "base", "nf4")
    with pytest.raises(QuantizedBaseError, match=r"by bitsandbytes\. Use the unquantized parent.*--dequantize"):
        merge(base, [adapter()], tmp_path / "out")
    for n, method in enumerate(("gptq", "awq", "hqq", "compressed-tensors", "fp8")):
        other = save_base(tmp_path / str(n), [{}], {"quantization_config": {"quant_method": method}})
        for dequantize in (False, True):
            with pytest.raises(QuantizedBaseError, match=f"by {method}. Use the unquantized parent") as caught:
                merge(other, [adapter()], tmp_path / "out", dequantize=dequantize)
            assert "--dequantize" not in str(caught.value)
    with pytest.raises(QuantizedBaseError, match="Leave out --dequantize"):
        merge(BASES / "tiny-llama", [api.load_lora(ADAPTERS / "llama-plain")], tmp_path / "out", dequantize=True)
    assert not (tmp_path / "out").exists()


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_states_of_strangers(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """One tensor of a state left out, cut, of another dtype, or another text: our own error, or numbers."""
    folder = tmp_path_factory.mktemp("base")
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    base, _ = base_of(folder / "base", kind)
    with open_checkpoint(base, quantized=True) as checkpoint:
        stored = {n: checkpoint.file_of(info).load(info) for n, info in checkpoint.tensors.items()}
    name = data.draw(st.sampled_from(sorted(stored)))
    how = data.draw(st.sampled_from(["drop", "cut", "dtype", "text", "nan"]))
    if how == "drop":
        del stored[name]
    elif how == "cut":
        stored[name] = Stored(stored[name].dtype, stored[name].array.reshape(-1)[:-1])
    elif how == "dtype":
        stored[name] = Stored("I16", np.zeros(stored[name].shape, np.int16))
    elif how == "nan" and stored[name].dtype == "F32":
        stored[name] = Stored("F32", np.full(stored[name].shape, np.nan, "<f4"))
    elif how == "text" and "quant_state" in name:
        value = json.loads(stored[name].array.tobytes())
        key = data.draw(st.sampled_from(sorted(value)))
        value[key] = data.draw(st.sampled_from([None, -1, 0, "x", [], [0], 2**40, 1.5, True, [3, 2**31]]))
        stored[name] = state(**value)
    config = json.loads((base / "config.json").read_text())
    try:
        changed = save_base(folder / "changed", [{n: s for n, s in stored.items() if s.array.size}], config)
        with open_base(changed, dequantize=True) as checkpoint:
            for info in checkpoint.tensors.values():
                checkpoint.read(info)
    except LrcError:
        pass


def test_as_bitsandbytes_computes(tmp_path: Path) -> None:
    """A tiny model quantized and saved by the library itself."""
    pytest.importorskip("bitsandbytes")
    torch = pytest.importorskip("torch")
    from bitsandbytes import functional
    from safetensors.torch import save_file

    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 0.02
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            for dtype in (torch.float32, torch.bfloat16):
                packed, told = functional.quantize_4bit(w.to(dtype), quant_type=kind, compress_statistics=nested)
                tensors = {"q.weight": packed}
                tensors |= {f"q.weight.{key}": value for key, value in told.as_dict(packed=True).items()}
                folder = tmp_path / f"{kind}-{nested}-{dtype}"
                folder.mkdir()
                save_file(tensors, folder / "model.safetensors")
                (folder / "config.json").write_text(json.dumps({"quantization_config": FOUR_BIT}))
                told.dtype = torch.float32
                theirs = functional.dequantize_4bit(packed, told).to(torch.bfloat16).view(torch.int16).numpy()
                assert np.array_equal(only(folder), theirs.view(np.uint16))
    codes, scale, _ = functional.int8_vectorwise_quant(w.half())
    folder = tmp_path / "int8"
    folder.mkdir()
    save_file({"q.weight": codes, "q.SCB": scale}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": EIGHT_BIT}))
    theirs = functional.int8_vectorwise_dequant(codes, scale).to(torch.bfloat16).view(torch.int16).numpy()
    assert np.array_equal(only(folder), theirs.view(np.uint16))


def only(folder: Path) -> np.ndarray:
    with open_base(folder, dequantize=True) as checkpoint:
        (info,) = checkpoint.tensors.values()
        return np.frombuffer(checkpoint.read(info), "<u2").reshape(info.shape)


def test_memory_is_that_of_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are computed as they are read: never more than so many elements at a time."""
    base, _ = base_of(tmp_path / "base", "nf4")
    asked = []
    monkeypatch.setattr(quantized, "_CHUNK", 50)
    with open_base(base, dequantize=True) as checkpoint:
        file = checkpoint.files[0]
        weights: Mapping[str, Any] = file._weights  # type: ignore[attr-defined]
        for name, weight in weights.items():
            real = weight.values

            def values(first: int, count: int, real: Any = real) -> Any:
                asked.append(count)
                return real(first, count)

            object.__setattr__(weight, "values", values)
            checkpoint.read(checkpoint.tensors[name])
    assert max(asked) <= 50 and sum(asked) == sum(np.prod(s) for s in SHAPES.values())
