"""SBoRA: its choice of columns against brute force, its fits against what they promise, its file rules one by one.

What every method must obey (round trips, determinism, numpy against torch, budgets) is in test_laws.py.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from conftest import dense, random_lora
from fits import RNG, payload_budget

from lrconvert import api
from lrconvert.core import errors
from lrconvert.core.dtypes import Stored
from lrconvert.lora import packing, svd
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter, LoraTarget
from lrconvert.lora.input_statistics import Input, InputStatistics, Moment
from lrconvert.methods import base as methods
from lrconvert.methods.base import FitContext
from lrconvert.methods.sbora import METHOD
from lrconvert.methods.sbora.columns import Columns, best_columns, metric_rows
from lrconvert.methods.sbora.form import Config, settled
from lrconvert.methods.sbora.plan import Planner, SBoRAOptions


def moment_of(n: int, kind: str, seed: int = 0) -> Moment:
    """A moment with correlated inputs of very different sizes, in one of its three forms."""
    rng = RNG(seed)
    rows = (rng.standard_normal((5, n)) * np.exp(rng.standard_normal(n))).astype(np.float32)
    squares = (rows * rows).sum(0) + rng.random(n).astype(np.float32)
    if kind == "matrix":
        return Moment(9, matrix=(rows.T @ rows + np.diag(squares - (rows * rows).sum(0))).astype(np.float32))
    return Moment(9, diagonal=squares, rows=rows if kind == "sketch" else None)


KINDS = ("matrix", "sketch", "diagonal")


def context_of(lora: LoraAdapter, kind: str | None) -> FitContext:
    if kind is None:
        return FitContext()
    inputs = tuple(Input((t.name,), None, t.in_features, 9) for t in lora.shapes())
    return FitContext(statistics=InputStatistics(inputs, lambda n: moment_of(inputs[n].width, kind, n)))


def matrix_of(metric: Moment | None, width: int) -> np.ndarray:
    return np.eye(width) if metric is None else metric.times(np.eye(width))


def captured_by(delta: np.ndarray, m: np.ndarray, columns: list[int]) -> float:
    """What the best numbers in these columns capture, from the dense update."""
    products = delta @ m[:, columns]
    return float(np.sum(np.linalg.solve(m[np.ix_(columns, columns)], products.T) * products.T))


def size_of(error: np.ndarray, m: np.ndarray) -> float:
    return float(np.sum((error @ m) * error))


def expanded(lora: LoraAdapter, config: Config, context: FitContext) -> list[np.ndarray]:
    compact = CompactAdapter("sbora", config, lora.shapes(), METHOD.fit(lora, config, context))
    METHOD.check(config, lora.shapes(), compact.tensors)
    return [b.astype(np.float64) @ a for _, a, b in methods.expand_all(compact)]


def convert(lora: LoraAdapter, context: FitContext, **options) -> tuple[Config, list[np.ndarray]]:
    config = METHOD.plan(lora, SBoRAOptions(**options), None, context)
    return config, expanded(lora, config, context)


# --- choosing columns -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_bookkeeping_is_that_of_the_dense_matrices(kind):
    pair = random_lora([(14, 20)], rank=4).targets[0]
    metric, delta = moment_of(20, kind), dense(pair)
    m = matrix_of(metric, 20)
    columns = Columns(svd.svd(pair, metric), metric)
    added = [columns.grow() for _ in range(6)]
    columns.improve()
    for some in (columns, Columns(svd.svd(pair, metric), metric)):
        if some is not columns:
            some.resume(columns.chosen)
        s = some.chosen
        rest = m - m[:, s] @ np.linalg.solve(m[np.ix_(s, s)], m[s])
        assert np.allclose(some.left, rest.diagonal(), atol=1e-4 * m.max())
        assert np.allclose(np.sum(some.core**2), np.sum((delta @ rest) ** 2), rtol=1e-3)
        assert np.isclose(np.sum(some.parts**2), captured_by(delta, m, s), rtol=1e-5)
        assert np.allclose(some.basis.T @ some.basis, m - rest, atol=1e-4 * m.max())
    assert np.sum(columns.parts**2) >= sum(added) * (1 - 1e-9)
    assert np.allclose(metric_rows(metric, [3, 7]), m[[3, 7]], rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_each_column_is_the_one_that_adds_most(kind):
    pair = random_lora([(14, 12)], rank=4, seed=3).targets[0]
    metric, delta = moment_of(12, kind, 1), dense(pair)
    m = matrix_of(metric, 12)
    columns, before = Columns(svd.svd(pair, metric), metric), 0.0
    for _ in range(12):
        rest = [j for j in range(12) if j not in columns.chosen]
        best = max(captured_by(delta, m, [*columns.chosen, j]) for j in rest)
        added = columns.grow()
        assert np.isclose(added, best - before, atol=1e-5 * size_of(delta, m))
        before = best
    assert sorted(columns.chosen) == list(range(12))


@pytest.mark.parametrize("seed", range(6))
def test_no_exchange_is_left_that_helps(seed):
    """After the swaps no single one captures more, and the choice is close to the best of all."""
    pair = random_lora([(16, 12)], rank=5, decay=0.9, seed=seed).targets[0]
    metric, delta = moment_of(12, "matrix", seed), dense(pair)
    m = matrix_of(metric, 12)
    found = best_columns(svd.svd(pair, metric), 4, metric)
    own = captured_by(delta, m, found)
    for out in found:
        for j in set(range(12)) - set(found):
            assert captured_by(delta, m, [*(k for k in found if k != out), j]) <= own * (1 + 1e-5)
    assert own >= 0.97 * max(captured_by(delta, m, list(some)) for some in combinations(range(12), 4))


def test_columns_that_add_nothing_do_no_harm():
    """An update that two columns tell wholly: further ones are chosen in order, and add nothing."""
    pair = random_lora([(8, 10)], rank=2).targets[0]
    a = np.zeros((2, 10), np.float32)
    a[0, 4], a[1, 7] = 1, 2
    pair = replace(pair, a=Stored("F32", a))
    metric = moment_of(10, "diagonal")
    columns = Columns(svd.svd(pair, metric), metric)
    added = [columns.grow() for _ in range(5)]
    assert sorted(columns.chosen[:2]) == [4, 7] and columns.chosen[2:] == [0, 1, 2]
    assert added[1] > 0 and max(added[2:]) < 1e-12 * added[0]
    columns.improve()
    assert {4, 7} < set(columns.chosen)


# --- laws of the form (decision 7) ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("variant", ["fa", "fb"])
def test_all_lines_are_exact_and_more_lines_are_better(variant, kind):
    lora = random_lora([(12, 18), (20, 10)], rank=5, decay=0.9)
    context = context_of(lora, kind)
    before = [-1.0] * 2
    for rank in (1, 2, 3, 5, 8, 12, 20):
        config, updates = convert(lora, context, variant=variant, rank=rank)
        for n, (pair, update) in enumerate(zip(lora.targets, updates, strict=True)):
            m = matrix_of(context.metric(pair), pair.target.in_features)
            kept = 1 - size_of(dense(pair) - update, m) / size_of(dense(pair), m)
            assert kept >= before[n] - 1e-6
            before[n] = kept
            places = pair.target.matrix_shape[variant == "fa"]
            assert config.ranks[n] == min(rank, places)
            if rank >= places:
                assert np.abs(dense(pair) - update).max() <= 2**-11 * np.abs(dense(pair)).max()
    assert min(before) > 1 - 1e-6


@pytest.mark.parametrize("kind", [None, "matrix", "sketch"])
def test_chosen_lines_beat_random_ones(kind):
    """Rows never lose; columns, with the best numbers for either, beat the median of 32 draws."""
    lora = random_lora([(24, 30)], rank=6, seed=4)
    context, pair = context_of(lora, kind), lora.targets[0]
    m, delta, rng = matrix_of(context.metric(pair), 30), dense(pair), RNG(0)
    for rank in (1, 3, 6, 12):
        kept = {}
        for variant in ("fa", "fb"):
            update = convert(lora, context, variant=variant, rank=rank)[1][0]
            kept[variant] = size_of(delta, m) - size_of(delta - update, m)
        rows = [size_of(delta[rng.permutation(24)[:rank]], m) for _ in range(32)]
        columns = [captured_by(delta, m, rng.permutation(30)[:rank].tolist()) for _ in range(32)]
        assert kept["fb"] >= max(rows) * (1 - 1e-5)
        assert kept["fa"] > np.median(columns) and kept["fa"] >= max(columns) * (1 - 1e-5)


@pytest.mark.parametrize("options", [{"variant": "fa", "bits": "2"}, {"variant": "fb"}, {"rank": 3, "bits": "8"}])
def test_an_expansion_is_recovered(options):
    """What the form says of its own expansion at 16 bits is that expansion, within its rounding."""
    done = api.convert(random_lora([(24, 30), (30, 24)], rank=4), "sbora", **options).compact
    pairs = tuple(
        LoraTarget(t, Stored("F32", np.ascontiguousarray(a)), Stored("F32", np.ascontiguousarray(b)), 1.0)
        for t, a, b in methods.expand_all(done)
    )
    lora = LoraAdapter(pairs)
    again = expanded(lora, Config((16,), tuple((n,) for n in done.config.ranks), done.config.by_rows), FitContext())
    for pair, update in zip(lora.targets, again, strict=True):
        assert np.abs(dense(pair) - update).max() <= 2**-11 * np.abs(dense(pair)).max()


def test_only_the_named_lines_change():
    lora = random_lora([(24, 30), (30, 24)], rank=4)
    for variant in ("fa", "fb"):
        config, updates = convert(lora, FitContext(), variant=variant, rank=3, bits="4")
        tensors = METHOD.fit(lora, config, FitContext())
        for n, update in enumerate(updates):
            touched = np.abs(update).max(axis=0 if variant == "fa" else 1) > 0
            assert np.flatnonzero(touched).tolist() == tensors["indices"][3 * n : 3 * n + 3].tolist()


def test_auto_takes_the_better_variant_of_each_target():
    """An update of few columns, one of few rows, and one that is zero."""
    lora = random_lora([(24, 30), (24, 30), (24, 30)], rank=3)
    pairs = list(lora.targets)
    few_columns, few_rows = np.zeros((3, 30), np.float32), np.zeros((24, 3), np.float32)
    few_columns[[0, 1, 2], [3, 8, 21]] = few_rows[[9, 5, 16], [0, 1, 2]] = 1
    pairs[0] = replace(pairs[0], a=Stored("F32", few_columns))
    pairs[1] = replace(pairs[1], b=Stored("F32", few_rows))
    pairs[2] = replace(pairs[2], b=Stored("F32", np.zeros((24, 3), np.float32)))
    lora = replace(lora, targets=tuple(pairs))
    config, updates = convert(lora, FitContext(), rank=3)
    assert config.variant == "mixed" and config.by_rows[:2] == (False, True)
    assert all(np.allclose(dense(p), u, atol=2e-3) for p, u in zip(pairs, updates, strict=True))
    planned = METHOD.plan(lora, SBoRAOptions(), payload_budget(METHOD, lora, 500 + 6 * 60 + 16), FitContext())
    assert planned.by_rows == (False, True, False) and planned.ranks == (3, 3, 0)


# --- quantizing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_errors_of_columns_are_fed_back(bits):
    """Quantizing columns in turns leaves less error than quantizing the best 16-bit numbers one by one."""
    lora = random_lora([(64, 40)], rank=6, seed=2)
    context, pair = context_of(lora, "matrix"), lora.targets[0]
    m = matrix_of(context.metric(pair), 40)
    exact = convert(lora, context, variant="fa", rank=12)[1][0]
    one_by_one = np.zeros_like(exact)
    columns = np.flatnonzero(np.abs(exact).max(axis=0))
    codes, scales = packing.quantize_rows(exact.T[columns], bits)
    one_by_one.T[columns] = packing.code_values(codes, bits) * scales[:, None]
    in_turns = convert(lora, context, variant="fa", rank=12, bits=str(bits))[1][0]
    assert size_of(exact - in_turns, m) < 0.9 * size_of(exact - one_by_one, m)


def test_scales_of_rows_are_solved_in_the_metric():
    lora = random_lora([(30, 40)], rank=6, seed=2)
    context, pair = context_of(lora, "sketch"), lora.targets[0]
    m = matrix_of(context.metric(pair), 40)
    update = convert(lora, context, variant="fb", rank=4, bits="2")[1][0]
    for row in np.flatnonzero(np.abs(update).max(axis=1)):
        error = [size_of(dense(pair)[row, None] - f * update[row, None], m) for f in (0.99, 1, 1.01)]
        assert error[1] == min(error)


# --- planning -------------------------------------------------------------------------------------------------------


@pytest.mark.medium
@pytest.mark.parametrize("kind", [None, "matrix"])
@pytest.mark.parametrize("variant", ["auto", "fa", "fb"])
def test_plans_fit_their_budget_and_keep_more_with_more(variant, kind):
    lora = random_lora([(96, 64), (64, 96), (64, 64)], rank=6, decay=0.6)
    context = context_of(lora, kind)
    kept = []
    for limit in (700, 900, 1500, 3000, 6000):
        budget = payload_budget(METHOD, lora, limit)
        config = METHOD.plan(lora, SBoRAOptions(variant=variant), budget, context)
        assert 0.9 * limit < budget.size(config) <= limit and len(config.levels) <= 3
        error = energy = 0.0
        for pair, update in zip(lora.targets, expanded(lora, config, context), strict=True):
            m = matrix_of(context.metric(pair), pair.target.in_features)
            error, energy = error + size_of(dense(pair) - update, m), energy + size_of(dense(pair), m)
        kept.append(1 - error / energy)
    assert kept == sorted(kept) and kept[-1] > 0.3


@pytest.mark.parametrize("options", [{"bits": "4"}, {"rank": 2}, {"variant": "fa", "bits": "1", "rank": 5}])
def test_a_budget_keeps_to_the_options(options):
    lora = random_lora([(96, 64), (64, 96)], rank=4, decay=0.6)
    config = METHOD.plan(lora, SBoRAOptions(**options), payload_budget(METHOD, lora, 1200), FitContext())
    assert max(config.ranks) <= options.get("rank", 4096)
    assert "bits" not in options or config.levels == (int(options["bits"]),)
    assert "variant" not in options or config.variant == options["variant"]


def test_curves_reach_as_far_as_the_price():
    """One target that deserves nearly all: its columns are looked for until the price, not to an even share."""
    lora = random_lora([(24, 120)] * 6, rank=5, decay=0.9)
    pairs = [replace(p, scale=p.scale * (100 if n == 4 else 1)) for n, p in enumerate(lora.targets)]
    lora = replace(lora, targets=tuple(pairs))
    moments = [moment_of(120, "matrix", n) for n in range(6)]

    class Plain(FitContext):
        def metric(self, pair):
            return moments[int(pair.target.name.split(".")[1])]  # not balanced between targets

    budget, context, options = payload_budget(METHOD, lora, 500 + 600), Plain(), SBoRAOptions(variant="fa", bits="2")
    planner = Planner(lora, options, budget, context)
    short = [len(curves[0].gains) for curves in planner.curves]
    config = planner.best()
    assert config.ranks[4] > short[4]
    whole = Planner(lora, options, budget, context)
    for pair, curves, moment in zip(lora.targets, whole.curves, moments, strict=True):
        curves[0].extend(svd.svd(pair, moment), moment, 120)
        assert len(curves[0].gains) == 120 and curves[0].chosen is None
    assert whole.best() == config


def test_impossible_options():
    with pytest.raises(errors.OptionError, match="rank is 0"):
        METHOD.plan(random_lora([(24, 16)]), SBoRAOptions(rank=0), None, FitContext())
    with pytest.raises(errors.OptionError, match="sbora takes auto, fa, fb"):
        api.convert(random_lora([(24, 16)]), "sbora", variant="fc")


def test_defaults_are_the_rank_of_the_lora_at_16_bits():
    lora = random_lora([(96, 64), (3, 96)], rank=4)
    assert METHOD.plan(lora, SBoRAOptions(variant="fa"), None, FitContext()) == Config(
        (16,), ((4,), (4,)), (False,) * 2
    )
    assert METHOD.plan(lora, SBoRAOptions(variant="fb"), None, FitContext()).ranks == (4, 3)


# --- what a file may hold -------------------------------------------------------------------------------------------


def example() -> tuple[LoraAdapter, Config, dict[str, np.ndarray]]:
    """Targets of both variants, one without lines, lines of three widths."""
    lora = random_lora([(12, 9), (7, 14), (6, 6), (5, 8)], rank=4)
    config = settled((16, 4, 1), ((1, 2, 1), (0, 3, 0), (0, 0, 0), (2, 0, 1)), (False, True, True, False))
    return lora, config, METHOD.fit(lora, config, FitContext())


def test_expand_is_the_written_formula():
    lora, config, tensors = example()
    assert config.by_rows == (False, True, False, False) and config.variant == "mixed"
    pieces = {name: iter(values.tolist()) for name, values in tensors.items()}
    compact = CompactAdapter("sbora", config, lora.shapes(), tensors)
    for (target, a, b), (_, ta, tb), row, by_rows in zip(
        methods.expand_all(compact), methods.expand_all(compact, torch), config.counts, config.by_rows, strict=True
    ):
        out, inner = target.matrix_shape
        want = np.zeros((out, inner), np.float32)
        for q, n in zip(config.levels, row, strict=True):
            for _ in range(n):
                place, line = next(pieces["indices"]), []
                scale = 1.0 if q == 16 else next(pieces["scales"])
                for _ in range(inner if by_rows else out):
                    line.append(
                        next(pieces["half"]) if q == 16 else scale * (2 * next(pieces[f"codes.{q}"]) - 2**q + 1)
                    )
                want[place if by_rows else slice(None), slice(None) if by_rows else place] = line
        assert np.array_equal(b @ a, want)
        unit = b if by_rows else a
        assert set(np.unique(unit)) <= {0, 1} and not np.signbit(unit).any() and unit.sum() == sum(row)
        assert a.tobytes() == ta.contiguous().numpy().tobytes() and b.tobytes() == tb.contiguous().numpy().tobytes()
    assert all(next(rest, None) is None for rest in pieces.values())


def test_numbers_are_trained_and_places_are_not():
    lora, config, tensors = example()
    values = methods.values(METHOD, CompactAdapter("sbora", config, lora.shapes(), tensors), torch)
    for name in ("half", "scales"):
        values[name].requires_grad_()
    for which in range(4):
        a, b = METHOD.expand(config, lora.shapes(), values, which, torch)
        assert a.requires_grad == config.by_rows[which] and b.requires_grad == (which in (0, 3))
        if config.ranks[which]:
            (a.sum() + b.sum()).backward()
    assert values["half"].grad.abs().min() > 0 and values["scales"].grad.shape == values["scales"].shape


@pytest.mark.parametrize(
    ("at", "places", "error"),
    [
        (0, [4, 2, 7, 0], None),
        (0, [9, 2, 7, 0], errors.IndexRangeError),  # of 9 columns
        (0, [4, 7, 2, 0], errors.CanonicalError),  # falls within a width
        (0, [4, 2, 4, 0], errors.IndexRangeError),  # one place at two widths
        (0, [4, 2, 2, 0], errors.IndexRangeError),
        (4, [0, 3, 6], None),
        (4, [0, 3, 7], errors.IndexRangeError),  # of 7 rows
    ],
)
def test_places_are_checked(at, places, error):
    lora, config, tensors = example()
    tensors["indices"][at : at + len(places)] = places
    if error is None:
        METHOD.check(config, lora.shapes(), tensors)
    else:
        with pytest.raises(error):
            METHOD.check(config, lora.shapes(), tensors)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"levels": []}, errors.JsonSyntaxError),
        ({"levels": [1, 4, 16]}, errors.JsonSyntaxError),
        ({"levels": [16, 5]}, errors.JsonSyntaxError),
        ({"levels": [True]}, errors.JsonSyntaxError),
        ({"max_count": 0}, errors.LimitError),
        ({"max_count": 4097}, errors.LimitError),
        ({"max_count": 4}, errors.LimitError),
        ({"variant": "fc"}, errors.JsonSyntaxError),
        ({"variant": ["fa"]}, errors.JsonSyntaxError),
    ],
)
def test_headers_are_checked(change, error):
    lora, config, _ = example()
    header = {**METHOD.header(config), **change}
    with pytest.raises(error):
        METHOD.layout_specs(header, lora.shapes())
        METHOD.config(header, METHOD.layout(config), lora.shapes())


@pytest.mark.parametrize(
    ("counts", "variants", "error"),
    [
        ([[1, 2, 1], [0, 3, 0], [0, 0, 0], [2, 0, 1]], [0, 1, 1, 0], errors.CanonicalError),  # fb without rows
        ([[1, 2, 1], [0, 3, 0], [0, 0, 0], [2, 0, 1]], [0, 0, 0, 0], errors.CanonicalError),  # not mixed
        ([[1, 2, 0], [0, 3, 0], [0, 0, 0], [2, 0, 0]], [0, 1, 0, 0], errors.LimitError),  # a width without lines
        ([[3, 3, 3], [3, 3, 3], [0, 0, 0], [2, 0, 1]], [0, 1, 0, 0], errors.LimitError),  # 9 lines, 7 rows
    ],
)
def test_layouts_are_checked(counts, variants, error):
    lora, config, _ = example()
    layout = {"counts": np.array(counts, np.uint32), "variants": np.array(variants, np.uint32)}
    with pytest.raises(error):
        METHOD.config(METHOD.header(config), layout, lora.shapes())
