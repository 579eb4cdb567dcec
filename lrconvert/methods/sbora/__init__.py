"""SBoRA: the update touches only a few input columns (FA) or a few output rows (FB) of the weight.

    FA:  delta_W[:, i_j] = b_j   for r of the in columns:   A = unit rows,  B[:, j] = b_j (out,)
    FB:  delta_W[i_j, :] = a_j   for r of the out rows:     B = unit columns,  A[j] = a_j (in,)

SBoRA (Po et al., arXiv 2407.05413) trains such lines at places drawn at random; here places and numbers are chosen to
keep as much of a LoRA as they can. A stored column or row is a *line*; each has a width of its own, as in `lowrank`:
16-bit numbers, or odd integers of 1, 2, 3, 4 or 8 bit with one scale. Variant and rank may differ between targets.

Stored tensors, in the order of their declaration (lines: by target, then widest first, then by place):

=============  ======  ==========================================================================================
``counts``     index   (targets, levels): how many lines of a target have each width of ``levels``, widest first
``variants``   index   (targets,): 0 FA, 1 FB; only if both are there
``indices``    index   the place of each line: an input column (FA), an output row (FB)
``half``       half    16-bit lines
``codes.<q>``  code    q-bit lines
``scales``     half    one for each line below 16 bit
=============  ======  ==========================================================================================

Rows are exactly optimal: the error is a sum over rows. So are columns in the plain norm. Under a metric M the best
numbers for columns S are ``delta M[:, S] M[S, S]^-1``: they take over what correlated columns did. S is chosen greedily
by what it then adds (a pivoted Cholesky factorization of M steered by delta; column subset selection is NP-hard) and
improved by swaps, in O(in r (r0 + m + r)) for a moment with a sketch of m rows. The error of quantized columns is fed
back: each in turn takes over what the errors of the others leave, in closed form, while that helps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lrconvert.core.dtypes import Array
from lrconvert.core.errors import CanonicalError, IndexRangeError
from lrconvert.io import fields
from lrconvert.lora import packing, svd
from lrconvert.lora.adapter import LoraAdapter, Target
from lrconvert.lora.packing import TensorSpec
from lrconvert.methods.base import Budget, Command, FitContext, Method, Tensors
from lrconvert.methods.sbora.fit import Lines, fit_lines, fit_under, store
from lrconvert.methods.sbora.form import Config, Header, most_places, settled, sizes, starts, totals
from lrconvert.methods.sbora.plan import SBoRAOptions, make_plan
from lrconvert.methods.shared import mixed_widths, payload
from lrconvert.methods.shared.mixed_widths import numbers_name
from lrconvert.methods.shared.ranks import check_ranks


class SBoRA(Method):
    """See the module's docstring."""

    id = "sbora"
    version = 1
    title = "SBoRA, columns or rows of the update"
    commands = (Command("lora-to-sbora", "Keep a few input columns (FA) or output rows (FB) of every update."),)
    Options = SBoRAOptions
    searches = ({},)
    fit_seconds = 0.14
    uses = ("statistics",)
    examples = (
        {"variant": "fa", "rank": 5},
        {"variant": "fb", "rank": 3, "bits": "8"},
        {"variant": "auto", "rank": 4, "bits": "4"},
        {"variant": "fa", "rank": 9, "bits": "2"},
        {"variant": "fb", "bits": "1"},
        {"target_size": 2500},
        {"variant": "fa", "bits": "3", "target_size": 2200},
    )

    # --- what the file holds ---

    def header(self, config: Config) -> dict[str, Any]:
        return dict(fields.as_json(Header(config.levels, config.max_count, config.variant)))

    def layout_specs(self, header: Mapping[str, Any], targets: Sequence[Target]) -> tuple[TensorSpec, ...]:
        read = fields.read(Header, header, "method.config")
        counts = mixed_widths.counts_spec(targets, read.levels, read.max_count)
        return (counts, packing.index("variants", (len(targets),), 2)) if read.variant == "mixed" else (counts,)

    def layout(self, config: Config) -> dict[str, Array]:
        counts = {"counts": config.table.astype(np.uint32)}
        return counts | ({"variants": np.array(config.by_rows, np.uint32)} if config.variant == "mixed" else {})

    def config(self, header: Mapping[str, Any], layout: Tensors, targets: Sequence[Target]) -> Config:
        read = fields.read(Header, header, "method.config")
        counts = mixed_widths.read_counts(layout["counts"], read.max_count)
        by_rows = tuple(bool(v) for v in layout.get("variants", [read.variant == "fb"] * len(targets)))
        config = Config(read.levels, counts, by_rows)
        places = (sizes(target, rows)[0] for target, rows in zip(targets, by_rows, strict=True))
        check_ranks(targets, config.ranks, places)
        if read.variant != config.variant:
            raise CanonicalError("method.config.variant is mixed, but all lines are of one variant")
        if config != settled(read.levels, counts, by_rows):
            raise CanonicalError("a target without lines has variant fb in a file that is mixed")
        return config

    def specs(self, config: Config, targets: Sequence[Target]) -> tuple[TensorSpec, ...]:
        whole = totals(config, targets)
        indices = packing.index("indices", (whole.line,), most_places(config, targets))
        return (indices, *mixed_widths.numbers_specs(whole.numbers, whole.scale))

    def ranks(self, config: Config, targets: Sequence[Target]) -> Sequence[int]:
        return config.ranks

    def check(self, config: Config, targets: Sequence[Target], tensors: Tensors) -> None:
        begins = starts(config, tuple(targets))
        for which, (target, row) in enumerate(zip(targets, config.counts, strict=True)):
            first = begins[which].line
            indices = tensors["indices"][first : first + sum(row)].astype(np.int64)
            places = sizes(target, config.by_rows[which])[0]
            if indices.size and int(indices.max()) >= places:
                raise IndexRangeError(f"indices name place {int(indices.max())} of {places} in target {target.name!r}")
            if len(set(indices.tolist())) < len(indices):
                raise IndexRangeError(f"indices name a place of target {target.name!r} twice")
            if any(np.any(np.diff(part) < 0) for part in np.split(indices, np.cumsum(row))):
                raise CanonicalError(f"indices of target {target.name!r} do not rise within a width")

    # --- using it ---

    def expand(
        self, config: Config, targets: Sequence[Target], values: Mapping[str, Any], which: int, xp: Any
    ) -> tuple[Any, Any]:
        target, rank = targets[which], config.ranks[which]
        out, inner = target.matrix_shape
        if rank == 0:
            return xp.zeros((0, inner), dtype=xp.float32), xp.zeros((out, 0), dtype=xp.float32)
        places, length = sizes(target, config.by_rows[which])
        start = starts(config, tuple(targets))[which]
        blocks, scale = [], start.scale
        for q, n in zip(config.levels, config.counts[which], strict=True):
            if n == 0:
                continue
            first = start.numbers[q]
            block = values[numbers_name(q)][first : first + n * length].reshape(n, length)
            if q != 16:
                block = block * values["scales"][scale : scale + n, None]
                scale += n
            blocks.append(block)
        lines = xp.concatenate(blocks)
        units = xp.zeros_like(xp.broadcast_to(lines[:1, :1], (rank, places)))  # on the device of the values
        units[xp.arange(rank), values["indices"][start.line : start.line + rank]] = 1
        return (lines, units.T) if config.by_rows[which] else (units, lines.T)

    # --- making it ---

    def plan(self, lora: LoraAdapter, options: SBoRAOptions, budget: Budget | None, context: FitContext) -> Config:
        return make_plan(lora, options, budget, context)

    def fit(self, lora: LoraAdapter, config: Config, context: FitContext) -> dict[str, Array]:
        arrays = payload.zeros(self.specs(config, lora.shapes()))
        begins, finished = starts(config, lora.shapes()), 0
        for numbers in svd.stacks(lora.targets):
            for n, lines in _fitted(lora, numbers, config, context):
                store(arrays, lines, begins[n])
            finished += len(numbers)
            context.progress(finished / len(lora.targets), lora.targets[numbers[-1]].target.name)
        return payload.rounded(arrays)


def _fitted(
    lora: LoraAdapter, numbers: Sequence[int], config: Config, context: FitContext
) -> Iterator[tuple[int, dict[int, Lines]]]:
    """Yield the lines of those targets `numbers`, of equal shapes and ranks, that have some."""
    widths = {n: config.widths(n) for n in numbers if config.ranks[n]}
    if context.metric(lora.targets[numbers[0]]) is not None:
        for n, own in widths.items():
            metric = context.metric(lora.targets[n])
            assert metric is not None
            yield n, fit_under(lora.targets[n], own, metric, config.by_rows[n])
        return
    for by_rows in (False, True):
        alike = [n for n in widths if config.by_rows[n] == by_rows]
        if alike:
            lines = fit_lines([lora.targets[n] for n in alike], [widths[n] for n in alike], by_rows)
            yield from zip(alike, lines, strict=True)


METHOD = SBoRA()
