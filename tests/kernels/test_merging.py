"""The compiled loops of a merge against numpy: equal bits, counts, undo codes and errors, whatever the inputs are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrconvert.core.dtypes import Array, decode, round_to
from lrconvert.core.errors import LrcError
from lrconvert.kernels import jit
from lrconvert.merge.arithmetic.exact import Term, Update
from lrconvert.merge.arithmetic.filter import FilterBlock
from lrconvert.merge.arithmetic.workspace import Workspace, loops_for
from lrconvert.merge.undo import residual

pytest.importorskip("numba", reason="numba (the extra `fast`) is absent")
pytestmark = pytest.mark.medium  # compiling takes some seconds where nothing is on disk yet
LOOPS = jit.load("merging", 1e9)

# Weights of usual size; any bits, NaN and infinity among them; the ends of the range; powers of two and zeros.
KINDS = ("usual", "bits", "subnormal", "huge", "powers")
# Usual; of a few bits, so that there are ties; tiny; terms that cancel; zero rows and columns.
UPDATES = ("usual", "ties", "tiny", "cancels", "dead")


def weights(kind: str, shape: tuple[int, int], rng: np.random.Generator) -> Array:
    signs = rng.integers(0, 2, shape).astype(np.uint16) << 15
    if kind == "bits":
        return rng.integers(0, 1 << 16, shape).astype(np.uint16)
    if kind == "subnormal":
        return rng.integers(0, 0x100, shape).astype(np.uint16) | signs
    if kind == "huge":
        return rng.integers(0x7F00, 0x7F80, shape).astype(np.uint16) | signs
    if kind == "powers":
        exponents = rng.integers(120, 130, shape) * (rng.random(shape) > 0.2)
        return (exponents << 7).astype(np.uint16) | signs
    return round_to(rng.standard_normal(shape) * 0.02, "BF16")


def update(kind: str, shape: tuple[int, int], rng: np.random.Generator) -> Update:
    left, right = rng.standard_normal((shape[0], 3)) * 0.05, rng.standard_normal((3, shape[1])) * 0.02
    if kind == "ties":
        left, right = (np.ldexp(rng.integers(-2, 3, side.shape), -5).astype(np.float64) for side in (left, right))
    if kind == "tiny":
        left = left * 1e-12
    terms = [Term(2.0, left, right)]
    if kind == "cancels":
        rest = right * (rng.random(right.shape) < 0.5)
        terms.append(Term(-2.0, left * (1 + 2.0**-50 * rng.integers(0, 2, left.shape)), rest))
    if kind == "dead":
        left[rng.random(shape[0]) < 0.5] = 0
        right[:, : shape[1] // 2] = 0
    return Update(terms)


@given(st.sampled_from(KINDS), st.sampled_from(UPDATES), st.integers(0, 999), st.booleans())
@settings(max_examples=60, deadline=None)
def test_merged_weights_predictions_and_counts_are_the_same(kind, way, seed, measure):
    """Also where a base is NaN or infinite, or a result beyond the range: the same elements are refused."""
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 40)), int(rng.choice([1, 7, 500, 2048, 4100])))
    stored, added = weights(kind, shape, rng), update(way, shape, rng)

    def outcome(loops):
        with Workspace(1, loops=loops) as workspace:
            try:
                if not measure:
                    return added.add(stored, "BF16", workspace=workspace, measure=False)
                return added.add_and_predict(stored, "BF16", workspace=workspace)
            except LrcError as error:
                return str(error)

    plain, compiled = outcome(None), outcome(LOOPS)
    if isinstance(plain, str) or isinstance(compiled, str):
        assert plain == compiled
        return
    for one, other in zip(plain[:-1], compiled[:-1], strict=True):
        np.testing.assert_array_equal(one, other)
    one, other = plain[-1], compiled[-1]
    for name in ("elements", "changed", "unmoved", "max_error", "recomputed", "rational"):
        assert getattr(one, name) == getattr(other, name), name
    assert other.sum_error == pytest.approx(one.sum_error, rel=1e-4)


def test_the_loops_are_taken_where_they_suit():
    """Whole rows of bfloat16 that can be written to: others are computed by numpy."""
    rows = np.zeros((4, 8), np.uint16)
    left, right = np.ones((4, 1)), np.ones((1, 8))
    calls = []

    class Counted:
        @staticmethod
        def add(*arguments):
            calls.append(arguments)
            return LOOPS.add(*arguments)

    with Workspace(1, loops=Counted) as workspace:
        for stored, dtype in ((rows, "BF16"), (rows.view("<f2"), "F16"), (rows[:, ::2], "BF16")):
            Update([Term(1.0, left, right[:, : stored.shape[1]])]).add(stored, dtype, workspace=workspace)
    assert len(calls) == 1
    assert not FilterBlock(left, right, "BF16", np.frombuffer(rows.tobytes(), "<u2").reshape(4, 8), rows).suits_loops


@given(st.sampled_from(("<u2", "<f2")), st.integers(0, 5000), st.integers(0, 999), st.sampled_from((0.0, 0.02, 0.2)))
@settings(max_examples=80, deadline=None)
def test_undo_codes_are_the_same(kind, size, seed, strange):
    """Steps of one, long ones, none, with few exceptions and with too many; both decoders read both."""
    rng = np.random.default_rng(seed)
    merged = rng.integers(0x3C00, 0x4000, size).astype(np.uint16)
    predicted = (merged - rng.integers(0, 0x200, size) * (rng.random(size) < 0.3)).astype(np.uint16)
    lower = (predicted & 0x7C00) < (merged & 0x7C00)
    moves = rng.choice([0, 1, -1, 2, 500, 30000], size) * (lower | (rng.random(size) < strange))
    base = (predicted + moves).astype(np.uint16)
    sides = [side.view(kind) for side in (base, predicted, merged)]
    plain, compiled = (residual.encode(*sides, loops) for loops in (None, LOOPS))
    assert plain == compiled
    for loops in (None, LOOPS):
        restored = residual.decode(*plain, sides[1].copy(), sides[2], loops)
        np.testing.assert_array_equal(restored.view("<u2"), base)


@given(st.integers(0, 99), st.integers(0, 1 << 16), st.integers(1, 255))
@settings(max_examples=60, deadline=None)
def test_broken_codes_are_refused_with_the_same_word(seed, place, flip):
    """A changed byte gives the same weights or the same error."""
    rng = np.random.default_rng(seed)
    merged = round_to(rng.standard_normal(3000), "BF16")
    guess = round_to(decode(merged, "BF16").astype(np.float64) * rng.uniform(0.7, 1.0, 3000), "BF16")
    base = (guess + rng.integers(0, 2, 3000) * (rng.random(3000) < 0.05)).astype(np.uint16)
    data, mode = residual.encode(base, guess, merged)
    broken = bytearray(data)
    broken[place % len(broken)] ^= flip

    def outcome(loops):
        try:
            return residual.decode(bytes(broken), mode, guess.copy(), merged, loops).tolist()
        except LrcError as error:
            return str(error)

    assert outcome(None) == outcome(LOOPS)


def test_a_small_merge_loads_no_loops():
    """What is saved has to pay for loading them; a verification saves least."""
    assert loops_for("merge with a record", 10**7) is None
    assert loops_for("merge with a record", 10**9) is not None and loops_for("verify", 10**8) is None
