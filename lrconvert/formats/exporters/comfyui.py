"""ComfyUI's own layout, which ai-toolkit, diffusion-pipe and others write, too: ``diffusion_model.<module>`` with
``.lora_A.weight`` (r, in) and ``.lora_B.weight`` (out, r), and ``.alpha`` where the scale alpha / r is not 1.

Modules have the names of the model's own code: ``diffusion_model.double_blocks.0.img_attn.qkv`` for FLUX,
``diffusion_model.blocks.0.self_attn.q`` for Wan, Stability AI's for UNets. Where that code has one layer for several of
diffusers', their updates become one, exactly (`formats.families`). Text encoders are
``text_encoders.clip_l.transformer.``, ``clip_g`` and ``t5xxl``. Every module keeps its rank.
"""

from __future__ import annotations

from lrconvert.formats.exporters.base import Exporter, ExportOptions, Folder
from lrconvert.formats.exporters.shared.diffusion import own_ranks, spelled_entries
from lrconvert.formats.exporters.shared.files import weights_file
from lrconvert.formats.families.base import ORIGINAL
from lrconvert.formats.families.shared.spelling import Spelling
from lrconvert.lora.adapter import Adapter

_NAME = "lora.safetensors"
_LAYOUT = "ComfyUI's layout"
_SPELLING = Spelling("diffusion_model.", "lora_A", False)


def files(adapter: Adapter, options: ExportOptions) -> Folder:
    """Return the file of weights. Raises E-EXPORT for what the layout has no name for."""
    made = own_ranks(adapter, options, _SPELLING, _LAYOUT)
    entries = spelled_entries(adapter, made, options, _SPELLING, _LAYOUT)
    return Folder({_NAME: weights_file(entries, adapter)}, made.notes)


EXPORTER = Exporter(
    "comfyui",
    "a LoRA in ComfyUI's own layout",
    files,
    kind="ComfyUI LoRA",
    library="ComfyUI",
    usage=f"sh\n# for {{base}}; then choose it in the node Load LoRA\ncp THIS-FOLDER/{_NAME} ComfyUI/models/loras/",
    consumers=("comfyui",),
    own_names=True,
    scheme=ORIGINAL,
)
