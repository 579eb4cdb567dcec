"""Laws that every method obeys, run over the registry: a new method is tested here without a line of its own."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import FIXTURES, dense, random_lora
from models import updates, wanted_base

from lrconvert import api
from lrconvert.cli.converting import method_command
from lrconvert.convert.options import ConvertOptions
from lrconvert.core import errors
from lrconvert.core.dtypes import Stored
from lrconvert.core.options import names
from lrconvert.formats.lrc import file
from lrconvert.formats.lrc.validation import validate
from lrconvert.lora.adapter import TRANSPOSED, CompactAdapter, LoraAdapter, Target, View
from lrconvert.methods import base as methods

CASES = [(m.id, n) for m in methods.all_methods() for n in range(len(m.examples))]
METHODS = [m.id for m in methods.all_methods()]


def source() -> LoraAdapter:
    """Shapes that divide evenly and that do not, one transposed, one a convolution in three dimensions; enough numbers
    for every form's small settings."""
    straight = random_lora([(96, 64), (64, 96), (40, 72)], rank=6, seed=1)
    turned = random_lora([(64, 128)], rank=6, seed=2, view=TRANSPOSED).targets[0]
    named = replace(turned, target=replace(turned.target, name="turned.weight"))
    film = random_lora([(32, 64)], rank=6, seed=3).targets[0]
    film = replace(film, target=Target("film.weight", (32, 16, 1, 2, 2), View("conv:1x2x2:1")))
    return replace(straight, targets=(film, *straight.targets, named))


_CACHE: dict[tuple[str, int], api.Conversion] = {}


def converted(method: str, example: int) -> api.Conversion:
    key = (method, example)
    if key not in _CACHE:
        _CACHE[key] = again(source(), method, example)
    return _CACHE[key]


def again(lora: LoraAdapter, method: str, example: int, **more: Any) -> api.Conversion:
    options = methods.get(method).examples[example]
    return api.convert(lora, method, **options, **wanted_base(method, options, lora), **more)


def same(one: CompactAdapter, two: CompactAdapter) -> bool:
    return replace(one, tensors={}) == replace(two, tensors={}) and all(
        np.array_equal(one.tensors[k], two.tensors[k]) for k in {*one.tensors, *two.tensors}
    )


def test_ids_are_file_names():
    assert [m.id for m in methods.all_methods()] == methods.module_names()
    commands = [c.name for m in methods.all_methods() for c in m.commands]
    assert len(set(commands)) == len(commands) and all(c.startswith("lora-to-") for c in commands)


@pytest.mark.parametrize(("method", "example"), CASES)
def test_read_write(method, example, tmp_path):
    done = converted(method, example)
    assert file.write(done.compact, tmp_path / "x.lrc") == done.sizes
    assert (tmp_path / "x.lrc").stat().st_size == done.sizes.total
    assert same(file.read(tmp_path / "x.lrc"), done.compact)
    assert validate(tmp_path / "x.lrc").ok


@pytest.mark.parametrize(("method", "example"), CASES)
def test_dry_run_is_exact(method, example):
    planned = again(source(), method, example, dry_run=True)
    done = converted(method, example)
    assert planned.sizes == done.sizes and planned.compact.config == done.compact.config
    assert planned.fidelity is None and not planned.compact.tensors


@pytest.mark.parametrize(("method", "example"), CASES)
@pytest.mark.medium
def test_fit_is_deterministic(method, example):
    assert same(again(source(), method, example).compact, converted(method, example).compact)


@pytest.mark.parametrize(("method", "example"), CASES)
def test_expand_is_the_same_on_numpy_and_torch(method, example):
    import torch

    compact, form = converted(method, example).compact, methods.get(method)
    ranks = form.ranks(compact.config, compact.targets)
    pairs = zip(methods.without_base(compact), methods.without_base(compact, torch), ranks, strict=True)
    for which, ((target, a, b), (_, ta, tb), rank) in enumerate(pairs):
        assert a.shape == (rank, target.in_features) and b.shape == (target.out_features, rank)
        assert a.dtype == b.dtype == np.float32 and ta.dtype == tb.dtype == torch.float32
        assert np.array_equal(a, ta.numpy()) and np.array_equal(b, tb.numpy())
        assert np.isfinite(a).all() and np.isfinite(b).all()
        if form.needs_base(compact.config):
            weight = np.random.default_rng(which).standard_normal(target.matrix_shape)
            ours = form.rows_on(compact.config, compact.targets, which, (a, b), weight, 0)
            theirs = form.rows_on(compact.config, compact.targets, which, (ta, tb), torch.from_numpy(weight), 0)
            assert np.allclose(ours, theirs.numpy(), atol=1e-12) and ours.dtype == np.float64


@pytest.mark.parametrize(("method", "example"), CASES)
def test_report_is_the_dense_truth(method, example):
    """Captured energy as reported, against the dense updates."""
    done = converted(method, example)
    error = energy = 0.0
    base = wanted_base(method, methods.get(method).examples[example], source()).get("base")
    for pair, update in zip(source().targets, updates(done.compact, base), strict=True):
        delta = dense(pair)
        error += np.sum((delta - update) ** 2)
        energy += np.sum(delta**2)
    assert done.fidelity is not None
    assert np.isclose(done.fidelity.captured, 1 - error / energy, atol=1e-9)
    assert -1e-9 < done.fidelity.captured <= 1


@pytest.mark.parametrize("method", METHODS)
def test_gauge_does_not_matter(method):
    """(B G, G^-1 A) is the same adapter: it keeps as much of it."""
    rng = np.random.default_rng(5)
    pairs = []
    for pair in source().targets:
        g = rng.standard_normal((pair.rank, pair.rank))
        a, b = np.linalg.inv(g) @ pair.A.astype(np.float64), pair.B.astype(np.float64) @ g
        pairs.append(replace(pair, a=Stored("F64", a), b=Stored("F64", b)))
    moved = replace(source(), targets=tuple(pairs))
    example = methods.get(method).examples[0]
    captured = [api.convert(lora, method, **example).fidelity.captured for lora in (source(), moved)]
    assert abs(captured[0] - captured[1]) < 1e-3


@pytest.mark.medium
@pytest.mark.parametrize("method", METHODS)
def test_captured_never_falls_with_the_budget(method):
    lora = api.load_lora(FIXTURES / "adapters" / "llama-plain")
    captured, sizes = [], []
    for share in (0.12, 0.2, 0.35, 0.6):
        limit = int(lora.half_bytes * share)
        done = api.convert(lora, method, target_size=limit)
        assert done.sizes.adapter <= limit
        captured.append(done.fidelity.captured)
        sizes.append(done.sizes.adapter)
    assert captured == sorted(captured), list(zip(sizes, captured, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_an_impossible_budget_names_the_smallest_size(method):
    lora = source()
    with pytest.raises(errors.BudgetError) as caught:
        api.convert(lora, method, target_size=100)
    smallest = int(str(caught.value).split(" bytes")[-2].split()[-1].replace(",", ""))
    assert api.convert(lora, method, target_size=smallest).sizes.adapter <= smallest
    with pytest.raises(errors.BudgetError):
        api.convert(lora, method, target_size=smallest // 2)


UNDER_OPTIONS = [
    *(("bone", options) for options in ({"rank": 8}, {"peft_compatible": True}, {"variant": "mini"}, {"bits": "16"})),
    *(("sbora", options) for options in ({"rank": 4}, {"variant": "fa"}, {"variant": "fb", "bits": "8"})),
    *(("vblora", options) for options in ({"rank": 4}, {"vector_length": 16, "num_vectors": 64})),
    ("vblora", {"peft_compatible": True}),
]


@pytest.mark.parametrize(("method", "options"), UNDER_OPTIONS)
def test_an_impossible_budget_names_the_smallest_size_under_options(method, options):
    lora = random_lora([(96, 64), (64, 96)], rank=4)
    with pytest.raises(errors.BudgetError) as caught:
        api.convert(lora, method, target_size=100, **options)
    smallest = int(re.search(r"smallest possible file has (\d+)", str(caught.value))[1])
    assert api.convert(lora, method, target_size=smallest, **options).sizes.adapter <= smallest


@pytest.mark.parametrize(("method", "example"), CASES)
def test_header_and_layout_are_the_config(method, example):
    """They give the config back, and a header lacks no field and has no other."""
    compact, form = converted(method, example).compact, methods.get(method)
    header, layout = form.header(compact.config), form.layout(compact.config)
    specs = form.layout_specs(header, compact.targets)
    assert [s.name for s in specs] == list(layout) and all(layout[s.name].shape == s.shape for s in specs)
    assert all(int(layout[s.name].max()) < s.limit for s in specs)
    assert form.config(header, layout, compact.targets) == compact.config
    for name in header:
        with pytest.raises(errors.MissingFieldError, match=name):
            form.layout_specs({key: value for key, value in header.items() if key != name}, compact.targets)
    with pytest.raises(errors.UnknownFieldError, match="colour"):
        form.layout_specs({**header, "colour": 1}, compact.targets)


@pytest.mark.parametrize("method", METHODS)
def test_zero_updates_stay_zero(method):
    """An adapter with one all-zero target: that target's expansion adds nothing; an all-zero adapter converts too."""
    lora = source()
    silent = [replace(p, b=Stored("F32", np.zeros_like(p.B))) for p in lora.targets]
    for pairs in ((silent[0], *lora.targets[1:]), tuple(silent)):
        done = api.convert(replace(lora, targets=pairs), method, **methods.get(method).examples[0])
        for pair, (_, a, b) in zip(pairs, methods.expand_all(done.compact), strict=True):
            if not pair.B.any():
                assert np.abs(b @ a).max() == 0 if a.size else True


@pytest.mark.parametrize("method", METHODS)
def test_extras_ride_along_and_do_not_count(method, tmp_path):
    lora = api.load_lora(FIXTURES / "adapters" / "bert-classifier")
    assert lora.extras
    with_extras = api.convert(lora, method, **methods.get(method).examples[0])
    without = api.convert(replace(lora, extras=()), method, **methods.get(method).examples[0])
    assert with_extras.sizes.adapter == without.sizes.total
    file.write(with_extras.compact, tmp_path / "x.lrc")
    assert file.read(tmp_path / "x.lrc").extras == lora.extras


@pytest.mark.parametrize("method", METHODS)
def test_what_a_fit_does_not_use_is_no_option_of_its_command(method):
    """And what it does not use changes nothing."""
    form = methods.get(method)
    assert not set(names(form.Options)) & set(names(ConvertOptions)), "a keyword would mean two things"
    for command in form.commands:
        shown = {option.name for option in method_command(command.name).params}
        for use in ("seed", "device", "statistics"):
            assert (use in shown) == (use in form.uses), (command.name, use)
    if "seed" not in form.uses:
        one, other = (api.convert(source(), method, seed=seed, **dict(form.examples[0])).compact for seed in (0, 7))
        assert all(np.array_equal(array, other.tensors[name]) for name, array in one.tensors.items())


@pytest.mark.parametrize("method", METHODS)
def test_unknown_options_are_refused(method):
    with pytest.raises(errors.OptionError, match="no option 'colour'"):
        api.convert(source(), method, colour="red")


def test_options_outside_their_choices_are_refused():
    with pytest.raises(errors.OptionError, match="sbora takes auto, 16"):
        api.convert(source(), "sbora", bits=5)


@pytest.mark.parametrize(("bits", "size"), [(0, None), (15.5, None), (float("nan"), None), (4, 2000)])
def test_bits_of_lowrank_out_of_range_or_beside_a_size_are_refused(bits, size):
    with pytest.raises(errors.OptionError, match="bits"):
        api.convert(source(), "lowrank", bits=bits, target_size=size)


def test_the_smallest_lowrank_file_holds_the_largest_of_equal_components():
    lora = random_lora(((24, 16), (24, 16), (24, 16)))
    small = [replace(p, scale=p.scale * f) for p, f in zip(lora.targets, (1e-6, 1.0, 1e-3), strict=True)]
    lora = replace(lora, targets=tuple(small))
    with pytest.raises(errors.BudgetError) as caught:
        api.convert(lora, "lowrank", target_size=10)
    least = int(re.search(r"smallest possible file has (\d+)", str(caught.value))[1])
    assert api.convert(lora, "lowrank", target_size=least).fidelity.captured > 0.2
