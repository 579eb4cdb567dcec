"""What is exported, loaded by the programs that it is for. A peer without an environment is skipped by name: see
tests/peers/README.md."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ADAPTERS, BASES
from models import auto, one_target
from peers import oracle

from lrconvert import api
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter, Target, View
from lrconvert.methods import base as methods

pytestmark = pytest.mark.slow


def made(*targets: Target) -> CompactAdapter:
    """Targets of different ranks, of 8 bits."""
    pairs = sorted((one_target(t, rank=2 + n % 3, seed=n) for n, t in enumerate(targets)), key=lambda p: p.target)
    return api.convert(LoraAdapter(tuple(pairs)), "lowrank", bits=8).compact


def converted(name: str) -> CompactAdapter:
    return api.convert(api.load_lora(ADAPTERS / name), "lowrank", bits=8).compact


def updates(compact: CompactAdapter) -> dict[str, np.ndarray]:
    """What is added to each module's weight, in its stored shape."""
    deltas = {}
    for target, a, b in methods.expand_all(compact):
        delta = b.astype(np.float64) @ a
        stored = delta.T if target.view.kind == "transposed" else delta.reshape(target.shape)
        deltas[target.name.removesuffix(".weight")] = stored
    return deltas


def ask(peer: str, jobs: Mapping[str, tuple[Path, dict[str, Any]]], base: Path = oracle.BASE) -> dict[str, Any]:
    """What a peer answers to each job, in one process, since starting it is what takes long."""
    answers = dict(zip(jobs, oracle.ask(peer, list(jobs.values()), base), strict=True))
    refused = {name: answer["why"] for name, answer in answers.items() if answer["outcome"] != "loads"}
    assert not refused, refused
    return answers


def same(case: str, theirs: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> None:
    assert set(theirs) == set(wanted), case
    for name, delta in wanted.items():
        assert theirs[name].shape == delta.shape, (case, name)
        assert np.abs(theirs[name] - delta).max() <= 1e-5 * np.abs(delta).max(), (case, name)


def tensors(path: Path) -> dict[str, np.ndarray]:
    return dict(np.load(path))


# --- diffusers ------------------------------------------------------------------------------------------------------

BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
CONV3, CONV1 = View("conv:3x3:1"), View("conv:1x1:1")
UNET = (
    Target(f"unet.{BLOCK}.attn1.to_q.weight", (64, 64)),
    Target(f"unet.{BLOCK}.attn2.to_k.weight", (64, 32)),
    Target(f"unet.{BLOCK}.attn1.to_out.0.weight", (64, 64)),
    Target(f"unet.{BLOCK}.ff.net.0.proj.weight", (512, 64)),
    Target(f"unet.{BLOCK}.ff.net.2.weight", (64, 256)),
    Target("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight", (64, 32)),
    Target("unet.up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_v.weight", (64, 64)),
)
CONVOLUTIONS = (
    Target("unet.down_blocks.0.resnets.0.conv1.weight", (32, 32, 3, 3), CONV3),
    Target("unet.down_blocks.1.attentions.0.proj_in.weight", (64, 64, 1, 1), CONV1),
)
TEXT = (
    Target("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.weight", (32, 32)),
    Target("text_encoder.text_model.encoder.layers.1.self_attn.out_proj.weight", (32, 32)),
    Target("text_encoder.text_model.encoder.layers.1.mlp.fc1.weight", (48, 32)),
)
FLUX = (
    Target("transformer.transformer_blocks.0.attn.to_q.weight", (32, 32)),
    Target("transformer.transformer_blocks.0.attn.to_out.0.weight", (32, 32)),
    Target("transformer.single_transformer_blocks.0.attn.to_v.weight", (32, 32)),
)
XL = (
    Target("text_encoder.text_model.encoder.layers.0.self_attn.out_proj.weight", (32, 32)),
    Target("text_encoder_2.text_model.encoder.layers.1.self_attn.out_proj.weight", (32, 32)),
    Target(f"unet.{BLOCK}.attn1.to_q.weight", (64, 64)),
    Target("unet.down_blocks.2.attentions.1.transformer_blocks.1.attn2.to_k.weight", (96, 64)),
    Target("unet.down_blocks.1.resnets.0.conv1.weight", (64, 32, 3, 3), CONV3),
    Target("unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.weight", (768, 96)),
    Target("unet.up_blocks.0.attentions.2.proj_in.weight", (96, 96)),
    Target("unet.up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_out.0.weight", (64, 64)),
)
XL_UNET = {
    "_class_name": "UNet2DConditionModel",
    "addition_embed_type": "text_time",
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
}
WEIGHTS = {"diffusers": "pytorch_lora_weights.safetensors", "kohya": "lora.safetensors"}
WEIGHTS |= {"onetrainer": "lora.safetensors"}


def test_diffusers_loads_every_layer(tmp_path: Path) -> None:
    oracle.needed("diffusers")
    jobs, compacts = {}, {}
    base = tmp_path / "base"  # says that the names of SDXL are Stability AI's in kohya's layout
    base.mkdir()
    (base / "config.json").write_text(json.dumps(XL_UNET))
    models = {"sd": UNET + CONVOLUTIONS + TEXT, "sdxl": XL, "flux": FLUX}
    for (model, targets), layout, keep in product(models.items(), WEIGHTS, (False, True)):
        if layout == ("kohya" if model == "flux" else "onetrainer"):
            continue  # kohya's FLUX has one layer for several; at its real width, which diffusers asks, in tests/peers
        case = f"{model}-{layout}-{keep}"
        compacts[case] = made(*targets)
        api.export(compacts[case], tmp_path / case, to=layout, keep_ranks=keep, base=base if model == "sdxl" else None)
        out = str(tmp_path / f"{case}.npz")
        jobs[case] = tmp_path / case, {"model": model, "file": WEIGHTS[layout], "out": out}
    for case, answer in ask("diffusers", jobs).items():
        messages = [line for line in answer["said"] if "NoneType" not in line]  # components that are not there
        assert not [line for line in messages if re.search("unexpected|missing", line)], (case, messages)
        # transformers leaves the level text_model out of CLIP's modules, but not of those with a projection.
        wanted, theirs = (
            {name.replace("text_model.", ""): delta for name, delta in deltas.items()}
            for deltas in (updates(compacts[case]), tensors(tmp_path / f"{case}.npz"))
        )
        same(case, theirs, wanted)


# --- mlx-lm ---------------------------------------------------------------------------------------------------------


def test_mlx_loads_every_layer(tmp_path: Path) -> None:
    """Layers, embedding and head of a Llama, and GPT-2, whose names and orientation differ."""
    oracle.needed("mlx")
    config = json.loads((BASES / "tiny-llama" / "config.json").read_text())
    vocabulary, width = config["vocab_size"], config["hidden_size"]
    whole = made(
        Target("model.embed_tokens.weight", (vocabulary, width), View("transposed")),
        Target("lm_head.weight", (vocabulary, width)),
        Target("model.layers.1.self_attn.o_proj.weight", (width, width)),
    )
    compacts = {name: converted(name) for name in ("llama-plain", "llama-patterns", "gpt2-conv1d")} | {"whole": whole}
    jobs: dict[str, tuple[Path, dict[str, Any]]] = {}
    for case, compact in compacts.items():
        api.export(compact, tmp_path / case, to="mlx")
        jobs[case] = tmp_path / case, {"out": str(tmp_path / f"{case}.npz")}
        assert not api.check(tmp_path / case, ("mlx",))
    gpt2 = shutil.copytree(BASES / "tiny-gpt2-hub", tmp_path / "gpt2")
    config = json.loads((gpt2 / "config.json").read_text())
    (gpt2 / "config.json").write_text(json.dumps({**config, "n_ctx": config["n_positions"]}))
    jobs["gpt2-conv1d"][1]["base"] = str(gpt2)
    ask("mlx", jobs)
    for case, compact in compacts.items():
        wanted = updates(compact)
        if case == "gpt2-conv1d":
            wanted = {name.replace("transformer.", "model."): delta.T for name, delta in wanted.items()}
        if case == "whole":
            wanted["model.embed_tokens"] = wanted["model.embed_tokens"].T
        same(case, tensors(tmp_path / f"{case}.npz"), wanted)


# --- llama.cpp ------------------------------------------------------------------------------------------------------


def test_our_gguf_is_that_of_llamacpp(tmp_path: Path) -> None:
    """Tensor by tensor, bit by bit, with the same scale; every family of models is in test_gguf_names.py."""
    oracle.needed("llamacpp")
    compact, base = converted("llama-patterns"), BASES / "tiny-llama"
    api.export(compact, tmp_path / "peft", to="peft-lora")
    jobs = {}
    for dtype in ("F32", "F16"):
        api.export(compact, tmp_path / dtype, to="gguf", base=base, dtype=dtype)
        options = {"base": str(base), "outtype": dtype.lower()}
        written = str(tmp_path / dtype / "adapter.gguf")
        jobs[f"{dtype} 1"] = tmp_path / "peft", {**options, "out": str(tmp_path / f"{dtype} 1.npz")}
        jobs[f"{dtype} 2"] = tmp_path, {**options, "out": str(tmp_path / f"{dtype} 2.npz"), "written": written}
    answers = ask("llamacpp", jobs)
    for dtype in ("F32", "F16"):
        theirs, ours = (tensors(tmp_path / f"{dtype} {n}.npz") for n in (1, 2))
        assert set(ours) == set(theirs) and len(ours) == 2 * len(compact.targets)
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
        one, two = (answers[f"{dtype} {n}"]["fields"] for n in (1, 2))
        assert [two[key] for key in oracle.GGUF_FIELDS] == [one[key] for key in oracle.GGUF_FIELDS]
    norms = {name: float(np.linalg.norm(delta)) for name, delta in updates(compact).items()}
    assert answers["F32 1"]["norms"] == pytest.approx(norms, rel=1e-5)
    assert answers["F32 2"]["norms"] == pytest.approx(norms, rel=1e-5)


def test_what_llamacpps_converter_cannot_do(tmp_path: Path) -> None:
    """Own ranks with one scale (alpha = 0 stands for 1), and GPT-2 with its factors not swapped."""
    oracle.needed("llamacpp")
    own = made(
        Target("model.layers.0.self_attn.o_proj.weight", (48, 48)),
        Target("model.layers.1.self_attn.v_proj.weight", (24, 48)),
    )
    gpt2 = converted("gpt2-conv1d")
    api.export(own, tmp_path / "own", to="gguf", base=BASES / "tiny-llama", keep_ranks=True)
    api.export(gpt2, tmp_path / "gpt2", to="gguf", base=BASES / "tiny-gpt2")
    jobs = {
        name: (tmp_path, {"written": str(tmp_path / name / "adapter.gguf"), "out": str(tmp_path / f"{name}.npz")})
        for name in ("own", "gpt2")
    }
    answers = ask("llamacpp", jobs)
    norms = {name: float(np.linalg.norm(delta)) for name, delta in updates(own).items()}
    assert answers["own"]["norms"] == pytest.approx(norms, rel=1e-6)
    assert answers["gpt2"]["shapes"]["blk.0.attn_qkv"] == [144, 48]
    stored = tensors(tmp_path / "gpt2.npz")
    a, b = (stored[f"blk.0.attn_qkv.weight.lora_{half}:F32"].astype(np.float64) for half in "ab")
    same("gpt2", {"": b @ a}, {"": updates(gpt2)["transformer.h.0.attn.c_attn"].T})


# --- vLLM -----------------------------------------------------------------------------------------------------------


def test_vllm_takes_padded_ranks(tmp_path: Path) -> None:
    """What the note after an export says of --max-lora-rank is what PEFTHelper asks for."""
    oracle.needed("vllm")
    compact = converted("llama-plain")
    norms = {name: float(np.linalg.norm(delta)) for name, delta in updates(compact).items()}
    loads = {None: {16, 32, 64}, 16: {16, 32, 64}, 20: {32, 64}, 64: {64}}
    jobs: list[tuple[Path, dict[str, Any]]] = []
    for rank, limits in loads.items():
        folder = tmp_path / f"r{rank}"
        notes = " ".join(api.export(compact, folder, to="peft-lora", pad_rank=rank).notes)
        assert (f"--max-lora-rank {min(limits)}" in notes) == ("--max-lora-rank" in notes) == (min(limits) > 16)
        jobs += [(folder, {"max_lora_rank": limit}) for limit in (16, 32, 64)]
    answers = oracle.ask("vllm", jobs)
    for (folder, options), answer in zip(jobs, answers, strict=True):
        rank = int(folder.name[1:]) if folder.name != "rNone" else None
        assert (answer["outcome"] == "loads") == (options["max_lora_rank"] in loads[rank]), (folder.name, options)
        assert answer["outcome"] == "refuses" or answer["norms"] == pytest.approx(norms, rel=1e-5)


# --- loralib --------------------------------------------------------------------------------------------------------


def test_loralib_merges_our_updates(tmp_path: Path) -> None:
    oracle.needed("loralib")
    compact = made(
        Target("encoder.q.weight", (24, 16)),
        Target("encoder.c_attn.weight", (16, 48), View("transposed")),
        Target("embed.weight", (40, 12), View("transposed")),
    )
    layers = {"encoder.q": ("linear", 24, 16), "encoder.c_attn": ("transposed", 48, 16), "embed": ("embedding", 12, 40)}
    jobs = {}
    for rank in (None, 7):
        api.export(compact, tmp_path / f"r{rank}", to="raw", pad_rank=rank)
        jobs[f"r{rank}"] = tmp_path / f"r{rank}", {"layers": layers, "out": str(tmp_path / f"r{rank}.npz")}
    for case in ask("loralib", jobs):
        same(case, tensors(tmp_path / f"{case}.npz"), updates(compact))


# --- onnxruntime-genai ----------------------------------------------------------------------------------------------


def test_onnxruntime_computes_as_peft_does(tmp_path: Path) -> None:
    """Its model builder puts a PEFT folder into the graph of a base; every module has another rank before padding."""
    import peft
    import torch

    oracle.needed("onnxruntime")
    base, tokens, out = BASES / "tiny-llama", [5, 17, 42, 8, 90, 33], tmp_path / "logits.npy"
    api.export(converted("llama-patterns"), tmp_path / "peft", to="peft-lora", base=base)
    ask("onnxruntime", {"": (tmp_path / "peft", {"tokens": tokens, "out": str(out)})}, base)
    model = auto("CausalLM").from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, str(tmp_path / "peft")).eval()
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([tokens])).logits[0].numpy()
    np.testing.assert_allclose(np.load(out), wanted, atol=1e-4)
