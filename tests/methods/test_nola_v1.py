"""NOLA, version 1: what its files may say, and what they mean; none are made any more."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import FIXTURES
from fits import RNG, random_compact, written_transform

from lrconvert import api
from lrconvert.core import errors
from lrconvert.lora import prng
from lrconvert.lora.adapter import Target
from lrconvert.lora.prng import hadamard
from lrconvert.methods import base as methods
from lrconvert.methods.nola.basis import DENSE, HADAMARD, Basis
from lrconvert.methods.nola.v1 import METHOD, Config, Form, complete

# --- bases ----------------------------------------------------------------------------------------------------------


def vectors(basis: Basis) -> np.ndarray:
    return np.array([basis.combine(row) for row in np.eye(basis.count)])


@pytest.mark.parametrize("family,name", [(HADAMARD, "sign"), (DENSE, "u8"), (DENSE, "u24"), (DENSE, "sign")])
def test_bases_are_nested(family, name):
    whole = vectors(Basis(family, name, 5, "B", 344, 60))
    assert np.array_equal(vectors(Basis(family, name, 5, "B", 344, 17)), whole[:17])
    assert not np.array_equal(vectors(Basis(family, name, 5, "A", 344, 60)), whole)
    assert not np.array_equal(vectors(Basis(family, name, 6, "B", 344, 60)), whole)
    if family == HADAMARD:
        assert np.array_equal(whole @ whole.T, 344 * 43 * np.eye(60))


def test_dense_bases_are_the_stream():
    drawn = vectors(Basis(DENSE, "u8", 5, "A", 300, 9))
    assert np.array_equal(drawn, prng.values(prng.Stream(5, "nola/A/300/basis"), "u8", range(9), 0, 300, "float64"))


@pytest.mark.parametrize("d", [1, 2, 3, 12, 43 * 8, 129, 131 * 4])
def test_no_number_of_a_vector_is_larger_than_said(d):
    assert np.abs(written_transform(d)).max() <= Basis(HADAMARD, "sign", 0, "A", d, 1).largest


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
                rows = written_transform(d)[order] * sigma
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


@pytest.mark.parametrize("path", sorted((FIXTURES / "golden" / "v2" / "nola.1").glob("*.lrc")), ids=lambda p: p.stem)
def test_files_are_still_refined(path):
    """In training they begin as they are, at every width, and have gradients."""
    compact = api.read(path)
    student = METHOD.student(compact)
    again = student.compact()
    assert all(np.array_equal(again.tensors[name], tensor) for name, tensor in compact.tensors.items())
    values = student.values(training=True)
    pairs = [student.factors(values, which) for which in range(len(compact.targets))]
    sum((b @ a).square().sum() for a, b in pairs).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in student.parameters() if p.numel())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family,name", [(HADAMARD, "sign"), (DENSE, "u8"), (DENSE, "u24")])
def test_sums_have_the_same_bits_on_a_gpu(family, name):
    for d, k in ((65536, 512), (43 * 4096, 700), (5003, 4000), (2**16, 2**16 if family == HADAMARD else 64)):
        basis = Basis(family, name, 1, "A", d, k)
        numbers = 2.0 * RNG(0).integers(0, 2**16, k) + 1 - 2**16
        on_gpu = basis.combine(torch.from_numpy(numbers).cuda(), torch)
        assert np.array_equal(on_gpu.cpu().numpy(), basis.combine(numbers))
