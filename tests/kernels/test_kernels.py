"""Compiled loops against numpy and torch, which are their oracles: equal integers and bytes, sums within a bound."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import random_lora
from hypothesis import given, settings
from hypothesis import strategies as st

from lrconvert.core.errors import LrcError
from lrconvert.kernels import jit
from lrconvert.lora.adapter import MATRIX, Target
from lrconvert.lora.coded import rans, stream
from lrconvert.lora.coded.models import COUNT
from lrconvert.methods.base import FitContext
from lrconvert.methods.lowrank import rate, rounding
from lrconvert.methods.lowrank.components import DEAD_ZONE, components

pytest.importorskip("numba", reason="numba (the extra `fast`) is absent")
pytestmark = pytest.mark.medium  # compiling takes some seconds where nothing is on disk yet


class Both:
    """Runs a function with compiled loops and without."""

    def __init__(self, monkeypatch) -> None:
        self.patch = monkeypatch.setattr

    def __call__(self, function):
        outcomes = []
        for spec in (None, True):
            self.patch(jit, "find_spec", lambda name, spec=spec: spec)
            outcomes.append(function())
        return outcomes


@pytest.fixture
def both(monkeypatch) -> Both:
    monkeypatch.setattr(jit, "_LOADING", 0.0)
    return Both(monkeypatch)


def drawn(seed: int, rows: int, length: int):
    """Integers of many sizes, outliers among them, and rows under models that suit them and that do not."""
    rng = np.random.default_rng(seed)
    models = rng.integers(0, COUNT, rows)
    off = rng.integers(-12, 12, rows)
    sizes = 2.0 ** ((models + off - 10) / 4)
    numbers = np.rint(rng.standard_t(3, (rows, length)) * sizes[:, None]).clip(-(1 << 19), 1 << 19).astype(np.int32)
    return numbers.reshape(-1), [(int(model), length) for model in models]


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (40, 300), (24, 1 << 13), (1, 3 << 17)], ids=str)
def test_coded_bytes_are_the_same(both, shape):
    """With one lane, few and many; both decoders read both."""
    numbers, rows = drawn(sum(shape), *shape)
    plain, compiled = both(lambda: stream.encode(numbers, rows))
    assert plain == compiled
    for decoded in both(lambda: stream.decode(plain, rows)):
        np.testing.assert_array_equal(decoded, numbers)


@given(st.integers(0, 99), st.integers(0, 1 << 20), st.integers(1, 255), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_broken_bytes_are_refused_with_the_same_word(seed, place, flip, cut):
    """A changed or missing byte gives the same numbers or the same error."""
    numbers, rows = drawn(seed, 6, 700)
    data = bytearray(stream.encode(numbers, rows))
    data[place % len(data)] ^= flip
    part = bytes(data[: len(data) - cut * len(data) // 4])

    def outcome():
        try:
            symbols, end = rans.decode(part, stream.runs_of(rows))
            return symbols.tolist(), end
        except LrcError as error:
            return str(error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jit, "_LOADING", 0.0)
        plain, compiled = Both(patch)(outcome)
    assert plain == compiled


@pytest.mark.parametrize("factor", [1e-3, 0.3, 1.0, 40.0])
def test_rounding_is_the_same(both, factor):
    """Models and integers are equal; bits and shares up to the order of their sums."""
    lora = random_lora(((300, 200), (64, 900)), rank=12, seed=3)
    parts = components(lora, (12, 12), FitContext(0, "cpu", lambda share, text: None, None, None))
    step = factor * parts.steps()[1] / 30
    plain, compiled = both(lambda: rounding.round_all(parts, step))
    np.testing.assert_array_equal(plain.models, compiled.models)
    np.testing.assert_allclose(plain.bits, compiled.bits, rtol=1e-12)
    np.testing.assert_allclose(plain.share, compiled.share, rtol=1e-12)


def test_rounded_integers_are_those_of_the_formula():
    """At ties, at the dead zone's edge, at zero of either sign and beyond the largest integer."""
    loops = jit.load("rounding", 1e9)
    step = 0.37
    edges = np.array([0.0, -0.0, 0.6, -0.6, 1.6, np.nextafter(1.6, 2), 31.6, 1e6, 1e9, -1e30], np.float64) * step
    rows = np.concatenate([edges, np.linspace(-3, 3, 1001)])[None].astype(np.float32)
    counts, sums = np.empty((1, 33), np.int64), np.empty((1, 4))
    limits = np.array([1 / step, 1 - DEAD_ZONE, stream.LARGEST_INTEGER], np.float32)
    codes, tallies = np.empty(rows.shape, np.int32), np.empty((4, counts.shape[1]), np.int64)
    loops.round_rows(rows, limits, counts, sums, codes, tallies)
    np.testing.assert_array_equal(codes, rounding.integers(rows, step))
    assert counts.sum() == rows.size and counts[0, 0] == (codes == 0).sum()
    np.testing.assert_allclose(sums[0, 3], (codes.astype(np.float64) ** 2).sum())


@pytest.mark.parametrize(
    "b, h, depth, beam", [(1, 2, 4, 8), (3, 5, 1, 1), (2, 16, 3, 20), (6, 100, 2, 5), (8, 256, 2, 5)]
)
def test_beam_search_is_as_good(b, h, depth, beam):
    """Nearly all codes are equal, none is worse by more than float32's rounding, or worse than the previous one."""
    import torch

    from lrconvert.methods.vblora.subvectors import beam_search

    torch.manual_seed(h)
    x, bank = torch.randn(4000, b), torch.randn(h, b)
    gains = torch.rand(4000, depth) * 0.6 ** torch.arange(depth) * (torch.rand(4000, depth) > 0.01)
    previous = torch.randint(h, (4000, depth))
    loops = jit.load("beam", 1e9)
    codes = [beam_search(x, bank, gains, previous, beam, None, given) for given in (None, loops)]
    assert float((codes[0] == codes[1]).all(1).double().mean()) > 0.999 or not bool((gains > 0).all())

    def errors(indices):
        return (x - (gains[:, :, None] * bank[indices]).sum(1)).square().sum(1)

    plain, compiled, before = (errors(indices) for indices in (*codes, previous))
    assert float(((compiled - plain).abs() / x.square().sum(1).clamp(min=1)).max()) < 1e-4
    assert bool((compiled <= before + 1e-5).all())


def test_latents_in_training_are_rounded_counted_and_priced_the_same(both):
    """Integers, models, bits and rows that hold something are equal; slopes agree to the last places of float32."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    targets = [
        Target(f"t{n}.weight", (out, inner), MATRIX) for n, (out, inner) in enumerate([(48, 48), (30, 70), (48, 48)])
    ]
    blocks = rate.blocks(targets, (3, 0, 5))
    rows = rate.Rows.of(blocks)
    sizes = np.repeat(2.0 ** rng.uniform(-4, 9, len(rows.bounds)), np.diff(rows.bounds)[:, 0])
    latents = (rng.standard_normal(blocks[-1].stop) * sizes).astype(np.float32)
    latents[rows.bounds[2, 0] : rows.bounds[2, 1]] = 0.1  # a row that rounds to nothing
    latents[:8] = [0.0, -0.0, 0.6, -0.6, 1.1, -1.6, 1e9, -1e9]
    plain, compiled = both(lambda: rate.coded(rows, latents))
    for one, other in zip(vars(plain).values(), vars(compiled).values(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert not plain.nonzero[1, 0] and plain.nonzero[0].all()
    models = torch.from_numpy(plain.models)
    slopes, others = both(lambda: rate.slopes(rows, torch.from_numpy(latents), models))
    torch.testing.assert_close(slopes, others, rtol=1e-5, atol=1e-6)
