"""LyCORIS: ``<module>.hada_w1_a`` ... of a LoHa, ``.lokr_w1`` ... of a LoKr, ``.diff`` and ``.diff_b`` of a whole
layer, ``.w_norm`` and ``.b_norm`` of a norm, beside ordinary pairs, in files for sd-scripts, ComfyUI and diffusers.

Every product becomes a pair, exact where its rank is at most `source_rank`, else cut by the SVD, which is said. Then
the layout that the modules are named in reads the file. The scale is alpha / r, once: LyCORIS trains and ComfyUI loads
with that, though LyCORIS' own `get_diff_weight` multiplies by it twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lrconvert.core.dtypes import Stored
from lrconvert.core.errors import PairError, UnknownLayoutError, UnsupportedLoraError
from lrconvert.formats.readers import base
from lrconvert.formats.readers.base import Reader
from lrconvert.formats.readers.shared import pairs, products
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.formats.readers.shared.weights import Weights, load_finite, open_weights
from lrconvert.io.container import TensorInfo
from lrconvert.lora import factoring
from lrconvert.lora.adapter import LoraAdapter, LoraTarget

_ALPHA, _DOWN, _UP = "alpha", "lora_down.weight", "lora_up.weight"
_WITH_PRODUCTS = (_ALPHA, "dora_scale", "diff_b")  # parts that belong to a module whatever its kind
_MAGNITUDES = ("dora_scale",)


def knows(names: Sequence[str]) -> bool:
    """Return whether a tensor is a part of a LoHa, a LoKr or a whole difference."""
    return products.are_products(names)


def read(path: Path, options: ReadOptions) -> LoraAdapter:
    """Read a file of LyCORIS. Names become those of a base as in the layout that the modules are named in. Raises
    E-PAIR, E-LORA-FEATURE, E-LAYOUT for modules of no known layout, and what the reader of that layout raises."""
    with open_weights(path, options) as weights:
        translated = Translated.of(weights, options.most_rank)
        names = [info.name for info in translated.tensors if products.part_of(info.name) is None]
        for reader in base.all_readers():
            if reader.read_weights is not None and reader.knows(names):
                return products.with_shares(reader.read_weights(translated, options), translated.kind)
        what = f"the modules are named in no layout that is known, {translated.tensors[0].name!r:.160} for one"
        raise UnknownLayoutError(what, fix="save it with names as sd-scripts, diffusers or ComfyUI have them")


@dataclass
class _Made:
    """The tensors of a file as plain pairs: those that stay, those of them that are stored under another name, and
    those that were computed, by name; what pairs lack, by the name of their B; the kinds of what was translated."""

    kept: list[TensorInfo] = field(default_factory=list)
    computed: dict[str, Stored] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)
    kinds: set[str] = field(default_factory=set)
    stored: dict[str, TensorInfo] = field(default_factory=dict)

    def keep_as(self, name: str, info: TensorInfo) -> None:
        """Add a tensor of the file under another name."""
        self.kept.append(TensorInfo(name, info.dtype, info.shape, info.start, info.nbytes, info.file))
        self.stored[name] = info

    def add(self, module: str, pair: LoraTarget) -> None:
        """Add the three tensors of a pair; the alpha says the scale."""
        rank, (out, inner, *kernel) = pair.rank, pair.target.shape
        a = pairs.reshape(pair.a, (rank, inner, *kernel))
        self.computed[f"{module}.{_DOWN}"] = a
        self.computed[f"{module}.{_UP}"] = pairs.reshape(pair.b, (out, rank, *(1 for _ in kernel)))
        self.computed[f"{module}.{_ALPHA}"] = Stored("F64", np.array(pair.scale * rank))
        self.lost[f"{module}.{_UP}"] = pair.lost


class Translated(Weights):
    """The tensors of an open file with pairs in place of products. It is the other's to close."""

    def __init__(self, weights: Weights, made: _Made) -> None:
        self.__dict__.update(vars(weights))
        self._computed, self._names, self._whole, self.lost = made.computed, made.stored, weights, made.lost
        described = (
            TensorInfo(name, stored.dtype, stored.shape, 0, stored.nbytes, weights.path)
            for name, stored in made.computed.items()
        )
        self.tensors = (*made.kept, *described)
        self.kind = " and ".join(sorted(made.kinds))

    @classmethod
    def of(cls, weights: Weights, limit: int) -> Translated:
        """Translate a file; ranks are at most `limit`. Raises E-PAIR, E-LORA-FEATURE, E-DTYPE, E-VALUE, E-LIMIT."""
        modules: dict[str, dict[str, TensorInfo]] = {}
        for info in weights.tensors:
            placed = products.part_of(info.name)
            if placed is not None:
                modules.setdefault(placed[0], {})[placed[1]] = info
        made = _Made()
        for info in weights.tensors:
            module, _, part = info.name.rpartition(".")
            if module not in modules:
                made.kept.append(info)
            elif part in _WITH_PRODUCTS:
                modules[module][part] = info
            elif part not in modules[module]:
                what = f"{module}: {info.name!r:.160} beside {next(iter(modules[module]))}"
                raise PairError(what, fix="the file mixes two adapters")
        for module, parts in sorted(modules.items()):
            _translate(module, parts, weights, limit, made)
        return cls(weights, made)

    def load(self, info: TensorInfo) -> Stored:
        computed = self._computed.get(info.name)
        return self._whole.load(self._names.get(info.name, info)) if computed is None else computed

    def read(self, info: TensorInfo) -> bytes | bytearray:
        computed = self._computed.get(info.name)
        return self._whole.read(self._names.get(info.name, info)) if computed is None else computed.array.tobytes()


def _translate(module: str, parts: Mapping[str, TensorInfo], weights: Weights, limit: int, made: _Made) -> None:
    """Add what stands for the parts of one module."""
    own = {part: info for part, info in parts.items() if part not in _WITH_PRODUCTS}
    for part in ("diff", *products.NORMS):
        info = own.get(part)
        if info is not None and (len(info.shape) < 2 or part in products.NORMS):
            made.keep_as(f"{module}.{products.NORMS.get(part, part)}", info)
            del own[part]
    if "diff_b" in parts:
        made.kept.append(parts["diff_b"])
    if "diff" in own and len(own) == 1:
        made.kinds.add("whole differences")
        pair = _difference(own["diff"], weights, limit).target(module, 1.0)
    elif own:
        product = products.read(module, own, weights, limit)
        made.kinds.add("LoHa" if any(part in products.LOHA for part in own) else "LoKr")
        pair = product.target(module, _scale(module, parts, product.rank, weights))
    else:
        made.kept += [parts[part] for part in (_ALPHA, *_MAGNITUDES) if part in parts]
        return
    made.add(module, pair)
    if "dora_scale" in parts:
        if pair.lost:
            what = f"{module}: a DoRA on a product of a rank above {limit}"
            raise UnsupportedLoraError(what, fix="merge it into its base with the tool that trained it")
        made.kept.append(parts["dora_scale"])


def _difference(info: TensorInfo, weights: Weights, limit: int) -> products.Product:
    values = load_finite(weights, info).decode()
    update = factoring.of_matrix(values.reshape(values.shape[0], -1), limit)
    return products.Product(update, tuple(values.shape[2:]), None)


def _scale(module: str, parts: Mapping[str, TensorInfo], rank: int | None, weights: Weights) -> float:
    """Return alpha / r; 1 without an alpha, and of a LoKr of whole halves."""
    if rank is None or _ALPHA not in parts:
        return 1.0
    return pairs.scale_of(module, pairs.stated_alpha(weights, parts[_ALPHA]), rank)


READER = Reader("lycoris", "LyCORIS file (LoHa, LoKr, full)", read, knows=knows, takes_rank=True)
