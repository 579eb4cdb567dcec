"""Stable Diffusion 3 and 3.5. The last block's modulation of the text is of two parts, in the other order, where those
of the blocks before it have six."""

from __future__ import annotations

from lrconvert.formats.families.base import Family

FAMILY = Family(
    title="Stable Diffusion 3",
    classes=("SD3Transformer2DModel",),
    original="""
        x_embedder.proj -> pos_embed.proj
        t_embedder.mlp.0 -> time_text_embed.timestep_embedder.linear_1
        t_embedder.mlp.2 -> time_text_embed.timestep_embedder.linear_2
        y_embedder.mlp.0 -> time_text_embed.text_embedder.linear_1
        y_embedder.mlp.2 -> time_text_embed.text_embedder.linear_2
        joint_blocks.#.x_block.attn.qkv -> transformer_blocks.#.attn.{to_q,to_k,to_v} : 1 1 1
        joint_blocks.#.x_block.attn.proj -> transformer_blocks.#.attn.to_out.0
        joint_blocks.#.x_block.attn2.qkv -> transformer_blocks.#.attn2.{to_q,to_k,to_v} : 1 1 1
        joint_blocks.#.x_block.attn2.proj -> transformer_blocks.#.attn2.to_out.0
        joint_blocks.#.x_block.mlp.fc1 -> transformer_blocks.#.ff.net.0.proj
        joint_blocks.#.x_block.mlp.fc2 -> transformer_blocks.#.ff.net.2
        joint_blocks.#.x_block.adaLN_modulation.1 -> transformer_blocks.#.norm1.linear
        joint_blocks.#.context_block.attn.qkv -> transformer_blocks.#.attn.{add_q_proj,add_k_proj,add_v_proj} : 1 1 1
        joint_blocks.#.context_block.attn.proj -> transformer_blocks.#.attn.to_add_out
        joint_blocks.#.context_block.mlp.fc1 -> transformer_blocks.#.ff_context.net.0.proj
        joint_blocks.#.context_block.mlp.fc2 -> transformer_blocks.#.ff_context.net.2
        joint_blocks.#.context_block.adaLN_modulation.1 -> transformer_blocks.#.norm1_context.linear : 6
        joint_blocks.#.context_block.adaLN_modulation.1 -> transformer_blocks.#.norm1_context.linear : 2 swapped
        final_layer.linear -> proj_out
        final_layer.adaLN_modulation.1 -> norm_out.linear : 2 swapped
    """,
    same="context_embedder",
    depths={"transformer_blocks": (24, 38)},
)
