"""NOLA: its transform against the matrix that the page writes out, its bases, and what its fits keep.

It is low rank in other coordinates, so tests of low rank hold here too where they speak of choices; what every method
must obey (round trips, determinism, numpy against torch, budgets) is in test_laws.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import asset, random_lora
from fits import RNG, convert, kept_by, lost, written_transform
from hypothesis import given, settings
from hypothesis import strategies as st

from lrconvert import api
from lrconvert.core import errors
from lrconvert.core.dtypes import Stored
from lrconvert.formats.lrc import file
from lrconvert.lora import prng
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter, LoraTarget, Target
from lrconvert.lora.coded.stream import LARGEST_INTEGER
from lrconvert.lora.input_statistics import Moment
from lrconvert.lora.prng import hadamard
from lrconvert.methods import base as methods
from lrconvert.methods.base import FitContext
from lrconvert.methods.nola import METHOD
from lrconvert.methods.nola.rotation import Rotation, sums_are_exact

LENGTHS = [1, 2, 3, 5, 8, 12, 43 * 8, 127 * 2, 129, 131 * 4, 5003, 4096]


# --- the transform --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [n for n in LENGTHS if n <= 600])
def test_the_transform_is_the_written_matrix(d):
    matrix = hadamard.transform(np.eye(d), np)
    assert np.array_equal(matrix, written_transform(d)) and np.array_equal(matrix, matrix.T)
    assert np.array_equal(matrix @ matrix, np.diag(np.broadcast_to(hadamard.squares(d), d)))


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


@pytest.mark.parametrize("d", [*LENGTHS, 1 << 17, 43 << 9])
def test_sums_of_integers_are_those_of_the_transform(d):
    """In both dtypes, up to the largest sums that are exact; beyond those of float32, `narrowed` says float64."""
    rng = RNG(d)
    for dtype, limit in ((np.float32, 1 << 24), (np.float64, 1 << 53)):
        most = max(1, int(0.9 * limit / hadamard.growth(d) / d))
        x = rng.choice([-most, most, most - 1], (3, d)).astype(np.float64)
        expected = hadamard.transform(x, np)
        assert hadamard.narrowed(x, d).dtype == dtype
        sums = hadamard.of_integers(x.astype(dtype))
        assert sums.dtype == dtype and np.array_equal(sums, expected)
        edge = np.full((1, d), float(most))  # all on one sum
        assert np.array_equal(hadamard.of_integers(edge.astype(dtype)), hadamard.transform(edge, np))
    assert hadamard.of_integers(np.zeros((0, d), np.float32)).shape == (0, d)


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


@pytest.mark.parametrize("d", [1, 12, 129])
def test_gradients_are_those_of_the_matrix(d):
    x = torch.from_numpy(RNG(d).standard_normal((3, d))).requires_grad_()
    came = RNG(1).standard_normal((3, d))
    hadamard.transform(x, torch).backward(torch.from_numpy(came))
    assert np.allclose(x.grad.numpy(), came @ written_transform(d))


# --- bases ----------------------------------------------------------------------------------------------------------


def written_basis(seed: int, role: str, d: int) -> np.ndarray:
    """The vectors of a basis, as rows: those of the page."""
    matrix = written_transform(d)
    signs = prng.values(prng.Stream(seed, f"nola/{role}/{d}/signs"), "sign", (0,), 0, d, "float64")[0]
    return matrix * signs * 2.0 ** -max(p for p in range(40) if 4**p <= np.sum(matrix[0] ** 2))


@pytest.mark.parametrize("d", [n for n in LENGTHS if n <= 600])
def test_rows_are_exact_sums_of_the_vectors_of_the_page(d):
    """Of the largest integers too, in numpy and torch; `numbers` inverts it, `unit` is the length of a vector."""
    rotation, basis = Rotation(2**64 - 1), written_basis(2**64 - 1, "B", d)
    integers = RNG(d).integers(-LARGEST_INTEGER, LARGEST_INTEGER + 1, (4, d)) * 16.0
    rows = rotation.rows(integers, "B")
    assert np.array_equal(rows, integers @ basis)
    assert np.array_equal(rows, rotation.rows(torch.from_numpy(integers), "B", torch).numpy())
    assert np.allclose(rotation.numbers(rows, "B"), integers)
    assert np.allclose(rotation.numbers(torch.from_numpy(rows), "B", torch).numpy(), integers)
    filled, scales = np.empty(integers.shape, np.float32), np.arange(1.0, len(integers) + 1)[:, None]
    rotation.fill(filled, scales, rows, "B")  # in the units of what is rounded
    assert np.allclose(filled, scales * integers * rotation.unit(d), rtol=1e-6, atol=1e-3)
    assert np.isclose(rotation.unit(d) ** 2, np.mean(np.sum(basis**2, axis=1))) and 2**-0.5 < rotation.unit(d) < 2
    assert d < 5 or not np.array_equal(rotation.rows(integers, "A"), rows)
    assert d < 5 or not np.array_equal(Rotation(0).rows(integers, "B"), rows)


def test_lengths_whose_sums_are_not_exact_are_refused():
    assert sums_are_exact(2**28) and not sums_are_exact(2**29)
    assert sums_are_exact(127 << 15) and not sums_are_exact(127 << 16)
    compact = api.convert(random_lora(), "nola", bits=4).compact
    header, layout = METHOD.header(compact.config), METHOD.layout(compact.config)
    for shape in ((24, 2**29), (2**29, 24)):
        wide = (*compact.targets[:-1], Target("wide.weight", shape))
        with pytest.raises(errors.LimitError, match="not exact"):
            METHOD.config(header, layout, wide)


# --- the fit --------------------------------------------------------------------------------------------------------


def rotated(lora: LoraAdapter, seed: int) -> LoraAdapter:
    """A LoRA on the bases of a seed, whose low rank is the NOLA of `lora`."""
    pairs = []
    for pair in lora.targets:
        sides = []
        for rows, role in ((pair.A, "A"), (pair.B.T, "B")):
            basis = written_basis(seed, role, rows.shape[1])
            sides.append(rows.astype(np.float64) @ (basis / np.linalg.norm(basis, axis=1)[:, None]).T)
        pairs.append(replace(pair, a=Stored("F64", sides[0]), b=Stored("F64", np.ascontiguousarray(sides[1].T))))
    return replace(lora, targets=tuple(pairs))


@pytest.mark.parametrize("options", [{"bits": 1}, {"bits": 4}, {"bits": 12}])
def test_it_is_low_rank_of_the_rotated_lora(options: dict[str, Any]) -> None:
    """With as many components, as many bits and as much captured, but for a number at the edge of a step."""
    lora = random_lora([(96, 64), (64, 120)], rank=6, decay=0.8)
    nola = api.convert(lora, "nola", seed=3, **options)
    turned = api.convert(rotated(lora, 3), "lowrank", **options)
    assert nola.compact.config.counts == turned.compact.config.counts
    assert abs(nola.compact.config.length - turned.compact.config.length) <= 4
    assert abs(nola.fidelity.captured - turned.fidelity.captured) < 1e-3 * (1 - turned.fidelity.captured) + 1e-7


def test_lengths_of_odd_parts_above_127_keep_as_much():
    """Their vectors differ in length; noise is spread a little unevenly, no more."""
    even, odd = (random_lora([(n, n)], rank=4, decay=0.8, seed=1) for n in (1024, 1027))
    captured = [kept_by(METHOD, lora, bits=1.5) for lora in (even, odd)]
    assert abs(captured[0] - captured[1]) < 0.01


def test_statistics_are_what_it_minimizes():
    """Where some inputs matter far more, a fit that knows it loses less of the output."""
    lora = random_lora([(64, 96)], rank=6, decay=0.9, seed=2)
    moment = Moment(10, diagonal=np.float32(10.0) ** RNG(2).uniform(-1.5, 1.5, 96).astype(np.float32))

    class Known(FitContext):
        def metric(self, pair: LoraTarget) -> Moment:
            return moment

    losses = []
    for used in (Known(), FitContext()):
        config = METHOD.plan(lora, METHOD.Options(bits=4, rank=2), None, used)
        compact = CompactAdapter("nola", config, lora.shapes(), METHOD.fit(lora, config, used))
        losses.append(lost(lora, compact, Known()))
    assert losses[0] < 0.97 * losses[1]


def test_the_seed_is_that_of_the_context_and_in_the_file():
    lora = random_lora()
    one, two = convert(METHOD, lora, seed=1, bits=4), convert(METHOD, lora, seed=2**64 - 1, bits=4)
    assert METHOD.header(one[0])["seed"] == "1" and METHOD.header(two[0])["seed"] == str(2**64 - 1)
    assert not np.array_equal(one[1]["codes"], two[1]["codes"])
    with pytest.raises(errors.OptionError):
        convert(METHOD, lora, seed=-1)
    with pytest.raises(errors.LimitError):
        convert(METHOD, lora, seed=2**64)


def test_a_refit_keeps_the_seed_and_the_size():
    lora = random_lora(rank=6)
    compact = api.convert(lora, "nola", seed=7, target_size=1500).compact

    def size(config: Any) -> int:
        return file.sizes(replace(compact, config=config)).adapter

    again = METHOD.refit(lora, compact, size, FitContext(seed=1))
    assert again.config.seed == 7 and size(again.config) <= size(compact.config)


def test_names_and_order_do_not_matter():
    lora = random_lora([(24, 16), (16, 40)])
    swapped = [replace(p, target=replace(p.target, name=n)) for p, n in zip(lora.targets[::-1], "ab", strict=True)]
    parts = []
    for source in (lora, replace(lora, targets=tuple(swapped))):
        config, tensors = convert(METHOD, source, bits=4)
        first = config.counts[0] * sum(source.targets[0].target.matrix_shape)
        parts.append(np.split(tensors["codes"], [first]))
    assert all(np.array_equal(one, two) for one, two in zip(parts[0], parts[1][::-1], strict=True))


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"seed": 5}, errors.JsonSyntaxError),
        ({"seed": "05"}, errors.CanonicalError),
        ({"seed": "-5"}, errors.CanonicalError),
        ({"seed": "²"}, errors.CanonicalError),
        ({"seed": str(2**64)}, errors.ValueRangeError),
        ({"seed": "9" * 4000}, errors.ValueRangeError),
        ({"components": 0}, errors.LimitError),
        ({"max_count": 4097}, errors.LimitError),
        ({"max_count": 4096}, errors.CanonicalError),
    ],
)
def test_files_that_say_it_otherwise_are_refused(changes: dict[str, Any], error: type[errors.LrcError]) -> None:
    compact = api.convert(random_lora(), "nola", seed=5, bits=4).compact
    header, layout = METHOD.header(compact.config), METHOD.layout(compact.config)
    assert METHOD.config(header, layout, compact.targets) == compact.config
    with pytest.raises(error):
        METHOD.config({**header, **changes}, layout, compact.targets)


def test_expand_is_the_written_formula_on_both_backends() -> None:
    lora = random_lora([(24, 16), (12, 10), (7, 129)], rank=5, decay=0.5)
    compact = api.convert(lora, "nola", seed=9, bits=3).compact
    codes, gains = compact.tensors["codes"].astype(np.float64), iter(compact.tensors["gains"].tolist())
    at, numbers = 0, 16 * codes - np.sign(codes)
    pairs = zip(methods.expand_all(compact), methods.expand_all(compact, torch), strict=True)
    for (target, a, b), (_, ta, tb) in pairs:
        assert np.array_equal(a, ta.numpy()) and np.array_equal(b, tb.numpy())
        out, inner = target.matrix_shape
        for j in range(len(a)):
            gain = next(gains)
            half = np.frexp(gain)[1] // 2
            row = numbers[at : at + inner] @ written_basis(9, "A", inner)
            column = numbers[at + inner : at + inner + out] @ written_basis(9, "B", out)
            at += inner + out
            assert np.array_equal(a[j], (row * (gain * 2.0**-half)).astype(np.float32))
            assert np.array_equal(b[:, j], (column * 2.0**half).astype(np.float32))
    assert at == len(codes)


def test_factors_are_of_one_size() -> None:
    """In float16 too: neither factor is out of its range."""
    for _, a, b in methods.expand_all(api.convert(random_lora([(96, 64)], rank=4), "nola", bits=14).compact):
        share = np.abs(a).max(axis=1) / np.abs(b).max(axis=0)
        assert (share > 2.0**-6).all() and (share < 2.0**6).all() and np.abs(b).max() < 60000


def test_version_1_is_read_not_made() -> None:
    earlier = methods.get("nola.v1")
    assert (earlier.id, earlier.version, METHOD.version) == ("nola", 1, 2)
    with pytest.raises(errors.OptionError, match="read, not made"):
        api.convert(random_lora(), "nola.v1")
    with pytest.raises(errors.OptionError, match="no option 'num_basis'"):
        api.convert(random_lora(), "nola", num_basis=9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_rows_have_the_same_bits_on_a_gpu():
    for d in (4096, 43 * 256, 5003):
        integers = RNG(d).integers(-LARGEST_INTEGER, LARGEST_INTEGER + 1, (4, d)) * 16.0
        on_gpu = Rotation(1).rows(torch.from_numpy(integers).cuda(), "A", torch)
        assert np.array_equal(on_gpu.cpu().numpy(), Rotation(1).rows(integers, "A"))


KEPT = {  # the least that a file keeps at these shares of the LoRA's bytes, whole files; version 1 keeps less
    "distilbert_imdb": {0.04: 0.90, 0.016: 0.76, 0.008: 0.62, 0.004: 0.47},
    "gemma3_270m_svg_adapter": {0.04: 0.57, 0.016: 0.32, 0.008: 0.18, 0.004: 0.09},
}


@pytest.mark.parametrize("name", KEPT)
def test_real_adapters_keep_what_they_kept(name: str) -> None:
    lora = api.load_lora(asset(f"adapters/{name}"))
    for share, least in KEPT[name].items():
        done = api.convert(lora, "nola", target_size=int(share * lora.half_bytes))
        assert done.fidelity is not None and done.fidelity.captured > least, share
