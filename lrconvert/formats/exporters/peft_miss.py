"""PEFT MiSS: the blocks in float32, as PEFT's ``MissConfig`` takes them (``init_weights`` true, "mini" or "bat").

MiSS has one rank, shards along inputs, and linear layers only; `--peft-compatible` of the converter keeps to that.
Trained biases and saved modules go along; DoRA, biases of LoRAs and trained tokens have no place. Targets without a
block are left out. ``lrconvert.json`` keeps the shapes of the layers, which a MiSS does not say, for our own reader.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lrconvert.core.dtypes import Array, round_to
from lrconvert.core.errors import ExportError
from lrconvert.formats.exporters.base import Exporter, ExportOptions, Files
from lrconvert.formats.exporters.peft_lora import base_config, config_file, extras, weights_file
from lrconvert.formats.exporters.peft_lora.layers import PREFIX, endings, module_name
from lrconvert.formats.fidelity import Fidelity
from lrconvert.formats.model_card import model_card, origin, sidecar
from lrconvert.lora.adapter import CompactAdapter, Target
from lrconvert.methods import base as methods
from lrconvert.methods.bone import METHOD
from lrconvert.methods.bone.bat import blocks_of
from lrconvert.methods.bone.form import Config

_ADVICE = "convert again with `lora-to-bone --peft-compatible`, or export to peft-lora"


def _check(compact: CompactAdapter) -> Config:
    """The Config, if PEFT can express it. Raises E-EXPORT naming what it cannot."""
    if compact.method != "bone":
        raise ExportError(f"the file holds a {compact.method} adapter, not bone", fix="export it to peft-lora")
    config: Config = compact.config
    beside = [e.name for e in compact.extras if e.use != "replace"]
    if beside:
        raise ExportError(
            f"PEFT's MiSS has no place for a part of the update: {beside[0]!r}", fix="export to peft-lora"
        )
    reasons = {
        "shards along outputs": any(config.turned),
        "targets of different ranks": len(set(config.ranks) - {0}) > 1,
    }
    found = [reason for reason, present in reasons.items() if present]
    if found:
        raise ExportError(f"PEFT's MiSS has no {', no '.join(found)}", fix=_ADVICE)
    return config


def _linear(target: Target) -> str:
    """The module of a linear layer. Raises E-EXPORT for any other target."""
    if target.view.kind != "matrix":
        raise ExportError(
            f"{target.name!r} ({target.view.text}) is no nn.Linear; PEFT's MiSS has these only",
            fix="export to peft-lora, or convert again with --exclude for these targets",
        )
    return module_name(target)


def _blocks(compact: CompactAdapter, config: Config) -> dict[str, tuple[Target, Array]]:
    """{module: (target, D)}, without targets of rank 0; but one whose name ends with that of another has zeros, since
    PEFT would adapt it."""
    values = methods.values(METHOD, compact)
    kept = {_linear(t) for t, rank in zip(compact.targets, config.ranks, strict=True) if rank}
    found = {}
    for which, (target, rank) in enumerate(zip(compact.targets, config.ranks, strict=True)):
        if rank:
            found[_linear(target)] = target, METHOD.block(config, compact.targets, values, which)
        elif not kept.isdisjoint(endings(target.name.removesuffix(".weight"))):
            shape = max(config.ranks), config.columns(which, target)
            if config.variant == "bat" and math.gcd(*target.matrix_shape) % shape[0]:
                what = f"PEFT would put a Bat of rank {shape[0]} on {target.name!r} {target.matrix_shape}, too"
                raise ExportError(f"{what}, which it does not divide", fix="convert again with --exclude for it")
            found[_linear(target)] = target, np.zeros(shape, np.float32)
    return found


def files(compact: CompactAdapter, options: ExportOptions, fidelity: Fidelity | None) -> Files:
    """See the module's docstring. Raises E-EXPORT for what PEFT cannot express."""
    config = _check(compact)
    blocks = _blocks(compact, config)
    placed = extras.place(compact, blocks.keys(), "MiSS_only")
    tensors = list(placed.entries)
    for module, (_, block) in blocks.items():
        stored = blocks_of(block) if config.variant == "bat" else block
        data = round_to(np.ascontiguousarray(stored), options.dtype).tobytes()
        tensors.append((f"{PREFIX}{module}.miss_block", options.dtype, stored.shape, data))
    settings = {
        **base_config(compact, list(blocks)),
        **placed.config,
        "peft_type": "MISS",
        "r": max(config.ranks),
        "mini_r": config.mini_rank or 1,
        "miss_dropout": 0.0,
        "init_weights": True if config.variant == "bone" else config.variant,
    }
    del settings["fan_in_fan_out"]  # not a field of MiSS
    notes: dict[str, Any] = {
        **sidecar(compact),
        "shapes": {module: list(target.matrix_shape) for module, (target, _) in blocks.items()},
    }
    if config.variant == "bat":
        notes["base_content"] = compact.base.content
    return {
        "adapter_config.json": [config_file(settings)],
        "adapter_model.safetensors": weights_file(sorted(tensors), origin(compact)),
        "README.md": [model_card(compact, "MiSS", options.command, fidelity)],
        "lrconvert.json": [config_file(notes)],
    }


EXPORTER = Exporter("peft-miss", "PEFT MiSS folder", files)
