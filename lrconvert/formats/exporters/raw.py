"""A bare state dict, as loralib has it: ``<module>.lora_A`` (r, in) and ``<module>.lora_B`` (out, r) beside the base's
own names, for ``model.load_state_dict(..., strict=False)``. The scale is baked in: ``lora_alpha`` of the layers is
their rank, which the metadata repeats. Saved heads and biases stand under their own names.

Convolutions are refused: loralib's are products of other shapes.
"""

from __future__ import annotations

from lrconvert.core.errors import ExportError
from lrconvert.formats.exporters.base import Exporter, ExportOptions, Files
from lrconvert.formats.exporters.shared.files import Entry, entry, weights_file
from lrconvert.formats.exporters.shared.plain import exclude, module_of, pairs, refuse_extras
from lrconvert.lora.adapter import CompactAdapter

_LAYOUT = "a bare state dict"


def files(compact: CompactAdapter, options: ExportOptions) -> Files:
    """Return the file of weights. Raises E-EXPORT for what the layout cannot express."""
    refuse_extras(compact, _LAYOUT, allowed=("replace",))
    tensors: list[Entry] = [(e.name, e.dtype, e.shape, e.data) for e in compact.extras]
    ranks = set()
    for pair in pairs(compact, options):
        module = module_of(pair.target, _LAYOUT)
        if pair.target.view.kind == "conv":
            what = f"{pair.target.name!r:.120} is a convolution, whose factors have other shapes in {_LAYOUT}"
            raise ExportError(what, fix=exclude())
        tensors.append(entry(f"{module}.lora_A", options.dtype, pair.a))
        tensors.append(entry(f"{module}.lora_B", options.dtype, pair.b))
        ranks.add(pair.rank)
    alpha = str(ranks.pop()) if len(ranks) == 1 else "rank"
    return {"lora.safetensors": weights_file(tensors, compact, lora_alpha=alpha)}


EXPORTER = Exporter("raw", "a bare state dict, as loralib has it", files, kind="bare LoRA")
