"""Names of diffusion models: the component of a pipeline that a target belongs to, and its name in there."""

from __future__ import annotations

import re

from lrconvert.core.errors import ExportError
from lrconvert.formats.base_class import renamed_by as renamed
from lrconvert.formats.exporters.shared.plain import module_of
from lrconvert.lora.adapter import Adapter, Target

UNET, TRANSFORMER = "unet", "transformer"
PIPELINE = """python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{base}")
pipeline.load_lora_weights("{adapter}", weight_name="{file}")"""
# The first module of a name inside a component, as diffusers calls them.
_UNET = re.compile(
    r"(?:conv_in|conv_out|time_embedding|add_embedding|class_embedding|encoder_hid_proj|down_blocks|mid_block"
    r"|up_blocks)\b"
)
_TRANSFORMER = re.compile(
    r"(?:transformer_blocks|single_transformer_blocks|x_embedder|context_embedder|time_text_embed|pos_embed|norm_out"
    r"|proj_out|adaln_single|caption_projection|patch_embed|condition_embedder)\b|blocks\.\d+\.(?:attn[12]?|ffn)\b"
)
_CLIP = re.compile(r"(?:text_model\.)?(?:encoder\.layers\.\d+\.(?:self_attn|mlp)|embeddings)\b|text_projection\b")
_ROOTS = {
    UNET: _UNET,
    TRANSFORMER: _TRANSFORMER,
    "text_encoder": re.compile(r"\w+"),
    "text_encoder_2": re.compile(r"\w+"),
    "text_encoder_3": re.compile(r"\w+"),
}
_BARE = {UNET: _UNET, TRANSFORMER: _TRANSFORMER, "text_encoder": re.compile(r"text_model\.")}


def placed(target: Target, layout: str) -> tuple[str, str]:
    """Return (component, module) of a target: named by its first part, or known by its blocks where an adapter of one
    component alone leaves that out. Raises E-EXPORT for what is no part of a diffusion pipeline."""
    module = module_of(target, layout)
    first, _, rest = module.partition(".")
    if first in _ROOTS and _ROOTS[first].match(rest):
        return first, _with_text_model(first, rest)
    for component, roots in _BARE.items():
        if roots.match(module):
            return component, module
    raise ExportError(
        f"{target.name!r:.120} is no layer of a UNet, a text encoder or a diffusion transformer that {layout} names",
        fix="export to peft-lora; names of diffusion models begin with unet., transformer. or text_encoder.",
    )


def of_one_model(adapter: Adapter, layout: str) -> tuple[Adapter, str]:
    """Return an adapter of a pipeline's only adapted model with the names inside that model, and the model's name; what
    is of no pipeline as it is, and "". Raises E-EXPORT for an adapter of several models."""
    parts = {target.name.partition(".")[::2] for target in adapter.shapes()}
    models = {first for first, rest in parts if first in _ROOTS and _ROOTS[first].match(rest)}
    if not models:
        return adapter, ""
    if len({first for first, _ in parts}) > 1:
        what = f"the adapter changes {', '.join(sorted(first for first in {first for first, _ in parts}))}"
        raise ExportError(f"{what}; {layout} is for one model", fix="export to diffusers or kohya")
    model = models.pop()
    return renamed(adapter, lambda name: name.removeprefix(f"{model}.")), model


def _with_text_model(component: str, module: str) -> str:
    """Return CLIP's modules below ``text_model``, as files call them; newer releases of transformers leave that level
    out."""
    clip = component.startswith("text_encoder") and _CLIP.match(module) and not module.startswith("text_")
    return f"text_model.{module}" if clip else module
