"""diffusers: ``pytorch_lora_weights.safetensors`` with PEFT's names below ``unet.``, ``transformer.`` or
``text_encoder.``, for ``pipeline.load_lora_weights(FOLDER)``. The scale is baked in.

Without alphas diffusers scales by 1 where all ranks are equal. Own ranks (``--keep-ranks``) are written into the
``lora_adapter_metadata`` that its newer releases read, with equal alphas.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping

from lrconvert.formats.exporters.base import Exporter, ExportOptions, Folder
from lrconvert.formats.exporters.shared.diffusion import PIPELINE, placed
from lrconvert.formats.exporters.shared.files import entry, weights_file
from lrconvert.formats.exporters.shared.plain import factors, refuse_extras, unfolded, unscaled
from lrconvert.lora.adapter import Adapter

_NAME = "pytorch_lora_weights.safetensors"
_LAYOUT = "diffusers' layout"


def files(adapter: Adapter, options: ExportOptions) -> Folder:
    """Return the file of weights. Raises E-EXPORT for what diffusers has no name for."""
    refuse_extras(adapter, _LAYOUT)
    tensors = []
    ranks: dict[str, dict[str, int]] = {}
    made = factors(adapter, options, unscaled)
    for pair in made.pairs:
        component, module = placed(pair.target, _LAYOUT)
        ranks.setdefault(component, {})[module] = pair.rank
        down, up = unfolded(pair, _LAYOUT)
        tensors.append(entry(f"{component}.{module}.lora_A.weight", made.dtype, down))
        tensors.append(entry(f"{component}.{module}.lora_B.weight", made.dtype, up))
    notes = {"lora_adapter_metadata": _settings(ranks)} if options.keep_ranks else {}
    return Folder({_NAME: weights_file(tensors, adapter, **notes)}, made.notes)


def _settings(ranks: Mapping[str, Mapping[str, int]]) -> str:
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
        }
    return json.dumps(fields, indent=2, sort_keys=True)


EXPORTER = Exporter(
    "diffusers",
    "a LoRA for a pipeline of diffusers",
    files,
    kind="diffusers LoRA",
    library="diffusers",
    usage=PIPELINE.replace("{file}", _NAME),
    own_names=True,
)
