"""Blocks of a UNet as Stability AI's code calls them (``input_blocks_4_1``), which is what sd-scripts writes for SDXL,
in the words of diffusers (``down_blocks_1_attentions_0``). Both with underscores for dots.

Each level of the UNet has L layers and then, but for the last, one that changes the resolution; going up, L + 1 layers.
"""

from __future__ import annotations

import re

from lrconvert.readers.naming import Component

_BLOCK = re.compile(r"(?P<part>input_blocks|output_blocks)_(?P<block>\d{1,4})_(?P<sub>\d)(?:_(?P<rest>.+))?")
_MIDDLE = re.compile(r"middle_block_(?P<sub>[0-2])_(?P<rest>.+)")
_WHOLE = {
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
}
_RESNET = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}


def renamed(inside: str, component: Component) -> str:
    """`inside` in diffusers' words if it is in the other's and the base in diffusers'; unchanged if not."""
    if component.config.get("_class_name") != "UNet2DConditionModel":
        return inside
    if inside in _WHOLE:
        return _WHOLE[inside]
    layers = component.config.get("layers_per_block", 2)
    count = layers if type(layers) is int and layers > 0 else 2
    middle = _MIDDLE.fullmatch(inside)
    if middle:
        sub, rest = int(middle["sub"]), middle["rest"]
        return (
            f"mid_block_attentions_0_{rest}" if sub == 1 else f"mid_block_resnets_{sub // 2}_{_RESNET.get(rest, rest)}"
        )
    found = _BLOCK.fullmatch(inside)
    if not found or not found["rest"]:
        return inside
    down = found["part"] == "input_blocks"
    level, layer = divmod(int(found["block"]) - down, count + 1)
    rest, side = found["rest"], "down" if down else "up"
    if down and layer == count:
        return f"down_blocks_{level}_downsamplers_0_conv" if rest == "op" else inside
    if rest == "conv" and not down:
        return f"up_blocks_{level}_upsamplers_0_conv"
    if found["sub"] == "0":
        return f"{side}_blocks_{level}_resnets_{layer}_{_RESNET.get(rest, rest)}"
    return f"{side}_blocks_{level}_attentions_{layer}_{rest}"
