"""FLUX.2 (dev, klein): modulation is shared by all blocks, and a single block is two layers in diffusers, too."""

from __future__ import annotations

from lrconvert.formats.families.base import Family

FAMILY = Family(
    title="FLUX.2",
    classes=("Flux2Transformer2DModel",),
    original="""
        img_in -> x_embedder
        txt_in -> context_embedder
        time_in.in_layer -> time_guidance_embed.timestep_embedder.linear_1
        time_in.out_layer -> time_guidance_embed.timestep_embedder.linear_2
        guidance_in.in_layer -> time_guidance_embed.guidance_embedder.linear_1
        guidance_in.out_layer -> time_guidance_embed.guidance_embedder.linear_2
        double_stream_modulation_img.lin -> double_stream_modulation_img.linear
        double_stream_modulation_txt.lin -> double_stream_modulation_txt.linear
        single_stream_modulation.lin -> single_stream_modulation.linear
        double_blocks.#.img_attn.qkv -> transformer_blocks.#.attn.{to_q,to_k,to_v} : 1 1 1
        double_blocks.#.img_attn.proj -> transformer_blocks.#.attn.to_out.0
        double_blocks.#.img_mlp.0 -> transformer_blocks.#.ff.linear_in : 6
        double_blocks.#.img_mlp.2 -> transformer_blocks.#.ff.linear_out
        double_blocks.#.txt_attn.qkv -> transformer_blocks.#.attn.{add_q_proj,add_k_proj,add_v_proj} : 1 1 1
        double_blocks.#.txt_attn.proj -> transformer_blocks.#.attn.to_add_out
        double_blocks.#.txt_mlp.0 -> transformer_blocks.#.ff_context.linear_in : 6
        double_blocks.#.txt_mlp.2 -> transformer_blocks.#.ff_context.linear_out
        single_blocks.#.linear1 -> single_transformer_blocks.#.attn.to_qkv_mlp_proj : 9
        single_blocks.#.linear2 -> single_transformer_blocks.#.attn.to_out
        final_layer.linear -> proj_out
        final_layer.adaLN_modulation.1 -> norm_out.linear : 2 swapped
    """,
    depths={"transformer_blocks": (8, 5), "single_transformer_blocks": (48, 20, 24)},
)
