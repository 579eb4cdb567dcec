"""NOLA's official checkpoints of vision transformers: for each block ``fc1_alpha_000`` (ka,), ``fc1_beta_000`` (kb,),
the same of fc2, ``fc1_A_000``, ten numbers of a basis to check it by, and ``fc_<in>in_<out>out``, a trained head.

    delta_W = (1 / r) (sum_i alpha_i A_i  sum_j beta_j B_j)^T,   A_i (in, r), B_j (r, out)

The bases are made by torch's generator on the CPU from seed 0, uniform within 1 / sqrt(size of one), whatever device
the training ran on, so they can be made again; r, which no file states, is the one whose numbers are the ten to the
bit. Only then is the file read. Sums run in float64. Paper: arXiv 2310.02556.

Checkpoints of language models are refused (`kinds`): their bases were drawn on the device and in the dtype of the
training, and the stream of a CUDA device depends on how many processors it has.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lrconvert.core.dtypes import F32, F64, Stored
from lrconvert.core.errors import BaseError, DependencyError, DigestError, LimitError, PairError
from lrconvert.core.limits import MAX_DRAWN
from lrconvert.core.wording import spelled
from lrconvert.formats.readers.base import Reader
from lrconvert.formats.readers.shared import naming, pairs
from lrconvert.formats.readers.shared.naming import Component
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.formats.readers.shared.pairs import Parts
from lrconvert.formats.readers.shared.weights import Weights, load_extra, load_finite, open_weights
from lrconvert.io.container import TensorInfo
from lrconvert.lora.adapter import MATRIX, LoraAdapter, LoraTarget, Target

if TYPE_CHECKING:
    import torch

_NAME = re.compile(r"(?P<layer>fc[12])_(?P<part>alpha|beta|A)_(?P<block>\d{1,5})")
_HEAD = re.compile(r"fc_\d{1,9}in_\d{1,9}out")
_MLP = re.compile(r"(?:.*\.)?blocks\.(?P<block>\d{1,5})\.mlp\.(?P<layer>fc[12])")
_CHECKED = 10
_MOST_RANK = 256
_SEED = 0


def knows(names: Sequence[str]) -> bool:
    """Return whether there are coefficients of both factors of the layers of blocks."""
    return any(_NAME.fullmatch(name) and "_beta_" in name for name in names)


def _split(name: str) -> tuple[str, str] | None:
    if _HEAD.fullmatch(name):
        return "", name
    match = _NAME.fullmatch(name)
    return None if match is None else (f"{int(match['block']):05d}.{match['layer']}", match["part"])


def read(path: Path, options: ReadOptions) -> LoraAdapter:
    """Read a checkpoint of NOLA. Raises E-BASE without a base that says how wide the layers are, E-DIGEST if the bases
    are not those of the file, E-TENSOR, E-PAIR, E-LIMIT, E-DEPENDENCY, E-DTYPE, E-VALUE."""
    component = naming.base_component(options, ("",))
    if component is None:
        raise BaseError(
            "the file holds coefficients of seeded bases and does not say how wide the layers are, the base does",
            fix=f"give the vision transformer that it was trained on ({spelled('base', ...)})",
        )
    matches = [match for name in component.modules if (match := _MLP.fullmatch(name))]
    layers = {f"{int(match['block']):05d}.{match['layer']}": match[0] for match in matches}
    with open_weights(path, options) as weights:
        modules = pairs.sort_parts(weights, _split)
        heads = modules.pop("", {})
        rank = _rank(modules, layers, component, weights)
        targets = []
        for module, parts in modules.items():
            name = _layer(module, layers, component)
            target = Target(f"{name}.weight", _shape(name, component), MATRIX)
            targets.append(_pair(module, parts, rank, target, weights))
        extras = [load_extra("head.weight", info, weights) for info in heads.values()]
        notes = [f"the trained head {name} is carried along as head.weight" for name in heads]
        notes.append(f"bases of rank {rank} were made again by torch's CPU generator; the ten stored numbers agree")
        return pairs.build_adapter(weights, targets, layout="nola", extras=extras, warnings=notes)


def _layer(module: str, layers: Mapping[str, str], component: Component) -> str:
    """Return the layer of the base that ``<block>.<layer>`` is. Raises E-BASE."""
    if module not in layers:
        raise BaseError(f"the base has no layer blocks.{module.replace('.', '.mlp.')}", path=component.root)
    return layers[module]


def _shape(name: str, component: Component) -> tuple[int, int]:
    """Return (out, in) of a layer. Raises E-BASE."""
    shape = component.shapes[f"{name}.weight"]
    if shape is None or len(shape) != 2:
        raise BaseError(f"{name!r} is {shape} in the base, no linear layer", path=component.root)
    return shape[0], shape[1]


def _bound(*sizes: int) -> float:
    """Return half the width of torch's Kaiming uniform distribution with a = sqrt(5) for bases of these sizes."""
    return math.sqrt(3.0) * (math.sqrt(2.0 / 6.0) / math.sqrt(math.prod(sizes)))


def _generator() -> torch.Generator:
    try:
        import torch
    except ImportError:
        raise DependencyError("the bases are made by torch, which is not installed", fix="pip install torch") from None
    return torch.Generator().manual_seed(_SEED)


def _rank(modules: Mapping[str, Parts], layers: Mapping[str, str], component: Component, weights: Weights) -> int:
    """Return the rank whose first basis holds the stored numbers, in every block. Raises E-DIGEST, E-PAIR."""
    stored: list[tuple[int, F32]] = []
    for module, parts in modules.items():
        if "A" in parts:
            _, inner = _shape(_layer(module, layers, component), component)
            values = load_finite(weights, parts["A"]).decode()
            if values.shape != (min(_CHECKED, inner),):
                raise PairError(f"{module}: {parts['A'].name!r} has {values.size} numbers, expected {_CHECKED}")
            stored.append((inner, values))
    if not stored:
        raise DigestError(
            "the file holds no numbers of its bases (fc1_A_000), so that nothing tells whether they are made right",
            fix="merge it with NOLA's own code and use the merged model",
        )
    for rank in range(1, _MOST_RANK + 1):
        if all(np.array_equal(_first(inner, rank, values.size), values) for inner, values in stored):
            return rank
    raise DigestError(
        f"no rank up to {_MOST_RANK} gives the stored numbers of the bases: they were drawn in another way",
        fix="merge it with NOLA's own code where it was trained, and use the merged model",
    )


def _first(inner: int, rank: int, count: int) -> F32:
    """Return the first column of the first basis of A, as far as it is stored."""
    return _drawn(_generator(), (count, rank), _bound(inner, rank))[:, 0]


def _drawn(generator: torch.Generator, shape: tuple[int, ...], bound: float) -> F32:
    import torch

    numbers: F32 = torch.empty(shape).uniform_(-bound, bound, generator=generator).numpy()
    return numbers


def _pair(module: str, parts: Parts, rank: int, target: Target, weights: Weights) -> LoraTarget:
    """Return the sums of the bases as factors. Raises E-PAIR, E-LIMIT, E-DEPENDENCY, E-DTYPE, E-VALUE."""
    out, inner = target.shape
    if "alpha" not in parts or "beta" not in parts:
        raise PairError(f"{module}: has not both alpha and beta", fix="the file is incomplete")
    alpha, beta = (_coefficients(parts[half], weights) for half in ("alpha", "beta"))
    if (alpha.size * inner + beta.size * out) * rank > MAX_DRAWN:
        raise LimitError(f"{module}: the bases have more than {MAX_DRAWN} numbers")
    generator = _generator()
    a = _sum(alpha, generator, (inner, rank))
    b = _sum(beta, generator, (rank, out))
    left, right = (Stored("F64", np.ascontiguousarray(factor.T)) for factor in (a, b))
    return LoraTarget(target, left, right, 1.0 / rank)


def _coefficients(info: TensorInfo, weights: Weights) -> F64:
    if len(info.shape) != 1:
        raise PairError(f"tensor {info.name!r} is {list(info.shape)}, expected coefficients")
    values: F64 = load_finite(weights, info).decode().astype(np.float64)
    return values


def _sum(coefficients: F64, generator: torch.Generator, shape: tuple[int, int]) -> F64:
    """Return the sum of the bases times their coefficients, drawn one after the other: the generator gives the same
    numbers in any portions."""
    total = np.zeros(shape)
    for coefficient in coefficients:
        total += coefficient * _drawn(generator, shape, _bound(*shape)).astype(np.float64)
    return total


READER = Reader("nola", "NOLA file of a vision transformer", read, knows=knows)
