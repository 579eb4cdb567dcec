"""Seeded bases: known answers, one set of bits from every implementation, limits. Page: formats/prng-v1.md."""

from __future__ import annotations

import hashlib
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from lrconvert.core import errors
from lrconvert.lora import prng
from lrconvert.lora.prng import philox, torch_philox

KAT = json.loads((ROOT / "formats" / "kat" / "prng-v1.json").read_text(encoding="utf-8"))
KEY, LAST = (0x89ABCDEF, 0x01234567), 2**32 - 1
SHARED = prng.Stream(0x0123456789ABCDEF, "shared/A")

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


# --- the second implementation: from the page, integers only, one element at a time ---------------------------------


def oracle_block(counter: list[int], key: list[int]) -> list[int]:
    """Section 1."""
    x, k = list(counter), list(key)
    for _ in range(10):
        low, high = 0xCD9E8D57 * x[2], 0xD2511F53 * x[0]
        x = [low // 2**32 ^ x[1] ^ k[0], low % 2**32, high // 2**32 ^ x[3] ^ k[1], high % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return x


def oracle_word(seed: int, label: str, k: int, w: int) -> int:
    """Section 2."""
    digest = hashlib.sha256(b"lrconvert/basis/v1\x00" + label.encode("utf-8")).digest()
    sid = sum(byte << 8 * n for n, byte in enumerate(digest[:8]))
    return oracle_block([w // 4, k, sid % 2**32, sid // 2**32], [seed % 2**32, seed // 2**32])[w % 4]


TABLE = {"u8": (8, 4, 8, 0), "u24": (24, 1, 0, 8), "sign": (1, 32, 1, 0)}  # q, L, s, t


def oracle_numerator(seed: int, label: str, name: str, k: int, e: int) -> int:
    """Section 3."""
    q, lanes, s, t = TABLE[name]
    c = oracle_word(seed, label, k, e // lanes) // 2 ** (s * (e % lanes) + t) % 2**q
    return 2 * c + 1 - 2**q


# --- known answers --------------------------------------------------------------------------------------------------


def integers(row: list[str]) -> list[int]:
    return [int(word, 16) for word in row]


def stream(row: dict[str, object]) -> prng.Stream:
    return prng.Stream(prng.parse_seed(str(row["seed"])), str(row["label"]))


def test_the_file_has_the_rows_of_random123():
    assert KAT["format"] == "lrconvert-prng-kat" and KAT["version"] == 1
    assert [row["words"] for row in KAT["block"]] == [
        ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"],
        ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"],
        ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"],
    ]


def test_block_function():
    for row in KAT["block"]:
        counter, key, expected = map(integers, (row["counter"], row["key"], row["words"]))
        assert oracle_block(counter, key) == expected
        assert philox.block([counter], tuple(key)).tolist() == [expected]
        state = tuple(torch.tensor([c]) for c in counter)
        assert [int(x) for x in torch_philox.rounds(state, tuple(key))] == expected


def test_keys_and_stream_ids():
    for row in KAT["streams"]:
        assert list(stream(row).key) == integers(row["key"])
        assert stream(row).sid == int(row["sid"], 16)
    assert len({row["sid"] for row in KAT["streams"]}) == len(KAT["streams"])


def test_known_words():
    for row in KAT["words"]:
        expected = integers(row["words"])
        assert prng.words(stream(row), [row["k"]], 4 * row["block"], 4).tolist() == [expected]
        s = stream(row)
        words = torch_philox.words(s.key, s.sid, torch.tensor([row["k"]]), row["block"], 1)
        assert words.numpy().view(np.uint32).reshape(-1).tolist() == expected
        assert [oracle_word(s.seed, s.label, row["k"], 4 * row["block"] + n) for n in range(4)] == expected


def test_known_numerators():
    for row in KAT["numerators"]:
        name, ks, expected = row["map"], [row["k"]], row["numerators"]
        place = name, ks, row["start"], len(expected)
        assert prng.numerators(stream(row), *place).tolist() == [expected]
        exact = np.array([expected], np.float64) * prng.MAPS[name].unit
        for dtype in ("float32", "float64"):
            numbers = prng.values(stream(row), *place, dtype=dtype)
            assert numbers.dtype == dtype and np.array_equal(numbers, exact)
            assert np.array_equal(prng.tensor(stream(row), *place, dtype=dtype).numpy(), numbers)
    assert {row["map"] for row in KAT["numerators"]} == set(prng.MAPS)


def digests(values) -> None:
    """`values(stream, name, bases, start, count)` gives the numbers of every row of `digests`."""
    for row in KAT["digests"]:
        numbers = values(stream(row), row["map"], range(*row["bases"]), row["start"], row["count"])
        assert hashlib.sha256(np.asarray(numbers).astype("<f4").tobytes()).hexdigest() == row["sha256"], row


@pytest.mark.parametrize("values", [prng.values, prng.tensor])
def test_known_digests(values):
    digests(values)


def test_the_page_has_the_worked_example():
    page = (ROOT / "formats" / "prng-v1.md").read_text()
    row = next(row for row in KAT["words"] if row["k"] == 3 and row["block"] == 1)
    assert " ".join(row["words"]) in page and f"{SHARED.sid:#x}" in page
    for name in prng.MAPS:
        first = prng.numerators(SHARED, name, [3], 0, 4)[0].tolist()
        assert ", ".join(map(str, first)) in page


# --- every implementation against the oracle and numpy --------------------------------------------------------------

seeds = st.integers(0, 2**64 - 1)
labels = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
indices = st.one_of(st.integers(0, 5), st.integers(LAST - 5, LAST), st.integers(0, LAST))
names = st.sampled_from(sorted(prng.MAPS))


@st.composite
def ranges(draw, lanes=None, longest=400):
    """(map, start, count), with a weight on both ends and on the places where 32 bits end."""
    name = draw(names)
    end = prng.MAPS[name].lanes * 2**32
    near = draw(st.sampled_from([0, 2**31, 2**32, end // 2, end]))
    start = min(max(0, near + draw(st.integers(-longest, longest))), end)
    return name, start, draw(st.integers(0, min(longest, end - start)))


@settings(deadline=None)
@given(seeds, labels, indices, ranges(longest=20))
def test_numpy_equals_the_oracle(seed, label, k, place):
    name, start, count = place
    expected = [oracle_numerator(seed, label, name, k, e) for e in range(start, start + count)]
    assert prng.numerators(prng.Stream(seed, label), name, [k], start, count).tolist() == [expected]


@settings(deadline=None)
@given(seeds, labels, st.lists(indices, max_size=4), ranges(), st.sampled_from(["float32", "float64"]))
def test_torch_equals_numpy(seed, label, ks, place, dtype):
    s = prng.Stream(seed, label)
    numbers = prng.tensor(s, place[0], ks, *place[1:], dtype=dtype)
    expected = prng.values(s, place[0], ks, *place[1:], dtype=dtype)
    assert numbers.numpy().dtype == expected.dtype == dtype and numbers.shape == expected.shape == (len(ks), place[2])
    assert numbers.numpy().tobytes() == expected.tobytes()


@settings(deadline=None)
@given(seeds, st.integers(0, LAST), st.integers(0, 2**34 - 40), st.integers(0, 40))
def test_words_equal_the_oracle(seed, k, start, count):
    expected = [oracle_word(seed, "w", k, w) for w in range(start, start + count)]
    words = prng.words(prng.Stream(seed, "w"), [k], start, count)
    assert words.dtype == np.uint32 and words.tolist() == [expected]


@pytest.mark.parametrize("name", prng.MAPS)
def test_parts_are_those_of_the_whole(name):
    """Whole tiles, parts of tiles, single bases and single elements."""
    count = 3 * 2**18 + 77  # beyond what is computed at once
    whole = prng.values(SHARED, name, range(2, 5), 2**31 - 1000, count)
    assert np.array_equal(prng.tensor(SHARED, name, range(2, 5), 2**31 - 1000, count).numpy(), whole)
    rng = np.random.default_rng(0)
    cuts = [0, 1, *sorted(rng.choice(count, 7)), count]
    for first, end in itertools.pairwise(cuts):
        part = prng.values(SHARED, name, range(3, 5), 2**31 - 1000 + first, end - first)
        assert np.array_equal(part, whole[1:, first:end])
    many = prng.values(SHARED, name, range(100_000), 5, 3)  # more bases than fit one tile
    assert np.array_equal(prng.tensor(SHARED, name, range(100_000), 5, 3).numpy(), many)
    for k in (0, 16_383, 16_384, 99_999):
        assert np.array_equal(prng.values(SHARED, name, [k], 5, 3), many[k : k + 1])


def test_words_in_parts():
    whole = prng.words(SHARED, range(3), 1, 100_000)
    for first, end in ((0, 3), (3, 65_536), (65_536, 99_999)):
        assert np.array_equal(prng.words(SHARED, range(3), 1 + first, end - first), whole[:, first:end])


def test_bases_in_any_order():
    whole = prng.words(SHARED, range(10), 0, 9)
    for ks in ([3, 0, 3], (9,), range(8, 0, -3), np.array([1, 7], np.uint32), np.array([2], np.int64), []):
        assert np.array_equal(prng.words(SHARED, ks, 0, 9), whole[np.array(ks, int)])
    assert np.array_equal(prng.words(SHARED, range(LAST - 1, LAST + 1), 0, 9)[1:], prng.words(SHARED, [LAST], 0, 9))


def test_words_and_maps_agree():
    """What section 3 says of bytes, bits and upper bits."""
    w = prng.words(SHARED, [0], 0, 64)
    octets = np.frombuffer(w.astype("<u4").tobytes(), np.uint8)
    assert np.array_equal(prng.numerators(SHARED, "u8", [0], 0, 256)[0], 2 * octets.astype(np.int32) - 255)
    assert np.array_equal(prng.values(SHARED, "sign", [0], 0, 2048)[0] > 0, np.unpackbits(octets, bitorder="little"))
    assert np.array_equal(prng.numerators(SHARED, "u24", [0], 0, 64), 2 * (w >> 8).astype(np.int64) + 1 - 2**24)


# --- the maps as numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", prng.MAPS)
def test_moments(name):
    count = 1 << 18
    x = prng.values(SHARED, name, range(4), 0, count).astype(np.float64)
    variance = prng.MAPS[name].variance
    assert np.all(np.abs(x) <= 1) and np.all(x != 0)
    assert np.all(np.abs(x.mean(axis=1)) < 5 * np.sqrt(variance / count))
    assert np.all(np.abs((x * x).mean(axis=1) - variance) < 5 / np.sqrt(count))
    correlation = x @ x.T / (count * variance)
    assert np.all(np.abs(correlation - np.eye(4)) < 5 / np.sqrt(count))
    shifted = (x[:, 1:] * x[:, :-1]).mean(axis=1) / variance
    assert np.all(np.abs(shifted) < 5 / np.sqrt(count))


def test_variance_is_that_of_all_codes():
    for name in ("u8", "sign"):
        kind = prng.MAPS[name]
        all_values = (2 * np.arange(1 << kind.bits) + kind.offset) * kind.unit
        assert all_values.mean() == 0 and np.isclose((all_values**2).mean(), kind.variance, rtol=1e-15)
    assert np.isclose(prng.MAPS["u24"].variance, 1 / 3)


def test_u8_takes_all_values_equally_and_fits_sixteen_bits():
    x = prng.numerators(SHARED, "u8", [0], 0, 1 << 18)[0]
    counts = np.bincount((x + 255) // 2, minlength=256)
    assert abs(float(((counts - 1024.0) ** 2 / 1024).sum()) - 255) < 5 * np.sqrt(2 * 255)
    values = prng.tensor(SHARED, "u8", [0], 0, 4096)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(values.to(dtype).float(), values)


def test_maps_describe_themselves():
    for name, (q, lanes, s, t) in TABLE.items():
        kind = prng.MAPS[name]
        assert (kind.name, kind.bits, kind.lanes) == (name, q, 4 * lanes)
        assert kind.shifts == tuple(s * lane + t for lane in range(lanes))


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [prng.values, prng.numerators, prng.tensor])
@pytest.mark.parametrize("name", prng.MAPS)
def test_ranges_beyond_the_limits_are_refused(draw, name):
    end = prng.MAPS[name].lanes * 2**32
    assert draw(SHARED, name, [LAST], end - 1, 1).shape == (1, 1)
    assert draw(SHARED, name, [], end, 0).shape == (0, 0)
    for bases, start, count in (([0], end, 1), ([0], end - 1, 2), ([0], 2**70, 1), ([0], 0, end + 1)):
        with pytest.raises(errors.LimitError):
            draw(SHARED, name, bases, start, count)
    for bases in ([2**32], [0, 2**64], range(LAST, LAST + 2), range(2**32, 2**33), np.array([2**32])):
        with pytest.raises(errors.LimitError):
            draw(SHARED, name, bases, 0, 1)
    for bases, start, count in (
        ([0], -1, 1),
        ([0], 0, -1),
        ([-1], 0, 1),
        (range(-1, 1), 0, 1),
        (range(1, -2, -1), 0, 1),
    ):
        with pytest.raises(errors.OptionError):
            draw(SHARED, name, bases, start, count)
    for bases, start, count in (([0.0], 0, 1), ([0], 0.5, 1), ([0], 0, "1"), (["0"], 0, 1)):
        with pytest.raises(errors.OptionError):
            draw(SHARED, name, bases, start, count)


def test_words_beyond_the_limits_are_refused():
    assert prng.words(SHARED, [LAST], 2**34 - 1, 1).shape == (1, 1)
    with pytest.raises(errors.LimitError):
        prng.words(SHARED, [0], 2**34, 1)
    with pytest.raises(errors.OptionError):
        prng.words(SHARED, [0], -4, 4)


def test_sizes():
    for name, kind in prng.MAPS.items():
        prng.check_size(name, kind.lanes * 2**32, 2**32)
        with pytest.raises(errors.LimitError):
            prng.check_size(name, kind.lanes * 2**32 + 1, 1)
        with pytest.raises(errors.LimitError):
            prng.check_size(name, 1, 2**32 + 1)


@pytest.mark.parametrize("draw", [prng.values, prng.numerators, prng.tensor])
def test_unknown_maps_and_dtypes_are_refused(draw):
    for name in ("pop", "", "U8"):
        with pytest.raises(errors.OptionError, match="u8, u24, sign"):
            draw(SHARED, name, [0], 0, 1)
    if draw is not prng.numerators:
        with pytest.raises(errors.OptionError):
            draw(SHARED, "u8", [0], 0, 1, dtype="float16")


def test_streams_are_refused():
    for seed, label in ((2**64, "a"), (0, "a" * 4097), (0, "é" * 2049)):
        with pytest.raises(errors.LimitError):
            prng.Stream(seed, label)
    for seed, label in ((-1, "a"), (1.0, "a"), ("1", "a"), (0, ""), (0, b"a"), (0, "\ud800")):
        with pytest.raises(errors.OptionError):
            prng.Stream(seed, label)
    assert prng.Stream(2**64 - 1, "é" * 2048).key == (LAST, LAST)
    assert prng.Stream(np.uint64(2**63), "a") == prng.Stream(2**63, "a")


def test_spelling_of_a_seed():
    for seed in (0, 7, 2**53 + 1, 2**64 - 1):
        assert prng.parse_seed(str(seed)) == seed
    for text in ("", "-1", "+1", "01", "00", " 1", "1 ", "1\n", "1_0", "0x1", "1.0", "1e3", "²", "\u0661"):
        with pytest.raises(errors.CanonicalError):
            prng.parse_seed(text)
    for text in (str(2**64), "9" * 21, "1" * 10_000):
        with pytest.raises(errors.ValueRangeError):
            prng.parse_seed(text)


# --- nothing global -------------------------------------------------------------------------------------------------


def test_generators_of_others_stay_where_they_are():
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    for name in prng.MAPS:
        prng.values(SHARED, name, [0], 0, 100), prng.tensor(SHARED, name, [0], 0, 100)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002


def test_torch_defaults_do_not_matter():
    expected = prng.values(SHARED, "u24", range(3), 1, 99)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            numbers = prng.tensor(SHARED, "u24", range(3), 1, 99)
    finally:
        torch.set_default_dtype(torch.float32)
    assert numbers.dtype == torch.float32 and np.array_equal(numbers.numpy(), expected)


def test_numpy_needs_neither_torch_nor_triton():
    code = "import sys\nfrom lrconvert.lora import prng\nprng.values(prng.Stream(1, 'a'), 'u8', [0], 0, 9)\n"
    code += "assert not {'torch', 'triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- Triton and GPUs ------------------------------------------------------------------------------------------------

HARD = [  # (start, count) in elements of a block and single elements: ends, unaligned parts, signs of 32-bit numbers
    ((0, 0), 10_000),
    ((0, 5), 4_096),
    ((2**31, -700), 1_500),
    ((2**32, -777), 777),
    ((0, 2**31 - 9), 20),
    ((0, 2**32 - 9), 20),
    ((0, 1), 1),
    ((7, 3), 0),
]


def hard_cases():
    """(stream, map, bases, start, count)."""
    for s in (SHARED, prng.Stream(2**64 - 1, "é"), prng.Stream(1, "b"), prng.Stream(2**63 | 2**31, "c")):
        for name, kind in prng.MAPS.items():
            for (blocks, elements), count in HARD:
                yield s, name, [3, LAST, 0, 2**31], blocks * kind.lanes + elements, count


def compare(compute, device: str) -> None:
    """`compute`, of one of the two modules for torch, gives numpy's bits in both dtypes."""
    for s, name, ks, start, count in hard_cases():
        for dtype in (torch.float32, torch.float64):
            kind, bases = prng.MAPS[name], np.array(ks, np.uint32)
            numbers = compute(s, kind, bases, start, count, torch.device(device), dtype).cpu().numpy()
            expected = prng.values(s, name, ks, start, count, dtype=str(dtype).removeprefix("torch."))
            assert numbers.dtype == expected.dtype and numbers.tobytes() == expected.tobytes(), (s, name, start, count)


def test_int64_operations_on_the_cpu():
    compare(torch_philox.values, "cpu")


@gpu
@needs_gpu
def test_int64_operations_on_the_gpu():
    compare(torch_philox.values, "cuda")
    big = torch_philox.values(
        SHARED, prng.MAPS["u8"], np.arange(3, dtype=np.uint32), 11, 5_000_000, torch.device("cuda"), torch.float32
    )  # several tiles
    assert np.array_equal(big.cpu().numpy(), prng.values(SHARED, "u8", range(3), 11, 5_000_000))


@gpu
@needs_gpu
def test_digests_on_the_gpu():
    digests(lambda *place: prng.tensor(*place, device="cuda").cpu().numpy())
