"""Names of the tensors in a PEFT file: which part of which module each one is.

PEFT takes the adapter's name out of the keys when it saves (``lora_A.weight``); files that were written in other ways
keep it (``lora_A.default.weight``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lrconvert.core.errors import TensorUnknownError, UnsupportedLoraError
from lrconvert.formats.readers.shared import kinds
from lrconvert.formats.readers.shared.pairs import put_once
from lrconvert.formats.readers.shared.wrappers import PEFT_PREFIX
from lrconvert.io.container import TensorInfo

PREFIX = PEFT_PREFIX
_TINKER_HEAD = "model.unembed_tokens."  # Tinker's name of the output head
BASE_LAYER = ".base_layer"

Part = Literal["A", "B", "bias", "embedding_A", "embedding_B", "magnitude"]
TITLES: dict[Part, str] = {  # as PEFT spells the parts
    "A": "lora_A.weight",
    "B": "lora_B.weight",
    "bias": "lora_B.bias",
    "embedding_A": "lora_embedding_A",
    "embedding_B": "lora_embedding_B",
    "magnitude": "lora_magnitude_vector",
}
# State of a training that an evaluated model does not use: MonteCLoRA's sampler, VeLoRA's projection.
_TRAINING = ("monteclora_sampler", "velora_embed")


@dataclass
class Sorted:
    """The tensors of a file by what they are. `modules`: parts of a LoRA by module. `tokens`: trained rows by
    embedding. `others`: the rest by the name of a parameter, which several may be. `unused`: names of what has no part
    in the model. `notes`: warnings of names that PEFT does not write."""

    modules: dict[str, dict[Part, TensorInfo]] = field(default_factory=dict)
    tokens: dict[str, TensorInfo] = field(default_factory=dict)
    others: dict[str, list[TensorInfo]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def sort(tensors: Sequence[TensorInfo]) -> Sorted:
    """Return every tensor in its place. Raises E-TENSOR for names without one, E-LORA-FEATURE for parts of other
    variants and for several adapters in one file, E-NOT-LORA for other kinds of adapters, E-EMPTY for settings without
    matrices."""
    prefix = PREFIX if any(info.name.startswith(PREFIX) for info in tensors) else ""
    if not prefix:
        kinds.refuse([info.name for info in tensors])
    adapter = _adapter_name(tensors)
    places = Sorted()
    if not prefix and tensors:
        places.notes.append(f"names do not begin with {PREFIX!r} and are taken as those of the model's modules")
    if adapter not in ("", "default"):
        places.notes.append(f"the names keep that of the adapter, {adapter!r:.80}, which is left out")
    bare = [info.name for info in tensors if prefix and _is_bare(info.name)]
    if bare:
        places.notes.append(
            f"{len(bare)} parts do not begin with {PREFIX!r}, {bare[0]!r:.160} for one, and are read as others"
        )
    for info in tensors:
        name = _local(info, "" if _is_bare(info.name) else prefix)
        module, inside, _ = name.rpartition(".lora_")
        if inside:
            part = _part(name)
            if part is None:
                places.unused.append(name)
            else:
                put_once(places.modules.setdefault(module, {}), part, info)
        elif ".token_adapter." in name:
            _sort_token(places, name, info, adapter)
        elif ".original_module." in name:
            places.unused.append(name)
        else:
            places.others.setdefault(without_wrapper(name, adapter), []).append(info)
    return places


def _is_bare(name: str) -> bool:
    """Return whether a tensor is a factor, by its name, that lacks PEFT's prefix."""
    return not name.startswith(PREFIX) and _split(_words(name)) is not None and ".lora_" in name


def _local(info: TensorInfo, prefix: str) -> str:
    if not info.name.startswith(prefix) or info.name == prefix:
        what = f"tensor {info.name!r} does not begin with {prefix!r}, as others do"
        raise TensorUnknownError(what, fix="remove it if it is not part of the adapter")
    name = info.name.removeprefix(prefix)
    if name.startswith(_TINKER_HEAD):
        name = f"lm_head.{name.removeprefix(_TINKER_HEAD)}"
    if name.startswith("lora_"):
        raise TensorUnknownError(f"tensor {info.name!r} adapts the whole model, not a module of it")
    return name


# --- parts of a LoRA ------------------------------------------------------------------------------------------------


def _words(name: str) -> list[str]:
    """Return what follows the last ".lora_" of a name, split at its dots."""
    return name.rpartition(".lora_")[2].split(".")


def _split(words: Sequence[str]) -> tuple[Part, str] | None:
    """Return (part, name of the adapter or "") of the words after ".lora_"; None if they are no part."""
    part: Part
    rest: list[str] = []
    match words:
        case ["A" | "B" as part]:  # SkyRL's experts
            pass
        case ["A" | "B" as part, *rest, "weight"]:
            pass
        case ["B", *rest, "bias"]:
            part = "bias"
        case ["embedding_A" | "embedding_B" as part, *rest]:
            pass
        case ["magnitude_vector", *rest, "weight"] | ["magnitude_vector", *rest]:
            part = "magnitude"
        case _:
            return None
    return (part, "".join(rest)) if len(rest) <= 1 else None


def _adapter_name(tensors: Iterable[TensorInfo]) -> str:
    """Return the adapter's name where the parts carry it, else "". Raises E-LORA-FEATURE if they carry several."""
    split = [_split(_words(info.name)) for info in tensors if ".lora_" in info.name]
    names = {part_and_name[1] for part_and_name in split if part_and_name is not None}
    if len(names) > 1:
        listed = ", ".join(repr(name) if name else "one without a name" for name in sorted(names))
        what = f"the file holds {len(names)} adapters: {listed:.400}"
        raise UnsupportedLoraError(what, fix="save each adapter on its own")
    return names.pop() if names else ""


def _part(name: str) -> Part | None:
    """Return the part of a LoRA that a tensor is; None for state of the training. Raises E-LORA-FEATURE."""
    words = _words(name)
    part_and_name = _split(words)
    if part_and_name is not None:
        return part_and_name[0]
    if words[0] in _TRAINING:
        return None
    kinds.refuse([name])
    what = f"tensor {name!r} is not a part of a LoRA that is known: {', '.join(TITLES.values())}"
    raise UnsupportedLoraError(what, fix="this variant of LoRA is not converted")


# --- what rides along -----------------------------------------------------------------------------------------------


def _sort_token(places: Sorted, name: str, info: TensorInfo, adapter: str) -> None:
    """Sort a tensor of PEFT's wrapper around an embedding of which single rows were trained."""
    module, _, inside = name.rpartition(".token_adapter.")
    first, _, rest = inside.partition(".")
    named = rest in ("", adapter, "default")
    if first == "trainable_tokens_delta" and named:
        put_once(places.tokens, module, info)
    elif first == "trainable_tokens_original" and named:
        places.unused.append(name)
    elif inside in ("base_layer.weight", "base_layer.bias"):
        places.others.setdefault(f"{module}.{rest}", []).append(info)
    else:
        raise TensorUnknownError(f"tensor {name!r} is no known part of an embedding with trained tokens")


def without_wrapper(name: str, adapter: str) -> str:
    """Return the parameter of a module of modules_to_save: ``x.modules_to_save.default.weight`` is ``x.weight``."""
    module, inside, rest = name.partition(".modules_to_save.")
    if not inside:
        return name
    first, _, deeper = rest.partition(".")
    return f"{module}.{deeper if deeper and first in ('default', adapter) else rest}"
