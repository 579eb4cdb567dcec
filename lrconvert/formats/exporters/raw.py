"""A bare state dict, as loralib has it: ``<module>.lora_A`` (r, in) and ``<module>.lora_B`` (out, r) beside the base's
own names, for ``model.load_state_dict(..., strict=False)``. The metadata state the ``lora_alpha`` with which the layers
are made ("rank": the rank of each, a scale of 1). Saved heads and biases stand under their own names.

Convolutions are refused: loralib's are products of other shapes.
"""

from __future__ import annotations

from lrconvert.core.errors import ExportError
from lrconvert.formats.exporters.base import Exporter, ExportOptions, Folder
from lrconvert.formats.exporters.shared.files import Entry, entry, weights_file
from lrconvert.formats.exporters.shared.plain import alpha_of, exclude, factors, module_of, refuse_extras, unscaled
from lrconvert.lora.adapter import Adapter

_LAYOUT = "a bare state dict"


def files(adapter: Adapter, options: ExportOptions) -> Folder:
    """Return the file of weights. Raises E-EXPORT for what the layout cannot express."""
    refuse_extras(adapter, _LAYOUT, allowed=("replace",))
    tensors: list[Entry] = [(e.name, e.dtype, e.shape, e.data) for e in adapter.extras]
    ranks = set()
    made = factors(adapter, options, unscaled if options.keep_ranks else None)
    for pair in made.pairs:
        module = module_of(pair.target, _LAYOUT)
        if pair.target.view.kind == "conv":
            what = f"{pair.target.name!r:.120} is a convolution, whose factors have other shapes in {_LAYOUT}"
            raise ExportError(what, fix=exclude())
        tensors.append(entry(f"{module}.lora_A", made.dtype, pair.a))
        tensors.append(entry(f"{module}.lora_B", made.dtype, pair.b))
        ranks.add(pair.rank)
    alpha = "rank" if len(ranks) > 1 else f"{alpha_of(made.scale, ranks.pop()):.17g}"
    return Folder({"lora.safetensors": weights_file(tensors, adapter, lora_alpha=alpha)}, made.notes)


_USAGE = """python
from safetensors.torch import load_file

# model: {base} with loralib's layers of the file's rank, and the lora_alpha of its metadata
model.load_state_dict(load_file("lora.safetensors"), strict=False)"""
EXPORTER = Exporter("raw", "a bare state dict, as loralib has it", files, kind="bare LoRA", usage=_USAGE)
