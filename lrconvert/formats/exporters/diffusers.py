"""diffusers: ``pytorch_lora_weights.safetensors`` with PEFT's names below ``unet.``, ``transformer.`` or
``text_encoder.``, for ``pipeline.load_lora_weights(FOLDER)``. The scale is baked in.

Without alphas diffusers scales by 1 where all ranks are equal. Own ranks (``--keep-ranks``) are written into the
``lora_adapter_metadata`` that its newer releases read, with equal alphas.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping

from lrconvert.formats.exporters.base import Exporter, ExportOptions, Files
from lrconvert.formats.exporters.peft_lora import config_file, weights_file
from lrconvert.formats.exporters.shared.diffusion import placed
from lrconvert.formats.exporters.shared.plain import entry, pairs, refuse_extras, unfolded
from lrconvert.formats.fidelity import Fidelity
from lrconvert.formats.model_card import model_card, origin, sidecar
from lrconvert.lora.adapter import CompactAdapter

_WEIGHTS = "pytorch_lora_weights.safetensors"


def files(compact: CompactAdapter, options: ExportOptions, fidelity: Fidelity | None) -> Files:
    """See the module's docstring. Raises E-EXPORT for what diffusers has no name for."""
    refuse_extras(compact, "diffusers' layout")
    tensors = []
    ranks: dict[str, dict[str, int]] = {}
    for pair in pairs(compact, options):
        component, module = placed(pair.target, "diffusers' layout")
        ranks.setdefault(component, {})[module] = pair.rank
        down, up = unfolded(pair, "diffusers' layout")
        tensors.append(entry(f"{component}.{module}.lora_A.weight", options.dtype, down))
        tensors.append(entry(f"{component}.{module}.lora_B.weight", options.dtype, up))
    notes = origin(compact)
    if options.keep_ranks:
        notes["lora_adapter_metadata"] = _settings(ranks)
    return {
        _WEIGHTS: weights_file(sorted(tensors), notes),
        "README.md": [model_card(compact, "diffusers LoRA", options.command, fidelity, "diffusers")],
        "lrconvert.json": [config_file(sidecar(compact))],
    }


def _settings(ranks: Mapping[str, Mapping[str, int]]) -> str:
    """The configurations of all components, as diffusers flattens them. CLIP's modules stand without ``text_model``:
    PEFT finds them by their endings, whether the release of transformers has that level or not."""
    found: dict[str, object] = {}
    for component, own in ranks.items():
        top = Counter(own.values()).most_common(1)[0][0]
        own = {module.removeprefix("text_model."): rank for module, rank in sorted(own.items())}
        others = {module if module.startswith("encoder.") else f"^{module}": r for module, r in own.items() if r != top}
        settings = {
            "r": top,
            "lora_alpha": top,
            "rank_pattern": others,
            "alpha_pattern": others,
            "target_modules": sorted(own),
        }
        found |= {f"{component}.{key}": value for key, value in settings.items()}
    return json.dumps(found, indent=2, sort_keys=True)


EXPORTER = Exporter("diffusers", "diffusers pipeline LoRA", files)
