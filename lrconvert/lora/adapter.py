"""Adapters as data: targets, the LoRA, the compact adapter. Frozen dataclasses; nothing here computes much.

Shapes are the same everywhere: `A` is (r, in), `B` is (out, r), the update of W (out, in) is ``scale * B @ A``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

from lrconvert.core.dtypes import Array, Stored
from lrconvert.core.errors import JsonSyntaxError, ShapeError

_VIEW = re.compile(
    r"matrix|transposed"
    r"|conv:(?P<kernel>[1-9][0-9]{0,3}(?:x[1-9][0-9]{0,3}){0,2}):(?P<groups>[1-9][0-9]{0,8})"
    r"|rows:(?P<start>0|[1-9][0-9]{0,9}):(?P<stop>[1-9][0-9]{0,9})"
    r"|expert(?:_transposed)?:(?P<expert>0|[1-9][0-9]{0,8})"
)


@dataclass(frozen=True, order=True)
class View:
    """The place of a 2-D (out, in) matrix in a stored parameter. A closed set, written as a short string:

    ``matrix``        the parameter is (out, in)
    ``transposed``    the parameter is (in, out): Conv1D, embeddings
    ``conv:KxL:G``    a convolution (out, in/G, K, L), unfolded to (out, in/G * K * L); ``conv:K:G`` for (out, in/G, K),
                      ``conv:KxLxM:G`` for (out, in/G, K, L, M)
    ``rows:a:b``      rows a to b of an (out, in) parameter: one slice of a fused projection
    ``expert:i``      entry i of a stack (experts, out, in); ``expert_transposed:i`` of a stack (experts, in, out)
    """

    text: str = "matrix"

    def __post_init__(self) -> None:
        if not _VIEW.fullmatch(self.text):
            raise JsonSyntaxError(f"{self.text!r:.80} is not a view")

    @property
    def kind(self) -> str:
        return self.text.split(":")[0]

    def matrix_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return (out, in) of the matrix seen in a parameter of `shape`. Raise E-SHAPE if the view does not apply."""
        if self.text == "matrix" and len(shape) == 2:
            return shape[0], shape[1]
        match = _VIEW.fullmatch(self.text)
        assert match is not None
        if self.kind == "transposed" and len(shape) == 2:
            return shape[1], shape[0]
        if self.kind == "rows" and len(shape) == 2 and int(match["start"]) < int(match["stop"]) <= shape[0]:
            return int(match["stop"]) - int(match["start"]), shape[1]
        if match["expert"] and len(shape) == 3 and int(match["expert"]) < shape[0]:
            return (shape[1], shape[2]) if self.kind == "expert" else (shape[2], shape[1])
        if self.kind == "conv" and tuple(int(k) for k in match["kernel"].split("x")) == shape[2:]:
            return shape[0], math.prod(shape[1:])
        raise ShapeError(f"the view {self.text} does not apply to a parameter of shape {list(shape)}")


MATRIX = View("matrix")
TRANSPOSED = View("transposed")


@dataclass(frozen=True, order=True)
class Target:
    """One base parameter that an adapter changes: its name in the base's state dict, stored shape, and the view."""

    name: str
    shape: tuple[int, ...]
    view: View = MATRIX

    @cached_property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.view.matrix_shape(self.shape)

    @property
    def channels(self) -> int:
        """Inputs without the places of a kernel: what DoRA along the inputs has a magnitude for."""
        return self.shape[1] if self.view.kind == "conv" else self.in_features

    @property
    def out_features(self) -> int:
        return self.matrix_shape[0]

    @property
    def in_features(self) -> int:
        return self.matrix_shape[1]


@dataclass(frozen=True)
class LoraTarget:
    """One LoRA pair as stored: `a` (r, in), `b` (out, r), and the folded scale (alpha / r, or alpha / sqrt(r)).

    `lost`: of an update of another kind, which a LoRA of this rank cannot hold, the squared norm of the rest. The rest
    is orthogonal to the pair, and every measure of what is kept counts it (`formats/fidelity`)."""

    target: Target
    a: Stored
    b: Stored
    scale: float
    lost: float = 0.0

    def __repr__(self) -> str:
        return f"<LoraTarget: {self.target.name}, {self.target.shape}, rank {self.rank}>"

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def A(self) -> Array:
        """(r, in), float32 (float64 if stored so); exact."""
        return self.a.decode()

    @property
    def B(self) -> Array:
        """(out, r), float32 (float64 if stored so); exact, without the scale."""
        return self.b.decode()


Use = Literal["replace", "add", "magnitude", "input_magnitude", "rows", "row_indices", "textual_inversion"]
USES: tuple[Use, ...] = get_args(Use)
MAGNITUDES: tuple[Use, ...] = ("magnitude", "input_magnitude")  # of DoRA


@dataclass(frozen=True)
class ExtraTensor:
    """A tensor that rides along untouched: any dtype, raw little-endian bytes. `name` is a parameter of the base, and
    `use` its purpose there:

    ``replace``      takes its place, or adds it: a classifier head
    ``add``          is added to it: the bias of a LoRA, its scale folded in
    ``magnitude``    DoRA: the norms of W + B @ A along in, (out,) in the shape PEFT stores
    ``input_magnitude``  DoRA of LyCORIS: its norms along out, and of a convolution along its kernel too, (in,)
    ``rows``         takes the place of some of its rows: trained tokens, (n, features)
    ``row_indices``  which rows these are: (n,), integers, rising
    ``textual_inversion``  is for no parameter: embeddings of a word that came with the adapter, (n, features)
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes = field(repr=False)
    use: Use = "replace"


@dataclass(frozen=True)
class Provenance:
    """The origin of an adapter. `source` is the sha256 of the source's tensors; `base_model` and `revision` are
    hints that are never opened; `fields` are the few strings an export needs. No time, no absolute path."""

    source: str = ""
    base_model: str = ""
    revision: str = ""
    task_type: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LoraAdapter:
    """A LoRA in the terms of this package. `targets` are sorted by name; `warnings` are one-line texts for the user."""

    targets: tuple[LoraTarget, ...]
    extras: tuple[ExtraTensor, ...] = ()
    provenance: Provenance = Provenance()
    warnings: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """Numbers in all A and B."""
        return sum(t.a.array.size + t.b.array.size for t in self.targets)

    @property
    def half_bytes(self) -> int:
        """Bytes of all A and B at 16 bit: the yardstick of `--target-ratio` and of every table."""
        return 2 * self.numel

    def shapes(self) -> tuple[Target, ...]:
        return tuple(t.target for t in self.targets)

    def __repr__(self) -> str:
        ranks = sorted({pair.rank for pair in self.targets})
        rank = "-".join(map(str, dict.fromkeys((ranks[0], ranks[-1])))) if ranks else "0"
        return f"<LoraAdapter: {len(self.targets)} targets, rank {rank}, {self.half_bytes:,} bytes at 16 bit>"


@dataclass(frozen=True)
class BaseFingerprint:
    """The identity of a base: sha256 over target names and shapes (always), over all contents (if it was given)."""

    names: str
    content: str = ""


@dataclass(frozen=True)
class CompactAdapter:
    """The result of a method's fit.

    `config` is the method's frozen Config; `tensors` maps each declared tensor to canonical numpy values: ``uint8``
    codes, ``uint32`` indices, ``float32`` halves (see `packing`). Same method, config, targets and tensors mean the
    same update on every machine.
    """

    method: str
    config: Any
    targets: tuple[Target, ...]
    tensors: Mapping[str, Array]
    extras: tuple[ExtraTensor, ...] = ()
    provenance: Provenance = Provenance()
    base: BaseFingerprint = BaseFingerprint("")
    warnings: tuple[str, ...] = field(default=(), compare=False)

    def shapes(self) -> tuple[Target, ...]:
        return self.targets

    def __repr__(self) -> str:
        return f"<CompactAdapter: {self.method}, {len(self.targets)} targets>"


Adapter = LoraAdapter | CompactAdapter
