"""PEFT VB-LoRA: the bank and the top-k codes as PEFT's ``save_only_topk_weights`` has them, in fp32.

PEFT's form has one rank, no gains, one pass, no cut sub-vectors, and linear layers only; `--peft-compatible` of the
converter keeps to that. Trained biases and saved modules go along; DoRA, biases of LoRAs and trained tokens have no
place. fp32 because PEFT cannot load a bf16 top-k file.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lrconvert.core.dtypes import Array
from lrconvert.core.errors import ExportError
from lrconvert.core.wording import spelled
from lrconvert.formats.exporters.base import Exporter, ExportOptions, Files
from lrconvert.formats.exporters.shared import peft
from lrconvert.formats.exporters.shared.files import Entry
from lrconvert.formats.exporters.shared.peft_extras import place
from lrconvert.formats.readers.peft.names import PREFIX
from lrconvert.lora.adapter import Adapter, CompactAdapter, Target
from lrconvert.methods import base as methods
from lrconvert.methods.vblora.form import Config, Form

_LAYOUT = "PEFT's VB-LoRA"


def _linear(compact: CompactAdapter, target: Target) -> str:
    is_linear = target.view.kind in ("matrix", "transposed") and not peft.is_embedding(compact, target)
    return peft.linear_module(target, _LAYOUT, is_linear)


def _index_type(num_vectors: int) -> tuple[str, np.dtype[np.generic]]:
    """Return the integer type in which PEFT saves indices."""
    if num_vectors < 1 << 8:
        return "U8", np.dtype("u1")
    return ("I16", np.dtype("<i2")) if num_vectors < 1 << 15 else ("I32", np.dtype("<i4"))


def _bank(compact: CompactAdapter, form: Form) -> Array:
    """Return the bank (h, b) in float32, as `expand` uses it."""
    numbers = methods.values(methods.get("vblora"), compact)
    bank: Array = numbers["bank"]
    return bank if form.bits >= 16 else bank * numbers["scales"][:, None]


def _weights(compact: CompactAdapter, form: Form) -> Array:
    """Return (codes, k - 1): the weights of all but the last vector; PEFT takes the rest for the last."""
    if form.top_k == 1:
        return np.zeros((len(compact.tensors["indices"]), 0), np.float32)
    if form.exact_weights:
        stored: Array = compact.tensors["weights"]
        return stored
    small = compact.tensors["weights"].astype(np.float64) * form.weight_unit
    first = 1.0 - small.sum(axis=1, keepdims=True)
    return np.concatenate([first, small[:, :-1]], axis=1).astype(np.float32)


def files(adapter: Adapter, options: ExportOptions) -> Files:
    """Return the configuration, the bank and the codes. Raises E-EXPORT for what PEFT cannot express, and for another
    `--dtype`."""
    compact = peft.of_method(adapter, "vblora", _LAYOUT)
    config: Config = compact.config
    features = {
        "gains": config.form.gains,
        "rows coded in several passes": bool(config.passes),
        "cut sub-vectors": config.padded,
        "targets of different ranks": len(set(config.ranks)) > 1,
    }
    peft.check_form(compact, _LAYOUT, features, "vblora")
    if options.dtype not in (None, "F32"):
        raise ExportError("PEFT cannot load a VB-LoRA file below fp32", fix=f"leave {spelled('dtype')} out")
    form, rank = config.form, config.ranks[0]
    modules = [_linear(compact, target) for target in compact.targets]
    placed = place(compact, modules, "vblora_only")
    bank = np.ascontiguousarray(_bank(compact, form), "<f4")
    tensors = [*placed.entries, ("base_model.vblora_vector_bank", "F32", bank.shape, bank.tobytes())]
    tensors += _codes(compact, modules, form, rank)
    settings = {
        **peft.base_settings(compact, modules),
        **placed.config,
        "fan_in_fan_out": any(t.view.kind == "transposed" for t in compact.targets),
        "peft_type": "VBLORA",
        "r": rank,
        "num_vectors": form.num_vectors,
        "vector_length": form.vector_length,
        "topk": form.top_k,
        "save_only_topk_weights": True,
        "vblora_dropout": 0.0,
    }
    return peft.folder(compact, settings, tensors)


def _codes(compact: CompactAdapter, modules: list[str], form: Form, rank: int) -> Iterator[Entry]:
    """Yield the indices and weights of every factor, (rank, vectors of a row, k): B's transposed in the first two."""
    index_name, index_type = _index_type(form.num_vectors)
    indices, weights = compact.tensors["indices"].astype(index_type), _weights(compact, form)
    if form.exact_weights:  # the first vector takes what the others leave; PEFT's last one does
        indices = np.roll(indices, -1, axis=1)
    at = 0
    for target, module in zip(compact.targets, modules, strict=True):
        for half, length in (("A", target.in_features), ("B", target.out_features)):
            cuts = length // form.vector_length
            codes = slice(at, at + rank * cuts)
            at += rank * cuts
            for suffix, dtype, values in (("indices", index_name, indices), ("weights", "F32", weights)):
                block = values[codes].reshape(rank, cuts, values.shape[1])
                block = np.ascontiguousarray(block if half == "A" else block.swapaxes(0, 1))
                yield f"{PREFIX}{module}.vblora_logits_{half}_topk_{suffix}", dtype, block.shape, block.tobytes()


EXPORTER = Exporter(
    "peft-vblora", "a PEFT VB-LoRA folder, top-k weights", files, kind="VB-LoRA", library="peft", usage=peft.USAGE
)
