"""Low rank with entropy-coded factors.

    delta_W = sum_j gain_j * b_j a_j^T,   a_j (in,), b_j (out,):  numbers 16 q - sign(q) of coded integers q

As factors ``A[j] = 2^-h gain_j a_j`` and ``B[:, j] = 2^h b_j``, 2^2h being about the gain.

With the SVD ``U diag(s) V^T`` of a source update, ``s_j u_j`` and ``s_j v_j`` are rounded with one step D for the whole
adapter: the error of an update is then white at D on both sides whatever s_j is, and the slope of distortion over rate
is the same everywhere, which is reverse water-filling (Cover and Thomas, Elements of Information Theory, 10.3). Ranks,
bits and the share of every module need no search of their own: under a budget the components with most energy per bit
are kept, at the step at which they capture most. Gains are solved by least squares for the rounded vectors.

Stored tensors, in the order of their declaration (components: by target, then largest first):

=============  ======  ==========================================================================================
``counts``     index   (targets,): how many components a target has
``models``     index   (components, 2): the models of the A row and of the B column; see ``formats/coded-v1.md``
``gains``      half    (components,)
``codes``      coded   for each component: the A row, then the B column
=============  ======  ==========================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from lrconvert.core.dtypes import Array
from lrconvert.core.errors import CanonicalError
from lrconvert.io import fields
from lrconvert.lora import packing
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter, Target
from lrconvert.lora.coded.models import COUNT
from lrconvert.lora.packing import TensorSpec
from lrconvert.methods.base import Budget, Command, FitContext, Method, Tensors
from lrconvert.methods.lowrank.coordinates import PLAIN, Coordinates
from lrconvert.methods.lowrank.fit import fit
from lrconvert.methods.lowrank.form import Config, Header, factors, starts
from lrconvert.methods.lowrank.plan import LowRankOptions, make_plan
from lrconvert.methods.shared.ranks import check_ranks

if TYPE_CHECKING:
    from lrconvert.lora.trainable import TrainableAdapter


class LowRank(Method):
    """See the module's docstring."""

    id = "lowrank"
    version = 2
    earlier = (1,)
    title = "low rank, entropy-coded factors"
    commands = (Command("lora-to-lowrank", "Cut the rank and code the factors: the baseline of every other form."),)
    Options = LowRankOptions
    searches = ({},)
    fit_seconds = 0.08
    uses: ClassVar[tuple[str, ...]] = ("statistics",)
    examples = (
        {"bits": 12},
        {"bits": 6, "rank": 3},
        {"bits": 3, "dynamic_method": "sv_fro", "dynamic_param": 0.95},
        {"bits": 1},
        {"target_size": 2000},
        {"target_size": 1800, "rank": 2},
    )
    Head: ClassVar[type[Header]] = Header

    def coordinates(self, config: Any) -> Coordinates:
        """Return the coordinates in which `codes` are."""
        return PLAIN

    # --- what the file holds ---

    def header(self, config: Any) -> dict[str, Any]:
        return dict(fields.as_json(Header(len(config.models), config.length, max(config.counts))))

    def layout_specs(self, header: Mapping[str, Any], targets: Sequence[Target]) -> tuple[TensorSpec, ...]:
        read = fields.read(self.Head, header, "method.config")
        counts = packing.index("counts", (len(targets),), read.max_count + 1)
        return (counts, packing.index("models", (read.components, 2), COUNT))

    def layout(self, config: Config) -> dict[str, Array]:
        return {"counts": np.array(config.counts, np.uint32), "models": np.array(config.models, np.uint32)}

    def config(self, header: Mapping[str, Any], layout: Tensors, targets: Sequence[Target]) -> Config:
        read = fields.read(self.Head, header, "method.config")
        counts = tuple(layout["counts"].tolist())
        if max(counts) != read.max_count or sum(counts) != read.components:
            raise CanonicalError("method.config: components and max_count do not describe the tensor 'counts'")
        check_ranks(targets, counts)
        return Config(counts, tuple(map(tuple, layout["models"].tolist())), read.length)

    def specs(self, config: Config, targets: Sequence[Target]) -> tuple[TensorSpec, ...]:
        rows = starts(config, tuple(targets)).rows
        gains = packing.half("gains", (len(config.models),))
        return (gains, packing.coded("codes", rows, config.length))

    def ranks(self, config: Config, targets: Sequence[Target]) -> Sequence[int]:
        return config.counts

    # --- using it ---

    def expand(
        self, config: Config, targets: Sequence[Target], values: Mapping[str, Any], which: int, xp: Any
    ) -> tuple[Any, Any]:
        out, inner = targets[which].matrix_shape
        n, begins = config.counts[which], starts(config, tuple(targets))
        first, component = begins.numbers[which], begins.components[which]
        block = values["codes"][first : first + n * (inner + out)].reshape(n, inner + out)
        gains = values["gains"][component : component + n, None]
        return factors(gains, block[:, :inner], block[:, inner:], xp, self.coordinates(config))

    # --- making it ---

    def plan(self, lora: LoraAdapter, options: LowRankOptions, budget: Budget | None, context: FitContext) -> Config:
        return make_plan(lora, options, budget, context)

    def fit(self, lora: LoraAdapter, config: Config, context: FitContext) -> dict[str, Array]:
        return fit(lora, config, context, self.coordinates(config))

    def refit(
        self, lora: LoraAdapter, compact: CompactAdapter, size: Callable[[Any], int], context: FitContext
    ) -> CompactAdapter:
        config = self.plan(lora, LowRankOptions(), Budget(size(compact.config), size), context)
        return replace(compact, config=config, tensors=self.fit(lora, config, context))

    def student(self, compact: CompactAdapter) -> TrainableAdapter:
        from lrconvert.methods.lowrank.student import LowRankStudent

        return LowRankStudent(self, compact)


METHOD = LowRank()
