"""HiDream-I1, whose own code has diffusers' names."""

from __future__ import annotations

from lrconvert.formats.families.base import Family

_BLOCKS = ("double_stream_blocks.#.block", "single_stream_blocks.#.block")
_ATTENTION = ("to_q", "to_k", "to_v", "to_out", "to_q_t", "to_k_t", "to_v_t", "to_out_t")
_FORWARD = ("ff_i.shared_experts", "ff_i.experts.#", "ff_t", "ff_i")
_EMBEDDERS = ("t_embedder.timestep", "p_embedder.pooled")

FAMILY = Family(
    title="HiDream",
    classes=("HiDreamImageTransformer2DModel",),
    same="\n".join(
        (
            *(f"{block}.attn1.{layer}" for block in _BLOCKS for layer in _ATTENTION),
            *(f"{block}.{ff}.w{n}" for block in _BLOCKS for ff in _FORWARD for n in (1, 2, 3)),
            *(f"{block}.adaLN_modulation.1" for block in _BLOCKS),
            *(
                f"{one}_embedder.{part}_embedder.linear_{n}"
                for one, part in (("t", "timestep"), ("p", "pooled"))
                for n in (1, 2)
            ),
            *("x_embedder.proj", "caption_projection.#.linear", "final_layer.linear", "final_layer.adaLN_modulation.1"),
        )
    ),
    depths={"double_stream_blocks": (16,), "single_stream_blocks": (32,)},
)
