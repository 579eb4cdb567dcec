"""PEFT MiSS: the blocks in float32, as PEFT's ``MissConfig`` takes them (``init_weights`` true, "mini" or "bat").

MiSS has one rank, shards along inputs, and linear layers only; `--peft-compatible` of the converter keeps to that.
Trained biases and saved modules go along; DoRA, biases of LoRAs and trained tokens have no place. Targets without a
block are left out. ``lrconvert.json`` keeps the shapes of the layers, which a MiSS does not say, for our own reader.
"""

from __future__ import annotations

import math

import numpy as np

from lrconvert.core.dtypes import Array, round_to
from lrconvert.core.errors import ExportError
from lrconvert.formats.exporters.base import Exporter, ExportOptions, Files
from lrconvert.formats.exporters.shared import peft
from lrconvert.formats.exporters.shared.files import json_file
from lrconvert.formats.exporters.shared.peft_extras import place
from lrconvert.formats.exporters.shared.plain import exclude
from lrconvert.formats.model_card import sidecar
from lrconvert.formats.readers.peft.names import PREFIX
from lrconvert.lora.adapter import Adapter, CompactAdapter, Target
from lrconvert.methods import base as methods
from lrconvert.methods.bone import METHOD
from lrconvert.methods.bone.bat import blocks_of
from lrconvert.methods.bone.form import Config

_LAYOUT = "PEFT's MiSS"


def _blocks(compact: CompactAdapter, config: Config) -> dict[str, tuple[Target, Array]]:
    """Return {module: (target, D)}, without targets of rank 0; but one whose name ends with that of another has zeros,
    since PEFT would adapt it."""
    values = methods.values(METHOD, compact)
    layers = list(zip(compact.targets, config.ranks, strict=True))
    kept = {_linear(target) for target, rank in layers if rank}
    blocks = {}
    for which, (target, rank) in enumerate(layers):
        if rank:
            blocks[_linear(target)] = target, METHOD.block(config, compact.targets, values, which)
        elif not kept.isdisjoint(peft.endings(target.name.removesuffix(".weight"))):
            shape = max(config.ranks), config.columns(which, target)
            if config.variant == "bat" and math.gcd(*target.matrix_shape) % shape[0]:
                what = f"PEFT would put a Bat of rank {shape[0]} on {target.name!r} {target.matrix_shape}, too"
                raise ExportError(f"{what}, which it does not divide", fix=exclude())
            blocks[_linear(target)] = target, np.zeros(shape, np.float32)
    return blocks


def _linear(target: Target) -> str:
    return peft.linear_module(target, _LAYOUT, target.view.kind == "matrix")


def files(adapter: Adapter, options: ExportOptions) -> Files:
    """Return the configuration, the blocks, and the shapes of layers. Raises E-EXPORT for what PEFT cannot express."""
    compact = peft.of_method(adapter, "bone", _LAYOUT)
    config: Config = compact.config
    features = {
        "shards along outputs": any(config.turned),
        "targets of different ranks": len(set(config.ranks) - {0}) > 1,
    }
    peft.check_form(compact, _LAYOUT, features, "bone")
    blocks = _blocks(compact, config)
    placed = place(compact, blocks.keys(), "MiSS_only")
    tensors = list(placed.entries)
    dtype = options.dtype or "F32"
    for module, (_, block) in blocks.items():
        stored = blocks_of(block) if config.variant == "bat" else block
        data = round_to(np.ascontiguousarray(stored), dtype).tobytes()
        tensors.append((f"{PREFIX}{module}.miss_block", dtype, stored.shape, data))
    settings = {
        **peft.base_settings(compact, list(blocks)),
        **placed.config,
        "peft_type": "MISS",
        "r": max(config.ranks),
        "mini_r": config.mini_rank or 1,
        "miss_dropout": 0.0,
        "init_weights": True if config.variant == "bone" else config.variant,
    }
    notes = {
        **sidecar(compact),
        "shapes": {module: list(target.matrix_shape) for module, (target, _) in blocks.items()},
        **({"base_content": compact.base.content} if config.variant == "bat" else {}),
    }
    return {**peft.folder(compact, settings, tensors), "lrconvert.json": json_file(notes)}


EXPORTER = Exporter(
    "peft-miss", "a PEFT MiSS folder", files, kind="MiSS", library="peft", usage=peft.USAGE, consumers=("peft",)
)
