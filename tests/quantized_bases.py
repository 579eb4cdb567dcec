"""Tiny quantized weights of every method, packed number by number, with the values that they stand for: definitions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from models import save_base

from lrconvert.core.dtypes import Stored, decode, round_to

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
Tensors = dict[str, Stored]


@dataclass(frozen=True)
class Made:
    """Stored tensors, and the float32 values of the weights that they stand for."""

    tensors: Tensors
    values: dict[str, np.ndarray]
    settings: dict[str, Any]
    left_out: Tensors = field(default_factory=dict)


def e4m3(code: int) -> float:
    """The number of a code of FP8 E4M3, but for NaN."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


def e5m2(code: int) -> float:
    sign, exponent, mantissa = code >> 7, code >> 2 & 31, code & 3
    size = mantissa / 4 * 2.0**-14 if exponent == 0 else (1 + mantissa / 4) * 2.0 ** (exponent - 15)
    return -size if sign else size


def codes8(shape: tuple[int, ...], seed: int, top: int = 0x78) -> np.ndarray:
    """Codes of FP8 that are finite."""
    rng = np.random.default_rng(seed)
    return (rng.integers(0, top, shape) | rng.integers(0, 2, shape) << 7).astype(np.uint8)


def numbers(shape: tuple[int, ...], dtype: str, seed: int) -> tuple[Stored, np.ndarray]:
    """Scales as they are stored, and as float32."""
    array = round_to(np.random.default_rng(seed).uniform(0.5, 1.5, shape) / 128, dtype)
    return Stored(dtype, array), decode(array, dtype)


def powers(shape: tuple[int, ...], dtype: str, seed: int) -> tuple[Stored, np.ndarray]:
    codes = np.random.default_rng(seed).integers(110, 126, shape).astype(np.uint8)
    return Stored(dtype, codes), np.exp2(codes.astype(np.float32) - 127)


def stream(values: Sequence[int], bits: int) -> np.ndarray:
    """Numbers as one stream of bits in words, low ones first."""
    whole = sum(int(value) << bits * n for n, value in enumerate(values))
    words = -(-len(values) * bits // 32)
    return np.frombuffer(whole.to_bytes(4 * words, "little"), "<i4")


def nibbles(codes: np.ndarray) -> np.ndarray:
    """Two codes in a byte, the first in the low bits."""
    return (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)


def scaled(codes: np.ndarray, table: Callable[[int], float], scale: Callable[..., Any]) -> np.ndarray:
    out = np.empty(codes.shape, np.float32)
    for place in product(*map(range, codes.shape)):
        out[place] = np.float32(table(int(codes[place]))) * np.float32(scale(*place))
    return out


# --- methods --------------------------------------------------------------------------------------------------------


def fp8(
    shape: tuple[int, ...] = (24, 40),
    block: tuple[int, int] | None = (16, 16),
    dtype: str = "F8_E4M3",
    scales: str = "F32",
    suffix: str = "weight_scale_inv",
    method: str = "fp8",
) -> Made:
    grid = () if block is None else tuple(-(-n // b) for n, b in zip(shape, block, strict=True))
    make = powers if scales in ("U8", "F8_E8M0") else numbers
    codes = codes8(shape, 1)
    stored, scale = make(grid, scales, 2)
    of = e4m3 if dtype == "F8_E4M3" else e5m2
    values = scaled(
        codes, of, (lambda r, c: scale) if block is None else lambda r, c: scale[r // block[0], c // block[1]]
    )
    settings = {"quant_method": method, "activation_scheme": "dynamic", "weight_block_size": block and list(block)}
    tensors = {f"{Q}.weight": Stored(dtype, codes), f"{Q}.{suffix}": stored}
    return Made(tensors, {f"{Q}.weight": values}, settings)


def static_fp8() -> Made:
    made = fp8(block=None)
    activations = {f"{Q}.activation_scale": Stored("F32", np.ones((), np.float32))}
    return Made(made.tensors, made.values, made.settings | {"activation_scheme": "static"}, activations)


def fp8_experts() -> Made:
    """A stack of experts, one scale for each block of each."""
    codes = codes8((3, 32, 48), 1)
    stored, scale = numbers((3, 2, 3), "BF16", 2)
    name = "model.layers.0.mlp.experts.down_proj"
    values = scaled(codes, e4m3, lambda e, r, c: scale[e, r // 16, c // 16])
    tensors = {name: Stored("F8_E4M3", codes), f"{name}_scale_inv": stored}
    return Made(tensors, {name: values}, {"quant_method": "fp8", "weight_block_size": [16, 16]})


def fp4_experts(shape: tuple[int, ...] = (24, 40)) -> Made:
    """Experts of four bits in a checkpoint of eight bits."""
    made = fp8(shape)
    name = "model.layers.0.mlp.experts.0.w1"
    codes = np.random.default_rng(3).integers(0, 16, (8, 64)).astype(np.uint8)
    stored, scale = powers((8, 2), "F8_E8M0", 4)
    values = {f"{name}.weight": scaled(codes, E2M1.__getitem__, lambda r, c: scale[r, c // 32])}
    tensors = {f"{name}.weight": Stored("I8", nibbles(codes).view(np.int8)), f"{name}.scale": stored}
    return Made(made.tensors | tensors, made.values | values, made.settings)


def fbgemm() -> Made:
    codes, (stored, scale) = codes8((24, 40), 1), numbers((24, 1), "F32", 2)
    stack = codes8((2, 16, 24), 3)
    columns, factor = numbers((2, 1, 24), "F32", 4)
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {f"{Q}.weight": Stored("F8_E4M3", codes), f"{Q}.weight_scale": stored}
    tensors |= {experts: Stored("F8_E4M3", stack), f"{experts}_scale": columns}
    values = {f"{Q}.weight": scaled(codes, e4m3, lambda r, c: scale[r, 0])}
    values[experts] = scaled(stack, e4m3, lambda e, r, c: factor[e, 0, c])
    left_out = {f"{Q}.input_scale_ub": Stored("F32", np.ones(1, np.float32))}
    return Made(tensors, values, {"quant_method": "fbgemm_fp8"}, left_out)


def gpt_oss() -> Made:
    """Experts, stored (out, in), and held (in, out)."""
    tensors, values = {}, {}
    for n, (leaf, out, inputs) in enumerate((("gate_up_proj", 48, 64), ("down_proj", 64, 32))):
        name = f"model.layers.0.mlp.experts.{leaf}"
        codes = np.random.default_rng(n).integers(0, 16, (2, out, inputs)).astype(np.uint8)
        stored, scale = powers((2, out, inputs // 32), "U8", 9 + n)
        tensors[f"{name}_blocks"] = Stored("U8", nibbles(codes).reshape(2, out, inputs // 32, 16))
        tensors[f"{name}_scales"] = stored
        held = scaled(codes, E2M1.__getitem__, lambda e, r, c, scale=scale: scale[e, r, c // 32])
        values[name] = np.ascontiguousarray(held.transpose(0, 2, 1))
    return Made(tensors, values, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})


def modelopt(kind: str) -> Made:
    if kind == "FP8":
        made = fp8(block=None, suffix="weight_scale", method="modelopt")
        left_out = {f"{Q}.input_scale": Stored("F32", np.ones((), np.float32))}
        return Made(made.tensors, made.values, {"quant_method": "modelopt", "quant_algo": "FP8"}, left_out)
    codes = np.random.default_rng(3).integers(0, 16, (24, 48)).astype(np.uint8)
    scale, whole = codes8((24, 3), 4, 0x60) & 127, np.float32(0.0123)
    values = scaled(codes, E2M1.__getitem__, lambda r, c: np.float32(e4m3(int(scale[r, c // 16]))) * whole)
    tensors = {f"{Q}.weight": Stored("U8", nibbles(codes)), f"{Q}.weight_scale": Stored("F8_E4M3", scale)}
    tensors[f"{Q}.weight_scale_2"] = Stored("F32", np.array(whole))
    return Made(tensors, {f"{Q}.weight": values}, {"quant_method": "modelopt", "quant_algo": "NVFP4"})


def gptq(bits: int, kind: str = "gptq", ordered: bool = True, dtype: str = "F16") -> Made:
    out, inputs, size = 64, 96, 32
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 1 << bits, (out, inputs))
    groups = inputs // size
    points = rng.integers(0, 1 << bits, (groups, out))
    stored, scale = numbers((groups, out), dtype, 5)
    group = np.repeat(np.arange(groups), size)
    if not ordered:
        rng.shuffle(group)
    more = 1 if kind == "gptq" else 0
    values = np.empty((out, inputs), np.float32)
    for o, i in product(range(out), range(inputs)):
        point = (points[group[i], o] + more) % (1 << bits)
        values[o, i] = np.float32(codes[o, i] - point) * scale[group[i], o]
    tensors = {
        f"{Q}.qweight": Stored("I32", np.stack([stream(row, bits) for row in codes], axis=1)),
        f"{Q}.qzeros": Stored("I32", np.stack([stream(row, bits) for row in points])),
        f"{Q}.scales": stored,
        f"{Q}.g_idx": Stored("I32", group.astype("<i4")),
    }
    settings = {"quant_method": "gptq", "bits": bits, "group_size": size, "checkpoint_format": kind}
    return Made(tensors, {f"{Q}.weight": values}, settings)


def awq() -> Made:
    out, inputs, size = 48, 64, 16
    rng = np.random.default_rng(0)
    codes, points = rng.integers(0, 16, (inputs, out)), rng.integers(0, 16, (inputs // size, out))
    stored, scale = numbers((inputs // size, out), "F16", 5)

    def words(each: np.ndarray) -> Stored:
        rows = [[row[8 * n + k] for n in range(out // 8) for k in (0, 2, 4, 6, 1, 3, 5, 7)] for row in each]
        return Stored("I32", np.stack([stream(row, 4) for row in rows]))

    values = np.empty((out, inputs), np.float32)
    for o, i in product(range(out), range(inputs)):
        values[o, i] = np.float32(codes[i, o] - points[i // size, o]) * scale[i // size, o]
    tensors = {f"{Q}.qweight": words(codes), f"{Q}.qzeros": words(points), f"{Q}.scales": stored}
    return Made(tensors, {f"{Q}.weight": values}, {"quant_method": "awq", "bits": 4, "version": "gemm"})


def compressed(format_name: str, weights: Mapping[str, Any], tensors: Tensors, values: np.ndarray) -> Made:
    """A checkpoint of compressed-tensors with one group."""
    args = {"symmetric": f"{Q}.weight_zero_point" not in tensors, "dynamic": False, **weights}
    group = {"targets": ["Linear"], "weights": args, "input_activations": None, "format": format_name}
    settings = {"quant_method": "compressed-tensors", "format": format_name, "config_groups": {"group_0": group}}
    return Made(tensors, {f"{Q}.weight": values}, settings | {"quantization_status": "compressed"})


def compressed_fp8(strategy: str) -> Made:
    block = {"channel": (1, 40), "block": (16, 16), "tensor": (24, 40)}[strategy]
    made = fp8(block=block, scales="BF16", suffix="weight_scale")
    weights = {"num_bits": 8, "type": "float", "strategy": strategy}
    if strategy == "block":
        weights["block_structure"] = [16, 16]
    return compressed("float-quantized", weights, made.tensors, made.values[f"{Q}.weight"])


def compressed_mxfp8() -> Made:
    made = fp8((24, 64), (1, 32), scales="U8", suffix="weight_scale")
    weights = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
    return compressed("mxfp8-quantized", weights, made.tensors, made.values[f"{Q}.weight"])


def compressed_int8(zero_points: bool) -> Made:
    codes = np.random.default_rng(0).integers(-128, 128, (24, 40)).astype(np.int8)
    stored, scale = numbers((24, 1), "F32", 1)
    points = np.random.default_rng(2).integers(-9, 9, (24, 1)).astype(np.int8) * zero_points
    values = (codes.astype(np.float32) - points) * scale
    tensors = {f"{Q}.weight": Stored("I8", codes), f"{Q}.weight_scale": stored}
    if zero_points:
        tensors[f"{Q}.weight_zero_point"] = Stored("I8", points)
    return compressed("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}, tensors, values)


def compressed_packed(bits: int, zero_points: bool = False, dtype: str = "BF16", channel: bool = False) -> Made:
    rows, cols, size = 24, 64, 64 if channel else 32
    rng = np.random.default_rng(bits)
    half = 1 << (bits - 1)
    codes = rng.integers(-half, half, (rows, cols))
    stored, scale = numbers((rows, cols // size), dtype, 1)
    points = rng.integers(-half, half, (rows, cols // size)) * zero_points
    values = np.empty((rows, cols), np.float32)
    for r, c in product(range(rows), range(cols)):
        values[r, c] = np.float32(codes[r, c] - points[r, c // size]) * scale[r, c // size]
    tensors = {
        f"{Q}.weight_packed": Stored("I32", np.stack([stream(row + half, bits) for row in codes])),
        f"{Q}.weight_scale": stored,
        f"{Q}.weight_shape": Stored("I64", np.array([rows, cols])),
    }
    if zero_points:
        packed = np.stack([stream(column + half, bits) for column in points.T], axis=1)
        tensors[f"{Q}.weight_zero_point"] = Stored("I32", packed)
    strategy = {"strategy": "channel"} if channel else {"strategy": "group", "group_size": size}
    return compressed("pack-quantized", {"num_bits": bits, "type": "int", **strategy}, tensors, values)


def compressed_fp4(kind: str) -> Made:
    codes = np.random.default_rng(3).integers(0, 16, (24, 64)).astype(np.uint8)
    tensors = {f"{Q}.weight_packed": Stored("U8", nibbles(codes))}
    if kind == "nvfp4":
        scale, whole = codes8((24, 4), 4, 0x60) & 127, np.float32(81.3)
        values = scaled(codes, E2M1.__getitem__, lambda r, c: np.float32(e4m3(int(scale[r, c // 16]))) / whole)
        tensors[f"{Q}.weight_scale"] = Stored("F8_E4M3", scale)
        tensors[f"{Q}.weight_global_scale"] = Stored("F32", np.array([whole]))
        weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    else:
        tensors[f"{Q}.weight_scale"], factor = powers((24, 2), "U8", 4)
        values = scaled(codes, E2M1.__getitem__, lambda r, c: factor[r, c // 32])
        weights = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
        weights["scale_dtype"] = "torch.uint8"
    return compressed(f"{kind}-pack-quantized", weights, tensors, values)


METHODS: dict[str, Callable[[], Made]] = {
    "fp8, blocks": fp8,
    "fp8, one scale": static_fp8,
    "fp8, E5M2, bf16 scales": lambda: fp8(dtype="F8_E5M2", scales="BF16"),
    "fp8, powers of two": lambda: fp8((24, 64), (1, 32), scales="U8"),
    "fp8, equal parts": lambda: fp8((24, 40), (12, 10), scales="F8_E8M0", suffix="scale"),
    "fp8, experts": fp8_experts,
    "fp8, experts of four bits": fp4_experts,
    "mxfp8": lambda: fp8((24, 64), (1, 32), scales="U8", method="mxfp8"),
    "fbgemm": fbgemm,
    "mxfp4": gpt_oss,
    "modelopt, FP8": lambda: modelopt("FP8"),
    "modelopt, NVFP4": lambda: modelopt("NVFP4"),
    **{f"gptq, {bits} bits": lambda bits=bits: gptq(bits) for bits in (2, 3, 4, 8)},
    "gptq_v2": lambda: gptq(4, "gptq_v2", dtype="BF16"),
    "gptq, any order": lambda: gptq(4, ordered=False),
    "awq": awq,
    **{f"compressed, FP8 {kind}": lambda kind=kind: compressed_fp8(kind) for kind in ("tensor", "channel", "block")},
    "compressed, MXFP8": compressed_mxfp8,
    "compressed, int8": lambda: compressed_int8(False),
    "compressed, int8, zero points": lambda: compressed_int8(True),
    **{f"compressed, {bits} bits": lambda bits=bits: compressed_packed(bits) for bits in (2, 3, 4, 8)},
    "compressed, 4 bits, zero points": lambda: compressed_packed(4, True, "F32"),
    "compressed, 3 bits, zero points": lambda: compressed_packed(3, True),
    "compressed, 4 bits, rows": lambda: compressed_packed(4, channel=True),
    "compressed, NVFP4": lambda: compressed_fp4("nvfp4"),
    "compressed, MXFP4": lambda: compressed_fp4("mxfp4"),
}


def base_of(folder: Path, made: Made, shards: int = 1) -> Path:
    """A base with these tensors and a norm that is not quantized; with several shards every tensor in another one than
    the one before it."""
    parts: list[Tensors] = [{} for _ in range(shards)]
    whole = {"model.norm.weight": Stored("F16", np.ones(7, np.float16))}
    for n, (name, tensor) in enumerate((made.tensors | made.left_out | whole).items()):
        parts[n % shards][name] = tensor
    config = {"model_type": "llama", "torch_dtype": "float16", "quantization_config": made.settings}
    return save_base(folder, parts, config)


def plain(folder: Path, made: Made) -> Path:
    """The base that is stored as bf16."""
    tensors = {name: Stored("BF16", round_to(values, "BF16")) for name, values in made.values.items()}
    tensors["model.norm.weight"] = Stored("F16", np.ones(7, np.float16))
    return save_base(folder, [tensors], {"model_type": "llama", "torch_dtype": "bfloat16"})


def changed(folder: Path, made: Made, tensors: Mapping[str, Stored | None], **settings: Any) -> Path:
    """A base with other tensors, None for one that is missing, or with other settings."""
    mixed: dict[str, Stored | None] = {**made.tensors, **tensors}
    kept = {name: value for name, value in mixed.items() if value is not None and value.array.size}
    return base_of(folder, Made(kept, made.values, {**made.settings, **settings}))


def broken(made: Made) -> Iterator[tuple[str, dict[str, Stored | None]]]:
    """Every tensor of a base left out, cut, of another dtype or shape, by what is wrong."""
    for name, value in made.tensors.items():
        yield f"no {name}", {name: None}
        yield f"cut {name}", {name: Stored(value.dtype, np.ascontiguousarray(value.array.reshape(-1)[:-1]))}
        if all(other.array.size > 1 for other in made.tensors.values()):  # one scale is that of a stack, too
            yield f"twice {name}", {name: Stored(value.dtype, np.stack([value.array, value.array]))}
        yield f"dtype of {name}", {name: Stored("I16", np.zeros(value.shape, np.int16))}


def settings_of(base: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((base / "config.json").read_text())
    return dict(config["quantization_config"])
