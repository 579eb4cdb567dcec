"""kohya (sd-scripts, and the user interfaces that follow it): ``lora_unet_<module>.lora_down.weight`` (r, in),
``.lora_up.weight`` (out, r) and ``.alpha``, the dots of the module's name as underscores; ``lora_te_``, or
``lora_te1_`` and ``lora_te2_``, for text encoders. The scale is alpha / r. With own ranks every alpha
is 1 and lora_up is multiplied by its rank instead: diffusers 0.42 scales wrongly where alphas differ. DoRA's magnitudes
are ``.dora_scale``, as LyCORIS has them; embeddings of words (``bundle_emb.``) are written back as they came.

The UNet's modules have diffusers' names (``lora_unet_down_blocks_...``), as sd-scripts has them for Stable Diffusion 1
and 2; but for Stable Diffusion XL those of Stability AI's code (``lora_unet_input_blocks_4_1_...``), since sd-scripts
builds that UNet from it. Whether a UNet is SDXL's says the base's configuration. Without one it is
if its attention takes texts of 2048 numbers, the width of SDXL's two encoders together. A transformer's modules are
``lora_transformer_``, as OneTrainer writes and diffusers reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lrconvert.core.errors import ExportError
from lrconvert.formats import unet_names
from lrconvert.formats.exporters.base import Exporter, ExportOptions, Folder
from lrconvert.formats.exporters.shared.diffusion import PIPELINE, TRANSFORMER, UNET, placed
from lrconvert.formats.exporters.shared.files import Entry, entry, weights_file
from lrconvert.formats.exporters.shared.plain import (
    Pair,
    alpha_of,
    embeddings,
    exclude,
    factors,
    magnitudes,
    refuse_extras,
    unfolded,
)
from lrconvert.lora.adapter import MAGNITUDES, Adapter, ExtraTensor, Target

_NAME = "lora.safetensors"
_LAYOUT = "kohya's layout"
_CONTEXT = (".attn2.to_k", ".attn2.to_v")
_SDXL_CONTEXT = 2048


def files(adapter: Adapter, options: ExportOptions) -> Folder:
    """Return the file of weights. Raises E-EXPORT for what the layout has no name for."""
    refuse_extras(adapter, _LAYOUT, (*MAGNITUDES, "textual_inversion"))
    scaled = magnitudes(adapter)
    made = factors(adapter, options, _of_alpha_one if options.keep_ranks else None)
    layers = [(*placed(pair.target, _LAYOUT), pair) for pair in made.pairs]
    components = {component for component, _, _ in layers}
    originals = _originals(layers, options)
    tensors, owners = embeddings(adapter), dict[str, str]()
    for component, module, pair in layers:
        if component == UNET and originals is not None:
            module = _original(pair.target, module, originals)
        name = f"{_prefix(component, components, originals is not None)}_{module.replace('.', '_')}"
        if name in owners:
            what = f"{pair.target.name!r:.120} and {owners[name]!r:.120} have one name there, {name!r:.120}"
            raise ExportError(what, fix=exclude())
        owners[name] = pair.target.name
        down, up = unfolded(pair, _LAYOUT)
        tensors.append(entry(f"{name}.lora_down.weight", made.dtype, down))
        tensors.append(entry(f"{name}.lora_up.weight", made.dtype, up))
        if pair.target.name in scaled:
            tensors.append(_dora_scale(name, pair.target, scaled[pair.target.name]))
        tensors.append(entry(f"{name}.alpha", "F32", np.full((), alpha_of(pair.scale, pair.rank), np.float32)))
    ranks = {pair.rank for _, _, pair in layers}
    dim = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    alphas = sorted({float(alpha_of(pair.scale, pair.rank)) for _, _, pair in layers})
    notes = {"ss_network_module": "networks.lora", "ss_network_dim": dim, "ss_network_alpha": f"{alphas[0]:g}"}
    return Folder({_NAME: weights_file(tensors, adapter, **notes)}, made.notes)


def _dora_scale(name: str, target: Target, extra: ExtraTensor) -> Entry:
    """DoRA's magnitudes as LyCORIS has them: (out, 1, ...) of outputs, (1, in, ...) of inputs."""
    ones = (1,) * (len(target.shape) - 2)
    by_output = extra.use == "magnitude"
    shape = (target.out_features, 1, *ones) if by_output else (1, target.channels, *ones)
    return f"{name}.dora_scale", extra.dtype, shape, extra.data


def _of_alpha_one(pair: Pair) -> float:
    return 1 / pair.rank


def _originals(layers: Sequence[tuple[str, str, Pair]], options: ExportOptions) -> Mapping[str, str] | None:
    """Return the table of names if the UNet is SDXL's, else None."""
    if options.base_config is not None:
        is_sdxl = unet_names.is_sdxl(options.base_config)
    else:
        widths = {p.target.in_features for c, m, p in layers if c == UNET and m.endswith(_CONTEXT)}
        is_sdxl = widths == {_SDXL_CONTEXT}
    return unet_names.stability_names(levels=3) if is_sdxl else None


def _original(target: Target, module: str, originals: Mapping[str, str]) -> str:
    name = unet_names.renamed(module, originals, ".")
    if name is None:
        what = f"{target.name!r:.120} has no name in the code of Stable Diffusion XL, which sd-scripts follows"
        raise ExportError(what, fix=exclude())
    return name


def _prefix(component: str, components: set[str], sdxl: bool) -> str:
    if component in (UNET, TRANSFORMER):
        return f"lora_{component}"
    if component == "text_encoder":
        return "lora_te" if components <= {UNET, "text_encoder"} and not sdxl else "lora_te1"
    return f"lora_te{component[-1]}"


EXPORTER = Exporter(
    "kohya",
    "a LoRA in kohya's layout (sd-scripts)",
    files,
    kind="kohya LoRA",
    library="diffusers",
    usage=PIPELINE.replace("{file}", _NAME),
    own_names=True,
)
