"""PEFT LoRA: the one form that every server loads. All modules get one scale, and one rank by default (zero-padded,
no patterns), because several servers ignore rank_pattern, alpha_pattern or rsLoRA.

Linear layers, Conv1D, convolutions, embeddings, stacks of experts and other parameters; DoRA's magnitudes, biases,
trained tokens, saved modules. Which of it a server understands is for `check` to say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np

from lrconvert.core.errors import ExportError
from lrconvert.core.wording import spelled
from lrconvert.formats.exporters.base import Exporter, ExportOptions, Folder
from lrconvert.formats.exporters.peft_lora import groups
from lrconvert.formats.exporters.peft_lora.layers import Layer, adapted_layers
from lrconvert.formats.exporters.peft_lora.stacks import as_peft_stacks
from lrconvert.formats.exporters.shared import peft
from lrconvert.formats.exporters.shared.diffusion import of_one_model
from lrconvert.formats.exporters.shared.files import Entry, entry
from lrconvert.formats.exporters.shared.peft_extras import owner, place
from lrconvert.formats.exporters.shared.plain import Factors, Pair, alpha_of, expanded, settled, unscaled
from lrconvert.formats.readers.peft.names import PREFIX
from lrconvert.lora.adapter import Adapter

_USUAL = re.compile(r"[\w.-]+")
_READS_OUT_IN = "0.19.0"  # the PEFT whose meaning of a stack of experts is written


def files(adapter: Adapter, options: ExportOptions) -> Folder:
    """Return the configuration and the weights. Raises E-EXPORT if nothing is left, or for what PEFT cannot express."""
    adapter, model = of_one_model(adapter, "a PEFT folder")
    layers, made = _layers(adapter, options)
    top = max(layer.rank for layer in layers)
    modules = [layer.name for layer in layers if layer.kind != "parameter"]
    placed = place(adapter, modules)
    uses = {e.use for e in adapter.extras}
    transposed = any(layer.kind == "transposed" for layer in layers)
    _check_together(layers, uses, transposed)
    tensors = [*placed.entries, *(_missing_biases(adapter, layers) if "add" in uses else ())]
    tensors += [entry(name, made.dtype, values) for layer in layers for name, values in layer.factors.items()]
    ranks = _patterns(layers, top)
    alphas = {name: alpha_of(made.scale, rank) for name, rank in ranks.items()}
    settings = {
        **peft.base_settings(adapter, modules),
        "peft_type": "LORA",
        "r": top,
        "lora_alpha": alpha_of(made.scale, top),
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": "magnitude" in uses,
        "lora_bias": "add" in uses,
        "fan_in_fan_out": transposed,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        **placed.config,
        **_parameters(adapter, layers),
    }
    written = peft.folder(adapter, settings, tensors)
    if not model:
        return Folder(written, made.notes)
    note = f"names are those inside the pipeline's {model}: PeftModel.from_pretrained(pipeline.{model}, ...) loads it"
    return Folder(written, (note, *made.notes), consumers=("peft",))


def _layers(adapter: Adapter, options: ExportOptions) -> tuple[list[Layer], Factors]:
    """Return everything that is adapted, and its scale and dtype.

    Modules that were pruned to rank 0 are left out, unless DoRA or a bias changes them all the same, servers fuse them
    with one that is adapted, or PEFT would adapt them because their name ends with one that is listed.
    """
    every = as_peft_stacks(adapter, expanded(adapter), options.base_config)
    kept = {pair.target.name.removesuffix(".weight") for pair in every if pair.rank}
    if not any(e.use == "magnitude" for e in adapter.extras):
        every += groups.missing(kept, [pair.target for pair in every], options.base_config)
    kept |= groups.partners(kept)
    kept |= {owner(e.name) for e in adapter.extras if e.use in ("magnitude", "add")}
    pairs = [(pair, pair.target.name.removesuffix(".weight")) for pair in every]
    adapted = [pair for pair, module in pairs if module in kept or not kept.isdisjoint(peft.endings(module))]
    if not adapted:
        raise ExportError("every target has rank 0, there is nothing to export")
    _check_dora(adapter, adapted)
    has_biases = any(e.use == "add" for e in adapter.extras)  # their scale is folded in
    made = settled(adapted, options, unscaled if has_biases else None)
    top = options.rank(max(1, *(pair.rank for pair in adapted)))
    rank: Callable[[int], int] = (lambda own: max(own, 1)) if options.keep_ranks else (lambda own: top)
    return adapted_layers(adapter, made.pairs, rank), made


def _check_dora(adapter: Adapter, pairs: Sequence[Pair]) -> None:
    """Raise E-EXPORT unless all targets or none have a magnitude: PEFT's use_dora holds for the whole adapter."""
    owners = {e.name for e in adapter.extras if e.use == "magnitude"}
    without = [pair.target.name for pair in pairs if pair.target.name not in owners]
    if owners and without:
        raise ExportError(
            f"{without[0]!r} has no DoRA magnitude and others have; PEFT's use_dora holds for all or none",
            fix=f"convert it with {spelled('bake_dora', ...)}, or {spelled('exclude', ...)} for one of the kinds",
        )


def _check_together(layers: Sequence[Layer], uses: Collection[str], transposed: bool) -> None:
    """Raise E-EXPORT for what PEFT refuses to have in one adapter, since each is one switch for all of it."""
    switches = {
        "DoRA magnitudes": "magnitude" in uses,
        "biases of LoRAs": "add" in uses,
        "layers that are stored transposed": transposed,
    }
    present = [name for name, on in switches.items() if on]
    first = {layer.kind: layer.name for layer in reversed(layers)}
    clash, fix = "", f"convert it with {spelled('exclude', ...)} for one of the two kinds"
    if "parameter" in first and present:
        clash = f"{first['parameter']!r} cannot be in one adapter with {present[0]}"
    elif {"add", "magnitude"} <= set(uses):
        clash = "DoRA magnitudes cannot be in one adapter with biases of LoRAs"
        fix = f"convert it with {spelled('bake_dora', ...)}"
    elif "add" in uses and "embedding" in first:
        clash = f"{first['embedding']!r} is an embedding, which cannot be in one adapter with biases of LoRAs"
    if clash:
        raise ExportError(f"{clash}; PEFT refuses that", fix=fix)


def _patterns(layers: Sequence[Layer], top: int) -> dict[str, int]:
    """Return ranks below `top` by name. PEFT takes a key for a regular expression on the end of a name, so one that
    another name ends with, or that has other characters than names of modules have, is anchored and escaped."""
    inner = {ending for layer in layers for ending in peft.endings(layer.name)}
    return {
        layer.name
        if layer.name not in inner and _USUAL.fullmatch(layer.name)
        else f"^{re.escape(layer.name)}": layer.rank
        for layer in layers
        if layer.rank != top
    }


def _missing_biases(adapter: Adapter, layers: Sequence[Layer]) -> Iterator[Entry]:
    """Yield zeros for the layers without a bias of their LoRA, where others have one."""
    owners = {owner(e.name) for e in adapter.extras if e.use == "add"}
    for layer in layers:
        if layer.name not in owners:
            out = layer.factors[f"{PREFIX}{layer.name}.lora_B.weight"].shape[0]
            yield f"{PREFIX}{layer.name}.lora_B.bias", "F32", (out,), np.zeros(out, "<f4").tobytes()


def _parameters(adapter: Adapter, layers: Sequence[Layer]) -> dict[str, Any]:
    """Return the fields for `target_parameters`."""
    names = [layer.name for layer in layers if layer.kind == "parameter"]
    if not names:
        return {}
    fields = adapter.provenance.fields
    base_class, library = fields.get("base_model_class", ""), fields.get("parent_library", "")
    mapping = {"auto_mapping": {"base_model_class": base_class, "parent_library": library}}
    return {
        "target_parameters": sorted(names),
        "peft_version": _READS_OUT_IN,
        **(mapping if base_class and library else {}),
    }


EXPORTER = Exporter(
    "peft-lora",
    "a PEFT LoRA folder, scale baked in, one rank",
    files,
    kind="LoRA",
    library="peft",
    usage=peft.USAGE,
    consumers=("peft", "vllm", "sglang"),
)
