"""PEFT VB-LoRA: the bank and the top-k codes as PEFT's ``save_only_topk_weights`` has them, in fp32.

PEFT's form has one rank, no gains, one pass, no cut sub-vectors, and linear layers only; `--peft-compatible` of the
converter keeps to that. Trained biases and saved modules go along; DoRA, biases of LoRAs and trained tokens have no
place. fp32 because PEFT cannot load a bf16 top-k file.
"""

from __future__ import annotations

import numpy as np

from lrconvert.core.dtypes import Array
from lrconvert.core.errors import ExportError
from lrconvert.formats.exporters.base import Exporter, ExportOptions, Files
from lrconvert.formats.exporters.peft_lora import base_config, config_file, extras, weights_file
from lrconvert.formats.exporters.peft_lora.layers import PREFIX, is_embedding, module_name
from lrconvert.formats.fidelity import Fidelity
from lrconvert.formats.model_card import model_card, origin, sidecar
from lrconvert.lora.adapter import CompactAdapter, Target
from lrconvert.methods import base as methods
from lrconvert.methods.vblora.form import Config, Form

_ADVICE = "convert again with `lora-to-vblora --peft-compatible`, or export to peft-lora"


def _check(compact: CompactAdapter) -> Config:
    """The Config, if PEFT can express it. Raises E-EXPORT naming what it cannot."""
    if compact.method != "vblora":
        raise ExportError(f"the file holds a {compact.method} adapter, not vblora", fix="export it to peft-lora")
    config: Config = compact.config
    reasons = {
        "gains": config.form.gains,
        "rows coded in several passes": bool(config.passes),
        "cut sub-vectors": config.padded,
        "targets of different ranks": len(set(config.ranks)) > 1,
    }
    beside = [e.name for e in compact.extras if e.use != "replace"]
    if beside:
        raise ExportError(
            f"PEFT's VB-LoRA has no place for a part of the update: {beside[0]!r}", fix="export to peft-lora"
        )
    found = [reason for reason, present in reasons.items() if present]
    if found:
        raise ExportError(f"PEFT's VB-LoRA has no {', no '.join(found)}", fix=_ADVICE)
    return config


def _linear(compact: CompactAdapter, target: Target) -> str:
    """The module of a linear layer. Raises E-EXPORT for any other target."""
    if target.view.kind not in ("matrix", "transposed") or is_embedding(compact, target):
        raise ExportError(
            f"{target.name!r} ({target.view.text}) is no linear layer; PEFT's VB-LoRA has these only",
            fix="export to peft-lora, or convert again with --exclude for these targets",
        )
    return module_name(target)


def _index_type(num_vectors: int) -> tuple[str, np.dtype[np.generic]]:
    """The integer type PEFT saves indices in."""
    if num_vectors < 1 << 8:
        return "U8", np.dtype("u1")
    return ("I16", np.dtype("<i2")) if num_vectors < 1 << 15 else ("I32", np.dtype("<i4"))


def _bank(compact: CompactAdapter, form: Form) -> Array:
    """(h, b) in float32, as `expand` uses it."""
    numbers = methods.values(methods.get("vblora"), compact)
    bank: Array = numbers["bank"]
    return bank if form.bits >= 16 else bank * numbers["scales"][:, None]


def _weights(compact: CompactAdapter, form: Form) -> Array:
    """(codes, k - 1): the weights of all but the last vector; PEFT takes the rest for the last."""
    if form.top_k == 1:
        return np.zeros((len(compact.tensors["indices"]), 0), np.float32)
    if form.exact_weights:
        stored: Array = compact.tensors["weights"]
        return stored
    small = compact.tensors["weights"].astype(np.float64) * form.weight_unit
    first = 1.0 - small.sum(axis=1, keepdims=True)
    return np.concatenate([first, small[:, :-1]], axis=1).astype(np.float32)


def files(compact: CompactAdapter, options: ExportOptions, fidelity: Fidelity | None) -> Files:
    """See the module's docstring. Raises E-EXPORT for what PEFT cannot express, and for another `--dtype`."""
    config = _check(compact)
    if options.dtype != "F32":
        raise ExportError("PEFT cannot load a VB-LoRA file below fp32", fix="leave --dtype out")
    form, rank = config.form, config.ranks[0]
    index_name, index_type = _index_type(form.num_vectors)
    indices, weights = compact.tensors["indices"].astype(index_type), _weights(compact, form)
    if form.exact_weights:  # the first vector takes what the others leave; PEFT's last one does
        indices = np.roll(indices, -1, axis=1)
    modules = [_linear(compact, target) for target in compact.targets]
    placed = extras.place(compact, modules, "vblora_only")
    tensors = list(placed.entries)
    bank = np.ascontiguousarray(_bank(compact, form), "<f4")
    tensors.append(("base_model.vblora_vector_bank", "F32", bank.shape, bank.tobytes()))
    at = 0
    for target, module in zip(compact.targets, modules, strict=True):
        for half, length in (("A", target.in_features), ("B", target.out_features)):
            cuts = length // form.vector_length
            codes = slice(at, at + rank * cuts)
            at += rank * cuts
            for suffix, dtype, values in (("indices", index_name, indices), ("weights", "F32", weights)):
                block = values[codes].reshape(rank, cuts, values.shape[1])
                block = np.ascontiguousarray(block if half == "A" else block.swapaxes(0, 1))
                tensors.append(
                    (f"{PREFIX}{module}.vblora_logits_{half}_topk_{suffix}", dtype, block.shape, block.tobytes())
                )
    settings = {
        **base_config(compact, modules),
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
    return {
        "adapter_config.json": [config_file(settings)],
        "adapter_model.safetensors": weights_file(sorted(tensors), origin(compact)),
        "README.md": [model_card(compact, "VB-LoRA", options.command, fidelity)],
        "lrconvert.json": [config_file(sidecar(compact))],
    }


EXPORTER = Exporter("peft-vblora", "PEFT VB-LoRA folder, top-k weights", files)
