"""Stacks of experts of llama.cpp as those of transformers: modules of their own where the base stores them so, else
entries of a parameter of three dimensions, in which gates and ups are one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from lrconvert.core.dtypes import STORAGE, Array, Stored
from lrconvert.core.errors import BaseError, PairError
from lrconvert.formats.gguf_names import Family, Slice
from lrconvert.formats.readers.shared.naming import Component
from lrconvert.lora.adapter import LoraTarget, Target, View

Slices = list[tuple[Slice, LoraTarget]]


def placed(stacks: Mapping[str, Sequence[LoraTarget]], family: Family, component: Component) -> Iterator[LoraTarget]:
    """Yield the pairs of llama.cpp's stacks, by their names, on the base; experts without an update are left out.
    Raises E-BASE for a stack that the base does not have, E-PAIR."""
    joined: dict[tuple[str, int], Slices] = {}
    for name, pairs in stacks.items():
        spelled = list(family.expert_modules(name))
        modules = [module for module, _ in spelled if "*" in module]
        single = next((m for m in modules if f"{m.replace('*', '0')}.weight" in component.shapes), None)
        stack = next(((m, one) for m, one in spelled if "*" not in m and _shape(m, component) is not None), None)
        if single is None and stack is None:
            raise BaseError(f"the base has no experts that llama.cpp calls {name!r:.120}", path=component.root)
        for pair in pairs:
            number = int(pair.target.view.text.rpartition(":")[2])
            if pair.b.is_zero() or pair.a.is_zero():
                continue
            if single is not None:
                own = single.replace("*", str(number))
                out, inner = pair.target.matrix_shape
                yield component.placed(replace(pair, target=Target(f"{own}.weight", (out, inner))), own)
            elif stack is not None:
                joined.setdefault((stack[0], number), []).append((stack[1], pair))
    for (module, number), slices in joined.items():
        yield _entry(module, number, slices, component)


def _shape(name: str, component: Component) -> tuple[str, tuple[int, ...]] | None:
    """Return the name and shape of a parameter of three dimensions."""
    for spelled in (name, f"{name}.weight"):
        shape = component.shapes.get(spelled)
        if shape is not None and len(shape) == 3:
            return spelled, shape
    return None


def _entry(module: str, number: int, slices: Slices, component: Component) -> LoraTarget:
    """Return the pair of one entry of a stack: of slices with one A that A, else both, one below the other. Raises
    E-BASE, E-PAIR."""
    placed = _shape(module, component)
    assert placed is not None
    name, shape = placed
    first, count = slices[0][1], slices[0][0].count
    height, inner = first.target.matrix_shape
    if any(pair.target.matrix_shape != (height, inner) or pair.scale != first.scale for _, pair in slices):
        raise PairError(f"{module}: gates and ups of expert {number} are of other shapes")
    out = height * count
    if sorted(shape[1:]) != sorted((out, inner)) or number >= shape[0]:
        raise BaseError(f"{name!r} is {list(shape)} in the base, {[out, inner]} in the adapter", path=component.root)
    is_turned = shape[1:] == (inner, out) and (slices[0][0].turned or shape[1:] != (out, inner))
    kind = "expert_transposed" if is_turned else "expert"
    shared = all(pair.a == first.a for _, pair in slices)
    a = [first.a] if shared else [pair.a for _, pair in slices]
    rank = sum(half.shape[0] for half in a)
    rows: Array = np.zeros((out, rank), STORAGE[first.b.dtype])
    column = 0
    for one, pair in slices:
        rows[one.rows(out), column : column + pair.rank] = pair.b.array
        column += 0 if shared else pair.rank
    joined = Stored(first.a.dtype, np.concatenate([half.array for half in a]))
    target = Target(name, shape, View(f"{kind}:{number}"))
    return replace(first, target=target, a=joined, b=Stored(first.b.dtype, rows))
