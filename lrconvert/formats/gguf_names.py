"""llama.cpp's names of the layers of transformers' decoders, and the rows that it keeps in another order.

Known are the models whose layers are renamed one by one, and the experts of mixtures, which llama.cpp keeps in stacks
of three dimensions, gates and ups apart. Another fused layer that llama.cpp splits has no entry. Facts:
``gguf-py/gguf/tensor_mapping.py`` of llama.cpp, what its ``conversion`` does to the rows of a weight, and in which
products its ``src/models`` add what a LoRA says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lrconvert.core.dtypes import Array
from lrconvert.core.errors import ConfigError

# How rows lie in llama.cpp. Rotated: pairs of a head next to each other, where transformers has two halves of a head.
# Gathered: all queries, all keys, all values, where transformers has these head by head.
# Grouped: the same, where transformers has some queries, one key and one value for each head of keys.
QUERIES, KEYS, GATHERED, GROUPED = "rotated queries", "rotated keys", "gathered", "grouped"
_ROTATED = {"attn_q": QUERIES, "attn_k": KEYS}


def _below(module: str, names: Mapping[str, str]) -> dict[str, str]:
    return {f"{module}.{name}": theirs for name, theirs in names.items()}


def _layers(attention: Mapping[str, str], feed_forward: Mapping[str, str]) -> dict[str, str]:
    return {**_below("self_attn", attention), **_below("mlp", feed_forward)}


_QKV = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v"}
_ATTENTION = {**_QKV, "o_proj": "attn_output"}
_UP_DOWN = {"up_proj": "ffn_up", "down_proj": "ffn_down"}
_GATED = {"gate_proj": "ffn_gate", **_UP_DOWN}
_FUSED = {"gate_up_proj": "ffn_up", "down_proj": "ffn_down"}
_USUAL = _layers(_ATTENTION, _GATED)
_HEADS_ONLY = _layers(_ATTENTION, {})
_BY_HEADS = {"query_key_value": "attn_qkv", "dense": "attn_output"}
_FOUR = {"mlp.dense_h_to_4h": "ffn_up", "mlp.dense_4h_to_h": "ffn_down"}
_OLD = {"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
_OF_SHARED = {name: f"{theirs}_shexp" for name, theirs in _GATED.items()}
_SHARED, _ALL_SHARED = _below("mlp.shared_expert", _OF_SHARED), _below("mlp.shared_experts", _OF_SHARED)
_LATENT = {
    "q_a_proj": "attn_q_a", "q_b_proj": "attn_q_b", "kv_a_proj_with_mqa": "attn_kv_a_mqa", "o_proj": "attn_output",
}  # fmt: skip
# Queries, keys and values through a latent: these products have no LoRA in llama.cpp.
_QUIET = frozenset({"attn_q", "attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_kv_b"})
_DEEPSEEK = {**_layers({"q_proj": "attn_q", **_LATENT}, _GATED), **_ALL_SHARED}  # it keeps kv_b_proj in two parts

_EMBEDDED = {"model.embed_tokens": "token_embd"}
_WHOLE = {**_EMBEDDED, "lm_head": "output"}
_GPT2 = {"transformer.wte": "token_embd", "wte": "token_embd"}
_STEMS = ("model.layers.",)
# Of models with eyes: the decoder's names, with the level that llama.cpp leaves out in one of two places.
_SEEING = ("model.language_model.layers.", "language_model.model.layers.", *_STEMS)
_SEEING_WHOLE = {
    **_WHOLE,
    "model.language_model.embed_tokens": "token_embd",
    "language_model.model.embed_tokens": "token_embd",
    "language_model.lm_head": "output",
}


@dataclass(frozen=True)
class Slice:
    """The rows of an expert that a stack of llama.cpp, called `name`, has of a layer of transformers: part `which` of
    `count` parts, one below the other or row by row in turn. `turned`: the stack of transformers is (experts, in, out).
    """

    name: str
    which: int = 0
    count: int = 1
    in_turn: bool = False
    turned: bool = False

    def rows(self, out: int) -> slice:
        """Return where its rows are among the `out` rows of the layer."""
        height = out // self.count
        start = self.which if self.in_turn else self.which * height
        return slice(start, None, self.count) if self.in_turn else slice(start, start + height)


Slices = tuple[Slice, ...]


def _experts(module: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> dict[str, Slices]:
    """Experts as modules of their own, numbered, which is how files store them."""
    names = {gate: "ffn_gate_exps", up: "ffn_up_exps", down: "ffn_down_exps"}
    return {f"{module}.*.{name}": (Slice(theirs),) for name, theirs in names.items()}


def _stacks(gates_and_ups: str, downs: str, *, in_turn: bool = False, turned: bool = False) -> dict[str, Slices]:
    """Experts as parameters of three dimensions, gates and ups in one."""
    halves = tuple(Slice(name, n, 2, in_turn, turned) for n, name in enumerate(("ffn_gate_exps", "ffn_up_exps")))
    return {gates_and_ups: halves, downs: (Slice("ffn_down_exps", turned=turned),)}


_STACKS = _stacks("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
_MIXTURE = {**_STACKS, **_experts("mlp.experts")}


@dataclass(frozen=True)
class Family:
    """A kind of model. `id`: llama.cpp's architecture; `kind`: transformers' model_type. `layers`: modules of a block,
    whose names begin with one of `stems` and its number; `whole`: other modules. `experts`: the same of experts, ``*``
    for the number of one. `rows`: the order of rows of a layer of llama.cpp where it is another. `unadapted`: layers of
    llama.cpp that its graph multiplies by without their LoRA, which it loads all the same."""

    id: str
    kind: str
    layers: Mapping[str, str] = field(default_factory=lambda: _USUAL)
    whole: Mapping[str, str] = field(default_factory=lambda: _WHOLE)
    stems: tuple[str, ...] = _STEMS
    rows: Mapping[str, str] = field(default_factory=dict)
    experts: Mapping[str, Slices] = field(default_factory=dict)
    unadapted: Set[str] = frozenset()

    def of_experts(self, name: str) -> tuple[int, int | None, Slices] | None:
        """Return (block, number of the expert where the name says it, slices) of a module or a parameter of experts;
        None for another one."""
        for stem in self.stems:
            block, _, layer = name.removeprefix(stem).partition(".")
            if not name.startswith(stem) or not block.isdecimal():
                continue
            words = layer.removesuffix(".weight").split(".")
            numbers = [n for n, word in enumerate(words) if word.isdecimal()]
            spelled = ".".join("*" if n in numbers else word for n, word in enumerate(words))
            if spelled in self.experts and len(numbers) <= 1:
                return int(block), int(words[numbers[0]]) if numbers else None, self.experts[spelled]
        return None

    def expert_modules(self, name: str) -> Iterator[tuple[str, Slice]]:
        """Yield the modules and parameters of transformers, ``*`` for the number of an expert, that a stack of
        llama.cpp may be of, and which slice of each it is."""
        prefix, _, rest = name.partition(".")
        block, _, leaf = rest.partition(".")
        if prefix == "blk" and block.isdecimal():
            for stem in self.stems:
                for layer, slices in self.experts.items():
                    yield from ((f"{stem}{int(block)}.{layer}", one) for one in slices if one.name == leaf)

    def is_adapted(self, name: str) -> bool:
        """Return false for a name of llama.cpp whose LoRA it loads and does not compute with."""
        return name.rpartition(".")[2] not in self.unadapted

    def named(self, module: str) -> str | None:
        """Return llama.cpp's name of a module of transformers, or None."""
        if module in self.whole:
            return self.whole[module]
        for stem in self.stems:
            block, _, layer = module.removeprefix(stem).partition(".")
            if module.startswith(stem) and block.isdecimal() and layer in self.layers:
                return f"blk.{int(block)}.{self.layers[layer]}"
        return None

    def modules(self, name: str) -> list[str]:
        """Return the modules of transformers that a name of llama.cpp may mean, the usual one first."""
        prefix, _, rest = name.partition(".")
        block, _, leaf = rest.partition(".")
        if prefix == "blk" and block.isdecimal():
            layers = [layer for layer, theirs in self.layers.items() if theirs == leaf]
            return [f"{stem}{int(block)}.{layer}" for stem in self.stems for layer in layers]
        return [module for module, theirs in self.whole.items() if theirs == name]


FAMILIES: Mapping[str, Family] = {
    "ApertusForCausalLM": Family("apertus", "apertus", _layers(_ATTENTION, _UP_DOWN)),
    "ArceeForCausalLM": Family("arcee", "arcee", _layers(_ATTENTION, _UP_DOWN), rows=_ROTATED),
    "BloomForCausalLM": Family(
        "bloom", "bloom", {**_below("self_attention", _BY_HEADS), **_FOUR},
        {"transformer.word_embeddings": "token_embd", "word_embeddings": "token_embd"},
        ("transformer.h.", "h."), {"attn_qkv": GATHERED},
    ),
    "Cohere2ForCausalLM": Family("cohere2", "cohere2", whole=_EMBEDDED),
    "CohereForCausalLM": Family("command-r", "cohere", whole=_EMBEDDED),
    "DeepseekV2ForCausalLM": Family(
        "deepseek2", "deepseek_v2", _DEEPSEEK, experts=_MIXTURE, unadapted=_QUIET | {"output"}
    ),
    "DeepseekV3ForCausalLM": Family(
        "deepseek2", "deepseek_v3", _DEEPSEEK, experts=_MIXTURE, unadapted=_QUIET | {"output"}
    ),
    "Dots1ForCausalLM": Family("dots1", "dots1", {**_USUAL, **_ALL_SHARED}, experts=_MIXTURE),
    "Ernie4_5ForCausalLM": Family("ernie4_5", "ernie4_5"),
    "Ernie4_5_MoeForCausalLM": Family("ernie4_5-moe", "ernie4_5_moe", {**_USUAL, **_ALL_SHARED}, experts=_MIXTURE),
    "Exaone4ForCausalLM": Family("exaone4", "exaone4"),
    "FalconForCausalLM": Family(
        "falcon", "falcon", {**_below("self_attention", _BY_HEADS), **_FOUR},
        {"transformer.word_embeddings": "token_embd", "lm_head": "output"}, ("transformer.h.", "h."),
        {"attn_qkv": GROUPED},
    ),
    "GPT2LMHeadModel": Family("gpt2", "gpt2", _OLD, _GPT2, ("transformer.h.", "h.")),
    "GPTBigCodeForCausalLM": Family("starcoder", "gpt_bigcode", _OLD, _GPT2, ("transformer.h.", "h.")),
    "GPTNeoXForCausalLM": Family(
        "gptneox", "gpt_neox", {**_below("attention", _BY_HEADS), **_FOUR},
        {"gpt_neox.embed_in": "token_embd", "embed_out": "output", "lm_head": "output"},
        ("gpt_neox.layers.", "layers."), {"attn_qkv": GATHERED},
    ),
    "Gemma2ForCausalLM": Family("gemma2", "gemma2", whole={}),
    "Gemma3ForCausalLM": Family("gemma3", "gemma3_text", whole={}),
    "Gemma3ForConditionalGeneration": Family("gemma3", "gemma3", whole={}, stems=_SEEING),
    "GemmaForCausalLM": Family("gemma", "gemma", whole={}),
    "Glm4ForCausalLM": Family("glm4", "glm4", _layers(_ATTENTION, _FUSED)),
    "Glm4MoeForCausalLM": Family("glm4moe", "glm4_moe", {**_USUAL, **_ALL_SHARED}, experts=_MIXTURE),
    "GlmForCausalLM": Family("chatglm", "glm", _layers(_ATTENTION, _FUSED)),
    "GptOssForCausalLM": Family(
        "gpt-oss", "gpt_oss", _HEADS_ONLY,
        experts=_stacks("mlp.experts.gate_up_proj", "mlp.experts.down_proj", in_turn=True, turned=True),
    ),
    "GraniteForCausalLM": Family("granite", "granite", rows=_ROTATED),
    "GraniteMoeForCausalLM": Family(
        "granitemoe", "granitemoe", _HEADS_ONLY, rows=_ROTATED,
        experts={
            **_STACKS,
            **_stacks("block_sparse_moe.input_linear", "block_sparse_moe.output_linear"),
            **_stacks("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"),
        },
    ),
    "HunYuanDenseV1ForCausalLM": Family("hunyuan-dense", "hunyuan_v1_dense"),
    "Jais2ForCausalLM": Family("jais2", "jais2", _layers(_ATTENTION, _UP_DOWN)),
    "Llama4ForCausalLM": Family(
        "llama4", "llama4_text",
        {**_HEADS_ONLY, **_below("feed_forward", _GATED), **_below("feed_forward.shared_expert", _OF_SHARED)},
        experts=_stacks("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj", turned=True),
    ),
    "LlamaForCausalLM": Family("llama", "llama", rows=_ROTATED),
    "MiniCPM3ForCausalLM": Family(
        "minicpm3", "minicpm3", _layers({**_LATENT, "kv_b_proj": "attn_kv_b"}, _GATED), unadapted=_QUIET
    ),
    "MiniCPMForCausalLM": Family("minicpm", "minicpm", rows=_ROTATED),
    "Ministral3ForCausalLM": Family("mistral3", "ministral3", rows=_ROTATED),
    "Mistral3ForConditionalGeneration": Family(
        "mistral3", "mistral3", whole=_SEEING_WHOLE, stems=_SEEING, rows=_ROTATED
    ),
    "MistralForCausalLM": Family("llama", "mistral", rows=_ROTATED),
    "MixtralForCausalLM": Family(
        "llama", "mixtral", _HEADS_ONLY, rows=_ROTATED,
        experts={**_STACKS, **_experts("block_sparse_moe.experts", "w1", "w3", "w2")},
    ),
    "NemotronForCausalLM": Family("nemotron", "nemotron", _layers(_ATTENTION, _UP_DOWN)),
    "Olmo2ForCausalLM": Family("olmo2", "olmo2"),
    "Olmo3ForCausalLM": Family("olmo2", "olmo3"),
    "OlmoForCausalLM": Family("olmo", "olmo", rows=_ROTATED),
    "OlmoeForCausalLM": Family("olmoe", "olmoe", _HEADS_ONLY, experts=_MIXTURE),
    "OrionForCausalLM": Family("orion", "orion"),
    "Phi3ForCausalLM": Family("phi3", "phi3", _layers({"qkv_proj": "attn_qkv", "o_proj": "attn_output"}, _FUSED)),
    "PhiForCausalLM": Family(
        "phi2", "phi", _layers({**_QKV, "dense": "attn_output"}, {"fc1": "ffn_up", "fc2": "ffn_down"})
    ),
    "Qwen2ForCausalLM": Family("qwen2", "qwen2"),
    "Qwen2MoeForCausalLM": Family("qwen2moe", "qwen2_moe", {**_HEADS_ONLY, **_SHARED}, experts=_MIXTURE),
    "Qwen2VLForConditionalGeneration": Family("qwen2vl", "qwen2_vl", whole=_SEEING_WHOLE, stems=_SEEING),
    "Qwen2_5_VLForConditionalGeneration": Family("qwen2vl", "qwen2_5_vl", whole=_SEEING_WHOLE, stems=_SEEING),
    "Qwen3ForCausalLM": Family("qwen3", "qwen3"),
    "Qwen3MoeForCausalLM": Family("qwen3moe", "qwen3_moe", _HEADS_ONLY, experts=_MIXTURE),
    "Qwen3VLForConditionalGeneration": Family("qwen3vl", "qwen3_vl", whole=_SEEING_WHOLE, stems=_SEEING),
    "SeedOssForCausalLM": Family("seed_oss", "seed_oss"),
    "SmolLM3ForCausalLM": Family("smollm3", "smollm3", rows=_ROTATED),
    "StableLmForCausalLM": Family("stablelm", "stablelm"),
    "Starcoder2ForCausalLM": Family(
        "starcoder2", "starcoder2", _layers(_ATTENTION, {"c_fc": "ffn_up", "c_proj": "ffn_down"})
    ),
}  # fmt: skip


def architecture(config: Mapping[str, Any]) -> str:
    """Return the class of the model that a config.json is of, or "" if it does not say."""
    listed = config.get("architectures")
    return listed[0] if isinstance(listed, list) and listed and isinstance(listed[0], str) else ""


def family_of(config: Mapping[str, Any]) -> Family | None:
    """Return the family of a base by its class, or by its model_type where the configuration names no class."""
    if name := architecture(config):
        return FAMILIES.get(name)
    kind = config.get("model_type")
    return next((family for family in FAMILIES.values() if family.kind == kind), None)


def row_order(order: str, rows: int, config: Mapping[str, Any]) -> Array:
    """Return (rows,) integers: the row of transformers that each row of llama.cpp is, for an output of `rows` numbers.

    Raises E-CONFIG if the configuration does not say how many heads there are, or they do not divide the rows.
    """
    text = config.get("text_config")
    settings = {**config, **(text if isinstance(text, dict) else {})}
    if order == GROUPED:
        return _ungrouped(rows, settings)
    keys = ("num_key_value_heads",) if order == KEYS else ()
    counts = [settings.get(key) for key in (*keys, "num_attention_heads", "n_head")]
    heads = next((count for count in counts if count is not None), None)
    parts = 3 if order == GATHERED else 2
    if type(heads) is not int or heads < 1 or rows % (parts * heads):
        raise ConfigError(f"the base's config has {heads!r:.40} heads, which do not divide {rows} outputs")
    numbered: Array = np.arange(rows).reshape(heads, parts, -1)
    return (numbered.swapaxes(0, 1) if order == GATHERED else numbered.swapaxes(1, 2)).reshape(-1)


def _ungrouped(rows: int, settings: Mapping[str, Any]) -> Array:
    """Return the order of Falcon's queries, keys and values, for each head of keys some queries, a key and a value. Its
    older models have one such head. Raises E-CONFIG."""
    stated: list[Any] = [next((settings[k] for k in keys if settings.get(k) is not None), None) for keys in _FALCON]
    heads, groups = stated[0], 1 if stated[1] is None else stated[1]
    if settings.get("multi_query") and not settings.get("new_decoder_architecture"):
        groups = 1
    known = type(heads) is int and type(groups) is int
    if not known or not 0 < groups <= heads or heads % groups or rows % (heads + 2 * groups):
        what = f"the base's config has {heads!r:.40} heads, {groups!r:.40} of them of keys, which do not divide {rows}"
        raise ConfigError(f"{what} outputs")
    numbered: Array = np.arange(rows).reshape(groups, heads // groups + 2, -1)
    return np.concatenate([numbered[:, part].reshape(-1) for part in (slice(-2), slice(-2, -1), slice(-1, None))])


_FALCON = ("num_attention_heads", "n_head"), ("num_kv_heads", "n_head_kv")
