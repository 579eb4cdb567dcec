"""LoRA-ViT and Sam_LoRA: ``w_a_000`` and ``w_b_000``, numbered: for each block of the vision transformer first the
query's factors, then the value's, and ``fc_<in>in_<out>out``, a trained head. The scale is 1.

w_a is (r, in) and w_b (out, r), as torch keeps linear layers; some copies of the code store both turned. Shapes decide
which it is. Names and slices of fused layers come from the base; without one the numbers stay as names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lrconvert.core.errors import BaseError, OrientationError, PairError
from lrconvert.formats.readers.base import by_names
from lrconvert.formats.readers.shared import naming, pairs
from lrconvert.formats.readers.shared.naming import Component
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.formats.readers.shared.pairs import Labels, Parts
from lrconvert.formats.readers.shared.weights import Weights, load_finite, open_weights
from lrconvert.io.container import TensorInfo
from lrconvert.lora.adapter import MATRIX, ExtraTensor, LoraAdapter, LoraTarget, Target, View

LABELS = Labels("w_a", "w_b")
_FACTOR = re.compile(r"w_(?P<half>[ab])_(?P<number>\d{1,5})")
_HEAD = re.compile(r"fc_(?P<inner>\d{1,9})in_(?P<out>\d{1,9})out")
_FUSED = re.compile(r"(?P<block>.*\.(?P<number>\d{1,5})\.attn)\.qkv")
_APART = re.compile(
    r"(?P<block>.*\.(?P<number>\d{1,5})\.(?:attn|attention|self_attn|attention\.attention))"
    r"\.(?P<which>proj_q|q_proj|query|proj_v|v_proj|value)"
)
_NOTE = (
    "modules have the numbers of this layout for names: give the base's folder to find its query and value layers, "
    "which may be slices of a fused one"
)


def knows(names: Sequence[str]) -> bool:
    """Whether most tensors are called w_a_000 or w_b_000."""
    return 2 * sum(_FACTOR.fullmatch(name) is not None for name in names) > len(names)


def _split(name: str) -> tuple[str, str] | None:
    if _HEAD.fullmatch(name):
        return "", name
    found = _FACTOR.fullmatch(name)
    return None if found is None else (f"{int(found['number']):05d}", found["half"].upper())


def read(path: Path, options: ReadOptions) -> LoraAdapter:
    """See the module's docstring. Raises E-ORIENT if shapes leave the orientation open, E-BASE if the base's blocks are
    not as many, E-TENSOR, E-PAIR, E-LIMIT, E-DTYPE, E-VALUE."""
    with open_weights(path, options) as weights:
        modules = pairs.sort_parts(weights, _split)
        heads = modules.pop("", {})
        pairs.check_not_half(modules, LABELS)
        numbers = [int(number) for number in modules]
        if numbers != list(range(len(numbers))):
            raise PairError("the numbers of w_a and w_b leave gaps", fix="the file is incomplete")
        is_turned = _is_turned(modules)
        targets = [_target(number, parts, is_turned, weights) for number, parts in modules.items()]
        notes = [_NOTE]
        if options.base is not None:
            targets = _placed(targets, naming.base_names(options.base).component(("",), "the adapter"))
            notes = []
        extras = [_head(name, info, weights) for name, info in heads.items()]
        notes += [f"the trained head {name} is carried along as head.weight" for name in heads]
        return pairs.finished(weights, targets, layout="lora_vit", extras=extras, warnings=notes)


def _is_turned(modules: Mapping[str, Parts]) -> bool:
    """Whether w_a is (in, r) and w_b (r, out). Raises E-PAIR, E-ORIENT."""
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
            fix="rename the tensors to <module>.lora_A (r, in) and .lora_B (out, r), and convert that with --alpha",
        )
    return possible == {True}


def _target(number: str, parts: Parts, is_turned: bool, weights: Weights) -> LoraTarget:
    a, b = load_finite(weights, parts["A"]), load_finite(weights, parts["B"])
    if is_turned:
        a, b = pairs.turned(a), pairs.turned(b)
    pairs.check_rank(number, a.shape[0])
    return LoraTarget(Target(f"w_{number}.weight", (b.shape[0], a.shape[1]), MATRIX), a, b, 1.0)


def _head(name: str, info: TensorInfo, weights: Weights) -> ExtraTensor:
    found = _HEAD.fullmatch(name)
    assert found is not None
    if info.shape != (int(found["out"]), int(found["inner"])):
        raise PairError(f"{name} is {list(info.shape)}, its name says otherwise")
    return pairs.carried("head.weight", info, weights)


def _placed(targets: Sequence[LoraTarget], component: Component) -> list[LoraTarget]:
    """Query and value of each block, in order. Raises E-BASE."""
    places = _fused(component) or _apart(component)
    if len(places) != len(targets):
        raise BaseError(
            f"the file adapts query and value of {len(targets) / 2:g} blocks, the base has {len(places) // 2}",
            fix="is this the adapter's own base? Adapters of single blocks cannot be placed",
            path=component.root,
        )
    found = []
    for pair, (module, rows) in zip(targets, places, strict=True):
        stored = component.shapes[f"{module}.weight"]
        if rows is None or stored is None:
            found.append(component.placed(pair, module))
            continue
        out = pair.target.out_features
        start = 0 if rows == "q" else stored[0] - out
        if stored[0] != 3 * out:
            raise BaseError(f"{module!r} is {list(stored)} in the base, the factors have {out} outputs")
        sliced = replace(pair.target, shape=stored, view=View(f"rows:{start}:{start + out}"))
        found.append(component.placed(replace(pair, target=sliced), module))
    return found


def _fused(component: Component) -> list[tuple[str, str | None]]:
    """(module, slice) of fused layers in the order of their blocks, twice each."""
    modules = [name.removesuffix(".weight") for name in component.shapes if name.endswith(".attn.qkv.weight")]
    blocks = [(int(found["number"]), module) for module in modules if (found := _FUSED.fullmatch(module))]
    return [(module, which) for _, module in sorted(blocks) for which in ("q", "v")]


def _apart(component: Component) -> list[tuple[str, str | None]]:
    names = [name.removesuffix(".weight") for name in component.shapes if name.endswith(".weight")]
    layers = [
        (int(found["number"]), "v" in found["which"], module) for module in names if (found := _APART.fullmatch(module))
    ]
    return [(module, None) for _, _, module in sorted(layers)]


READER = by_names("lora_vit", "LoRA-ViT / Sam_LoRA file", knows, read)
