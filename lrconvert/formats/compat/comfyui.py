"""ComfyUI: a file in ``models/loras`` and the node "Load LoRA". It makes a list of names from the model that is loaded,
in the spellings of several trainers, and looks each up in the file; what is in the file and not in the list is a line
in the log, ``lora key not loaded``. It reads no configuration and no metadata."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

from lrconvert.core.errors import LrcError
from lrconvert.core.wording import spelled
from lrconvert.formats.compat.base import Consumer, Finding, NoOptions, verdicts
from lrconvert.formats.compat.shared import rules
from lrconvert.formats.compat.shared.subject import PEFT_WEIGHTS, Subject
from lrconvert.formats.readers.diffusers import METADATA, settings_by_model
from lrconvert.io.container import TensorInfo
from lrconvert.io.quantized.base import FP8

VERSION = "0.8.1"
refuses, wrong, warns = verdicts("comfyui", VERSION)

KEYS = "comfy/lora.py load_lora"
UNET_NAMES = "comfy/lora.py model_lora_keys_unet"
TEXT_NAMES = "comfy/lora.py model_lora_keys_clip"
FACTORS = "comfy/weight_adapter/lora.py LoRAAdapter.load"
WEIGHT = "comfy/weight_adapter/lora.py LoRAAdapter.calculate_weight"
DORA = "comfy/weight_adapter/base.py weight_decompose"

_FOREIGN = ("kohya", "diffusers", "lycoris", "raw", "peft", "")
_PARTS = (
    *("lora_up.weight", "lora_down.weight", "lora_mid.weight", "lora_A.weight", "lora_B.weight", "lora_A", "lora_B"),
    *("lora_A.default.weight", "lora_B.default.weight", "lora.up.weight", "lora.down.weight"),
    *("lora_linear_layer.up.weight", "lora_linear_layer.down.weight", "alpha", "dora_scale", "reshape_weight"),
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1", "lokr_w2", "lokr_w1_a"),
    *("lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "oft_blocks", "rescale", "a1.weight", "a2.weight", "b1.weight"),
    *("b2.weight", "w_norm", "b_norm", "diff", "diff_b", "set_weight"),
)
_ANY_PART = "|".join(sorted(map(re.escape, _PARTS), key=len, reverse=True))
_PART = re.compile(rf"(?P<module>.+?)(?:\.(?:{_ANY_PART})|_lora\.(?:up|down)\.weight)")
# Beginnings of modules that it makes for some model. Of Wan, whose blocks diffusers renamed, `transformer.` is none.
_KNOWN = re.compile(
    r"diffusion_model\.|unet\.(?!base_model)|transformer\.(?!blocks\.)|text_encoders\.|text_encoder(?:_2)?\.text_model\."
    r"|lora_unet_|lora_prior_unet_|lora_prior_te_|lora_te[123]?_|lora_transformer_|lycoris_"
    r"|(?:down_blocks|up_blocks|mid_block|transformer_blocks|single_transformer_blocks|layers|noise_refiner"
    r"|context_refiner)[._]"
)
_TWICE = re.compile(r"lora_(unet|te[123]?)_(?:unet|te[123]?|text_encoder|lora)_")
# It has diffusers' attention of UNets in the spelling of attention processors alone.
_ATTENTION = re.compile(r"(?:unet\.)?(?:down_blocks|up_blocks|mid_block)\..*\.attn[12]\.to_(?:q|k|v|out\.0)")
_HALVES = ("lora_up.weight", "lora_B.weight")


def examine(subject: Subject, options: NoOptions) -> Iterator[Finding]:
    how = f"convert or export it: {rules.export_call('comfyui')}"
    if subject.layout == "lrconvert":
        yield refuses("layout", "a compact lrconvert file, which no program but lrconvert reads", how, KEYS)
        return
    if subject.layout == "mlx" or subject.foreign not in _FOREIGN:
        what = f"the layout {subject.foreign or subject.layout}, whose names ComfyUI does not know"
        yield refuses("layout", what, how, KEYS)
        return
    if subject.layout == "peft" or subject.weights == PEFT_WEIGHTS:
        what = "a PEFT folder, whose names say nothing of the model of a pipeline that they are for"
        yield refuses("layout", what, how, KEYS)
        return
    yield from _names(subject, how)
    yield from _dora(subject)
    yield from _scales(subject)
    tucker = [info.name for info in subject.tensors if info.name.endswith(".lora_mid.weight") and len(info.shape) != 4]
    what = "a middle factor of a convolution in one dimension or in three, at which the run ends"
    yield from refuses.of("conv", tucker, what, how, WEIGHT)


def _names(subject: Subject, how: str) -> Iterator[Finding]:
    modules: dict[str, str] = {}
    unread = []
    words = []
    for info in subject.tensors:
        match = _PART.fullmatch(info.name)
        if info.name.startswith("bundle_emb."):
            words.append(info.name)
        elif match is None:
            unread.append(info.name)
        else:
            modules.setdefault(match["module"], info.name)
    what = "embeddings of words are not loaded"
    fix = "save each in a file of its own in models/embeddings, and write embedding:NAME in the prompt"
    yield from wrong.of("embeddings", words, what, fix, KEYS)
    unread = [name for name in unread if not name.endswith((".lora_magnitude_vector", *_SCALES_OF_EIGHT))]
    what = "parts of modules that it does not know, not loaded"
    yield from wrong.of("parts", unread, what, how, FACTORS)
    unknown = [name for module, name in modules.items() if not _KNOWN.match(module) or _TWICE.match(module)]
    if unknown and len(unknown) == len(modules):
        what = f"no name is one that it has for any model, so nothing is loaded: {unknown[0]!r:.160}"
        yield wrong("names", what, how, UNET_NAMES)
        return
    what = "names that it has for no model, not loaded"
    yield from wrong.of("names", unknown, what, how, UNET_NAMES)
    attention = [module for module in modules if _ATTENTION.fullmatch(module)]
    what = "a UNet's attention under diffusers' newer names, not loaded: it knows the old ones (processor.to_q_lora)"
    yield from wrong.of("attention", attention, what, how, UNET_NAMES)


_SCALES_OF_EIGHT = (".scale_weight", ".weight_scale")


def _dora(subject: Subject) -> Iterator[Finding]:
    fix = f"convert it with {spelled('base', ...)} and {spelled('bake_dora', ...)}, and export that"
    peft = [info.name for info in subject.tensors if info.name.endswith(".lora_magnitude_vector")]
    what = "DoRA's magnitudes under PEFT's name are not loaded, and the rest is taken for a plain LoRA"
    yield from wrong.of("dora", peft, what, fix, FACTORS)
    outputs = [info.name for info in subject.tensors if info.name.endswith(".dora_scale") and _is_of_outputs(info)]
    what = "a DoRA of outputs is divided by the norms of the base's weight without the update, as LyCORIS is not"
    yield from wrong.of("dora", outputs, what, fix, DORA)


def _is_of_outputs(info: TensorInfo) -> bool:
    return len(info.shape) < 2 or info.shape[0] != 1


def _scales(subject: Subject) -> Iterator[Finding]:
    fix = f"write the alphas into the file: {rules.export_call('comfyui')}"
    rescaled = _by_metadata(subject)
    what = f"the scale stands in {METADATA}, which it does not read: 1 is taken"
    yield from wrong.of("alpha", rescaled, what, fix, WEIGHT)
    stated = {name.removesuffix(".alpha") for name in subject.by_name if name.endswith(".alpha")}
    ups = {n.removesuffix(f".{half}") for n in subject.by_name for half in _HALVES if n.endswith(f".{half}")}
    zero = [name for name, alpha in subject.alphas.items() if alpha == 0]
    what = "an alpha of 0 makes an update of zero there, and sd-scripts takes it for none (a scale of 1)"
    yield from wrong.of("alpha", zero, what, "write the alpha that was meant, r for a scale of 1", WEIGHT)
    if stated and (without := sorted(ups - stated)):
        what = f"{len(without)} of {len(ups)} modules state no alpha and get a scale of 1, {without[0]!r:.160} for one"
        yield warns("alpha", what, "is that so in the program that trained it?", WEIGHT)
    scales = [n for n in subject.by_name if n.endswith(_SCALES_OF_EIGHT)]
    eights = [info.name for info in subject.tensors if info.dtype in FP8 and math.prod(info.shape) > 1]
    what = "scales of factors in eight bits are not loaded, and the factors are taken as they are"
    yield from wrong.of("dtype", scales if eights else [], what, f"write F16: {rules.export_call('comfyui')}", KEYS)


def _by_metadata(subject: Subject) -> Sequence[str]:
    """Return the modules whose scale in the metadata is not 1."""
    try:
        settings = settings_by_model(subject.metadata)
    except LrcError:
        return []
    modules = []
    for name, info in subject.by_name.items():
        module, _, half = name.rpartition(".lora_A")
        model, _, inside = module.partition(".")
        own = settings.get(model)
        if half == ".weight" and own is not None and own.ranks.value(inside) == info.shape[0]:
            modules += [module] if own.scale(inside, info.shape[0]) != 1 else []
    return modules


CONSUMER = Consumer("comfyui", "ComfyUI", VERSION, examine)
