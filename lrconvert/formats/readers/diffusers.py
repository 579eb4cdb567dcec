"""diffusers: ``pytorch_lora_weights.safetensors``, in all the forms that releases wrote.

``unet.<module>.lora_A.weight`` (r, in) and ``.lora_B.weight`` (out, r), which trainers for ComfyUI call ``.lora_down``
and ``.lora_up``, with the model's name or without; ``.lora.down.weight`` and ``.lora.up.weight``, of text encoders
``.lora_linear_layer.``; and the oldest, attention processors:
``<attention>.processor.to_q_lora.down.weight`` with or without ``unet.`` before it. The first word is a model of the
pipeline, or ``diffusion_model``, as ComfyUI calls the one that draws; without it that one is meant. XLabs' LoRAs of
FLUX, ``double_blocks.0.processor.qkv_lora1.down.weight``, are read, too. On a base of diffusers, modules with the names
of the model's own code are those that they are there (`formats.families`).

The scale is alpha / r by ``<module>.alpha``, else by the configuration that newer releases keep in the metadata, else
1. DoRA's magnitudes and biases of lora_B ride along as PEFT's do; LyCORIS' ``.dora_scale`` as in `kohya`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from lrconvert.core.errors import ConfigError, LrcError, OptionError, PairError
from lrconvert.core.limits import FOREIGN
from lrconvert.core.wording import spelled
from lrconvert.formats.families import base as families
from lrconvert.formats.families.shared import spelling
from lrconvert.formats.readers.base import Reader
from lrconvert.formats.readers.kohya import sgm
from lrconvert.formats.readers.peft.config import Settings, parse
from lrconvert.formats.readers.shared import naming, on_base, pairs, products
from lrconvert.formats.readers.shared.naming import BaseNames, Component
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.formats.readers.shared.pairs import Labels, Parts
from lrconvert.formats.readers.shared.weights import Weights, open_weights
from lrconvert.io import strictjson
from lrconvert.lora.adapter import ExtraTensor, LoraAdapter, LoraTarget

LABELS = Labels("down (lora_A)", "up (lora_B)")
METADATA = "lora_adapter_metadata"
_MODELS = "unet|transformer|transformer_2|text_encoder|text_encoder_2|text_encoder_3|prior|controlnet|diffusion_model"
# The first word of a module -> the models of a pipeline that it may mean; itself if it is not here.
_ALIASES = {"diffusion_model": ("transformer", "unet"), "text_encoder_3": ("text_encoder_3", "text_encoder_2")}
# What language models call their layers below `transformer`, which is no model of a pipeline there. Of `layers` only
# those with the attention of diffusion models are ours: Z-Image, Lumina.
_LANGUAGE = (
    r"(?:h|wte|word_embeddings)\.|layers\.(?!\d+\.(?:attn|attention)\.(?:to_|qkv\b|out\b)"
    r"|\d+\.(?:feed_forward|adaLN_modulation|norm1\.linear)\.)"
)
_OURS = re.compile(
    rf"diffusion_model\.|(?:{_MODELS})\.(?!{_LANGUAGE})|(?:down_blocks|up_blocks|mid_block)\."
    r"|(?!(?:lora|lycoris)_)[^.]+\..+\.lora_(?:down|up)\.weight$|text_encoders\.\w+\.transformer\."
)
# ComfyUI's names of text encoders. Its T5 is the third one, or FLUX's second.
_TEXT_ENCODERS = {
    "text_encoders.clip_l.transformer": "text_encoder",
    "text_encoders.clip_g.transformer": "text_encoder_2",
    "text_encoders.t5xxl.transformer": "text_encoder_3",
}
_XLABS = re.compile(
    r"(?:diffusion_model\.)?(?P<module>(?:double|single)_blocks\.\d+\.processor\.(?:qkv|proj)_lora[12]?)"
    r"\.(?P<half>down|up)\.weight"
)
# First words of UNets' modules; those of other modules without a model's name are a transformer's.
_IN_UNETS = (
    *("down_blocks", "up_blocks", "mid_block", "conv_in", "conv_out", "time_embedding", "add_embedding"),
    *("input_blocks", "output_blocks", "middle_block", "time_embed", "label_emb"),
)
_SUFFIX = re.compile(
    r"(?P<module>.+?)(?:"
    r"\.(?:lora|lora_linear_layer)\.(?P<old>down|up)\.weight"
    r"|_lora\.(?P<oldest>down|up)\.weight"
    r"|\.lora_(?P<comfy>down|up)\.weight"
    r"|\.lora_(?P<half>[AB])(?:\.[^.]+)?\.weight"
    r"|\.lora_B(?:\.[^.]+)?\.(?P<bias>bias)"
    r"|\.lora_(?P<magnitude>magnitude_vector)(?:\.[^.]+)?(?:\.weight)?"
    r"|\.(?P<difference>diff|diff_b)"
    r"|(?:_lora|\.lora|\.lora_linear_layer)?\.(?P<alpha>alpha)"
    r"|\.(?P<dora>dora_scale))"
)
_HALVES = {"down": "A", "up": "B", "A": "A", "B": "B"}
_IN_TEXT_ENCODERS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def knows(names: Sequence[str]) -> bool:
    """Return whether most tensors are parts of a LoRA in modules of a pipeline's models."""
    known = sum(_is_ours(name) and _split(name) is not None for name in names)
    return 2 * known > len(names) and not products.are_products(names)


def _is_ours(name: str) -> bool:
    """Return whether a name begins with a model of a pipeline, or is of a module that a diffusion transformer has; but
    for ``layers``, which language models have, too."""
    if _OURS.match(name) or _XLABS.fullmatch(name):
        return True
    match = _SUFFIX.fullmatch(name)
    return match is not None and not name.startswith("layers.") and families.is_known(match["module"])


def _split(name: str) -> tuple[str, str] | None:
    xlabs = _XLABS.fullmatch(name)
    if xlabs is not None:
        return f"transformer.{xlabs['module']}", _HALVES[xlabs["half"]]
    match = _SUFFIX.fullmatch(name)
    if match is None or not (_is_ours(name) or match["alpha"] or match["dora"]):
        return None
    half = match["old"] or match["oldest"] or match["comfy"] or match["half"]
    other = match["bias"] or match["alpha"] or match["difference"] or match["dora"] or "magnitude"
    part = _HALVES[half] if half else other
    return _module(match["module"]), part


def _module(spelled: str) -> str:
    """Return a module with its model's name first, and attention processors as the layers that they adapt."""
    for theirs, ours in _TEXT_ENCODERS.items():
        spelled = f"{ours}{spelled.removeprefix(theirs)}" if spelled.startswith(f"{theirs}.") else spelled
    model = spelled.partition(".")[0]
    if not re.fullmatch(_MODELS, model):
        model = "unet" if model in _IN_UNETS else "transformer"
        spelled = f"{model}.{spelled}"
    path, _, leaf = spelled.replace(".processor.", ".").rpartition(".")
    if model.startswith("text_encoder"):
        leaf = _IN_TEXT_ENCODERS.get(leaf, leaf)
    elif leaf == "to_out" and not families.is_known(f"{path}.{leaf}".partition(".")[2]):
        leaf = "to_out.0"
    return f"{path}.{leaf}"


def read(path: Path, options: ReadOptions) -> LoraAdapter:
    """Read a pipeline's LoRA. With a base, names are those of its parameters; without one they are
    ``<model>.<module>.weight``, with a warning. Raises E-NOT-LORA, E-LORA-FEATURE, E-TENSOR, E-PAIR, E-CONFIG, E-EMPTY,
    E-BASE, E-OPTION, E-LIMIT, E-DTYPE, E-VALUE."""
    with open_weights(path, options) as weights:
        return read_weights(weights, options)


def read_weights(weights: Weights, options: ReadOptions) -> LoraAdapter:
    """Read such a file that is open. Raises the same."""
    base = None if options.base is None else naming.base_names(options.base)
    modules = pairs.sort_parts(weights, _split)
    pairs.check_both_halves(modules, LABELS)
    settings = settings_by_model(weights.metadata)
    targets, extras = [], []
    for module, parts in modules.items():
        component, name = (None, module) if base is None else _place(module, base)
        if pairs.is_pair(parts):
            pair = _pair(module, parts, weights, options, settings)
            pair = pair if component is None else component.placed(pair, name)
            targets.append(pair)
            extras += _extras(pair, parts, weights)
        extras += pairs.differences(name if component is None else component.full(name), parts, weights)
    scheme = ""
    if base is not None:
        targets, extras, scheme = on_base.translated(targets, extras, base)
    warnings = [naming.unnamed("diffusers")] if base is None else []
    own = spelling.fields((info.name for info in weights.tensors), scheme)
    return pairs.build_adapter(
        weights, targets, layout="diffusers", extras=extras, warnings=warnings, used=_USED, fields=own
    )


_USED = (METADATA,)
_ANEW = "save the LoRA again with diffusers, or take the entry out of the file: tensors called alpha count then"


def settings_by_model(metadata: Mapping[str, str]) -> dict[str, Settings]:
    """Return the settings of each model, as newer releases keep them. Raises E-CONFIG and what `parse` raises."""
    text = metadata.get(METADATA)
    if text is None:
        return {}
    try:
        table = strictjson.parse(text.encode(), depth=FOREIGN.json_depth, floats=True)
    except LrcError as error:
        raise ConfigError(f"the metadata {METADATA} is no JSON: {error.what:.200}", fix=_ANEW) from None
    if not isinstance(table, dict):
        raise ConfigError(f"the metadata {METADATA} is not an object", fix=_ANEW)
    configs: dict[str, dict[str, object]] = {}
    for key, value in table.items():
        model, _, field = key.partition(".")
        configs.setdefault(model, {})[field] = value
    return {model: parse({**config, "peft_type": "LORA"}) for model, config in configs.items()}


def _pair(
    module: str, parts: Parts, weights: Weights, options: ReadOptions, settings: Mapping[str, Settings]
) -> LoraTarget:
    model, _, inside = module.partition(".")
    own = settings.get(model)
    alpha = pairs.stated_alpha(weights, parts["alpha"]) if "alpha" in parts else None
    if options.alpha is not None and (alpha is not None or own is not None):
        raise OptionError(f"{module} states its alpha, another was given", fix=f"leave {spelled('alpha')} out")
    if own is not None and own.dora != ("magnitude" in parts):
        what = (
            f"{module}: the metadata says use_dora {own.dora}, and the module has {'no' if own.dora else 'a'} magnitude"
        )
        raise ConfigError(what, fix="the file is incomplete, or its metadata is that of another; save it again")
    alpha = options.alpha if alpha is None else alpha

    def scale(rank: int) -> float:
        if alpha is not None:
            return pairs.scale_of(module, alpha, rank)
        try:
            return 1.0 if own is None else own.scale(inside, rank)
        except PairError as error:
            fix = f"correct {model}.r or {model}.rank_pattern in the file's metadata {METADATA}"
            raise PairError(error.what, fix=fix) from None

    return pairs.read_pair(module, parts, scale, weights, LABELS)


def _place(module: str, base: BaseNames) -> tuple[Component, str]:
    """Return the model of the base that a module is in, and its name there. Raises E-BASE."""
    model, _, inside = module.partition(".")
    component = base.component(_ALIASES.get(model, (model,)), module)
    own = on_base.own_name(inside, component, is_flat=False)
    if own is not None:
        return component, own
    return component, component.dotted(sgm.renamed(inside, component, "."))


def _extras(pair: LoraTarget, parts: Parts, weights: Weights) -> list[ExtraTensor]:
    """Return magnitudes, and the bias of lora_B with the scale folded in. Raises E-PAIR, E-LIMIT, E-DTYPE, E-VALUE."""
    extras = []
    if "magnitude" in parts:
        extras.append(pairs.read_magnitude(parts["magnitude"], pair, weights))
    if "dora_scale" in parts:
        extras.append(pairs.read_dora_scale(parts["dora_scale"], pair, weights))
    if "bias" in parts:
        extras.append(pairs.scaled_bias(parts["bias"], pair, weights))
    return extras


READER = Reader(
    "diffusers", "diffusers pytorch_lora_weights", read, knows=knows, takes_alpha=True, read_weights=read_weights
)
