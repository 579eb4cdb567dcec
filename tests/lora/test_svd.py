"""The SVD form against dense linear algebra."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import dense, random_lora

from lrconvert.core.dtypes import Stored
from lrconvert.lora import svd
from lrconvert.lora.adapter import LoraTarget, Target


@pytest.mark.parametrize(("out", "inner", "rank"), [(24, 16, 4), (16, 40, 4), (2, 6, 4), (5, 5, 5), (7, 3, 1)])
def test_svd_is_the_dense_svd(out, inner, rank):
    pair = random_lora([(out, inner)], rank=rank).targets[0]
    factors = svd.svd(pair)
    k = len(factors.s)
    assert k == min(rank, out, inner)
    assert np.allclose(factors.U * factors.s @ factors.Vt, dense(pair), atol=1e-12 * np.linalg.norm(dense(pair)))
    assert np.allclose(factors.s, np.linalg.svd(dense(pair), compute_uv=False)[:k])
    assert np.allclose(factors.U.T @ factors.U, np.eye(k)) and np.allclose(factors.Vt @ factors.Vt.T, np.eye(k))
    assert np.allclose(svd.singular_values(pair), factors.s)


def test_gauge_does_not_matter():
    """(B G, G^-1 A) is the same adapter: the same factors, signs included."""
    pair = random_lora([(24, 16)]).targets[0]
    g = np.random.default_rng(1).standard_normal((4, 4))
    moved = LoraTarget(
        pair.target,
        Stored("F64", np.linalg.inv(g) @ pair.A.astype(np.float64)),
        Stored("F64", pair.B.astype(np.float64) @ g),
        pair.scale,
    )
    one, two = svd.svd(pair), svd.svd(moved)
    assert np.allclose(one.U, two.U, atol=1e-9) and np.allclose(one.Vt, two.Vt, atol=1e-9)


def test_balanced_factors_are_the_update():
    for pair in random_lora().targets:
        a, b = svd.balanced(svd.svd(pair))
        assert np.allclose(dense(pair), b @ a, rtol=0, atol=1e-5)
        assert np.allclose(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=0), rtol=1e-5)


def test_distance_survives_near_equality():
    """An error of 1e-9 relative is measured, not lost in a difference of large norms."""
    pair = random_lora([(24, 16)]).targets[0]
    a, b = pair.A.astype(np.float64) * pair.scale, pair.B.astype(np.float64)
    nudged = b + 1e-9 * np.random.default_rng(0).standard_normal(b.shape)
    error, energy = svd.distance(pair, a, nudged)
    truth = np.linalg.norm(dense(pair) - nudged @ a) ** 2
    assert abs(error - truth) < 1e-3 * truth
    assert np.isclose(energy, np.linalg.norm(dense(pair)) ** 2)


@pytest.mark.parametrize(("share", "rank"), [(0.5, 1), (0.9, 2), (1.0, 3)])
def test_energy_ranks(share, rank):
    assert svd.energy_ranks(np.sqrt(np.array([0.6, 0.3, 0.1])), (0.5, share)) == [1, rank]


def test_zero_update():
    pair = LoraTarget(
        Target("w.weight", (3, 4)),
        Stored("F32", np.ones((2, 4), np.float32)),
        Stored("F32", np.zeros((3, 2), np.float32)),
        1.0,
    )
    assert not svd.svd(pair).s.any()
    assert svd.energy_ranks(svd.singular_values(pair), (0.9,)) == [0]


def many() -> list[LoraTarget]:
    """Pairs of three shapes and two ranks, some with factors of zeros, of equal columns, or wider than long."""
    pairs = [pair for n in range(7) for pair in random_lora([(24, 16), (16, 40), (3, 6)], rank=4, seed=n).targets]
    pairs += random_lora([(24, 16)], rank=3).targets
    broken = {3: np.zeros((24, 4), np.float32), 6: np.ones((24, 4), np.float32), 9: np.eye(24, 4, dtype=np.float32)}
    broken[9][:, 3] = broken[9][:, 0] * np.float32(1 + 1e-7)
    for n, b in broken.items():
        pairs[n] = LoraTarget(pairs[n].target, pairs[n].a, Stored("F32", b), pairs[n].scale)
    return pairs


def test_a_target_has_the_same_bits_in_any_company():
    """The SVD of a target does not depend on those that are looked at with it."""
    pairs = many()
    seen: list[int] = []
    for numbers in svd.stacks(pairs):
        seen += numbers
        together = svd.svds([pairs[n] for n in numbers])
        for which, n in enumerate(numbers):
            alone, own = svd.svd(pairs[n]), together.of(which)
            assert all(getattr(alone, name).tobytes() == getattr(own, name).tobytes() for name in ("U", "s", "Vt"))
            assert np.allclose(own.U * own.s @ own.Vt, dense(pairs[n]), rtol=0, atol=1e-6)
        later = svd.Decomposition.of(alike := [pairs[n] for n in numbers])
        for made, own in zip(later.vectors(alike), (together.Vt, together.U.mT), strict=True):
            assert np.array_equal(made, own)
    assert sorted(seen) == list(range(len(pairs)))
    for pair, values in zip(pairs, svd.spectra(pairs), strict=True):
        assert values.tobytes() == svd.singular_values(pair).tobytes()
        assert np.allclose(values[: min(pair.target.matrix_shape)], svd.svd(pair).s, rtol=1e-6, atol=1e-6)


def test_stacks_are_bounded(monkeypatch):
    """However many targets are alike, only so many numbers are looked at together."""
    pairs = list(random_lora([(24, 16)], rank=4).targets) * 50
    monkeypatch.setattr(svd, "_AT_ONCE", 1000)
    stacks = list(svd.stacks(pairs))
    assert all(len(numbers) * 4 * (24 + 16) <= 1000 for numbers in stacks) and sum(map(len, stacks)) == 50


def test_wide_products_are_summed_in_parts():
    """Sums over more columns than one product takes are those of the whole."""
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((2, 20, 3000)), rng.standard_normal((2, 7, 3000))
    assert np.allclose(svd.products(left, right), left @ right.mT)
    pair = random_lora([(3000, 2500)], rank=20).targets[0]
    factors = svd.svd(pair)
    assert np.allclose(factors.U.T @ factors.U, np.eye(20), atol=1e-13)
    assert np.allclose(factors.Vt @ factors.Vt.T, np.eye(20), atol=1e-13)
    assert np.allclose(factors.U * factors.s @ factors.Vt, dense(pair), rtol=0, atol=1e-10)
