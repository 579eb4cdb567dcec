"""Layouts with rules of their own: MLX, GGUF, npz, LoRA-ViT, NOLA and SBoRA. References are written out here, or are
the programs' own files where their environments are there."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ADAPTERS, BASES, asset, dense
from peers import make
from test_base_names import make_base
from test_reader_layouts import check, known, put, refused, stored

from lrconvert import api
from lrconvert.core import errors
from lrconvert.core.limits import MIB
from lrconvert.formats.readers.base import load
from lrconvert.formats.readers.gguf import file as gguf_file_reader
from lrconvert.formats.readers.shared import npz
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.testing import layouts
from lrconvert.testing.gguf import gguf_file
from lrconvert.testing.layouts import npz_file, safetensors_file

LLAMA = BASES / "tiny-llama"


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype("<f4")


# --- MLX ------------------------------------------------------------------------------------------------------------


def mlx_config(**more: Any) -> bytes:
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 2, "scale": 10.0, "dropout": 0.0}}
    return json.dumps({**config, **more}).encode()


def mlx_folder(folder: Path, tensors: dict[str, Any], **config: Any) -> Path:
    return put(folder, {"adapter_config.json": mlx_config(**config), "adapters.safetensors": safetensors_file(tensors)})


def test_mlx_layers_embeddings_and_experts(tmp_path):
    """mlx-lm's fuse: weight + scale * (lora_a @ lora_b), of linear layers transposed."""
    a, b = floats(9, 2), floats(2, 6, seed=1)
    ea, eb = floats(3, 2, 5, seed=2), floats(3, 4, 2, seed=3)
    q, up = "model.layers.3.self_attn.q_proj", "model.layers.2.mlp.switch_mlp.up_proj"
    tensors = {f"{q}.lora_a": a, f"{q}.lora_b": b, "model.embed_tokens.lora_a": a, "model.embed_tokens.lora_b": b}
    tensors |= {f"{up}.lora_a": ea, f"{up}.lora_b": eb}
    folder = mlx_folder(tmp_path / "x", tensors)
    targets = {(p.target.name, p.target.view.text): p for p in load(folder).targets}
    plain = targets.pop(("model.layers.3.self_attn.q_proj.weight", "matrix"))
    np.testing.assert_allclose(dense(plain), 10 * (a.astype(float) @ b.astype(float)).T, rtol=1e-12)
    embedding = targets.pop(("model.embed_tokens.weight", "transposed"))
    assert embedding.target.shape == (9, 6)
    np.testing.assert_allclose(dense(embedding).T, 10 * (a.astype(float) @ b.astype(float)), rtol=1e-12)
    for n in range(3):
        expert = targets.pop(("model.layers.2.mlp.switch_mlp.up_proj.weight", f"expert:{n}"))
        assert expert.target.shape == (3, 4, 5)
        np.testing.assert_allclose(dense(expert), 10 * eb[n].astype(float) @ ea[n].astype(float), rtol=1e-12)
    assert not targets
    early = {**tensors, "model.layers.2.mlp.switch_mlp.up_proj.lora_a": ea.reshape(6, 5)}
    again = load(mlx_folder(tmp_path / "y", early))
    assert [p.a for p in again.targets] == [p.a for p in load(folder).targets]


def test_mlx_settings(tmp_path):
    files = layouts.mlx([known("model.layers.6.self_attn.q_proj"), known("model.layers.7.mlp.up_proj")])

    def written(**config: Any) -> Path:
        name = f"f{len(list(tmp_path.iterdir()))}"
        return put(tmp_path / name, {**files, "adapter_config.json": mlx_config(**config)})

    assert load(written()).targets[0].scale == 10.0
    both = {"rank": 2, "scale": 10.0, "alpha": 16}
    assert any("no meaning" in line for line in load(written(lora_parameters=both)).warnings)
    old = written(lora_parameters=both, num_layers=None)
    (old / "adapter_config.json").write_bytes(
        json.dumps({"fine_tune_type": "lora", "lora_layers": 2, "lora_parameters": both}).encode()
    )
    refused("E-CONFIG", old, "both scale and alpha")
    assert load(old, ReadOptions(alpha=40.0)).targets[0].scale == 20.0
    refused("E-CONFIG", written(lora_parameters={"rank": 2}), "states a scale")
    refused("E-CONFIG", written(lora_parameters={"rank": 2, "scale": "10"}), "expected a number")
    refused("E-CONFIG", written(lora_parameters=[1]), "expected an object")
    refused("E-PAIR", written(lora_parameters={"rank": 3, "scale": 1.0}), "rank 2")
    refused("E-NOT-LORA", written(fine_tune_type="full"), "whole weights")
    refused("E-PAIR", written(fine_tune_type="dora"), "there is no m")
    assert any("num_layers is 5" in line for line in load(written(num_layers=5)).warnings)
    shapes = {f"model.layers.{n}.{m}.weight": (6, 5) for n in (6, 7) for m in ("self_attn.q_proj", "mlp.up_proj")}
    deep = make_base(tmp_path / "base", shapes, {"model_type": "llama", "num_hidden_layers": 9})
    lora = load(written(), ReadOptions(base=deep))
    names = [p.target.name for p in lora.targets]
    assert names == ["model.layers.6.self_attn.q_proj.weight", "model.layers.7.mlp.up_proj.weight"]
    assert list(lora.warnings) == ["num_layers is 2 of 9, the file adapts layer 6 as well"]
    other = make_base(tmp_path / "other", {"model.layers.6.self_attn.q_proj.weight": (6, 5)}, {"model_type": "llama"})
    refused("E-BASE", written(), "not in the base", base=other)
    swapped = {"model.q.lora_a": floats(2, 5), "model.q.lora_b": floats(6, 2)}
    refused("E-PAIR", mlx_folder(tmp_path / "s", swapped), "swapped")


def test_mlx_dora(tmp_path):
    arrays = {"m.q.lora_a": floats(5, 2), "m.q.lora_b": floats(2, 6), "m.q.m": floats(6)}
    (extra,) = load(mlx_folder(tmp_path / "x", arrays, fine_tune_type="dora")).extras
    assert (extra.name, extra.use, extra.data) == ("m.q.weight", "magnitude", arrays["m.q.m"].tobytes())


def test_mlx_names_by_the_configuration_alone(tmp_path):
    base = put(tmp_path / "base", {"config.json": (LLAMA / "config.json").read_bytes()})
    one = known("model.layers.1.self_attn.k_proj", 32, 64)
    check(load(put(tmp_path / "x", layouts.mlx([one])), ReadOptions(base=base)), {f"{one.module}.weight": one})
    bad = known("model.layers.2.self_attn.k_proj", 32, 64)
    refused("E-BASE", put(tmp_path / "y", layouts.mlx([bad])), "not in the base", base=base)


# --- npz ------------------------------------------------------------------------------------------------------------


def test_npz_arrays(tmp_path):
    """Deflated, in columns, and in bfloat16 as mlx writes it."""
    one = known("model.layers.0.self_attn.q_proj")
    stem = one.module
    arrays = {f"{stem}.lora_a": np.asfortranarray(one.a.T), f"{stem}.lora_b": np.ascontiguousarray(one.b.T)}
    (tmp_path / "a.npz").write_bytes(npz_file(arrays, compress=True))
    check(load(tmp_path / "a.npz", ReadOptions(alpha=3.0)), {f"{stem}.weight": one})
    half = {name: (value.view("<u4") >> 16).astype("<u2").view("V2") for name, value in arrays.items()}
    (tmp_path / "b.npz").write_bytes(npz_file({n: np.ascontiguousarray(v) for n, v in half.items()}))
    (pair,) = load(tmp_path / "b.npz", ReadOptions(alpha=3.0)).targets
    assert pair.a.dtype == "BF16" and np.array_equal(pair.A.view("<u4"), one.a.view("<u4") & 0xFFFF0000)


GOOD = {"m.q.lora_a": np.ones((5, 2), "<f4"), "m.q.lora_b": np.ones((2, 6), "<f4")}
TEXT = "{'descr': '<f4', 'fortran_order': False, 'shape': (5, 2), }"


def npz_with(header: str) -> bytes:
    return layouts.npz_header(npz_file(GOOD), "m.q.lora_a", header)


def bomb() -> bytes:
    return npz_file({**GOOD, "z.lora_a": np.zeros((1 << 20, 2), "<f4")}, compress=True)


def pickled() -> bytes:
    import io

    buffer = io.BytesIO()
    np.savez(buffer, **{"m.q.lora_a": np.array([{}], object)})
    return buffer.getvalue()


HOSTILE_NPZ = {
    "an array that claims more": (npz_with(TEXT.replace("5", "5000000000")), "E-SHAPE"),
    "an array that claims a little more": (npz_with(TEXT.replace("5", "6")), "E-OFF-COVER"),
    "Python objects": (pickled(), "E-PICKLE"),
    "big endian": (npz_with(TEXT.replace("<", ">")), "E-DTYPE"),
    "a structure": (npz_with(TEXT.replace("'<f4'", "[('a', '<f4')]")), "E-HDR-TEXT"),
    "code": (npz_with(TEXT.replace("(5, 2)", "(5, __import__('os').getpid())")), "E-HDR-TEXT"),
    "deep": (npz_with("[" * 9000), "E-HDR-TEXT"),
    "negative": (npz_with(TEXT.replace("(5, 2)", "(-5, -2)")), "E-SHAPE"),
    "another field": (npz_with(TEXT.replace("}", "'more': 1}")), "E-HDR-TEXT"),
    "a zip bomb": (bomb(), "E-LIMIT"),
    "no array": (npz_file(GOOD).replace(b"\x93NUMPY", b"\x93NUMPX"), "E-HDR-TEXT"),
    "cut off": (npz_file(GOOD)[:-30], "E-IO-KIND"),
    "bytes before the zip": (b"GGUF" + npz_file(GOOD), "E-OFF-COVER"),
    "bytes after the zip": (npz_file(GOOD) + b"x", "E-IO-KIND"),
    "a huge directory": (npz_file(GOOD)[:-10] + b"\xf0" * 4 + npz_file(GOOD)[-6:], "E-LIMIT"),
    "no zip": (b"hello" * 30, "E-IO-KIND"),
    "empty": (b"", "E-IO-KIND"),
    "control characters": (npz_file({**GOOD, "a\x1b[2J": GOOD["m.q.lora_a"]}), "E-NAME"),
    "a damaged byte": (npz_file(GOOD).replace(np.ones(2, "<f4").tobytes(), b"\0\0\0\0\0\0\0\1", 1), "E-HDR-TEXT"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_NPZ)
def test_hostile_npz(name, tmp_path, monkeypatch):
    data, code = HOSTILE_NPZ[name]
    path = tmp_path / "adapters.npz"
    path.write_bytes(data)
    inflated = []
    original = npz.NpzFile._inflate
    monkeypatch.setattr(npz.NpzFile, "_inflate", lambda self, entry, n: inflated.append(n) or original(self, entry, n))
    with pytest.raises(errors.LrcError) as caught:
        load(path, ReadOptions(alpha=1.0, layout="mlx"))
    assert caught.value.code == code, caught.value
    assert sum(inflated) < MIB // 4  # sizes are checked before anything is unpacked


def test_one_name_twice_in_a_npz(tmp_path):
    path = tmp_path / "adapters.npz"
    path.write_bytes(npz_file(GOOD))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("m.q.lora_a.npy", archive.read("m.q.lora_b.npy"))
    refused("E-NAME", path, "twice", alpha=1.0, layout="mlx")


# --- GGUF -----------------------------------------------------------------------------------------------------------

FIELDS: dict[str, Any] = {
    "general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 4.0,
}  # fmt: skip


def gguf(folder: Path, arrays: dict[str, np.ndarray], **fields: Any) -> Path:
    tensors = {name: (0, value.shape, value.tobytes()) for name, value in arrays.items()}
    named = {key.replace("__", "."): value for key, value in fields.items()}
    return put(folder, {"x.gguf": gguf_file({**FIELDS, **named}, tensors)[0]})


def test_gguf_embeddings_experts_and_quantized_factors(tmp_path):
    ea, eb = floats(3, 2, 5), floats(3, 4, 2, seed=1)
    arrays = {"token_embd.weight.lora_a": floats(9, 2), "token_embd.weight.lora_b": floats(6, 2, seed=2),
              "blk.0.ffn_up_exps.weight.lora_a": ea, "blk.0.ffn_up_exps.weight.lora_b": eb}  # fmt: skip
    lora = load(gguf(tmp_path / "x", arrays))
    assert [p.target.view.text for p in lora.targets] == ["expert:0", "expert:1", "expert:2", "transposed"]
    wanted = 2 * arrays["token_embd.weight.lora_a"].astype(float) @ arrays["token_embd.weight.lora_b"].astype(float).T
    assert lora.targets[3].target.shape == (9, 6)
    np.testing.assert_allclose(dense(lora.targets[3]).T, wanted, rtol=1e-12)
    for n in range(3):
        np.testing.assert_allclose(dense(lora.targets[n]), 2 * eb[n].astype(float) @ ea[n].astype(float), rtol=1e-12)

    rng = np.random.default_rng(5)
    factor, codes = rng.standard_normal((2, 2)).astype("<f2"), rng.integers(-127, 128, (2, 2, 32)).astype("i1")
    blocks = b"".join(factor[i, j].tobytes() + codes[i, j].tobytes() for i in range(2) for j in range(2))
    tensors = {"blk.0.attn_v.weight.lora_a": (8, (2, 64), blocks),
               "blk.0.attn_v.weight.lora_b": (1, (4, 2), np.ones((4, 2), "<f2").tobytes())}  # fmt: skip
    (pair,) = load(put(tmp_path / "q", {"x.gguf": gguf_file(FIELDS, tensors)[0]})).targets
    exact = (factor.astype(float)[..., None] * codes).reshape(2, 64)
    assert np.array_equal(pair.A.astype(float), exact) and pair.b.dtype == "F16"
    assert load(gguf(tmp_path / "z", arrays, adapter__lora__alpha=0.0)).targets[0].scale == 1.0


def permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k (LlamaModel.permute)."""
    shape = weights.shape
    return weights.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


@pytest.mark.parametrize("whole", [True, False])
def test_gguf_on_a_base(whole, tmp_path):
    """Names and the order of rows become those of transformers, by the folder or by its configuration alone."""
    base = LLAMA if whole else put(tmp_path / "base", {"config.json": (LLAMA / "config.json").read_bytes()})
    modules = {"blk.1.attn_q": ("self_attn.q_proj", 64, 64, 4), "blk.1.attn_k": ("self_attn.k_proj", 32, 64, 2),
               "blk.1.attn_v": ("self_attn.v_proj", 32, 64, 0),
               "blk.1.ffn_down": ("mlp.down_proj", 64, 144, 0)}  # fmt: skip
    arrays, wanted = {}, {}
    for name, (leaf, out, inner, heads) in modules.items():
        one = known(f"model.layers.1.{leaf}", out, inner, alpha=4.0)
        wanted[f"{one.module}.weight"] = one
        arrays[f"{name}.weight.lora_a"] = one.a
        arrays[f"{name}.weight.lora_b"] = permuted(one.b, heads) if heads else one.b
    folder = gguf(tmp_path / "x", arrays)
    check(load(folder, ReadOptions(base=base)), wanted)
    assert any("own order" in line for line in load(folder).warnings)
    refused("E-BASE", gguf(tmp_path / "g", arrays, general__architecture="gemma"), "family", base=base)
    refused("E-BASE", gguf(tmp_path / "b", arrays, general__architecture="mamba"), "not known here", base=base)
    odd = {name.replace("attn_v", "attn_strange"): value for name, value in arrays.items()}
    refused("E-BASE", gguf(tmp_path / "o", odd), "attn_strange", base=base)


def test_gguf_refusals(tmp_path):
    arrays = {"blk.0.attn_v.weight.lora_a": floats(2, 5), "blk.0.attn_v.weight.lora_b": floats(6, 2)}
    refused("E-NOT-LORA", gguf(tmp_path / "1", arrays, general__type="model"), "a model")
    refused("E-NOT-LORA", gguf(tmp_path / "2", arrays, adapter__type="control_vector"), "control_vector")
    refused("E-LORA-FEATURE", gguf(tmp_path / "3", arrays, adapter__alora__invocation_tokens=[1, 2]), "invocation")
    refused("E-CONFIG", gguf(tmp_path / "4", arrays, adapter__lora__alpha=3), "adapter.lora.alpha is 3")
    refused("E-CONFIG", gguf(tmp_path / "5", arrays, adapter__lora__alpha=math.inf), "adapter.lora.alpha is inf")
    refused("E-TENSOR", gguf(tmp_path / "6", {**arrays, "blk.0.attn_v.bias": floats(6)}), "attn_v.bias")
    refused("E-PAIR", gguf(tmp_path / "7", {"blk.0.attn_v.weight.lora_a": floats(2, 5)}), "not one lora_b")
    normed = load(gguf(tmp_path / "8", {**arrays, "blk.0.attn_norm.weight": floats(6)}))
    assert any("1 norms are left out" in line for line in normed.warnings)
    long = load(gguf(tmp_path / "9", arrays, tokenizer__ids=list(range(9000))))
    assert len(long.targets) == 1
    data = bytearray((tmp_path / "8" / "x.gguf").read_bytes())
    data[4:8] = struct.pack(">I", 3)
    refused("E-VER", put(tmp_path / "big", {"x.gguf": bytes(data)}), "big endian")


def test_a_gguf_that_claims_much_is_read_little(tmp_path, monkeypatch):
    """Counts and lengths beyond the file cost one read of its head."""
    good, spots = gguf_file(*layouts.gguf_parts([known("blk.0.attn_v")]))
    fetched = []
    original = gguf_file_reader.pread
    monkeypatch.setattr(
        gguf_file_reader, "pread", lambda fd, n, at, path: fetched.append(n) or original(fd, n, at, path)
    )
    for spot in spots:
        if not spot.kind.startswith(("count", "length")):
            continue
        for value in (2**31, 2 ** (8 * struct.calcsize(spot.form)) - 1):
            bad = bytearray(good)
            struct.pack_into(spot.form, bad, spot.at, value)
            path = put(tmp_path / "x", {"x.gguf": bytes(bad)}) / "x.gguf"
            fetched.clear()
            with pytest.raises(errors.LrcError):
                load(path)
            assert sum(fetched) <= len(good), (spot, value)


# --- LoRA-ViT -------------------------------------------------------------------------------------------------------


def vit_pairs(blocks: int) -> list[layouts.Known]:
    return [layouts.Known(str(n), floats(2, 8, seed=n), floats(8, 2, seed=100 + n), 1.0) for n in range(2 * blocks)]


def test_lora_vit_on_fused_and_on_separate_layers(tmp_path):
    """Sam_LoRA: the first third of qkv gets the query's update, the last the value's; block 10 comes after block 9."""
    pairs = vit_pairs(11)
    folder = put(tmp_path / "x", layouts.lora_vit(pairs))
    stem = "image_encoder.blocks"
    fused = make_base(tmp_path / "fused", {f"{stem}.{n}.attn.qkv.weight": (24, 8) for n in range(11)}, {})
    lora = load(folder, ReadOptions(base=fused))
    deltas = {}
    for pair in lora.targets:
        start, stop = map(int, pair.target.view.text.split(":")[1:])
        deltas.setdefault(pair.target.name, np.zeros((24, 8)))[start:stop] += dense(pair)
    for n in range(11):
        q, v = (k.b.astype(float) @ k.a.astype(float) for k in pairs[2 * n : 2 * n + 2])
        np.testing.assert_array_equal(deltas[f"{stem}.{n}.attn.qkv.weight"], np.concatenate([q, np.zeros((8, 8)), v]))
    apart = {f"transformer.blocks.{n}.attn.proj_{w}.weight": (8, 8) for n in range(11) for w in "qkv"}
    separate = load(folder, ReadOptions(base=make_base(tmp_path / "apart", apart, {})))
    wanted = {f"transformer.blocks.{n}.attn.proj_{w}.weight": pairs[2 * n + i]
              for n in range(11) for i, w in enumerate("qv")}  # fmt: skip
    check(separate, wanted, 1.0)
    shorter = make_base(tmp_path / "short", {f"{stem}.{n}.attn.qkv.weight": (24, 8) for n in range(10)}, {})
    refused("E-BASE", folder, "of 11 blocks, the base has 10", base=shorter)
    refused("E-BASE", folder, "the base has 0", base=make_base(tmp_path / "none", {"x.weight": (2, 2)}, {}))


def test_lora_vit_orientation_and_heads(tmp_path):
    square = [layouts.Known(str(n), floats(4, 4), floats(4, 4), 1.0) for n in range(2)]
    refused("E-ORIENT", put(tmp_path / "s", layouts.lora_vit(square)), "square")
    odd = [layouts.Known("0", floats(2, 8), floats(8, 3), 1.0)]
    refused("E-PAIR", put(tmp_path / "o", layouts.lora_vit(odd)), "do not fit")
    arrays = {"w_a_000": floats(2, 8), "w_b_000": floats(8, 2), "fc_8in_3out": floats(3, 8)}
    (head,) = load(stored(tmp_path / "h", arrays)).extras
    assert (head.name, head.shape) == ("head.weight", (3, 8))
    gap = {"w_a_001": floats(2, 8), "w_b_001": floats(8, 2)}
    refused("E-PAIR", stored(tmp_path / "g", gap), "gaps")
    wrong = {**arrays, "fc_8in_3out": floats(4, 8)}
    refused("E-PAIR", stored(tmp_path / "w", wrong), "its name")


# --- NOLA -----------------------------------------------------------------------------------------------------------


def nola_layer(inner: int, out: int, rank: int, alpha: np.ndarray, beta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(update (out, in), the ten stored numbers) as NOLA2 computes them."""
    torch.manual_seed(0)
    a = torch.nn.init.kaiming_uniform_(torch.zeros(len(alpha), inner, rank), a=math.sqrt(5)).numpy()
    b = torch.nn.init.kaiming_uniform_(torch.zeros(len(beta), rank, out), a=math.sqrt(5)).numpy()
    left = np.einsum("k,kir->ir", alpha.astype(float), a.astype(float))
    right = np.einsum("k,kro->ro", beta.astype(float), b.astype(float))
    return (left @ right).T / rank, a[0, :10, 0]


@pytest.mark.parametrize("rank", [1, 3])
def test_nola_bases_are_made_again(rank, tmp_path):
    sizes = {"fc1": (12, 20), "fc2": (20, 12)}
    arrays: dict[str, np.ndarray] = {"fc_12in_4out": floats(4, 12)}
    wanted, shapes = {}, {}
    for block in range(2):
        for layer, (inner, out) in sizes.items():
            alpha, beta = floats(5, seed=block), floats(7, seed=block + 9)
            update, first = nola_layer(inner, out, rank, alpha, beta)
            wanted[f"blocks.{block}.mlp.{layer}.weight"] = update
            shapes[f"blocks.{block}.mlp.{layer}.weight"] = (out, inner)
            arrays |= {f"{layer}_alpha_{block:03d}": alpha, f"{layer}_beta_{block:03d}": beta}
            if layer == "fc1":
                arrays[f"fc1_A_{block:03d}"] = first.astype("<f4")
    folder = stored(tmp_path / "x", arrays)
    base = make_base(tmp_path / "base", shapes, {})
    before = torch.random.get_rng_state()
    lora = load(folder, ReadOptions(base=base))
    assert torch.equal(before, torch.random.get_rng_state())
    assert [p.target.name for p in lora.targets] == sorted(wanted) and {p.rank for p in lora.targets} == {rank}
    for pair in lora.targets:
        np.testing.assert_allclose(dense(pair), wanted[pair.target.name], rtol=1e-12, atol=1e-15)
    assert [e.name for e in lora.extras] == ["head.weight"]
    refused("E-BASE", folder, "how wide")
    other = {**arrays, "fc1_A_001": np.nextafter(arrays["fc1_A_001"], np.float32(1))}
    refused("E-DIGEST", stored(tmp_path / "o", other), "another way", base=base)
    bare = {name: value for name, value in arrays.items() if "_A_" not in name}
    refused("E-DIGEST", stored(tmp_path / "b", bare), "no numbers", base=base)
    half = {name: value for name, value in arrays.items() if name != "fc2_beta_001"}
    refused("E-PAIR", stored(tmp_path / "h", half), "alpha and beta", base=base)


def test_nola_of_a_language_model_is_refused_in_a_peft_folder(tmp_path):
    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_A"
    arrays = {f"{stem}.weight": floats(2, 4), f"{stem}.seed": np.ones(1, "<i8"), f"{stem}.coefficients": floats(3)}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    files = {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": safetensors_file(arrays)}
    refused("E-NOT-LORA", put(tmp_path / "x", files), "how many processors")


# --- SBoRA ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sbora_fa", "sbora_fb"])
@pytest.mark.parametrize("pickle", [True, False])
def test_sbora(kind, pickle, tmp_path):
    """delta_W[:, I] = s B, or delta_W[I, :] = s A."""
    out, inner, stem = 32, 64, "model.layers.1.self_attn.k_proj"
    full = f"base_model.model.{stem}"
    wanted = np.zeros((out, inner))
    if kind == "sbora_fa":
        index, factor = np.array([50, 3, 7]), floats(out, 3)
        arrays = {f"{full}.lora_A": index.astype("<i8"), f"{full}.lora_B.weight": factor}
        wanted[:, index] = 2 * factor.astype(float)
    else:
        index, factor = np.array([30, 3, 7]), floats(3, inner)
        arrays = {f"{full}.lora_B": index.astype("<i8"), f"{full}.lora_A.weight": factor}
        wanted[index] = 2 * factor.astype(float)
    config: dict[str, Any] = {"peft_type": "SBORA", "adapter_name": kind, "r": 3, "lora_alpha": 6, "bias": "none",
                              "target_modules": ["k_proj"], "lora_dropout": 0.05}  # fmt: skip
    folder = put(tmp_path / "x", {"adapter_config.json": json.dumps(config).encode()})

    def write(values: dict[str, np.ndarray]) -> None:
        if pickle:
            torch.save({n: torch.from_numpy(v.copy()) for n, v in values.items()}, folder / "adapter_model.bin")
        else:
            put(folder, {"adapter_model.safetensors": safetensors_file(values)})

    write(arrays)
    options = {"base": LLAMA, "allow_pickle": pickle}
    (pair,) = load(folder, ReadOptions(**options)).targets
    assert pair.target.name == f"{stem}.weight" and pair.target.shape == (out, inner)
    np.testing.assert_array_equal(dense(pair), wanted)
    refused("E-BASE", folder, "does not say how many", allow_pickle=pickle)
    numbers = next(name for name, value in arrays.items() if value.dtype.kind == "i")
    for bad in ([64, 3, 7], [-1, 3, 7], [3, 3, 7]):
        write({**arrays, numbers: np.array(bad, "<i8")})
        refused("E-INDEX", folder, "outside of", **options)
    write(arrays)
    (folder / "adapter_config.json").write_text(json.dumps({**config, "adapter_name": "sbora"}))
    refused("E-CONFIG", folder, "sbora_fa or sbora_fb", **options)
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_new": True}))
    refused("E-LORA-FEATURE", folder, "use_new", **options)


# --- the programs themselves ----------------------------------------------------------------------------------------


def environment(peer: str) -> Path:
    folder = make.environment(peer)
    if folder is None:
        pytest.skip(f"the peer {peer} has no environment: python tests/peers/make.py {peer}")
    return folder / "lib"


@pytest.mark.slow
@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("name", ["llama-plain", "llama-lmhead"])
def test_what_llama_cpp_converts_is_the_peft_adapter(name, outtype, tmp_path):
    """convert_lora_to_gguf.py on a PEFT folder; read back on its base it is that adapter, but for a narrower dtype."""
    lib = environment("llamacpp")
    out = tmp_path / "adapter.gguf"
    command = [sys.executable, str(lib / "convert_lora_to_gguf.py"), "--base", str(LLAMA), "--outtype", outtype]
    paths = {"PYTHONPATH": f"{lib}:{lib / 'gguf-py'}", "PATH": ""}
    subprocess.run([*command, "--outfile", str(out), str(ADAPTERS / name)], check=True, capture_output=True, env=paths)
    ours, theirs = load(out, ReadOptions(base=LLAMA)), api.load_lora(ADAPTERS / name)
    assert [p.target for p in ours.targets] == [p.target for p in theirs.targets]
    for one, two in zip(ours.targets, theirs.targets, strict=True):
        if outtype == "f32":
            assert (one.a, one.b, one.scale) == (two.a, two.b, two.scale)
        bound = {"f32": 0, "f16": 2**-10, "bf16": 2**-7, "q8_0": 2**-5}[outtype] * np.linalg.norm(dense(two))
        assert np.linalg.norm(dense(one) - dense(two)) <= bound


MLX = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model
model, config = load_model(Path(sys.argv[2]))
before = {n: np.array(v.astype(mx.float32)) for n, v in tree_flatten(model.parameters())}
settings = {"rank": 3, "scale": 7.0, "dropout": 0.0}
model.freeze()
linear_to_lora_layers(model, 1, settings)
mx.random.seed(1)
new = [(n, mx.random.normal(v.shape)) for n, v in tree_flatten(model.trainable_parameters())]
model.load_weights(new, strict=False)
out = Path(sys.argv[3])
mx.save_safetensors(str(out / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
mx.savez(str(out / "adapters.npz"), **{n: v.astype(mx.bfloat16) for n, v in tree_flatten(model.trainable_parameters())})
config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": settings, "model": "org/base"}
(out / "adapter_config.json").write_text(json.dumps(config))
fused = [(n, m.fuse()) for n, m in model.named_modules() if hasattr(m, "fuse")]
deltas = {n: np.array(m.weight) - before[n + ".weight"] for n, m in fused}
np.savez(out / "deltas.npz", **deltas)
"""


@pytest.mark.slow
def test_what_mlx_lm_saves_and_fuses_is_read(tmp_path):
    """mlx-lm's own layers, saved by mlx as safetensors and npz: the update is what it fuses."""
    lib = environment("mlx")
    put(tmp_path, {})
    subprocess.run([sys.executable, "-c", MLX, str(lib), str(LLAMA), str(tmp_path)], check=True, capture_output=True)
    with np.load(tmp_path / "deltas.npz") as stored:
        deltas = dict(stored)
    (tmp_path / "deltas.npz").unlink()
    lora = load(tmp_path, ReadOptions(base=LLAMA))
    assert {p.target.name.removesuffix(".weight") for p in lora.targets} == set(deltas) and len(deltas) > 1
    for pair in lora.targets:
        np.testing.assert_allclose(dense(pair), deltas[pair.target.name.removesuffix(".weight")], rtol=0, atol=2e-5)
    (tmp_path / "adapters.safetensors").unlink()
    narrow = load(tmp_path, ReadOptions(base=LLAMA))
    assert {p.a.dtype for p in narrow.targets} == {"BF16"}
    for one, two in zip(narrow.targets, lora.targets, strict=True):
        assert np.linalg.norm(one.A - two.A) < 2**-7 * np.linalg.norm(two.A)


def test_the_real_mlx_adapter_on_a_base_of_its_shape(tmp_path):
    """mlx_cli adapts the last four of the 24 layers of Qwen2.5-0.5B, whose configuration resolves its names."""
    config = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896,
              "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
              "intermediate_size": 4864, "vocab_size": 1000}  # fmt: skip
    base = put(tmp_path / "base", {"config.json": json.dumps(config).encode()})
    lora = load(asset("adapters/mlx_cli"), ReadOptions(base=base))
    assert len(lora.targets) == 8 and list(lora.warnings) == [
        "lora_parameters.alpha (16) has no meaning in mlx-lm; the scale 10 is used"
    ]


def test_every_layout_of_one_adapter_merges_to_the_same_bytes(tmp_path):
    """A PEFT adapter, written as MLX, GGUF, raw and kohya, and merged by each file into the base."""
    lora = api.load_lora(ADAPTERS / "llama-plain")
    pairs = [
        layouts.Known(p.target.name.removesuffix(".weight"), p.A.astype("<f4"), p.B.astype("<f4"), p.scale * p.rank)
        for p in lora.targets
    ]
    assert len({(k.rank, k.alpha) for k in pairs}) == 1
    gguf_names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
                  "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
                  "mlp.down_proj": "ffn_down"}  # fmt: skip
    rows = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}
    blocks = []
    for k in pairs:
        _, _, block, leaf = k.module.split(".", 3)
        b = permuted(k.b, rows[leaf]) if leaf in rows else k.b
        blocks.append(layouts.Known(f"blk.{block}.{gguf_names[leaf]}", k.a, np.ascontiguousarray(b), k.alpha))
    written = {
        "mlx": layouts.mlx(pairs),
        "gguf": layouts.gguf(blocks),
        "raw": layouts.raw(pairs),
        "kohya": layouts.kohya(pairs, "lora_te"),
    }

    def merged(name: str, adapter: Any) -> dict[str, bytes]:
        api.merge(LLAMA, adapter, tmp_path / f"{name}-merged", undo=False)
        return {p.name: p.read_bytes() for p in sorted((tmp_path / f"{name}-merged").glob("*.safetensors"))}

    wanted = merged("peft", ADAPTERS / "llama-plain")
    assert wanted != {p.name: p.read_bytes() for p in sorted(LLAMA.glob("*.safetensors"))}
    for name, files in written.items():
        folder = put(tmp_path / name, files)
        options = {"alpha": pairs[0].alpha} if name == "raw" else {}
        adapter = api.load_lora(folder, base=LLAMA, **options) if options else folder
        assert merged(name, adapter) == wanted, name
