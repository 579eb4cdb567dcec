"""Entropy-coded integers: known answers, one spelling, bounds. Page: formats/coded-v1.md."""

from __future__ import annotations

import hashlib
import math
import tracemalloc
import warnings

import numpy as np
import pytest
from conftest import FIXTURES, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from second_readers import coded as second

from lrconvert.core import errors, limits
from lrconvert.formats.lrc import file
from lrconvert.formats.lrc.validation import validate
from lrconvert.lora import packing
from lrconvert.lora.coded import rans, stream
from lrconvert.lora.coded.choice import best_models
from lrconvert.lora.coded.models import COUNT, ESCAPE, LARGEST, TOTAL, models
from lrconvert.lora.fingerprint import names_digest
from lrconvert.methods import base as methods
from lrconvert.testing.raw_files import V1, RawFile

KAT = second.KAT
LAST = stream.LARGEST_INTEGER


@pytest.fixture(autouse=True)
def no_warnings():
    """Arithmetic that overflows, or is of nothing, is an error here."""
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        yield


def pairs(rows) -> list[tuple[int, int]]:
    return [(k, n) for k, n in rows]


def encoded(numbers, rows) -> bytes:
    return stream.encode(np.array(numbers, np.int32), rows)


def both_ways(numbers, rows) -> bytes:
    """The bytes of `numbers`, which both readers read as `numbers`."""
    data = encoded(numbers, rows)
    decoded = stream.decode(data, rows)
    assert decoded.dtype == np.int32 and decoded.tolist() == list(numbers)
    assert second.decode(data, rows) == list(numbers)
    return data


# --- known answers --------------------------------------------------------------------------------------------------


def test_models_are_those_of_the_page():
    """Shifts, frequencies and their digest, by the program's data and by the page."""
    assert KAT["format"] == "lrconvert-coded-kat" and KAT["version"] == 1
    assert len(models()) == len(KAT["models"]) == COUNT
    digest = hashlib.sha256()
    for k, model in enumerate(models()):
        assert model.shift == second.shift_of(k)
        assert model.frequencies.tolist() == list(second.frequencies(k)) and model.frequencies[ESCAPE] > 0
        assert model.starts.tolist() == list(second.starts(k)) and model.frequencies.sum() == TOTAL
        digest.update(model.frequencies.astype("<u4").tobytes())
    assert digest.hexdigest() == KAT["tables"]


def test_models_are_of_the_density_that_the_page_names():
    """Up to the last digit of another machine's functions."""

    def below(x: float, sigma: float) -> float:
        tail = math.exp(-abs(x) * math.sqrt(2) / sigma) / 2
        return 0.7 * math.erfc(-x / sigma / math.sqrt(2)) / 2 + 0.3 * (tail if x < 0 else 1 - tail)

    for k, listed in enumerate(KAT["models"]):
        sigma, width = 2.0 ** ((k - 10) / 4), 2 ** second.shift_of(k)
        for h, frequency in enumerate(listed):
            low, high = width * h - 0.4, width * (h + 1) - 0.4
            if h == 0:
                low = -0.6 if width == 1 else 0.0
            assert abs(frequency - math.floor((TOTAL - 1) * (below(high, sigma) - below(low, sigma)))) <= 1


@pytest.mark.parametrize("row", KAT["streams"], ids=lambda row: row["what"])
def test_known_streams(row):
    rows = pairs(row["rows"])
    assert both_ways(row["numbers"], rows).hex() == row["bytes"]
    assert row["lanes"] == second.lanes_of(rows) == stream.runs_of(rows).lanes


@pytest.mark.parametrize("row", KAT["generated"], ids=lambda row: row["what"])
def test_known_digests(row):
    """More than one lane, and more than one chunk."""
    rows, numbers = pairs(row["rows"]), [q for part in row["numbers"] for q in generated(*part)]
    data = both_ways(numbers, rows)
    assert row["lanes"] == second.lanes_of(rows) == stream.runs_of(rows).lanes > 1
    assert data[:16].hex() == row["first"] and len(data) == row["length"]
    assert hashlib.sha256(data).hexdigest() == row["sha256"]


def generated(seed: int, count: int, r: int, z: int) -> list[int]:
    """Section 7."""
    numbers, x = [], seed
    for _ in range(count):
        drawn = []
        for _ in range(2):
            x = (1103515245 * x + 12345) % 2**31
            drawn.append(x // 2**16)
        numbers.append(drawn[1] % (2 * r + 1) - r if drawn[0] % z == 0 else 0)
    return numbers


@pytest.mark.parametrize("row", KAT["refused"], ids=lambda row: row["what"])
def test_known_refusals(row):
    rows, data = pairs(row["rows"]), bytes.fromhex(row["bytes"])
    with pytest.raises(errors.LrcError) as caught:
        stream.decode(data, rows)
    assert caught.value.code == row["code"]
    with pytest.raises(second.Refused, match=row["code"]):
        second.decode(data, rows)


def test_the_page_has_the_worked_example():
    page = (ROOT / "formats" / "coded-v1.md").read_text(encoding="utf-8")
    assert f"`{encoded([-1], [(8, 1)]).hex()}`" in page
    model = models()[8]
    assert f"the frequency {model.frequencies[30]} and the start {model.starts[30]}." in page


# --- every sequence of numbers has one spelling ---------------------------------------------------------------------

integers = st.one_of(
    st.just(0), st.integers(-2, 2), st.integers(-40, 40), st.integers(-140_000, 140_000), st.integers(-LAST, LAST)
)
lines = st.tuples(st.integers(0, COUNT - 1), st.lists(integers, min_size=1, max_size=12))


@st.composite
def tensors(draw):
    """(numbers, rows): any models, any numbers."""
    drawn = draw(st.lists(lines, max_size=5))
    return [q for _, line in drawn for q in line], [(k, len(line)) for k, line in drawn]


@given(tensors())
@settings(deadline=None)
def test_any_numbers_come_back(tensor):
    both_ways(*tensor)


def refused_or_canonical(data: bytes, rows) -> None:
    """An error of ours, which the second reader agrees with, or what encodes to these bytes."""
    try:
        numbers = stream.decode(data, rows)
    except errors.LrcError as error:
        assert error.code in ("E-LIMIT", "E-CANON", "E-VALUE")
        with pytest.raises(second.Refused):
            second.decode(data, rows)
        return
    assert second.decode(data, rows) == numbers.tolist()
    assert stream.encode(numbers, rows) == data


@given(tensors(), st.data())
@settings(deadline=None, max_examples=300)
def test_any_change_is_refused_or_another_tensor(tensor, data):
    """A bit flipped, bytes cut off, put in, put behind: refused, or the one spelling of other numbers."""
    numbers, rows = tensor
    changed = bytearray(encoded(numbers, rows))
    place = data.draw(st.integers(0, len(changed)))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "append", "rows"]))
    if kind == "flip" and place < len(changed):
        changed[place] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del changed[place : place + data.draw(st.integers(1, 4))]
    elif kind == "insert":
        changed[place:place] = data.draw(st.binary(min_size=1, max_size=4))
    elif kind == "append":
        changed += data.draw(st.binary(min_size=1, max_size=4))
    elif rows:
        rows[0] = (data.draw(st.integers(0, COUNT - 1)), data.draw(st.integers(1, 20)))
    refused_or_canonical(bytes(changed), rows)


@given(st.binary(max_size=40), st.lists(st.tuples(st.integers(0, COUNT - 1), st.integers(1, 9)), max_size=4))
@settings(deadline=None, max_examples=300)
def test_any_bytes_are_refused_or_canonical(data, rows):
    refused_or_canonical(data, rows)


@pytest.mark.parametrize("lanes", ["few", "many"])
def test_chunks_and_lanes_do_not_show(lanes, monkeypatch):
    """Number by number or all lanes at once, in chunks of any size: the same bytes."""
    rng = np.random.default_rng(0)
    rows = [(int(k), 997) for k in rng.permutation(COUNT)]
    numbers = np.concatenate([rng.normal(0, 2 ** ((k - 10) / 4), n) for k, n in rows]).astype(np.int32)
    data = stream.encode(numbers, rows)
    monkeypatch.setattr(rans, "_FEW_LANES", 0 if lanes == "many" else 4096)
    monkeypatch.setattr(rans, "_CHUNK", 4096)
    monkeypatch.setattr(stream, "_CHUNK", 1000)
    assert stream.encode(numbers, rows) == data
    assert np.array_equal(stream.decode(data, rows), numbers)


@pytest.mark.parametrize("lanes", ["few", "many"])
@pytest.mark.parametrize("change", ["one word less", "no word", "state", "word"])
def test_both_ways_of_decoding_refuse(lanes, change, monkeypatch):
    """Whether symbols are decoded one by one or a step of all lanes at once."""
    monkeypatch.setattr(rans, "_FEW_LANES", 0 if lanes == "many" else 4096)
    rows = [(14, 9000)]
    data = bytearray(stream.encode(np.arange(9000, dtype=np.int32) % 7 - 3, rows))
    if change in ("one word less", "no word"):
        del data[-2 if change == "one word less" else 8 :]
    else:
        data[0 if change == "state" else 1000] ^= 1
    with pytest.raises(errors.CanonicalError):
        stream.decode(bytes(data), rows)


# --- length ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 2, 5, 9, 14, 18, 19, 40, 63])
def test_length_is_nearly_ideal(k):
    """Within 1.5 % of the ideal length under the model and 6 bytes, down to a thirtieth of a bit for a number."""
    model, rng = models()[k], np.random.default_rng(k)
    for count in (500, 40_000, 300_000):
        symbols = rng.choice(ESCAPE + 1, count, p=model.frequencies / TOTAL)
        symbols[symbols == ESCAPE] = LARGEST
        numbers = (symbols - LARGEST << model.shift) + rng.integers(1 << model.shift, size=count)
        ideal = (float(model.bits[symbols].sum()) + count * model.shift) / 8
        assert ideal - 1 <= len(stream.encode(numbers.astype(np.int32), [(k, count)])) <= 1.015 * ideal + 6


def ideal_bits(row: list[int], k: int) -> float:
    """Of the symbols by their frequencies, and all bits beside them."""
    bits = 0.0
    for q in row:
        h = q // 2 ** second.shift_of(k)
        held = second.frequencies(k)[h + 31] if abs(h) <= 31 else 0
        bits += 16 - math.log2(held or second.frequencies(k)[ESCAPE])
        bits += second.shift_of(k) if held else stream.WIDE
    return bits


@pytest.mark.parametrize("sigma", [0.0, 0.05, 0.4, 2, 3.5, 4.5, 30, 2000, 50_000])
def test_the_best_model_is_the_shortest_of_all(sigma):
    rng = np.random.default_rng(2)
    rows = np.clip(np.rint(rng.standard_normal((3, 300)) * sigma), -LAST, LAST).astype(np.int32)
    best, lengths = best_models(rows)
    for row, model, length in zip(rows.tolist(), best.tolist(), lengths.tolist(), strict=True):
        ideal = [ideal_bits(row, k) for k in range(COUNT)]
        assert abs(length - ideal[model]) < 1e-6 * length and ideal[model] <= min(ideal) * 1.001


# --- bounds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2**62, 2**30 + 1, 2**30, 4096 * 1000 + 1])
def test_counts_are_checked_before_anything_is_allocated(count):
    """Files of a kilobyte that declare billions of numbers."""
    tracemalloc.start()
    try:
        with pytest.raises(errors.LimitError):
            stream.decode(bytes(1000), [(0, count)])
        assert tracemalloc.get_traced_memory()[1] < 1 << 16
    finally:
        tracemalloc.stop()


def test_writers_have_the_same_limit():
    with pytest.raises(errors.LimitError):
        stream.encode(np.zeros(1, np.int32), [(0, limits.MAX_CODED), (1, 1)])


def test_no_tensor_has_as_many_numbers_as_the_limit_allows():
    """The likeliest symbol of all, alone: what no tensor exceeds is above what the coder can reach."""
    largest = max(int(model.frequencies.max()) for model in models())
    k = next(k for k, model in enumerate(models()) if model.frequencies.max() == largest)
    for count in (1, 3000, 65_536, 1_000_000):
        data = stream.encode(np.zeros(count, np.int32), [(k, count)])
        assert count < 2500 * len(data)
        assert not stream.decode(data, [(k, count)]).any()


def test_memory_in_proportion(monkeypatch):
    """Three bytes for each number, beside input and output, while chunks are small."""
    monkeypatch.setattr(rans, "_CHUNK", 1 << 14)
    monkeypatch.setattr(stream, "_CHUNK", 1 << 14)
    count = 1_000_000
    numbers, rows = np.zeros(count, np.int32), [(10, count)]
    numbers[::3] = 2
    data = stream.encode(numbers, rows)
    for act, result in (
        (lambda: stream.encode(numbers, rows), len(data)),
        (lambda: stream.decode(data, rows), 4 * count),
    ):
        tracemalloc.start()
        try:
            act()
            assert tracemalloc.get_traced_memory()[1] < result + 3 * count + (2 << 20)
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("q", [LAST + 1, -LAST - 1, -(2**31), 2**31 - 1])
def test_magnitudes_of_2_to_20_are_refused(q):
    with pytest.raises(errors.ValueRangeError):
        encoded([q], [(63, 1)])
    for k in (0, 30, 63):
        both_ways([LAST, -LAST], [(k, 2)])


# --- the kind of payload --------------------------------------------------------------------------------------------


def test_the_kind_of_payload():
    rows = [(10, 5), (3, 4)]
    numbers = np.array([0, -1, 2, 5, -40, 0, 0, 1, 0], np.int32)
    data = stream.encode(numbers, rows)
    spec = packing.coded("codes", rows, len(data))
    assert (spec.shape, spec.dtype, spec.nbytes, spec.stored_shape) == ((9,), "U8", len(data), (len(data),))
    stored, exponent = packing.encode(spec, numbers)
    assert stored.tobytes() == data and exponent == 0
    assert np.array_equal(packing.decode(spec, stored, 0), numbers)


def test_the_kind_refuses_what_is_not_declared():
    rows, numbers = [(10, 3)], np.array([0, -1, 2], np.int32)
    length = len(stream.encode(numbers, rows))
    with pytest.raises(errors.ShapeError):
        packing.encode(packing.coded("codes", rows, length + 1), numbers)
    with pytest.raises(errors.ShapeError):
        packing.encode(packing.coded("codes", rows, length), numbers[:2])
    for dtype in (np.int64, np.float32):
        with pytest.raises(errors.ValueRangeError):
            packing.encode(packing.coded("codes", rows, length), numbers.astype(dtype))


def test_containers_of_version_1_hold_none(tmp_path):
    """A newer kind of payload in an older container, all digests right: readers of that version do not know it."""
    golden = FIXTURES / "golden" / "v2" / "lowrank.2" / "2.lrc"
    compact, newer = file.read(golden), RawFile.of(golden.read_bytes())
    form = methods.get("lowrank")
    at, tensors = 0, {}
    for spec in (
        *form.layout_specs(form.header(compact.config), compact.targets),
        *form.specs(compact.config, compact.targets),
    ):
        tensors[spec.name] = spec.dtype, list(spec.stored_shape), newer.tensors["lrconvert"][2][at : at + spec.nbytes]
        at += spec.nbytes
    tensors = {name: tensors[name] for name in sorted(tensors, key=lambda name: (name != "gains", name))}
    manifest = newer.manifest | {"format": "lrconvert", "version": 1, "digests": {}}
    manifest["base"]["names"] = names_digest(compact.targets)
    tensors |= {name: tensor for name, tensor in newer.tensors.items() if name != "lrconvert"}
    path = tmp_path / "x.lrc"
    path.write_bytes(V1(manifest, tensors).sign().file())
    assert {finding.code for finding in validate(path).findings} == {"E-VER"}


@given(st.lists(st.integers(-LAST, LAST), max_size=20))
def test_values_are_exact(numbers):
    """16 q - sign(q), which float32 holds for every q that a file does."""
    values = packing.coded_values(np.array([*numbers, LAST, -LAST], np.int32))
    assert values.dtype == np.float32
    assert [int(v) for v in values] == [second.value(q) for q in (*numbers, LAST, -LAST)]
