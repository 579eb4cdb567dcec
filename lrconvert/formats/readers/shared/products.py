"""LoHa, LoKr and whole differences, by the names that LyCORIS gives their parts: the factors of one module.

LoHa: ``(w1_a @ w1_b) * (w2_a @ w2_b)``, element by element. LoKr: the Kronecker product of w1 and w2, each of them
whole or ``_a @ _b``. With a core ``t`` (r, r, K, L) of a convolution (Tucker) the halves are (r, out) and (r, in). A
convolution without one is unfolded, (out, in * K * L), and its base alone can tell the kernel.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lrconvert.core.dtypes import F64, Stored, round_to
from lrconvert.core.errors import LimitError, PairError
from lrconvert.formats.readers.shared import naming, peft_kinds
from lrconvert.formats.readers.shared.folders import PEFT_WEIGHTS, weights_in
from lrconvert.formats.readers.shared.naming import Component
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.formats.readers.shared.pairs import check_scale, conv_view
from lrconvert.formats.readers.shared.weights import Weights, load_finite, open_weights
from lrconvert.formats.readers.shared.wrappers import PEFT_PREFIX
from lrconvert.io.container import TensorInfo
from lrconvert.lora import factoring
from lrconvert.lora.adapter import MATRIX, LoraAdapter, LoraTarget, Target
from lrconvert.lora.base_names import unfolding
from lrconvert.lora.factoring import Factored, Half

LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
NORMS = {"w_norm": "diff", "b_norm": "diff_b"}  # LyCORIS' names of differences of norms: what others call them
_PART = re.compile(rf"\.(?P<part>{'|'.join((*LOHA, *LOKR, 'diff', *NORMS))})")
_RANKS = {"r": "r", "alpha": "lora_alpha", "rank_pattern": "rank_pattern", "alpha_pattern": "alpha_pattern"}
_SHARE = "share_of_source"  # a field of the provenance


@dataclass(frozen=True, eq=False)
class Product:
    """The factors of a module's update without its scale, the shape of its kernel, () where there is none or it is not
    known, and the rank that alpha is divided by, None where LyCORIS takes no alpha (LoKr of whole halves)."""

    factored: Factored
    kernel: tuple[int, ...]
    rank: int | None

    def target(self, module: str, scale: float) -> LoraTarget:
        """Return the pair, in float32. Raises E-LIMIT for numbers beyond its range, E-CONFIG for such a scale."""
        a, b = (_single(module, half) for half in (self.factored.a, self.factored.b))
        out, unfolded = b.shape[0], a.shape[1]
        inner = unfolded // math.prod(self.kernel)
        view = conv_view(module, "the update", (1, inner, *self.kernel)) if self.kernel else MATRIX
        target = Target(f"{module}.weight", (out, inner, *self.kernel), view)
        check_scale(module, scale, is_zero=scale == 0)
        return LoraTarget(target, a, b, scale, self.factored.lost * scale**2)


def _single(module: str, values: F64) -> Stored:
    stored = Stored("F32", np.ascontiguousarray(round_to(values, "F32")))
    if not stored.is_finite():
        raise LimitError(f"{module}: the products of its factors are beyond the range of float32")
    return stored


def are_products(names: Iterable[str]) -> bool:
    """Return whether one of these tensors is a part of a LoHa, a LoKr or a whole difference as LyCORIS saves them."""
    return any(not name.startswith(PEFT_PREFIX) and part_of(name) is not None for name in names)


def part_of(name: str) -> tuple[str, str] | None:
    """Return (module, part) of a tensor that is a part of such a module; None for another one."""
    module, dot, part = name.rpartition(".")
    return (module, part) if module and _PART.fullmatch(dot + part) else None


# --- one module -----------------------------------------------------------------------------------------------------


def read(module: str, parts: Mapping[str, TensorInfo], weights: Weights, limit: int) -> Product:
    """Return the product of a module with parts of `LOHA` or of `LOKR`, of at most `limit` components. Raises E-PAIR
    for parts that are missing or do not fit, E-DTYPE, E-VALUE."""
    values = _decoded(parts, weights)
    make = _loha if any(part in LOHA for part in values) else _lokr
    try:
        return make(module, values, limit)
    except ValueError:  # numpy's, of shapes that do not fit
        shapes = ", ".join(f"{part} {list(info.shape)}" for part, info in sorted(parts.items()))
        raise PairError(f"{module}: {shapes} do not fit") from None


def _decoded(parts: Mapping[str, TensorInfo], weights: Weights) -> dict[str, F64]:
    return {part: load_finite(weights, info).decode().astype(np.float64) for part, info in parts.items()}


def _loha(module: str, values: Mapping[str, F64], limit: int) -> Product:
    _check_parts(module, values, LOHA[:4], LOHA)
    if ("hada_t1" in values) != ("hada_t2" in values):
        raise PairError(f"{module}: one of hada_t1 and hada_t2 is missing", fix="the file is incomplete")
    (b1, a1, kernel), (b2, a2, _) = (
        _half(module, values[f"hada_w{n}_a"], values[f"hada_w{n}_b"], values.get(f"hada_t{n}")) for n in (1, 2)
    )
    if (b1.shape[0], a1.shape[1]) != (b2.shape[0], a2.shape[1]):
        raise PairError(f"{module}: the halves are {_sizes(b1, a1)} and {_sizes(b2, a2)}, not of one size")
    return Product(factoring.of_hadamard((b1, a1), (b2, a2), limit), kernel, values["hada_w1_b"].shape[0])


def _lokr(module: str, values: Mapping[str, F64], limit: int) -> Product:
    one, _, first = _side(module, values, 1)
    other, kernel, second = _side(module, values, 2)
    if first is not None and second is not None and first != second:
        raise PairError(f"{module}: lokr_w1 has rank {first} and lokr_w2 rank {second}; alpha goes with one")
    return Product(factoring.of_kronecker(one, other, limit), kernel, second or first)


def _side(module: str, values: Mapping[str, F64], number: int) -> tuple[Half, tuple[int, ...], int | None]:
    """Return (w1 or w2, its kernel, its rank or None where it is whole)."""
    name = f"lokr_w{number}"
    whole = values.get(name)
    halves = [part for part in (f"{name}_a", f"{name}_b") if part in values]
    if whole is not None:
        if halves or (number == 2 and "lokr_t2" in values) or whole.ndim < 2 or (number == 1 and whole.ndim > 2):
            raise PairError(f"{module}: {name} is {list(whole.shape)}, with {', '.join(halves) or 'no parts'} beside")
        return whole.reshape(whole.shape[0], -1), whole.shape[2:], None
    _check_parts(module, values, (f"{name}_a", f"{name}_b"), LOKR)
    b, a, kernel = _half(
        module, values[f"{name}_a"], values[f"{name}_b"], values.get("lokr_t2") if number == 2 else None
    )
    return (b, a), kernel, values[f"{name}_b"].shape[0]


def _half(module: str, b: F64, a: F64, core: F64 | None) -> tuple[F64, F64, tuple[int, ...]]:
    """Return (b (out, r), a (r, in * kernel), kernel) of two parts, and of the core of a convolution."""
    if core is None:
        if b.ndim != 2 or a.ndim < 2 or b.shape[1] != a.shape[0]:
            raise PairError(f"{module}: parts {list(b.shape)} and {list(a.shape)} do not fit; (out, r) and (r, in)")
        return b, a.reshape(a.shape[0], -1), a.shape[2:]
    rank, kernel = core.shape[0], core.shape[2:]
    if b.ndim != 2 or a.ndim != 2 or {b.shape[0], a.shape[0], *core.shape[:2]} != {rank} or not kernel:
        what = f"{module}: a core {list(core.shape)} and parts {list(b.shape)} and {list(a.shape)} do not fit"
        raise PairError(f"{what}; (r, r, kernel), (r, out) and (r, in)")
    inner = np.einsum("ij...,jq->iq...", core, a).reshape(rank, -1)
    return b.T, inner, kernel


def _check_parts(module: str, values: Mapping[str, F64], needed: Sequence[str], every: Sequence[str]) -> None:
    missing, stray = [part for part in needed if part not in values], sorted(values.keys() - set(every))
    if missing:
        raise PairError(f"{module}: has no {missing[0]}", fix="the file is incomplete")
    if stray:
        raise PairError(f"{module}: has {needed[0]} and {stray[0]}", fix="the file mixes two adapters")


def _sizes(b: F64, a: F64) -> list[int]:
    return [b.shape[0], a.shape[1]]


# --- PEFT's folders -------------------------------------------------------------------------------------------------


def read_peft(path: Path, options: ReadOptions, kind: str, parts: Sequence[str], unread: Sequence[str]) -> LoraAdapter:
    """Read a folder of PEFT's of this `kind`, ``peft_type``, whose layers have these `parts`; fields of its
    configuration that are `unread` have no effect. Raises what the readers of both kinds name."""
    config, settings = peft_kinds.settings_of(path, kind, _RANKS, unread)
    component = naming.base_component(options)
    with open_weights(weights_in(path, PEFT_WEIGHTS), options) as weights:
        places = peft_kinds.sort(weights, parts)
        targets = []
        for module, own in places.modules.items():
            product = _peft_product(module, own, weights, options.most_rank)
            rank = int(settings.ranks.value(module)) if product.rank is None else product.rank
            pair = product.target(module, settings.scale(module, rank))
            targets.append(pair if component is None else _folded(pair, module, component))
        adapter = peft_kinds.build(weights, places, targets, config, settings)
    return with_shares(adapter, {"LOHA": "LoHa", "LOKR": "LoKr"}[kind])


def _folded(pair: LoraTarget, module: str, component: Component) -> LoraTarget:
    """Return the pair on a convolution of the base, if its matrix is that of one, unfolded. Raises E-BASE."""
    stored = component.shapes.get(f"{component.dotted(module)}.weight")
    view = None if stored is None else unfolding(pair.target, stored)
    if stored is None or view is None:
        return pair
    return replace(pair, target=replace(pair.target, shape=stored, view=view))


def _peft_product(module: str, parts: Mapping[str, TensorInfo], weights: Weights, limit: int) -> Product:
    """Return the product of a module as PEFT computes it, which has ways of its own with convolutions in one dimension:
    the kernel of a core is (K, 1), and a whole w2 (k, n, K) goes into the Kronecker product as a stack, whose numbers
    are then taken in their order as (out, in, K)."""
    product = read(module, parts, weights, limit)
    if len(product.kernel) == 2 and product.kernel[1] == 1 < product.kernel[0]:
        return replace(product, kernel=product.kernel[:1])
    if "lokr_w2" not in parts or len(parts["lokr_w2"].shape) != 3:
        return product
    values = _decoded(parts, weights)
    one, right = _side(module, values, 1)[0], values["lokr_w2"]
    left = one[0] @ one[1] if isinstance(one, tuple) else one
    update = np.kron(left[None], right).reshape(left.shape[0] * right.shape[0], -1)
    return replace(product, factored=factoring.of_matrix(update, limit))


# --- what is said of what was cut -----------------------------------------------------------------------------------


def with_shares(adapter: LoraAdapter, kind: str) -> LoraAdapter:
    """Return the adapter with a warning of what its pairs lack of the updates of a `kind`, in all and where it is most,
    and the share that they hold in its provenance."""
    cut = [pair for pair in adapter.targets if pair.lost]
    if not cut:
        return adapter
    held = [_energy(pair) for pair in adapter.targets]
    whole = [own + pair.lost for own, pair in zip(held, adapter.targets, strict=True)]
    shares = [(own / of, pair.target.name) for own, of, pair in zip(held, whole, adapter.targets, strict=True) if of]
    share, (least, name) = sum(held) / sum(whole), min(shares)
    line = (
        f"{len(cut)} of {len(held)} updates of the {kind} have a rank above {max(pair.rank for pair in cut)}: the LoRA "
        f"holds {share:.4f} of the energy of all, {least:.4f} of {name}; what is kept is measured against all of it"
    )
    fields = {**adapter.provenance.fields, _SHARE: f"{share:.6f}"}
    return replace(adapter, provenance=replace(adapter.provenance, fields=fields), warnings=(*adapter.warnings, line))


def _energy(pair: LoraTarget) -> float:
    a, b = pair.A.astype(np.float64), pair.B.astype(np.float64)
    return float(np.sum((a @ a.T) * (b.T @ b))) * pair.scale**2
