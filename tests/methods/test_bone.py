"""Bone: the closed form against dense least squares, what its fit and plan promise, its file rules one by one.

What every method must obey (round trips, determinism, numpy against torch, budgets) is in test_laws.py.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from conftest import dense, random_lora
from fits import lost, random_compact

from lrconvert import api
from lrconvert.core import errors
from lrconvert.core.dtypes import Stored
from lrconvert.formats.lrc import file
from lrconvert.lora import packing, svd
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter, Target
from lrconvert.lora.input_statistics import Input, InputStatistics, Moment
from lrconvert.methods import base as methods
from lrconvert.methods.base import Budget, FitContext
from lrconvert.methods.bone import METHOD
from lrconvert.methods.bone.fit import Classes, fold, tiling, upper_root
from lrconvert.methods.bone.form import EXACT, complete
from lrconvert.methods.bone.plan import BoneOptions, Plan, _grid, _hull

SHAPES = ((24, 16), (16, 40), (20, 18))


def moment(width: int, kind: str = "matrix", seed: int = 3) -> Moment:
    """The moment of inputs that live in few directions, all of one sign: what unweighted fits do badly on."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((400, 3)) @ rng.standard_normal((3, width)) + 2 * rng.random(width)
    x += 0.2 * rng.standard_normal(x.shape)
    whole = (x.T @ x / len(x)).astype(np.float32)
    if kind == "matrix":
        return Moment(400, matrix=whole)
    values, vectors = np.linalg.eigh(whole.astype(np.float64))
    rows = (vectors[:, -2:] * np.sqrt(0.9 * values[-2:])).T.astype(np.float32)
    return Moment(400, diagonal=whole.diagonal().copy(), rows=rows if kind == "sketch" else None)


def statistics(lora: LoraAdapter, kind: str = "matrix") -> InputStatistics:
    inputs = tuple(Input((t.name,), None, t.in_features, 400) for t in lora.shapes())
    return InputStatistics(inputs, lambda n: moment(inputs[n].width, kind, seed=n))


def full(metric: Moment | None, width: int) -> np.ndarray:
    return np.eye(width) if metric is None else metric.times(np.eye(width))


def updates(compact: CompactAdapter) -> list[np.ndarray]:
    return [b.astype(np.float64) @ a for _, a, b in methods.expand_all(compact)]


# --- the closed form ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, "matrix", "sketch", "diagonal"])
@pytest.mark.parametrize(("variant", "shard"), [("bone", "in"), ("bone", "out"), ("mini", "in")])
@pytest.mark.parametrize("rank", [1, 7, 8])
def test_the_fit_is_dense_least_squares(kind, variant, shard, rank):
    """Against a least-squares solve over all entries of the dense update, in the metric."""
    lora = random_lora(SHAPES, rank=5)
    moments = None if kind is None else statistics(lora, kind)
    options = {"mini_rank": 4} if variant == "mini" else {}
    done = api.convert(lora, "bone", variant=variant, shard=shard, rank=rank, statistics=moments, **options)
    context = FitContext(statistics=moments)
    for pair, ours in zip(lora.targets, updates(done.compact), strict=True):
        out, inner = pair.target.matrix_shape
        tiled, other = (out, inner) if shard == "out" else (inner, out)
        columns = 4 if variant == "mini" else other
        basis = []
        for k in range(rank):
            for c in range(columns):
                pattern = np.zeros((tiled, other))
                pattern[k::rank, c::columns] = 1
                basis.append(pattern if shard == "out" else pattern.T)
        values, vectors = np.linalg.eigh(full(context.metric(pair), inner))
        root = vectors * np.sqrt(np.maximum(values, 0))
        design = np.stack([(pattern @ root).reshape(-1) for pattern in basis], axis=1)
        best = np.linalg.lstsq(design, (dense(pair) @ root).reshape(-1), rcond=None)[0]
        wanted = sum(w * pattern for w, pattern in zip(best, basis, strict=True))
        assert np.linalg.norm((ours - wanted) @ root) < 2e-3 * np.linalg.norm(wanted @ root)


@pytest.mark.parametrize("kind", [None, "matrix", "sketch"])
@pytest.mark.parametrize(
    "options", [{"rank": 6}, {"rank": 6, "shard": "out"}, {"rank": 6, "variant": "mini", "mini_rank": 4}]
)
def test_it_recovers_its_own_expansion(options, kind):
    """At 16 bits within their rounding."""
    once = api.convert(random_lora(SHAPES), "bone", **options).compact
    pairs = []
    for (target, a, b), pair in zip(methods.expand_all(once), random_lora(SHAPES).targets, strict=True):
        assert target == pair.target
        pairs.append(replace(pair, a=Stored("F32", a), b=Stored("F32", np.ascontiguousarray(b)), scale=1.0))
    lora = LoraAdapter(tuple(pairs))
    moments = None if kind is None else statistics(lora, kind)
    again = api.convert(lora, "bone", statistics=moments, **options).compact
    for one, two in zip(updates(once), updates(again), strict=True):
        assert np.abs(one - two).max() <= 2.0**-10 * np.abs(one).max()


def test_as_many_rows_as_inputs_hold_everything():
    lora = random_lora(SHAPES)
    for shard in ("in", "out"):
        done = api.convert(lora, "bone", rank=40, shard=shard)  # capped at the side of each target
        assert done.compact.config.ranks == tuple(
            min(40, t.in_features if shard == "in" else t.out_features) for t in lora.shapes()
        )
        assert done.fidelity.captured > 1 - 1e-6


@pytest.mark.parametrize("kind", [None, "matrix", "sketch"])
@pytest.mark.parametrize("shard", ["in", "out"])
@pytest.mark.parametrize("chain", [(1, 2, 4, 8, 16), (1, 3, 6, 12), (5, 10)])
def test_captured_never_falls_along_divisors(chain, shard, kind):
    lora = random_lora(SHAPES, rank=6)
    context = FitContext(statistics=None if kind is None else statistics(lora, kind))
    errors_ = [
        lost(lora, api.convert(lora, "bone", rank=r, shard=shard, statistics=context.statistics).compact, context)
        for r in chain
    ]
    assert all(after <= before + 1e-6 for before, after in pairwise(errors_))


def test_captured_never_falls_with_more_columns_of_mini():
    lora = random_lora(SHAPES)
    kept = [api.convert(lora, "bone", variant="mini", rank=8, mini_rank=m).fidelity.captured for m in (1, 2, 4)]
    assert kept == sorted(kept)


@pytest.mark.parametrize("kind", ["matrix", "sketch", "diagonal"])
def test_sums_over_classes(kind):
    """Folding a fold is folding; the moment between the classes is T M T^T."""
    right = np.random.default_rng(0).standard_normal((3, 29))
    metric = moment(29, kind)
    classes = Classes(right, metric)
    for rank in (24, 16, 12, 8, 6, 5, 1):
        t = tiling(rank, 29).astype(float)
        products, gram = classes.at(rank)
        assert np.allclose(products, metric.times(right) @ t.T, rtol=1e-5, atol=1e-5)
        assert np.allclose(gram, metric.gram(t), rtol=1e-4, atol=1e-4)
        root = upper_root(gram)
        assert np.allclose(root @ root.T, gram) and np.allclose(root, np.triu(root))
    assert np.allclose(fold(fold(right, 12), 4), fold(right, 4))


def test_statistics_turn_a_loss_into_a_gain():
    """The issue's observation: without statistics the outputs may be worse off than with no update at all."""
    lora = random_lora(((48, 64), (64, 48)), rank=8, seed=1)
    moments = statistics(lora)
    plain = api.convert(lora, "bone", rank=8).compact
    weighted = api.convert(lora, "bone", rank=8, statistics=moments).compact
    (one,), (two,) = (api.compare(lora, [compact], statistics=moments) for compact in (plain, weighted))
    assert one.captured > two.captured and two.output_captured > one.output_captured + 0.2


# --- few bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", ["1", "2", "4"])
@pytest.mark.parametrize("options", [{}, {"variant": "mini", "mini_rank": 4}, {"group_size": 7}])
def test_what_rounding_loses_is_fed_back(bits, options):
    """Under statistics the quantized block is better than its rows rounded one by one."""
    lora = random_lora(SHAPES, rank=6)
    context = FitContext(statistics=statistics(lora))
    config = METHOD.plan(lora, BoneOptions(rank=8, bits=bits, **options), None, context)
    ours = CompactAdapter("bone", config, lora.shapes(), METHOD.fit(lora, config, context))
    exact = replace(config, bits=16, group_size=0)
    blocks = METHOD.fit(lora, exact, context)["blocks"]
    size = config.group_size or None
    codes, scales, at = [], [], 0
    for which, target in enumerate(lora.shapes()):
        columns = config.columns(which, target)
        for row in blocks[at : at + 8 * columns].reshape(8, columns):
            for start in range(0, columns, size or columns):
                code, scale = packing.quantize_rows(row[None, start : start + (size or columns)], int(bits))
                codes.append(code[0])
                scales.append(scale[0])
        at += 8 * columns
    apart = {"blocks": np.concatenate(codes), "scales": packing.round_half(np.array(scales))}
    theirs = CompactAdapter("bone", config, lora.shapes(), apart)
    assert {k: v.shape for k, v in apart.items()} == {k: v.shape for k, v in ours.tensors.items()}
    least = lost(lora, CompactAdapter("bone", exact, lora.shapes(), {"blocks": blocks}), context)
    assert lost(lora, ours, context) - least < 0.85 * (lost(lora, theirs, context) - least)


def test_more_bits_keep_more():
    lora = random_lora(SHAPES, rank=6)
    for shard in ("in", "out"):
        for moments in (None, statistics(lora)):
            context = FitContext(statistics=moments)
            left = [
                lost(lora, api.convert(lora, "bone", rank=6, bits=q, shard=shard, statistics=moments).compact, context)
                for q in (1, 2, 4, 8, 16)
            ]
            assert left == sorted(left, reverse=True)


def test_what_planning_expects_comes_true():
    """Values of blocks as the plan sees them, against the fit."""
    lora = random_lora(((96, 64), (64, 96), (48, 80)), rank=8, decay=0.9)
    for moments in (None, statistics(lora)):
        context = FitContext(statistics=moments)
        for bits in ("16", "4", "1"):
            plan = Plan(lora, BoneOptions(rank=16, bits=bits, shard="auto"), None, context)
            ((value, config),) = plan._uniform()
            done = CompactAdapter("bone", config, lora.shapes(), METHOD.fit(lora, config, context))
            energy = sum(np.sum(svd.singular_values(p, context.metric(p)) ** 2) for p in lora.targets)
            assert abs(value / energy - (1 - lost(lora, done, context))) < (0.06 if bits == "1" else 0.01)


# --- planning -------------------------------------------------------------------------------------------------------


def test_the_budget_is_used():
    lora = random_lora(((96, 64), (64, 96), (64, 64)), rank=6, decay=0.6)
    for options in ({}, {"shard": "auto"}, {"bits": "4"}, {"variant": "mini"}, {"peft_compatible": True}):
        for limit in (2600, 3300, 4000):
            done = api.convert(lora, "bone", target_size=limit, **options)
            assert 0.75 * limit < done.sizes.adapter <= limit
            if "bits" in options:
                assert done.compact.config.bits == 4


def test_captured_never_falls_with_the_budget_under_statistics():
    lora = random_lora(((96, 64), (64, 96), (64, 64)), rank=6, decay=0.6)
    context = FitContext(statistics=statistics(lora))
    for options in ({}, {"shard": "auto"}, {"peft_compatible": True}):
        left = [
            lost(
                lora,
                api.convert(lora, "bone", target_size=n, statistics=context.statistics, **options).compact,
                context,
            )
            for n in (1500, 2000, 3000, 4500)
        ]
        assert left == sorted(left, reverse=True)


def test_peft_compatible_keeps_to_one_rank():
    lora = random_lora(((96, 64), (64, 96)), rank=6)
    for options in ({"rank": 100}, {"target_size": 1500}, {"variant": "mini", "target_size": 1400}):
        config = api.convert(lora, "bone", peft_compatible=True, **options).compact.config
        assert len(set(config.ranks)) == 1 and not any(config.turned)


def test_more_goes_where_more_is():
    lora = random_lora(((64, 64), (64, 64), (64, 64)), rank=4)
    strong = [replace(p, scale=s) for p, s in zip(lora.targets, (8.0, 0.5, 0.0), strict=True)]
    config = api.convert(replace(lora, targets=tuple(strong)), "bone", target_size=1400).compact.config
    assert config.ranks[0] > config.ranks[1] >= config.ranks[2] == 0


def test_hulls_and_grids():
    assert _grid(17) == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16] and _grid(1) == [1]
    lora = random_lora(((32, 64),))
    (points,) = Plan(lora, BoneOptions(rank=3), None, FitContext())._points(lora.targets, {False: _grid(64)})
    for bits in (16, 4, 1):
        hull = _hull(points, bits, 0)
        slopes = [(two[1] - one[1]) / (two[0] - one[0]) for one, two in pairwise(hull)]
        assert hull[0][:2] == (0, 0.0) and slopes == sorted(slopes, reverse=True) and min(slopes) > 0


@pytest.mark.parametrize("shard", ["in", "out", "auto"])
def test_targets_of_equal_shapes_are_looked_at_together(shard):
    """What blocks of a target keep is the same number, to the bit, alone and beside others of its shape."""
    lora = random_lora([(24, 30), (30, 24), (24, 30), (24, 30)], rank=3)
    plan = Plan(lora, BoneOptions(shard=shard), Budget(1 << 20, lambda config: 0), FitContext())
    ranks = [plan._ranks(pair) for pair in lora.targets]
    alone = [plan._points([pair], own)[0] for pair, own in zip(lora.targets, ranks, strict=True)]
    assert plan._all_points(ranks) == alone


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 5000}, "rank is 5000"),
        ({"group_size": -1}, "group_size"),
        ({"mini_rank": 4}, "variant='mini'"),
        ({"variant": "mini", "mini_rank": 3}, "4 or a divisor"),
        ({"variant": "mini", "mini_rank": 0}, "mini_rank is 0"),
        ({"variant": "mini", "shard": "out"}, "contradict"),
        ({"peft_compatible": True, "shard": "out"}, "contradict"),
        ({"variant": "bat"}, "weights of the base"),
        ({"bits": 5}, "bone takes auto, 16"),
    ],
)
def test_impossible_options(options, match):
    with pytest.raises(errors.OptionError, match=match):
        api.convert(random_lora(SHAPES), "bone", **options)


# --- what a file may hold -------------------------------------------------------------------------------------------


TARGETS = (Target("a.weight", (12, 8)), Target("b.weight", (8, 14)), Target("c.weight", (4, 6)))


@pytest.mark.parametrize(
    "config",
    [
        complete(TARGETS, (3, 3, 3)),
        complete(TARGETS, (8, 5, 0), (False, True, True), bits=2, group_size=5),
        complete(TARGETS, (3, 4, 6), bits=EXACT, mini_rank=4),
        complete(TARGETS, (2, 2, 2), (True, True, True), bits=8),
        complete(TARGETS, (0, 0, 6)),
    ],
)
def test_expand_is_the_written_formula(config, tmp_path):
    """... written out entry by entry; the file comes back as it was."""
    compact = random_compact(METHOD, config, TARGETS)
    file.write(compact, tmp_path / "x.lrc")
    again = file.read(tmp_path / "x.lrc")
    assert again.config == config and all(np.array_equal(again.tensors[k], v) for k, v in compact.tensors.items())
    numbers, scales = compact.tensors["blocks"], iter(compact.tensors.get("scales", np.zeros(0)))
    at = 0
    for which, (target, (_, a, b)) in enumerate(zip(TARGETS, methods.expand_all(again), strict=True)):
        (out, inner), rank = target.matrix_shape, config.ranks[which]
        columns = config.mini_rank or (inner if config.turned[which] else out)
        block = np.zeros((rank, columns), np.float32)
        for k in range(rank):
            for n in range(columns):
                if config.bits < 16 and n % (config.group_size or columns) == 0:
                    scale = next(scales)
                block[k, n] = numbers[at]
                if config.bits < 16:
                    block[k, n] = np.float32(2.0 * numbers[at] + 1 - 2**config.bits) * scale
                at += 1
        update = np.zeros((out, inner))
        for o in range(out):
            for i in range(inner):
                k, n = (o, i) if config.turned[which] else (i, o)
                update[o, i] = block[k % rank, n % columns] if rank else 0
        assert np.array_equal(b.astype(np.float64) @ a, update) and a.shape[0] == rank
    assert at == len(numbers) and next(scales, None) is None


def header_of(**change):
    config = complete(TARGETS, (3, 5, 0), (False, True, False), bits=4, group_size=5)
    return {**METHOD.header(config), **change}, METHOD.layout(config)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"variant": "bit"}, errors.JsonSyntaxError),
        ({"variant": "bat"}, errors.CanonicalError),
        ({"variant": "bat", "shard": "in"}, errors.LimitError),
        ({"variant": ["bone"]}, errors.JsonSyntaxError),
        ({"shard": "both"}, errors.JsonSyntaxError),
        ({"uniform": 0}, errors.JsonSyntaxError),
        ({"bits": 5}, errors.LimitError),
        ({"bits": True}, errors.LimitError),
        ({"bits": 16}, errors.CanonicalError),
        ({"rank": 0}, errors.LimitError),
        ({"rank": 6}, errors.CanonicalError),
        ({"rank": 5000}, errors.LimitError),
        ({"rank": "5"}, errors.LimitError),
        ({"group_size": -1}, errors.LimitError),
        ({"group_size": 14}, errors.CanonicalError),
        ({"mini_rank": 1}, errors.LimitError),
        ({"variant": "mini"}, errors.LimitError),
        ({"variant": "mini", "mini_rank": 4}, errors.CanonicalError),
        ({"variant": "mini", "mini_rank": 5, "shard": "in", "group_size": 0}, errors.LimitError),
    ],
)
def test_headers_are_checked(change, error):
    header, layout = header_of(**change)
    with pytest.raises(error):
        METHOD.layout_specs(header, TARGETS)
        METHOD.config(header, layout, TARGETS)


@pytest.mark.parametrize(
    ("name", "values", "error"),
    [
        ("ranks", [3, 3, 0], errors.CanonicalError),
        ("ranks", [5, 5, 5], errors.CanonicalError),
        ("ranks", [3, 5, 1], None),
        ("shards", [0, 1, 1], errors.CanonicalError),
        ("shards", [0, 0, 0], errors.CanonicalError),
        ("shards", [1, 1, 0], errors.CanonicalError),
        ("shards", [1, 0, 0], None),
    ],
)
def test_layouts_are_checked(name, values, error):
    header, layout = header_of()
    layout[name] = np.array(values, np.uint32)
    if error is None:
        METHOD.config(header, layout, TARGETS)
        return
    with pytest.raises(error):
        METHOD.config(header, layout, TARGETS)


def test_ranks_stay_within_the_side_that_is_tiled():
    for turned, ranks in ((False, (9, 1, 1)), (True, (1, 9, 1))):
        config = complete(TARGETS, ranks, [turned] * 3)
        with pytest.raises(errors.LimitError, match="more than its shape"):
            METHOD.config(METHOD.header(config), METHOD.layout(config), TARGETS)
    config = complete(TARGETS, (8, 14, 6))  # more than the outputs
    assert METHOD.config(METHOD.header(config), METHOD.layout(config), TARGETS) == config
