"""PEFT LoRA: the one form that every server loads. The scale is baked in, and all modules get one rank by default
(alpha = r, zero-padded, no patterns), because several servers ignore rank_pattern, alpha_pattern or rsLoRA.

Linear layers, Conv1D, convolutions, embeddings, stacks of experts and other parameters; DoRA's magnitudes, biases,
trained tokens, saved modules. Which of it a server understands is for `check` to say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lrconvert.core.errors import ExportError
from lrconvert.formats.exporters.base import Exporter, ExportOptions, Files
from lrconvert.formats.exporters.peft_lora import extras
from lrconvert.formats.exporters.peft_lora.extras import Entry
from lrconvert.formats.exporters.peft_lora.layers import PREFIX, Factors, Layer, adapted_layers, endings
from lrconvert.formats.exporters.shared.plain import entry
from lrconvert.formats.fidelity import Fidelity
from lrconvert.formats.model_card import model_card, origin, sidecar
from lrconvert.formats.readers.peft.experts import says_transposed
from lrconvert.io.container import encode_header
from lrconvert.lora.adapter import CompactAdapter
from lrconvert.methods import base as methods

_READS_OUT_IN = "0.19.0"  # the PEFT whose meaning of a stack of experts is written


def base_config(compact: CompactAdapter, modules: Sequence[str]) -> dict[str, Any]:
    """Fields that every PEFT configuration has."""
    came = compact.provenance
    return {
        "base_model_name_or_path": came.base_model or None,
        "revision": came.revision or None,
        "task_type": came.task_type or None,
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted(modules),
        "modules_to_save": None,
    }


def weights_file(tensors: Sequence[Entry], notes: Mapping[str, str]) -> Iterator[bytes]:
    """A safetensors file in pieces; `notes` are its metadata besides the format."""
    yield encode_header([(name, dtype, shape) for name, dtype, shape, _ in tensors], {"format": "pt", **notes})
    for *_, data in tensors:
        yield data


def config_file(config: dict[str, Any]) -> bytes:
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def files(compact: CompactAdapter, options: ExportOptions, fidelity: Fidelity | None) -> Files:
    """See the module's docstring. Raises E-EXPORT if nothing is left, or for what PEFT cannot express."""
    found = _layers(compact, options)
    top = max(layer.rank for layer in found)
    modules = [layer.name for layer in found if not layer.is_parameter]
    placed = extras.place(compact, modules)
    uses = {e.use for e in compact.extras}
    turned = _turned(compact, found)
    _check_together(found, uses, turned)
    tensors = [*placed.entries, *_missing_biases(compact, found, uses)]
    for layer in found:
        for half in layer.halves:
            tensors.append(entry(half.name, options.dtype, half.values))
    ranks = _patterns(found, top)
    config = {
        **base_config(compact, modules),
        "peft_type": "LORA",
        "r": top,
        "lora_alpha": top,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": "magnitude" in uses,
        "lora_bias": "add" in uses,
        "fan_in_fan_out": turned,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        **placed.config,
        **_parameters(compact, found),
    }
    return {
        "adapter_config.json": [config_file(config)],
        "adapter_model.safetensors": weights_file(sorted(tensors), origin(compact)),
        "README.md": [model_card(compact, "LoRA", options.command, fidelity)],
        "lrconvert.json": [config_file(sidecar(compact))],
    }


def _layers(compact: CompactAdapter, options: ExportOptions) -> list[Layer]:
    """Everything that is adapted. Modules that were pruned to rank 0 are left out, unless DoRA or a bias changes them
    all the same, or PEFT would adapt them because their name ends with one that is listed."""
    expanded = list(methods.expand_all(compact))
    kept = {target.name.removesuffix(".weight") for target, a, _ in expanded if a.shape[0]}
    kept |= {extras.owner(e.name) for e in compact.extras if e.use in ("magnitude", "add")}
    factors: list[Factors] = []
    for target, a, b in expanded:
        module = target.name.removesuffix(".weight")
        if module in kept or not kept.isdisjoint(endings(module)):
            factors.append((target, a, b))
    if not factors:
        raise ExportError("every target has rank 0, there is nothing to export")
    _check_dora(compact, factors)
    top = options.rank(max(1, *(a.shape[0] for _, a, _ in factors)))
    rank: Callable[[int], int] = (lambda own: max(own, 1)) if options.keep_ranks else (lambda own: top)
    return adapted_layers(compact, factors, rank)


def _check_dora(compact: CompactAdapter, factors: Sequence[Factors]) -> None:
    """Raise E-EXPORT unless all targets or none have a magnitude: PEFT's use_dora holds for the whole adapter."""
    owners = {e.name for e in compact.extras if e.use == "magnitude"}
    without = [target.name for target, _, _ in factors if target.name not in owners]
    if owners and without:
        raise ExportError(
            f"{without[0]!r} has no DoRA magnitude and others have; PEFT's use_dora holds for all or none",
            fix="convert again with --bake-dora, or --exclude one of the two kinds",
        )


def _check_together(found: Sequence[Layer], uses: Collection[str], turned: bool) -> None:
    """Raise E-EXPORT for what PEFT refuses to have in one adapter, since each is one switch for all of it."""
    switches = {
        "DoRA magnitudes": "magnitude" in uses,
        "biases of LoRAs": "add" in uses,
        "layers that are stored transposed": turned,
    }
    present = [name for name, on in switches.items() if on]
    advice = "convert again with --exclude for one of the two kinds"
    parameter = next((layer.name for layer in found if layer.is_parameter), "")
    if parameter and present:
        raise ExportError(f"{parameter!r} cannot be in one adapter with {present[0]}; PEFT refuses that", fix=advice)
    if "add" not in uses:
        return
    if "magnitude" in uses:
        raise ExportError(
            "DoRA magnitudes cannot be in one adapter with biases of LoRAs; PEFT refuses that",
            fix="convert again with --bake-dora",
        )
    for layer in found:
        if layer.is_embedding:
            raise ExportError(
                f"{layer.name!r} is an embedding, which cannot be in one adapter with biases of LoRAs; "
                "PEFT refuses that",
                fix=advice,
            )


def _patterns(found: Sequence[Layer], top: int) -> dict[str, int]:
    """Ranks below `top` by name. PEFT takes a key for a regular expression on the end of a name, so one that another
    name ends with is anchored."""
    inner = {ending for layer in found for ending in endings(layer.name)}
    return {
        f"^{re.escape(layer.name)}" if layer.name in inner else layer.name: layer.rank
        for layer in found
        if layer.rank != top
    }


def _missing_biases(compact: CompactAdapter, found: Sequence[Layer], uses: Collection[str]) -> Iterator[Entry]:
    """Zeros for the layers without a bias of their LoRA, where others have one."""
    owners = {extras.owner(e.name) for e in compact.extras if e.use == "add"}
    for layer in found if "add" in uses else ():
        if layer.name not in owners:
            out = layer.halves[1].values.shape[0]
            yield f"{PREFIX}{layer.name}.lora_B.bias", "F32", (out,), np.zeros(out, "<f4").tobytes()


def _turned(compact: CompactAdapter, found: Sequence[Layer]) -> bool:
    """Whether a layer is stored (in, out): Conv1D. Embeddings always are."""
    names = {layer.target for layer in found if not layer.is_embedding and not layer.is_parameter}
    return any(t.view.kind == "transposed" for t in compact.targets if t.name in names)


def _parameters(compact: CompactAdapter, found: Sequence[Layer]) -> dict[str, Any]:
    """The fields for `target_parameters`. Raises E-EXPORT for stacks that PEFT would read in another layout."""
    names = [layer.name for layer in found if layer.is_parameter]
    if not names:
        return {}
    came = compact.provenance
    base_class = came.fields.get("base_model_class", "")
    turned = {t.view.kind == "expert_transposed" for t in compact.targets if t.view.kind.startswith("expert")}
    says = says_transposed(base_class, came.base_model)
    if turned and turned != {says}:
        layout = "(experts, in, out)" if not says else "(experts, out, in)"
        raise ExportError(
            f"the experts are stored {layout}, and PEFT takes those of {base_class or 'this model'!s} otherwise",
            fix="convert again with --base, or merge the adapter into the base",
        )
    fields: dict[str, Any] = {"target_parameters": sorted(names), "peft_version": _READS_OUT_IN}
    library = came.fields.get("parent_library", "")
    if base_class and library:
        fields["auto_mapping"] = {"base_model_class": base_class, "parent_library": library}
    return fields


EXPORTER = Exporter("peft-lora", "PEFT LoRA folder, scale baked in, one rank", files)
