"""Bases that bitsandbytes has quantized: values as it computes them, merged, verified and undone as bf16."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ADAPTERS, BASES
from hypothesis import given, settings
from hypothesis import strategies as st
from models import auto, load_all, load_clean, one_target, save_base, tree

from lrconvert import api
from lrconvert.api import merge, unmerge, verify
from lrconvert.core.dtypes import STORAGE, Stored, decode, round_to
from lrconvert.core.errors import LrcError, QuantizedBaseError
from lrconvert.io.checkpoint import open_checkpoint
from lrconvert.lora.adapter import LoraAdapter, Target
from lrconvert.merge import quantized_base
from lrconvert.merge.quantized_base import open_base

NF4 = np.array(
    [
        *(-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0),
        *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
    ],
    np.float32,
)
FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32) / np.float32(12)
FOUR_BIT = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
EIGHT_BIT = {"quant_method": "bitsandbytes", "load_in_8bit": True}


def state(**fields: Any) -> Stored:
    return Stored("U8", np.frombuffer(json.dumps(fields).encode(), np.uint8))


def four_bit(
    name: str, w: np.ndarray, block: int = 64, nested: bool = False, kind: str = "nf4", storage: str = "U8"
) -> tuple[dict[str, Stored], np.ndarray]:
    """(stored tensors, values) of a matrix, one element after the other: the definition."""
    table = {"nf4": NF4, "fp4": FP4}[kind]
    flat = w.reshape(-1)
    blocks = [flat[i : i + block] for i in range(0, flat.size, block)]
    absmax = np.array([np.abs(b).max() for b in blocks], np.float32)
    parts = {f"{name}.quant_map": Stored("F32", table)}
    fields: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": list(w.shape)}
    if nested:
        nested_table = np.linspace(-1, 1, 256).astype(np.float32)
        offset = np.float32(absmax.mean())
        outer = np.array([np.abs(absmax[i : i + 4] - offset).max() for i in range(0, absmax.size, 4)], np.float32)
        codes = np.array(
            [np.abs(nested_table * outer[i // 4] + offset - a).argmin() for i, a in enumerate(absmax)], np.uint8
        )
        absmax = np.array([nested_table[c] * outer[i // 4] + offset for i, c in enumerate(codes)], np.float32)
        parts[f"{name}.absmax"] = Stored("U8", codes)
        parts[f"{name}.nested_absmax"] = Stored("F32", outer)
        parts[f"{name}.nested_quant_map"] = Stored("F32", nested_table)
        fields |= {"nested_blocksize": 4, "nested_dtype": "float32", "nested_offset": float(offset)}
    else:
        parts[f"{name}.absmax"] = Stored("F32", absmax)
    codes = np.array([np.abs(table - x / absmax[i // block]).argmin() for i, x in enumerate(flat)], np.uint8)
    padded = np.append(codes, np.zeros(codes.size % 2, np.uint8))
    packed = ((padded[::2] << 4) | padded[1::2]).view(STORAGE[storage])
    parts[name] = Stored(storage, packed.reshape(-1, 1))
    parts[f"{name}.quant_state.bitsandbytes__{kind}"] = state(**fields)
    values = np.array([np.float32(table[c] * absmax[i // block]) for i, c in enumerate(codes)], np.float32)
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
    "fp4, nested": lambda name, w: four_bit(name, w, nested=True, kind="fp4"),
    "nf4, stored as bf16": lambda name, w: four_bit(name, w, storage="BF16"),
    "int8": eight_bit,
}
SHAPES = {"model.layers.0.q.weight": (24, 20), "model.layers.0.up.weight": (33, 20)}
ODD = {"model.layers.0.q.weight": (24, 20), "model.layers.0.up.weight": (33, 21)}  # a last byte with one code


def shapes_of(kind: str) -> dict[str, tuple[int, int]]:
    return SHAPES if kind == "nf4, stored as bf16" else ODD  # two bytes at a time


def base_of(folder: Path, kind: str, shards: int = 1) -> tuple[Path, dict[str, np.ndarray]]:
    """A quantized base with a norm that is not, and what its weights are. With three shards what describes the weights
    lies in the last two, alone in the third."""
    rng = np.random.default_rng(0)
    parts: list[dict[str, Stored]] = [{} for _ in range(shards)]
    values = {}
    for n, (name, shape) in enumerate(shapes_of(kind).items()):
        stored, values[name] = KINDS[kind](name, (rng.standard_normal(shape) * 0.02).astype(np.float32))
        for part, tensor in stored.items():
            here = n if shards < 3 else 0 if part == name else 1 + n
            parts[here % shards][part] = tensor
    parts[min(1, shards - 1)]["model.norm.weight"] = Stored("F16", np.ones(7, np.float16))
    config = {
        "model_type": "llama",
        "torch_dtype": "float16",
        "quantization_config": EIGHT_BIT if kind == "int8" else FOUR_BIT,
    }
    return save_base(folder, parts, config), values


def adapter(kind: str = "nf4", scale: float = 0.002) -> LoraAdapter:
    shapes = shapes_of(kind).items()
    return LoraAdapter(tuple(one_target(Target(n, s), scale=scale, seed=i) for i, (n, s) in enumerate(shapes)))


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_the_definition(kind: str, tmp_path: Path) -> None:
    base, values = base_of(tmp_path / "base", kind)
    with open_base(base, dequantize=True) as checkpoint:
        assert set(checkpoint.tensors) == {*values, "model.norm.weight"}
        assert "quantization_config" not in checkpoint.config and checkpoint.config["torch_dtype"] == "bfloat16"
        for name, expected in values.items():
            info = checkpoint.tensors[name]
            assert (info.dtype, info.shape) == ("BF16", shapes_of(kind)[name])
            goal = round_to(expected, "BF16").reshape(-1)
            whole = np.frombuffer(checkpoint.read(info), "<u2")
            assert np.array_equal(whole, goal)
            for first, count in ((0, 1), (1, 2), (63, 66), (goal.size - 1, 1), (7, goal.size - 9)):
                part = np.frombuffer(checkpoint.read(info, 2 * first, 2 * count), "<u2")
                assert np.array_equal(part, goal[first : first + count])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shards", (1, 2, 3))
def test_merge_verify_undo(kind: str, shards: int, tmp_path: Path) -> None:
    """As into a base that is stored as bf16; the undo gives that base."""
    base, values = base_of(tmp_path / "base", kind, shards)
    before = tree(base)
    lora = adapter(kind)
    report = merge(base, [lora], tmp_path / "out", dequantize=True)
    bits = 8 if kind == "int8" else 4
    planned = merge(base, [lora], tmp_path / "dry", dequantize=True, dry_run=True)
    assert planned.warnings[-1].startswith(f"2 tensors are dequantized from bitsandbytes {bits} bit to bf16;")
    rounded = [np.abs(v - decode(round_to(v, "BF16"), "BF16")).reshape(-1) for v in values.values()]
    errors = np.concatenate(rounded).astype(np.float64)
    assert f"at most {errors.max():.3g} and on average {errors.mean():.3g} from their values" in report.warnings[-1]
    plain = {name: Stored("BF16", round_to(v, "BF16")) for name, v in values.items()}
    plain["model.norm.weight"] = Stored("F16", np.ones(7, np.float16))
    unpacked = save_base(tmp_path / "plain", [plain], {"model_type": "llama", "torch_dtype": "bfloat16"})
    merge(unpacked, [lora], tmp_path / "goal")
    merged, goal = load_all(tmp_path / "out"), load_all(tmp_path / "goal")
    assert merged.keys() == goal.keys() and all(merged[name] == goal[name] for name in goal)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == min(shards, 2)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"model_type": "llama", "torch_dtype": "bfloat16"}
    assert verify(tmp_path / "out", base, [lora], dequantize=True).ok
    assert verify(tmp_path / "out", unpacked, [lora]).ok
    unmerge(tmp_path / "out", tmp_path / "back")
    back = load_all(tmp_path / "back")
    assert back.keys() == plain.keys() and all(back[name] == plain[name] for name in plain)
    assert tree(base) == before


def test_refusals_name_the_method(tmp_path: Path) -> None:
    for kind, bits in (("nf4", 4), ("int8", 8)):
        base, _ = base_of(tmp_path / kind, kind)
        with pytest.raises(
            QuantizedBaseError, match=rf"bytes {bits} bit\. Use the unquantized parent.*dequantize=True"
        ):
            merge(base, [adapter()], tmp_path / "out")
    for n, method in enumerate(("gptq", "awq", "hqq", "compressed-tensors", "fp8")):
        other = save_base(tmp_path / str(n), [{}], {"quantization_config": {"quant_method": method}})
        for dequantize in (False, True):
            with pytest.raises(QuantizedBaseError, match=f"by {method}. Use the unquantized parent") as caught:
                merge(other, [adapter()], tmp_path / "out", dequantize=dequantize)
            assert "dequantize" not in str(caught.value)
    with pytest.raises(QuantizedBaseError, match="Leave out dequantize=True"):
        merge(BASES / "tiny-llama", [api.load_lora(ADAPTERS / "llama-plain")], tmp_path / "out", dequantize=True)
    assert not (tmp_path / "out").exists()


def raw(base: Path) -> dict[str, Stored]:
    """The tensors of a quantized base as they are stored."""
    with open_checkpoint(base, quantized=True) as checkpoint:
        return {n: checkpoint.file_of(info).load(info) for n, info in checkpoint.tensors.items()}


def changed(base: Path, folder: Path, tensors: Mapping[str, Stored | None]) -> Path:
    """`base` with other tensors; None removes one."""
    stored: dict[str, Stored | None] = {**raw(base), **tensors}
    kept = {name: value for name, value in stored.items() if value is not None and value.array.size}
    return save_base(folder, [kept], json.loads((base / "config.json").read_text()))


def read_all(folder: Path) -> None:
    """As strangers' files are read: a warning of numpy fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with open_base(folder, dequantize=True) as checkpoint:
            for info in checkpoint.tensors.values():
                checkpoint.read(info)


Q = "model.layers.0.q"
REFUSED: dict[str, tuple[str, dict[str, Stored | None], str]] = {
    "another table": ("nf4", {f"{Q}.weight.quant_map": Stored("F32", FP4)}, "is not that of nf4"),
    "a table of NaN": ("nf4", {f"{Q}.weight.quant_map": Stored("F32", NF4 * np.float32(np.nan))}, "not that of nf4"),
    "two states": ("nf4", {f"{Q}.weight.quant_state.bitsandbytes__fp4": state(shape=[24, 20])}, "two states|blocksize"),
    "no state": ("nf4", {f"{Q}.weight.quant_state.bitsandbytes__nf4": None}, "no quant_state"),
    "nothing but a weight": ("int8", {f"{Q}.SCB": None}, "nothing says how it is quantized"),
    "no weight": ("nf4", {f"{Q}.weight": None}, "it is missing"),
    "columns": ("int8", {f"{Q}.weight_format": Stored("U8", np.ones((), np.uint8))}, "not that of rows"),
    "short": ("nf4", {f"{Q}.weight": Stored("U8", np.zeros((239, 1), np.uint8))}, "has 239 bytes"),
    "few scales": ("nf4", {f"{Q}.weight.absmax": Stored("F32", np.ones(7, np.float32))}, "F32 of 7, not F32 of 8"),
    "infinite scale": ("int8", {f"{Q}.SCB": Stored("F32", np.full(24, np.inf, "<f4"))}, "NaN or infinity"),
    "nan": ("nf4", {f"{Q}.weight.absmax": Stored("F32", np.full(8, np.nan, "<f4"))}, "NaN or infinity"),
    "beyond": ("nf4, nested", {f"{Q}.weight.nested_absmax": Stored("F32", np.full(2, 3e38, "<f4"))}, "beyond float32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_states_that_do_not_fit(case: str, tmp_path: Path) -> None:
    kind, tensors, why = REFUSED[case]
    base, _ = base_of(tmp_path / "base", kind)
    if case == "beyond":
        fields = {"blocksize": 64, "shape": [24, 20], "nested_blocksize": 4, "nested_offset": -3e38}
        tensors = {**tensors, f"{Q}.weight.quant_state.bitsandbytes__nf4": state(**fields)}
    with pytest.raises(QuantizedBaseError, match=rf"{Q}\.weight.*({why}).*Use the unquantized parent"):
        read_all(changed(base, tmp_path / "changed", tensors))


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_states_of_strangers(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """One tensor of a state left out, cut, of another dtype, or another text: our own error, or numbers."""
    folder = tmp_path_factory.mktemp("base")
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    base, _ = base_of(folder / "base", kind)
    stored = raw(base)
    name = data.draw(st.sampled_from(sorted(stored)))
    how = data.draw(st.sampled_from(["drop", "cut", "dtype", "text", "fill"]))
    value: Stored | None = stored[name]
    assert value is not None
    if how == "drop":
        value = None
    elif how == "cut":
        value = Stored(value.dtype, value.array.reshape(-1)[:-1])
    elif how == "dtype":
        value = Stored("I16", np.zeros(value.shape, np.int16))
    elif how == "fill" and value.dtype == "F32":
        filling = data.draw(st.sampled_from([np.nan, np.inf, 3e38, -3e38, 1e-45]))
        value = Stored("F32", np.full(value.shape, filling, "<f4"))
    elif how == "text" and "quant_state" in name:
        fields = json.loads(value.array.tobytes())
        key = data.draw(st.sampled_from(sorted(fields)))
        odd = [None, -1, 0, "x", [], [0], 2**40, 1.5, 1e300, True, [3, 2**31], [2**31 - 1] * 3, [24] + [1] * 70 + [20]]
        fields[key] = data.draw(st.sampled_from(odd))
        value = state(**fields)
    with contextlib.suppress(LrcError):
        read_all(changed(base, folder / "changed", {name: value}))


def test_as_bitsandbytes_computes(tmp_path: Path) -> None:
    """A tiny model quantized and saved by the library itself."""
    pytest.importorskip("bitsandbytes")
    torch = pytest.importorskip("torch")
    from bitsandbytes import functional
    from safetensors.torch import save_file

    w = torch.randn(64, 144, generator=torch.Generator().manual_seed(0)) * 0.02
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            for dtype in (torch.float32, torch.bfloat16):
                packed, state = functional.quantize_4bit(w.to(dtype), quant_type=kind, compress_statistics=nested)
                tensors = {"q.weight": packed}
                tensors |= {f"q.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
                folder = tmp_path / f"{kind}-{nested}-{dtype}"
                folder.mkdir()
                save_file(tensors, folder / "model.safetensors")
                (folder / "config.json").write_text(json.dumps({"quantization_config": FOUR_BIT}))
                expected = dequantized_4bit(packed, state).to(torch.bfloat16).view(torch.int16).numpy()
                assert np.array_equal(only(folder), expected.view(np.uint16))
    codes, scale, _ = functional.int8_vectorwise_quant(w.half())
    folder = tmp_path / "int8"
    folder.mkdir()
    save_file({"q.weight": codes, "q.SCB": scale}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": EIGHT_BIT}))
    expected = functional.int8_vectorwise_dequant(codes, scale).to(torch.bfloat16).view(torch.int16).numpy()
    assert np.array_equal(only(folder), expected.view(np.uint16))


def dequantized_4bit(packed: Any, state: Any) -> Any:
    """What bitsandbytes computes in float32, seen as a matrix with one block a row: its AVX-512 kernel (0.50.2) takes
    the wrong scales where a row is not whole blocks; others go through the flat tensor."""
    import torch
    from bitsandbytes import functional

    shape, state.shape, state.dtype = (
        state.shape,
        torch.Size([state.shape.numel() // state.blocksize, state.blocksize]),
        torch.float32,
    )
    return functional.dequantize_4bit(packed, state).reshape(shape)


SAVED: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "llm_int8_skip_modules": ["lm_head", "up_proj"]},
    "stored as bf16": {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"},
    "int8": {"load_in_8bit": True},
}


@pytest.mark.parametrize("kind", SAVED)
def test_as_transformers_saves(kind: str, tmp_path: Path) -> None:
    """A model that transformers quantized and cut into files, between a weight and what describes it too."""
    bnb = pytest.importorskip("bitsandbytes").functional
    torch = pytest.importorskip("torch")
    import transformers

    quantized_by = transformers.BitsAndBytesConfig(**SAVED[kind])
    model = auto("CausalLM").from_pretrained(
        BASES / "tiny-llama", quantization_config=quantized_by, dtype=torch.bfloat16
    )
    base = tmp_path / "base"
    model.save_pretrained(base, max_shard_size="20KB")
    goal = {}
    for name, parameter in model.state_dict(keep_vars=True).items():
        if name.endswith(".weight") and hasattr(parameter, "quant_state"):
            goal[name] = dequantized_4bit(parameter.data, parameter.quant_state)
        elif name.endswith(".weight") and hasattr(parameter, "SCB"):
            goal[name] = bnb.int8_vectorwise_dequant(parameter.data, parameter.SCB)
        elif name.endswith(".weight"):
            goal[name] = parameter.data
    assert sum(value.dtype == torch.float32 for value in goal.values()) == (12 if kind == "fp4" else 14)
    with open_base(base, dequantize=True) as checkpoint:
        assert checkpoint.tensors.keys() == goal.keys()
        for name, info in checkpoint.tensors.items():
            expected = goal[name].to(torch.bfloat16).contiguous().view(torch.int16).numpy().view(np.uint16)
            values = np.frombuffer(checkpoint.read(info), "<u2")
            assert info.dtype == "BF16" and np.array_equal(values, expected.ravel())
    lora = api.load_lora(ADAPTERS / "llama-plain")
    merge(base, [lora], tmp_path / "out", dequantize=True)
    assert verify(tmp_path / "out", base, [lora], dequantize=True).ok
    merged = load_clean("CausalLM", tmp_path / "out")
    assert merged.dtype == torch.bfloat16 and not hasattr(merged.config, "quantization_config")


def only(folder: Path) -> np.ndarray:
    with open_base(folder, dequantize=True) as checkpoint:
        (info,) = checkpoint.tensors.values()
        return np.frombuffer(checkpoint.read(info), "<u2").reshape(info.shape)


def test_memory_is_that_of_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are computed as they are read: never more than so many elements at a time."""
    base, _ = base_of(tmp_path / "base", "nf4")
    counts = []
    monkeypatch.setattr(quantized_base, "_CHUNK", 50)
    with open_base(base, dequantize=True) as checkpoint:
        assert isinstance(checkpoint, quantized_base.DequantizedCheckpoint)
        for name, weight in checkpoint.weights.items():
            real = weight.values

            def values(first: int, count: int, real: Any = real) -> Any:
                counts.append(count)
                return real(first, count)

            object.__setattr__(weight, "values", values)
            checkpoint.read(checkpoint.tensors[name])
    assert max(counts) <= 50 and sum(counts) == sum(np.prod(s) for s in ODD.values())
