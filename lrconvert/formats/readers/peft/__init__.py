"""PEFT LoRA: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``, or that file alone beside its
config. The update is ``scale * B @ A`` with scale alpha / r (rsLoRA: alpha / sqrt(r)), ranks and alphas by pattern.

Linear layers, convolutions, embeddings, stacks of experts, slices of fused layers. DoRA's magnitudes, biases, trained
tokens and whole modules ride along as extra tensors. Everything of PEFT's LoRA that changes the update in another way
is refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from lrconvert.core.errors import ConfigError, EmptyAdapterError, LrcError, UnsupportedLoraError
from lrconvert.formats.readers.base import CONFIG_NAME, Reader
from lrconvert.formats.readers.peft import config as configs
from lrconvert.formats.readers.peft import experts, extras, layers, names
from lrconvert.formats.readers.peft.config import Settings, check_config
from lrconvert.formats.readers.peft.patterns import check_work, compile_pattern
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.formats.readers.shared.weights import Weights, open_weights, weights_in
from lrconvert.io.container import ContainerFile, combined_digest, read_json, tensor_digest
from lrconvert.lora.adapter import ExtraTensor, LoraAdapter, LoraTarget, Provenance

__all__ = ["CONFIG_NAME", "PICKLE_NAME", "READER", "WEIGHTS_NAME", "check_config", "check_work", "compile_pattern"]

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
_MULTIHEAD = names.BASE_LAYER + ".out_proj"


def recognises(path: Path) -> bool:
    """A folder with an adapter_config.json that is not MLX's, or a file with PEFT's tensor names."""
    if path.is_dir():
        try:
            config = read_json(path / CONFIG_NAME)
        except LrcError:
            return (path / CONFIG_NAME).exists()
        if config.get("peft_type") in ("VBLORA", "MISS", "BONE", "SBORA"):  # have readers of their own
            return False
        return "peft_type" in config or not {"fine_tune_type", "lora_parameters"} & set(config)
    try:
        with ContainerFile(path) as file:
            stored = [info.name for info in file.tensors]
            other = any(n.endswith((".miss_block", ".bone_block", "base_model.vblora_vector_bank")) for n in stored)
            return any(n.startswith(names.PREFIX) for n in stored) and not other
    except LrcError:
        return path.name in (WEIGHTS_NAME, PICKLE_NAME)


def read(path: Path, options: ReadOptions) -> LoraAdapter:
    """A PEFT LoRA as a `LoraAdapter`: factors with their stored bits, scales folded, other tensors as extras.

    Names are ``<module>.weight``; the orientation is what the configuration claims, to be settled when the adapter
    meets a base. Raises E-NOT-LORA, E-LORA-FEATURE, E-CONFIG, E-PATTERN, E-PAIR, E-TENSOR, E-VALUE, E-EMPTY, E-DTYPE,
    E-INDEX, E-LIMIT, E-PICKLE.
    """
    config_path = _find_config(path)
    raw = read_json(config_path)
    try:
        settings = configs.parse(raw)
    except LrcError as error:
        raise error.at(config_path) from None
    weights_path = weights_in(path, (WEIGHTS_NAME, PICKLE_NAME))
    with open_weights(weights_path, options) as weights:
        try:
            found = names.sort(weights.tensors)
            lora = _convert(found, settings, weights)
            source = combined_digest(
                (i.name, tensor_digest(i.name, i.dtype, i.shape, [weights.read(i)])) for i in weights.tensors
            )
            weights.check_unchanged()
        except LrcError as error:
            raise error.at(weights_path) from None
    fields = {**settings.fields, **_embeddings(found)}
    came = Provenance(source, settings.base_model, settings.revision, settings.task_type, fields)
    return replace(lora, provenance=came)


def _convert(found: names.Sorted, settings: Settings, weights: Weights) -> LoraAdapter:
    if not found.modules:
        raise EmptyAdapterError(
            f"the file holds no lora_A / lora_B pair among its {len(weights.tensors)} tensors",
            fix="is it an adapter that was saved empty?",
        )
    check_work([*settings.ranks.patterns, *settings.alphas.patterns], found.modules)
    parameters = experts.wrapped(found.modules, settings)
    _check_wrappers(found.modules.keys() - parameters.keys())
    experts.count(parameters, dict(found.modules), settings)
    targets: list[LoraTarget] = []
    carried: list[ExtraTensor] = []
    for module, parts in sorted(found.modules.items()):
        if module in parameters:
            targets += experts.read_parameter(module, parameters[module], parts, settings, weights)
        else:
            converted = layers.read_module(module, parts, settings, weights)
            targets += converted.targets
            carried += converted.extras
    whole = {extra.name: extra for extra in extras.read_extras(found.others, weights)}
    rows = list(extras.read_tokens(found.tokens, whole, settings, weights))
    replaced = {extra.name for extra in rows}
    carried += [*rows, *(extra for name, extra in whole.items() if name not in replaced)]
    return LoraAdapter(
        targets=tuple(sorted(targets, key=lambda pair: pair.target)),
        extras=layers.sort_extras(carried),
        warnings=_warnings(targets, carried, settings, found, parameters),
    )


def _embeddings(found: names.Sorted) -> dict[str, str]:
    """A field that tells embeddings from layers that are stored transposed, as an export needs it."""
    modules = [module for module, parts in sorted(found.modules.items()) if "embedding_A" in parts]
    return {"embeddings": ",".join(modules)} if modules and all("," not in module for module in modules) else {}


def _check_wrappers(modules: set[str]) -> None:
    """Refuse wrappers inside modules, but for those of parameters. Raises E-LORA-FEATURE."""
    for module in sorted(modules):
        if module.endswith(_MULTIHEAD):
            raise UnsupportedLoraError(
                f"{module.removesuffix(_MULTIHEAD)} is an nn.MultiheadAttention: PEFT adds the update of its out_proj "
                "twice when it runs and merges, and once in get_delta_weight",
                fix="merge it into its base with PEFT and use the merged model",
            )
        if f"{names.BASE_LAYER}." in f"{module}." or ".token_adapter." in module:
            raise UnsupportedLoraError(
                f"{module}: an adapter inside another adapter's wrapper", fix="this adapter cannot be converted"
            )


# --- files ----------------------------------------------------------------------------------------------------------


def _find_config(path: Path) -> Path:
    config = (path if path.is_dir() else path.parent) / CONFIG_NAME
    if not config.exists():
        raise ConfigError(
            f"there is no {CONFIG_NAME} beside the weights; without it alpha is unknown",
            fix=f"put the adapter's {CONFIG_NAME} into the same folder",
            path=path,
        )
    return config


# --- warnings -------------------------------------------------------------------------------------------------------


def _warnings(
    targets: Sequence[LoraTarget],
    carried: Sequence[ExtraTensor],
    settings: Settings,
    found: names.Sorted,
    parameters: Mapping[str, str],
) -> tuple[str, ...]:
    lines = []
    idle = [t.target.name for t in targets if t.scale == 0 or not np.any(t.b.decode()) or not np.any(t.a.decode())]
    if idle:
        lines.append(f"{len(idle)} of {len(targets)} targets have an all-zero update, {idle[0]} for one")
    modules = [parameters.get(module, module) for module in found.modules]
    unmatched = settings.ranks.unmatched(modules) | settings.alphas.unmatched(modules)
    if unmatched:
        lines.append(f"patterns of the configuration match no module: {', '.join(sorted(unmatched))}")
    owned = [extra.name for extra in carried]
    absent = [m for m in settings.saved if not any(f".{m}." in f".{name}" for name in owned)]
    if absent and len(absent) == len(settings.saved):
        lines.append(f"modules_to_save names {', '.join(absent)}, but the file holds no such tensors")
    if found.unused:
        lines.append(
            f"{len(found.unused)} tensors are not part of the model and are left out, {found.unused[0]} for one"
        )
    doubt = experts.doubt(sorted(parameters.values()), settings)
    return (*lines, doubt) if doubt else tuple(lines)


def knows(stored: Sequence[str]) -> bool:
    """Whether tensors have PEFT's prefix, whatever their file is called."""
    return any(name.startswith(names.PREFIX) for name in stored)


READER = Reader("peft", "PEFT LoRA folder or adapter_model.safetensors", recognises, read, knows)
