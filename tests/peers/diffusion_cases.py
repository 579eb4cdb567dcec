"""LoRAs of tiny diffusion models, as run_diffusers.py makes them: a clean one of each layout, and one defect each, with
what `check` says of it: "severity:rule" by consumer; what is not listed is nothing found."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Tensors = dict[str, np.ndarray]
FILE = "lora.safetensors"
BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
FLAT = "lora_unet_" + BLOCK.replace(".", "_")
QUERY, KEY = f"unet.{BLOCK}.attn1.to_q", f"unet.{BLOCK}.attn2.to_k"
FEED = f"unet.{BLOCK}.ff.net.2"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn"
FLUX = "transformer.transformer_blocks.0.attn"
SHAPES = {QUERY: (64, 64), KEY: (64, 32), FEED: (64, 256), f"{TEXT}.q_proj": (32, 32), f"{TEXT}.out_proj": (32, 32)}
SHAPES |= {f"unet.{BLOCK}.ff.net.0.proj": (512, 64), f"{FLUX}.to_q": (32, 32), f"{FLUX}.to_k": (32, 32)}


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def named(module: str, rank: int = 2, own: str = "", **parts: Any) -> Tensors:
    """A pair under diffusers' names; `own` is another name for the module."""
    out, inner = SHAPES.get(module, (8, 8))
    name = own or module
    pair = {f"{name}.lora_A.weight": numbers(rank, inner), f"{name}.lora_B.weight": numbers(out, rank)}
    return pair | {f"{name}.{part}": np.asarray(value, np.float32) for part, value in parts.items()}


def flat(name: str, shape: tuple[int, int] = (64, 64), rank: int = 2, **parts: Any) -> Tensors:
    """A pair under kohya's names."""
    pair = {f"{name}.lora_down.weight": numbers(rank, shape[1]), f"{name}.lora_up.weight": numbers(shape[0], rank)}
    return pair | {f"{name}.{part}": np.asarray(value, np.float32) for part, value in parts.items()}


def q(**parts: Any) -> Tensors:
    return flat(f"{FLAT}_attn1_to_q", **parts)


def k(**parts: Any) -> Tensors:
    return flat(f"{FLAT}_attn2_to_k", (64, 32), **parts)


def text(name: str, **parts: Any) -> Tensors:
    return flat(f"lora_te_text_model_encoder_layers_0_self_attn_{name}", (32, 32), **parts)


def settings(*modules: str, model: str = "unet", rank: int = 2, alpha: float = 4, **more: Any) -> dict[str, Any]:
    inside = [module.removeprefix(f"{model}.") for module in modules]
    own = {"r": rank, "lora_alpha": alpha, "target_modules": inside, **more}
    return {f"{model}.{key}": value for key, value in own.items()}


@dataclass(frozen=True)
class Case:
    """`scales`: what each module's B @ A is to be multiplied with, by the rules of the tool that wrote the file."""

    name: str
    build: Callable[[], Tensors]
    scales: Mapping[str, float]
    says: Mapping[str, str] = field(default_factory=dict)
    model: str = "sd"
    metadata: Mapping[str, Any] | None = None

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        texts = None if self.metadata is None else {"lora_adapter_metadata": json.dumps(self.metadata)}
        save_file(self.build(), folder / FILE, texts)
        return folder


_NEW = {"comfyui": "wrong:attention"}  # diffusers' own names of a UNet's attention
_BOTH = {QUERY: 1.0, KEY: 1.0}
CASES = [
    # kohya's layout
    Case("kohya", lambda: {**q(alpha=1), **k(alpha=1)}, {QUERY: 0.5, KEY: 0.5}),
    Case("kohya, no alphas", lambda: {**q(), **k()}, _BOTH),
    Case("kohya, ranks differ", lambda: {**q(alpha=1), **k(alpha=1, rank=4)}, {QUERY: 0.5, KEY: 0.25}),
    Case("kohya, text encoder", lambda: {**q(alpha=1), **text("q_proj", alpha=1), **text("out_proj", alpha=1)},
         {QUERY: 0.5, f"{TEXT}.q_proj": 0.5, f"{TEXT}.out_proj": 0.5}),
    Case("kohya, text encoder without out_proj", lambda: {**q(alpha=1), **text("q_proj", alpha=1)},
         {QUERY: 0.5, f"{TEXT}.q_proj": 0.5}, {"diffusers": "refuses:names"}),
    Case("kohya, alphas differ", lambda: {**q(alpha=1), **k(alpha=4)}, {QUERY: 0.5, KEY: 2.0},
         {"diffusers": "wrong:alpha"}),
    Case("kohya, some alphas", lambda: {**q(alpha=1), **k()}, {QUERY: 0.5, KEY: 1.0},
         {"diffusers": "wrong:alpha", "comfyui": "warns:alpha"}),
    Case("kohya, alpha of zero", lambda: {**q(alpha=0)}, {QUERY: 1.0},
         {"diffusers": "wrong:alpha", "comfyui": "wrong:alpha"}),
    Case("kohya, DoRA of outputs", lambda: q(alpha=1, dora_scale=np.ones((64, 1))), {QUERY: np.inf},
         {"diffusers": "wrong:dora", "comfyui": "wrong:dora"}),
    Case("kohya, DoRA of inputs", lambda: q(alpha=1, dora_scale=np.ones((1, 64))), {QUERY: np.inf},
         {"diffusers": "wrong:dora"}),
    Case("kohya, word", lambda: {**q(alpha=1), "bundle_emb.w.clip_l": numbers(1, 32)}, {QUERY: 0.5},
         {"diffusers": "refuses:names", "comfyui": "wrong:embeddings"}),
    Case("kohya, T5", lambda: {**q(), **flat("lora_te3_encoder_block_0_layer_0_SelfAttention_q")}, {QUERY: 1.0},
         {"diffusers": "wrong:names"}),
    Case("kohya, middle factor", lambda: flat(f"{FLAT}_attn1_to_q", **{"lora_mid.weight": np.ones((2, 2, 3, 3))}),
         {QUERY: 1.0}, {"diffusers": "refuses:names"}),
    Case("kohya, middle factor in one dimension",
         lambda: flat(f"{FLAT}_attn1_to_q", **{"lora_mid.weight": np.ones((2, 2, 3))}),
         {QUERY: 1.0}, {"diffusers": "refuses:names", "comfyui": "refuses:conv"}),
    Case("kohya, half of a pair",
         lambda: {n: t for n, t in {**q(), **k()}.items() if n != f"{FLAT}_attn2_to_k.lora_up.weight"}, _BOTH,
         {"diffusers": "refuses:pair"}),
    Case("kohya, other module", lambda: {**q(), **flat("lora_unet_down_blocks_7_attentions_0_proj_in")},
         {QUERY: 1.0, "unet.down_blocks.7.attentions.0.proj_in": 1.0}, {"diffusers": "wrong:modules"}),
    Case("kohya, prefixed twice", lambda: flat("lora_unet_unet_" + BLOCK.replace(".", "_") + "_attn1_to_q"),
         {QUERY: 1.0}, {"diffusers": "refuses:modules", "comfyui": "wrong:names"}),
    Case("kohya and metadata", lambda: q(alpha=1), {QUERY: 0.5}, {"diffusers": "refuses:alpha"},
         metadata=settings(QUERY)),
    # diffusers' layout
    Case("diffusers", lambda: {**named(QUERY), **named(FEED), **named(f"{TEXT}.q_proj")},
         {QUERY: 1.0, FEED: 1.0, f"{TEXT}.q_proj": 1.0}, _NEW),
    Case("diffusers, ranks differ", lambda: {**named(QUERY), **named(KEY, rank=4)}, _BOTH, _NEW),
    Case("diffusers, alpha", lambda: named(QUERY, alpha=1), {QUERY: 0.5}, {"diffusers": "refuses:names", **_NEW}),
    Case("diffusers, other model", lambda: {**named(FEED), **named("prior.x.to_q")}, {FEED: 1.0, "prior.x.to_q": 1.0},
         {"diffusers": "wrong:models", "comfyui": "wrong:names"}),
    Case("diffusers, other module", lambda: {**named(FEED), **named("unet.down_blocks.7.attentions.0.proj_in")},
         {FEED: 1.0, "unet.down_blocks.7.attentions.0.proj_in": 1.0}, {"diffusers": "wrong:modules"}),
    Case("diffusers, no model", lambda: named(FEED, own=FEED.removeprefix("unet.")), {FEED: 1.0},
         {"diffusers": "wrong:names"}),
    Case("diffusers, PEFT's prefix", lambda: named(FEED, own=f"base_model.model.{BLOCK}.ff.net.2"), {FEED: 1.0},
         {"diffusers": "wrong:names", "comfyui": "wrong:names"}),
    Case("diffusers, metadata", lambda: {**named(FEED)}, {FEED: 2.0}, {"comfyui": "wrong:alpha"},
         metadata=settings(FEED)),
    Case("diffusers, metadata of other ranks", lambda: named(FEED), {FEED: np.inf},
         {"diffusers": "refuses:metadata"}, metadata=settings(FEED, rank=8)),
    Case("diffusers, metadata of one model", lambda: {**named(FEED), **named(f"{TEXT}.q_proj")},
         {FEED: 1.0, f"{TEXT}.q_proj": 1.0}, {"diffusers": "refuses:metadata"}, metadata=settings(FEED, alpha=2)),
    Case("diffusers, metadata of the future", lambda: named(FEED), {FEED: 1.0}, {"diffusers": "refuses:metadata"},
         metadata=settings(FEED, alpha=2, unheard_of=1)),
    Case("diffusers, DoRA of a part",
         lambda: {**named(FEED, lora_magnitude_vector=np.ones(64)), **named(f"unet.{BLOCK}.ff.net.0.proj")},
         {FEED: np.inf}, {"diffusers": "wrong:dora", "comfyui": "wrong:dora"}),
    # a transformer
    Case("Flux", lambda: {**named(f"{FLUX}.to_q"), **named(f"{FLUX}.to_k")}, {f"{FLUX}.to_q": 1.0, f"{FLUX}.to_k": 1.0},
         model="flux"),
    Case("Flux, alphas", lambda: {**named(f"{FLUX}.to_q", alpha=1), **named(f"{FLUX}.to_k", alpha=4)},
         {f"{FLUX}.to_q": 0.5, f"{FLUX}.to_k": 2.0}, model="flux"),
    Case("Flux, T5",
         lambda: {**named(f"{FLUX}.to_q"), **named("text_encoder_2.encoder.block.0.layer.0.SelfAttention.q")},
         {f"{FLUX}.to_q": 1.0, "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q": 1.0},
         {"diffusers": "wrong:models", "comfyui": "wrong:names"}, model="flux"),
    Case("Flux, diffusion_model", lambda: named(f"{FLUX}.to_q", own=FLUX.replace("transformer", "diffusion_model", 1)),
         {f"{FLUX}.to_q": 1.0}, {"diffusers": "wrong:names"}, model="flux"),
    Case("Flux, word", lambda: {**named(f"{FLUX}.to_q"), "bundle_emb.w.clip_l": numbers(1, 32)},
         {f"{FLUX}.to_q": 1.0}, {"diffusers": "wrong:names", "comfyui": "wrong:embeddings"}, model="flux"),
    Case("Flux, OneTrainer", lambda: flat("lora_transformer_transformer_blocks_0_attn_to_q", (32, 32), alpha=1),
         {f"{FLUX}.to_q": 0.5}, model="flux"),
    Case("scale of eight bits", lambda: {**named(f"{FLUX}.to_q"), f"{FLUX}.to_q.lora_A.extra": numbers(2)},
         {f"{FLUX}.to_q": 1.0}, {"diffusers": "right", "comfyui": "wrong:parts"}, model="flux"),
]  # fmt: skip
