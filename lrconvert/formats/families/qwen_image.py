"""Qwen-Image (and Edit), whose own code has diffusers' names."""

from __future__ import annotations

from lrconvert.formats.families.base import Family

FAMILY = Family(
    title="Qwen-Image",
    classes=("QwenImageTransformer2DModel",),
    same="""
        img_in
        txt_in
        time_text_embed.timestep_embedder.linear_1
        time_text_embed.timestep_embedder.linear_2
        transformer_blocks.#.img_mod.1
        transformer_blocks.#.txt_mod.1
        transformer_blocks.#.attn.to_q
        transformer_blocks.#.attn.to_k
        transformer_blocks.#.attn.to_v
        transformer_blocks.#.attn.to_out.0
        transformer_blocks.#.attn.add_q_proj
        transformer_blocks.#.attn.add_k_proj
        transformer_blocks.#.attn.add_v_proj
        transformer_blocks.#.attn.to_add_out
        transformer_blocks.#.img_mlp.net.0.proj
        transformer_blocks.#.img_mlp.net.2
        transformer_blocks.#.txt_mlp.net.0.proj
        transformer_blocks.#.txt_mlp.net.2
        norm_out.linear
        proj_out
    """,
    depths={"transformer_blocks": (60,)},
)
