"""Lumina-Image 2.0: fewer keys and values than queries; refiners before the layers, that of the text without
modulation."""

from __future__ import annotations

from lrconvert.formats.families.base import Family

_BLOCKS = ("layers.#", "noise_refiner.#", "context_refiner.#")
_BLOCK = """
    {block}.attention.qkv -> {block}.attn.[to_q,to_k,to_v] : 1 * *
    {block}.attention.out -> {block}.attn.to_out.0
    {block}.feed_forward.w1 -> {block}.feed_forward.linear_1
    {block}.feed_forward.w2 -> {block}.feed_forward.linear_2
    {block}.feed_forward.w3 -> {block}.feed_forward.linear_3
    {block}.adaLN_modulation.1 -> {block}.norm1.linear
"""

FAMILY = Family(
    title="Lumina-Image 2.0",
    classes=("Lumina2Transformer2DModel",),
    original="".join(_BLOCK.format(block=block) for block in _BLOCKS).replace("[", "{").replace("]", "}")
    + """
        cap_embedder.1 -> time_caption_embed.caption_embedder.1
        t_embedder.mlp.0 -> time_caption_embed.timestep_embedder.linear_1
        t_embedder.mlp.2 -> time_caption_embed.timestep_embedder.linear_2
        final_layer.adaLN_modulation.1 -> norm_out.linear_1
        final_layer.linear -> norm_out.linear_2
    """,
    same="x_embedder",
    depths={"layers": (26,), "noise_refiner": (2,), "context_refiner": (2,)},
)
