"""Bone (PEFT's MiSS): one small block, repeated along one side of the weight.

    in shards    delta_W[o, i] = D[i mod r, o]              D (r, out)        PEFT's MiSS
    out shards   delta_W[o, i] = D[o mod r, i]              D (r, in)
    mini         delta_W[o, i] = D[i mod r, o mod m]        D (r, m), m divides out

With the tiling T (r, in), T[k, i] = 1 where i mod r = k, the update is ``D^T T``: a LoRA of rank r whose A is fixed and
never stored. r need not divide in: the last copy of the block is cut, which is PEFT's padding of x with zeros. Papers:
Bone, DiSHA, MiSS, arXiv 2409.15371 (v1 to v12); shards along either side are DiSHA's design space.

The best D has a closed form. Under the moment M of the inputs (the identity without statistics),
``D^T = delta M T^T (T M T^T)^-1``: sums of M and of the LoRA's factors over residue classes, never a dense update.
Along outputs M cancels and D holds the means of delta's rows over their classes. A row space of r fixed directions
holds about r / in of an update. What makes the form worth its bytes is M, which says which directions matter, one bit
per number rather than sixteen, with what rounding loses fed back into the other rows, and ranks by what a bit buys.

Stored tensors, in the order of their declaration:

===========  ======  ==============================================================================================
``ranks``    index   (targets,): r of each target; only if they differ
``shards``   index   (targets,): 0 along inputs, 1 along outputs; only if both are in use
``blocks``   half    (n,): the rows of all D; ``single`` at 32 bits; ``code`` below 16, odd integers times ``scales``
``scales``   half    (n,): one per row of D and group; only below 16 bits
===========  ======  ==============================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lrconvert.core.dtypes import Array
from lrconvert.core.errors import CanonicalError, LimitError
from lrconvert.io import fields
from lrconvert.lora import packing
from lrconvert.lora.adapter import LoraAdapter, Target
from lrconvert.lora.packing import TensorSpec
from lrconvert.methods.base import Budget, Command, FitContext, Method, Tensors
from lrconvert.methods.bone import bat, bat_fit
from lrconvert.methods.bone.fit import fit_target, tiling
from lrconvert.methods.bone.form import EXACT, Config, Header, complete, starts_of
from lrconvert.methods.bone.plan import BoneOptions, Plan, needed
from lrconvert.methods.shared import payload
from lrconvert.methods.shared.ranks import check_ranks, ranks_layout, ranks_specs, read_ranks
from lrconvert.methods.shared.widths import groups_of, spread_scales


class Bone(Method):
    """See the module's docstring."""

    id = "bone"
    version = 1
    title = "Bone / MiSS: one block, repeated"
    commands = (
        Command("lora-to-bone", "Fit one block per target that repeats along a side (Bone, PEFT's MiSS)."),
        Command("lora-to-bat", "The same times the base's own blocks (Bat); needs --base.", {"variant": "bat"}),
    )
    Options = BoneOptions
    searches = ({},)
    fit_seconds = 0.015
    uses = ("statistics",)
    examples = (
        {"rank": 7},
        {"rank": 8, "bits": "4", "group_size": 24, "shard": "auto"},
        {"rank": 5, "shard": "out", "bits": "8"},
        {"variant": "mini", "rank": 9, "mini_rank": 4, "bits": "2"},
        {"variant": "mini", "target_size": 1500},
        {"target_size": 2500, "shard": "auto"},
        {"peft_compatible": True, "target_size": 3000},
        {"variant": "bat", "rank": 4},
        {"variant": "bat", "target_size": 2500},
    )

    # --- what the file holds ---

    def header(self, config: Config) -> dict[str, Any]:
        named = {name: getattr(config, name) for name in ("variant", "shard", "bits", "group_size", "mini_rank")}
        return dict(fields.as_json(Header(**named, rank=max(config.ranks), uniform=config.uniform)))

    def layout_specs(self, header: Mapping[str, Any], targets: Sequence[Target]) -> tuple[TensorSpec, ...]:
        read = fields.read(Header, header, "method.config")
        if (read.variant == "mini") != (read.mini_rank > 0):
            raise LimitError(f"method.config.mini_rank of variant {read.variant} is {read.mini_rank}")
        if read.variant != "bone" and read.shard != "in":
            raise CanonicalError(f"method.config.shard of variant {read.variant} is not 'in'")
        ranks = ranks_specs(read.rank, read.uniform, targets)
        return ranks if read.shard != "mixed" else (*ranks, packing.index("shards", (len(targets),), 2))

    def layout(self, config: Config) -> dict[str, Array]:
        shards = {"shards": np.array(config.turned, np.uint32)} if config.shard == "mixed" else {}
        return ranks_layout(config.ranks) | shards

    def config(self, header: Mapping[str, Any], layout: Tensors, targets: Sequence[Target]) -> Config:
        read = fields.read(Header, header, "method.config")
        ranks = read_ranks(read.rank, read.uniform, layout, targets)
        turned = [read.shard == "out"] * len(targets)
        if read.shard == "mixed":
            turned = [bool(n) for n in layout["shards"].tolist()]
            if any(side and not rank for side, rank in zip(turned, ranks, strict=True)):
                raise CanonicalError("tensor shards: a target without a block has no shards along outputs")
        group_size, bat = read.group_size, read.variant == "bat"
        config = complete(
            targets, ranks, turned, bits=read.bits, mini_rank=read.mini_rank, group_size=group_size, bat=bat
        )
        check_ranks(targets, ranks, (t.matrix_shape[not side] for t, side in zip(targets, config.turned, strict=True)))
        for target, rank in zip(targets, ranks, strict=True):
            out, inner = target.matrix_shape
            if rank and config.mini_rank and out % config.mini_rank:
                raise LimitError(f"target {target.name!r}: {out} outputs are no multiple of {config.mini_rank}")
            if rank and bat and (out % rank or inner % rank):
                raise LimitError(f"target {target.name!r}: its shape {target.matrix_shape} is no multiple of {rank}")
        if config.shard != read.shard:
            raise CanonicalError(f"method.config.shard is {read.shard!r}; the blocks are {config.shard!r}")
        if config.group_size != group_size:
            raise CanonicalError("method.config.group_size must be 0: no row that has scales is longer")
        return config

    def specs(self, config: Config, targets: Sequence[Target]) -> tuple[TensorSpec, ...]:
        numbers, scales = starts_of(config, tuple(targets))[-1]
        if config.bits < 16:
            return packing.code("blocks", (numbers,), config.bits), packing.half("scales", (scales,))
        return ((packing.single if config.bits == EXACT else packing.half)("blocks", (numbers,)),)

    def ranks(self, config: Config, targets: Sequence[Target]) -> Sequence[int]:
        return config.ranks

    # --- using it ---

    def block(self, config: Config, targets: Sequence[Target], values: Mapping[str, Any], which: int) -> Any:
        """Return D (r, columns) of target number `which` in float32: exact products of odd integers and scales."""
        rank, columns = config.ranks[which], config.columns(which, targets[which])
        start, scale_start = starts_of(config, tuple(targets))[which]
        numbers = values["blocks"][start : start + rank * columns].reshape(rank, columns)
        if config.bits >= 16:
            return numbers
        groups = groups_of(columns, config.group_size)
        scales = values["scales"][scale_start : scale_start + rank * groups].reshape(rank, groups)
        return numbers * spread_scales(scales, columns, config.group_size)

    def expand(
        self, config: Config, targets: Sequence[Target], values: Mapping[str, Any], which: int, xp: Any
    ) -> tuple[Any, Any]:
        (out, inner), rank = targets[which].matrix_shape, config.ranks[which]
        tiled, other = (out, inner) if config.turned[which] else (inner, out)
        block = self.block(config, targets, values, which)
        if block.shape[1] != other:
            block = block[:, np.arange(other) % block.shape[1]]
        tiles: Any = tiling(rank, tiled).astype(np.float32)
        if xp is not np:
            tiles = xp.from_numpy(tiles).to(block.device, block.dtype)
        return (block, tiles.T) if config.turned[which] else (tiles, block.T)

    def form(self, config: Config) -> tuple[str, str]:
        return (
            ("bat", "Bat: one block times the base's own blocks") if config.variant == "bat" else super().form(config)
        )

    def needs_base(self, config: Config) -> bool:
        return config.variant == "bat"

    def rows_on(
        self, config: Config, targets: Sequence[Target], which: int, factors: tuple[Any, Any], weight: Any, first: int
    ) -> Any:
        if not config.ranks[which]:
            return weight * 0
        block = factors[1].T
        if isinstance(weight, np.ndarray):
            return bat.rows_on(block, weight, first)
        return bat.products_on(block.to(weight.dtype), weight, first)

    # --- making it ---

    def wants_base(self, options: BoneOptions) -> bool:
        return options.variant == "bat"

    def plan(self, lora: LoraAdapter, options: BoneOptions, budget: Budget | None, context: FitContext) -> Config:
        return Plan(lora, options, budget, context).best()

    def fit(self, lora: LoraAdapter, config: Config, context: FitContext) -> dict[str, Array]:
        targets = lora.shapes()
        arrays = payload.zeros(self.specs(config, targets))
        for which, (pair, starts) in enumerate(zip(lora.targets, starts_of(config, targets), strict=False)):
            if config.ranks[which]:
                metric = context.metric(pair)
                if config.variant == "bat":
                    parts = bat_fit.fit_block(pair, config, which, metric, needed(context.base))
                else:
                    parts = fit_target(pair, config, which, metric)
                for array, start, part in zip(arrays.values(), starts, parts, strict=False):
                    payload.put(array, start, part)
            context.progress((which + 1) / len(lora.targets), pair.target.name)
        return payload.rounded(arrays)


METHOD = Bone()
