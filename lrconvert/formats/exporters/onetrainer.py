"""OneTrainer's layout: kohya's, but a transformer's modules are ``lora_transformer_`` and called as in diffusers.
ComfyUI and diffusers read it for FLUX.1 and Stable Diffusion 3. Every module keeps its rank.
"""

from __future__ import annotations

from lrconvert.formats.exporters.base import Exporter, ExportOptions, Folder
from lrconvert.formats.exporters.shared.diffusion import BESIDE, PIPELINE, UNET, own_ranks, placed, spelled_entries
from lrconvert.formats.exporters.shared.files import weights_file
from lrconvert.formats.exporters.shared.plain import refuse_extras
from lrconvert.formats.families.shared.spelling import Spelling
from lrconvert.lora.adapter import Adapter

_NAME = "lora.safetensors"
_LAYOUT = "OneTrainer's layout"


def files(adapter: Adapter, options: ExportOptions) -> Folder:
    """Return the file of weights. Raises E-EXPORT for what the layout has no name for."""
    refuse_extras(adapter, _LAYOUT, BESIDE)
    is_unet = any(placed(target, _LAYOUT)[0] == UNET for target in adapter.shapes())
    spelling = Spelling("lora_unet_" if is_unet else "lora_transformer_", "lora_down", True)
    made = own_ranks(adapter, options, spelling, _LAYOUT)
    entries = spelled_entries(adapter, made, options, spelling, _LAYOUT)
    return Folder({_NAME: weights_file(entries, adapter)}, made.notes)


EXPORTER = Exporter(
    "onetrainer",
    "a LoRA in OneTrainer's layout",
    files,
    kind="OneTrainer LoRA",
    library="diffusers",
    usage=PIPELINE.replace("{file}", _NAME),
    own_names=True,
    is_flat=True,
)
