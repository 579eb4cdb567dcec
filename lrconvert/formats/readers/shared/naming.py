"""Resolve the names of a layout to parameters of a base (`--base`): a model folder, or a diffusers pipeline of several.

The headers of a base's files say its names and shapes. Where there is only a config.json, transformers builds the model
without weights (its own classes alone, never code from the folder); for diffusers' models, whose layouts spell module
names with underscores, a vocabulary takes the names apart instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lrconvert.core.errors import BaseError, DependencyError, FileKindError
from lrconvert.core.limits import MAX_INDEX_BYTES
from lrconvert.core.wording import spelled
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.io import mistaken
from lrconvert.io.checkpoint import INDEX_NAME, PIPELINE_NAME, SINGLE_NAME, open_checkpoint, weight_names
from lrconvert.io.container import read_json
from lrconvert.io.quantized import base as quantized
from lrconvert.lora import renamings
from lrconvert.lora.adapter import MATRIX, TRANSPOSED, LoraTarget, Target, View
from lrconvert.lora.base_names import NameIndex, unfolding

_MOST_LAYERS = 2048  # of a model that is built without weights, to learn its names
_MOST_PARSES = 16
_MOST_WORDS = 64  # of a name with underscores; real ones have some twenty


@dataclass(frozen=True)
class Component:
    """One model of a base. `name` is its folder in a pipeline, "" for a base of one model. `shapes` are its parameters;
    the shape is None where only the name is known, and there are none at all where only a diffusers config is there."""

    name: str
    root: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...] | None]

    @cached_property
    def _index(self) -> NameIndex:
        return NameIndex(self.shapes.keys(), renamings.families(self.config), self.root)

    @cached_property
    def _flat(self) -> dict[str, list[str]]:
        """Modules by their name with underscores for dots."""
        flat: dict[str, list[str]] = {}
        for module in self.modules:
            flat.setdefault(module.replace(".", "_"), []).append(module)
        return flat

    @cached_property
    def modules(self) -> list[str]:
        """The names of the modules that have a weight."""
        return [name.removesuffix(".weight") for name in self.shapes if name.endswith(".weight")]

    def has(self, spelled: str) -> bool:
        """Return whether a module has exactly this name, with underscores for dots."""
        return spelled in self._flat

    def dotted(self, module: str) -> str:
        """Return the base's name of a module that the adapter spells with dots. Raises E-BASE."""
        if not self.shapes:
            return module
        name = self._index.find(f"{module}.weight")
        if name is None:
            raise self._index.missing(f"{module}.weight")
        return name.removesuffix(".weight")

    def flattened(self, spelled: str, words: Iterable[str]) -> str:
        """Return the base's name of a module whose dots the adapter writes as underscores: among the base's own names,
        or put together of `words` where those are not known. Raises E-BASE if there is none, or several."""
        if self.shapes:
            shorter = spelled[11:] if spelled.startswith("text_model_") else spelled.partition("_")[2]
            candidates = self._flat.get(spelled) or self._flat.get(shorter)
            if not candidates:
                longer = (modules for flat, modules in self._flat.items() if flat.endswith(f"_{spelled}"))
                candidates = [module for modules in longer for module in modules]
        else:
            candidates = parses(spelled, words)
        if len(candidates) > 1:
            what, fix = f"may be any of {', '.join(sorted(candidates)[:5])}", "rename the module in the file"
            raise BaseError(f"{spelled!r:.200} {what}", fix=fix, path=self.root)
        if not candidates:
            fix = "is this the adapter's own base?"
            raise BaseError(f"{spelled!r:.200} is no module of the base", fix=fix, path=self.root)
        return candidates[0]

    def full(self, name: str) -> str:
        """Return a name of this model as the base has it, after the model's own in a pipeline."""
        return f"{self.name}.{name}" if self.name else name

    def placed(self, pair: LoraTarget, module: str) -> LoraTarget:
        """Put `pair` on a module of this component, in the shape that the base stores. Raises E-BASE."""
        target = replace(pair.target, name=self.full(f"{module}.weight"))
        return replace(pair, target=_as_stored(target, self.shapes.get(f"{module}.weight"), self.root))


def _as_stored(target: Target, stored: tuple[int, ...] | None, root: Path) -> Target:
    """Give the target the shape of the base: a linear layer may be stored as a convolution of one pixel and the other
    way round, or transposed. Raises E-BASE."""
    if stored is None or stored == target.shape:
        return target
    out, inner = target.matrix_shape
    pixel = set(target.shape[2:]) <= {1}
    if pixel and stored[:2] == (out, inner) and set(stored[2:]) <= {1}:
        kernel = "x".join("1" for _ in stored[2:])
        return replace(target, shape=stored, view=View(f"conv:{kernel}:1") if kernel else MATRIX)
    if (view := unfolding(target, stored)) is not None:
        return replace(target, shape=stored, view=view)
    if target.view == MATRIX and stored == (inner, out):
        return replace(target, shape=stored, view=TRANSPOSED)
    if target.view.kind == "rows" and len(stored) == 2 and stored[1] == inner:
        return replace(target, shape=stored)
    raise BaseError(f"{target.name!r} is {list(target.shape)} in the adapter, {list(stored)} in the base", path=root)


# --- bases ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BaseNames:
    """The models of a base."""

    root: Path
    components: tuple[Component, ...]

    def holding(self, spelled: str) -> Component | None:
        """Return the one model with a module of exactly this name, dots written as underscores; None if none or several
        have it."""
        having = [component for component in self.components if component.has(spelled)]
        return having[0] if len(having) == 1 else None

    def component(self, names: Sequence[str], what: str) -> Component:
        """Return the model of the first of these names that is there, or the only model of a base. Raises E-BASE."""
        named = {component.name: component for component in self.components}
        for name in names:
            if name in named:
                return named[name]
        if len(self.components) == 1 and not self.components[0].name:
            return self.components[0]
        what += f" belongs to {' or '.join(names)}, and the base has {', '.join(c.name for c in self.components)}"
        raise BaseError(what, fix="give the pipeline it is for", path=self.root)


def base_component(options: ReadOptions, names: Sequence[str] = ()) -> Component | None:
    """Return the model of the base in `options` that an adapter of one model belongs to; None without a base. Raises
    what `base_names` and `BaseNames.component` raise."""
    return None if options.base is None else base_names(options.base).component(names, "the adapter")


def base_names(root: Path) -> BaseNames:
    """Return the models in a folder, by headers and configurations. Raises E-IO-KIND, E-BASE and the errors of broken
    files."""
    mistaken.check_base(root)
    if not root.is_dir():
        raise FileKindError("is not a model folder", fix="give the folder that holds config.json", path=root)
    if not (root / PIPELINE_NAME).is_file():
        return BaseNames(root, (_component("", root),))
    folders = sorted(folder for folder in root.iterdir() if (folder / "config.json").is_file())
    parts = tuple(_component(folder.name, folder) for folder in folders)
    if not parts:
        raise BaseError("the pipeline holds no model", path=root)
    return BaseNames(root, parts)


def _component(name: str, root: Path) -> Component:
    config = read_json(root / "config.json") if (root / "config.json").is_file() else {}
    names = weight_names(root)
    is_transformers = (root / SINGLE_NAME).exists() or (root / INDEX_NAME).exists()
    if is_transformers or (root / names.single).is_file():
        with open_checkpoint(root, quantized=True) as checkpoint:
            return Component(name, root, config, quantized.shapes(checkpoint))
    if (root / names.index).is_file():  # its shards may be elsewhere
        table = read_json(root / names.index, MAX_INDEX_BYTES).get("weight_map")
        return Component(name, root, config, dict.fromkeys(table) if isinstance(table, dict) else {})
    if not config:
        raise FileKindError("holds neither a config.json nor weights", path=root)
    return Component(name, root, config, {} if "_class_name" in config else _built(root, config))


def _built(root: Path, config: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
    """Return the parameters of the model of a config.json, without its weights. Raises E-BASE, E-DEPENDENCY."""
    deep = [key for key in config if "layer" in key and type(config[key]) is int and config[key] > _MOST_LAYERS]
    if deep:
        raise BaseError(f"{deep[0]} is {config[deep[0]]}; at most {_MOST_LAYERS} are looked at", path=root)
    try:
        import torch
        import transformers
    except ImportError:
        raise DependencyError(
            "a base without weights is built by transformers", fix="pip install transformers"
        ) from None
    try:
        parsed = transformers.AutoConfig.from_pretrained(root, local_files_only=True, trust_remote_code=False)
        class_name = (getattr(parsed, "architectures", None) or [""])[0]
        model_class: Any = getattr(transformers, str(class_name), None)
        build: Any = getattr(model_class, "_from_config", transformers.AutoModel.from_config)
        with torch.device("meta"):
            model = build(parsed)
        return {name: tuple(value.shape) for name, value in model.state_dict().items()}
    except Exception as error:  # whatever a configuration provokes in there
        reason = str(error).strip().splitlines() or [type(error).__name__]
        what = f"transformers cannot build the model of this config.json: {reason[0]:.200}"
        raise BaseError(what, fix="give the folder with the weights", path=root) from None


# --- names whose dots are underscores -------------------------------------------------------------------------------

# What modules of diffusers' UNets and transformers are called; numbers count as words. Text encoders are transformers'.
VOCABULARY = frozenset(
    (
        *("down_blocks", "up_blocks", "mid_block", "attentions", "resnets", "transformer_blocks", "downsamplers"),
        *("upsamplers", "attn", "attn1", "attn2", "to_q", "to_k", "to_v", "to_out", "ff", "net", "proj", "proj_in"),
        *("proj_out", "conv", "conv1", "conv2", "conv_shortcut", "conv_in", "conv_out", "time_emb_proj"),
        *("time_embedding", "add_embedding", "linear_1", "linear_2", "time_proj", "temp_convs", "motion_modules"),
        *("single_transformer_blocks", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context"),
        *("norm", "norm1", "norm1_context", "norm_out", "proj_mlp", "x_embedder", "context_embedder", "linear"),
    )
)


def parses(spelled: str, words: Iterable[str] = VOCABULARY) -> list[str]:
    """Return every way to read a name with underscores as words of a vocabulary and numbers, with dots between; at most
    16."""
    vocabulary = frozenset(words)
    parts = spelled.split("_")
    if len(parts) > _MOST_WORDS:
        return []
    most = max((word.count("_") + 1 for word in vocabulary), default=1)
    ways: list[list[str]] = [[] for _ in parts] + [[""]]
    for start in reversed(range(len(parts))):
        for stop in range(start + 1, min(start + most, len(parts)) + 1):
            word = "_".join(parts[start:stop])
            longer = "_".join(parts[start : stop + 1])
            if stop < len(parts) and parts[stop].isdecimal() and longer in vocabulary:
                continue  # linear_1 is a word of its own, not the first entry of linear
            if word in vocabulary or (stop == start + 1 and word.isdecimal()):
                ways[start] += [f"{word}.{rest}" if rest else word for rest in ways[stop]]
        ways[start] = ways[start][:_MOST_PARSES]
    return ways[0]


def unnamed(layout: str) -> str:
    """Return the warning of an adapter that was read without a base."""
    return (
        f"the names are those of the {layout} layout, not of a base's parameters: give the base "
        f"({spelled('base', ...)}; its config.json is enough) to resolve them"
    )
