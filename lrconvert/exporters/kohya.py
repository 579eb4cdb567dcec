"""kohya (sd-scripts, and the user interfaces that follow it): ``lora_unet_<module>.lora_down.weight`` (r, in),
``.lora_up.weight`` (out, r) and ``.alpha``, the dots of the module's name as underscores; ``lora_te_``, or
``lora_te1_`` and ``lora_te2_``, for text encoders. alpha = r, so that the scale is 1. With own ranks every alpha
is 1 and lora_up is multiplied by its rank instead: diffusers 0.42 scales wrongly where alphas differ.

The UNet's modules have diffusers' names, which sd-scripts uses for Stable Diffusion 1 and 2 and which diffusers and
ComfyUI read for SDXL, too. A transformer's are ``lora_transformer_``, as OneTrainer writes and diffusers reads them.
"""

from __future__ import annotations

import numpy as np

from lrconvert.adapter import CompactAdapter
from lrconvert.errors import ExportError
from lrconvert.exporters.base import Exporter, ExportOptions, Files
from lrconvert.exporters.diffusion import TRANSFORMER, UNET, placed
from lrconvert.exporters.peft_lora import config_file, weights_file
from lrconvert.exporters.plain import EXCLUDE, entry, pairs, refuse_extras, unfolded
from lrconvert.modelcard import model_card, origin, sidecar
from lrconvert.report import Fidelity

_LAYOUT = "kohya's layout"


def files(compact: CompactAdapter, options: ExportOptions, fidelity: Fidelity | None) -> Files:
    """See the module's docstring. Raises E-EXPORT for what the layout has no name for."""
    refuse_extras(compact, _LAYOUT)
    found = [(*placed(pair.target, _LAYOUT), pair) for pair in pairs(compact, options)]
    components = {component for component, _, _ in found}
    tensors, owners = [], dict[str, str]()
    for component, module, pair in found:
        name = f"{_prefix(component, components)}_{module.replace('.', '_')}"
        if name in owners:
            what = f"{pair.target.name!r:.120} and {owners[name]!r:.120} have one name there, {name!r:.120}"
            raise ExportError(what, fix=EXCLUDE)
        owners[name] = pair.target.name
        down, up = unfolded(pair, _LAYOUT)
        tensors.append(entry(f"{name}.lora_down.weight", options.dtype, down))
        alpha = 1 if options.keep_ranks else pair.rank
        up = up.astype(np.float64) * (pair.rank / alpha)
        tensors.append(entry(f"{name}.lora_up.weight", options.dtype, up))
        tensors.append(entry(f"{name}.alpha", "F32", np.full((), alpha, np.float32)))
    ranks = {pair.rank for _, _, pair in found}
    dim = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    alphas = "1" if options.keep_ranks else dim
    notes = {"ss_network_module": "networks.lora", "ss_network_dim": dim, "ss_network_alpha": alphas}
    return {
        "lora.safetensors": weights_file(sorted(tensors), {**notes, **origin(compact)}),
        "README.md": [model_card(compact, "kohya LoRA", options.command, fidelity, "diffusers")],
        "lrconvert.json": [config_file(sidecar(compact))],
    }


def _prefix(component: str, components: set[str]) -> str:
    if component in (UNET, TRANSFORMER):
        return f"lora_{component}"
    if component == "text_encoder":
        return "lora_te" if components <= {UNET, "text_encoder"} else "lora_te1"
    return f"lora_te{component[-1]}"


EXPORTER = Exporter("kohya", "kohya / sd-scripts LoRA", files)
