"""diffusers' own pipelines on exported folders: ``python run_diffusers.py BASE < folders.json``. Tiny random models of
its classes; what a file adds to each weight is written to the .npz of ``options["out"]``."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import runner

LIB = runner.library("diffusers")
runner.prefer(LIB)

import diffusers
import numpy as np
import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer


def text_config() -> Any:
    return transformers.CLIPTextConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=100
    )


def shared_parts() -> dict[str, Any]:
    return {
        "vae": diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
        "text_encoder": transformers.CLIPTextModel(text_config()),
        "tokenizer": None,
        "scheduler": diffusers.DDIMScheduler(),
    }


SD = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
SDXL = {
    "sample_size": 8,
    "block_out_channels": (32, 64, 96),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "cross_attention_dim": 64,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
    "use_linear_projection": True,
}


def stable_diffusion() -> Any:
    absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return diffusers.StableDiffusionPipeline(unet=diffusers.UNet2DConditionModel(**SD), **shared_parts(), **absent)


def stable_diffusion_xl() -> Any:
    return diffusers.StableDiffusionXLPipeline(
        unet=diffusers.UNet2DConditionModel(**SDXL),
        text_encoder_2=transformers.CLIPTextModelWithProjection(text_config()),
        tokenizer_2=None,
        **shared_parts(),
    )


def flux() -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    absent = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.FluxPipeline(scheduler=scheduler, transformer=transformer, **absent)


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def walk(config: dict[str, Any]) -> list[tuple[str, list[int]]]:
    """Layers of a UNet's attentions, gates and residual blocks as cloneofsimo's trainings meet them, with shapes."""
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(config)
    return [
        (f"{outer}.{inner}", list(layer.weight.shape))
        for outer, block in unet.named_modules()
        if type(block).__name__ in ("Attention", "GEGLU", "ResnetBlock2D")
        for inner, layer in block.named_modules()
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))
    ]


def saved(folder: Path, options: dict[str, Any]) -> None:
    """Save a tiny pipeline in half precision; with ``options["fuse"]`` the one of that folder, with a LoRA fused."""
    classes = {"sd": stable_diffusion, "sdxl": stable_diffusion_xl, "flux": flux}
    if "fuse" not in options:
        torch.manual_seed(0)
        pipeline = classes[options["save"]]().to(torch.float16)
    else:
        parts = json.loads((Path(options["fuse"]) / "model_index.json").read_text())
        absent = {name: None for name, part in parts.items() if part == [None, None]}
        how = {"torch_dtype": torch.float16, "variant": options.get("variant"), **absent}
        pipeline = diffusers.DiffusionPipeline.from_pretrained(options["fuse"], **how)
    if "file" in options:
        pipeline = pipeline.to(torch.float32)
        pipeline.load_lora_weights(str(Path(options["file"]).parent), weight_name=Path(options["file"]).name)
        models = [name for name in ("unet", "transformer", "text_encoder") if getattr(pipeline, name, None) is not None]
        pipeline.fuse_lora(components=models)
        pipeline.unload_lora_weights()
        pipeline = pipeline.to(torch.float16)
    pipeline.save_pretrained(folder, variant=options.get("variant"), max_shard_size=options.get("shard", "10GB"))


def load(folder: Path, base: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    if "family" in options:
        import diffusion_transformers

        return diffusion_transformers.answer(options)
    if "unet" in options:
        return {"walk": walk(options["unet"])}
    if "save" in options:
        saved(folder, options)
        return {}
    pipeline = {"sd": stable_diffusion, "sdxl": stable_diffusion_xl, "flux": flux}[options["model"]]()
    messages = _Messages()
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(messages)
    try:
        pipeline.load_lora_weights(str(folder), weight_name=options["file"], adapter_name="ours")
    finally:
        for logger in loggers:
            logger.removeHandler(messages)
    deltas = {}
    for component, model in pipeline.components.items():
        for name, module in model.named_modules() if isinstance(model, torch.nn.Module) else ():
            if isinstance(module, BaseTunerLayer) and "ours" in module.lora_A:
                deltas[f"{component}.{name}"] = module.get_delta_weight("ours").detach().double().numpy()
    np.savez(options["out"], **deltas)
    return {"said": messages.lines}


if __name__ == "__main__":
    runner.serve(load)
