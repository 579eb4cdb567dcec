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

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lrconvert.core.dtypes import Array
from lrconvert.core.errors import (
    CanonicalError,
    IndexRangeError,
    JsonSyntaxError,
    LimitError,
    MissingFieldError,
    UnknownFieldError,
)
from lrconvert.core.limits import MAX_RANK
from lrconvert.lora import packing
from lrconvert.lora.adapter import LoraAdapter, Target
from lrconvert.lora.packing import TensorSpec
from lrconvert.methods.base import Budget, Command, FitContext, Method, Tensors
from lrconvert.methods.sbora.fit import fit_columns, fit_rows, store
from lrconvert.methods.sbora.form import VARIANTS, WIDTHS, Config, most_places, settled, sizes, starts
from lrconvert.methods.sbora.plan import SBoRAOptions, make_plan


class SBoRA(Method):
    """See the module's docstring."""

    id = "sbora"
    version = 1
    title = "SBoRA, columns or rows of the update"
    commands = (Command("lora-to-sbora", "Keep a few input columns (FA) or output rows (FB) of every update."),)
    Options = SBoRAOptions
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
        most = max((n for row in config.counts for n in row), default=0)
        return {"levels": list(config.levels), "max_count": most, "variant": config.variant}

    def layout_specs(self, header: Mapping[str, Any], targets: Sequence[Target]) -> tuple[TensorSpec, ...]:
        known = {"levels", "max_count", "variant"}
        if set(header) != known:
            wrong = sorted(set(header) ^ known)[0]
            raise (UnknownFieldError if wrong in header else MissingFieldError)(f"method.config: field {wrong!r}")
        levels, most = header["levels"], header["max_count"]
        integers = isinstance(levels, list) and all(type(q) is int for q in levels)
        if not integers or not levels or levels != [q for q in WIDTHS if q in levels]:
            raise JsonSyntaxError(
                f"method.config.levels is {levels!r:.60}; widths of {WIDTHS}, widest first, are allowed"
            )
        if type(most) is not int or not 1 <= most <= MAX_RANK:
            raise LimitError(f"method.config.max_count is {most!r:.40}; 1 to {MAX_RANK} are allowed")
        if not isinstance(header["variant"], str) or header["variant"] not in VARIANTS:
            raise JsonSyntaxError(
                f"method.config.variant is {header['variant']!r:.40}; {', '.join(VARIANTS)} are known"
            )
        counts = packing.index("counts", (len(targets), len(levels)), most + 1)
        return (counts, packing.index("variants", (len(targets),), 2)) if header["variant"] == "mixed" else (counts,)

    def layout(self, config: Config) -> dict[str, Array]:
        found = {"counts": np.array(config.counts, np.uint32)}
        if config.variant == "mixed":
            found["variants"] = np.array(config.by_rows, np.uint32)
        return found

    def config(self, header: Mapping[str, Any], layout: Tensors, targets: Sequence[Target]) -> Config:
        counts = layout["counts"]
        if int(counts.max()) != header["max_count"] or not counts.any(axis=0).all():
            raise LimitError("method.config names a width that no line has, or max_count is not the largest count")
        rows = tuple(tuple(int(n) for n in row) for row in counts)
        by_rows = tuple(bool(v) for v in layout.get("variants", [header["variant"] == "fb"] * len(targets)))
        config = Config(tuple(header["levels"]), rows, by_rows)
        for target, rank, turned in zip(targets, config.ranks, by_rows, strict=True):
            if rank > sizes(target, turned)[0]:
                raise LimitError(f"target {target.name!r} has {rank} lines, more than its shape {target.matrix_shape}")
        if header["variant"] != config.variant:
            raise CanonicalError("method.config.variant is mixed, but all lines are of one variant")
        if config != settled(config.levels, rows, by_rows):
            raise CanonicalError("a target without lines has variant fb in a file that is mixed")
        return config

    def specs(self, config: Config, targets: Sequence[Target]) -> tuple[TensorSpec, ...]:
        totals = starts(config, tuple(targets))[-1]
        found = [packing.index("indices", (totals.line,), most_places(config, targets))]
        found += [
            packing.half("half", (n,)) if q == 16 else packing.code(f"codes.{q}", (n,), q)
            for q, n in totals.numbers.items()
        ]
        return (*found, *([packing.half("scales", (totals.scale,))] if totals.scale else []))

    def ranks(self, config: Config, targets: Sequence[Target]) -> Sequence[int]:
        return config.ranks

    def check(self, config: Config, targets: Sequence[Target], tensors: Tensors) -> None:
        begins = starts(config, tuple(targets))
        for which, (target, row) in enumerate(zip(targets, config.counts, strict=True)):
            at = begins[which].line
            indices = tensors["indices"][at : at + sum(row)].astype(np.int64)
            places = sizes(target, config.by_rows[which])[0]
            if indices.size and int(indices.max()) >= places:
                raise IndexRangeError(f"indices name place {int(indices.max())} of {places} in target {target.name!r}")
            if len(set(indices.tolist())) < len(indices):
                raise IndexRangeError(f"indices name a place of target {target.name!r} twice")
            ends = np.cumsum(row)
            for start, stop in zip([0, *ends], ends, strict=False):
                if np.any(np.diff(indices[start:stop]) < 0):
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
        blocks, scale_at = [], start.scale
        for q, n in zip(config.levels, config.counts[which], strict=True):
            if n == 0:
                continue
            at = start.numbers[q]
            block = values["half" if q == 16 else f"codes.{q}"][at : at + n * length].reshape(n, length)
            if q != 16:
                block = block * values["scales"][scale_at : scale_at + n, None]
                scale_at += n
            blocks.append(block)
        lines = xp.concatenate(blocks)
        units = xp.zeros_like(xp.broadcast_to(lines[:1, :1], (rank, places)))  # on the device of the values
        units[xp.arange(rank), values["indices"][start.line : start.line + rank]] = 1
        return (lines, units.T) if config.by_rows[which] else (units, lines.T)

    # --- making it ---

    def plan(self, lora: LoraAdapter, options: SBoRAOptions, budget: Budget | None, context: FitContext) -> Config:
        return make_plan(lora, options, budget, context)

    def fit(self, lora: LoraAdapter, config: Config, context: FitContext) -> dict[str, Array]:
        targets = lora.shapes()
        dtypes = {"code": np.uint8, "index": np.uint32, "half": np.float32}
        arrays = {spec.name: np.zeros(spec.shape, dtypes[spec.kind]) for spec in self.specs(config, targets)}
        for which, (pair, start) in enumerate(zip(lora.targets, starts(config, targets), strict=False)):
            widths = config.widths(which)
            if widths:
                fit = fit_rows if config.by_rows[which] else fit_columns
                store(arrays, fit(pair, widths, context.metric(pair)), start)
            context.progress((which + 1) / len(lora.targets), pair.target.name)
        return {name: packing.round_half(a) if a.dtype == np.float32 else a for name, a in arrays.items()}


METHOD = SBoRA()
