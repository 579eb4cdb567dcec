"""NOLA: its transform against the matrix that the page writes out, its fit against what it promises, its file rules.

What every method must obey (round trips, determinism, numpy against torch, budgets) is in test_laws.py.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import random_lora
from fits import RNG, captured, convert, kept_by, payload_budget, random_compact
from hypothesis import given, settings
from hypothesis import strategies as st

from lrconvert.core import errors
from lrconvert.core.dtypes import Stored
from lrconvert.lora import packing, prng, svd
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter, LoraTarget, Target
from lrconvert.lora.input_statistics import InputStatistics, Moment
from lrconvert.lora.prng import hadamard
from lrconvert.methods import base as methods
from lrconvert.methods.base import FitContext
from lrconvert.methods.nola import METHOD
from lrconvert.methods.nola.basis import DENSE, HADAMARD, Basis
from lrconvert.methods.nola.fit import quantize
from lrconvert.methods.nola.form import Config, Form, complete
from lrconvert.methods.nola.plan import NolaOptions

LENGTHS = [1, 2, 3, 5, 8, 12, 43 * 8, 127 * 2, 129, 131 * 4, 5003, 4096]


# --- the transform --------------------------------------------------------------------------------------------------


def written_out(d: int) -> np.ndarray:
    """T(d) of formats/methods/nola.md, element by element."""

    def sylvester(a: int) -> np.ndarray:
        x = np.arange(1 << a)
        return 1 - 2 * (np.bitwise_count(x[:, None] & x) & 1).astype(np.int64)

    a = (d & -d).bit_length() - 1
    m = d >> a
    if m <= 127:
        odd = m * np.eye(m, dtype=np.int64) - 2 if m > 1 else np.ones((1, 1), np.int64)
        return np.kron(sylvester(a), odd)
    matrix = np.zeros((d, d), np.int64)
    powers = [p for p in range(d.bit_length() - 1, -1, -1) if d >> p & 1]
    at = 0
    for p in powers:
        matrix[at : at + (1 << p), at : at + (1 << p)] = sylvester(p) << (powers[0] - p) // 2
        at += 1 << p
    return matrix


@pytest.mark.parametrize("d", [n for n in LENGTHS if n <= 600])
def test_the_transform_is_the_written_matrix(d):
    matrix = hadamard.transform(np.eye(d), np)
    assert np.array_equal(matrix, written_out(d)) and np.array_equal(matrix, matrix.T)
    assert np.array_equal(matrix @ matrix, np.diag(np.broadcast_to(hadamard.squares(d), d)))
    assert np.abs(matrix).max() <= Basis(HADAMARD, "sign", 0, "A", d, 1).largest


@pytest.mark.parametrize("d", LENGTHS)
def test_the_transform_is_exact_and_its_own_adjoint(d):
    rng = RNG(d)
    x, y = rng.integers(-65535, 65536, (2, d)).astype(np.float64)
    one, two = hadamard.transform(np.stack([x, y]), np)
    assert np.array_equal(one, hadamard.transform(x[None], np)[0])
    assert np.array_equal(one, hadamard.transform(torch.from_numpy(x)[None], torch)[0].numpy())
    whole = [[int(n) for n in row] for row in (one, y, x, two)]
    assert sum(p * q for p, q in zip(*whole[:2], strict=True)) == sum(p * q for p, q in zip(*whole[2:], strict=True))
    assert np.abs(one).max() <= hadamard.growth(d) * np.abs(x).sum() * 2**20


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.data())
def test_the_order_is_a_nested_sample(d, data):
    count = data.draw(st.integers(0, d))
    stream = prng.Stream(data.draw(st.integers(0, 2**64 - 1)), "order")
    everything = hadamard.order(stream, d, d)
    assert np.array_equal(np.sort(everything), np.arange(d))
    assert np.array_equal(hadamard.order(stream, d, count), everything[:count])


def test_the_order_is_the_written_formula():
    for d in (1, 2, 3, 700, 4096):
        w = prng.words(prng.Stream(7, "x"), (0,), 0, 8)[0].tolist()
        b = (d - 1).bit_length()
        rows = []
        for start in range(1 << b):
            x = start
            for j in range(4):
                x = (x * (2 * w[2 * j] + 1) + w[2 * j + 1]) % (1 << b)
                x ^= x >> (b + 1) // 2
            if x < d:
                rows.append(x)
        assert hadamard.order(prng.Stream(7, "x"), d, d).tolist() == rows


def test_the_order_mixes():
    """Neighbours in the sequence are not neighbours in the order, nor a constant step apart."""
    order = hadamard.order(prng.Stream(3, "x"), 1 << 16, 2048)
    steps = np.diff(order) % (1 << 16)
    assert len(np.unique(steps)) > 1900
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.1
    assert np.all(np.abs(np.bincount(order >> 12, minlength=16) - 128) < 60)


def test_lengths_out_of_reach_are_refused():
    for d in (0, -1, (1 << 40) + 1):
        with pytest.raises(errors.LimitError):
            hadamard.blocks(d)


# --- bases ----------------------------------------------------------------------------------------------------------


def vectors(basis: Basis) -> np.ndarray:
    return np.array([basis.combine(row) for row in np.eye(basis.count)])


@pytest.mark.parametrize("family,name", [(HADAMARD, "sign"), (DENSE, "u8"), (DENSE, "u24"), (DENSE, "sign")])
def test_bases_are_nested_and_projecting_is_the_adjoint(family, name):
    whole = vectors(Basis(family, name, 5, "B", 344, 60))
    assert np.array_equal(vectors(Basis(family, name, 5, "B", 344, 17)), whole[:17])
    x = RNG(0).standard_normal(344)
    assert np.allclose(Basis(family, name, 5, "B", 344, 60).project(x), whole @ x)
    assert not np.array_equal(vectors(Basis(family, name, 5, "A", 344, 60)), whole)
    assert not np.array_equal(vectors(Basis(family, name, 6, "B", 344, 60)), whole)
    if family == HADAMARD:
        assert np.array_equal(whole @ whole.T, 344 * 43 * np.eye(60))


def test_dense_bases_are_the_stream():
    drawn = vectors(Basis(DENSE, "u8", 5, "A", 300, 9))
    assert np.array_equal(drawn, prng.values(prng.Stream(5, "nola/A/300/basis"), "u8", range(9), 0, 300, "float64"))


def test_a_random_subspace_holds_its_share():
    """k / d of any vector, the mean over seeds; what the ceiling of the form rests on."""
    x = RNG(1).standard_normal(768)
    x[:100] *= 10
    shares = []
    for seed in range(60):
        basis = Basis(HADAMARD, "sign", seed, "A", 768, 96)
        c = basis.project(x) / basis.squares
        shares.append(np.sum(c**2 * basis.squares) / np.sum(x**2))
    assert abs(np.mean(shares) - 96 / 768) < 4 * np.std(shares) / 60**0.5 + 0.003


# --- the fit --------------------------------------------------------------------------------------------------------


def spanned(form: Form, shapes, ranks, counts, seed: int = 0) -> tuple[LoraAdapter, Config]:
    """An adapter that is in the span of the bases of a config."""
    targets = tuple(Target(f"layers.{n}.weight", shape) for n, shape in enumerate(shapes))
    config = complete(form, targets, ranks, counts)
    rng = RNG(seed)
    tensors = {}
    for spec in METHOD.specs(config, targets):
        if spec.kind == "half":
            tensors[spec.name] = packing.round_half(rng.uniform(0.5, 1, spec.shape) * 2.0**-20)
        else:
            normal = np.clip(rng.standard_normal(spec.shape) / 4, -1, 1)
            tensors[spec.name] = ((normal + 1) / 2 * (2**form.bits - 1)).astype(
                np.uint32 if form.bits == 16 else np.uint8
            )
    pairs = [
        LoraTarget(target, Stored("F32", a), Stored("F32", np.ascontiguousarray(b)), 1.0)
        for target, a, b in methods.expand_all(CompactAdapter("nola", config, targets, tensors))
    ]
    return LoraAdapter(tuple(pairs)), config


@pytest.mark.parametrize("family,name", [(HADAMARD, "sign"), (DENSE, "u8")])
def test_it_recovers_its_own_expansion(family, name):
    """In part of the space, in all of it, at ranks above one, in whatever coordinates the adapter comes."""
    counts = [(40, 50), (150, 120), (96, 64)] if family == DENSE else [(40, 50), (180, 150), (384, 288)]
    lora, config = spanned(Form(family, name, 16, 3), [(64, 96), (72, 80), (72, 96)], (1, 3, 4), counts)
    turned = []
    for pair in lora.targets:
        g = RNG(8).standard_normal((pair.rank, pair.rank))
        a, b = np.linalg.inv(g) @ pair.A.astype(np.float64), pair.B.astype(np.float64) @ g
        turned.append(replace(pair, a=Stored("F64", a), b=Stored("F64", b)))
    for source in (lora, replace(lora, targets=tuple(turned))):
        tensors = METHOD.fit(source, config, FitContext(seed=3))
        assert captured(METHOD, source, config, tensors) > 1 - 1e-4


def test_captured_never_falls_along_nested_samples():
    lora = random_lora([(96, 64), (64, 128), (72, 86)], rank=6, decay=0.8)
    for rank in (1, 3, 6):
        kept = [kept_by(METHOD, lora, rank=rank, num_basis=k) for k in (1, 4, 16, 40, 64, 90, 130, 260, 999)]
        assert kept == sorted(kept), kept
    assert kept[-1] > 1 - 1e-6


def test_it_keeps_its_share_and_a_lower_rank_keeps_more():
    lora = random_lora([(256, 256)], rank=8, decay=0.9)
    s = svd.singular_values(lora.targets[0])
    share = np.cumsum(s**2) / np.sum(s**2)
    for rank, k in ((1, 128), (8, 512)):
        assert kept_by(METHOD, lora, rank=rank, num_basis=k) > 0.9 * share[rank - 1] * (k / 256 / rank) ** 2
    chosen = convert(METHOD, lora, num_basis=512)[0]
    assert chosen.rank == 2 and chosen.num_basis == 0
    low, high = (kept_by(METHOD, lora, rank=r, num_basis=512) for r in (2, 8))
    assert low > 1.5 * high


def test_rounds_do_not_raise_the_error_and_gauges_help():
    from lrconvert.methods.nola.fit import Problem

    lora = random_lora([(96, 80)], rank=6, decay=0.9)
    factors = svd.svd(lora.targets[0])
    made = Basis(HADAMARD, "sign", 0, "A", 480, 300), Basis(HADAMARD, "sign", 0, "B", 576, 350)
    problem = Problem(factors.U * factors.s, factors.Vt, None, *made, 6, False)
    a, _ = svd.balanced(factors)
    c_a, c_b = problem.projected_a(a, 0.0), None
    errors_seen = []
    for _ in range(8):
        c_b = problem.solve_b(problem.matrix_a(c_a, 0.0), c_b)
        errors_seen.append(problem.error(problem.matrix_a(c_a, 0.0), problem.matrix_b(c_b)))
        c_a = problem.solve_a(problem.matrix_b(c_b), 0.0, c_a)
        errors_seen.append(problem.error(problem.matrix_a(c_a, 0.0), problem.matrix_b(c_b)))
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(errors_seen))
    c, start = problem.best_span(a, 0)
    best = problem.matrix_b(problem.solve_b(problem.matrix_a(c, start), None))
    assert problem.error(problem.matrix_a(c, start), best) < 1.001 * errors_seen[-1]


def test_statistics_are_what_it_minimizes():
    lora = random_lora([(64, 96)], rank=6, decay=0.9)
    scales = np.float32(10.0) ** RNG(0).uniform(-1.5, 1.5, 96).astype(np.float32)
    moment = Moment(10, diagonal=scales)
    context = FitContext(statistics=_Known(moment))
    metric = context.metric(lora.targets[0])
    lost = []
    for used in (context, FitContext()):
        options = NolaOptions(num_basis=70, rank=2)
        config = METHOD.plan(lora, options, None, used)
        compact = CompactAdapter("nola", config, lora.shapes(), METHOD.fit(lora, config, used))
        _, a, b = next(methods.expand_all(compact))
        lost.append(svd.distance(lora.targets[0], a, b, metric)[0])
    assert lost[0] < 0.97 * lost[1]


class _Known(InputStatistics):
    def __init__(self, moment: Moment) -> None:
        super().__init__((), lambda n: moment)

    def of(self, target: Target) -> Moment:
        return self.load(0)


@pytest.mark.parametrize("bits", [16, 8, 4, 3, 2, 1])
def test_codes_lose_what_their_width_says(bits):
    x = RNG(0).standard_normal(4000)
    coded = quantize(x, bits, np.ones(1))
    lost = np.sum((x - coded.scale * coded.numbers) ** 2) / np.sum(x**2)
    assert lost < {16: 1e-8, 8: 1.5e-4, 4: 0.0125, 3: 0.04, 2: 0.125, 1: 0.38}[bits]
    assert np.array_equal(coded.numbers, 2.0 * coded.codes + 1 - 2**bits)


def test_the_seed_is_that_of_the_context_and_in_the_file():
    lora = random_lora()
    one, two = convert(METHOD, lora, seed=1, num_basis=9), convert(METHOD, lora, seed=2**64 - 1, num_basis=9)
    assert METHOD.header(one[0])["seed"] == "1" and METHOD.header(two[0])["seed"] == str(2**64 - 1)
    assert not np.array_equal(one[1]["codes"], two[1]["codes"])
    with pytest.raises(errors.OptionError):
        convert(METHOD, lora, seed=-1, num_basis=9)
    with pytest.raises(errors.LimitError):
        convert(METHOD, lora, seed=2**64, num_basis=9)


def test_names_and_order_do_not_matter():
    lora = random_lora([(24, 16), (16, 40)])
    swapped = [replace(p, target=replace(p.target, name=n)) for p, n in zip(lora.targets[::-1], "ab", strict=True)]
    tensors = convert(METHOD, lora, num_basis=9, rank=2)[1]
    moved = convert(METHOD, replace(lora, targets=tuple(swapped)), num_basis=9, rank=2)[1]
    assert np.array_equal(tensors["codes"].reshape(2, -1), moved["codes"].reshape(2, -1)[::-1])


def test_the_base_term_is_used():
    lora = random_lora([(48, 40)], rank=3)
    drawn = Basis(HADAMARD, "sign", 0, "A", 80, 9).base_term(None).reshape(2, 40)
    a = 0.01 * RNG(0).standard_normal((2, 40)) + drawn
    pair = replace(lora.targets[0], a=Stored("F64", a), b=Stored("F64", RNG(1).standard_normal((48, 2))))
    lora = replace(lora, targets=(pair,))
    without, with_it = (kept_by(METHOD, lora, rank=2, num_basis=60, bits="8", base_term=flag) for flag in (False, True))
    assert with_it > without + 0.02


# --- plans ----------------------------------------------------------------------------------------------------------


def test_budgets_go_to_whole_bases_of_low_rank_and_end_at_one_coefficient():
    lora = random_lora([(96, 64), (64, 96), (40, 72)], rank=6, decay=0.6)
    rich = METHOD.plan(lora, NolaOptions(), payload_budget(METHOD, lora, 1200), FitContext())
    assert rich.num_basis == 0 or sum(k > 0 for pair in rich.counts for k in pair) <= 2
    with pytest.raises(errors.BudgetError) as caught:
        METHOD.plan(lora, NolaOptions(), payload_budget(METHOD, lora, 400), FitContext())
    least = int(str(caught.value).split()[-2])
    poor = METHOD.plan(lora, NolaOptions(), payload_budget(METHOD, lora, least), FitContext())
    assert sum(METHOD.ranks(poor, lora.shapes())) == 1
    assert METHOD.specs(poor, lora.shapes())[0].shape[0] >= 2


def test_num_basis_and_rank_bound_a_budget():
    lora = random_lora([(96, 64), (64, 96)], rank=6)
    config = METHOD.plan(lora, NolaOptions(num_basis=50, rank=2), payload_budget(METHOD, lora, 5000), FitContext())
    assert config.rank <= 2 and config.num_basis <= 50


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_basis": 0}, "num-basis is 0"),
        ({"rank": 5000}, "rank is 5000"),
        ({"map": "u24"}, "no meaning"),
    ],
)
def test_impossible_options_are_refused(options, match):
    with pytest.raises(errors.OptionError, match=match):
        METHOD.plan(random_lora(), NolaOptions(**options), None, FitContext())


# --- files ----------------------------------------------------------------------------------------------------------

TARGETS = (Target("a.weight", (24, 16)), Target("b.weight", (12, 10)), Target("c.weight", (7, 40)))


def read(header, **layout):
    METHOD.layout_specs(header, TARGETS)
    return METHOD.config(header, {name: np.array(x, np.uint32) for name, x in layout.items()}, TARGETS)


def sample(**changes) -> dict:
    form = Form(HADAMARD, "sign", 8, 5)
    return {**METHOD.header(complete(form, TARGETS, (3, 3, 3), [(20, 20)] * 3)), **changes}


def test_configs_have_one_spelling():
    form = Form(HADAMARD, "sign", 4, 0)
    for ranks, counts in (
        ((3, 3, 3), [(48, 72), (30, 36), (120, 21)]),
        ((3, 3, 3), [(20, 20), (20, 20), (20, 20)]),
        ((11, 10, 7), [(9, 9), (9, 9), (9, 9)]),
        ((0, 1, 2), [(0, 0), (10, 5), (1, 14)]),
        ((1, 0, 0), [(1, 1), (0, 0), (0, 0)]),
    ):
        config = complete(form, TARGETS, ranks, counts)
        assert METHOD.config(METHOD.header(config), METHOD.layout(config), TARGETS) == config
        assert METHOD.ranks(config, TARGETS) == list(ranks)
    uniform = complete(form, TARGETS, (3, 3, 3), [(20, 20)] * 3)
    assert not uniform.ranks and not uniform.counts and uniform.num_basis == 20
    assert complete(form, TARGETS, (3, 3, 3), [(999, 999)] * 3) == Config(form, 3, 0)


@pytest.mark.parametrize(
    ("changes", "layout", "error"),
    [
        ({"family": "fourier"}, {}, errors.JsonSyntaxError),
        ({"map": "u8"}, {}, errors.JsonSyntaxError),
        ({"bits": 5}, {}, errors.LimitError),
        ({"bits": True}, {}, errors.LimitError),
        ({"seed": 5}, {}, errors.JsonSyntaxError),
        ({"seed": "05"}, {}, errors.CanonicalError),
        ({"seed": "-5"}, {}, errors.CanonicalError),
        ({"seed": "²"}, {}, errors.CanonicalError),
        ({"seed": str(2**64)}, {}, errors.ValueRangeError),
        ({"seed": "9" * 4000}, {}, errors.ValueRangeError),
        ({"base_term": 1}, {}, errors.JsonSyntaxError),
        ({"rank": 0}, {}, errors.LimitError),
        ({"rank": 4096}, {}, errors.CanonicalError),
        ({"num_basis": 120}, {}, errors.CanonicalError),
        ({"num_basis": 2**31}, {}, errors.LimitError),
        ({"ranks": True}, {"ranks": [3, 3, 3]}, errors.CanonicalError),
        ({"ranks": True}, {"ranks": [3, 3, 8]}, errors.LimitError),
        ({"ranks": True}, {"ranks": [2, 2, 2]}, errors.CanonicalError),
        ({"counts": True}, {"counts": [[20, 20]] * 3}, errors.CanonicalError),
        ({"counts": True}, {"counts": [[20, 20], [19, 20], [1, 21]]}, errors.CanonicalError),
        ({"counts": True, "num_basis": 48}, {"counts": [[48, 20], [19, 20], [1, 20]]}, errors.CanonicalError),
    ],
)
def test_files_that_say_it_otherwise_are_refused(changes, layout, error):
    assert read(sample()).num_basis == 20
    with pytest.raises(error):
        read(sample(**changes), **layout)


def test_work_that_nobody_asked_for_is_refused_before_it_is_done():
    wide = (Target("a.weight", (2**31 - 1, 2**31 - 1)),)
    dense = Form(DENSE, "u8", 8, 5)
    for form, target, count in (
        (dense, wide, 4096),
        (Form(DENSE, "u24", 16, 5), (Target("a.weight", (2**20, 2**20)),), 8192),
        (Form(HADAMARD, "sign", 8, 5), (Target("a.weight", (2**30, 2**30)),), 0),
    ):
        config = complete(form, target, (4096,), [(count or 2**60,) * 2])
        with pytest.raises(errors.LimitError):
            METHOD.config(METHOD.header(config), METHOD.layout(config), target)


def test_numbers_beyond_float32_are_refused():
    config = complete(Form(HADAMARD, "sign", 8, 0), TARGETS, (1, 1, 1), [(4, 4)] * 3)
    tensors = {"codes": np.zeros(24, np.uint8), "scales": np.full((3, 2), 2.0**100, np.float32)}
    METHOD.check(config, TARGETS, tensors)
    with pytest.raises(errors.ValueRangeError):
        METHOD.check(config, TARGETS, {**tensors, "scales": np.full((3, 2), 2.0**111 * 1.5, np.float32) * 2**5})


@pytest.mark.parametrize(
    "form", [Form(HADAMARD, "sign", 16, 9), Form(DENSE, "u24", 4, 9, True), Form(DENSE, "u8", 1, 9)]
)
def test_expand_is_the_written_formula_on_both_backends(form):
    ranks, counts = (2, 0, 3), [(32, 11), (0, 0), (60, 21)]
    config = complete(form, TARGETS, ranks, counts)
    compact = random_compact(METHOD, config, TARGETS)
    tensors = compact.tensors
    numbers = [int(2 * c) + 1 - 2**form.bits for c in tensors["codes"]]
    at = active = 0
    for which, ((_, a, b), (_, ta, tb)) in enumerate(
        zip(methods.expand_all(compact), methods.expand_all(compact, torch), strict=True)
    ):
        assert np.array_equal(a, ta.numpy()) and np.array_equal(b, tb.numpy())
        out, inner = TARGETS[which].matrix_shape
        assert a.shape == (ranks[which], inner) and b.shape == (out, ranks[which])
        if not ranks[which]:
            continue
        for side, (role, factor) in enumerate((("A", a), ("B", b))):
            d, k = factor.size, counts[which][side]
            if form.family == HADAMARD:
                sigma = prng.values(prng.Stream(9, f"nola/{role}/{d}/signs"), "sign", (0,), 0, d, "float64")[0]
                order = hadamard.order(prng.Stream(9, f"nola/{role}/{d}/order"), d, k)
                rows = written_out(d)[order] * sigma
            else:
                rows = prng.values(prng.Stream(9, f"nola/{role}/{d}/basis"), form.value_map, range(k), 0, d, "float64")
            total = np.zeros(d)
            for n, row in zip(numbers[at : at + k][::-1], rows[::-1], strict=True):  # any order gives the same bits
                total += n * row
            flat = total * float(tensors["scales"][active, side])
            if form.base_term and side == 0:
                drawn = prng.values(prng.Stream(9, f"nola/A/{d}/base"), form.value_map, (0,), 0, d, "float64")[0]
                flat = flat + drawn * float(tensors["base_scales"][active])
            assert np.array_equal(flat.astype(np.float32).reshape(factor.shape), factor)
            at += k
        active += 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family,name", [(HADAMARD, "sign"), (DENSE, "u8"), (DENSE, "u24")])
def test_sums_have_the_same_bits_on_a_gpu(family, name):
    for d, k in ((65536, 512), (43 * 4096, 700), (5003, 4000), (2**16, 2**16 if family == HADAMARD else 64)):
        basis = Basis(family, name, 1, "A", d, k)
        numbers = 2.0 * RNG(0).integers(0, 2**16, k) + 1 - 2**16
        on_gpu = basis.combine(torch.from_numpy(numbers).cuda(), torch)
        assert np.array_equal(on_gpu.cpu().numpy(), basis.combine(numbers))
