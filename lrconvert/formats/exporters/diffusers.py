"""diffusers: ``pytorch_lora_weights.safetensors`` with PEFT's names below ``unet.``, ``transformer.`` or
``text_encoder.``, for ``pipeline.load_lora_weights(FOLDER)``. The scale is baked in.

The ``lora_adapter_metadata`` that newer releases read has the ranks of each model, own ones (``--keep-ranks``) by
pattern, with equal alphas, so that the scale is 1; without it diffusers scales by 1 where all ranks are equal. DoRA's
magnitudes are PEFT's, for all modules of a model or none. Differences of biases are ``.lora_B.bias``, PEFT's bias of a
LoRA, with zeros for the other modules of the model. Embeddings of words (``bundle_emb.``) are written back, and
diffusers ignores them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping

import numpy as np

from lrconvert.core.errors import ExportError
from lrconvert.core.wording import spelled
from lrconvert.formats.exporters.base import Exporter, ExportOptions, Folder
from lrconvert.formats.exporters.shared.diffusion import PIPELINE, placed
from lrconvert.formats.exporters.shared.files import entry, weights_file
from lrconvert.formats.exporters.shared.peft_extras import magnitude_shape
from lrconvert.formats.exporters.shared.plain import (
    embeddings,
    factors,
    magnitudes,
    refuse_extras,
    unfolded,
    unscaled,
)
from lrconvert.lora.adapter import Adapter, ExtraTensor

_NAME = "pytorch_lora_weights.safetensors"
_LAYOUT = "diffusers' layout"


def files(adapter: Adapter, options: ExportOptions) -> Folder:
    """Return the file of weights. Raises E-EXPORT for what diffusers has no name for."""
    refuse_extras(adapter, _LAYOUT, ("magnitude", "textual_inversion", "add"))
    tensors, scaled, biases = embeddings(adapter), magnitudes(adapter), _biases(adapter)
    ranks: dict[str, dict[str, int]] = {}
    doras: dict[str, set[bool]] = {}
    made = factors(adapter, options, unscaled)
    biased = {placed(pair.target, _LAYOUT)[0] for pair in made.pairs if pair.target.name in biases}
    for pair in made.pairs:
        component, module = placed(pair.target, _LAYOUT)
        ranks.setdefault(component, {})[module] = pair.rank
        doras.setdefault(component, set()).add(pair.target.name in scaled)
        if pair.target.name in scaled:
            extra, name = scaled[pair.target.name], f"{component}.{module}.lora_magnitude_vector"
            tensors.append((name, extra.dtype, magnitude_shape(pair.target), extra.data))
        if component in biased:
            zeros = np.zeros(pair.target.out_features, np.float32)
            extra = biases.get(pair.target.name) or ExtraTensor("", "F32", zeros.shape, zeros.tobytes(), "add")
            tensors.append((f"{component}.{module}.lora_B.bias", extra.dtype, extra.shape, extra.data))
        down, up = unfolded(pair, _LAYOUT)
        tensors.append(entry(f"{component}.{module}.lora_A.weight", made.dtype, down))
        tensors.append(entry(f"{component}.{module}.lora_B.weight", made.dtype, up))
    partly = sorted(component for component, kinds in doras.items() if len(kinds) > 1)
    if partly:
        what = f"some modules of {partly[0]} have DoRA magnitudes and some have none, and PEFT's use_dora holds for all"
        raise ExportError(what, fix=f"convert it with {spelled('bake_dora', ...)}, or export to kohya")
    settings = _settings(ranks, {component for component, kinds in doras.items() if True in kinds}, biased)
    return Folder({_NAME: weights_file(tensors, adapter, lora_adapter_metadata=settings)}, made.notes)


def _biases(adapter: Adapter) -> dict[str, ExtraTensor]:
    """Return what is added to biases, by the weight of their module. Raises E-EXPORT for what is added to others."""
    weights = {target.name for target in adapter.shapes()}
    biases = {}
    for extra in (extra for extra in adapter.extras if extra.use == "add"):
        owner, _, leaf = extra.name.rpartition(".")
        if leaf != "bias" or f"{owner}.weight" not in weights:
            what = f"{_LAYOUT} has no place for a difference of {extra.name!r:.120}, which no LoRA is beside"
            raise ExportError(what, fix="export to comfyui or raw, or merge it into the base")
        biases[f"{owner}.weight"] = extra
    return biases


def _settings(ranks: Mapping[str, Mapping[str, int]], doras: Collection[str], biased: Collection[str]) -> str:
    """Return the configurations of all components, as diffusers flattens them. CLIP's modules stand without
    ``text_model``: PEFT finds them by their endings, whether the release of transformers has that level or not."""
    fields: dict[str, object] = {}
    for component, by_module in ranks.items():
        top = Counter(by_module.values()).most_common(1)[0][0]
        own = {module.removeprefix("text_model."): rank for module, rank in sorted(by_module.items())}
        others = {m if m.startswith("encoder.") else f"^{m}": rank for m, rank in own.items() if rank != top}
        fields |= {
            f"{component}.r": top,
            f"{component}.lora_alpha": top,
            f"{component}.rank_pattern": others,
            f"{component}.alpha_pattern": others,
            f"{component}.target_modules": sorted(own),
            **({f"{component}.use_dora": True} if component in doras else {}),
            **({f"{component}.lora_bias": True} if component in biased else {}),
        }
    return json.dumps(fields, indent=2, sort_keys=True)


EXPORTER = Exporter(
    "diffusers",
    "a LoRA for a pipeline of diffusers",
    files,
    kind="diffusers LoRA",
    library="diffusers",
    usage=PIPELINE.replace("{file}", _NAME),
    consumers=("diffusers",),
    own_names=True,
)
