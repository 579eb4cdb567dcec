"""A joint basis for the LoRAs of one base, at its best: what `sharing.py` compares with adapters that share nothing.

For each target, "Compress then Serve" (arXiv 2407.00066) fits bases U (out, k) and V (k, in) to the updates of all
members, and keeps of each adapter the core ``U^T dW V^T``. Here the bases are orthonormal and found by alternating
truncated SVDs of stacked factors. An adapter is coded as `lowrank` codes it, scaled singular vectors rounded with one
step under the models of the format; its rows are those of the core, or coordinates in a basis *and* what lies outside
of it, each under a model of its own. The first is the paper's form with a coder that it does not have; the second can
never lose more than some bits a component.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from lrconvert.core.dtypes import Stored
from lrconvert.lora.adapter import LoraAdapter, LoraTarget, Target
from lrconvert.lora.coded.choice import best_models
from lrconvert.lora.packing import coded_values
from lrconvert.methods.lowrank.rounding import SIDE_BITS, integers

STEPS = 2.0 ** np.arange(3.75, -1.0, -0.25)  # tried, in root mean squares of all numbers
_MODEL_BITS = 6  # of one more row of a component
_ROUNDS = 3  # of alternating SVDs
_NOTHING = 1e-12  # of the largest square: what is smaller is rounding


@dataclass(frozen=True, eq=False)
class Member:
    """The SVD of every target: U (out, r), s (r,), V (in, r)."""

    factors: tuple[tuple[np.ndarray, np.ndarray, np.ndarray], ...]
    half_bytes: int  # of the LoRA's factors at 16 bit

    @classmethod
    def of(cls, lora: LoraAdapter, layers: Sequence[int] = ()) -> Member:
        """Return a LoRA as a member; with `layers`, of these alone."""
        chosen = [p for p in lora.targets if not layers or any(f".{layer}." in p.target.name for layer in layers)]
        factors = tuple(
            _decomposed(pair.B.astype(np.float64) * pair.scale, pair.A.astype(np.float64)) for pair in chosen
        )
        return cls(factors, sum(2 * len(s) * (len(u) + len(v)) for u, s, v in factors))

    @cached_property
    def energy(self) -> float:
        """The squared norm of the update."""
        return sum(float((s**2).sum()) for _, s, _ in self.factors)


def _decomposed(b: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The SVD of ``b @ a``."""
    left, small = np.linalg.qr(b)
    right, other = np.linalg.qr(a.T)
    u, s, v = np.linalg.svd(small @ other.T)
    return left @ u, s, right @ v.T


def difference(one: Member, other: LoraAdapter) -> Member:
    """Return what a member differs from another LoRA, as a member of the same size."""
    factors = []
    for (u, s, v), pair in zip(one.factors, other.targets, strict=True):
        b = np.concatenate([u * s, -pair.scale * pair.B.astype(np.float64)], axis=1)
        factors.append(_decomposed(b, np.concatenate([v.T, pair.A.astype(np.float64)])))
    return Member(tuple(factors), one.half_bytes)


@dataclass(frozen=True, eq=False)
class Basis:
    """Orthonormal rows for the two sides of each target: V (k, in) and U (k, out), k may be 0. `whole`: what lies
    outside is stored, too."""

    sides: tuple[tuple[np.ndarray, np.ndarray], ...]
    whole: bool

    @property
    def nbytes(self) -> int:
        """Bytes at 16 bit: what a fleet stores once."""
        return sum(2 * side.size for sides in self.sides for side in sides)


def joint(members: Sequence[Member], k: int) -> Basis:
    """Return the bases of "Compress then Serve": k directions on each side, members weighing the same."""
    sides = []
    for target in zip(*(member.factors for member in members), strict=True):
        scaled = [(u, s / np.sqrt((s**2).sum()), v) for u, s, v in target]
        right = _top([(v * s).T for _, s, v in scaled], k)
        left = _top([(u * s).T for u, s, _ in scaled], k)
        for _ in range(_ROUNDS):
            left = _top([np.linalg.qr(right @ (v * s))[1] @ u.T for u, s, v in scaled], k)
            right = _top([np.linalg.qr(left @ (u * s))[1] @ v.T for u, s, v in scaled], k)
        sides.append((right, left))
    return Basis(tuple(sides), whole=False)


def common(members: Sequence[Member], k_in: int, k_out: int) -> Basis:
    """Return the directions that the rows of A (k_in) and the columns of B (k_out) of most members span, large or
    small: where trainings began at the same A, these are its rows. What lies outside is stored."""
    sides = []
    for target in zip(*(member.factors for member in members), strict=True):
        sides.append((_top([v.T for _, _, v in target], k_in), _top([u.T for u, _, _ in target], k_out)))
    return Basis(tuple(sides), whole=True)


def _top(rows: Sequence[np.ndarray], k: int) -> np.ndarray:
    """The first k right singular vectors (k, n) of rows one below the other, fewer than n; as many as there are."""
    stacked = np.concatenate(rows)
    squares, vectors = np.linalg.eigh(stacked @ stacked.T)
    kept = squares > _NOTHING * squares[-1]
    directions = vectors[:, kept][:, ::-1][:, :k].T @ stacked
    return np.asarray(np.linalg.qr(directions.T)[0].T)


@dataclass(frozen=True, eq=False)
class Coded:
    """A member on a basis: of each target the energy of its components, and the rows of each side in parts, each of
    which has a model."""

    targets: tuple[tuple[np.ndarray, tuple[list[np.ndarray], list[np.ndarray]]], ...]
    energy: float

    @classmethod
    def of(cls, member: Member, basis: Basis | None) -> Coded:
        targets = []
        for n, (u, s, v) in enumerate(member.factors):
            bases = basis.sides[n] if basis is not None else (None, None)
            if basis is not None and not basis.whole:  # the core has singular vectors of its own
                a, d, b = np.linalg.svd((bases[0] @ v) * s @ (bases[1] @ u).T, full_matrices=False)
                rank = len(s)
                parts = ([(a * d).T[:rank]], [b[:rank] * d[:rank, None]])
                targets.append((d[:rank] ** 2, _single(parts)))
                continue
            sides = []
            for vectors, own in zip((v, u), bases, strict=True):
                rows = (vectors * s).T
                if own is None or not len(own):
                    sides.append([rows])
                else:
                    core = rows @ own.T
                    sides.append([core, rows - core @ own])
            targets.append((s**2, _single((sides[0], sides[1]))))
        return cls(tuple(targets), member.energy)

    def at(self, step: float) -> tuple[np.ndarray, np.ndarray]:
        """Return what each component keeps, as energy, and its bits."""
        kept, bits = [], []
        for energy, sides in self.targets:
            share, cost = np.ones(len(energy)), np.full(len(energy), float(SIDE_BITS))
            for parts in sides:
                dots = values = rows = np.zeros(len(energy))
                for number, part in enumerate(parts):
                    codes = integers(part, step)
                    value = coded_values(codes)
                    dots = dots + np.einsum("nd,nd->n", value, part, dtype=np.float64)
                    values = values + np.einsum("nd,nd->n", value, value, dtype=np.float64)
                    rows = rows + np.einsum("nd,nd->n", part, part, dtype=np.float64)
                    cost += best_models(codes)[1] + (_MODEL_BITS if number else 0)
                share *= np.divide(dots**2, values * rows, out=np.zeros_like(dots), where=values * rows > 0)
            kept.append(energy * share)
            bits.append(cost)
        return np.concatenate(kept), np.concatenate(bits)

    def best(self, limits: Sequence[float]) -> list[tuple[float, float, np.ndarray]]:
        """Return for each limit in bytes the share that is captured, the step, and the components (numbers) that are
        stored."""
        size = np.sqrt(self.energy / sum(part.size for _, sides in self.targets for parts in sides for part in parts))
        best = [(0.0, 0.0, np.zeros(0, np.int64))] * len(limits)
        for step in size * STEPS:
            kept, bits = self.at(float(step))
            order = np.argsort(-kept / bits, kind="stable")
            captured, spent = np.cumsum(kept[order]) / self.energy, np.cumsum(bits[order]) / 8
            for n, limit in enumerate(limits):
                count = int(np.searchsorted(spent, limit, side="right"))
                if count and captured[count - 1] > best[n][0]:
                    best[n] = float(captured[count - 1]), float(step), order[:count]
        return best


def _single(sides: tuple[list[np.ndarray], list[np.ndarray]]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    a, b = ([part.astype(np.float32) for part in parts] for parts in sides)
    return a, b


def rebuilt(lora: LoraAdapter, member: Member, basis: Basis | None, limit: float) -> tuple[float, LoraAdapter]:
    """Return what is captured within a limit in bytes, and the LoRA that a server would have, gains solved by least
    squares; for a basis with what lies outside, or none."""
    coded = Coded.of(member, basis)
    ((_, step, stored),) = coded.best([limit])
    pairs, first, kept = [], 0, 0.0
    for n, (pair, (u, s, v), (energy, sides)) in enumerate(
        zip(lora.targets, member.factors, coded.targets, strict=True)
    ):
        rows = np.sort(stored[(stored >= first) & (stored < first + len(energy))]) - first
        first += len(energy)
        a, b = (
            _values(parts, rows, step, None if basis is None else basis.sides[n][m]) for m, parts in enumerate(sides)
        )
        gram = (a @ a.T) * (b @ b.T)
        right = ((a @ v) * s * (b @ u)).sum(axis=1)
        gains = np.linalg.lstsq(gram, right, rcond=1e-9)[0] if len(rows) else np.zeros(0)
        kept += float(gains @ right)
        if not len(rows):  # a target must have a rank
            a, b, gains = np.zeros((1, len(v))), np.zeros((1, len(u))), np.ones(1)
        left, right = (Stored("F32", np.ascontiguousarray(x, np.float32)) for x in (a * gains[:, None], b.T))
        pairs.append(LoraTarget(pair.target, left, right, 1.0))
    return kept / coded.energy, replace(lora, targets=tuple(pairs))


def _values(parts: Sequence[np.ndarray], rows: np.ndarray, step: float, basis: np.ndarray | None) -> np.ndarray:
    """The rounded rows (n, length) of a side."""
    numbers = [coded_values(integers(part[rows], step)).astype(np.float64) for part in parts]
    return numbers[0] if basis is None or len(numbers) == 1 else numbers[1] + numbers[0] @ basis


def widened(lora: LoraAdapter, basis: Basis) -> LoraAdapter:
    """Return a LoRA whose inputs are, for each target, coordinates in the basis and what lies outside of it: k numbers
    more, for any form to code. `narrowed` takes its factors back."""
    pairs = []
    for pair, (own, _) in zip(lora.targets, basis.sides, strict=True):
        a, (out, inner) = pair.A.astype(np.float64), pair.target.matrix_shape
        core = a @ own.T
        stored = Stored("F32", np.concatenate([core, a - core @ own], axis=1).astype(np.float32))
        target = Target(pair.target.name, (out, len(own) + inner))
        pairs.append(LoraTarget(target, stored, pair.b, pair.scale))
    return replace(lora, targets=tuple(pairs))


def narrowed(a: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Return the A (r, in) of a widened one (r, k + in)."""
    return np.asarray(a[:, len(basis) :] + a[:, : len(basis)] @ basis, np.float32)


def full_core(member: Member, basis: Basis) -> float:
    """Return what a whole core at 16 bit captures, its rounding not counted: k * k numbers a target."""
    cores = (
        (right @ v) * s @ (left @ u).T for (u, s, v), (right, left) in zip(member.factors, basis.sides, strict=True)
    )
    return sum(float((core**2).sum()) for core in cores) / member.energy


def cosine(one: Member, other: Member) -> float:
    """Return the cosine of the angle between two updates."""
    dots = (
        float(np.sum((u.T @ x) * (v.T @ z) * s[:, None] * y))
        for (u, s, v), (x, y, z) in zip(one.factors, other.factors, strict=True)
    )
    return sum(dots) / np.sqrt(one.energy * other.energy)


def inside(one: Member, other: Member) -> tuple[float, float, float, float]:
    """Return the share of one update that lies in the input space of the other, what chance gives, and both of the
    output space."""
    shares = np.zeros(4)
    for (u, s, v), (x, _, z) in zip(one.factors, other.factors, strict=True):
        energy, rank = float((s**2).sum()), len(z.T)
        own = [float((((mine * s).T @ theirs) ** 2).sum()) for mine, theirs in ((v, z), (u, x))]
        shares += [own[0], energy * rank / len(v), own[1], energy * rank / len(u)]
    a, b, c, d = (shares / one.energy).tolist()
    return a, b, c, d
