"""State dicts of factors without a configuration, as loralib and many training scripts save them: ``<module>.lora_A``
(r, in) and ``<module>.lora_B`` (out, r), with or without ``.weight`` after them.

Nothing in them states alpha, so the user must; the scale is alpha / r. Other tensors (biases, heads) ride along.
Embeddings are recognised by their names: A (r, tokens), B (features, r). loralib's slices of fused layers
(MergedLinear) are refused, since no file says which slices they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lrconvert.core.errors import ConfigError, TensorUnknownError, UnsupportedLoraError
from lrconvert.formats.readers import diffusers
from lrconvert.formats.readers.base import Reader
from lrconvert.formats.readers.shared import kinds, naming, pairs
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.formats.readers.shared.pairs import Labels, Parts
from lrconvert.formats.readers.shared.weights import Weights, load_extra, open_weights
from lrconvert.lora.adapter import TRANSPOSED, LoraAdapter, LoraTarget
from lrconvert.lora.base_names import EMBEDDINGS

LABELS = Labels("lora_A", "lora_B")
_FACTOR = re.compile(r"(?!base_model\.)(?P<module>.+)\.lora_(?P<half>[AB])(?:(?:\.[^.]+)?\.weight)?")


def knows(names: Sequence[str]) -> bool:
    """Return whether there are factors under names of modules, without PEFT's prefix and not those of a pipeline."""
    return any(_FACTOR.fullmatch(name) for name in names) and not diffusers.knows(names)


def _split(name: str) -> tuple[str, str]:
    match = _FACTOR.fullmatch(name)
    return (match["module"], match["half"]) if match else ("", name)


def read(path: Path, options: ReadOptions) -> LoraAdapter:
    """Read a state dict. Raises E-CONFIG without an alpha, E-LORA-FEATURE, E-NOT-LORA, E-TENSOR, E-PAIR, E-EMPTY,
    E-BASE, E-LIMIT, E-DTYPE, E-VALUE."""
    component = naming.base_component(options)
    with open_weights(path, options) as weights:
        modules = pairs.sort_parts(weights, _split)
        others = modules.pop("", {})
        kinds.refuse(list(others))
        pairs.check_both_halves(modules, LABELS)
        if options.alpha is None:
            fix = "give it with --alpha, as the training script has it (alpha = r is a scale of 1)"
            raise ConfigError("nothing in the file states alpha, which the scale alpha / r needs", fix=fix)
        targets = [_target(module, parts, options.alpha, weights) for module, parts in modules.items()]
        whole = [pair.target.name for pair in targets if pair.target.name in others]
        if whole:
            what = f"the file holds {whole[0]!r:.160} beside its factors, which may be merged into it or not"
            raise TensorUnknownError(what, fix="save the factors alone (loralib.lora_state_dict)")
        extras = [load_extra(name, info, weights) for name, info in others.items()]
        notes = [f"{len(extras)} other tensors ride along, {extras[0].name!r:.120} for one"] if extras else []
        if component is None:
            notes.append(naming.unnamed("raw"))
        else:
            names = [pair.target.name.removesuffix(".weight") for pair in targets]
            targets = [component.placed(p, component.dotted(n)) for p, n in zip(targets, names, strict=True)]
        return pairs.build_adapter(weights, targets, layout="raw", extras=extras, warnings=notes)


def _target(module: str, parts: Parts, alpha: float, weights: Weights) -> LoraTarget:
    a, b = pairs.halves(module, parts, LABELS)
    flat = len(a.shape) == len(b.shape) == 2
    # Where the other two sides are equal they look swapped, which `read_pair` says.
    if flat and a.shape[0] > b.shape[1] and a.shape[0] % b.shape[1] == 0 and a.shape[1] != b.shape[0]:
        raise UnsupportedLoraError(
            f"{module}: lora_A has {a.shape[0] // b.shape[1]} times the rank of lora_B: slices of a fused layer "
            "(MergedLinear), and no file says which",
            fix='write a PEFT folder with "enable_lora": [true, false, true] or what it has, and convert that',
        )
    pair = pairs.read_pair(module, parts, lambda rank: pairs.scale_of(module, alpha, rank), weights, LABELS)
    if pair.target.name.endswith(EMBEDDINGS):
        return replace(pair, target=replace(pair.target, shape=pair.target.shape[::-1], view=TRANSPOSED))
    return pair


READER = Reader("raw", "raw state dict of lora_A and lora_B", read, knows=knows, takes_alpha=True)
