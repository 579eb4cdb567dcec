"""LoRA-ViT and Sam_LoRA: ``w_a_000`` and ``w_b_000``, numbered: for each block of the vision transformer first the
query's factors, then the value's, and ``fc_<in>in_<out>out``, a trained head. The scale is 1.

w_a is (r, in) and w_b (out, r), as torch keeps linear layers; some copies of the code store both transposed. Shapes
decide which it is. Names and slices of fused layers come from the base; without one the numbers stay as names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lrconvert.core.errors import BaseError, OrientationError, PairError
from lrconvert.core.wording import spelled
from lrconvert.formats.readers.base import Reader
from lrconvert.formats.readers.shared import naming, pairs
from lrconvert.formats.readers.shared.naming import Component
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.formats.readers.shared.pairs import Labels, Parts
from lrconvert.formats.readers.shared.weights import Weights, load_extra, load_finite, open_weights
from lrconvert.io.container import TensorInfo
from lrconvert.lora.adapter import MATRIX, ExtraTensor, LoraAdapter, LoraTarget, Target, View

LABELS = Labels("w_a", "w_b")
_FACTOR = re.compile(r"w_(?P<half>[ab])_(?P<number>\d{1,5})")
_HEAD = re.compile(r"fc_(?P<inner>\d{1,9})in_(?P<out>\d{1,9})out")
_FUSED = re.compile(r".*\.(?P<number>\d{1,5})\.attn\.qkv")
_APART = re.compile(
    r".*\.(?P<number>\d{1,5})\.(?:attn|attention|self_attn|attention\.attention)"
    r"\.(?P<which>proj_q|q_proj|query|proj_v|v_proj|value)"
)
_NOTE = (
    "modules have the numbers of this layout for names: give the base's folder to find its query and value layers, "
    "which may be slices of a fused one"
)


def knows(names: Sequence[str]) -> bool:
    """Return whether most tensors are called w_a_000 or w_b_000."""
    return 2 * sum(_FACTOR.fullmatch(name) is not None for name in names) > len(names)


def _split(name: str) -> tuple[str, str] | None:
    if _HEAD.fullmatch(name):
        return "", name
    match = _FACTOR.fullmatch(name)
    return None if match is None else (f"{int(match['number']):05d}", match["half"].upper())


def read(path: Path, options: ReadOptions) -> LoraAdapter:
    """Read a file of LoRA-ViT. Raises E-ORIENT if shapes leave the orientation open, E-BASE if the base's blocks are
    not as many, E-TENSOR, E-PAIR, E-LIMIT, E-DTYPE, E-VALUE."""
    with open_weights(path, options) as weights:
        modules = pairs.sort_parts(weights, _split)
        heads = modules.pop("", {})
        pairs.check_both_halves(modules, LABELS)
        numbers = [int(number) for number in modules]
        if numbers != list(range(len(numbers))):
            raise PairError("the numbers of w_a and w_b leave gaps", fix="the file is incomplete")
        is_transposed = _is_transposed(modules)
        targets = [_target(number, parts, is_transposed, weights) for number, parts in modules.items()]
        component = naming.base_component(options, ("",))
        if component is not None:
            targets = _placed(targets, component)
        notes = [_NOTE] if component is None else []
        extras = [_head(name, info, weights) for name, info in heads.items()]
        notes += [f"the trained head {name} is carried along as head.weight" for name in heads]
        return pairs.build_adapter(weights, targets, layout="lora_vit", extras=extras, warnings=notes)


def _is_transposed(modules: Mapping[str, Parts]) -> bool:
    """Return whether w_a is (in, r) and w_b (r, out). Raises E-PAIR, E-ORIENT."""
    possible = {False, True}
    for number, parts in modules.items():
        a, b = pairs.halves(f"w_{number}", parts, LABELS)
        fitting = set()
        if len(a.shape) == len(b.shape) == 2:
            if a.shape[0] == b.shape[1] and a.shape[0] <= min(a.shape[1], b.shape[0]):
                fitting.add(False)
            if a.shape[1] == b.shape[0] and a.shape[1] <= min(a.shape[0], b.shape[1]):
                fitting.add(True)
        if not fitting & possible:
            raise PairError(
                f"{a.name} {list(a.shape)} and {b.name} {list(b.shape)} do not fit; (r, in) and (out, r) do"
            )
        possible &= fitting
    if len(possible) > 1:
        raise OrientationError(
            "all factors are square, so that w_a may be (r, in) or (in, r)",
            fix="rename the tensors to <module>.lora_A (r, in) and .lora_B (out, r), and convert that with the rank as "
            f"{spelled('alpha')}, for a scale of 1",
        )
    return possible == {True}


def _target(number: str, parts: Parts, is_transposed: bool, weights: Weights) -> LoraTarget:
    a, b = load_finite(weights, parts["A"]), load_finite(weights, parts["B"])
    if is_transposed:
        a, b = pairs.transpose(a), pairs.transpose(b)
    pairs.check_rank(number, a.shape[0])
    return LoraTarget(Target(f"w_{number}.weight", (b.shape[0], a.shape[1]), MATRIX), a, b, 1.0)


def _head(name: str, info: TensorInfo, weights: Weights) -> ExtraTensor:
    match = _HEAD.fullmatch(name)
    assert match is not None
    if info.shape != (int(match["out"]), int(match["inner"])):
        raise PairError(f"{name} is {list(info.shape)}, its name says otherwise")
    return load_extra("head.weight", info, weights)


def _placed(targets: Sequence[LoraTarget], component: Component) -> list[LoraTarget]:
    """Put the targets on query and value of each block, in order. Raises E-BASE."""
    places = _fused(component) or _apart(component)
    if len(places) != len(targets):
        raise BaseError(
            f"the file adapts query and value of {len(targets) / 2:g} blocks, the base has {len(places) // 2}",
            fix="is this the adapter's own base? Adapters of single blocks cannot be placed",
            path=component.root,
        )
    placed = []
    for pair, (module, which) in zip(targets, places, strict=True):
        stored = component.shapes[f"{module}.weight"]
        if which is not None and stored is not None:
            out = pair.target.out_features
            start = 0 if which == "q" else stored[0] - out
            if stored[0] != 3 * out:
                raise BaseError(f"{module!r} is {list(stored)} in the base, the factors have {out} outputs")
            view = View(f"rows:{start}:{start + out}")
            pair = replace(pair, target=replace(pair.target, shape=stored, view=view))
        placed.append(component.placed(pair, module))
    return placed


def _fused(component: Component) -> list[tuple[str, str | None]]:
    """Return (module, slice) of fused layers in the order of their blocks, twice each."""
    blocks = [(int(match["number"]), match[0]) for name in component.modules if (match := _FUSED.fullmatch(name))]
    return [(module, which) for _, module in sorted(blocks) for which in ("q", "v")]


def _apart(component: Component) -> list[tuple[str, str | None]]:
    matches = [match for name in component.modules if (match := _APART.fullmatch(name))]
    layers = [(int(match["number"]), "v" in match["which"], match[0]) for match in matches]
    return [(module, None) for _, _, module in sorted(layers)]


READER = Reader("lora_vit", "LoRA-ViT / Sam_LoRA file", read, knows=knows)
