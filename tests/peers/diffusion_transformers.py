"""What diffusers makes of LoRAs of diffusion transformers, for `run_diffusers`: the modules of tiny models of its
classes, what its converters of foreign LoRAs and of foreign checkpoints return, and what its loaders put on a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.loaders import lora_pipeline, single_file_utils
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "flux1": (diffusers.FluxTransformer2DModel, {
        **_HEADS, "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 24,
        "pooled_projection_dim": 20, "axes_dims_rope": (4, 4, 8), "guidance_embeds": True}),
    "flux2": (diffusers.Flux2Transformer2DModel, {
        **_HEADS, "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 48,
        "timestep_guidance_channels": 24, "axes_dims_rope": (4, 4, 4, 4)}),
    "sd3": (diffusers.SD3Transformer2DModel, {
        "sample_size": 8, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4,
        "joint_attention_dim": 48, "caption_projection_dim": 32, "pooled_projection_dim": 24,
        "dual_attention_layers": (0,), "pos_embed_max_size": 16}),
    "z_image": (diffusers.ZImageTransformer2DModel, {
        "in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
        "cap_feat_dim": 24, "axes_dims": [4, 4, 8], "axes_lens": [16, 16, 16]}),
    "lumina2": (diffusers.Lumina2Transformer2DModel, {
        "sample_size": 8, "in_channels": 4, "hidden_size": 48, "num_layers": 2, "num_refiner_layers": 1,
        "num_attention_heads": 6, "num_kv_heads": 2, "multiple_of": 16, "axes_dim_rope": (4, 2, 2),
        "axes_lens": (16, 16, 16), "cap_feat_dim": 24}),
    "wan": (diffusers.WanVACETransformer3DModel, {
        **_HEADS, "in_channels": 4, "out_channels": 4, "text_dim": 24, "freq_dim": 16, "ffn_dim": 48, "num_layers": 2,
        "vace_layers": [0], "vace_in_channels": 8, "image_dim": 20, "added_kv_proj_dim": 32, "rope_max_seq_len": 32}),
    "hunyuan_video": (diffusers.HunyuanVideoTransformer3DModel, {
        **_HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 2,
        "num_refiner_layers": 1, "text_embed_dim": 24, "pooled_projection_dim": 20, "rope_axes_dim": (4, 6, 6)}),
    "qwen_image": (diffusers.QwenImageTransformer2DModel, {
        **_HEADS, "in_channels": 16, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 24,
        "axes_dims_rope": (4, 6, 6)}),
    "ltx_video": (diffusers.LTXVideoTransformer3DModel, {
        **_HEADS, "in_channels": 8, "out_channels": 8, "cross_attention_dim": 32, "num_layers": 2,
        "caption_channels": 24}),
    "ltx2": (diffusers.LTX2VideoTransformer3DModel, {
        **_HEADS, "in_channels": 8, "out_channels": 8, "cross_attention_dim": 32, "audio_in_channels": 8,
        "audio_out_channels": 8, "audio_num_attention_heads": 2, "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": 16, "num_layers": 2, "caption_channels": 24}),
    "hidream": (diffusers.HiDreamImageTransformer2DModel, {
        "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 2,
        "attention_head_dim": 8, "num_attention_heads": 4, "caption_channels": [24, 20], "text_emb_dim": 16,
        "num_routed_experts": 2, "num_activated_experts": 1, "axes_dims_rope": (4, 2, 2), "max_resolution": (16, 16),
        "llama_layers": [0, 1]}),
    "cogvideox": (diffusers.CogVideoXTransformer3DModel, {
        **_HEADS, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8, "text_embed_dim": 24, "num_layers": 2,
        "sample_width": 8, "sample_height": 8, "sample_frames": 5, "max_text_seq_length": 8}),
}  # fmt: skip
LOADERS = {
    "flux1": "Flux", "flux2": "Flux2", "sd3": "SD3", "z_image": "ZImage", "lumina2": "Lumina2", "wan": "Wan",
    "hunyuan_video": "HunyuanVideo", "qwen_image": "QwenImage", "ltx_video": "LTXVideo", "ltx2": "LTX2",
    "hidream": "HiDreamImage", "cogvideox": "CogVideoX",
}  # fmt: skip
CHECKPOINTS = {
    "sd3": single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
    "z_image": single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers,
    "ltx_video": single_file_utils.convert_ltx_transformer_checkpoint_to_diffusers,
    "wan": single_file_utils.convert_wan_transformer_to_diffusers,
    "hunyuan_video": single_file_utils.convert_hunyuan_video_transformer_to_diffusers,
}
LAYERS = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)


class _Filled(dict[str, Any]):
    """A checkpoint whose other tensors, which converters ask for, are zeros."""

    def pop(self, key: str, *default: Any) -> Any:
        return super().pop(key, *(default or (torch.zeros(6, 2),)))

    def __missing__(self, key: str) -> Any:
        return torch.zeros(6, 2)


def answer(options: dict[str, Any]) -> dict[str, Any]:
    """Return the modules of a family's tiny model ("shapes"), or write the updates of a file by module to "out": what
    diffusers' converter makes of it ("convert"), of whole weights ("checkpoint"), or what its loader attaches
    ("load")."""
    name, what = options["family"], options["what"]
    if what == "shapes":
        model_class, config = MODELS[name]
        with torch.device("meta"):
            modules = model_class(**config).named_modules()
            return {"shapes": {n: list(m.weight.shape) for n, m in modules if isinstance(m, LAYERS)}}
    if what == "checkpoint":
        found = CHECKPOINTS[name](_Filled(load_file(options["file"])))
        updates = {key: value.numpy() for key, value in found.items() if key.endswith(".weight") and value.any()}
    else:
        loader = getattr(lora_pipeline, f"{LOADERS[name]}LoraLoaderMixin")
        file = Path(options["file"])
        state, metadata = loader.lora_state_dict(str(file.parent), weight_name=file.name, return_lora_metadata=True)[
            -2:
        ]
        updates = products(state) if what == "convert" else attached(loader, name, state, metadata)
    np.savez(options["out"], **updates)
    return {}


def probe(width: int) -> Any:
    """Vectors that tell updates of low rank apart: real layers are too wide to compare whole."""
    return np.random.default_rng(width).standard_normal((width, 3))


def products(state: Mapping[str, Any]) -> dict[str, Any]:
    """B @ A of a state dict times a few vectors (see `probe`), by module, and biases."""
    made: dict[str, Any] = {}
    for key, value in state.items():
        module = key.removesuffix(".lora_A.weight")
        if module != key:
            a, b = (half.double().flatten(1).numpy() for half in (value, state[f"{module}.lora_B.weight"]))
            made[module] = b @ (a @ probe(a.shape[1]))
        elif key.endswith(".lora_B.bias"):
            made[key.replace(".lora_B", "")] = value.numpy()
    return made


def attached(loader: Any, name: str, state: Any, metadata: Any) -> dict[str, Any]:
    """What an adapter adds to each layer of a tiny model."""
    torch.manual_seed(0)
    model_class, config = MODELS[name]
    model = model_class(**config)
    more = {"network_alphas": None} if name == "flux1" else {}
    loader.load_lora_into_transformer(state, transformer=model, adapter_name="ours", metadata=metadata, **more)
    return {
        key: module.get_delta_weight("ours").detach().double().numpy()
        for key, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and "ours" in module.lora_A
    }
