"""GGUF LoRA for llama.cpp (``--lora adapter.gguf``): what its convert_lora_to_gguf.py writes, from the base's config
alone. Tensors ``blk.<n>.<layer>.weight.lora_a`` (r, in) and ``.lora_b`` (out, r); the scale is
alpha / r (with own ranks alpha = 0, which means 1 for any rank).

Names are those of `lrconvert.formats.gguf_names`. Three things are unlike transformers: some families' rows of queries
and keys are in another order, the A of a token embedding is transposed, and the experts of a layer are one tensor of
three dimensions, (experts, r, in) and (experts, out, r), gates and ups apart. GPT-2 is right here; llama.cpp's
converter swaps the factors of its Conv1D layers. Format: GGUF version 3, little endian, tensors aligned to 32 bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lrconvert.core.dtypes import Array
from lrconvert.core.errors import ConfigError, ExportError
from lrconvert.core.wording import spelled
from lrconvert.formats import gguf_names
from lrconvert.formats.exporters.base import Exporter, ExportOptions, Folder
from lrconvert.formats.exporters.peft_lora.stacks import in_order
from lrconvert.formats.exporters.shared.files import stored
from lrconvert.formats.exporters.shared.plain import (
    Pair,
    alpha_of,
    exclude,
    factors,
    module_of,
    refuse_extras,
    unscaled,
)
from lrconvert.formats.gguf_names import Family, Slices
from lrconvert.formats.model_card import origin
from lrconvert.lora.adapter import Adapter, Target
from lrconvert.lora.base_names import ties_embeddings

_NAME = "adapter.gguf"
_ALIGNMENT = 32
_TYPES = {"F32": 0, "F16": 1, "BF16": 30}
_UINT32, _FLOAT32, _STRING = 4, 6, 8  # kinds of metadata


def files(adapter: Adapter, options: ExportOptions) -> Folder:
    """Return the GGUF file. Raises E-EXPORT for what llama.cpp has no name for or a family that is not known here,
    E-CONFIG for a base's config without what is needed."""
    refuse_extras(adapter, "GGUF")
    family, config = _family(options.base_config)
    tensors: dict[str, Array] = {}
    stacks: dict[str, _Stack] = {}
    made = factors(adapter, options, unscaled if options.keep_ranks else None)
    for pair in made.pairs:
        rank = pair.rank
        place = family.of_experts(pair.target.name)
        if place is not None:
            _add_expert(stacks, in_order(pair, place[2][0].turned), place, config)
            continue
        name = _name(pair.target, family, config)
        tensors[f"{name}.weight.lora_a"] = pair.a.T if name == "token_embd" else pair.a
        tensors[f"{name}.weight.lora_b"] = _in_order(pair, name, family, config)
    for name, stack in stacks.items():
        tensors |= zip((f"{name}.weight.lora_a", f"{name}.weight.lora_b"), stack.factors(), strict=True)
    alpha = 0.0 if options.keep_ranks else float(alpha_of(made.scale, rank))
    metadata = _metadata(adapter, family.id, alpha)
    return Folder({_NAME: _gguf(metadata, sorted(tensors.items()), made.dtype)}, made.notes)


def _family(config: Mapping[str, Any] | None) -> tuple[Family, Mapping[str, Any]]:
    if config is None:
        fix = f"give {spelled('base', ...)}; its config.json is enough"
        raise ExportError("llama.cpp's names depend on the base, which was not given", fix=fix)
    name = gguf_names.architecture(config)
    if name not in gguf_names.FAMILIES:
        raise ExportError(
            f"the base is a {name or 'model without architectures':.60}, whose names in llama.cpp are not known here",
            fix="export to peft-lora, and convert that with llama.cpp's convert_lora_to_gguf.py",
        )
    return gguf_names.FAMILIES[name], config


def _name(target: Target, family: Family, config: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of a target. Raises E-EXPORT."""
    name = family.named(module_of(target, "GGUF"))
    if name is None:
        raise ExportError(f"llama.cpp takes no LoRA on {target.name!r:.120} of a {family.id}", fix=exclude())
    if name in ("output", "token_embd") and ties_embeddings(config):
        what = f"{target.name!r:.120} is tied to the other embedding of the base; llama.cpp aborts at a LoRA on either"
        raise ExportError(what, fix=exclude())
    if not family.is_adapted(name):
        what = f"llama.cpp loads a LoRA on {target.name!r:.120} of a {family.id}, and computes without it"
        raise ExportError(what, fix=exclude())
    return name


def _in_order(pair: Pair, name: str, family: Family, config: Mapping[str, Any]) -> Array:
    """Return B (out, r) with its rows in llama.cpp's order. Raises E-CONFIG."""
    order = family.rows.get(name.rpartition(".")[2])
    return pair.b if order is None else pair.b[gguf_names.row_order(order, pair.b.shape[0], config)]


# --- experts --------------------------------------------------------------------------------------------------------


@dataclass
class _Stack:
    """The factors of one layer of all experts, by their number."""

    count: int
    pairs: dict[int, tuple[Array, Array]] = field(default_factory=dict)

    def factors(self) -> tuple[Array, Array]:
        """Return A (experts, r, in) and B (experts, out, r), zeros for experts without an update, in one rank."""
        rank = max(a.shape[0] for a, _ in self.pairs.values())
        first, second = next(iter(self.pairs.values()))
        kind = np.result_type(*(half.dtype for pair in self.pairs.values() for half in pair))
        a = np.zeros((self.count, rank, first.shape[1]), kind)
        b = np.zeros((self.count, second.shape[0], rank), kind)
        for number, (one, other) in self.pairs.items():
            a[number, : len(one)], b[number, :, : len(one)] = one, other
        return a, b


def _add_expert(
    stacks: dict[str, _Stack], pair: Pair, place: tuple[int, int | None, Slices], config: Mapping[str, Any]
) -> None:
    """Add the update of one expert to the stacks that have its rows. Raises E-EXPORT, E-CONFIG."""
    block, number, slices = place
    target = pair.target
    if number is None:
        kind, _, said = target.view.text.partition(":")
        if not kind.startswith("expert"):
            what = f"{target.name!r:.120} is a stack of experts, of which the adapter changes {target.view.text}"
            raise ExportError(what, fix=exclude())
        number, count = int(said), target.shape[0]
    else:
        count = _expert_count(config, number)
    out = target.out_features
    if out % slices[0].count:
        raise ExportError(f"{target.name!r:.120} has {out} rows, which are not gates and ups", fix=exclude())
    for one in slices:
        stack = stacks.setdefault(f"blk.{block}.{one.name}", _Stack(count))
        if number in stack.pairs:
            raise ExportError(f"{target.name!r:.120} is adapted twice, in a stack and by itself", fix=exclude())
        stack.pairs[number] = (pair.a, pair.b[one.rows(out)])


def _expert_count(config: Mapping[str, Any], number: int) -> int:
    """Return how many experts a layer of the base has. Raises E-CONFIG."""
    text = config.get("text_config")
    settings = {**config, **(text if isinstance(text, dict) else {})}
    stated = next((settings[key] for key in _EXPERT_COUNTS if settings.get(key) is not None), None)
    if type(stated) is not int or not number < stated <= _MAX_EXPERTS:
        raise ConfigError(f"the base's config has {stated!r:.40} experts, the adapter changes number {number}")
    return stated


_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_MAX_EXPERTS = 1 << 14


# --- the file -------------------------------------------------------------------------------------------------------

_Value = str | int | float


def _metadata(adapter: Adapter, family: str, alpha: float) -> dict[str, _Value]:
    fields, base = adapter.provenance.fields, adapter.provenance.base_model
    licence = {key: fields[key] for key in ("license", "license_name", "license_link") if fields.get(key)}
    return {
        "general.architecture": family,
        "general.type": "adapter",
        "general.quantization_version": 2,
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
        **{f"general.{key.replace('_', '.')}": text for key, text in licence.items()},
        **({"general.base_model.count": 1, "general.base_model.0.name": base} if base else {}),
        **{key.replace("_", ".", 1): text for key, text in origin(adapter).items()},
    }


def _gguf(metadata: Mapping[str, _Value], tensors: Sequence[tuple[str, Array]], dtype: str) -> Iterator[bytes]:
    """Yield a GGUF file in pieces. Dimensions stand innermost first."""
    size = 4 if dtype == "F32" else 2
    head = bytearray(struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
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


EXPORTER = Exporter(
    "gguf",
    "a GGUF LoRA for llama.cpp",
    files,
    kind="GGUF LoRA",
    usage="sh\nllama-cli -m BASE.gguf --lora adapter.gguf",
    consumers=("llamacpp",),
    weights=_NAME,
)
