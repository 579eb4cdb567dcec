"""cloneofsimo's lora: ``unet:3:up`` (out, r) and ``unet:3:down`` (r, in) in a safetensors file, whose metadata says the
rank of each (``unet:3:rank``) and which tensors are embeddings of new tokens (``<s1>``: ``<embed>``); or the older
``.pt``, a list that takes turns between up and down.

Modules are numbered in the order in which the training walked through the model, which no file states, so the numbers
stay as names. The scale is 1: whoever loads the file chooses it then. Embeddings ride along.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lrconvert.adapter import LoraAdapter
from lrconvert.errors import BaseError, PairError
from lrconvert.readers import pairs
from lrconvert.readers.base import ReadOptions, by_names
from lrconvert.readers.pairs import Labels
from lrconvert.readers.weights import Weights, open_weights

LABELS = Labels("down", "up")
_NAME = re.compile(r"(?P<module>[A-Za-z0-9_]+:\d{1,6}):(?P<half>up|down)")
_TOKEN = re.compile(r"<[^<>\s]+>")
_EMBED = "<embed>"
_NOTE = (
    "modules have the numbers of this layout for names: it does not say which parameters of the base they are, so that "
    "the adapter can be converted and compared, not merged"
)


def knows(names: Sequence[str]) -> bool:
    """Whether tensors are named by numbers, as this layout does it, or are the entries of a list."""
    found = sum(_NAME.fullmatch(name) is not None for name in names)
    return 2 * found > len(names) or _is_list(names)


def _is_list(names: Sequence[str]) -> bool:
    return len(names) > 0 and list(names) == [str(place) for place in range(len(names))]


def _split(name: str) -> tuple[str, str] | None:
    found = _NAME.fullmatch(name)
    return None if found is None else (found["module"], "A" if found["half"] == "down" else "B")


def _split_list(name: str) -> tuple[str, str]:
    place = int(name)
    return f"lora:{place // 2}", "A" if place % 2 else "B"


def read(path: Path, options: ReadOptions) -> LoraAdapter:
    """See the module's docstring. Raises E-BASE if a base is given, E-PICKLE, E-NOT-LORA, E-TENSOR, E-PAIR, E-EMPTY,
    E-LIMIT, E-DTYPE, E-VALUE."""
    if options.base is not None:
        raise BaseError(
            "this layout numbers its modules and does not say which parameters of a base they are",
            fix="leave the base out, or save the adapter with diffusers or sd-scripts",
        )
    with open_weights(path, options) as weights:
        names = [info.name for info in weights.tensors]
        tokens = {info.name: info for info in weights.tensors if _is_token(info.name, weights)}
        split = _split_list if _is_list(names) else _split
        modules = pairs.sort_parts(weights, lambda name: ("", name) if name in tokens else split(name))
        modules.pop("", None)
        pairs.check_not_half(modules, LABELS)
        targets = []
        for module, parts in modules.items():
            found = pairs.pair(module, parts, lambda rank: 1.0, weights, LABELS)
            stated = weights.metadata.get(f"{module}:rank", str(found.rank))
            if stated != str(found.rank):
                raise PairError(f"{module}: the tensors have rank {found.rank}, the metadata says {stated!r:.20}")
            targets.append(found)
        extras = [pairs.carried(name, info, weights) for name, info in tokens.items()]
        warnings = [_NOTE]
        if tokens:
            warnings.append(f"the embeddings of new tokens are carried along: {', '.join(sorted(tokens))[:200]}")
        return pairs.finished(weights, targets, layout="cloneofsimo", extras=extras, warnings=warnings)


def _is_token(name: str, weights: Weights) -> bool:
    return weights.metadata.get(name) == _EMBED or _TOKEN.fullmatch(name) is not None


READER = by_names("cloneofsimo", "cloneofsimo lora file or .pt list", knows, read)
