"""Names of diffusion models: the component of a pipeline that a target belongs to, its name in there, and files whose
tensors are spelled in a trainer's way."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from lrconvert.core.errors import ExportError
from lrconvert.formats import unet_names
from lrconvert.formats.base_class import renamed_by as renamed
from lrconvert.formats.exporters.base import ExportOptions
from lrconvert.formats.exporters.shared.files import Entry, entry
from lrconvert.formats.exporters.shared.peft_extras import magnitude_shape
from lrconvert.formats.exporters.shared.plain import (
    Factors,
    Pair,
    alpha_of,
    embeddings,
    exclude,
    factors,
    magnitudes,
    module_of,
    refuse_extras,
    unfolded,
    unscaled,
)
from lrconvert.formats.families import base as families
from lrconvert.formats.families.shared.spelling import HALVES, Spelling
from lrconvert.lora.adapter import MAGNITUDES, Adapter, ExtraTensor, Target

UNET, TRANSFORMER, SECOND = "unet", "transformer", "transformer_2"
DENOISERS = (UNET, TRANSFORMER, SECOND)
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
_ANY = re.compile(r"\w+")
_ROOTS = {
    UNET: _UNET,
    TRANSFORMER: _TRANSFORMER,
    SECOND: _TRANSFORMER,
    **dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3"), _ANY),
}
_BARE = {UNET: _UNET, TRANSFORMER: _TRANSFORMER, "text_encoder": re.compile(r"text_model\.")}
_T5 = "encoder.block."
_SDXL_CONTEXT = 2048
BESIDE = ("add", *MAGNITUDES, "textual_inversion")
_CONTEXT = (".attn2.to_k", ".attn2.to_v")
Layer = tuple[str, str, Pair]  # a component, a module in it, and its update


def placed(target: Target, layout: str) -> tuple[str, str]:
    """Return (component, module) of a target: named by its first part, or known by its blocks where an adapter of one
    component alone leaves that out. Raises E-EXPORT for what is no part of a diffusion pipeline."""
    module = module_of(target, layout)
    first, _, rest = module.partition(".")
    if _is_of(first, rest):
        return first, _with_text_model(first, rest)
    for component, roots in _BARE.items():
        if roots.match(module) or (component == TRANSFORMER and families.is_known(module)):
            return component, module
    raise ExportError(
        f"{target.name!r:.120} is no layer of a UNet, a text encoder or a diffusion transformer that {layout} names",
        fix="export to peft-lora; names of diffusion models begin with unet., transformer. or text_encoder.",
    )


def _is_of(model: str, module: str) -> bool:
    """Return whether a model of a pipeline has a module of this name."""
    if model not in _ROOTS:
        return False
    is_transformer = _ROOTS[model] is _TRANSFORMER
    return _ROOTS[model].match(module) is not None or (is_transformer and families.is_known(module))


_OF_KOHYA = re.compile(r"(?:(?P<denoiser>lora_unet|lora_transformer|lycoris)|(?P<text>lora_te\d?))_(?P<inside>[^.]+)")


def as_spelled(target: Target, layout: str) -> tuple[str, str]:
    """Return (component, module) of a target whose name is the source's own: with underscores it stays as it is, a text
    encoder called by kohya's word for it. Raises E-EXPORT as `placed` does."""
    module = module_of(target, layout)
    flat = _OF_KOHYA.fullmatch(module)
    if flat is not None:
        return flat["text"] or TRANSFORMER, flat["inside"]
    first, _, rest = module.partition(".")
    if first in (*DENOISERS, "diffusion_model"):
        return TRANSFORMER if first == "diffusion_model" else first, rest
    return placed(target, layout)


def of_one_model(adapter: Adapter, layout: str) -> tuple[Adapter, str]:
    """Return an adapter of a pipeline's only adapted model with the names inside that model, and the model's name; what
    is of no pipeline as it is, and "". Raises E-EXPORT for an adapter of several models."""
    parts = {target.name.partition(".")[::2] for target in adapter.shapes()}
    models = {first for first, rest in parts if _is_of(first, rest.removesuffix(".weight"))}
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


# --- UNets in Stability AI's words -----------------------------------------------------------------------------------


def stability_names(layers: Sequence[Layer], options: ExportOptions, *, always: bool) -> Mapping[str, str] | None:
    """Return the table of names of a UNet in Stability AI's code if it is SDXL's, or `always`; else None."""
    if options.base_config is not None:
        is_sdxl = unet_names.is_sdxl(options.base_config)
    else:
        widths = {p.target.in_features for c, m, p in layers if c == UNET and m.endswith(_CONTEXT)}
        is_sdxl = widths == {_SDXL_CONTEXT}
    if is_sdxl:
        return unet_names.stability_names(levels=3)
    # The lowest level of the other UNets has no attention on the way up, and its upsampler is one place earlier.
    return {**unet_names.stability_names(levels=4), **_LOWEST} if always else None


_LOWEST = {"up_blocks.0.upsamplers.0.conv": "output_blocks.2.1.conv"}


def stability_name(target: Target, module: str, originals: Mapping[str, str]) -> str:
    """Return the name of a UNet's module in a table. Raises E-EXPORT for one that is not there."""
    name = unet_names.renamed(module, originals, ".")
    if name is None:
        what = f"{target.name!r:.120} has no name in the code of Stable Diffusion XL, which sd-scripts follows"
        raise ExportError(what, fix=exclude())
    return name


# --- spelled files ---------------------------------------------------------------------------------------------------


def text_prefix(component: str, module: str, components: set[str], sdxl: bool) -> str:
    """Return what kohya writes in front of a text encoder's modules, without the last underscore. T5 is the third one,
    which FLUX calls its second."""
    if component == "text_encoder":
        return "lora_te" if components <= {UNET, "text_encoder"} and not sdxl else "lora_te1"
    return "lora_te3" if module.startswith(_T5) else f"lora_te{component[-1]}"


def own_ranks(adapter: Adapter, options: ExportOptions, spelling: Spelling, layout: str) -> Factors:
    """Return factors of their own ranks, unless the options say one: what reads these files takes each module by
    itself. The scale is stated where alphas are. Raises E-EXPORT for tensors beside them that have no place."""
    refuse_extras(adapter, layout, BESIDE)
    keeping = options if options.pad_rank is not None else replace(options, keep_ranks=True)
    return factors(adapter, keeping, _own_scale if _may_have_alpha(spelling) else unscaled)


def spelled_entries(
    adapter: Adapter,
    made: Factors,
    options: ExportOptions,
    spelling: Spelling,
    layout: str,
    place: Callable[[Target, str], tuple[str, str]] = placed,
) -> list[Entry]:
    """Return the tensors of a file in a trainer's spelling. Alpha is stated where the spelling has it, or where a scale
    is not 1 and a name with dots may have one beside it. Raises E-EXPORT for what has no name there."""
    refuse_extras(adapter, layout, BESIDE)
    scaled = magnitudes(adapter)
    layers = [(*place(pair.target, layout), pair) for pair in made.pairs]
    owners: dict[str, str] = {}
    entries = embeddings(adapter)
    names = _Names(layers, options, spelling)
    for layer in layers:
        name, pair = names.of(layer), layer[2]
        if name in owners:
            what = f"{pair.target.name!r:.120} and {owners[name]!r:.120} have one name there, {name!r:.120}"
            raise ExportError(what, fix=exclude())
        owners[name] = pair.target.name
        entries += _factors_of(name, pair, made.dtype, spelling, layout)
        if pair.target.name in scaled:
            entries.append(_magnitude(name, pair.target, scaled[pair.target.name], spelling))
    owned = {target: name for name, target in owners.items()}
    return entries + [_difference(extra, owned, layout) for extra in adapter.extras if extra.use == "add"]


def _may_have_alpha(spelling: Spelling) -> bool:
    return spelling.has_alpha or spelling.halves == "lora_A"


def _own_scale(pair: Pair) -> float:
    """The scale of a pair, which its alpha can state unless it is zero, which programs take for none."""
    return pair.scale if pair.scale > 0 else 1.0


def _factors_of(name: str, pair: Pair, dtype: str, spelling: Spelling, layout: str) -> list[Entry]:
    down, up = unfolded(pair, layout)
    ends = HALVES[spelling.halves]
    entries = [entry(name + ends[0], dtype, down), entry(name + ends[1], dtype, up)]
    if spelling.has_alpha or (pair.scale != 1 and _may_have_alpha(spelling)):
        alpha = np.full((), alpha_of(pair.scale, pair.rank), np.float32)
        entries.append(entry(f"{name}.alpha", "F32", alpha))
    return entries


def _magnitude(name: str, target: Target, extra: ExtraTensor, spelling: Spelling) -> Entry:
    """DoRA's magnitudes: as diffusers has them beside its names, else as LyCORIS does, (out, 1, ...) of outputs and
    (1, in, ...) of inputs."""
    by_output = extra.use == "magnitude"
    if by_output and spelling.prefix in ("transformer.", "unet."):
        return f"{name}.lora_magnitude_vector", extra.dtype, magnitude_shape(target), extra.data
    ones = (1,) * (len(target.shape) - 2)
    shape = (target.out_features, 1, *ones) if by_output else (1, target.channels, *ones)
    return f"{name}.dora_scale", extra.dtype, shape, extra.data


def _difference(extra: ExtraTensor, owned: Mapping[str, str], layout: str) -> Entry:
    """The difference of a bias, or of a whole weight, beside the factors of its module."""
    owner, _, leaf = extra.name.rpartition(".")
    name = owned.get(f"{owner}.weight")
    if name is None:
        raise ExportError(f"{extra.name!r:.120} is of no module with factors, which {layout} needs", fix=exclude())
    return f"{name}.diff{'_b' if leaf == 'bias' else ''}", extra.dtype, extra.shape, extra.data


class _Names:
    """The names that a spelling has for the layers of an adapter."""

    def __init__(self, layers: Sequence[Layer], options: ExportOptions, spelling: Spelling) -> None:
        self.spelling = spelling
        self.components = {component for component, _, _ in layers}
        if {TRANSFORMER, SECOND} <= self.components and spelling.prefix != "transformer.":
            what = f"the adapter changes {TRANSFORMER} and {SECOND}, whose modules have the same names there"
            raise ExportError(what, fix="export to diffusers, or each of them alone")
        is_original = spelling.prefix == "diffusion_model."
        self.originals = stability_names(layers, options, always=is_original)
        if spelling.prefix not in ("diffusion_model.", "lora_unet_") or spelling.scheme == families.DIFFUSERS:
            self.originals = None

    def of(self, layer: Layer) -> str:
        component, module, pair = layer
        if component in DENOISERS:
            if component == UNET and self.originals is not None:
                module = stability_name(pair.target, module, self.originals)
            spelling = self.spelling
            return f"{component}.{module}" if spelling.prefix == "transformer." else spelling.name(module)
        if component.startswith("lora_"):
            return f"{component}_{module}"
        if self.spelling.is_flat:
            prefix = text_prefix(component, module, self.components, self.originals is not None)
            return f"{prefix}_{module.replace('.', '_')}"
        if self.spelling.prefix == "diffusion_model.":
            model = "t5xxl" if module.startswith(_T5) else "clip_l" if component == "text_encoder" else "clip_g"
            return f"text_encoders.{model}.transformer.{module}"
        return f"{component}.{module}"
