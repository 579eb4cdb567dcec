"""Low rank, version 2, in training: numbers in steps that are rounded as a file rounds them, under a budget of bytes.

A target has as many components as its LoRA, those that the file lacks as latents that round to zero. A component is
stored as long as both of its sides hold a number that is not zero; so components die and grow wherever that helps the
answers most. The model's update is exactly that of the file; where the A row of a component is zero, its B column is
given to the model as it is before rounding, which changes no answer and shows the A row where to grow.

The rate is part of the loss: ``multiplier * bits / budget``. The multiplier begins with what the file lacks of the
LoRA, rises while steps spend more than the budget and falls while they spend less (dual ascent, damped and bounded).
What a step has spent too much or too little is undone at once by a common factor on all latents, a coarser or finer
step D for the same update, so that the coded bytes stay within 2 % of the budget throughout; `settle` meets it exactly,
with the bytes of the real file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lrconvert.core.dtypes import Array, Stored
from lrconvert.lora import fake_quant, svd
from lrconvert.lora.adapter import CompactAdapter, LoraTarget
from lrconvert.lora.coded import stream
from lrconvert.lora.coded.stream import LARGEST_INTEGER
from lrconvert.lora.trainable import Rates, TrainableAdapter, nearest_factors, unit_of
from lrconvert.methods.base import Budget
from lrconvert.methods.lowrank import form, rate
from lrconvert.methods.lowrank.components import DEAD_ZONE
from lrconvert.methods.lowrank.coordinates import Coordinates
from lrconvert.methods.lowrank.form import Config, starts
from lrconvert.methods.lowrank.rounding import SIDE_BITS

_LATENTS = 0.06  # of a step: the largest move of a number in a step of the optimizer,
_FINE = 0.02  # or this share of the numbers' own size, where they are many steps large; less for a file that lacks less
_LEAST_LACKING = 1e-3  # of the energy of a LoRA: what is taken to be missing at least
_GAIN, _MOST = 3.0, 0.1  # of the multiplier's logarithm: per relative excess, and at once
_TOLERANCE = 0.01  # of the budget, before a step is undone
_FULL = 0.99  # of the budget: what a settled file has at least
_NEARLY = 0.9  # of a budget: a file that is smaller keeps its own size
_ROOM = 0.0025  # of the budget that is aimed to be left
_SLOPE = 0.7  # of the factor over the bits, both as logarithms
_TRIES = 24
_LEAST = 0.1  # of what is spent: the least that a factor is chosen by
_FARTHEST = 2.0**20  # from 1: factors that are tried
_CELL = 63 / 64  # of the way to where the next integer begins
_WIDE = 1 << 12  # integers from which on a latent starts where it is stored
_NOTHING = 1e-6  # of the largest singular value: what is smaller is rounding


class LowRankStudent(TrainableAdapter):
    """A `lowrank` adapter in training. `latents` of all components in steps, by target, the A row and the B column of
    each; `gains` one for each component."""

    unit_latents: Tensor
    unit_gains: Tensor
    models: Tensor
    multiplier: Tensor
    spent: Tensor

    def __init__(self, method: Any, compact: CompactAdapter) -> None:
        nn.Module.__init__(self)
        self.method, self.source, self.rates, self.numbers = method, compact, Rates(), ()
        self.specs = {spec.name: spec for spec in method.specs(compact.config, compact.targets)}
        self.budget: Budget | None = None
        self.goal, self.least = 0.0, 0.0  # bits, bytes
        self.coordinates = method.coordinates(compact.config)
        self.lacking = 1.0  # of the LoRA's energy, at the start
        stored, gains = compact.tensors["codes"], torch.from_numpy(compact.tensors["gains"].copy())
        integers = torch.from_numpy(stored.astype(np.float32))
        latents = integers - integers.sign() / 16
        self.register_buffer("unit_latents", unit_of(latents, each=False))
        self.register_buffer("multiplier", torch.zeros((), dtype=torch.float64))
        self.register_buffer("spent", torch.zeros((), dtype=torch.float64))
        self._take(compact.config.counts, latents, gains)

    def _take(self, counts: Sequence[int], latents: Tensor, gains: Tensor) -> None:
        """Let each target have so many components, with these numbers."""
        device = self.unit_latents.device
        self.blocks = rate.blocks(self.source.targets, counts)
        self.rows = rate.Rows.of(self.blocks)
        self._rounded: tuple[tuple[int, int], rate.Coded] | None = None
        self.register_buffer("unit_gains", unit_of(gains, each=True).to(device))
        self.register_buffer("models", torch.zeros(len(gains), 2, dtype=torch.int64, device=device))
        self.latents = nn.Parameter(latents.to(device) / self.unit_latents)
        self.gains = nn.Parameter(gains.to(device) / self.unit_gains)
        self._measure()

    # --- numbers ---

    def _steps(self) -> Tensor:
        return self.latents.detach() * self.unit_latents

    def _coded(self) -> rate.Coded:
        """The latents as they are, rounded and coded: once, until they change."""
        state = (id(self.latents), self.latents._version)
        if self._rounded is None or self._rounded[0] != state:
            self._rounded = state, rate.coded(self.rows, self._steps().cpu().numpy())
        return self._rounded[1]

    def _stored(self) -> Array:
        """Mark the components (n,) that a file holds: those with numbers on both sides, at least one."""
        stored: Array = np.asarray(self._coded().nonzero.all(axis=1))
        if not stored.any():
            latents = self.latents.detach()
            sizes = torch.cat([a.norm(dim=1) * b.norm(dim=1) for a, b in (block.of(latents) for block in self.blocks)])
            stored[int(torch.argmax(self.gains.detach().abs() * self.unit_gains * sizes))] = True
        return stored

    @torch.no_grad()
    def _measure(self) -> float:
        """Take note of the models of all rows; returns the bits of what is stored."""
        coded, stored = self._coded(), self._stored()
        self.models.copy_(torch.from_numpy(coded.models))
        spent = float(coded.bits[stored].sum() + SIDE_BITS * stored.sum())
        self.spent.fill_(spent)
        return spent

    def values(self, training: bool = False) -> dict[str, Tensor]:
        device, coded, gains = self.latents.device, self._coded(), self.gains * self.unit_gains
        stored = torch.from_numpy(self._stored()).to(device)
        numbers = rate.numbers(torch.from_numpy(coded.integers).to(device).float())
        if training:
            self._show_rows_where_to_grow(numbers, ~coded.nonzero[:, 0])
        numbers = fake_quant.through(self.latents, numbers, 16 * float(self.unit_latents))
        gains = gains.masked_scatter(stored, fake_quant.half(gains[stored]))
        return {"numbers": numbers, "gains": gains} | ({} if training else {"stored": stored})

    @torch.no_grad()
    def _show_rows_where_to_grow(self, numbers: Tensor, empty: Array) -> None:
        """Let B columns beside A rows that are `empty` (n,) be as they are before rounding: the update is the same."""
        steps = self._steps()
        for block in self.blocks:
            rows = torch.from_numpy(empty[block.components]).to(numbers.device)
            if rows.any():
                seen = torch.where(rows[:, None], 16 * block.of(steps)[1], block.of(numbers)[1])
                block.of(numbers)[1].copy_(seen)

    def factors(self, values: Mapping[str, Tensor], which: int) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r) of a target: of what is stored, or of all components for `values` in
        training."""
        block = self.blocks[which]
        (a, b), gains = block.of(values["numbers"]), values["gains"][block.components, None]
        if "stored" in values:
            stored = values["stored"][block.components]
            a, b, gains = a[stored], b[stored], gains[stored]
        return form.factors(gains, a, b, torch, self.coordinates)

    def all_factors(self, values: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        if "stored" in values:
            return super().all_factors(values)
        # Split at once: the gradient of a slice is as long as the tensor it is of.
        parts = torch.split_with_sizes(values["numbers"], [block.stop - block.start for block in self.blocks])
        counts = [block.count for block in self.blocks]
        sides = [torch.split_with_sizes(x, counts) for x in form.scales(values["gains"][:, None], torch)]
        factors = []
        for block, part, one, other in zip(self.blocks, parts, *sides, strict=True):
            rows = part.view(block.count, block.inner + block.out)
            a, b = torch.split_with_sizes(rows, [block.inner, block.out], dim=1)
            factors.append(form.scaled(a, b, (one, other), torch, self.coordinates))
        return factors

    def groups(self) -> list[dict[str, Any]]:
        unit, share = float(self.unit_latents), math.sqrt(self.lacking)
        return [
            {"params": [self.latents], "lr": share * max(_LATENTS / unit, _FINE)},
            {"params": [self.gains], "lr": share * self.rates.scales},
        ]

    @torch.no_grad()
    def clamp_latents(self) -> None:
        edge = float(LARGEST_INTEGER) / self.unit_latents
        self.latents.clamp_(-edge, edge)

    # --- what is written ---

    def _config(self) -> tuple[Config, Array]:
        """The Config of what is stored, and its integers."""
        coded, stored = self._coded(), self._stored()
        counts = tuple(int(stored[block.components].sum()) for block in self.blocks)
        models = tuple(map(tuple, coded.models[stored].tolist()))
        config = replace(self.source.config, counts=counts, models=models, length=0, quantizer=None)
        kept = coded.integers[np.repeat(np.repeat(stored, 2), np.diff(self.rows.bounds)[:, 0])]
        rows = starts(config, self.source.targets).rows
        return replace(config, length=len(stream.encode(kept, rows))), kept

    @torch.no_grad()
    def compact(self) -> CompactAdapter:
        config, codes = self._config()
        gains = (self.gains * self.unit_gains)[torch.from_numpy(self._stored()).to(self.gains.device)]
        tensors = {"gains": fake_quant.half(gains).cpu().numpy() + np.float32(0), "codes": codes}
        return replace(self.source, config=config, tensors=tensors)

    # --- the start ---

    @torch.no_grad()
    def warm_start_latents(self, pairs: Sequence[LoraTarget]) -> None:
        """Move latents towards the LoRA `pairs` as far as what is stored stays the same, and add the components that
        the LoRA has and the file has not."""
        device, config = self.unit_latents.device, self.source.config
        integers = torch.from_numpy(self.source.tensors["codes"].astype(np.float32))
        gains = torch.from_numpy(self.source.tensors["gains"].astype(np.float32))
        blocks = rate.blocks(self.source.targets, config.counts)
        numbers_of, rows_of, unit = self.coordinates.numbers, self.coordinates.rows, self.coordinates.unit
        units = torch.tensor([unit(block.inner) * unit(block.out) for block in blocks for _ in range(block.count)])
        scale = _Scale.of(blocks, 16 * integers - integers.sign(), gains * units)
        counts, parts, all_gains = [], [], []
        error = energy = 0.0
        for block, pair in zip(blocks, pairs, strict=True):
            own, own_gains = block.of(integers), gains[block.components]
            numbers = [16 * x - x.sign() for x in own]
            a, b = (rows_of(x, role, torch).float() for x, role in zip(numbers, "AB", strict=True))
            now = a * own_gains[:, None], b.T
            latents = [x / 16 for x in numbers]
            lost, whole = svd.distance(pair, now[0].numpy(), now[1].numpy())
            error, energy = error + lost, energy + whole
            if block.count:
                best_a, best_b = nearest_factors(pair, *now)
                best_a = best_a / (16 * torch.where(own_gains == 0, 1.0, own_gains)[:, None])
                wanted = numbers_of(best_a, "A", torch).float(), numbers_of(best_b.T / 16, "B", torch).float()
                latents = [_within_cells(x, q) for x, q in zip(wanted, own, strict=True)]
            more = max(0, min(pair.rank, *pair.target.matrix_shape) - block.count)
            new_a, new_b, new_gains = _lacking(pair, now, more, scale, self.coordinates)
            rows = torch.cat([torch.cat(latents, dim=1), torch.cat([new_a, new_b], dim=1)])
            counts.append(len(rows))
            parts.append(rows.reshape(-1))
            all_gains += [own_gains, new_gains]
        self._take(counts, torch.cat(parts).to(device), torch.cat(all_gains).to(device))
        self.lacking = min(max(error / energy if energy else 1.0, _LEAST_LACKING), 1.0)
        self.multiplier.fill_(math.log(self.lacking))

    # --- the rate ---

    def keep_within(self, budget: Budget) -> None:
        """Hold files to a budget that the present one meets: its limit, or what the present one has if that is less by
        a tenth."""
        with torch.no_grad():
            size = budget.size(self._config()[0])
        self.budget = budget if size >= _NEARLY * budget.limit else replace(budget, limit=size)
        self.least = min(_FULL * budget.limit, size)
        self.goal = self._measure() + 8 * (self.budget.limit * (1 - _ROOM) - size)

    def own_loss(self) -> Tensor | None:
        if self.budget is None:
            return None
        weight = math.exp(float(self.multiplier)) / self.goal
        with torch.no_grad():
            slopes = rate.slopes(self.rows, self._steps(), self.models).mul_(weight * self.unit_latents)
        return fake_quant.known(self.latents, (self.spent * weight).to(slopes), slopes)

    @torch.no_grad()
    def stepped(self) -> None:
        if self.budget is None:
            return
        self.multiplier += max(-_MOST, min(_MOST, _GAIN * math.log(self._measure() / self.goal)))

        def spent() -> tuple[float, float, bool]:
            bits = self._measure()
            return bits, self.goal, abs(bits / self.goal - 1) <= _TOLERANCE

        self._search(spent)

    def notes(self) -> dict[str, float]:
        if self.budget is None:
            return {}
        return {"bits": float(self.spent), "of": round(self.goal, 1), "multiplier": math.exp(float(self.multiplier))}

    @torch.no_grad()
    def settle(self) -> None:
        if self.budget is None:
            return
        budget = self.budget

        def spent() -> tuple[float, float, bool]:
            config, _ = self._config()
            size = budget.size(config)
            wanted = budget.limit * (1 - _ROOM) - size + config.length
            return 8 * config.length, max(8 * wanted, 1.0), self.least <= size <= budget.limit

        self._search(spent)
        self._measure()

    def _search(self, spent: Callable[[], tuple[float, float, bool]]) -> None:
        """Multiply all latents with the factor at which what is `spent` (bits, those that are wanted, whether that is
        fine) is fine; where there is none, with one at which less is spent."""
        latents, gains = self.latents.clone(), self.gains.clone()
        factor, below, above = 1.0, 0.0, math.inf
        for _ in range(_TRIES):
            bits, wanted, is_fine = spent()
            if is_fine:
                return
            if bits > wanted:
                above = factor
            else:
                below = factor
            # Few bits a number follow a power of the factor; many grow by one as it doubles.
            moves = (_SLOPE * math.log2(max(wanted / bits, _LEAST) if bits else 2.0), (wanted - bits) / len(latents))
            factor *= 2.0 ** min(max(moves, key=abs), 1.0)
            if not below < factor < above:
                factor = math.sqrt(below * above) if below and above < math.inf else (below * 2 or above / 2)
            if not 1 / _FARTHEST < factor < _FARTHEST:
                break
            self._scale(latents, gains, factor)
        self._scale(latents, gains, below or min(factor, 1.0))

    def _scale(self, latents: Tensor, gains: Tensor, factor: float) -> None:
        """Take `latents` times a factor, with the gains for the same update."""
        self.latents.copy_(latents * factor)
        self.gains.copy_(gains / factor**2)
        self.clamp_latents()


# --- latents of a file and of what it lacks ---------------------------------------------------------------------------


def _within_cells(x: Tensor, integers: Tensor) -> Tensor:
    """Return latents x as near as they are rounded to these `integers`; large ones where they are stored."""
    size, sign = integers.abs(), integers.sign()
    low, high = size - (1 - DEAD_ZONE) * _CELL, size + DEAD_ZONE * _CELL
    near = torch.where(
        size > 0, sign * torch.clamp(x * sign, low, high), x.clamp(-DEAD_ZONE * _CELL, DEAD_ZONE * _CELL)
    )
    return torch.where(size < _WIDE, near, integers - sign / 16)


@dataclass(frozen=True)
class _Scale:
    """How the rows of an adapter are scaled: a component of singular value s has an A row of the length ``s sqrt(ratio
    / square)`` and a B column of ``s / sqrt(square ratio)`` steps, and the gain ``square / (256 s)``."""

    square: float
    ratio: float

    @classmethod
    def of(cls, blocks: Sequence[rate.Block], numbers: Tensor, gains: Tensor) -> _Scale:
        """Return the scale in the median over components."""
        squares, ratios = [], []
        for block in blocks:
            long_a, long_b = (rows.double().norm(dim=1) for rows in block.of(numbers))
            own = gains[block.components].double().abs()
            real = (own * long_a * long_b > 0).nonzero()[:, 0]
            squares.append((256 * own**2 * long_a * long_b)[real])
            ratios.append((long_a / long_b)[real])
        square, ratio = torch.cat(squares), torch.cat(ratios)
        return cls(float(square.median()), float(ratio.median())) if len(square) else cls(0.0, 1.0)


def _lacking(
    pair: LoraTarget, now: tuple[Tensor, Tensor], more: int, scale: _Scale, coordinates: Coordinates
) -> tuple[Tensor, Tensor, Tensor]:
    """Return A rows and B columns (more, .) in steps, and gains (more,), of the largest components of a LoRA's update
    minus ``B @ A`` of `now`, as small as they have to be to round to zero; zeros where there are no more. The gains are
    those with which the first number of a side that becomes 1 is what it should be."""
    (out, inner), (a, b) = pair.target.matrix_shape, (factor.double().numpy() for factor in now)
    rows = [torch.zeros(more, inner), torch.zeros(more, out)]
    gains = torch.ones(more)
    if not more or not scale.square:
        return rows[0], rows[1], gains
    left = np.concatenate([pair.scale * pair.B.astype(np.float64), b], axis=1)
    right = np.concatenate([pair.A.astype(np.float64), -a])
    rest = LoraTarget(pair.target, _stored(right), _stored(left), 1.0)
    factors = svd.svd(rest)
    for n, s in enumerate(factors.s[:more]):
        if s <= _NOTHING * factors.s[0]:
            break
        gains[n] = scale.square / (256 * s)
        lengths = s * math.sqrt(scale.ratio / scale.square), s / math.sqrt(scale.square * scale.ratio)
        vectors = factors.Vt[n], factors.U[:, n]
        for into, length, role, vector in zip(rows, lengths, "AB", vectors, strict=True):
            vector = coordinates.numbers(vector[None], role)[0] * coordinates.unit(len(vector))
            peak = length * float(np.abs(vector).max())
            into[n] = torch.from_numpy(length * min(1.0, DEAD_ZONE * _CELL / peak) * vector)
            gains[n] *= max(1.0, 16 / 15 * peak) / coordinates.unit(len(vector))
    return rows[0], rows[1], gains


def _stored(factor: Array) -> Stored:
    return Stored("F32", np.ascontiguousarray(factor, np.float32))
