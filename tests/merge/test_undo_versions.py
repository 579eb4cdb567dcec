"""Undo records of every version, and the code of those weights that a merge left uncertain."""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import one_target, random_base
from second_readers import undo as second

from lrconvert import api
from lrconvert.api import merge
from lrconvert.core.dtypes import FLOATS, STORAGE, Array, round_to
from lrconvert.core.errors import LrcError, UndoError
from lrconvert.lora.adapter import LoraAdapter, Target
from lrconvert.merge.arithmetic.exact import Term, Update
from lrconvert.merge.arithmetic.rounding import bits
from lrconvert.merge.signed_json import sign
from lrconvert.merge.undo import residual
from lrconvert.merge.undo.open_record import RECORD_NAME
from lrconvert.merge.undo.record import RESIDUAL, UNCERTAIN

RECORDS = Path(__file__).parent / "records"
BASE = "5d679e48ae40e0f2627b2dcfa42cbff01550732750360fe0072df20387ea9d8c"  # sha256 of the base's weight file


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("version", ("v1", "v2"))
def test_records_of_every_version_are_undone_forever(version: str, tmp_path: Path) -> None:
    """Models that were merged by earlier programs: their bases come back."""
    api.unmerge(RECORDS / version, tmp_path / "back")
    assert digest(tmp_path / "back") == BASE


@pytest.mark.parametrize("version", ("v1", "v2"))
def test_a_second_reader_agrees(version: str, tmp_path: Path) -> None:
    """Written from the page, in rational numbers: the same bytes."""
    api.unmerge(RECORDS / version, tmp_path / "back")
    expected = second.tensors(tmp_path / "back" / "model.safetensors")
    assert second.base_of(RECORDS / version) == {name: data for name, (_, _, data) in expected.items()}


def test_a_second_reader_reads_what_is_written_today(tmp_path: Path) -> None:
    lora = LoraAdapter((one_target(Target("model.layers.0.w.weight", (9, 20)), scale=0.3),))
    base = random_base(tmp_path / "base", lora, "BF16")
    merge(base, [lora], tmp_path / "out")
    stored = second.tensors(base / "model.safetensors")
    assert second.base_of(tmp_path / "out") == {name: data for name, (_, _, data) in stored.items()}


def record_of(folder: Path) -> Path:
    return next(folder.rglob(RECORD_NAME))


@pytest.mark.parametrize(("version", "other"), (("v1", 2), ("v2", 1)))
def test_a_record_says_the_version_that_its_codes_need(version: str, other: int, tmp_path: Path) -> None:
    """A program that reads version 1 alone is not given a mode that it does not know."""
    shutil.copytree(RECORDS / version, tmp_path / "model")
    path = record_of(tmp_path / "model")
    path.write_bytes(sign({**json.loads(path.read_text()), "version": other}))
    with pytest.raises(UndoError, match="another version"):
        api.unmerge(tmp_path / "model", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_record_without_codes_is_of_version_1(tmp_path: Path) -> None:
    lora = LoraAdapter((one_target(Target("w", (6, 8))),))
    merge(random_base(tmp_path / "base", lora), [lora], tmp_path / "out", undo=False)
    assert json.loads(record_of(tmp_path / "out").read_text())["version"] == 1


# --- codes ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_codes_hold_any_bits_whatever_was_predicted_and_merged(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(FLOATS))
    kind = STORAGE[dtype]
    count = data.draw(st.integers(1, 300))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    unsigned = f"<u{kind.itemsize}"

    def drawn() -> Array:
        return rng.integers(0, 1 << 8 * kind.itemsize, count, np.uint64).astype(unsigned).view(kind)

    predicted, merged = drawn(), drawn()
    near = (bits(predicted) + rng.integers(0, 3, count).astype(unsigned)).view(kind)
    few = np.where(rng.random(count) < 0.02, bits(near), bits(predicted)).view(kind)
    for base in (drawn(), near, few, predicted):
        code, mode = residual.encode(base, predicted, merged)
        assert residual.decode(code, mode, predicted.copy(), merged).tobytes() == base.tobytes()


def merged_and_predicted(terms: list[Term], w: Array, dtype: str) -> tuple[Array, Array]:
    merged, predicted, _ = Update(terms).add_and_predict(w, dtype)
    assert predicted is not None
    return merged, predicted


@pytest.mark.parametrize("dtype", ("F32", "F16", "BF16"))
@pytest.mark.parametrize("size", (0.08, 0.01))
def test_weights_are_certain_where_numbers_lie_no_denser_than_around_the_merged_one(dtype: str, size: float) -> None:
    """The proof of the page, at 100,000 weights: there the prediction is the weight but for powers of two."""
    rng = np.random.default_rng(0)
    w = round_to(rng.standard_normal((250, 400)) * 0.02, dtype)
    left, right = rng.standard_normal((250, 8)), rng.standard_normal((8, 400))
    terms = [Term(0.02 * size / 8**0.5, left.astype("<f4"), right.astype("<f4"))]
    merged, predicted = merged_and_predicted(terms, w, dtype)
    mask = residual._EXPONENTS[w.dtype.str]
    exponents = [bits(side) & bits(side).dtype.type(mask) for side in (predicted, merged)]
    differ = (bits(w) != bits(predicted)) & (exponents[0] >= exponents[1])
    powers = bits(predicted) & bits(predicted).dtype.type((mask & -mask) - 1) == 0
    assert np.array_equal(differ, differ & powers) and differ.mean() < 0.002
    code, mode = residual.encode(w.reshape(-1), predicted.reshape(-1), merged.reshape(-1))
    assert mode == UNCERTAIN
    if dtype == "BF16":
        assert len(code) < {0.08: 0.02, 0.01: 0.006}[size] * w.nbytes


def test_ties_are_coded_one_by_one() -> None:
    """Where half of all results are ties the exceptions would be many: all elements are coded then."""
    rng = np.random.default_rng(9)
    w = round_to(1 + 2.0**-7 * rng.integers(0, 60, (64, 128)), "BF16")
    left = rng.integers(-3, 4, (64, 4)).astype(np.float32)
    right = rng.integers(-3, 4, (4, 128)).astype(np.float32) * np.float32(2.0**-8)
    merged, predicted = merged_and_predicted([Term(1.0, left, right)], w, "BF16")
    flat = [side.reshape(-1) for side in (w, predicted, merged)]
    code, mode = residual.encode(*flat)
    assert mode == RESIDUAL and residual.decode(code, mode, flat[1].copy(), flat[2]).tobytes() == w.tobytes()


def deflated(*gaps: int) -> bytes:
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    return packer.compress(np.array(gaps, "<u4").tobytes()) + packer.flush()


def code_of(count: int, gaps: bytes, rest: bytes) -> bytes:
    return np.array([count, len(gaps)], "<u8").tobytes() + gaps + rest


ONE = np.full(64, 0x3F80, "<u2")  # 1.0: nothing is uncertain but the last, whose merged weight is larger
MERGED = np.where(np.arange(64) == 63, 0x4000, 0x3F80).astype("<u2")
REST = residual.encode_residual(ONE[:2], ONE[:2])

DAMAGED: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "cut off": lambda: code_of(1, deflated(3), REST)[:-1],
    "more exceptions than elements": lambda: code_of(65, deflated(*range(65)), REST),
    "a count that no memory holds": lambda: code_of(1 << 60, deflated(3), REST),
    "positions longer than the code": lambda: np.array([1, 1 << 40], "<u8").tobytes() + deflated(3) + REST,
    "positions that are no deflate": lambda: code_of(1, b"\xff\xff", REST),
    "fewer positions than it says": lambda: code_of(2, deflated(3), REST),
    "a position beyond the end": lambda: code_of(1, deflated(64), REST),
    "positions that run out of 32 bits": lambda: code_of(2, deflated(2**32 - 1, 2**32 - 1), REST),
    "the same position twice": lambda: code_of(2, deflated(3, 0), REST),
    "an element that is coded already": lambda: code_of(1, deflated(63), REST),
    "steps of fewer elements": lambda: code_of(40, deflated(*[1] * 40), REST),
}


def test_a_good_code_is_read() -> None:
    """The others differ from it in one thing each."""
    assert np.array_equal(residual.decode(code_of(1, deflated(3), REST), UNCERTAIN, ONE.copy(), MERGED), ONE)


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_exceptions_are_refused(what: str) -> None:
    with pytest.raises(UndoError):
        residual.decode(DAMAGED[what](), UNCERTAIN, ONE.copy(), MERGED)


@pytest.mark.medium
def test_flipped_bits_of_a_record_never_give_other_weights(tmp_path: Path) -> None:
    """Every byte of the codes of a golden record changed, and signed again: refused, or the same base comes back."""
    for version in ("v1", "v2"):
        model = tmp_path / version
        shutil.copytree(RECORDS / version, model)
        record, codes = record_of(model), next(model.rglob("undo.bin"))
        good, stated = codes.read_bytes(), json.loads(record.read_text())
        refused = 0
        for n in range(0, len(good), 7):
            codes.write_bytes(good[:n] + bytes([good[n] ^ 1 << n % 8]) + good[n + 1 :])
            new = hashlib.sha256(codes.read_bytes()).hexdigest()
            record.write_bytes(sign({**stated, "stored": {**stated["stored"], "undo.bin": new}}))
            try:
                api.unmerge(model, tmp_path / "back", overwrite=True)
            except LrcError:
                refused += 1
            else:
                assert digest(tmp_path / "back") == BASE
        assert refused > len(good) // 10


# --- one pass for both ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dead", (False, True))
def test_one_pass_predicts_what_a_second_one_would(dtype: str, dead: bool) -> None:
    """Both results at once have the bits, and the statistics, of one after the other."""
    rng = np.random.default_rng(3)
    left = (rng.standard_normal((90, 5)) * 0.01).astype(np.float32)
    right = rng.standard_normal((5, 70)).astype(np.float32)
    if dead:
        left[rng.random(90) < 0.5], right[:, rng.random(70) < 0.5] = 0, 0
    w = round_to(rng.standard_normal((90, 70)) * 10.0 ** -rng.integers(0, 9, (90, 70)), dtype)
    update = Update([Term(0.7, left, right), Term(-0.1, left[:, :2], right[:2])])
    merged, predicted, stats = update.add_and_predict(w, dtype)
    alone, same = update.add(w, dtype)
    again, _ = update.negated().add(merged, dtype)
    assert predicted is not None and stats == same
    assert np.array_equal(bits(merged), bits(alone)) and np.array_equal(bits(predicted), bits(again))
    plain, few = update.add(w, dtype, measure=False)
    assert np.array_equal(bits(plain), bits(alone)) and few.elements == stats.elements


def test_a_difference_beyond_the_range_is_no_prediction() -> None:
    """The merge itself is in range, at its very end, and what takes it back is not."""
    top = np.array([[0x7F7F, 0x3F80]], "<u2")  # the largest bf16, whose unit is 2^120, and 1
    merged, predicted, stats = Update([Term(-1.5, np.ones((1, 1)), np.array([[2.0**120, 0]]))]).add_and_predict(
        top, "BF16"
    )
    assert merged.tolist() == [[0x7F7E, 0x3F80]] and stats.changed == 1  # a tie, to even; undone, one to infinity
    assert predicted is None
