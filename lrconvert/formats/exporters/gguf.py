"""GGUF LoRA for llama.cpp (``--lora adapter.gguf``): what its convert_lora_to_gguf.py writes, from the base's config
alone. Tensors ``blk.<n>.<layer>.weight.lora_a`` (r, in) and ``.lora_b`` (out, r); alpha = r, so that the scale is 1
(with own ranks alpha = 0, which means 1 for any rank).

Names are those of `lrconvert.formats.gguf_names`. Two things are unlike transformers: some families' rows of queries
and keys are in another order, and the A of a token embedding is transposed. GPT-2 is right here; llama.cpp's
converter swaps the factors of its Conv1D layers. Format: GGUF version 3, little endian, tensors aligned to 32 bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lrconvert.core.dtypes import Array
from lrconvert.core.errors import ExportError
from lrconvert.formats import gguf_names
from lrconvert.formats.exporters.base import Exporter, ExportOptions, Files
from lrconvert.formats.exporters.peft_lora import config_file
from lrconvert.formats.exporters.shared.plain import EXCLUDE, Pair, module_of, pairs, refuse_extras, stored
from lrconvert.formats.fidelity import Fidelity
from lrconvert.formats.gguf_names import Family
from lrconvert.formats.model_card import model_card, origin, sidecar
from lrconvert.lora.adapter import CompactAdapter, Target
from lrconvert.lora.base_names import ties_embeddings

_ALIGNMENT = 32
_TYPES = {"F32": 0, "F16": 1, "BF16": 30}
_UINT32, _FLOAT32, _STRING = 4, 6, 8  # kinds of metadata


def files(compact: CompactAdapter, options: ExportOptions, fidelity: Fidelity | None) -> Files:
    """See the module's docstring. Raises E-EXPORT for what llama.cpp has no name for or a family that is not known
    here, E-CONFIG for a base's config without what is needed."""
    refuse_extras(compact, "GGUF")
    family, config = _family(options.base_config)
    found = pairs(compact, options)
    tensors: list[tuple[str, Array]] = []
    for pair in found:
        name = _name(pair.target, family, config)
        b = _in_order(pair, name, family, config)
        tensors.append((f"{name}.weight.lora_a", pair.a.T if name == "token_embd" else pair.a))
        tensors.append((f"{name}.weight.lora_b", b))
    alpha = 0.0 if options.keep_ranks else float(found[0].rank)
    return {
        "adapter.gguf": _gguf(_metadata(compact, family.id, alpha), sorted(tensors, key=lambda t: t[0]), options.dtype),
        "README.md": [model_card(compact, "GGUF LoRA", options.command, fidelity, "")],
        "lrconvert.json": [config_file(sidecar(compact))],
    }


def _family(config: Mapping[str, Any] | None) -> tuple[Family, Mapping[str, Any]]:
    if config is None:
        raise ExportError(
            "llama.cpp's names depend on the base, which was not given", fix="give --base; its config.json is enough"
        )
    family = gguf_names.FAMILIES.get(gguf_names.architecture(config))
    if family is None:
        name = gguf_names.architecture(config) or "model without architectures"
        raise ExportError(
            f"the base is a {name:.60}, whose names in llama.cpp are not known here",
            fix="export to peft-lora, and convert that with llama.cpp's convert_lora_to_gguf.py",
        )
    return family, config


def _name(target: Target, family: Family, config: Mapping[str, Any]) -> str:
    """llama.cpp's name of a target. Raises E-EXPORT."""
    name = family.named(module_of(target, "GGUF"))
    if name is None:
        raise ExportError(f"llama.cpp takes no LoRA on {target.name!r:.120} of a {family.id}", fix=EXCLUDE)
    if name == "output" and ties_embeddings(config):
        what = f"{target.name!r} is the base's embedding as well, and llama.cpp adapts that only"
        raise ExportError(what, fix=EXCLUDE)
    return name


def _in_order(pair: Pair, name: str, family: Family, config: Mapping[str, Any]) -> Array:
    """B (out, r) with its rows in llama.cpp's order. Raises E-CONFIG."""
    order = family.rows.get(name.rpartition(".")[2])
    return pair.b if order is None else pair.b[gguf_names.row_order(order, pair.b.shape[0], config)]


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
    found += [
        (f"general.{key.replace('_', '.')}", came.fields[key])
        for key in ("license", "license_name", "license_link")
        if came.fields.get(key)
    ]
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
