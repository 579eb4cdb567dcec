"""HunyuanVideo, with the names of Tencent's code. Those that ComfyUI gives its modules are FLUX's, whose LoRAs nobody
trains; it loads these."""

from __future__ import annotations

from lrconvert.formats.families.base import Family

_REFINER = "txt_in.individual_token_refiner.blocks.#"
_REFINED = "context_embedder.token_refiner.refiner_blocks.#"

FAMILY = Family(
    title="HunyuanVideo",
    classes=("HunyuanVideoTransformer3DModel",),
    original=f"""
        img_in.proj -> x_embedder.proj
        time_in.mlp.0 -> time_text_embed.timestep_embedder.linear_1
        time_in.mlp.2 -> time_text_embed.timestep_embedder.linear_2
        vector_in.in_layer -> time_text_embed.text_embedder.linear_1
        vector_in.out_layer -> time_text_embed.text_embedder.linear_2
        guidance_in.mlp.0 -> time_text_embed.guidance_embedder.linear_1
        guidance_in.mlp.2 -> time_text_embed.guidance_embedder.linear_2
        double_blocks.#.img_mod.linear -> transformer_blocks.#.norm1.linear
        double_blocks.#.img_attn_qkv -> transformer_blocks.#.attn.{{to_q,to_k,to_v}} : 1 1 1
        double_blocks.#.img_attn_proj -> transformer_blocks.#.attn.to_out.0
        double_blocks.#.img_mlp.fc1 -> transformer_blocks.#.ff.net.0.proj
        double_blocks.#.img_mlp.fc2 -> transformer_blocks.#.ff.net.2
        double_blocks.#.txt_mod.linear -> transformer_blocks.#.norm1_context.linear
        double_blocks.#.txt_attn_qkv -> transformer_blocks.#.attn.{{add_q_proj,add_k_proj,add_v_proj}} : 1 1 1
        double_blocks.#.txt_attn_proj -> transformer_blocks.#.attn.to_add_out
        double_blocks.#.txt_mlp.fc1 -> transformer_blocks.#.ff_context.net.0.proj
        double_blocks.#.txt_mlp.fc2 -> transformer_blocks.#.ff_context.net.2
        single_blocks.#.linear1 -> single_transformer_blocks.#.{{attn.to_q,attn.to_k,attn.to_v,proj_mlp}} : 1 1 1 4
        single_blocks.#.linear2 -> single_transformer_blocks.#.proj_out
        single_blocks.#.modulation.linear -> single_transformer_blocks.#.norm.linear
        txt_in.input_embedder -> context_embedder.proj_in
        txt_in.t_embedder.mlp.0 -> context_embedder.time_text_embed.timestep_embedder.linear_1
        txt_in.t_embedder.mlp.2 -> context_embedder.time_text_embed.timestep_embedder.linear_2
        txt_in.c_embedder.linear_1 -> context_embedder.time_text_embed.text_embedder.linear_1
        txt_in.c_embedder.linear_2 -> context_embedder.time_text_embed.text_embedder.linear_2
        {_REFINER}.self_attn_qkv -> {_REFINED}.attn.{{to_q,to_k,to_v}} : 1 1 1
        {_REFINER}.self_attn_proj -> {_REFINED}.attn.to_out.0
        {_REFINER}.mlp.fc1 -> {_REFINED}.ff.net.0.proj
        {_REFINER}.mlp.fc2 -> {_REFINED}.ff.net.2
        {_REFINER}.adaLN_modulation.1 -> {_REFINED}.norm_out.linear
        final_layer.linear -> proj_out
        final_layer.adaLN_modulation.1 -> norm_out.linear : 2 swapped
    """,
    depths={"transformer_blocks": (20,), "single_transformer_blocks": (40,)},
)
