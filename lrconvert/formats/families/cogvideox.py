"""CogVideoX, which is trained with diffusers; ComfyUI's nodes for it take diffusers' names."""

from __future__ import annotations

from lrconvert.formats.families.base import Family

FAMILY = Family(
    title="CogVideoX",
    classes=("CogVideoXTransformer3DModel",),
    same="""
        patch_embed.proj
        patch_embed.text_proj
        time_embedding.linear_1
        time_embedding.linear_2
        ofs_embedding.linear_1
        ofs_embedding.linear_2
        transformer_blocks.#.norm1.linear
        transformer_blocks.#.norm2.linear
        transformer_blocks.#.attn1.to_q
        transformer_blocks.#.attn1.to_k
        transformer_blocks.#.attn1.to_v
        transformer_blocks.#.attn1.to_out.0
        transformer_blocks.#.ff.net.0.proj
        transformer_blocks.#.ff.net.2
        norm_out.linear
        proj_out
    """,
    depths={"transformer_blocks": (30, 42)},
)
