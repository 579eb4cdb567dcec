"""Modules that releases of transformers renamed: one canonical spelling for the names of before and after.

Hub checkpoints keep the names that they were first saved with, an adapter has those of the release that it was trained
on. Neither is turned into the other: two names mean the same parameter if their canonical spellings are equal, so both
directions are one rule, and a name that could be two is seen as such. The rules are those of transformers 5 that only
rename (its `conversion_mapping.py`; a test compares them); where weights are also fused, split or permuted, they are
other parameters. A family's rules hold for bases whose config names the family, as a whole or as a part.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

_VIT = """
    encoder.layer -> layers
    attention.query -> q_proj
    attention.key -> k_proj
    attention.value -> v_proj
    attention.output.dense -> attention.o_proj
    intermediate.dense -> mlp.fc1
    output.dense -> mlp.fc2
"""
_DINO = """
    attention.attention.query -> attention.q_proj
    attention.attention.key -> attention.k_proj
    attention.attention.value -> attention.v_proj
    attention.output.dense -> attention.o_proj
"""
_DETR = """
    backbone.conv_encoder -> backbone
    self_attn.out_proj -> self_attn.o_proj
    encoder_attn.out_proj -> encoder_attn.o_proj
    layers.#.fc1 -> layers.#.mlp.fc1
    layers.#.fc2 -> layers.#.mlp.fc2
"""

# In whatever architecture: text models and vision towers lost a level, multimodal models gained one.
GENERAL = """
    language_model.model -> language_model
    vision_tower.vision_model -> vision_tower
    image_tower.vision_model -> image_tower
    video_tower.vision_model -> video_tower
    vision_model.vision_model -> vision_model
    text_model.text_model -> text_model
"""

# model_type of each family -> old -> new. Whole segments of a name: `^` the first, `#` a number; `unless` one of those
# follows. In order, each at the first place where it fits.
FAMILIES: Mapping[str, str] = {
    # --- vision ---
    "vit deit ijepa vit_mae vit_msn vivit audio-spectrogram-transformer": _VIT,
    "beit": _VIT + "backbone.layers -> backbone.beit.layers",
    "pixio": _VIT + "^encoder -> pixio",
    "dinov2 dinov2_with_registers": _DINO + "mlp.weights_out -> mlp.down_proj",
    "lw_detr": _DINO + "attention.output -> attention.o_proj \n self_attn.out_proj -> self_attn.o_proj",
    "swin": """
        attention.self.query -> attention.q_proj
        attention.self.key -> attention.k_proj
        attention.self.value -> attention.v_proj
        attention.output.dense -> attention.o_proj
        intermediate.dense -> mlp.fc1
        output.dense -> mlp.fc2
        encoder.encoder.layers -> encoder.swin.encoder.layers
        conv_encoder.model.encoder.layers -> conv_encoder.model.swin.encoder.layers
    """,
    "segformer": """
        encoder.patch_embeddings.# -> stages.#.patch_embeddings
        encoder.block.# -> stages.#.blocks
        attention.self.query -> attention.q_proj
        attention.self.key -> attention.k_proj
        attention.self.value -> attention.v_proj
        attention.self.sr -> attention.sequence_reduction.sequence_reduction
        attention.output.dense -> attention.o_proj
        mlp.dense1 -> mlp.fc1
        mlp.dense2 -> mlp.fc2
        decode_head.linear_c -> decode_head.linear_projections
    """,
    "detr table-transformer deformable_detr maskformer maskformer_detr": _DETR,
    "conditional_detr": _DETR
    + """
        decoder.layers.#.sa_qcontent_proj -> decoder.layers.#.self_attn.q_content_proj
        decoder.layers.#.sa_qpos_proj -> decoder.layers.#.self_attn.q_pos_proj
        decoder.layers.#.sa_kcontent_proj -> decoder.layers.#.self_attn.k_content_proj
        decoder.layers.#.sa_kpos_proj -> decoder.layers.#.self_attn.k_pos_proj
        decoder.layers.#.sa_v_proj -> decoder.layers.#.self_attn.v_proj
        decoder.layers.#.ca_qcontent_proj -> decoder.layers.#.encoder_attn.q_content_proj
        decoder.layers.#.ca_qpos_proj -> decoder.layers.#.encoder_attn.q_pos_proj
        decoder.layers.#.ca_kcontent_proj -> decoder.layers.#.encoder_attn.k_content_proj
        decoder.layers.#.ca_kpos_proj -> decoder.layers.#.encoder_attn.k_pos_proj
        decoder.layers.#.ca_v_proj -> decoder.layers.#.encoder_attn.v_proj
        decoder.layers.#.ca_qpos_sine_proj -> decoder.layers.#.encoder_attn.q_pos_sine_proj
    """,
    "rt_detr rt_detr_v2 pp_doclayout_v2 pp_doclayout_v3": _DETR + "encoder.encoder.#.layers -> encoder.aifi.#.layers",
    "d_fine": """
        self_attn.out_proj -> self_attn.o_proj
        layers.#.fc1 -> layers.#.mlp.layers.0
        layers.#.fc2 -> layers.#.mlp.layers.1
        encoder.encoder.#.layers -> encoder.aifi.#.layers
    """,
    "dinov3_vit": "^layer -> model.layer \n backbone.layer -> backbone.model.layer",
    "dinov3_convnext": "^stages -> model.stages",
    "altclip": "encoder.layer -> encoder.layers",
    # --- text ---
    "gpt_neox": "^embed_out -> lm_head",
    "nemotron_h": "^backbone -> model \n language_model.backbone -> language_model.model",
    "mixtral minimax minimax_m2": "block_sparse_moe -> mlp",
    "phimoe": "block_sparse_moe -> mlp \n mlp.gate -> mlp.router",
    "granitemoe granitemoeshared granitemoehybrid": "block_sparse_moe.router.layer -> block_sparse_moe.router",
    "hy_v3": "mlp.shared_mlp -> mlp.shared_experts \n mlp.router.gate -> mlp.gate",
    "hy_v4": "linear_gate -> gate_proj",
    "lfm3": "self_attn.gate_proj -> self_attn.g_proj",
    "glm5_next glm5_next_text kimi_linear": """
        block_sparse_moe -> mlp
        self_attn.f_a_proj -> self_attn.forget_gate.f_a_proj
        self_attn.f_b_proj -> self_attn.forget_gate.f_b_proj
    """,
    "bailing_hybrid": """
        model.word_embeddings -> model.embed_tokens
        attention -> self_attn
        self_attn.f_proj -> self_attn.forget_gate.f_proj
        self_attn.dense -> self_attn.o_proj
    """,
    "laguna": "mlp.shared_expert -> mlp.shared_experts",
    "nomic_bert": """
        encoder.layers -> layers
        attn.out_proj -> self_attn.o_proj
        mlp.fc11 -> mlp.up_proj
        mlp.fc12 -> mlp.gate_proj
        mlp.fc2 -> mlp.down_proj
    """,
    "jina_embeddings_v3": "encoder.layers -> layers \n mixer.out_proj -> self_attn.o_proj",
    "gte": "^new -> gte \n encoder.layer -> layers \n attention.o_proj -> self_attn.o_proj",
    "timesfm2_5": "mlp.ff0 -> mlp.fc1 \n mlp.ff1 -> mlp.fc2",
    "qwen3_5_text qwen3_5_moe_text gemma3n_text": "^model.language_model -> model",
    # --- more than one modality ---
    "qwen2_vl qwen2_5_vl": "^model -> model.language_model unless language_model visual",
    "qwen2_5_omni_thinker qwen3_omni_moe_thinker": """
        thinker.visual -> thinker.model.visual
        thinker.audio_tower -> thinker.model.audio_tower
        thinker.model -> thinker.model.language_model unless language_model visual audio_tower
        ^model -> model.language_model unless language_model visual audio_tower
    """,
    "paddleocr_vl": "^mlp_AR -> projector \n ^model -> model.language_model unless visual projector language_model",
    "emu3": "text_model.model -> text_model",
    "step3p7": """
        ^vit_large_projector -> multi_modal_projector
        ^model -> model.language_model unless language_model vision_model multi_modal_projector
        share_expert -> mlp.shared_experts
        vision_model.transformer.resblocks -> vision_model.layers
        vision_model.conv1 -> vision_model.embeddings.patch_embedding
        vision_model.vit_downsampler1 -> vision_model.downsampler1
        vision_model.vit_downsampler2 -> vision_model.downsampler2
        attn -> self_attn
        mlp.c_fc -> mlp.fc1
        mlp.c_proj -> mlp.fc2
    """,
    "minimax_m3_vl": """
        vision_tower.vision_model.encoder -> vision_tower
        vision_tower.vision_model.embeddings.patch_embedding -> vision_tower.embeddings.proj
        patch_merge_mlp.linear_1 -> multi_modal_projector.merge_linear_1
        patch_merge_mlp.linear_2 -> multi_modal_projector.merge_linear_2
        block_sparse_moe -> mlp
        self_attn.index_q_proj -> self_attn.indexer.q_proj
        self_attn.index_k_proj -> self_attn.indexer.k_proj
    """,
    "ernie4_5_vl_moe": """
        vision_model -> vision_tower
        spatial_linear.0 -> spatial_linear.fc1
        spatial_linear.2 -> spatial_linear.fc2
        temporal_linear.0 -> temporal_linear.fc1
        temporal_linear.2 -> temporal_linear.fc2
        ^model.layers -> model.language_model.layers
        ^model.embed_tokens -> model.language_model.embed_tokens
    """,
    "colqwen2": "vlm.model -> vlm",
    "t5gemma2": """
        encoder.layers -> encoder.text_model.layers
        encoder.embed_tokens -> encoder.text_model.embed_tokens
    """,
}


@dataclass(frozen=True)
class Rule:
    """Replace the first place in a name that fits `pattern`; it takes time linear in the name."""

    pattern: re.Pattern[str]
    replacement: str

    def __call__(self, name: str) -> str:
        return self.pattern.sub(self.replacement, name, count=1)


def _rule(line: str) -> Rule:
    old, _, rest = line.partition(" -> ")
    new, _, unless = rest.partition(" unless ")
    start = "^" if old.startswith("^") else r"(?<![^.])"
    ahead = "".join(rf"(?!\.{word}(?![^.]))" for word in unless.split())
    middle = re.escape(old.removeprefix("^")).replace(r"\#", "([0-9]+)")
    return Rule(re.compile(f"{start}{middle}(?![^.]){ahead}"), new.replace("#", r"\g<1>"))


def parse(text: str) -> tuple[Rule, ...]:
    """Return the rules of a text, one a line."""
    return tuple(_rule(line.strip()) for line in text.splitlines() if line.strip())


@cache
def _rules(families: tuple[str, ...]) -> tuple[Rule, ...]:
    chosen = [text for name in families for members, text in FAMILIES.items() if name in members.split()]
    return parse("\n".join([*chosen, GENERAL]))


def families(config: Mapping[str, Any], depth: int = 3) -> Iterable[str]:
    """Yield the model types that a configuration names: its own first, then those of its parts."""
    own = config.get("model_type")
    if isinstance(own, str):
        yield own
    for key in sorted(config) if depth else ():
        if isinstance(config[key], dict):
            yield from families(config[key], depth - 1)


def rules(families: Iterable[str]) -> tuple[Rule, ...]:
    """Return the rules of model types."""
    return _rules(tuple(dict.fromkeys(families)))


def canonical(name: str, rules: Iterable[Rule]) -> str:
    """Return `name` as the newest release spells it."""
    for rule in rules:
        name = rule(name)
    return name
