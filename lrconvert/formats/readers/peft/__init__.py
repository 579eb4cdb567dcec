"""PEFT LoRA: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``, or that file alone beside its
config. The update is ``scale * B @ A`` with scale alpha / r (rsLoRA: alpha / sqrt(r)), ranks and alphas by pattern.

Linear layers, convolutions, embeddings, stacks of experts, slices of fused layers. DoRA's magnitudes, biases, trained
tokens and whole modules ride along as extra tensors. Everything of PEFT's LoRA that changes the update in another way
is refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lrconvert.core.errors import ConfigError, EmptyAdapterError, LrcError, UnsupportedLoraError
from lrconvert.core.limits import MIB
from lrconvert.formats.readers.base import Reader
from lrconvert.formats.readers.peft import experts, extras, layers, names
from lrconvert.formats.readers.peft import stacks as stacked
from lrconvert.formats.readers.peft.config import Settings, parse, provenance_fields
from lrconvert.formats.readers.peft.patterns import check_work
from lrconvert.formats.readers.shared import notes
from lrconvert.formats.readers.shared.folders import (
    CONFIG_NAME,
    INDEX,
    PEFT_WEIGHTS,
    config_path,
    peft_type,
    weights_in,
)
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.formats.readers.shared.pairs import all_zero, sort_extras
from lrconvert.formats.readers.shared.weights import Weights, empty_part, open_weights, source_digest
from lrconvert.io.container import read_json, read_small
from lrconvert.lora.adapter import ExtraTensor, LoraAdapter, LoraTarget, Provenance

_OTHER_READERS = ("VBLORA", "MISS", "BONE", "SBORA", "LOHA", "LOKR", "VERA", "IA3", "ADALORA")
_OTHER_TENSORS = (".miss_block", ".bone_block", "base_model.vblora_vector_bank")
_GENERATING = ("CAUSAL_LM", "SEQ_2_SEQ_LM")  # whose models have their layers inside of another module
_CARD_BYTES = MIB
_NEW_EMBEDDINGS = "new_embeddings.safetensors"
_MULTIHEAD = names.BASE_LAYER + ".out_proj"


def recognises(path: Path) -> bool:
    """Return whether a folder has an adapter_config.json that is not MLX's, or a file has PEFT's tensor names."""
    if path.is_dir():
        try:
            config = read_json(path / CONFIG_NAME)
        except LrcError:
            return (path / CONFIG_NAME).exists()
        if config.get("peft_type") in _OTHER_READERS:
            return False
        return "peft_type" in config or not {"fine_tune_type", "lora_parameters"} & set(config)
    if peft_type(path.parent) in _OTHER_READERS:
        return False
    try:
        with open_weights(path, ReadOptions()) as weights:
            stored = [info.name for info in weights.tensors]
    except LrcError:
        return path.name.removesuffix(INDEX) in PEFT_WEIGHTS
    return not any(name.endswith(_OTHER_TENSORS) for name in stored) and (knows(stored) or _is_beside(path, stored))


def _is_beside(path: Path, stored: Sequence[str]) -> bool:
    """Return whether a file has factors in PEFT's spelling and lies beside the configuration of a LoRA."""
    return peft_type(path.parent) == "LORA" and any(".lora_A" in name for name in stored)


def knows(stored: Sequence[str]) -> bool:
    """Return whether tensors have PEFT's prefix, whatever their file is called."""
    return any(name.startswith(names.PREFIX) for name in stored)


def read(path: Path, options: ReadOptions) -> LoraAdapter:
    """Read a PEFT LoRA: factors with their stored bits, scales folded, other tensors as extras.

    Names are ``<module>.weight``; the orientation is what the configuration claims, to be settled when the adapter
    meets a base. Raises E-NOT-LORA, E-LORA-FEATURE, E-CONFIG, E-PATTERN, E-PAIR, E-TENSOR, E-VALUE, E-EMPTY, E-DTYPE,
    E-INDEX, E-LIMIT, E-PICKLE.
    """
    if not config_path(path).exists():
        what = f"there is no {CONFIG_NAME} beside the weights; without it alpha is unknown"
        raise ConfigError(what, fix=f"put the adapter's {CONFIG_NAME} into the same folder", path=path)
    config = read_json(config_path(path))
    try:
        settings = parse(config)
    except LrcError as error:
        raise error.at(config_path(path)) from None
    if settings.parameters and _card_names_unsloth(config_path(path).with_name("README.md")):
        settings = replace(settings, auto_mapping=settings.auto_mapping._replace(unsloth=True))
    weights_path = weights_in(path, PEFT_WEIGHTS)
    with open_weights(weights_path, options) as weights:
        try:
            _check_saved(weights.empty, settings)
            places = names.sort(weights.tensors)
            lora = _convert(places, settings, weights)
            source = source_digest(weights)
        except LrcError as error:
            raise error.at(weights_path) from None
    beside = _new_embeddings(weights_path.parent)
    odd = [] if options.base is not None else _odd_names(places.modules, settings)
    fields = {**provenance_fields(config, settings), **_embeddings(places)}
    provenance = Provenance(source, settings.base_model, settings.revision, settings.task_type, fields)
    return replace(lora, provenance=provenance, warnings=(*lora.warnings, *odd, *beside))


def _convert(places: names.Sorted, settings: Settings, weights: Weights) -> LoraAdapter:
    modules = places.modules
    if not modules:
        what = f"the file holds no lora_A / lora_B pair among its {len(weights.tensors)} tensors"
        raise EmptyAdapterError(what, fix="is it an adapter that was saved empty?")
    check_work([*settings.ranks.patterns, *settings.alphas.patterns], modules)
    parameters = experts.wrapped(modules, settings)
    _check_wrappers(modules.keys() - parameters.keys())
    experts.check_count(parameters, modules, settings)
    targets: list[LoraTarget] = []
    carried: list[ExtraTensor] = []
    stacks = stacked.find(modules)
    for module, parts in sorted(modules.items()):
        if module in stacks:
            targets += stacked.read(module, parts, stacks, settings, weights)
        elif module in parameters:
            targets += experts.read_parameter(module, parameters[module], parts, settings, weights)
        else:
            own_targets, own_extras = layers.read_module(module, parts, settings, weights)
            targets += own_targets
            carried += own_extras
    whole = {extra.name: extra for extra in extras.read_extras(places.others, weights)}
    rows = list(extras.read_tokens(places.tokens, whole, settings, weights))
    replaced = {extra.name for extra in rows}
    carried += [*rows, *(extra for name, extra in whole.items() if name not in replaced)]
    return LoraAdapter(
        targets=tuple(sorted(targets, key=lambda pair: pair.target)),
        extras=sort_extras(carried),
        warnings=(*all_zero(targets), *notes.notes_of(weights), *_warnings(carried, settings, places, parameters)),
    )


def _embeddings(places: names.Sorted) -> dict[str, str]:
    """Return a field that tells embeddings from layers that are stored transposed, as an export needs it."""
    modules = [module for module, parts in sorted(places.modules.items()) if "embedding_A" in parts]
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
            what = f"{module}: an adapter inside another adapter's wrapper"
            raise UnsupportedLoraError(what, fix="this adapter cannot be converted")


def _check_saved(empty: Sequence[str], settings: Settings) -> None:
    """Raise E-SHAPE if a tensor of modules_to_save is empty."""
    for name in empty:
        if any(f".{module}." in f".{name}" for module in settings.saved):
            raise empty_part(name)


def _card_names_unsloth(card: Path) -> bool:
    try:
        return card.is_file() and b"unsloth" in read_small(card, _CARD_BYTES).lower()
    except LrcError:
        return False


def _new_embeddings(folder: Path) -> list[str]:
    """Return the warning, if any, of rows of new tokens in a file beside, as old servers took them."""
    if not (folder / _NEW_EMBEDDINGS).exists():
        return []
    return [f"{_NEW_EMBEDDINGS} lies beside the adapter and is not read: it holds embeddings of tokens that were added"]


def _odd_names(modules: Iterable[str], settings: Settings) -> list[str]:
    """Return the warning, if any, of modules that are not likely to have these names in a model of transformers."""
    for module in modules:
        first, _, rest = module.partition(".")
        twice = first == rest.partition(".")[0] and not first.isdecimal()
        if twice or (first in ("layers", "h", "block") and settings.task_type in _GENERATING):
            what = f"the names were not checked against a base and look odd, {module!r:.160} for one"
            return [f"{what}: PEFT ignores names that are not the base's own"]
    return []


def _warnings(
    carried: Sequence[ExtraTensor], settings: Settings, places: names.Sorted, parameters: Mapping[str, str]
) -> list[str]:
    lines = [*places.notes, *notes.beside(places.others)]
    modules = [parameters.get(module, module) for module in places.modules]
    unmatched = settings.ranks.unmatched(modules) | settings.alphas.unmatched(modules)
    if unmatched:
        lines.append(f"patterns of the configuration match no module: {', '.join(sorted(unmatched))}")
    owned = [extra.name for extra in carried]
    absent = [m for m in settings.saved if not any(f".{m}." in f".{name}" for name in owned)]
    if absent and len(absent) == len(settings.saved):
        lines.append(f"modules_to_save names {', '.join(absent)}, but the file holds no such tensors")
    unused = places.unused
    if unused:
        lines.append(f"{len(unused)} tensors are not part of the model and are left out, {unused[0]} for one")
    doubt = experts.doubt(sorted(parameters.values()), settings)
    return [*lines, doubt] if doubt else lines


READER = Reader("peft", "PEFT LoRA folder or adapter_model.safetensors", read, recognises, knows)
