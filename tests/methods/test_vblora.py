"""VB-LoRA: its codes against brute force, its fit against what it promises, its file rules one by one.

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

from lrconvert import api
from lrconvert.core import errors
from lrconvert.core.dtypes import Stored
from lrconvert.lora import packing, svd
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter, LoraTarget, Target
from lrconvert.methods import base as methods
from lrconvert.methods.base import FitContext
from lrconvert.methods.vblora import METHOD, subvectors
from lrconvert.methods.vblora import bank as vectorbank
from lrconvert.methods.vblora.coder import Coder
from lrconvert.methods.vblora.fit import Problem
from lrconvert.methods.vblora.form import Form, canonical_codes, complete, starts
from lrconvert.methods.vblora.plan import VBLoraOptions
from lrconvert.methods.vblora.refit import Refit
from lrconvert.methods.vblora.rows import Rows
from lrconvert.methods.vblora.search import Search


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(RNG(seed).standard_normal(shape).astype(np.float32))


def squared(x: torch.Tensor, bank: torch.Tensor, codes: tuple[torch.Tensor, torch.Tensor]) -> np.ndarray:
    return ((x - subvectors.combine(bank, *codes)).double() ** 2).sum(1).numpy()


# --- codes ----------------------------------------------------------------------------------------------------------


def test_one_vector_is_the_nearest():
    x, bank = normal(300, 6), normal(37, 6, seed=1)
    indices, weights = subvectors.encode(x, bank, 1, 1)
    brute = ((x.double()[:, None] - bank.double()) ** 2).sum(2).argmin(1)
    assert torch.equal(indices[:, 0], brute) and bool((weights == 1).all())


def test_two_vectors_are_the_best_of_all_pairs():
    x, bank = normal(200, 5), 1.5 * normal(24, 5, seed=1)
    codes = subvectors.encode(x, bank, 2, 1 << 20)
    best = np.full(len(x), np.inf)
    for p in range(24):
        for q in range(p):
            line = (bank[q] - bank[p]).double()
            w = (((x - bank[p]).double() @ line) / (line @ line)).clamp(0, 1)
            best = np.minimum(best, ((x.double() - bank[p] - w[:, None] * line) ** 2).sum(1).numpy())
    assert np.abs(squared(x, bank, codes) - best).max() < 1e-5
    assert bool((codes[0][:, 0] != codes[0][:, 1]).all())


def test_equal_vectors_and_vectors_at_zero_do_no_harm():
    bank = torch.cat([normal(4, 3), normal(4, 3), torch.zeros(3, 3)])
    x = torch.cat([bank, normal(20, 3, seed=2)])
    for k in (2, 3, 4):
        indices, weights = subvectors.encode(x, bank, k, 16)
        assert bool(torch.isfinite(weights).all()) and squared(x, bank, (indices, weights))[:8].max() < 1e-10
        assert all(len(set(code)) == k for code in indices.tolist())


@pytest.mark.parametrize("k", [2, 3, 5])
def test_weights_are_what_the_format_holds_and_no_code_gets_worse(k):
    x, bank = normal(400, 6), 1.3 * normal(40, 6, seed=1)
    single = squared(x, bank, subvectors.encode(x, bank, 1, 1))
    for exact in (True, False):
        codes = subvectors.encode(x, bank, k, 16, None, exact)
        units = codes[1] * 16
        assert torch.equal(units, units.round()) and bool((units.sum(1) == 16).all())
        assert (
            bool((units >= 0).all()) and bool((units[:, 1:] <= units[:, :1]).all()) and bool((units[:, 1:] < 8).all())
        )
        assert squared(x, bank, codes).sum() < single.sum()
        again = subvectors.encode(x, bank, k, 16, codes, exact)
        assert (squared(x, bank, again) <= squared(x, bank, codes)).all()


def test_more_vectors_than_distances_are_kept(monkeypatch):
    """Above the limit distances are computed as needed: the same codes."""
    x, bank = normal(50, 6), normal(30, 6, seed=1)
    kept = subvectors.encode(x, bank, 2, 16, None, False)
    monkeypatch.setattr(subvectors, "_GRAM_LIMIT", 8)
    assert squared(x, bank, subvectors.encode(x, bank, 2, 16, None, False)).sum() == pytest.approx(
        squared(x, bank, kept).sum(), rel=1e-5
    )


def test_beam_over_two_passes_is_exhaustive_when_wide():
    x, bank = normal(60, 4), normal(9, 4, seed=1)
    gains = torch.rand(60, 2, generator=torch.Generator().manual_seed(0)) + 0.2
    start = torch.zeros((60, 2), dtype=torch.int64)

    def error(codes):
        return ((x - (gains[:, :, None] * bank[codes]).sum(1)).double() ** 2).sum(1).numpy()

    brute = np.min([error(torch.tensor([[p, q]] * 60)) for p in range(9) for q in range(9)], axis=0)
    wide, narrow = (subvectors.beam_search(x, bank, gains, start, beam) for beam in (9, 1))
    assert np.allclose(error(wide), brute, atol=1e-5)
    assert (error(subvectors.beam_search(x, bank, gains, wide, 1)) <= error(wide)).all()
    assert error(narrow).sum() > error(wide).sum()


# --- rows and bank --------------------------------------------------------------------------------------------------


def test_rows_are_cut_and_thinned():
    rows = Rows.of(np.array([10, 8, 3]), np.array([1, 2, 1]), 4)
    assert rows.counts.tolist() == [3, 2, 1] and rows.valid.tolist() == [4, 4, 2, 4, 4, 3]
    assert rows.codes == 8 and rows.code_starts.tolist() == [0, 3, 5, 7, 8]
    thin, kept = rows.thinned(2)
    assert kept.tolist() == [0, 2, 4, 5] and thin.valid.tolist() == [4, 2, 4, 3]
    assert Rows.of(np.array([8, 4]), np.array([1, 1]), 4).valid is None


def padded_rows(passes: int) -> tuple[Rows, torch.Tensor, np.ndarray]:
    rows = Rows.of(np.array([22, 40, 40, 17, 30]), np.array([1, passes, passes, 1, passes]), 4)
    x = 1.5 * normal(int(rows.starts[-1]), 4)
    return rows, x * (np.arange(4) < rows.valid[:, None]), np.array([1.0, 0.5, 3.0, 0.1, 2.0])


def test_the_bank_step_is_weighted_least_squares():
    rows, x, weight = padded_rows(2)
    coder = Coder.new(rows, normal(6, 4, seed=3), 2, 16, True)
    coder.recode(np.arange(5), x, fresh=True)
    solved = vectorbank.solve_bank(coder, x.numpy(), weight)
    flat = np.zeros((len(x), 6))
    for p, row in enumerate(np.repeat(np.arange(5), rows.passes)):
        for t in range(rows.counts[row]):
            for i, w in zip(
                coder.indices[rows.code_starts[p] + t], coder.weights[rows.code_starts[p] + t], strict=True
            ):
                flat[rows.starts[row] + t, int(i)] += coder.gains[p] * float(w)
    for column in range(4):
        use = np.sqrt(np.repeat(weight, rows.counts) * (rows.valid > column))
        best = np.linalg.lstsq(flat * use[:, None], x[:, column].numpy() * use, rcond=None)[0]
        reached = np.sum(((flat @ solved[:, column] - x[:, column].numpy()) * use) ** 2)
        assert reached == pytest.approx(np.sum(((flat @ best - x[:, column].numpy()) * use) ** 2), rel=1e-4)


@pytest.mark.parametrize(
    ("k", "passes", "scaled"), [(1, 1, True), (1, 3, True), (2, 1, False), (2, 2, True), (3, 1, True)]
)
def test_no_round_raises_the_error(k, passes, scaled):
    rows, x, weight = padded_rows(passes)
    coder = Coder.new(rows, vectorbank.seed_bank(x, np.ones(len(x)), 8, RNG(0)), k, 16, scaled)
    vectorbank.alternate(coder, x, weight, 12, fresh=True, settled=0.0)
    assert len(coder.trace) > 4
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(coder.trace))
    assert coder.trace[-1] < 0.9 * coder.trace[0]
    value = coder.recode(np.arange(5), x)
    assert bool((value * (np.arange(4) >= rows.valid[:, None]) == 0).all()), "the fill of a cut sub-vector is not zero"


def test_unused_vectors_come_back():
    x = normal(64, 4)
    rows = Rows.of(np.array([256]), np.array([1]), 4)
    bank = torch.cat([normal(4, 4, seed=1), torch.full((4, 4), 50.0)])
    coder = Coder.new(rows, bank, 1, 1, False)
    vectorbank.alternate(coder, x, np.ones(1), 10, fresh=True, settled=0.0)
    assert len(set(coder.indices[:, 0].tolist())) == 8


@pytest.mark.parametrize("options", [{"passes": 2}, {"top_k": 2}, {"gain": "off"}])
def test_no_sweep_raises_the_error_of_the_update(options):
    lora = random_lora([(40, 24), (24, 36)], rank=4, decay=0.6)
    config = METHOD.plan(lora, VBLoraOptions(vector_length=5, num_vectors=12, **options), None, FitContext())
    problem = Problem(lora, config, FitContext())
    refit: Refit = problem.refit(problem.train(0, 2)[0])
    errors_seen = [refit.error()]
    for _ in range(4):
        for side in (0, 1):
            refit.sweep(side)
            errors_seen.append(refit.error())
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(errors_seen))
    assert errors_seen[-1] < errors_seen[0]
    assert refit.improve_bank(errors_seen[-1]) <= errors_seen[-1]
    dense = sum(np.sum((p.scale * p.B.astype(np.float64) @ p.A) ** 2) for p in lora.targets)
    assert refit.energy == pytest.approx(dense, rel=1e-6)


# --- the fit --------------------------------------------------------------------------------------------------------


def test_it_recovers_its_own_expansion():
    """Rank one, few well separated vectors: the codes and the bank are found again, up to 16-bit rounding."""
    rng = RNG(4)
    pairs = []
    bank = rng.standard_normal((6, 8))
    bank = np.concatenate([bank, -bank])  # a fit may flip the sign of both rows
    for n, (out, inner) in enumerate([(64, 96), (128, 64), (96, 96)]):
        a, b = (bank[rng.integers(0, 12, size // 8)].reshape(-1) for size in (inner, out))
        target = Target(f"layers.{n}.weight", (out, inner))
        pairs.append(LoraTarget(target, Stored("F64", a[None]), Stored("F64", b[:, None]), 0.5 + n))
    lora = LoraAdapter(tuple(pairs))
    config, tensors = convert(METHOD, lora, vector_length=8, num_vectors=12, top_k=1)
    assert captured(METHOD, lora, config, tensors) > 1 - 1e-5


def test_it_beats_a_random_bank():
    lora = random_lora([(96, 64), (64, 96)], rank=4, decay=0.6)
    config, tensors = convert(METHOD, lora, vector_length=8, num_vectors=64, rank=2)
    problem = Problem(lora, config, FitContext())
    coder = Coder.new(problem.rows, normal(64, 8, seed=9), 1, 2, True)
    coder.recode(np.arange(len(problem.rows.counts)), problem.x, fresh=True)
    refit = problem.refit(coder)
    for _ in range(6):
        refit.sweep(0)
        refit.sweep(1)
    assert captured(METHOD, lora, config, tensors) > 1 - refit.error() / refit.energy + 0.15


def test_passes_buy_what_bits_buy():
    lora = random_lora([(96, 64), (64, 96)], rank=3, decay=0.8)
    kept = [kept_by(METHOD, lora, vector_length=3, num_vectors=16, passes=p) for p in (1, 2, 3)]
    assert kept[0] > 0.5 and 1 - kept[1] < 0.35 * (1 - kept[0]) and 1 - kept[2] < 0.35 * (1 - kept[1])


def test_the_tensors_say_what_was_optimized():
    """What `fit` believes and what `expand` returns is the same update."""
    lora = random_lora([(40, 24), (24, 36)], rank=4, decay=0.6)
    for options in ({"passes": 2}, {"top_k": 3, "bits": 8}, {"gain": "off", "top_k": 2}):
        config, tensors = convert(METHOD, lora, vector_length=5, num_vectors=12, **options)
        METHOD.check(config, lora.shapes(), tensors)
        for spec in METHOD.specs(config, lora.shapes()):
            assert np.array_equal(packing.decode(spec, *packing.encode(spec, tensors[spec.name])), tensors[spec.name])


def test_seeds_and_repeats():
    lora = random_lora([(40, 24), (24, 36)], rank=4)
    one, two, other = (convert(METHOD, lora, seed=s, vector_length=4, num_vectors=16, top_k=2)[1] for s in (0, 0, 1))
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert not np.array_equal(one["bank"], other["bank"])


# --- expand ---------------------------------------------------------------------------------------------------------


def written_out(config, targets, tensors, which) -> list[np.ndarray]:
    """The formula of the module's docstring, number by number."""
    form = config.form
    bank = tensors["bank"].astype(np.float64)
    if form.bits < 16:
        bank = packing.code_values(tensors["bank"], form.bits).astype(np.float64) * tensors["scales"][:, None]
    row, turn, code = starts(config, targets)[which]
    sides = []
    for length in reversed(targets[which].matrix_shape):
        side = np.zeros((config.ranks[which], length))
        for j in range(config.ranks[which]):
            for _ in range(config.passes[row] if config.passes else 1):
                for t in range(-(-length // form.vector_length)):
                    small = [int(c) / form.denominator for c in tensors["weights"][code]] if form.top_k > 1 else []
                    weights = [1 - sum(small), *small]
                    u = sum(w * bank[i] for w, i in zip(weights, tensors["indices"][code], strict=True))
                    gain = float(tensors["gains"][turn]) if form.gains else 1.0
                    here = slice(t * form.vector_length, min(length, (t + 1) * form.vector_length))
                    side[j, here] = side[j, here] + (gain * u)[: here.stop - here.start]
                    code += 1
                turn += 1
            row += 1
        sides.append(side.astype(np.float32))
    return sides


@pytest.mark.parametrize("form", [Form(5, 9), Form(4, 9, 3, 8, 3), Form(7, 9, 2, 4, 2), Form(4, 9, 2, 16, 1, False)])
def test_expand_is_the_written_formula_on_both_backends(form):
    targets = (Target("a.weight", (12, 8)), Target("b.weight", (9, 14)), Target("c.weight", (6, 6)))
    passes = RNG(1).integers(1, 4, 10) if form.gains else np.ones(10, int)
    config = complete(form, targets, (2, 3, 0), passes.tolist())
    assert config.padded and METHOD.ranks(config, targets) == (2, 3, 0)
    compact = random_compact(METHOD, config, targets)
    tensors = compact.tensors
    if form.top_k > 1:
        tensors["weights"] //= form.top_k
    for which, ((_, a, b), (_, ta, tb)) in enumerate(
        zip(methods.expand_all(compact), methods.expand_all(compact, torch), strict=True)
    ):
        want_a, want_b = written_out(config, targets, tensors, which)
        assert np.array_equal(a, want_a) and np.array_equal(b, want_b.T)
        assert a.tobytes() == ta.numpy().tobytes() and b.tobytes() == tb.contiguous().numpy().tobytes()


# --- planning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.4, 0.8])
def test_passes_go_where_they_keep_most(share):
    """An allocation stays within its bits, and keeps no less than any drawn at random within them, of two shapes."""
    lora = random_lora([(96, 64), (64, 96), (16, 24)], rank=5, decay=0.7)
    spectra = [svd.singular_values(pair, None) for pair in lora.targets]
    search = Search(lora, spectra, [5] * 3, VBLoraOptions(), payload_budget(METHOD, lora, 2000), FitContext())
    form, loss = Form(4, 16), 0.4
    costs = form.row_bits(search.inner)[search.shape], form.row_bits(search.out)[search.shape]
    room = share * 4 * float(sum(cost.sum() for cost in costs))
    choice = search._allocate(form, loss, room)
    rng, drawn = RNG(0), [(choice.p, choice.q)]
    for most in rng.integers(1, 6, 3000):
        p = rng.integers(0, most, len(search.energy))
        drawn.append((p, np.where(p > 0, np.clip(p + rng.integers(-2, 3, len(p)), 1, None), 0)))
    spent = [float(costs[0] @ p + costs[1] @ q) for p, q in drawn]
    kept = [float(search.energy @ ((1 - loss**p) * (1 - loss**q))) for p, q in drawn]
    assert spent[0] <= room and kept[0] == pytest.approx(choice.kept)
    assert kept[0] >= 0.995 * max(k for k, bits in zip(kept, spent, strict=True) if bits <= room)


@pytest.mark.medium
def test_plans_fit_their_budget_and_keep_more_with_more():
    lora = random_lora([(96, 64), (64, 96), (64, 64)], rank=6, decay=0.6)
    kept = []
    for limit in (700, 900, 1500, 3000, 6000):
        budget = payload_budget(METHOD, lora, limit)
        config = METHOD.plan(lora, VBLoraOptions(), budget, FitContext())
        assert budget.size(config) <= limit
        assert budget.size(config) > 0.9 * limit
        kept.append(captured(METHOD, lora, config, METHOD.fit(lora, config, FitContext())))
    assert kept == sorted(kept) and kept[0] < 0.6 and kept[-1] > 0.95


@pytest.mark.medium
@pytest.mark.parametrize(
    "options",
    [
        {"rank": 2},
        {"vector_length": 8, "num_vectors": 16},
        {"top_k": 2, "bits": 8},
        {"passes": 1},
        {"gain": "off"},
        {"peft_compatible": True},
        {"peft_compatible": True, "rank": 2, "vector_length": 16},
    ],
)
def test_a_search_keeps_to_the_options(options):
    lora = random_lora([(96, 64), (64, 96)], rank=4, decay=0.6)
    budget = payload_budget(METHOD, lora, 3000)
    config = METHOD.plan(lora, VBLoraOptions(**options), budget, FitContext())
    assert budget.fits(config)
    for name in {"vector_length", "num_vectors", "top_k", "bits"} & set(options):
        assert getattr(config.form, name) == options[name]
    if "rank" in options:
        assert set(config.ranks) == {options["rank"]}
    assert config.form.gains == (not {"gain", "peft_compatible"} & set(options))
    if {"passes", "gain", "peft_compatible"} & set(options):
        assert not config.passes
    if "peft_compatible" in options:
        assert len(set(config.ranks)) == 1 and not config.padded


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"vector_length": 0}, "vector_length"),
        ({"top_k": 17}, "top_k"),
        ({"bits": 5}, "16, 8 or 4"),
        ({"gain": "maybe"}, "gain is"),
        ({"top_k": 3, "num_vectors": 2}, "at least as many vectors"),
        ({"top_k": 1, "weight_bits": 3}, "no meaning"),
        ({"gain": "off", "passes": 2}, "need gains"),
        ({"peft_compatible": True, "passes": 2}, "need gains"),
        ({"peft_compatible": True, "gain": "on"}, "contradict"),
        ({"peft_compatible": True, "vector_length": 5}, "does not divide"),
    ],
)
def test_impossible_options(options, match):
    with pytest.raises(errors.OptionError, match=match):
        METHOD.plan(random_lora([(24, 16)]), VBLoraOptions(**options), None, FitContext())


def test_peft_compatible_without_a_common_divisor():
    with pytest.raises(errors.OptionError, match="no vector length"):
        METHOD.plan(random_lora([(24, 35)]), VBLoraOptions(peft_compatible=True), None, FitContext())


def test_defaults_come_from_the_shapes():
    lora = random_lora([(96, 64), (64, 96)], rank=4)
    config = METHOD.plan(lora, VBLoraOptions(rank=2), None, FitContext())
    assert config.form == Form(8, 16) and config.ranks == (2, 2) and not config.padded
    assert METHOD.plan(random_lora([(12, 30)]), VBLoraOptions(rank=1), None, FitContext()).form.vector_length == 2
    long = METHOD.plan(random_lora([(640, 256)]), VBLoraOptions(vector_length=64), None, FitContext())
    assert long.form.top_k == 2 and long.form.weight_bits == 3


# --- what a file may hold -------------------------------------------------------------------------------------------


def example() -> tuple[LoraAdapter, object, dict[str, np.ndarray]]:
    lora = random_lora([(40, 24), (24, 36)], rank=3)
    config, tensors = convert(METHOD, lora, vector_length=5, num_vectors=12, top_k=3, weight_bits=3, bits=8)
    return lora, config, tensors


@pytest.mark.medium
@pytest.mark.parametrize(
    ("indices", "small", "error"),
    [
        ([4, 4, 1], [3, 2], errors.IndexRangeError),
        ([4, 3, 1], [7, 7], errors.ValueRangeError),  # the first would weigh 2/16
        ([4, 3, 1], [2, 3], errors.CanonicalError),  # lighter before heavier
        ([4, 3, 1], [3, 3], errors.CanonicalError),  # equals: lower index first
        ([4, 3, 1], [3, 0], errors.CanonicalError),  # a weight of zero names index 0
        ([4, 1, 0], [0, 0], errors.CanonicalError),
        ([4, 3, 0], [3, 0], None),
        ([0, 1, 2], [0, 0], None),
        ([4, 1, 3], [3, 3], None),
    ],
)
def test_codes_are_checked(indices, small, error):
    lora, config, tensors = example()
    tensors["indices"][5], tensors["weights"][5] = indices, small
    if error is None:
        METHOD.check(config, lora.shapes(), tensors)
    else:
        with pytest.raises(error):
            METHOD.check(config, lora.shapes(), tensors)


def test_a_negative_scale_is_refused():
    lora, config, tensors = example()
    tensors["scales"][2] = -1
    with pytest.raises(errors.ValueRangeError, match="negative scale"):
        METHOD.check(config, lora.shapes(), tensors)


def test_float32_numbers_of_elsewhere_are_kept():
    """The same numbers stored as multiples and as float32 mean the same; float32 ones may put any vector first."""
    lora, config, tensors = example()
    form = config.form
    exact = replace(config, form=replace(form, weight_bits=32, bits=32))
    bank = packing.code_values(tensors["bank"], form.bits) * tensors["scales"][:, None]
    weights = (tensors["weights"] * form.weight_unit).astype(np.float32)
    others = {k: v for k, v in tensors.items() if k != "scales"} | {"bank": bank, "weights": weights}
    METHOD.check(exact, lora.shapes(), others)
    for one, two in zip(
        methods.expand_all(CompactAdapter("vblora", config, lora.shapes(), tensors)),
        methods.expand_all(CompactAdapter("vblora", exact, lora.shapes(), others)),
        strict=True,
    ):
        assert np.array_equal(one[1], two[1]) and np.array_equal(one[2], two[2])
    spec = next(s for s in METHOD.specs(exact, lora.shapes()) if s.name == "weights")
    assert spec.dtype == "F32" and np.array_equal(packing.decode(spec, *packing.encode(spec, weights)), weights)
    turned = weights.copy()
    turned[:, 0] = 0.75 * (1 - weights[:, 1:].sum(1))  # leaves the first vector the lighter one
    METHOD.check(exact, lora.shapes(), others | {"weights": turned})
    for bad in (-0.25, 1.25):
        with pytest.raises(errors.ValueRangeError, match="negative weight"):
            METHOD.check(exact, lora.shapes(), others | {"weights": np.full_like(weights, bad)})


def test_no_file_expands_to_infinity():
    lora, config, tensors = example()
    tensors["gains"][0] = 2.0**100
    METHOD.check(config, lora.shapes(), tensors)
    tensors["scales"][0] = 2.0**26
    with pytest.raises(errors.ValueRangeError, match="beyond float32"):
        METHOD.check(config, lora.shapes(), tensors)


def test_canonical_codes_mean_the_same():
    rng = RNG(0)
    indices = np.stack([rng.permutation(9)[:4] for _ in range(200)])
    units = rng.integers(0, 3, (200, 4))
    units[:, 0] = 16 - units[:, 1:].sum(1)
    bank = rng.standard_normal((9, 3))
    before = (bank[indices] * units[:, :, None]).sum(1)
    new, weights = canonical_codes(indices.copy(), units.copy())
    assert np.allclose((bank[new] * weights[:, :, None]).sum(1), before)
    assert all(len(set(code)) == 4 for code in new.tolist())
    assert np.array_equal(canonical_codes(new.copy(), weights.copy())[0], new)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"top_k": None}, errors.LimitError),
        ({"vector_length": 0}, errors.LimitError),
        ({"num_vectors": 1 << 21}, errors.LimitError),
        ({"num_vectors": True}, errors.LimitError),
        ({"top_k": 13}, errors.LimitError),
        ({"top_k": 1}, errors.LimitError),
        ({"weight_bits": 0}, errors.LimitError),
        ({"bits": 5}, errors.LimitError),
        ({"gains": 1}, errors.JsonSyntaxError),
        ({"rank": 5000}, errors.LimitError),
        ({"rank": 30, "rows": 120}, errors.LimitError),
        ({"rows": 10}, errors.LimitError),
        ({"padded": False}, errors.CanonicalError),
        ({"passes": 17}, errors.LimitError),
        ({"passes": 2, "gains": False}, errors.LimitError),
    ],
)
def test_headers_are_checked(change, error):
    lora, config, _ = example()
    header = {**METHOD.header(config), **change}
    with pytest.raises(error):
        METHOD.layout_specs(header, lora.shapes())
        METHOD.config(header, {}, lora.shapes())


def test_layouts_are_checked():
    lora = random_lora([(40, 24), (24, 36)], rank=3)
    config = replace(complete(Form(4, 8), lora.shapes(), (2, 1), (1, 2, 1, 1, 3, 1)))
    header, layout = METHOD.header(config), METHOD.layout(config)
    assert METHOD.config(header, layout, lora.shapes()) == config
    for name, values in (("ranks", [1, 1]), ("ranks", [2, 2]), ("passes", [0, 1, 0, 0, 1, 0])):
        with pytest.raises(errors.CanonicalError):
            METHOD.config(header, {**layout, name: np.array(values, np.uint32)}, lora.shapes())


def test_it_computes_on_one_thread() -> None:
    """Many small operations are several times as fast on one; a caller's threads are as before."""
    before, seen = torch.get_num_threads(), set[int]()
    torch.set_num_threads(3)
    try:
        lora = random_lora([(96, 64), (64, 96)], rank=4)
        api.convert(lora, "vblora", target_size=2600, progress=lambda share, text: seen.add(torch.get_num_threads()))
        assert torch.get_num_threads() == 3 and seen == {1}
    finally:
        torch.set_num_threads(before)
