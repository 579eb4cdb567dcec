"""cloneofsimo's lora: ``unet:3:up`` (out, r) and ``unet:3:down`` (r, in) in a safetensors file, whose metadata says the
rank of each (``unet:3:rank``) and which tensors are embeddings of new tokens (``<s1>``: ``<embed>``); or the older
``.pt``, a list that takes turns between up and down.

Modules are numbered in the order in which the training walked through the model, ``named_modules()`` of diffusers'
UNet or transformers' CLIP, below the classes that the metadata lists (``CrossAttention``, ``GEGLU``, ...; a ``.pt``
lists none, so that all known sets are tried). Without a base the numbers stay as names. With one, a diffusers pipeline
or model (its config.json is enough), every number becomes the module that stands there in that walk, if the number of
modules and the shape of each are those of the file, in one way only.

What shapes cannot tell is assumed: that attention makes to_q, to_k, to_v, to_out, and CLIP's k_proj, v_proj, q_proj,
out_proj, in this order, as all releases of either library have done; and that blocks follow each other as they do
there. Shapes do tell where the gate of the feed-forward stands, which differs between releases, and that the middle
block comes last.

The scale is 1: whoever loads the file chooses it then. Embeddings ride along.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lrconvert.core.errors import BaseError, PairError
from lrconvert.core.wording import spelled
from lrconvert.formats import unet_names
from lrconvert.formats.readers.base import Reader
from lrconvert.formats.readers.shared import naming, pairs
from lrconvert.formats.readers.shared.naming import BaseNames, Component
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.formats.readers.shared.pairs import Labels
from lrconvert.formats.readers.shared.weights import Weights, load_extra, open_weights
from lrconvert.lora.adapter import LoraAdapter, LoraTarget

LABELS = Labels("down", "up")
_NAME = re.compile(r"(?P<module>[A-Za-z0-9_]+:\d{1,6}):(?P<half>up|down)")
_TOKEN = re.compile(r"<[^<>\s]+>")
_EMBED = "<embed>"


def knows(names: Sequence[str]) -> bool:
    """Return whether tensors are named by numbers, as this layout does it, or are the entries of a list."""
    return 2 * sum(_NAME.fullmatch(name) is not None for name in names) > len(names) or _is_list(names)


def _is_list(names: Sequence[str]) -> bool:
    return len(names) > 0 and list(names) == [str(place) for place in range(len(names))]


def _split(name: str) -> tuple[str, str] | None:
    match = _NAME.fullmatch(name)
    return None if match is None else (match["module"], "A" if match["half"] == "down" else "B")


def _split_list(name: str) -> tuple[str, str]:
    place = int(name)
    return f"lora:{place // 2}", "A" if place % 2 else "B"


def read(path: Path, options: ReadOptions) -> LoraAdapter:
    """Read cloneofsimo's file. Raises E-BASE if the modules are not those of the base, E-PICKLE, E-NOT-LORA,
    E-TENSOR, E-PAIR, E-EMPTY, E-LIMIT, E-DTYPE, E-VALUE."""
    base = None if options.base is None else naming.base_names(options.base)
    with open_weights(path, options) as weights:
        names = [info.name for info in weights.tensors]
        tokens = {info.name: info for info in weights.tensors if _is_token(info.name, weights)}
        split = _split_list if _is_list(names) else _split
        modules = pairs.sort_parts(weights, lambda name: ("", name) if name in tokens else split(name))
        modules.pop("", None)
        pairs.check_both_halves(modules, LABELS)
        targets = []
        for module, parts in modules.items():
            pair = pairs.read_pair(module, parts, lambda rank: 1.0, weights, LABELS)
            stated = weights.metadata.get(f"{module}:rank", str(pair.rank))
            if stated != str(pair.rank):
                raise PairError(f"{module}: the tensors have rank {pair.rank}, the metadata says {stated!r:.20}")
            targets.append(pair)
        if base is not None:
            targets = _placed(dict(zip(modules, targets, strict=True)), base, weights.metadata)
        extras = [load_extra(name, info, weights) for name, info in tokens.items()]
        warnings = [_unnamed()] if base is None else []
        if tokens:
            warnings.append(f"the embeddings of new tokens are carried along: {', '.join(sorted(tokens))[:200]}")
        models = {module.partition(":")[0] for module in modules}
        used = {*models, *tokens, *(f"{module}:rank" for module in modules)}
        return pairs.build_adapter(weights, targets, layout="cloneofsimo", extras=extras, warnings=warnings, used=used)


# --- numbers onto a base --------------------------------------------------------------------------------------------

_CLIP = "clip"
_PARTS = {
    "CrossAttention": unet_names.ATTENTION,
    "Attention": unet_names.ATTENTION,
    "GEGLU": unet_names.GATE,
    "ResnetBlock2D": unet_names.RESNET,
    "CLIPAttention": _CLIP,
}
# What trainings choose, where a file does not say it.
_CHOICES = (
    {unet_names.ATTENTION, unet_names.GATE},
    {unet_names.ATTENTION},
    {unet_names.ATTENTION, unet_names.GATE, unet_names.RESNET},
    {_CLIP},
)
_CLIP_LEAVES = ("k_proj", "v_proj", "q_proj", "out_proj")
_CLIP_MODULE = re.compile(rf"(?:.+\.)?layers\.(?P<layer>\d+)\.self_attn\.(?P<leaf>{'|'.join(_CLIP_LEAVES)})")
_ANYWHERE = "lora"  # entries of a list, which does not name its model


@dataclass(frozen=True)
class _Walk:
    """Modules of a component in an order, and their shapes."""

    component: Component
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    def agreeing(self, shapes: Sequence[tuple[int, ...]]) -> int:
        """Count the modules that have the shapes of a file, from the first one to the first that has not."""
        fits = [_plain(one) == _plain(other) for one, other in zip(self.shapes, shapes, strict=False)]
        return next((n for n, fit in enumerate(fits) if not fit), len(fits))


def _plain(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape with a convolution of one pixel as a linear layer."""
    return shape[:2] if set(shape[2:]) <= {1} else shape


def _placed(targets: Mapping[str, LoraTarget], base: BaseNames, metadata: Mapping[str, str]) -> list[LoraTarget]:
    models: dict[str, dict[int, LoraTarget]] = {}
    for module, pair in targets.items():
        model, _, number = module.partition(":")
        if models.setdefault(model, {}).setdefault(int(number), pair) is not pair:
            raise PairError(f"{model} has two modules of the number {int(number)}")
    placed = []
    for model, numbered in models.items():
        absent = [n for n in range(len(numbered)) if n not in numbered]
        if absent:
            raise PairError(f"{model}:{absent[0]} is missing between others", fix="the file is incomplete")
        ordered = [numbered[n] for n in range(len(numbered))]
        walk = _matching_walk(model, [pair.target.shape for pair in ordered], base, metadata.get(model))
        placed += [walk.component.placed(pair, name) for pair, name in zip(ordered, walk.names, strict=True)]
    return placed


def _matching_walk(model: str, shapes: Sequence[tuple[int, ...]], base: BaseNames, stated: str | None) -> _Walk:
    """Return the one walk through the base that meets these shapes. Raises E-BASE."""
    components = base.components if model == _ANYWHERE else (base.component((model,), f"{model}:0"),)
    choices = _CHOICES if stated is None else (_chosen(model, stated),)
    walks = {
        (walk.component.name, walk.names): walk
        for component in components
        for parts in choices
        for walk in _walks(component, parts)
        if walk.names
    }
    fitting = [w for w in walks.values() if len(w.names) == len(shapes) == w.agreeing(shapes)]
    if len(fitting) == 1:
        return fitting[0]
    fix = "give the pipeline that the adapter was trained on"
    if fitting:
        raise BaseError(f"the modules of {model!r:.60} fit the base in {len(fitting)} ways", fix=fix, path=base.root)
    if not walks:
        raise BaseError(f"the base has no modules of {model!r:.60} that could be numbered", fix=fix, path=base.root)
    best = max(walks.values(), key=lambda walk: (walk.agreeing(shapes), -abs(len(walk.names) - len(shapes))))
    at = best.agreeing(shapes)
    if at < min(len(shapes), len(best.names)):
        what = f"{model}:{at} is {list(shapes[at])}, and {best.names[at]!r:.120}, which stands there in the base, is "
        raise BaseError(f"{what}{list(best.shapes[at])}", fix=fix, path=base.root)
    what = f"the file numbers {len(shapes)} modules of {model!r:.60}, the base has {len(best.names)}"
    raise BaseError(what, fix=fix, path=base.root)


def _chosen(model: str, stated: str) -> set[str]:
    """Return the kinds of modules that were adapted, as the metadata says. Raises E-BASE for unknown classes."""
    try:
        classes = json.loads(stated)
    except (ValueError, RecursionError):
        classes = None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise BaseError(f"the metadata says {stated!r:.80} of {model!r:.60}, expected a list of classes")
    unknown = [name for name in classes if name not in _PARTS]
    if unknown:
        raise BaseError(f"{model!r:.60} adapts the class {unknown[0]!r:.60}, whose modules are not known here")
    return {_PARTS[name] for name in classes}


def _walks(component: Component, parts: set[str]) -> Iterator[_Walk]:
    if component.config.get("_class_name") == unet_names.CLASS:
        shapes = _unet_shapes(component)
        for gate_last in (False, True):
            names = tuple(unet_names.walk(shapes, parts, gate_last))
            yield _Walk(component, names, tuple(shapes[name] for name in names))
    elif parts == {_CLIP}:
        matches = [match for name in component.modules if (match := _CLIP_MODULE.fullmatch(name)) is not None]
        matches.sort(key=lambda match: (int(match["layer"]), _CLIP_LEAVES.index(match["leaf"])))
        names = tuple(match[0] for match in matches)
        yield _Walk(component, names, tuple(component.shapes[f"{name}.weight"] or () for name in names))


def _unet_shapes(component: Component) -> Mapping[str, tuple[int, ...]]:
    """Return the modules of a UNet and their shapes: by the headers, else by the configuration."""
    stored = {name: shape for name in component.modules if (shape := component.shapes[f"{name}.weight"])}
    if stored:
        return stored
    try:
        return unet_names.modules(component.config)
    except BaseError as error:
        raise error.at(component.root) from None


def _is_token(name: str, weights: Weights) -> bool:
    return weights.metadata.get(name) == _EMBED or _TOKEN.fullmatch(name) is not None


READER = Reader("cloneofsimo", "cloneofsimo lora file or .pt list", read, knows=knows)


def _unnamed() -> str:
    return (
        "modules have the numbers of this layout for names: give the diffusers pipeline "
        f"({spelled('base', ...)}; its config.json files are enough) to find the parameters that they are"
    )
