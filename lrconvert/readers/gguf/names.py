"""llama.cpp's names of parameters onto those of transformers, for the architectures of which both are known.

llama.cpp keeps the rows of q and k of some architectures in another order (it rotates pairs of neighbours, transformers
pairs half a head apart); rows of B move back. The configuration of the base says how many heads there are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lrconvert.adapter import LoraTarget
from lrconvert.errors import BaseError, PairError
from lrconvert.readers.naming import Component

_LLAMA = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_PHI3 = {
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_WHOLE = {"token_embd": "model.embed_tokens", "output": "lm_head"}
_BLOCK = re.compile(r"blk\.(?P<number>\d{1,5})\.(?P<leaf>.+)")


@dataclass(frozen=True)
class Architecture:
    """`families`: model_type of bases; `layers`: what modules of a block are called there; `permuted`: whose rows
    llama.cpp keeps in its own order."""

    families: frozenset[str]
    layers: Mapping[str, str]
    permuted: frozenset[str] = frozenset()


_ROTATED = frozenset({"attn_q", "attn_k"})
ARCHITECTURES = {
    "llama": Architecture(frozenset({"llama", "mistral"}), _LLAMA, _ROTATED),
    "qwen2": Architecture(frozenset({"qwen2"}), _LLAMA),
    "qwen3": Architecture(frozenset({"qwen3"}), _LLAMA),
    "gemma": Architecture(frozenset({"gemma"}), _LLAMA),
    "gemma2": Architecture(frozenset({"gemma2"}), _LLAMA),
    "gemma3": Architecture(frozenset({"gemma3", "gemma3_text"}), _LLAMA),
    "phi3": Architecture(frozenset({"phi3"}), _PHI3),
}


def placed(pair: LoraTarget, name: str, architecture: str, component: Component) -> LoraTarget:
    """`pair`, of llama.cpp's module `name`, on a base. Raises E-BASE for architectures and modules that are not known
    and for bases of another family."""
    known = ARCHITECTURES.get(architecture)
    if known is None:
        raise BaseError(
            f"the names of llama.cpp's architecture {architecture!r:.60} are not known here",
            fix=f"known: {', '.join(ARCHITECTURES)}; convert the adapter that the GGUF file was made of instead",
        )
    family = component.config.get("model_type")
    if family not in known.families:
        raise BaseError(
            f"the adapter is for llama.cpp's {architecture}, the base is of the family {family!r:.60}",
            fix="give the adapter's own base",
            path=component.root,
        )
    found = _BLOCK.fullmatch(name)
    if found:
        leaf = known.layers.get(found["leaf"])
        module = None if leaf is None else f"model.layers.{found['number']}.{leaf}"
        if found["leaf"] in known.permuted:
            pair = _in_order(pair, heads(component, found["leaf"]))
    else:
        module = _WHOLE.get(name)
    if module is None:
        raise BaseError(f"the module {name!r:.120} of {architecture} is not known here", path=component.root)
    return component.placed(pair, component.dotted(module))


def heads(component: Component, leaf: str) -> int:
    """How many heads q or k has. Raises E-BASE."""
    config: Mapping[str, Any] = component.config
    many = config.get("num_attention_heads")
    if leaf == "attn_k" and config.get("num_key_value_heads") is not None:
        many = config["num_key_value_heads"]
    if type(many) is not int or many < 1:
        raise BaseError("config.json does not say how many heads the base has", path=component.root)
    return many


def _in_order(pair: LoraTarget, many: int) -> LoraTarget:
    """Rows of B in transformers' order: llama.cpp's run pair by pair, those of transformers half by half."""
    rows = pair.b.array
    if rows.shape[0] % (2 * many):
        raise PairError(f"{pair.target.name}: {rows.shape[0]} outputs are no {many} heads of an even width")
    split = rows.reshape(many, rows.shape[0] // many // 2, 2, rows.shape[1])
    return replace(pair, b=replace(pair.b, array=np.ascontiguousarray(split.swapaxes(1, 2)).reshape(rows.shape)))
