"""Low rank, version 2: one step for all components, the components that capture most, and exact sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import asset, random_lora
from fits import captured

from lrconvert import api
from lrconvert.core.dtypes import Stored
from lrconvert.core.errors import BudgetError, CanonicalError, OptionError
from lrconvert.formats.lrc import file
from lrconvert.lora.adapter import LoraAdapter, LoraTarget, Target
from lrconvert.methods import base as methods
from lrconvert.methods.base import FitContext
from lrconvert.methods.lowrank import METHOD
from lrconvert.methods.lowrank import components as rows
from lrconvert.methods.lowrank.components import Components, StreamedComponents, components
from lrconvert.methods.lowrank.form import factors
from lrconvert.methods.lowrank.plan import LowRankOptions, chosen
from lrconvert.methods.lowrank.rounding import LARGEST_INTEGER, integers, round_all
from lrconvert.methods.nola import Config as NolaConfig


def decaying(targets: int = 6, rank: int = 8, size: int = 256) -> LoraAdapter:
    """Targets of one shape whose spectra decay, each from another height."""
    rng = np.random.default_rng(5)
    pairs = []
    for n in range(targets):
        decay = (0.7 ** np.arange(rank) * 0.5**n)[:, None].astype(np.float32)
        a, b = rng.standard_normal((2, rank, size)).astype(np.float32)
        target = Target(f"layers.{n}.w", (size, size))
        pairs.append(LoraTarget(target, Stored("F32", a * decay), Stored("F32", b.T.copy()), 1.0))
    return LoraAdapter(tuple(pairs))


def kept_by(**options: Any) -> float:
    done = api.convert(decaying(), "lowrank", **options)
    assert done.fidelity is not None
    return done.fidelity.captured


@pytest.mark.parametrize("share", [0.1, 0.05, 0.03])
def test_a_budget_is_used_and_never_exceeded(share: float) -> None:
    """A file is as large as it may be, but for less than a hundredth."""
    lora = decaying()
    size = int(lora.half_bytes * share)
    done = api.convert(lora, "lowrank", target_size=size)
    written = len(b"".join(file.encode(done.compact)))
    assert 0.985 * size - 40 <= written == done.sizes.adapter <= size  # a refinement will state the budget


@pytest.mark.parametrize("share", [0.1, 0.04])
def test_a_dry_run_knows_the_size(share: float) -> None:
    """What a dry run says is what is written, byte for byte."""
    lora = decaying()
    options = {"target_size": int(lora.half_bytes * share)}
    dry = api.convert(lora, "lowrank", dry_run=True, **options)
    assert dry.sizes == api.convert(lora, "lowrank", **options).sizes and not dry.compact.tensors


def test_more_bytes_capture_more() -> None:
    shares = [kept_by(target_size=size) for size in (2500, 4000, 6500, 13000)]
    assert shares == sorted(shares) and shares[-1] > 0.95


def test_finer_numbers_capture_more() -> None:
    """At 12 bits and more what is lost is less than bfloat16 loses."""
    shares = [kept_by(bits=bits) for bits in (0.5, 1, 2, 4, 8, 12)]
    assert shares == sorted(shares) and shares[-1] > 1 - 1e-6


@pytest.mark.parametrize("options", [{}, {"bits": 3}, {"target_size": 6000}])
def test_ranks_are_limited(options: dict[str, Any]) -> None:
    for rank in (1, 3):
        counts = api.convert(decaying(), "lowrank", rank=rank, **options).compact.config.counts
        assert 0 < max(counts) <= rank
    limited = api.convert(decaying(), "lowrank", dynamic_method="sv_fro", dynamic_param=0.8, **options)
    assert max(limited.compact.config.counts) < 8


def test_equal_targets_share_a_small_budget_fairly() -> None:
    """Where all components are alike a budget keeps some of them, not all or none."""
    rng = np.random.default_rng(0)
    pairs = []
    for n in range(16):
        a, b = (np.linalg.qr(rng.standard_normal((128, 4)))[0].astype(np.float32) for _ in range(2))
        pairs.append(LoraTarget(Target(f"l.{n:02}.w", (128, 128)), Stored("F32", a.T.copy()), Stored("F32", b), 1.0))
    lora = LoraAdapter(tuple(pairs))
    done = api.convert(lora, "lowrank", target_size=3000)
    assert done.fidelity is not None
    assert 8 <= sum(done.compact.config.counts) < 64 and done.fidelity.captured > 0.1


def test_a_budget_below_the_smallest_file_names_it() -> None:
    lora = decaying()
    with pytest.raises(BudgetError, match=r"smallest possible file has \d+ bytes") as caught:
        api.convert(lora, "lowrank", target_size=100)
    smallest = int(str(caught.value).split("has ")[1].split()[0])
    assert api.convert(lora, "lowrank", target_size=smallest).sizes.adapter <= smallest


def test_a_budget_is_not_filled_with_useless_bits() -> None:
    """Where all components fit at the default bits, a larger budget makes the same file."""
    lora = decaying()
    plain = api.convert(lora, "lowrank", rank=1).compact
    assert api.convert(lora, "lowrank", rank=1, target_size=20_000).compact.config == plain.config


def test_an_adapter_of_zeros_makes_a_valid_file() -> None:
    lora = random_lora()
    zeros = [replace(pair, b=Stored("F32", np.zeros_like(pair.B))) for pair in lora.targets]
    compact = api.convert(replace(lora, targets=tuple(zeros)), "lowrank", bits=12).compact
    assert sum(compact.config.counts) == 1
    assert not any((b @ a).any() for _, a, b in methods.expand_all(compact))


def test_gains_are_the_best_ones() -> None:
    """No other gains capture more than those that least squares finds."""
    lora = decaying(targets=1)
    context = FitContext()
    config = METHOD.plan(lora, LowRankOptions(bits=1), None, context)
    tensors = METHOD.fit(lora, config, context)
    best = captured(METHOD, lora, config, tensors)
    rng = np.random.default_rng(0)
    for _ in range(5):
        moved = tensors["gains"] * (1 + 0.02 * rng.standard_normal(len(tensors["gains"])))
        assert captured(METHOD, lora, config, {**tensors, "gains": moved.astype(np.float32)}) < best


def test_input_statistics_are_the_metric_of_the_fit() -> None:
    """Where some inputs matter a hundred times more, a fit that knows it keeps more of the output."""
    from lrconvert.lora.input_statistics import Moment

    rng = np.random.default_rng(3)
    pair = decaying(targets=1).targets[0]
    squares = np.where(rng.random(256) < 0.2, 100.0, 0.01).astype(np.float32)
    moment = Moment(1000, diagonal=squares, rows=np.zeros((0, 256), np.float32))

    class Known(FitContext):
        def metric(self, pair: LoraTarget) -> Moment:
            return moment

    lora, errors = LoraAdapter((pair,)), []
    for context in (FitContext(), Known()):
        config = METHOD.plan(lora, LowRankOptions(bits=1), None, context)
        numbers = {
            "gains": (tensors := METHOD.fit(lora, config, context))["gains"],
            "codes": np.float32(16) * tensors["codes"] - np.sign(tensors["codes"]),
        }
        a, b = METHOD.expand(config, lora.shapes(), numbers, 0, np)
        rest = pair.B.astype(np.float64) @ pair.A - b.astype(np.float64) @ a
        errors.append((float((rest**2 * squares).sum()), config.length))
    assert errors[1][0] < errors[0][0] and errors[1][1] < 1.1 * errors[0][1]


def test_chosen_components_fit_and_capture_most() -> None:
    """The choice is as good as any other of as many bits, by trying random ones."""
    rng = np.random.default_rng(1)
    lora = decaying()
    parts = components(lora, [8] * 6, FitContext())
    rounded = round_all(parts, 0.3 * parts.steps()[1])
    cost, worth = rounded.bits + 28, parts.energy * rounded.share
    places = chosen(parts, rounded, 8000.0)
    assert cost[places].sum() <= 8000
    for _ in range(200):
        order = rng.permutation(len(cost))
        fitting = order[np.cumsum(cost[order]) <= 8000]
        assert worth[fitting].sum() <= worth[places].sum() * 1.001


def test_a_sample_stands_for_all() -> None:
    parts = components(decaying(size=2048), [8] * 6, FitContext())
    step = 0.2 * parts.steps()[1]
    whole, sample = (round_all(p, step).bits.sum() for p in (parts, parts.sampled(30_000)))
    assert abs(sample / whole - 1) < 0.1


@pytest.mark.parametrize("method", ["lowrank", "nola"])
@pytest.mark.parametrize("options", [{"bits": 12}, {"bits": 2, "rank": 3}, {"target_size": 1500}])
def test_rows_that_are_made_again_give_the_same_file(
    method: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that are kept in memory and rows that are made at every look, on threads, lead to the same bytes: also of
    targets whose factors are nearly dependent, that have fewer rows than their rank, and that are zero."""
    lora = random_lora([(48, 64), (40, 130), (48, 64), (6, 32), (32, 48), (48, 64), (96, 66)], rank=8)
    pairs = list(lora.targets)
    for n, b in {2: np.ones((48, 8), np.float32), 4: np.zeros((32, 8), np.float32)}.items():
        pairs[n] = replace(pairs[n], b=Stored("F32", b))
    lora = replace(lora, targets=tuple(sorted(pairs, key=lambda pair: pair.target)))
    kept = b"".join(file.encode(api.convert(lora, method, **options).compact))
    monkeypatch.setattr(rows, "_IN_MEMORY", 1000)
    monkeypatch.setattr(rows, "_threads", lambda: 3)
    assert isinstance(components(lora, [8] * len(pairs), FitContext()), StreamedComponents)
    assert b"".join(file.encode(api.convert(lora, method, **options).compact)) == kept


@pytest.mark.parametrize("method", ["lowrank", "nola"])
def test_samples_are_of_the_same_rows(method: str) -> None:
    """What is sampled of rows that are made at every look are some numbers of these rows."""
    lora = random_lora([(512, 4096), (4096, 390)], rank=4)
    coordinates = methods.get(method).coordinates(NolaConfig((4,), ((0, 0),), 0, seed=7))
    stream = StreamedComponents.of(lora.targets, np.array([4, 3]), FitContext(), coordinates)
    blocks: dict[int, Components] = {}
    stream.each(lambda places, block: blocks.update({int(places[0]): block}))
    for which, sides in enumerate(stream.sampled(2000).sides):
        for side in sides:
            whole = blocks[int(side.places[0])].sides[which][0].rows
            picked = whole[:, :: min(stream.numel // 2000, whole.shape[1] // 32)]
            assert side.rows.shape == picked.shape and side.every == whole.shape[1] / picked.shape[1]
            np.testing.assert_allclose(side.rows, picked, rtol=1e-5, atol=1e-6 * np.abs(picked).max())


def test_integers_round_with_a_dead_zone() -> None:
    rows = np.array([[0, 0.59, 0.61, 1.59, 1.61, -0.61, -1.61, 1e9]], np.float32)
    assert integers(rows, 1.0).tolist() == [[0, 0, 1, 1, 2, -1, -2, LARGEST_INTEGER]]


def test_components_are_numbered_anew() -> None:
    parts = components(decaying(targets=2), [8, 8], FitContext())
    chosen = parts.only(np.array([1, 9]))
    assert isinstance(chosen, Components) and chosen.owners.tolist() == [0, 1]
    whole, part = round_all(parts, 0.1), round_all(chosen, 0.1)
    assert np.array_equal(whole.models[[1, 9]], part.models)
    assert np.allclose(whole.bits[[1, 9]], part.bits)


def test_headers_that_describe_other_tensors_are_refused() -> None:
    compact = api.convert(decaying(), "lowrank", bits=1).compact
    header, layout = METHOD.header(compact.config), METHOD.layout(compact.config)
    assert METHOD.config(header, layout, compact.targets) == compact.config
    for name in ("components", "max_count"):
        with pytest.raises(CanonicalError):
            METHOD.config({**header, name: header[name] + 1}, layout, compact.targets)


def test_factors_are_of_one_size_and_have_gradients() -> None:
    """In float16 too: neither factor is out of its range. Gradients are those of the product."""
    import torch

    compact = api.convert(decaying(), "lowrank", bits=14).compact
    for _, a, b in methods.expand_all(compact):
        assert (np.abs(a).max(axis=1) / np.abs(b).max(axis=0) > 2.0**-6).all()
        assert (np.abs(a).max(axis=1) / np.abs(b).max(axis=0) < 2.0**6).all() and np.abs(b).max() < 60000
    gains = torch.tensor([[0.3], [0.0], [-5.0], [2e-6]], requires_grad=True)
    a, b = factors(gains, torch.ones(4, 3), torch.ones(4, 2), torch)
    (b @ a).sum().backward()
    assert torch.equal(gains.grad, torch.full((4, 1), 6.0))


def test_version_1_is_read_not_made() -> None:
    earlier = methods.get("lowrank.v1")
    assert (earlier.id, earlier.version, METHOD.version) == ("lowrank", 1, 2)
    with pytest.raises(OptionError, match="read, not made"):
        api.convert(decaying(), "lowrank.v1")


CODED = {  # the least that a file keeps at these shares of the LoRA's bytes, whole files
    "distilbert_imdb": {0.08: 0.96, 0.016: 0.70, 0.008: 0.46},
    "gemma3_270m_svg_adapter": {0.08: 0.775, 0.04: 0.555, 0.016: 0.295, 0.008: 0.14, 0.004: 0.05},
}


@pytest.mark.parametrize("name", CODED)
def test_real_adapters_keep_what_they_kept(name: str) -> None:
    lora = api.load_lora(asset(f"adapters/{name}"))
    for share, least in CODED[name].items():
        done = api.convert(lora, "lowrank", target_size=int(share * lora.half_bytes))
        assert done.fidelity is not None and done.fidelity.captured > least, share
