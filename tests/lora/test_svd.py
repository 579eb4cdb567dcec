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
def test_energy_rank(share, rank):
    assert svd.energy_rank(np.sqrt(np.array([0.6, 0.3, 0.1])), share) == rank


def test_zero_update():
    pair = LoraTarget(
        Target("w.weight", (3, 4)),
        Stored("F32", np.ones((2, 4), np.float32)),
        Stored("F32", np.zeros((3, 2), np.float32)),
        1.0,
    )
    assert not svd.svd(pair).s.any()
    assert svd.energy_rank(svd.singular_values(pair), 0.9) == 0
