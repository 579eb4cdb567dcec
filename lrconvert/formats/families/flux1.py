"""FLUX.1 (dev, schnell, Kontext, Fill). XLabs trains attention alone, under names of its own: the rows of queries, keys
and values of a single block, which are part of linear1 elsewhere, are a layer there."""

from __future__ import annotations

from lrconvert.formats.families.base import Family

FAMILY = Family(
    title="FLUX.1",
    classes=("FluxTransformer2DModel",),
    original="""
        img_in -> x_embedder
        txt_in -> context_embedder
        time_in.in_layer -> time_text_embed.timestep_embedder.linear_1
        time_in.out_layer -> time_text_embed.timestep_embedder.linear_2
        vector_in.in_layer -> time_text_embed.text_embedder.linear_1
        vector_in.out_layer -> time_text_embed.text_embedder.linear_2
        guidance_in.in_layer -> time_text_embed.guidance_embedder.linear_1
        guidance_in.out_layer -> time_text_embed.guidance_embedder.linear_2
        double_blocks.#.img_mod.lin -> transformer_blocks.#.norm1.linear : 6
        double_blocks.#.img_attn.qkv -> transformer_blocks.#.attn.{to_q,to_k,to_v} : 1 1 1
        double_blocks.#.img_attn.proj -> transformer_blocks.#.attn.to_out.0
        double_blocks.#.img_mlp.0 -> transformer_blocks.#.ff.net.0.proj : 4
        double_blocks.#.img_mlp.2 -> transformer_blocks.#.ff.net.2
        double_blocks.#.txt_mod.lin -> transformer_blocks.#.norm1_context.linear : 6
        double_blocks.#.txt_attn.qkv -> transformer_blocks.#.attn.{add_q_proj,add_k_proj,add_v_proj} : 1 1 1
        double_blocks.#.txt_attn.proj -> transformer_blocks.#.attn.to_add_out
        double_blocks.#.txt_mlp.0 -> transformer_blocks.#.ff_context.net.0.proj : 4
        double_blocks.#.txt_mlp.2 -> transformer_blocks.#.ff_context.net.2
        single_blocks.#.linear1 -> single_transformer_blocks.#.{attn.to_q,attn.to_k,attn.to_v,proj_mlp} : 1 1 1 4
        single_blocks.#.linear2 -> single_transformer_blocks.#.proj_out
        single_blocks.#.modulation.lin -> single_transformer_blocks.#.norm.linear : 3
        final_layer.linear -> proj_out
        final_layer.adaLN_modulation.1 -> norm_out.linear : 2 swapped
    """,
    others={
        "xlabs": """
            double_blocks.#.processor.qkv_lora1 -> transformer_blocks.#.attn.{to_q,to_k,to_v} : 1 1 1
            double_blocks.#.processor.qkv_lora2 -> transformer_blocks.#.attn.{add_q_proj,add_k_proj,add_v_proj} : 1 1 1
            double_blocks.#.processor.proj_lora1 -> transformer_blocks.#.attn.to_out.0
            double_blocks.#.processor.proj_lora2 -> transformer_blocks.#.attn.to_add_out
            single_blocks.#.processor.qkv_lora -> single_transformer_blocks.#.attn.{to_q,to_k,to_v} : 1 1 1
            single_blocks.#.processor.proj_lora -> single_transformer_blocks.#.proj_out
        """
    },
    depths={"transformer_blocks": (19,), "single_transformer_blocks": (38,)},
)
