"""LTX-2: sound beside the video."""

from __future__ import annotations

from lrconvert.formats.families.base import Family

_EMBEDDERS = {
    "adaln_single": "time_embed",
    "audio_adaln_single": "audio_time_embed",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
    "prompt_adaln_single": "prompt_adaln",
    "audio_prompt_adaln_single": "audio_prompt_adaln",
}
_INSIDE = ("linear", "emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2")
_ATTENTIONS = ("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "to_gate_logits")
_SAME = (
    *(f"transformer_blocks.#.{attention}.{layer}" for attention in _ATTENTIONS for layer in _LAYERS),
    *(f"transformer_blocks.#.{ff}.net.{layer}" for ff in ("ff", "audio_ff") for layer in ("0.proj", "2")),
    *(f"{one}caption_projection.linear_{n}" for one in ("", "audio_") for n in (1, 2)),
    *("proj_out", "audio_proj_out"),
)

FAMILY = Family(
    title="LTX-2",
    classes=("LTX2VideoTransformer3DModel",),
    original="patchify_proj -> proj_in \n audio_patchify_proj -> audio_proj_in \n"
    + "\n".join(f"{own}.{layer} -> {new}.{layer}" for own, new in _EMBEDDERS.items() for layer in _INSIDE),
    same="\n".join(_SAME),
    depths={"transformer_blocks": (48,)},
)
