"""State dicts of factors without a configuration, as loralib and many training scripts save them: ``<module>.lora_A``
(r, in) and ``<module>.lora_B`` (out, r), with or without ``.weight`` after them.

The scale is alpha / r. Alpha stands in ``<module>.alpha`` or among the settings beside the tensors; else the user must
state it. Other tensors (biases, heads) ride along. Embeddings are recognised by their names: A (r, tokens), B
(features, r). loralib's slices of fused layers (MergedLinear) are refused, since no file says which slices they are.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lrconvert.core.errors import ConfigError, OptionError, TensorUnknownError, UnsupportedLoraError
from lrconvert.core.wording import spelled
from lrconvert.formats.readers import diffusers
from lrconvert.formats.readers.base import Reader
from lrconvert.formats.readers.shared import kinds, naming, pairs, stated
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.formats.readers.shared.pairs import Labels, Parts
from lrconvert.formats.readers.shared.stated import Settings
from lrconvert.formats.readers.shared.weights import Weights, load_extra, open_weights
from lrconvert.lora.adapter import TRANSPOSED, LoraAdapter, LoraTarget
from lrconvert.lora.base_names import EMBEDDINGS

LABELS = Labels("lora_A", "lora_B")
_ALPHA = re.compile(r"(?P<module>.+?)(?:\.lora)?\.(?:lora_)?alpha")
# A module called lora holds the factors of the one that it is in.
_FACTOR = re.compile(r"(?!base_model\.)(?P<module>.+?)(?:\.lora)?\.lora_(?P<half>[AB])(?:(?:\.[^.]+)?\.weight)?")


def knows(names: Sequence[str]) -> bool:
    """Return whether there are factors under names of modules, without PEFT's prefix and not those of a pipeline."""
    return any(_FACTOR.fullmatch(name) for name in names) and not diffusers.knows(names)


def _split(name: str) -> tuple[str, str]:
    match = _FACTOR.fullmatch(name)
    return (match["module"], match["half"]) if match else ("", name)


def read(path: Path, options: ReadOptions) -> LoraAdapter:
    """Read a state dict. Raises E-CONFIG without an alpha, E-OPTION for one beside that of the file, E-LORA-FEATURE,
    E-NOT-LORA, E-TENSOR, E-PAIR, E-EMPTY, E-BASE, E-LIMIT, E-DTYPE, E-VALUE."""
    component = naming.base_component(options)
    with open_weights(path, options) as weights:
        modules = pairs.sort_parts(weights, _split)
        others = modules.pop("", {})
        alphas = {name: others.pop(name) for name in list(others) if _module_of(name) in modules}
        kinds.refuse_parts(list(others))
        pairs.check_both_halves(modules, LABELS)
        own = {_module_of(name): pairs.stated_alpha(weights, info) for name, info in alphas.items()}
        scales = _Scales(own, stated.settings(weights.metadata), options.alpha)
        scales.check(modules)
        targets = [_target(module, parts, scales, weights) for module, parts in modules.items()]
        whole = [pair.target.name for pair in targets if pair.target.name in others]
        if whole:
            what = f"the file holds {whole[0]!r:.160} beside its factors, which may be merged into it or not"
            raise TensorUnknownError(what, fix="save the factors alone (loralib.lora_state_dict)")
        extras = [load_extra(name, info, weights) for name, info in others.items()]
        shown = ", ".join(f"{extra.name!r:.120}" for extra in extras[:5])
        notes = [f"{len(extras)} other tensors ride along and change no factor: {shown}"] if extras else []
        notes += scales.notes
        if component is None:
            notes.append(naming.unnamed("raw"))
        else:
            names = [pair.target.name.removesuffix(".weight") for pair in targets]
            targets = [component.placed(p, component.dotted(n)) for p, n in zip(targets, names, strict=True)]
        used = scales.settings.used
        return pairs.build_adapter(weights, targets, layout="raw", extras=extras, warnings=notes, used=used)


def _module_of(name: str) -> str:
    """Return the module whose alpha a tensor of this name is, "" for another tensor."""
    match = _ALPHA.fullmatch(name)
    return match["module"] if match else ""


@dataclass(frozen=True)
class _Scales:
    """The sources of the scales: the file's alphas of single modules, its settings for all, or the user."""

    own: Mapping[str, float]
    settings: Settings
    given: float | None

    def check(self, modules: Collection[str]) -> None:
        """Raise E-OPTION if both the file and the user state alpha, E-CONFIG if neither does."""
        if self.given is not None and (self.settings.alpha is not None or len(self.own) == len(modules)):
            where = self.settings.used[0] if self.settings.used else f"{next(iter(self.own))}.alpha"
            raise OptionError(
                f"the file states its alpha ({where:.160}), another was given", fix=f"leave {spelled('alpha')} out"
            )
        unstated = [module for module in modules if module not in self.own]
        if unstated and self.given is None and self.settings.alpha is None:
            where = f"of {unstated[0]!r:.160}" if self.own else "in the file"
            fix = f"give it with {spelled('alpha', ...)}, as the training script has it (alpha = r is a scale of 1)"
            raise ConfigError(f"nothing {where} states alpha, which the scale alpha / r needs", fix=fix)

    @property
    def notes(self) -> list[str]:
        if self.own and self.given is not None:
            return [f"{len(self.own)} modules state their alpha; the one that was given is for the others"]
        return []

    def of(self, module: str, rank: int) -> float:
        """Return the scale of a module. Raises E-CONFIG, E-PAIR."""
        fallback = self.given if self.settings.alpha is None else self.settings.alpha
        alpha = self.own.get(module, fallback)
        assert alpha is not None
        return self.settings.scale(module, alpha, rank)


def _target(module: str, parts: Parts, scales: _Scales, weights: Weights) -> LoraTarget:
    a, b = pairs.halves(module, parts, LABELS)
    flat = len(a.shape) == len(b.shape) == 2
    # Where the other two sides are equal they look turned, which `read_pair` says.
    if flat and a.shape[0] > b.shape[1] and a.shape[0] % b.shape[1] == 0 and a.shape[1] != b.shape[0]:
        raise UnsupportedLoraError(
            f"{module}: lora_A has {a.shape[0] // b.shape[1]} times the rank of lora_B: slices of a fused layer "
            "(MergedLinear), and no file says which",
            fix="name it adapter_model.safetensors beside an adapter_config.json that holds peft_type (LORA), r, "
            "lora_alpha and enable_lora ([true, false, true], or what it was trained with), and convert that folder",
        )
    pair = pairs.read_pair(module, parts, lambda rank: scales.of(module, rank), weights, LABELS)
    if pair.target.name.endswith(EMBEDDINGS):
        return replace(pair, target=replace(pair.target, shape=pair.target.shape[::-1], view=TRANSPOSED))
    return pair


READER = Reader("raw", "raw state dict of lora_A and lora_B", read, knows=knows, takes_alpha=True)
