"""LTX-Video."""

from __future__ import annotations

from lrconvert.formats.families.base import Family

FAMILY = Family(
    title="LTX-Video",
    classes=("LTXVideoTransformer3DModel",),
    original="""
        patchify_proj -> proj_in
        adaln_single.linear -> time_embed.linear
        adaln_single.emb.timestep_embedder.linear_1 -> time_embed.emb.timestep_embedder.linear_1
        adaln_single.emb.timestep_embedder.linear_2 -> time_embed.emb.timestep_embedder.linear_2
    """,
    same="""
        caption_projection.linear_1
        caption_projection.linear_2
        transformer_blocks.#.attn1.to_q
        transformer_blocks.#.attn1.to_k
        transformer_blocks.#.attn1.to_v
        transformer_blocks.#.attn1.to_out.0
        transformer_blocks.#.attn2.to_q
        transformer_blocks.#.attn2.to_k
        transformer_blocks.#.attn2.to_v
        transformer_blocks.#.attn2.to_out.0
        transformer_blocks.#.ff.net.0.proj
        transformer_blocks.#.ff.net.2
        proj_out
    """,
    depths={"transformer_blocks": (28, 48)},
)
