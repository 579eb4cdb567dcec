"""The spelling of the file that an adapter was read from: its prefix, its names of modules and of factors, alphas if it
had some. For diffusion models, whose trainers each have their own; every module keeps its rank.
"""

from __future__ import annotations

from lrconvert.core.errors import ExportError
from lrconvert.formats.exporters.base import Exporter, ExportOptions, Folder
from lrconvert.formats.exporters.shared.diffusion import BESIDE, as_spelled, own_ranks, spelled_entries
from lrconvert.formats.exporters.shared.files import weights_file
from lrconvert.formats.exporters.shared.plain import refuse_extras
from lrconvert.formats.families.shared import spelling
from lrconvert.lora.adapter import Adapter

_NAME = "lora.safetensors"
_LAYOUT = "the layout of the source"


def files(adapter: Adapter, options: ExportOptions) -> Folder:
    """Return the file of weights. Raises E-EXPORT for an adapter whose file had no spelling that is written here."""
    refuse_extras(adapter, _LAYOUT, BESIDE)
    own = spelling.parse(adapter.provenance.fields.get(spelling.FIELD, ""))
    if own is None:
        what = "nothing says how the file that this adapter comes from spelled its names"
        raise ExportError(what, fix="name a layout: diffusers, comfyui, kohya or onetrainer; peft-lora for others")
    made = own_ranks(adapter, options, own, _LAYOUT)
    entries = spelled_entries(adapter, made, options, own, _LAYOUT, as_spelled)
    return Folder({_NAME: weights_file(entries, adapter)}, made.notes)


EXPORTER = Exporter(
    "original",
    "a LoRA of a diffusion model, spelled as the file that it was read from",
    files,
    kind="LoRA",
    own_names=True,
    scheme="",
)
