"""Z-Image: one file of weights for images in patches of 2, whose first and last layers diffusers numbers."""

from __future__ import annotations

from lrconvert.formats.families.base import Family

_BLOCKS = ("layers.#", "noise_refiner.#", "context_refiner.#")
_RENAMED = """
    {block}.attention.qkv -> {block}.attention.[to_q,to_k,to_v] : 1 1 1
    {block}.attention.out -> {block}.attention.to_out.0
"""
_SAME = """
    {block}.feed_forward.w1
    {block}.feed_forward.w2
    {block}.feed_forward.w3
    {block}.adaLN_modulation.0
"""


def _each(text: str) -> str:
    every = "".join(text.format(block=block) for block in _BLOCKS)
    return every.replace("[", "{").replace("]", "}")


FAMILY = Family(
    title="Z-Image",
    classes=("ZImageTransformer2DModel",),
    original=_each(_RENAMED)
    + """
        x_embedder -> all_x_embedder.2-1
        final_layer.linear -> all_final_layer.2-1.linear
        final_layer.adaLN_modulation.1 -> all_final_layer.2-1.adaLN_modulation.1
    """,
    same=_each(_SAME)
    + """
        cap_embedder.1
        t_embedder.mlp.0
        t_embedder.mlp.2
    """,
    depths={"layers": (30,), "noise_refiner": (2,), "context_refiner": (2,)},
)
