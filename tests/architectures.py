"""Tiny random models of transformers' classes, each of a few thousand numbers, and how each is asked.

`ARCHITECTURES` has them by name. What can be asked of a class is not written here: its embeddings, its head and what is
tied come from the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

VOCABULARY = 40
"""Tokens of every model; the first three are special."""


@dataclass(frozen=True)
class Architecture:
    """A class of transformers and the configuration of a tiny model.

    `linear` are the layers that most LoRAs of it adapt, as PEFT's `target_modules`, `experts` its stacks of experts,
    as `target_parameters`. `seed` is the first with which no choice of an expert is close. `inputs` says what it is
    asked with: "decoder" and "encoder" take tokens, "pair" tokens on both sides, "speech" a spectrogram and tokens,
    "image" tokens of which the first are `image` (token, count), and
    pixels.
    """

    name: str
    model: str
    config: Mapping[str, Any]
    linear: tuple[str, ...]
    experts: tuple[str, ...] = ()
    inputs: str = "decoder"
    image: tuple[int, int] = (0, 0)
    tied: bool | None = None
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> Any:
        """The class."""
        import transformers

        return getattr(transformers, self.model)

    def build(self) -> Any:
        """Return a new random model, the same at every call, in float32. Biases and norms are random, too."""
        torch.manual_seed(self.seed)
        fields = dict(self.config)
        if self.tied is not None:
            fields["tie_word_embeddings"] = self.tied
        configuration = self.kind.config_class(**fields)
        for name, value in self.settings.items():
            setattr(configuration, name, value)
        model = self.kind(configuration).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:  # tables of positions are computed, not stored
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        return model

    def save(self, folder: Path) -> Path:
        """Write a new random model to `folder`, as transformers does, and return the folder."""
        self.build().save_pretrained(folder)
        return folder

    def load(self, folder: Path) -> Any:
        """Return the model that a folder holds, in float32."""
        return self.kind.from_pretrained(folder, dtype=torch.float32).eval()

    def batch(self, vocabulary: int = VOCABULARY) -> dict[str, torch.Tensor]:
        """Return what the model is called with, the same at every call."""
        random = torch.Generator().manual_seed(5)
        tokens = torch.randint(3, vocabulary, (2, 7), generator=random)
        if self.inputs == "pair":
            return {"input_ids": tokens, "decoder_input_ids": tokens.flip(1)}
        if self.inputs == "speech":
            return {"input_features": torch.randn(2, 8, 32, generator=random), "decoder_input_ids": tokens}
        if self.inputs == "image":
            token, count = self.image
            tokens[(tokens >= 37) & (tokens < VOCABULARY)] = 36  # the last are those of images
            tokens[:, :count] = token
            types = (tokens == token).long()
            return {"input_ids": tokens, **_pixels(self.model, random), "mm_token_type_ids": types}
        if self.inputs == "decoder":
            return {"input_ids": tokens, "use_cache": False}  # type: ignore[dict-item]
        return {"input_ids": tokens}

    def logits(self, model: nn.Module, vocabulary: int = VOCABULARY) -> torch.Tensor:
        """Return what the model answers, in float64."""
        with torch.no_grad():
            return model.eval()(**self.batch(vocabulary)).logits.double()


def _pixels(model: str, random: torch.Generator) -> dict[str, torch.Tensor]:
    """Two images, in the way of the model."""
    if model.startswith("Qwen"):  # as patches
        grid = torch.tensor([[1, 2, 2]] * 2)
        return {"pixel_values": torch.randn(8, 3 * 2 * 14 * 14, generator=random), "image_grid_thw": grid}
    pixels = {"pixel_values": torch.randn(2, 3, 28, 28, generator=random)}
    return {**pixels, "image_sizes": torch.tensor([[28, 28]] * 2)} if model.startswith("Mistral3") else pixels


_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TEXT = {
    **_TOKENS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
_BERT = {name: value for name, value in _TEXT.items() if name not in ("num_key_value_heads", "head_dim")}
_MODERN = {**_BERT, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 8}
_D_MODEL = {
    **_TOKENS,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "decoder_start_token_id": 1,
}
_MLA = {
    **{"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"num_key_value_heads": 2, "moe_intermediate_size": 12, "n_routed_experts": 4, "n_shared_experts": 1},
    **{"num_experts_per_tok": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
}
_MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
_VIDEO = {"depth": 1, "hidden_size": 16, "num_heads": 2}
_IMAGE = {"image_token_id": 37, "video_token_id": 38, "vision_start_token_id": 39}
_QWEN_EXPERTS = {"moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2}
_GEMMA3N = {
    **{"num_hidden_layers": 4, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 4},
    **{"num_kv_shared_layers": 2, "laurel_rank": 4, "altup_num_inputs": 2, "sliding_window": 8},
    **{"layer_types": ["sliding_attention", "full_attention"] * 2, "activation_sparsity_pattern": [0.0] * 4},
    "intermediate_size": [24] * 4,
}


def _all() -> list[Architecture]:
    A = Architecture
    return [
        A("llama", "LlamaForCausalLM", {**_TEXT, "num_hidden_layers": 2}, _LLAMA, tied=False),
        A("llama-tied", "LlamaForCausalLM", {**_TEXT, "num_hidden_layers": 2}, _LLAMA, tied=True),
        A("mistral", "MistralForCausalLM", _TEXT, _LLAMA),
        A("ministral", "MinistralForCausalLM", {**_TEXT, "sliding_window": 8}, _LLAMA),
        A("qwen2", "Qwen2ForCausalLM", _TEXT, _LLAMA, tied=False),
        A("qwen2-tied", "Qwen2ForCausalLM", _TEXT, _LLAMA, tied=True),
        A("qwen3", "Qwen3ForCausalLM", _TEXT, _LLAMA, tied=True),
        A("qwen3-moe", "Qwen3MoeForCausalLM", {**_TEXT, **_QWEN_EXPERTS}, _ATTENTION, _EXPERTS),
        A("gemma2", "Gemma2ForCausalLM", _TEXT, _LLAMA),
        A("gemma3-text", "Gemma3ForCausalLM", _TEXT, _LLAMA),
        A("gemma3n-text", "Gemma3nForCausalLM", {**_TEXT, **_GEMMA3N}, _LLAMA),
        A(
            "deepseek-v3",
            "DeepseekV3ForCausalLM",
            {**_TEXT, **_MLA, "num_hidden_layers": 2},
            ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
            _EXPERTS,
            seed=1,
        ),
        A(
            "gpt-oss",
            "GptOssForCausalLM",
            {**_TEXT, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
            _ATTENTION,
            _EXPERTS,
        ),
        A(
            "gpt-oss-square",
            "GptOssForCausalLM",
            {**_TEXT, "intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
            _ATTENTION,
            _EXPERTS,
        ),
        A("mixtral", "MixtralForCausalLM", {**_TEXT, "num_local_experts": 4}, _ATTENTION, _EXPERTS),
        A(
            "olmoe",
            "OlmoeForCausalLM",
            {**_TEXT, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2},
            _ATTENTION,
            _EXPERTS,
        ),
        A("granite-moe", "GraniteMoeForCausalLM", {**_TEXT, "num_local_experts": 4}, _ATTENTION, _EXPERTS),
        A(
            "llama4-text",
            "Llama4ForCausalLM",
            {
                **_TEXT,
                "intermediate_size_mlp": 24,
                "num_local_experts": 2,
                "num_experts_per_tok": 1,
                "interleave_moe_layer_step": 1,
                "attention_chunk_size": 16,
            },
            _ATTENTION,
            ("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"),
        ),
        A("phi", "PhiForCausalLM", _BERT, ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")),
        A("phi3", "Phi3ForCausalLM", _TEXT, ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
        A("granite", "GraniteForCausalLM", _TEXT, _LLAMA),
        A("cohere", "CohereForCausalLM", _TEXT, _LLAMA),
        A("olmo2", "Olmo2ForCausalLM", _TEXT, _LLAMA),
        A("smollm3", "SmolLM3ForCausalLM", _TEXT, _LLAMA),
        A("glm4", "Glm4ForCausalLM", _TEXT, (*_ATTENTION, "gate_up_proj", "down_proj")),
        A("stablelm", "StableLmForCausalLM", _TEXT, _LLAMA),
        A("starcoder2", "Starcoder2ForCausalLM", _TEXT, (*_ATTENTION, "c_fc", "c_proj")),
        A(
            "gpt2",
            "GPT2LMHeadModel",
            {**_TOKENS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
            ("c_attn", "c_proj", "c_fc"),
        ),
        A(
            "gpt2-classifier",
            "GPT2ForSequenceClassification",
            {**_TOKENS, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "num_labels": 3},
            ("c_attn", "c_proj"),
        ),
        A("gpt-neox", "GPTNeoXForCausalLM", _BERT, ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")),
        A(
            "gptj",
            "GPTJForCausalLM",
            {**_TOKENS, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "rotary_dim": 4},
            ("q_proj", "v_proj", "fc_in"),
            settings={"tie_word_embeddings": False},
        ),
        A(
            "bloom",
            "BloomForCausalLM",
            {**_TOKENS, "hidden_size": 16, "n_layer": 1, "n_head": 2},
            ("query_key_value", "dense", "dense_h_to_4h"),
        ),
        A(
            "opt",
            "OPTForCausalLM",
            {**_BERT, "ffn_dim": 24, "word_embed_proj_dim": 16},
            ("q_proj", "v_proj", "fc1", "fc2"),
        ),
        A(
            "falcon",
            "FalconForCausalLM",
            {**_TOKENS, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
            ("query_key_value", "dense", "dense_h_to_4h"),
        ),
        A("biogpt", "BioGptForCausalLM", _BERT, ("q_proj", "v_proj", "fc1", "fc2")),
        A(
            "xglm",
            "XGLMForCausalLM",
            {
                **_TOKENS,
                "d_model": 16,
                "ffn_dim": 24,
                "num_layers": 1,
                "attention_heads": 2,
                "max_position_embeddings": 32,
            },
            ("q_proj", "v_proj", "fc1"),
        ),
        A(
            "mamba",
            "MambaForCausalLM",
            {**_TOKENS, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1},
            ("in_proj", "x_proj"),
        ),
        A(
            "mamba2",
            "Mamba2ForCausalLM",
            {
                **_TOKENS,
                "hidden_size": 16,
                "state_size": 4,
                "num_hidden_layers": 1,
                "head_dim": 8,
                "num_heads": 4,
                "n_groups": 1,
                "chunk_size": 4,
            },
            ("in_proj",),
        ),
        A(
            "rwkv",
            "RwkvForCausalLM",
            {
                **_TOKENS,
                "hidden_size": 16,
                "attention_hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "context_length": 32,
            },
            ("key", "value", "receptance"),
        ),
        A("modernbert", "ModernBertForMaskedLM", _MODERN, ("Wqkv", "Wo", "Wi"), inputs="encoder"),
        A(
            "modernbert-classifier",
            "ModernBertForSequenceClassification",
            {**_MODERN, "num_labels": 3},
            ("Wqkv", "Wo", "Wi"),
            inputs="encoder",
        ),
        A("modernbert-decoder", "ModernBertDecoderForCausalLM", _MODERN, ("q_proj", "k_proj", "v_proj", "Wo", "Wi")),
        A("bert", "BertForMaskedLM", _BERT, ("query", "key", "value", "dense"), inputs="encoder"),
        A(
            "bert-classifier",
            "BertForSequenceClassification",
            {**_BERT, "num_labels": 3},
            ("query", "value"),
            inputs="encoder",
        ),
        A("roberta", "RobertaForMaskedLM", _BERT, ("query", "value"), inputs="encoder"),
        A(
            "roberta-classifier",
            "RobertaForSequenceClassification",
            {**_BERT, "num_labels": 3},
            ("query", "value"),
            inputs="encoder",
        ),
        A(
            "distilbert",
            "DistilBertForMaskedLM",
            {**_TOKENS, "dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 32},
            ("q_lin", "v_lin", "lin1"),
            inputs="encoder",
        ),
        A(
            "deberta-v2",
            "DebertaV2ForSequenceClassification",
            {**_BERT, "num_labels": 3, "pooler_hidden_size": 16},
            ("query_proj", "value_proj"),
            inputs="encoder",
        ),
        A("electra", "ElectraForMaskedLM", {**_BERT, "embedding_size": 12}, ("query", "value"), inputs="encoder"),
        A("xlm-roberta", "XLMRobertaForMaskedLM", _BERT, ("query", "value"), inputs="encoder"),
        A(
            "t5",
            "T5ForConditionalGeneration",
            {
                **_TOKENS,
                "d_model": 16,
                "d_kv": 8,
                "d_ff": 24,
                "num_layers": 1,
                "num_heads": 2,
                "decoder_start_token_id": 0,
            },
            ("q", "v", "wi", "wo"),
            inputs="pair",
        ),
        A(
            "t5-gated",
            "T5ForConditionalGeneration",
            {
                **_TOKENS,
                "d_model": 16,
                "d_kv": 8,
                "d_ff": 24,
                "num_layers": 1,
                "num_heads": 2,
                "decoder_start_token_id": 0,
                "feed_forward_proj": "gated-gelu",
            },
            ("q", "v", "wi_0", "wo"),
            inputs="pair",
            tied=False,
        ),
        A(
            "bart",
            "BartForConditionalGeneration",
            {**_D_MODEL, "max_position_embeddings": 32},
            ("q_proj", "v_proj", "fc1"),
            inputs="pair",
        ),
        A(
            "bart-scaled",
            "BartForConditionalGeneration",
            {**_D_MODEL, "max_position_embeddings": 32, "scale_embedding": True},
            ("q_proj", "v_proj", "fc1"),
            inputs="pair",
        ),
        A(
            "marian",
            "MarianMTModel",
            {**_D_MODEL, "max_position_embeddings": 32, "scale_embedding": True},
            ("q_proj", "v_proj", "fc1"),
            inputs="pair",
        ),
        A(
            "m2m-100",
            "M2M100ForConditionalGeneration",
            {**_D_MODEL, "max_position_embeddings": 32, "scale_embedding": True},
            ("q_proj", "v_proj", "fc1"),
            inputs="pair",
        ),
        A(
            "pegasus",
            "PegasusForConditionalGeneration",
            {**_D_MODEL, "max_position_embeddings": 32, "scale_embedding": True},
            ("q_proj", "v_proj", "fc1"),
            inputs="pair",
        ),
        A(
            "whisper",
            "WhisperForConditionalGeneration",
            {**_D_MODEL, "max_source_positions": 16, "max_target_positions": 32, "num_mel_bins": 8},
            ("q_proj", "v_proj", "fc1"),
            inputs="speech",
        ),
        A(
            "mistral3",
            "Mistral3ForConditionalGeneration",
            {
                "text_config": {"model_type": "mistral", **_TEXT},
                "vision_config": {"model_type": "pixtral", **_VISION, "head_dim": 8},
                "image_token_index": 39,
            },
            _LLAMA,
            inputs="image",
            image=(39, 1),
        ),
        A(
            "gemma3",
            "Gemma3ForConditionalGeneration",
            {
                "text_config": _TEXT,
                "vision_config": _VISION,
                "mm_tokens_per_image": 4,
                "image_token_index": 37,
                "boi_token_index": 38,
                "eoi_token_index": 39,
            },
            _LLAMA,
            inputs="image",
            image=(37, 4),
        ),
        A(
            "qwen2.5-vl",
            "Qwen2_5_VLForConditionalGeneration",
            {
                "text_config": {**_TEXT, **_MROPE},
                "vision_config": {
                    **_VIDEO,
                    "intermediate_size": 24,
                    "out_hidden_size": 16,
                    "fullatt_block_indexes": [0],
                },
                **_IMAGE,
            },
            _LLAMA,
            inputs="image",
            image=(37, 1),
        ),
        A(
            "qwen2-vl",
            "Qwen2VLForConditionalGeneration",
            {"text_config": {**_TEXT, **_MROPE}, "vision_config": {**_VIDEO, "embed_dim": 16}, **_IMAGE},
            _LLAMA,
            inputs="image",
            image=(37, 1),
        ),
        A(
            "llava",
            "LlavaForConditionalGeneration",
            {
                "text_config": {"model_type": "llama", **_TEXT},
                "vision_config": {
                    "model_type": "clip_vision_model",
                    **_VISION,
                    "projection_dim": 16,
                    "num_hidden_layers": 2,
                },
                "image_token_index": 39,
            },
            _LLAMA,
            inputs="image",
            image=(39, 4),
        ),
        A(
            "qwen3-vl",
            "Qwen3VLForConditionalGeneration",
            {
                "text_config": {**_TEXT, **_MROPE},
                "vision_config": {
                    **_VIDEO,
                    "intermediate_size": 24,
                    "out_hidden_size": 16,
                    "deepstack_visual_indexes": [0],
                    "num_position_embeddings": 16,
                    "patch_size": 14,
                },
                **_IMAGE,
            },
            _LLAMA,
            inputs="image",
            image=(37, 1),
        ),
        A(
            "qwen3-next",
            "Qwen3NextForCausalLM",
            {
                **_TEXT,
                **_QWEN_EXPERTS,
                "num_experts_per_tok": 4,
                "num_hidden_layers": 2,
                "layer_types": ["linear_attention", "full_attention"],
                "linear_num_value_heads": 2,
                "linear_num_key_heads": 2,
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 8,
                "shared_expert_intermediate_size": 12,
            },
            ("in_proj_qkvz", "in_proj_ba", "out_proj", *_ATTENTION),
            _EXPERTS,
        ),
        A(
            "qwen2-moe",
            "Qwen2MoeForCausalLM",
            {**_TEXT, **_QWEN_EXPERTS, "shared_expert_intermediate_size": 12},
            _ATTENTION,
            _EXPERTS,
        ),
        A(
            "qwen3.5",
            "Qwen3_5ForCausalLM",
            {
                **_TEXT,
                "num_hidden_layers": 2,
                "layer_types": ["linear_attention", "full_attention"],
                "linear_num_value_heads": 2,
                "linear_num_key_heads": 2,
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 8,
            },
            ("in_proj_qkv", "in_proj_z", "out_proj", *_ATTENTION),
        ),
        A(
            "gemma4-text",
            "Gemma4ForCausalLM",
            {
                **_TEXT,
                "num_hidden_layers": 2,
                "layer_types": ["sliding_attention", "full_attention"],
                "global_head_dim": 8,
                "vocab_size_per_layer_input": VOCABULARY,
                "hidden_size_per_layer_input": 4,
                "num_kv_shared_layers": 0,
            },
            _LLAMA,
        ),
        A(
            "glm4-moe",
            "Glm4MoeForCausalLM",
            {
                **_TEXT,
                **{k: v for k, v in _MLA.items() if "lora" not in k and "_head_dim" not in k},
                "num_key_value_heads": 1,
                "num_hidden_layers": 2,
            },
            _ATTENTION,
            _EXPERTS,
        ),
        A("phimoe", "PhimoeForCausalLM", {**_TEXT, "num_local_experts": 4}, _ATTENTION, _EXPERTS, seed=1),
        A(
            "jamba",
            "JambaForCausalLM",
            {
                **_TEXT,
                "num_hidden_layers": 2,
                "attn_layer_period": 2,
                "attn_layer_offset": 1,
                "expert_layer_period": 2,
                "expert_layer_offset": 1,
                "num_experts": 4,
                "mamba_d_state": 4,
                "mamba_dt_rank": 4,
                "use_mamba_kernels": False,
            },
            ("in_proj", *_ATTENTION),
            ("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"),
        ),
        A(
            "granite-hybrid",
            "GraniteMoeHybridForCausalLM",
            {
                **_TEXT,
                "num_hidden_layers": 2,
                "layer_types": ["mamba", "attention"],
                "num_local_experts": 4,
                "shared_intermediate_size": 12,
                "mamba_n_heads": 4,
                "mamba_d_head": 8,
                "mamba_d_state": 4,
                "mamba_n_groups": 1,
                "mamba_expand": 2,
            },
            ("in_proj", *_ATTENTION),
        ),
        A(
            "falcon-mamba",
            "FalconMambaForCausalLM",
            {**_TOKENS, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1},
            ("in_proj", "x_proj"),
        ),
        A(
            "gpt-bigcode",
            "GPTBigCodeForCausalLM",
            {**_TOKENS, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32},
            ("c_attn", "c_proj", "c_fc"),
        ),
        A(
            "codegen",
            "CodeGenForCausalLM",
            {**_TOKENS, "n_embd": 16, "n_layer": 1, "n_head": 4, "n_positions": 32, "rotary_dim": 4},
            ("qkv_proj", "out_proj", "fc_in"),
        ),
        A(
            "gpt-neo",
            "GPTNeoForCausalLM",
            {
                **_TOKENS,
                "hidden_size": 16,
                "num_layers": 2,
                "num_heads": 2,
                "attention_types": [[["global", "local"], 1]],
                "max_position_embeddings": 32,
                "intermediate_size": 24,
            },
            ("q_proj", "v_proj", "c_fc"),
        ),
        A(
            "mbart",
            "MBartForConditionalGeneration",
            {**_D_MODEL, "max_position_embeddings": 32, "scale_embedding": True},
            ("q_proj", "v_proj", "fc1"),
            inputs="pair",
        ),
        A(
            "mt5",
            "MT5ForConditionalGeneration",
            {
                **_TOKENS,
                "d_model": 16,
                "d_kv": 8,
                "d_ff": 24,
                "num_layers": 1,
                "num_heads": 2,
                "decoder_start_token_id": 0,
            },
            ("q", "v", "wi_0", "wo"),
            inputs="pair",
            tied=False,
        ),
        A(
            "t5gemma",
            "T5GemmaForConditionalGeneration",
            {
                "encoder": {**_TEXT, "sliding_window": 8},
                "decoder": {**_TEXT, "sliding_window": 8},
                "vocab_size": VOCABULARY,
            },
            _LLAMA,
            inputs="pair",
        ),
        A("albert", "AlbertForMaskedLM", {**_BERT, "embedding_size": 12}, ("query", "value"), inputs="encoder"),
        A("deberta-v2-mlm", "DebertaV2ForMaskedLM", _BERT, ("query_proj", "value_proj"), inputs="encoder"),
        A("llama-classifier", "LlamaForSequenceClassification", {**_TEXT, "num_labels": 3}, _LLAMA),
        A("qwen3-classifier", "Qwen3ForSequenceClassification", {**_TEXT, "num_labels": 3}, _LLAMA),
        A(
            "phi4-multimodal",
            "Phi4MultimodalForCausalLM",
            {
                **_TEXT,
                "vision_config": {**_VISION, "crop_size": 28, "image_token_id": 37},
                "audio_config": {
                    "hidden_size": 16,
                    "intermediate_size": 24,
                    "num_blocks": 1,
                    "num_attention_heads": 2,
                    "input_size": 8,
                    "depthwise_separable_out_channel": 16,
                    "ext_pw_out_channel": 16,
                    "nemo_conv_channels": 16,
                    "nemo_final_size": 16,
                    "depthwise_multiplier": 1,
                    "audio_token_id": 38,
                },
            },
            ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
        ),
    ]


ARCHITECTURES: Mapping[str, Architecture] = {entry.name: entry for entry in _all()}
