"""Second moments as a metric: sketches stay below what they sketch, weighted decompositions are optimal."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import dense, random_lora
from hypothesis import given, settings
from hypothesis import strategies as st

from lrconvert import api
from lrconvert.core.errors import StatisticsError
from lrconvert.lora import packing, svd
from lrconvert.lora.adapter import Target, View
from lrconvert.lora.input_statistics import Input, InputStatistics, Moment
from lrconvert.lora.svd import Factors
from lrconvert.methods import base as methods
from lrconvert.methods.base import FitContext


def anisotropic(n: int, seed: int = 0, decay: float = 0.7) -> np.ndarray:
    """A second moment whose directions differ by orders of magnitude, float32."""
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    return ((q * np.maximum(decay ** np.arange(n), 1e-6)) @ q.T).astype(np.float32)


def exact(n: int, seed: int = 0) -> Moment:
    matrix = anisotropic(n, seed)
    return Moment(1000, matrix=(matrix + matrix.T) / 2)


def sketched(n: int, rank: int, seed: int = 0) -> tuple[Moment, np.ndarray]:
    """A sketch as rows and diagonal, and the dense matrix that it stands for."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((rank, n)).astype(np.float32)
    squares = (rows * rows).sum(0) + rng.random(n).astype(np.float32)
    moment = Moment(7, diagonal=squares, rows=rows)
    return moment, rows.T.astype(float) @ rows + np.diag(moment.rest)


def statistics_for(lora, moments=None) -> InputStatistics:
    """Every target its own input."""
    targets = lora.shapes()
    all_moments = moments or [exact(t.in_features, n) for n, t in enumerate(targets)]
    inputs = tuple(Input((t.name,), None, t.in_features, 1000) for t in targets)
    return InputStatistics(inputs, all_moments.__getitem__, data="0" * 64, tokens=1000)


def forms() -> list[tuple[Moment, np.ndarray]]:
    moment, matrix = sketched(12, 3)
    plain = exact(12)
    squares = np.arange(12, dtype=np.float32)
    return [
        (moment, matrix),
        (plain, plain.matrix.astype(float)),
        (Moment(3, diagonal=squares), np.diag(squares).astype(float)),
    ]


@pytest.mark.parametrize("which", range(3))
def test_products(which):
    moment, matrix = forms()[which]
    x = np.random.default_rng(1).standard_normal((5, 12))
    assert np.allclose(moment.times(x), x @ matrix, rtol=1e-6, atol=1e-6)
    assert np.allclose(moment.gram(x), x @ matrix @ x.T, rtol=1e-6, atol=1e-6)
    assert np.allclose(moment.squares, matrix.diagonal(), rtol=1e-6) and moment.width == 12
    assert np.allclose(moment.scaled(3.0).times(x), 3 * x @ matrix, rtol=1e-5, atol=1e-5)
    more = matrix + matrix.diagonal().mean() * np.eye(12)
    assert np.allclose(moment.damped().times(x), x @ more, rtol=1e-5, atol=1e-5)


def test_nothing_seen_damps_to_the_identity():
    assert np.array_equal(Moment(0, diagonal=np.zeros(4, np.float32)).damped().squares, np.ones(4, np.float32))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(2, 14), st.integers(2, 14), st.integers(0, 99))
def test_weighted_svd_is_the_best_cut(rank, out, inner, seed):
    """U diag(s) Vt is the update, Vt is orthonormal in the metric, and a cut has the error of the values cut off."""
    rng = np.random.default_rng(seed)
    lora = random_lora([(out, inner)], rank=min(rank, out, inner), seed=seed)
    pair, moment = lora.targets[0], exact(inner, seed).damped()
    whole: Factors = svd.svd(pair, moment)
    size = np.abs(dense(pair)).max() + 1e-30
    assert np.allclose(whole.U * whole.s @ whole.Vt, dense(pair), atol=1e-6 * size)
    assert np.allclose(moment.gram(whole.Vt), np.eye(len(whole.s)), atol=1e-4)
    assert np.allclose(whole.s, svd.singular_values(pair, moment), rtol=1e-6, atol=1e-9 * size)
    root = np.linalg.cholesky(moment.matrix.astype(float))
    truth = np.linalg.svd(dense(pair) @ root, compute_uv=False)[: len(whole.s)]
    assert np.allclose(whole.s, truth, rtol=1e-4, atol=1e-6 * truth.max())
    for k in range(len(whole.s) + 1):
        a, b = svd.balanced(whole, k)
        error, energy = svd.distance(pair, a, b, moment)
        assert error == pytest.approx(float(np.sum(whole.s[k:] ** 2)), rel=1e-4, abs=1e-9 * energy)
        other = rng.standard_normal(b.shape) * 0.01 + b
        assert svd.distance(pair, a, other, moment)[0] >= error * (1 - 1e-9) - 1e-12 * energy


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 99), st.floats(1e-9, 1))
def test_distance_is_the_dense_truth(seed, far):
    rng = np.random.default_rng(seed)
    pair, moment = random_lora([(9, 12)], rank=3, seed=seed).targets[0], exact(12, seed)
    a = pair.A + far * rng.standard_normal((3, 12))
    b = pair.scale * pair.B
    gap = dense(pair) - b.astype(float) @ a
    matrix = moment.matrix.astype(float)
    error, energy = svd.distance(pair, a, b, moment)
    assert error == pytest.approx(float(np.sum((gap @ matrix) * gap)), rel=1e-4, abs=1e-12 * energy)
    assert energy == pytest.approx(float(np.sum((dense(pair) @ matrix) * dense(pair))), rel=1e-6)


def test_scales_see_weights():
    """The scale of each width is the best one by the weights: none of a fine grid around it is better."""
    rng = np.random.default_rng(0)
    rows, weights = rng.standard_normal((6, 40)), rng.random((6, 40)) ** 4 + 1e-3
    for bits in packing.CODE_BITS:
        codes, scales = packing.quantize_rows(rows, bits, weights)
        values = packing.code_values(codes, bits) * scales[:, None]
        error = (weights * (rows - values) ** 2).sum(1)
        for factor in (0.98, 1.02):
            other = packing.code_values(codes, bits) * (scales * factor)[:, None]
            assert ((weights * (rows - other) ** 2).sum(1) >= error * (1 - 1e-3)).all()
        plain, plain_scales = packing.quantize_rows(rows, bits)
        unweighted = packing.code_values(plain, bits) * plain_scales[:, None]
        assert error.sum() <= (weights * (rows - unweighted) ** 2).sum() * 1.02


METHODS = [m.id for m in methods.all_methods()]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.medium
def test_fits_use_the_metric(method):
    """With statistics, fits of the same size have less error in their metric than those without. Of two LoRAs in all:
    low rank rounds with one step in the plain norm, and at a single size may lose a percent by that."""
    errors = {False: 0.0, True: 0.0}
    for seed in (1, 3):
        lora = random_lora([(256, 192), (192, 256), (160, 192)], rank=8, seed=seed)
        statistics = statistics_for(lora)
        context = methods.FitContext(statistics=statistics)
        for used in (None, statistics):
            done = api.convert(lora, method, target_ratio=8, statistics=used)
            ours = {t.name: (a, b) for t, a, b in methods.expand_all(done.compact)}
            distances = (svd.distance(p, *ours[p.target.name], context.metric(p)) for p in lora.targets)
            errors[used is not None] += sum(error for error, _ in distances)
            assert (done.fidelity.output_captured is None) == (used is None)
    assert errors[True] < errors[False]


def test_look_up():
    lora = random_lora([(8, 6)], rank=2)
    target = lora.targets[0].target
    moment = Moment(5, diagonal=np.arange(6, dtype=np.float32))
    several = [moment, replace(moment, tokens=15, diagonal=np.full(6, 4, np.float32))]
    inputs = (Input(("model.x.experts.up",), 0, 6, 5), Input(("model.x.experts.up",), 2, 6, 15))
    experts = InputStatistics(inputs, several.__getitem__)
    stack = Target("x.experts.up", (3, 8, 6), View("expert:2"))
    assert experts.of(stack) is several[1]
    unseen = experts.of(replace(stack, view=View("expert:1")))  # no token came here: as its siblings
    assert unseen.tokens == 0 and np.allclose(unseen.squares, (moment.squares * 5 + 4 * 15) / 20)
    assert experts.of(target) is None and experts.unknown([stack, target]) == (target.name,)
    assert experts.unknown([stack]) == ()
    with pytest.raises(StatisticsError, match=rf"no input of '{target.name}', nor of any other.*own base"):
        experts.unknown([target])
    wrong = InputStatistics(
        (Input((f"model.{target.name}",), None, 7, 1),), [Moment(1, diagonal=np.ones(7, "f4"))].__getitem__
    )
    with pytest.raises(StatisticsError, match="has 7 numbers in the statistics, 6 in the adapter"):
        wrong.of(target)
    turned = Target("a.weight", (6, 8), View("transposed"))
    ours = InputStatistics(
        (Input(("base.a.weight",), None, 6, 5),), [replace(moment, diagonal=np.ones(6, "f4"))].__getitem__
    )
    assert ours.of(turned).width == 6


def test_targets_that_were_not_measured_are_fitted_plainly():
    """Statistics of some targets: the others are told by name, fitted in the plain norm, and no output is claimed for
    them. Statistics of none are refused."""
    lora = random_lora([(24, 16), (16, 24), (20, 20)], rank=4)
    whole = statistics_for(lora)
    some = replace(whole, inputs=whole.inputs[:2])
    done = api.convert(lora, "lowrank", bits=3, statistics=some)
    (warning,) = (line for line in done.warnings if "statistics" in line)
    last = lora.targets[2]
    assert "1 of 3 targets" in warning and repr(last.target.name) in warning and "plain norm" in warning
    rows = done.fidelity.targets
    assert [row.output_energy is None for row in rows] == [False, False, True] and rows[2].fit_energy
    x = np.eye(last.target.in_features)
    metric = FitContext(statistics=some).metric(last).times(x)
    assert np.allclose(metric, metric[0, 0] * x)  # the plain norm, but for one weight
    assert not any("statistics" in line for line in api.convert(lora, "lowrank", bits=3, statistics=whole).warnings)
    other = replace(whole, inputs=(replace(whole.inputs[0], names=("elsewhere.weight",)),))
    with pytest.raises(StatisticsError, match="nor of any other target"):
        api.convert(lora, "lowrank", bits=3, statistics=other)
