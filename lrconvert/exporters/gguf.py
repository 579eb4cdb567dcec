"""GGUF LoRA for llama.cpp (``--lora adapter.gguf``): what its convert_lora_to_gguf.py writes, from the base's config
alone. Tensors ``blk.<n>.<layer>.weight.lora_a`` (r, in) and ``.lora_b`` (out, r); alpha = r, so that the scale is 1
(with own ranks alpha = 0, which means 1 for any rank).

Two things are unlike transformers: the rows of a Llama's queries and keys are reordered for llama.cpp's rotary
embedding, and the A of a token embedding is transposed. GPT-2 is right here; llama.cpp's converter swaps the factors of
its Conv1D layers. Format: GGUF version 3, little endian, tensors aligned to 32 bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lrconvert.adapter import CompactAdapter, Target
from lrconvert.dtypes import Array
from lrconvert.errors import ConfigError, ExportError
from lrconvert.exporters.base import Exporter, ExportOptions, Files
from lrconvert.exporters.peft_lora import config_file
from lrconvert.exporters.plain import EXCLUDE, module_of, pairs, refuse_extras, stored
from lrconvert.modelcard import model_card, origin, sidecar
from lrconvert.report import Fidelity
from lrconvert.targets import ties_embeddings

_ALIGNMENT = 32
_TYPES = {"F32": 0, "F16": 1, "BF16": 30}
_UINT32, _FLOAT32, _STRING = 4, 6, 8  # kinds of metadata
_ATTENTION = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
_FEED_FORWARD = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}


def _layers(attention: Mapping[str, str], feed_forward: Mapping[str, str]) -> dict[str, str]:
    return {
        **{f"self_attn.{name}": ours for name, ours in attention.items()},
        **{f"mlp.{name}": ours for name, ours in feed_forward.items()},
    }


_LLAMA = _layers(_ATTENTION, _FEED_FORWARD)
_WHOLE = {"model.embed_tokens": "token_embd", "lm_head": "output"}


@dataclass(frozen=True)
class _Family:
    """A kind of model: llama.cpp's name of it, its layers' names, those of whole-model modules, where layers begin."""

    id: str
    layers: Mapping[str, str] = field(default_factory=lambda: _LLAMA)
    whole: Mapping[str, str] = field(default_factory=lambda: _WHOLE)
    stems: tuple[str, ...] = ("model.layers.",)
    permuted: bool = False


_FAMILIES = {
    "LlamaForCausalLM": _Family("llama", permuted=True),
    "MistralForCausalLM": _Family("llama", permuted=True),
    "Qwen2ForCausalLM": _Family("qwen2"),
    "Qwen3ForCausalLM": _Family("qwen3"),
    "GemmaForCausalLM": _Family("gemma", whole={}),
    "Gemma2ForCausalLM": _Family("gemma2", whole={}),
    "Gemma3ForCausalLM": _Family("gemma3", whole={}),
    "Phi3ForCausalLM": _Family(
        "phi3",
        _layers({"qkv_proj": "attn_qkv", "o_proj": "attn_output"}, {"gate_up_proj": "ffn_up", "down_proj": "ffn_down"}),
    ),
    "PhiForCausalLM": _Family(
        "phi2",
        {
            **_layers({"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "dense": "attn_output"}, {}),
            "mlp.fc1": "ffn_up",
            "mlp.fc2": "ffn_down",
        },
    ),
    "Starcoder2ForCausalLM": _Family("starcoder2", _layers(_ATTENTION, {"c_fc": "ffn_up", "c_proj": "ffn_down"})),
    "Olmo2ForCausalLM": _Family("olmo2"),
    "GPT2LMHeadModel": _Family(
        "gpt2",
        {"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"},
        {"transformer.wte": "token_embd", "wte": "token_embd"},
        ("transformer.h.", "h."),
    ),
}


def files(compact: CompactAdapter, options: ExportOptions, fidelity: Fidelity | None) -> Files:
    """See the module's docstring. Raises E-EXPORT for what llama.cpp has no name for or a family that is not known
    here, E-CONFIG for a base's config without what is needed."""
    refuse_extras(compact, "GGUF")
    family, config = _family(options.base_config)
    found = pairs(compact, options)
    tensors: list[tuple[str, Array]] = []
    for pair in found:
        name = _name(pair.target, family, config)
        b = _permuted(pair.target, pair.b, config) if family.permuted else pair.b
        tensors.append((f"{name}.weight.lora_a", pair.a.T if name == "token_embd" else pair.a))
        tensors.append((f"{name}.weight.lora_b", b))
    alpha = 0.0 if options.keep_ranks else float(found[0].rank)
    return {
        "adapter.gguf": _gguf(_metadata(compact, family.id, alpha), sorted(tensors, key=lambda t: t[0]), options.dtype),
        "README.md": [model_card(compact, "GGUF LoRA", options.command, fidelity, "")],
        "lrconvert.json": [config_file(sidecar(compact))],
    }


def _family(config: Mapping[str, Any] | None) -> tuple[_Family, Mapping[str, Any]]:
    if config is None:
        raise ExportError(
            "llama.cpp's names depend on the base, which was not given", fix="give --base; its config.json is enough"
        )
    listed = config.get("architectures")
    name = listed[0] if isinstance(listed, list) and listed and isinstance(listed[0], str) else ""
    if name not in _FAMILIES:
        raise ExportError(
            f"the base is a {name or 'model without architectures'!s:.60}, whose names in llama.cpp are not known here",
            fix="export to peft-lora, and convert that with llama.cpp's convert_lora_to_gguf.py",
        )
    return _FAMILIES[name], config


def _name(target: Target, family: _Family, config: Mapping[str, Any]) -> str:
    """llama.cpp's name of a target. Raises E-EXPORT."""
    module = module_of(target, "GGUF")
    if module in family.whole:
        name = family.whole[module]
        if name == "output" and ties_embeddings(config):
            what = f"{target.name!r} is the base's embedding as well, and llama.cpp adapts that only"
            raise ExportError(what, fix=EXCLUDE)
        return name
    for stem in family.stems:
        block, _, layer = module.removeprefix(stem).partition(".")
        if module.startswith(stem) and block.isdecimal() and layer in family.layers:
            return f"blk.{int(block)}.{family.layers[layer]}"
    raise ExportError(f"llama.cpp takes no LoRA on {target.name!r:.120} of a {family.id}", fix=EXCLUDE)


def _permuted(target: Target, b: Array, config: Mapping[str, Any]) -> Array:
    """B (out, r) with the rows of queries and keys in llama.cpp's order: pairs of a head next to each other."""
    heads = config.get("num_attention_heads")
    if target.name.endswith(".k_proj.weight"):
        own = config.get("num_key_value_heads")
        heads = heads if own is None else own
    elif not target.name.endswith(".q_proj.weight"):
        return b
    if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1 or b.shape[0] % (2 * heads):
        raise ConfigError(f"the base's config has {heads!r:.40} heads, which do not divide {target.name!r:.120}")
    return b.reshape(heads, 2, -1, b.shape[1]).swapaxes(1, 2).reshape(b.shape)


# --- the file -------------------------------------------------------------------------------------------------------

_Value = str | int | float


def _metadata(compact: CompactAdapter, family: str, alpha: float) -> list[tuple[str, _Value]]:
    came = compact.provenance
    found: list[tuple[str, _Value]] = [
        ("general.architecture", family),
        ("general.type", "adapter"),
        ("general.quantization_version", 2),
        ("adapter.type", "lora"),
        ("adapter.lora.alpha", alpha),
    ]
    if came.fields.get("license"):
        found.append(("general.license", came.fields["license"]))
    if came.base_model:
        found += [("general.base_model.count", 1), ("general.base_model.0.name", came.base_model)]
    return found + [(key.replace("_", ".", 1), text) for key, text in origin(compact).items()]


def _gguf(metadata: Sequence[tuple[str, _Value]], tensors: Sequence[tuple[str, Array]], dtype: str) -> Iterator[bytes]:
    """A GGUF file in pieces. Dimensions stand innermost first."""
    size = 4 if dtype == "F32" else 2
    head = bytearray(struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata)))
    for key, value in metadata:
        head += _text(key) + _typed(value)
    offset = 0
    for name, values in tensors:
        head += _text(name) + struct.pack("<I", values.ndim)
        head += struct.pack(f"<{values.ndim}QIQ", *reversed(values.shape), _TYPES[dtype], offset)
        offset += _aligned(values.size * size)
    yield bytes(head).ljust(_aligned(len(head)), b"\0")
    for name, values in tensors:
        data = stored(name, dtype, values)
        yield data.ljust(_aligned(len(data)), b"\0")


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _typed(value: _Value) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    return struct.pack("<II", _UINT32, value)


EXPORTER = Exporter("gguf", "GGUF LoRA for llama.cpp", files)
