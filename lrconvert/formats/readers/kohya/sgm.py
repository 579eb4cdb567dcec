"""Blocks of a UNet as Stability AI's code calls them (``input_blocks_4_1``), which is what sd-scripts writes for SDXL,
in the words of diffusers (``down_blocks_1_attentions_0``). Both with underscores for dots, or both with dots, as
ComfyUI has them; the table is that of `lrconvert.formats.unet_names`, by which the exporter goes the other way.
"""

from __future__ import annotations

from lrconvert.formats import unet_names
from lrconvert.formats.readers.shared.naming import Component

_MOST_LAYERS = 16


def renamed(inside: str, component: Component, separator: str = "_") -> str:
    """Return `inside` in diffusers' words if the base is in diffusers'; unchanged if it is not in the other's."""
    if component.config.get("_class_name") != unet_names.CLASS:
        return inside
    stated = component.config.get("layers_per_block", 2)
    layers = stated if type(stated) is int and 0 < stated <= _MOST_LAYERS else 2
    theirs = {
        original.replace(".", separator): ours.replace(".", separator)
        for attended in (True, False)
        for ours, original in unet_names.stability_names(layers=layers, attended=attended).items()
    }
    return unet_names.renamed(inside, theirs, separator) or inside
