"""kohya (sd-scripts, musubi-tuner, and the user interfaces that follow them): ``lora_unet_<module>.lora_down.weight``
(r, in), ``.lora_up.weight`` (out, r) and ``.alpha``, the dots of the module's name as underscores; ``lora_te_``, or
``lora_te1_`` to ``lora_te3_``, for text encoders. The scale is alpha / r. With own ranks every alpha
is 1 and lora_up is multiplied by its rank instead: diffusers 0.42 scales wrongly where alphas differ. DoRA's magnitudes
are ``.dora_scale``, as LyCORIS has them; embeddings of words (``bundle_emb.``) are written back as they came, and
differences of biases are ``.diff_b``.

The UNet's modules have diffusers' names (``lora_unet_down_blocks_...``), as sd-scripts has them for Stable Diffusion 1
and 2; but for Stable Diffusion XL those of Stability AI's code (``lora_unet_input_blocks_4_1_...``), since sd-scripts
builds that UNet from it. Whether a UNet is SDXL's says the base's configuration. Without one it is
if its attention takes texts of 2048 numbers, the width of SDXL's two encoders together. A transformer's modules are
``lora_unet_``, too, and called as in the model's own code (``lora_unet_double_blocks_0_img_attn_qkv`` for FLUX), which
`formats.families` has; of a family that is not there ``lora_transformer_`` with diffusers' names, as OneTrainer has it.
"""

from __future__ import annotations

from lrconvert.formats.exporters.base import Exporter, ExportOptions, Folder
from lrconvert.formats.exporters.shared.diffusion import BESIDE, DENOISERS, PIPELINE, UNET, placed, spelled_entries
from lrconvert.formats.exporters.shared.files import weights_file
from lrconvert.formats.exporters.shared.plain import Pair, alpha_of, factors, refuse_extras
from lrconvert.formats.families import base as families
from lrconvert.formats.families.base import ORIGINAL
from lrconvert.formats.families.shared.spelling import Spelling
from lrconvert.lora.adapter import Adapter

_NAME = "lora.safetensors"
_LAYOUT = "kohya's layout"


def files(adapter: Adapter, options: ExportOptions) -> Folder:
    """Return the file of weights. Raises E-EXPORT for what the layout has no name for."""
    refuse_extras(adapter, _LAYOUT, BESIDE)
    made = factors(adapter, options, _of_alpha_one if options.keep_ranks else None)
    entries = spelled_entries(adapter, made, options, Spelling(_prefix(made.pairs), "lora_down", True), _LAYOUT)
    ranks = {pair.rank for pair in made.pairs}
    dim = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    alphas = sorted({float(alpha_of(pair.scale, pair.rank)) for pair in made.pairs})
    notes = {"ss_network_module": "networks.lora", "ss_network_dim": dim, "ss_network_alpha": f"{alphas[0]:g}"}
    return Folder({_NAME: weights_file(entries, adapter, **notes)}, made.notes)


def _of_alpha_one(pair: Pair) -> float:
    return 1 / pair.rank


def _prefix(pairs: list[Pair]) -> str:
    """Return what stands before the modules of a UNet, or of a transformer with the names of its own code."""
    layers = [placed(pair.target, _LAYOUT) for pair in pairs]
    denoisers = [(component, module) for component, module in layers if component in DENOISERS]
    own = all(component == UNET or families.is_known(module, ORIGINAL) for component, module in denoisers)
    return "lora_unet_" if own else "lora_transformer_"


EXPORTER = Exporter(
    "kohya",
    "a LoRA in kohya's layout (sd-scripts)",
    files,
    kind="kohya LoRA",
    library="diffusers",
    usage=PIPELINE.replace("{file}", _NAME),
    consumers=("diffusers", "comfyui"),
    own_names=True,
    is_flat=True,
    scheme=ORIGINAL,
)
