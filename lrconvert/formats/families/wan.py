"""Wan 2.1 and 2.2, from text, image, and with VACE's control blocks. Wan 2.2 has two transformers of these names."""

from __future__ import annotations

from lrconvert.formats.families.base import Family

_BLOCK = """
    {0}.self_attn.q -> {0}.attn1.to_q
    {0}.self_attn.k -> {0}.attn1.to_k
    {0}.self_attn.v -> {0}.attn1.to_v
    {0}.self_attn.o -> {0}.attn1.to_out.0
    {0}.cross_attn.q -> {0}.attn2.to_q
    {0}.cross_attn.k -> {0}.attn2.to_k
    {0}.cross_attn.v -> {0}.attn2.to_v
    {0}.cross_attn.o -> {0}.attn2.to_out.0
    {0}.cross_attn.k_img -> {0}.attn2.add_k_proj
    {0}.cross_attn.v_img -> {0}.attn2.add_v_proj
    {0}.ffn.0 -> {0}.ffn.net.0.proj
    {0}.ffn.2 -> {0}.ffn.net.2
"""

FAMILY = Family(
    title="Wan 2.1 and 2.2",
    classes=("WanTransformer3DModel", "WanVACETransformer3DModel", "SkyReelsV2Transformer3DModel"),
    original=_BLOCK.format("blocks.#")
    + _BLOCK.format("vace_blocks.#")
    + """
        vace_blocks.#.before_proj -> vace_blocks.#.proj_in
        vace_blocks.#.after_proj -> vace_blocks.#.proj_out
        text_embedding.0 -> condition_embedder.text_embedder.linear_1
        text_embedding.2 -> condition_embedder.text_embedder.linear_2
        time_embedding.0 -> condition_embedder.time_embedder.linear_1
        time_embedding.2 -> condition_embedder.time_embedder.linear_2
        time_projection.1 -> condition_embedder.time_proj
        img_emb.proj.1 -> condition_embedder.image_embedder.ff.net.0.proj
        img_emb.proj.3 -> condition_embedder.image_embedder.ff.net.2
        head.head -> proj_out
        blocks.#.norm3 -> blocks.#.norm2
        vace_blocks.#.norm3 -> vace_blocks.#.norm2
        img_emb.proj.0 -> condition_embedder.image_embedder.norm1
        img_emb.proj.4 -> condition_embedder.image_embedder.norm2
        blocks.#.self_attn.norm_q -> blocks.#.attn1.norm_q
        blocks.#.self_attn.norm_k -> blocks.#.attn1.norm_k
        blocks.#.cross_attn.norm_q -> blocks.#.attn2.norm_q
        blocks.#.cross_attn.norm_k -> blocks.#.attn2.norm_k
        blocks.#.cross_attn.norm_k_img -> blocks.#.attn2.norm_added_k
    """,
    same="""
        patch_embedding
        vace_patch_embedding
    """,
    depths={"blocks": (30, 40)},
)
