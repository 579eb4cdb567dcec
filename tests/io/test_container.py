"""Strict safetensors reading: a subset of what the library accepts, with the same tensors."""

from __future__ import annotations

import json
import os

import hostile
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from conftest import FIXTURES
from hypothesis import given, settings
from hypothesis import strategies as st

from lrconvert import testing
from lrconvert.core import errors, limits
from lrconvert.core.limits import FOREIGN
from lrconvert.io import container
from lrconvert.io.checkpoint import INDEX_NAME, SINGLE_NAME, open_checkpoint

DTYPES = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "U8": np.uint8}


def build(header: dict | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@st.composite
def tensors(draw):
    names = draw(
        st.lists(st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8), unique=True, max_size=5)
    )
    return {
        name: np.frombuffer(os.urandom(8 * 24), np.uint8).view(DTYPES[draw(st.sampled_from(sorted(DTYPES)))])[
            : draw(st.integers(1, 6))
        ]
        for name in names
    }


@given(tensors(), st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=1))
@settings(max_examples=40)
def test_reads_what_the_library_writes_and_writes_the_same_bytes(tmp_path_factory, values, metadata):
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    data = safetensors.numpy.save(values, metadata or None)
    path.write_bytes(data)
    with container.ContainerFile(path) as file:
        assert {t.name for t in file.tensors} == set(values)
        for info in file.tensors:
            assert file.load(info).array.tobytes() == values[info.name].tobytes()
        header = container.encode_header([(t.name, t.dtype, t.shape) for t in file.tensors], file.metadata)
        if values:
            assert header == data[: len(header)] == file.header_bytes


def ours(path, limits=FOREIGN):
    """(metadata, {name: (dtype, shape, bytes)}) as we read a file, or None where we refuse it."""
    try:
        with container.ContainerFile(path, limits) as file:
            stored = {t.name: (t.dtype, list(t.shape), bytes(file.read(t))) for t in file.tensors}
            return file.metadata, stored
    except errors.LrcError:
        return None


def check_against_the_library(path):
    """What we accept, the library accepts from memory and from the file, and finds the same in it. Whether we did."""
    accepted = ours(path)
    if accepted is None:
        return False
    metadata, tensors = accepted
    theirs = {n: (i["dtype"], i["shape"], bytes(i["data"])) for n, i in safetensors.deserialize(path.read_bytes())}
    assert theirs == tensors
    with safetensors.safe_open(path, "np") as opened:
        assert (opened.metadata() or {}) == metadata
        assert set(opened.keys()) == set(tensors)
        for name, (dtype, shape, _) in tensors.items():
            lazy = opened.get_slice(name)
            assert (lazy.get_dtype(), lazy.get_shape()) == (dtype, shape)
    return True


@given(st.data())
@settings(max_examples=300, deadline=None)
@pytest.mark.medium
def test_strict_subset_of_the_library(tmp_path_factory, data):
    """One thing wrong with a file that both read: our own error, or the library reads the same tensors."""
    good = data.draw(testing.safetensors_files())
    path = tmp_path_factory.getbasetemp() / "differential.safetensors"
    path.write_bytes(good)
    assert check_against_the_library(path)
    path.write_bytes(data.draw(testing.mutations(good)).data)
    check_against_the_library(path)


HOSTILE = sorted(name for name in hostile.tree() if name.endswith((".safetensors", ".lrc")))
GOLDEN = sorted((FIXTURES / "golden").rglob("*.lrc")) + sorted((FIXTURES / "golden").rglob("*.safetensors"))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_against_the_library(name, hostile_files):
    check_against_the_library(hostile_files / name)


def test_the_comparison_compares(hostile_files):
    """It accepts real files, and what the library reads in its own way is what we refuse."""
    assert all(check_against_the_library(path) for path in GOLDEN)
    looser = []
    for path in (hostile_files / name for name in HOSTILE):
        try:
            safetensors.deserialize(path.read_bytes())
        except safetensors.SafetensorError:
            continue
        if ours(path) is None:
            looser.append(path.name)
    assert {"H05-tensor-twice-other-dtype.safetensors", "H06-metadata-key-twice.safetensors"} <= set(looser)
    assert {"H13-zero-size.safetensors", "H04-leading-space.safetensors"} <= set(looser)


@pytest.mark.parametrize("length", [0x0280, 0x4B50, 0x0180, 0x2550])
def test_a_header_may_be_as_long_as_a_magic_number(length, tmp_path):
    """Lengths whose bytes begin a pickle, a zip, a PDF: a good file is told by its whole frame."""
    text = json.dumps({"a": entry()}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(build(text + b" " * (length - len(text)), b"1234"))
    assert path.read_bytes()[:2] in (b"\x80\x02", b"PK", b"\x80\x01", b"P%")
    assert check_against_the_library(path)


def test_names_that_lead_nowhere_are_not_overlooked(tmp_path):
    """A dangling config.json or index is an error and not a model without one."""
    (tmp_path / SINGLE_NAME).write_bytes(safetensors.numpy.save({"a": np.ones(1, np.float32)}))
    for name in ("config.json", INDEX_NAME):
        (tmp_path / name).symlink_to("nowhere")
        with pytest.raises(errors.FileKindError):
            open_checkpoint(tmp_path)
        (tmp_path / name).unlink()
    with open_checkpoint(tmp_path) as base:
        assert set(base.tensors) == {"a"}


CASES = {
    "empty file": (b"", errors.FileKindError),
    "length 0": ((0).to_bytes(8, "little"), errors.HeaderLengthError),
    "length 2^63": ((1 << 63).to_bytes(8, "little") + b"{}", errors.HeaderLengthError),
    "length beyond the file": (build({}, length=99), errors.HeaderLengthError),
    "leading space": (build(b' {"a":1}'), errors.HeaderTextError),
    "not JSON": (build(b"{nope"), errors.JsonSyntaxError),
    "duplicate tensor": (
        build(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), b"1234"),
        errors.JsonDuplicateError,
    ),
    "unknown field": (build({"a": {**entry(), "x": 1}}, b"1234"), errors.UnknownFieldError),
    "overlap": (build({"a": entry(), "b": entry(offsets=(2, 6))}, b"123456"), errors.OffsetError),
    "hole": (build({"a": entry(), "b": entry(offsets=(6, 10))}, b"1234567890"), errors.OffsetError),
    "trailing bytes": (build({"a": entry()}, b"12345"), errors.CoverageError),
    "cut off": (build({"a": entry()}, b"123"), errors.CoverageError),
    "reversed": (build({"a": entry(offsets=(4, 0))}, b"1234"), errors.DtypeError),
    "size mismatch": (build({"a": entry(shape=(2,))}, b"1234"), errors.DtypeError),
    "unknown dtype": (build({"a": entry(dtype="F4")}, b"1234"), errors.DtypeError),
    "huge dimension": (build({"a": entry(shape=(2**40, 2**40, 0))}, b"1234"), errors.ShapeError),
    "zero size": (build({"a": entry(shape=(0,), offsets=(0, 0))}), errors.ShapeError),
    "boolean shape": (build({"a": entry(shape=(True,))}, b"1234"), errors.ShapeError),
    "negative": (build({"a": entry(shape=(-1,))}, b"1234"), errors.ShapeError),
    "many dimensions": (build({"a": entry(shape=(1,) * 100_000)}, b"1234"), errors.ShapeError),
    "empty name": (build({"": entry()}, b"1234"), errors.TensorNameError),
    "escape in a name": (build({"a\x1b[2J": entry()}, b"1234"), errors.TensorNameError),
    "pickle": (b"\x80\x02}q\x00." + b"x" * 20, errors.PickleError),
    "zip": (b"PK\x03\x04" + b"x" * 20, errors.PickleError),
}


@pytest.mark.parametrize("case", CASES)
def test_refusals(case, tmp_path):
    data, error = CASES[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(error) as caught:
        container.ContainerFile(path)
    assert str(path) in str(caught.value)


def test_null_metadata_is_none_in_files_of_others(tmp_path):
    """mlx writes it; our own files never have it."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(build({"__metadata__": None, "a": entry()}, b"1234"))
    with container.ContainerFile(path) as file:
        assert file.metadata == {} and list(file.by_name) == ["a"]
    with pytest.raises(errors.JsonSyntaxError):
        container.ContainerFile(path, limits.OWN)


def test_no_special_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "absent"):
        with pytest.raises(errors.FileKindError):
            container.ContainerFile(path)


def test_pieces_of_a_tensor_are_its_bytes(tmp_path, monkeypatch):
    """A tensor that is read in pieces, of which the last is shorter, is the one that is read at once."""
    monkeypatch.setattr(container, "_PIECE", 7)
    tensors = {"one": np.arange(7, dtype=np.uint8), "more": np.arange(5.0)}
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors.numpy.save(tensors))
    with container.ContainerFile(path) as file:
        for name, array in tensors.items():
            pieces = [bytes(piece) for piece in file.chunks(file.by_name[name])]
            assert b"".join(pieces) == bytes(file.read(file.by_name[name])) == array.tobytes()
            assert file.load(file.by_name[name]).array.tobytes() == array.tobytes()


def test_a_shrinking_file_is_an_error(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors.numpy.save({"a": np.zeros(1000, np.float32)}))
    with container.ContainerFile(path) as file:
        os.truncate(path, 2000)
        with pytest.raises(errors.FileChangedError):
            file.read(file.by_name["a"])
        with pytest.raises(errors.FileChangedError):
            file.load(file.by_name["a"])
        with pytest.raises(errors.FileChangedError):
            file.check_unchanged()


def sharded(folder, index: dict, shards: dict[str, dict[str, np.ndarray]]):
    for name, values in shards.items():
        (folder / name).write_bytes(safetensors.numpy.save(values))
    (folder / INDEX_NAME).write_text(json.dumps(index))


def test_sharded_checkpoint(tmp_path):
    a, b = np.ones(3, np.float32), np.zeros(2, np.float16)
    sharded(
        tmp_path,
        {"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}},
        {"m-1.safetensors": {"a": a}, "m-2.safetensors": {"b": b}},
    )
    with open_checkpoint(tmp_path) as base:
        assert set(base.tensors) == {"a", "b"}
        digest = base.content_digest()
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / SINGLE_NAME).write_bytes(safetensors.numpy.save({"b": b, "a": a}))
    with open_checkpoint(tmp_path / "one") as base:
        assert base.content_digest() == digest, "sharding must not change the digest"


@pytest.mark.parametrize(
    ("weight_map", "error"),
    [
        ({"a": "../m.safetensors"}, errors.ShardPathError),
        ({"a": "/m.safetensors"}, errors.ShardPathError),
        ({"a": "C:\\m.safetensors"}, errors.ShardPathError),
        ({"a": "m.bin"}, errors.ShardPathError),
        ({"a": "gone.safetensors"}, errors.FileKindError),
        ({"a": "m.safetensors", "b": "m.safetensors"}, errors.ShardIndexError),
        ({"c": "m.safetensors"}, errors.ShardIndexError),
        ({}, errors.ShardIndexError),
        ({"a": "link.safetensors"}, errors.ShardPathError),
    ],
)
def test_hostile_index(weight_map, error, tmp_path):
    root = tmp_path / "model"
    root.mkdir()
    sharded(root, {"weight_map": weight_map}, {"m.safetensors": {"a": np.ones(1, np.float32)}})
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes((root / "m.safetensors").read_bytes())
    (root / "link.safetensors").symlink_to(outside)
    with pytest.raises(error):
        open_checkpoint(root)


def test_hub_cache_links_are_followed_inside_the_cache(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "123").write_bytes(safetensors.numpy.save({"a": np.ones(1, np.float32)}))
    (snapshot / SINGLE_NAME).symlink_to(blobs / "123")
    with open_checkpoint(snapshot) as base:
        assert set(base.tensors) == {"a"}


def test_quantized_and_pickled_bases_are_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(errors.QuantizedBaseError, match="unquantized parent"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(errors.PickleError, match="save_pretrained"):
        open_checkpoint(tmp_path)


def test_limits_are_checked_before_reading(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(build({"a": entry()}, b"1234"))
    from dataclasses import replace

    with pytest.raises(errors.LimitError):
        container.ContainerFile(path, replace(FOREIGN, tensors=0))
    with pytest.raises(errors.HeaderLengthError):
        container.ContainerFile(path, replace(FOREIGN, header_bytes=8))
