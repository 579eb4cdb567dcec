"""What is no adapter, or one that is not read: every refusal says what the thing is and what to do about it, in one
line with a stable code. One small input for each."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save, save_file

from lrconvert import api
from lrconvert.core import errors
from lrconvert.core.errors import LrcError

MODULE = "lora_unet_x_attn_to_q"
GGLA = (1, 8, 16)  # version, r, alpha


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def pair(**parts: Any) -> dict[str, np.ndarray]:
    own = {"lora_down.weight": floats(4, 8), "lora_up.weight": floats(16, 4), **parts}
    return {f"{MODULE}.{name}": np.asarray(value) for name, value in own.items() if value is not None}


def named(**metadata: str) -> Callable[[Path], Path]:
    tensors = {"unet.a.to_q.lora_A.weight": floats(4, 8), "unet.a.to_q.lora_B.weight": floats(16, 4)}
    return stored(tensors, **metadata)


def stored(tensors: dict[str, np.ndarray], **metadata: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        save_file(tensors, folder / "x.safetensors", metadata or None)
        return folder / "x.safetensors"

    return write


def holding(name: str, data: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return write


def one(name: str, *shape: int) -> Callable[[Path], Path]:
    return stored({name: floats(*(shape or (4, 8)))})


def settings(**fields: Any) -> str:
    return json.dumps({f"unet.{key}": value for key, value in fields.items()})


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n"
# name: (what writes it, code, words of what it is, words of what to do)
REFUSALS: dict[str, tuple[Callable[[Path], Path], str, str, str]] = {
    # files that are something else
    "ggla": (holding("ggml-adapter-model.bin", struct.pack("<Iiii", 0x67676C61, *GGLA)), "E-LAYOUT",
             "ggla, version 1, of rank 8 and alpha 16", "export that to gguf"),
    "ggla of the other order": (holding("x.bin", b"ggla" + struct.pack(">iii", *GGLA)), "E-LAYOUT",
                                "ggla, version 1, of rank 8 and alpha 16", "gguf"),
    "ggla that is cut off": (holding("adapter", b"algg"), "E-LAYOUT", "(ggla)", "gguf"),
    "model of old": (holding("x.bin", b"tjgg" + bytes(9)), "E-LAYOUT", "model of llama.cpp", "give the LoRA"),
    "pointer of Git": (holding("x.safetensors", LFS), "E-LAYOUT", "pointer of Git LFS", "git lfs pull"),
    "pointer of Git for a pickle": (holding("x.bin", LFS), "E-LAYOUT", "pointer of Git LFS", "git lfs pull"),
    "web page": (holding("x.safetensors", b"<!DOCTYPE html><html>"), "E-LAYOUT", "web page", "log in"),
    "store's error": (holding("x.safetensors", b"<?xml version='1.0'?><Error>"), "E-LAYOUT", "XML", "get the file"),
    "picture": (holding("x.png", b"\x89PNG\r\n\x1a\n" + bytes(9)), "E-LAYOUT", "picture", "give the LoRA"),
    "archive": (holding("x.tar.gz", b"\x1f\x8b" + bytes(9)), "E-LAYOUT", "archive (gzip)", "unpack"),
    "Keras": (holding("x.h5", b"\x89HDF\r\n\x1a\n" + bytes(9)), "E-LAYOUT", "HDF5", "safetensors"),
    "settings": (holding("x.json", b"{}"), "E-LAYOUT", "JSON", "weights"),
    "empty": (holding("x.safetensors", b""), "E-IO-KIND", "shorter than", "cut off"),
    "cut off": (holding("x.safetensors", save(pair())[:200]), "E-OFF-COVER", "the file at 200", "cut off"),
    "pickle by another name": (holding("x.safetensors", b"PK\x03\x04" + b"\xff" * 9), "E-PICKLE", "a zip file", ".pt"),
    "pickle": (holding("x.pt", b"\x80\x02}q\x00."), "E-PICKLE", "can run code", "safetensors"),
    "nothing": (lambda folder: folder / "nothing", "E-LAYOUT", "no such file", "path"),
    "empty folder": (lambda folder: folder, "E-LAYOUT", "no file of weights", "kohya"),
    "names of nobody": (one("some.thing"), "E-LAYOUT", "its 1 tensors are 'some.thing'", "kohya"),
    # weights that are no LoRA
    "model": (one("model.layers.0.self_attn.q_proj.weight"), "E-LAYOUT", "whole weights", "give the LoRA"),
    "checkpoint": (one("model.diffusion_model.input_blocks.0.0.weight"), "E-NOT-LORA", "checkpoint of a", "give"),
    "textual inversion": (one("emb_params", 1, 8), "E-NOT-LORA", "textual inversion", "load_textual_inversion"),
    "hypernetwork": (one("768.0.linear.0.weight"), "E-NOT-LORA", "hypernetwork", "program it is for"),
    "IP-Adapter": (one("ip_adapter.1.to_k_ip.weight"), "E-NOT-LORA", "IP-Adapter", "program it is for"),
    "Control-LoRA": (one("lora_controlnet", 1), "E-NOT-LORA", "Control-LoRA", "ControlNet"),
    "optimizer": (one("state.0.exp_avg"), "E-NOT-LORA", "optimizer", "beside it"),
    "OFT": (one(f"{MODULE}.oft_blocks"), "E-NOT-LORA", "OFT", "merge"),
    "BOFT": (one("m.boft_R"), "E-NOT-LORA", "BOFT", "merge"),
    "GLoRA": (one("m.a1.weight"), "E-NOT-LORA", "GLoRA", "difference"),
    "prompt": (one("prompt_embeddings"), "E-NOT-LORA", "tuned prompt", "nothing to convert"),
    # LoRAs with something wrong in them
    "half a pair": (stored(pair(**{"lora_down.weight": None})), "E-PAIR", "not one lora_down", "export both"),
    "halves that do not fit": (stored(pair(**{"lora_up.weight": floats(16, 5)})), "E-PAIR", "[16, 5]", "one tool"),
    "four dimensions": (stored({f"{MODULE}.lora_down.weight": floats(4, 8, 1, 1, 1, 1),
                                f"{MODULE}.lora_up.weight": floats(16, 4, 1, 1, 1, 1)}),
                        "E-LORA-FEATURE", "4 dimensions", "without this layer"),
    "codes": (stored(pair(**{"lora_down.weight": np.ones((4, 8), np.int8)})), "E-DTYPE", "codes of", "F16"),
    "NaN": (stored(pair(**{"lora_down.weight": floats(4, 8) * np.nan})), "E-VALUE", "NaN", "earlier checkpoint"),
    "alpha of NaN": (stored(pair(alpha=np.float32([np.nan]))), "E-VALUE", "is nan", "alpha of the training"),
    "alpha of zero": (stored(pair(alpha=np.int64(0))), "E-CONFIG", "in two ways", "r for a scale of 1"),
    "alpha of many": (stored(pair(alpha=floats(2))), "E-PAIR", "one number", "save the adapter again"),
    "no alpha": (stored({"h.0.lora_A": floats(4, 8), "h.0.lora_B": floats(16, 4)}), "E-CONFIG", "states alpha",
                 "alpha"),
    "slices": (one(f"{MODULE}.lora_down.0.weight"), "E-LORA-FEATURE", "one slice", "sd-scripts"),
    "strange part": (stored(pair(hello=floats(3))), "E-TENSOR", "no known meaning", "remove it"),
    "magnitudes of another layer": (stored(pair(dora_scale=floats(1, 9))), "E-PAIR", "16 outputs and 8 inputs",
                                    "whole"),
    "metadata that is no JSON": (named(lora_adapter_metadata="{"), "E-CONFIG", "no JSON", "save the LoRA again"),
    "metadata of other ranks": (named(lora_adapter_metadata=settings(r=8, lora_alpha=8)), "E-PAIR", "rank 4", "unet.r"),
    "metadata of a DoRA": (named(lora_adapter_metadata=settings(r=4, lora_alpha=8, use_dora=True)), "E-CONFIG",
                           "has no magnitude", "incomplete"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_it_is_and_what_to_do(name: str, tmp_path: Path) -> None:
    write, code, what, fix = REFUSALS[name]
    with pytest.raises(LrcError) as caught:
        api.load_lora(write(tmp_path))
    error = caught.value
    assert error.code == code and what in error.what and fix in error.fix, (error.code, error.what, error.fix)
    assert str(error).isprintable() and len(error.what) <= 300 and len(error.fix) <= 300


def test_a_length_that_looks_like_a_letter_is_no_text(tmp_path: Path) -> None:
    """Headers of 60 and 123 bytes begin as a page and as JSON do."""
    for length in (60, 123):
        header = json.dumps({"__metadata__": {"a": "b" * (length - 25)}}).replace(": ", ":").encode()
        assert len(header) == length
        (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(errors.LrcError) as caught:
            api.load_lora(tmp_path / "x.safetensors")
        assert "no known adapter layout" in caught.value.what
