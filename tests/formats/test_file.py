"""The lrconvert file: canonical bytes, exact sizes, every byte guarded, every finding reported."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from conftest import FIXTURES, random_lora
from hypothesis import given, settings
from hypothesis import strategies as st
from models import updates_on

from lrconvert import api
from lrconvert.core import errors
from lrconvert.core.dtypes import STORAGE
from lrconvert.formats.lrc import file
from lrconvert.formats.lrc import manifest as manifest_module
from lrconvert.formats.lrc.validation import validate
from lrconvert.io import container, strictjson
from lrconvert.lora import packing
from lrconvert.lora.adapter import BaseFingerprint, CompactAdapter, ExtraTensor, LoraAdapter, Provenance, Target, View
from lrconvert.lora.fingerprint import content_digest, fingerprint
from lrconvert.methods import lowrank

EXTRAS = (
    ExtraTensor("classifier.bias", "F32", (2,), np.array([np.nan, -0.0], np.float32).tobytes()),
    ExtraTensor("größe.weight", "BF16", (), b"\x01\x02"),
)


NUMPY = {"F16": np.float16, "U8": np.uint8}


def sample(extras=EXTRAS) -> file.CompactAdapter:
    lora = replace(
        random_lora(),
        extras=tuple(sorted(extras, key=lambda e: e.name)),
        provenance=Provenance("ab" * 32, "org/base", "main", "SEQ_CLS", {"peft_version": "0.21"}),
    )
    return api.convert(lora, "lowrank", bits=3).compact


def same(one: file.CompactAdapter, two: file.CompactAdapter) -> bool:
    return (
        replace(one, tensors={}) == replace(two, tensors={})
        and set(one.tensors) == set(two.tensors)
        and all(np.array_equal(one.tensors[k], two.tensors[k]) for k in one.tensors)
    )


def resign(data: bytes, edit) -> bytes:
    """The file with its manifest changed by `edit`, spelled canonically, its content digest made right again."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    manifest = json.loads(header["__metadata__"]["lrconvert"])
    content = manifest["digests"]["content"]
    manifest = edit(manifest) or manifest
    broken = AttributeError, KeyError, TypeError, ValueError
    with contextlib.suppress(*broken):  # digests too broken to be signed stay so
        if manifest["digests"]["content"] == content:
            manifest["digests"]["content"] = content_digest(manifest["digests"]["tensors"], manifest)
    header["__metadata__"]["lrconvert"] = strictjson.dump_canonical(manifest).decode()
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def test_round_trip_and_exact_size(tmp_path):
    compact = sample()
    sizes = file.write(compact, tmp_path / "x.lrc")
    assert (tmp_path / "x.lrc").stat().st_size == sizes.total == sizes.payload + sizes.overhead + sizes.extras
    assert same(file.read(tmp_path / "x.lrc"), compact)
    assert file.sizes(replace(compact, extras=())).total == sizes.adapter


def test_the_library_reads_it_and_would_write_the_same_header(tmp_path):
    file.write(sample(), tmp_path / "x.lrc")
    data = (tmp_path / "x.lrc").read_bytes()
    tensors = dict(safetensors.deserialize(data))
    with container.ContainerFile(tmp_path / "x.lrc") as opened:
        arrays = {k: np.frombuffer(v["data"], NUMPY[v["dtype"]]).reshape(v["shape"]) for k, v in tensors.items()}
        again = safetensors.numpy.save(arrays, opened.metadata)
    assert again == data


@pytest.mark.parametrize(
    "environment", [{"PYTHONHASHSEED": "1"}, {"PYTHONHASHSEED": "77", "LC_ALL": "C", "TZ": "Asia/Tokyo"}]
)
def test_same_bytes_everywhere(tmp_path, environment):
    """The same command writes the same bytes, whatever the hash seed, locale or time zone."""
    source = FIXTURES / "adapters" / "llama-plain"
    paths = [tmp_path / "one.lrc", tmp_path / "two.lrc"]
    for path, env in zip(paths, [{}, environment], strict=True):
        words = ["lora-to-lowrank", str(source), "-o", str(path), "--target-ratio", "12", "-q"]
        subprocess.run([sys.executable, "-m", "lrconvert.cli", *words], check=True, env={**os.environ, **env})
    assert paths[0].read_bytes() == paths[1].read_bytes()


def golden_files():
    return sorted((FIXTURES / "golden" / "v1").glob("*/*.lrc"))


def test_there_are_golden_files_of_every_method():
    from lrconvert.methods import base as methods

    assert {p.parent.name for p in golden_files()} == set(methods.module_names())


@pytest.mark.parametrize("path", golden_files(), ids=lambda p: p.stem)
def test_golden_files_mean_the_same_forever(path, tmp_path):
    """Read, expand, and compare with the factors stored when the file was written; writing gives the same bytes."""
    from safetensors.numpy import load_file

    from lrconvert.methods import base as methods

    compact = file.read(path)
    stored = load_file(path.with_suffix(".expanded.safetensors"))
    seen = set()
    if methods.get(compact.method).needs_base(compact.config):
        shutil.copy(path.with_suffix(".base.safetensors"), tmp_path / "model.safetensors")
        updates = updates_on(compact, tmp_path)
        assert updates.keys() == stored.keys() and all(np.array_equal(updates[key], stored[key]) for key in updates)
        assert b"".join(file.encode(compact)) == path.read_bytes()
        return
    for target, a, b in methods.expand_all(compact):
        if a.shape[0] == 0:  # no update, no factors
            continue
        assert np.array_equal(a, stored[f"{target.name}.A"]) and np.array_equal(b, stored[f"{target.name}.B"])
        seen |= {f"{target.name}.A", f"{target.name}.B"}
    assert seen == set(stored)
    assert b"".join(file.encode(compact)) == path.read_bytes()


def missed_flips(good: bytes, target: Path, bits: Iterable[int]) -> list[int]:
    """Write `good` to `target`, flip these bits one at a time, and return those of which `validate` finds nothing."""
    target.write_bytes(good)
    missed = []
    with target.open("r+b", buffering=0) as out:
        for bit in bits:
            position, value = bit // 8, good[bit // 8]
            os.pwrite(out.fileno(), bytes([value ^ 1 << bit % 8]), position)
            if validate(target).ok:
                missed.append(bit)
            os.pwrite(out.fileno(), bytes([value]), position)
    assert target.read_bytes() == good and validate(target).ok
    return missed


@pytest.mark.parametrize("path", golden_files(), ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_flipped_bits_are_found(path, tmp_path):
    """A sample: 100 bits of every golden file, drawn anew only when the file changes. The slow test has them all."""
    good = path.read_bytes()
    bits = Random(good).sample(range(8 * len(good)), 100)
    assert missed_flips(good, tmp_path / "x.lrc", bits) == []


@pytest.mark.slow
@pytest.mark.parametrize("path", golden_files(), ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_any_flipped_bit_is_found(path, place):
    """Every bit of the two smallest golden files, and one bit of every byte of the others (which one varies with the
    position); in memory."""
    good = path.read_bytes()
    smallest = sorted(golden_files(), key=lambda other: other.stat().st_size)[:2]
    bits = range(8 * len(good)) if path in smallest else [8 * n + n % 8 for n in range(len(good))]
    assert missed_flips(good, place / "x.lrc", bits) == []


@pytest.mark.medium
@given(st.data())
@settings(max_examples=150, deadline=None)
def test_random_damage_gives_only_our_errors(tmp_path_factory, data):
    good = b"".join(file.encode(sample()))
    kind = data.draw(st.sampled_from(["splice", "cut", "insert", "zero"]))
    at = data.draw(st.integers(0, len(good) - 1))
    junk = data.draw(st.binary(min_size=1, max_size=12))
    bad = {
        "splice": good[:at] + junk + good[at + len(junk) :],
        "cut": good[:at],
        "insert": good[:at] + junk + good[at:],
        "zero": good[:at] + bytes(8) + good[at + 8 :],
    }[kind]
    path = tmp_path_factory.mktemp("damage") / "x.lrc"
    path.write_bytes(bad)
    result = validate(path)
    assert result.ok == (bad == good)
    assert all(f.code.startswith("E-") for f in result.findings)


def edit(**changes):
    def apply(manifest):
        manifest.update(changes)

    return apply


def config(**changes):
    def apply(manifest):
        manifest["method"]["config"].update(changes)

    return apply


def method(**changes):
    def apply(manifest):
        manifest["method"].update(changes)

    return apply


def targets(change):
    def apply(manifest):
        manifest["targets"] = change(manifest["targets"])

    return apply


def member(**changes):
    return lambda groups: [{**g, "members": [{**m, **changes} for m in g["members"]]} for g in groups]


MANIFESTS = {
    "newer container": (edit(version=2), "E-VER"),
    "version 0": (edit(version=0), "E-VER"),
    "version as text": (edit(version="1"), "E-VER"),
    "other format": (edit(format="gguf"), "E-VER"),
    "unknown feature": (edit(requires=["teleport"]), "E-VER"),
    "unknown method": (method(id="nope"), "E-VER"),
    "newer method": (method(version=9), "E-VER"),
    "unknown field": (edit(more=1), "E-UNKNOWN"),
    "unknown config field": (config(more=1), "E-UNKNOWN"),
    "missing section": (lambda m: {k: v for k, v in m.items() if k != "base"}, "E-MISSING"),
    "no targets": (edit(targets=[]), "E-MISSING"),
    "huge shape": (targets(member(shape=[2**40, 2])), "E-SHAPE"),
    "billions of targets": (targets(lambda t: [{**t[0], "ranges": [0, 10**8]}]), "E-LIMIT"),
    "huge expansion": (targets(member(shape=[2**31 - 1, 2**31 - 1])), "E-LIMIT"),
    "range backwards": (targets(lambda t: [{**t[0], "ranges": [1, 0]}]), "E-MISSING"),
    "split range": (targets(lambda t: [{**g, "ranges": [0, 0, 1, 1]} for g in t]), "E-CANON"),
    "target named twice": (targets(lambda t: [{**t[0], "members": t[0]["members"] * 2}]), "E-INDEX"),
    "unsorted targets": (targets(lambda t: [{**t[0], "members": t[0]["members"][::-1]}]), "E-CANON"),
    "unknown view": (targets(member(view="diagonal")), "E-JSON-SYNTAX"),
    "levels unsorted": (config(levels=[1, 3]), "E-JSON-SYNTAX"),
    "absurd rank": (config(max_count=10**6), "E-LIMIT"),
    "exponent out of range": (method(exponents="7f"), "E-LIMIT"),
    "too many exponents": (method(exponents="0000"), "E-UNKNOWN"),
    "digest in capitals": (lambda m: m["base"].update(names="AB" * 32), "E-DIGEST"),
    "digest of nothing": (lambda m: m["digests"]["tensors"].update(ghost="00" * 32), "E-MISSING"),
    "extra renamed twice": (lambda m: m["extras"].append(m["extras"][0]), "E-CANON"),
    "extra of another size": (lambda m: m["extras"][0].update(shape=[3]), "E-SHAPE"),
    "unknown extra dtype": (lambda m: m["extras"][0].update(dtype="F4"), "E-DTYPE"),
    "extra of 4 GiB": (lambda m: m["extras"][0].update(dtype="U8", shape=[2**31 - 1, 2]), "E-SHAPE"),
    "extra of five dimensions": (lambda m: m["extras"][0].update(shape=[1, 1, 1, 1, 2]), "E-SHAPE"),
    "extra without a name": (lambda m: m["extras"][0].update(name=""), "E-NAME"),
    "target without a name": (targets(lambda t: [{"name": "", "shape": [24, 16]}]), "E-NAME"),
    "view of three kernel dimensions": (targets(member(view="conv:1x1x1:1", shape=[24, 16, 1, 1])), "E-JSON-SYNTAX"),
    "view with a leading zero": (targets(member(view="rows:0:024")), "E-JSON-SYNTAX"),
    "kernel with a leading zero": (targets(member(view="conv:01:1", shape=[24, 16, 1])), "E-JSON-SYNTAX"),
    "view in digits of another script": (targets(member(view="rows:0:2\N{ARABIC-INDIC DIGIT FOUR}")), "E-JSON-SYNTAX"),
    "names of other targets": (lambda m: m["base"].update(names="00" * 32), "E-DIGEST"),
    "source that is no digest": (lambda m: m["provenance"].update(source="org/adapter"), "E-DIGEST"),
    "levels of booleans": (config(levels=[True]), "E-JSON-SYNTAX"),
    "groups longer than every row": (config(group_size=24), "E-CANON"),
}


def _two_kinds() -> LoraAdapter:
    """Two targets in one layer: one entry with two members."""
    lora = random_lora()
    names = ["layers.0.a.weight", "layers.0.b.weight"]
    return replace(
        lora,
        targets=tuple(replace(p, target=replace(p.target, name=n)) for p, n in zip(lora.targets, names, strict=True)),
    )


def test_groups_without_scales_are_refused(tmp_path):
    good = b"".join(file.encode(api.convert(random_lora(), "lowrank", bits=14, group_size=8).compact))
    (tmp_path / "x.lrc").write_bytes(resign(good, config(group_size=8)))
    with pytest.raises(errors.CanonicalError, match="group_size"):
        file.read(tmp_path / "x.lrc")


@pytest.mark.parametrize("size", [None, 1300])
def test_one_group_per_row_has_one_spelling(size):
    """The longest row has 40 numbers: groups of 40 are whole rows, groups of 39 are not."""
    group_sizes = [
        api.convert(random_lora(), "lowrank", bits=2, group_size=n, target_size=size).compact.config.group_size
        for n in (0, 39, 40, 10**12)
    ]
    assert group_sizes == [0, 39, 0, 0]


@pytest.mark.parametrize("half", [rb"o\\ud800", rb"oo\ud800"], ids=["in the manifest", "in the header"])
def test_half_a_character_is_refused(half, tmp_path):
    good = b"".join(file.encode(sample()))
    assert good.count(b"org/base") == 1
    (tmp_path / "x.lrc").write_bytes(good.replace(b"org/base", half))
    assert {f.code for f in validate(tmp_path / "x.lrc").findings} == {"E-HDR-TEXT"}


@pytest.mark.parametrize("case", MANIFESTS)
def test_manifests_that_are_refused(case, tmp_path):
    change, code = MANIFESTS[case]
    lora = _two_kinds() if case == "unsorted targets" else random_lora([(24, 16), (24, 16)])
    compact = api.convert(replace(lora, extras=sample().extras), "lowrank", bits=3).compact
    path = tmp_path / "x.lrc"
    path.write_bytes(resign(b"".join(file.encode(compact)), change))
    result = validate(path)
    assert code in {f.code for f in result.findings}, result.findings
    with pytest.raises(errors.LrcError):
        file.read(path)


class Huge(bytes):
    """Bytes that claim to be 4 GiB."""

    def __len__(self) -> int:
        return 2**32


def with_extras(*extras):
    return lambda compact: replace(compact, extras=extras)


def with_targets(*targets):
    return lambda compact: replace(compact, targets=targets, base=fingerprint(targets))


def came(**changes):
    return lambda compact: replace(compact, provenance=replace(compact.provenance, **changes))


def settings_of(**changes):
    return lambda compact: replace(compact, config=replace(compact.config, **changes))


def tensor(change):
    """`change` applied to the codes and to the scales."""
    return lambda compact: replace(compact, tensors={name: change(a) for name, a in compact.tensors.items()})


ONE = Target("a.weight", (24, 16))
TWO = Target("b.weight", (16, 40))
UNWRITABLE = {
    "extra of five dimensions": (with_extras(ExtraTensor("conv", "U8", (1, 1, 1, 1, 2), b"ab")), "E-SHAPE"),
    "extra without elements": (with_extras(ExtraTensor("none", "F32", (0, 4), b"")), "E-SHAPE"),
    "extra of another size": (with_extras(ExtraTensor("a", "F32", (2,), b"abcd")), "E-SHAPE"),
    "extra of unknown dtype": (with_extras(ExtraTensor("a", "F4", (2,), b"a")), "E-DTYPE"),
    "extra without a name": (with_extras(ExtraTensor("", "U8", (1,), b"a")), "E-NAME"),
    "extras unsorted": (with_extras(*(ExtraTensor(n, "U8", (1,), b"a") for n in "ba")), "E-CANON"),
    "extra named twice": (with_extras(*(ExtraTensor(n, "U8", (1,), b"a") for n in "aa")), "E-CANON"),
    "extra not in normal form": (with_extras(ExtraTensor("gro\u0308\u00dfe", "U8", (1,), b"a")), "E-CANON"),
    "extra with half a character": (with_extras(ExtraTensor("\ud800", "U8", (1,), b"a")), "E-CANON"),
    "file over 16 GiB": (
        with_extras(*(ExtraTensor(f"{n}", "U8", (2**16, 2**16), Huge()) for n in range(4))),
        "E-LIMIT",
    ),
    "no targets": (with_targets(), "E-MISSING"),
    "targets unsorted": (with_targets(TWO, ONE), "E-CANON"),
    "target named twice": (with_targets(ONE, ONE), "E-INDEX"),
    "one target more": (with_targets(ONE, TWO, replace(TWO, name="c.weight")), "E-SHAPE"),
    "target without a name": (with_targets(replace(ONE, name=""), TWO), "E-NAME"),
    "target of a long name": (with_targets(replace(ONE, name="a" * 4090 + ".1.weight"), TWO), "E-LIMIT"),
    "target of five dimensions": (with_targets(replace(ONE, shape=(1,) * 5), TWO), "E-SHAPE"),
    "target of floats": (
        lambda compact: replace(compact, targets=(replace(ONE, shape=(24.0, 16.0)), TWO)),
        "E-JSON-NUM",
    ),
    "view that does not apply": (with_targets(replace(ONE, view=View("expert:0")), TWO), "E-SHAPE"),
    "rank above the shape": (with_targets(replace(ONE, shape=(1, 16)), TWO), "E-LIMIT"),
    "expansion of 100 GiB": (with_targets(replace(ONE, shape=(2**31 - 1, 2**31 - 1)), TWO), "E-LIMIT"),
    "no base": (lambda compact: replace(compact, base=BaseFingerprint("")), "E-DIGEST"),
    "names of other targets": (lambda compact: replace(compact, base=fingerprint((TWO,))), "E-DIGEST"),
    "source that is no digest": (came(source="org/adapter"), "E-DIGEST"),
    "control character": (came(base_model="a\nb"), "E-CANON"),
    "long hint": (came(base_model="a" * 4097), "E-LIMIT"),
    "bad field": (came(fields={"Größe": "1"}), "E-CANON"),
    "manifest over 1 MiB": (came(fields={f"f{n}": "a" * 4096 for n in range(256)}), "E-LIMIT"),
    "no tensors": (lambda compact: replace(compact, tensors={}), "E-MISSING"),
    "tensor of another shape": (tensor(lambda a: a[:-1]), "E-SHAPE"),
    "signed codes": (tensor(lambda a: a.astype(np.int8)), "E-INDEX"),
    "scales not rounded": (tensor(lambda a: a * np.float32(1.0001) if a.dtype == np.float32 else a), "E-VALUE"),
    "groups longer than every row": (settings_of(group_size=99), "E-CANON"),
    "groups of less than nothing": (settings_of(group_size=-1), "E-LIMIT"),
    "counts of other targets": (settings_of(counts=((1,),)), "E-SHAPE"),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_what_no_reader_would_accept_is_not_written(case, tmp_path):
    change, code = UNWRITABLE[case]
    good = sample()
    good = replace(good, targets=(ONE, TWO), base=fingerprint((ONE, TWO)))
    file.write(good, tmp_path / "good.lrc")
    with pytest.raises(errors.LrcError) as caught:
        file.write(change(good), tmp_path / "x.lrc")
    assert caught.value.code == code, caught.value
    assert not (tmp_path / "x.lrc").exists()


def test_a_head_of_4_gib_may_be_written():
    """Gemma's, trained and saved in float32: longer in bytes than a dimension may be."""
    file.check(with_extras(ExtraTensor("lm_head.weight", "F32", (2**18, 2**12), Huge()))(sample()))


def test_a_conversion_that_cannot_be_written_is_refused_before_the_fit(monkeypatch):
    monkeypatch.setattr("lrconvert.methods.lowrank.LowRank.fit", lambda *_: pytest.fail("fitted"))
    lora = replace(random_lora(), extras=(ExtraTensor("conv", "U8", (1, 1, 1, 1, 2), b"ab"),))
    for dry_run in (True, False):
        with pytest.raises(errors.ShapeError):
            api.convert(lora, "lowrank", dry_run=dry_run)


def test_notes_of_the_source_are_brought_into_form(tmp_path):
    notes = {"peft_version": "0.21\x1b", "modules_to_save": "m" * 5000}
    lora = replace(random_lora(), provenance=Provenance("", "org/cafe\u0301\n", "ma\tin", "a" * 5000, notes))
    file.write(api.convert(lora, "lowrank", bits=3).compact, tmp_path / "x.lrc")
    provenance = file.read(tmp_path / "x.lrc").provenance
    assert (provenance.base_model, provenance.revision, provenance.task_type) == ("org/café ", "ma in", "")
    assert provenance.fields["peft_version"] == "0.21 " and provenance.fields["modules_to_save"] == ""


FITTING = {
    "matrix": (4, 3),
    "transposed": (4, 3),
    "rows:0:3": (4, 3),
    "rows:1:4": (4, 3),
    "expert:0": (2, 4, 3),
    "expert:1": (2, 4, 3),
    "conv:2:1": (4, 3, 2),
    "conv:2x2:3": (4, 3, 2, 2),
}
WORDS = st.sampled_from(["h.0.w", "h.1.w", "h.007.w", "h.1.2.w", "0", "é", "h.1.\u0338w"])
ODD_WORDS = st.sampled_from(["e\u0301", "=\u0338", "a\nb", "\u2028", "", "x" * 4097]) | st.text(max_size=3)
ODD_SHAPES = st.sampled_from([(), (4,), (4, 0), (4, 3), (3, 3, 3), (1, 1, 1, 1), (4, 3, 1, 1, 1), (2**31, 3)])


@st.composite
def compacts(draw):
    """Compact adapters that can be written, but for one part that may be odd."""
    odd = draw(st.sampled_from(["", "", "", "word", "shape", "order", "config"]))
    words = WORDS | ODD_WORDS if odd == "word" else WORDS
    shapes = ODD_SHAPES if odd == "shape" else st.sampled_from([(), (2,), (2, 1, 3, 1)])
    chosen = {draw(words): draw(st.sampled_from(sorted(FITTING))) for _ in range(draw(st.integers(1, 4)))}
    targets = [
        Target(name, draw(shapes) if odd == "shape" else FITTING[view], View(view)) for name, view in chosen.items()
    ]
    if odd == "order":  # unsorted, or two slices of one parameter
        targets.append(replace(targets[0], view=View(draw(st.sampled_from(sorted(FITTING))))))
    else:
        targets.sort()
    extras = []
    for name in sorted(draw(st.sets(words, max_size=2))):
        dtype, shape = draw(st.sampled_from(sorted(STORAGE))), draw(shapes)
        size = min(math.prod(shape) * STORAGE[dtype].itemsize, 1000)
        extras.append(ExtraTensor(name, dtype, shape, bytes(size)))
    levels, group_size = draw(st.sampled_from([((16,), 0), ((2,), 0), ((2,), 2), ((16, 3), 1), ((8, 4, 1), 0)]))
    if odd == "config":
        levels, group_size = draw(st.sampled_from([((True,), 0), ((3, 16), 0), ((16,), 2), ((4,), 99)]))
    counts = [[draw(st.integers(int(t == 0), 1)) for _ in levels] for t in range(len(targets))]
    config = lowrank.Config(levels, tuple(map(tuple, counts)), group_size)
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    tensors = {
        spec.name: rng.integers(0, 1 << spec.bits, spec.shape, np.uint8)
        if spec.kind == "code"
        else packing.round_half(rng.standard_normal(spec.shape))
        for spec in lowrank.METHOD.specs(config, targets)
        if spec.numel < 1000
    }
    notes = Provenance(base_model=draw(words), fields={"note": draw(words)})
    return CompactAdapter("lowrank", config, tuple(targets), tensors, tuple(extras), notes, fingerprint(targets))


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_what_is_written_is_read_back(tmp_path_factory, data):
    """Any adapter is either refused with one of our errors, or read as it was."""
    path = tmp_path_factory.getbasetemp() / "property.lrc"
    try:
        compact = data.draw(compacts())
        written = b"".join(file.encode(compact))
    except errors.LrcError:
        return
    path.write_bytes(written)
    assert same(file.read(path), compact)


def test_every_finding_is_reported(tmp_path):
    """One file, three independent faults: a damaged tensor, an unknown tensor's digest, a wrong base section."""
    good = b"".join(file.encode(sample()))

    def damage(manifest):
        manifest["digests"]["tensors"]["ghost"] = "00" * 32
        manifest["base"] = {"names": "zz"}

    data = bytearray(resign(good, damage))
    data[-1] ^= 1
    path = tmp_path / "x.lrc"
    path.write_bytes(data)
    findings = {(f.level, f.code) for f in validate(path).findings}
    assert {("structure", "E-DIGEST"), ("semantics", "E-MISSING"), ("semantics", "E-DIGEST")} <= findings


def test_the_message_names_the_file_once(tmp_path):
    path = tmp_path / "x.lrc"
    path.write_bytes(b"{}")
    (finding,) = validate(path).findings
    assert finding.message.count(str(path)) == 1


names = st.from_regex(r"(layers\.[0-9]{1,2}|blocks\.[0-9]\.[0-9]|emb)\.(w|q\{\})(\.weight)?", fullmatch=True)


@given(
    st.sets(
        st.tuples(names, st.sampled_from([(4, 3), (3, 4)]), st.sampled_from(["matrix", "transposed"])),
        min_size=1,
        max_size=40,
    )
)
def test_target_grouping_is_a_bijection(items):
    targets = sorted({Target(n, shape, View(view)) for n, shape, view in items})
    groups = manifest_module.group_targets(targets)
    assert manifest_module.group_targets(targets[::-1]) == groups
    try:
        assert list(manifest_module._targets(json.loads(json.dumps(groups)))) == targets
    except errors.IndexRangeError:  # one parameter claimed twice
        assert len({t.name for t in targets}) < len(targets)


@pytest.mark.medium
@pytest.mark.parametrize("options", [{"bits": "16"}, {"bits": "2"}, {"target_ratio": 12}])
def test_small_stays_small(options):
    """32 layers, 224 targets: header, manifest and padding are at most max(2 KiB, 3 % of the payload)."""
    shapes = {
        "q_proj": (64, 64),
        "k_proj": (16, 64),
        "v_proj": (16, 64),
        "o_proj": (64, 64),
        "gate_proj": (192, 64),
        "up_proj": (192, 64),
        "down_proj": (64, 192),
    }
    base = random_lora(list(shapes.values()), rank=4)
    pairs = []
    for layer in range(32):
        for (name, shape), pair in zip(shapes.items(), base.targets, strict=True):
            block = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            pairs.append(replace(pair, target=Target(f"model.layers.{layer}.{block}.{name}.weight", shape)))
    lora = LoraAdapter(
        tuple(sorted(pairs, key=lambda p: p.target)),
        provenance=Provenance(
            "ab" * 32, "meta-llama/Llama-3-8B", "main", "CAUSAL_LM", {"source_format": "peft", "peft_version": "0.21.2"}
        ),
    )
    done = api.convert(lora, "lowrank", **options)
    assert done.sizes.overhead <= max(2048, 0.03 * done.sizes.payload), done.sizes


# --- roles of extras, float32 payload, older versions ---------------------------------------------------------------


def rows(indices) -> tuple[ExtraTensor, ExtraTensor]:
    return (
        ExtraTensor("embed.weight", "I64", (len(indices),), np.array(indices, "<i8").tobytes(), "row_indices"),
        ExtraTensor("embed.weight", "F16", (len(indices), 3), bytes(6 * len(indices)), "rows"),
    )


def carrying(*extras) -> file.CompactAdapter:
    return replace(sample(()), extras=tuple(sorted(extras, key=lambda e: (e.name, e.use))))


def test_parts_of_an_update_keep_their_role(tmp_path):
    bias = ExtraTensor("a.bias", "F32", (2,), bytes(8), "add")
    compact = carrying(*EXTRAS, *rows([0, 7]), bias, ExtraTensor("a.weight", "F32", (2,), bytes(8), "magnitude"))
    file.write(compact, tmp_path / "x.lrc")
    assert same(file.read(tmp_path / "x.lrc"), compact)
    assert [e.use for e in file.read(tmp_path / "x.lrc").extras if e.use != "replace"] == [
        *("add", "magnitude", "row_indices", "rows")
    ]


@pytest.mark.parametrize(
    ("extras", "error"),
    [
        (rows([7, 0]), errors.IndexRangeError),
        (rows([-1, 0]), errors.IndexRangeError),
        (rows([1, 1]), errors.IndexRangeError),
        (rows([1, 2])[:1], errors.ShapeError),
        (rows([1, 2])[1:], errors.ShapeError),
        ((rows([1, 2])[0], rows([1])[1]), errors.ShapeError),
        ((ExtraTensor("a", "I8", (2,), b"12", "add"),), errors.DtypeError),
        ((ExtraTensor("a", "F32", (), bytes(4), "magnitude"),), errors.DtypeError),
        ((ExtraTensor("a", "F32", (1,), bytes(4), "other"),), errors.UnknownFieldError),
    ],
)
def test_roles_without_sense_are_not_written(extras, error, tmp_path):
    with pytest.raises(error):
        file.write(carrying(*extras), tmp_path / "x.lrc")
    assert not list(tmp_path.iterdir())


def test_a_made_up_older_version_is_upgraded_in_memory(tmp_path, monkeypatch):
    """Version 0 called `targets` otherwise; digests and spelling are checked against it, then one pure step follows."""
    compact = sample()
    data = b"".join(file.encode(compact))

    def older(manifest):
        manifest["version"] = 0
        manifest["weights"] = manifest.pop("targets")

    path = tmp_path / "old.lrc"
    path.write_bytes(resign(data, older))
    with pytest.raises(errors.VersionError):
        file.read(path)
    step = lambda m: {**{k: v for k, v in m.items() if k != "weights"}, "version": 1, "targets": m["weights"]}  # noqa: E731
    monkeypatch.setitem(manifest_module.UPGRADES, 0, step)
    assert same(file.read(path), compact)
    assert api.upgrade(path, tmp_path / "new.lrc").total == len(data)
    assert (tmp_path / "new.lrc").read_bytes() == data, "an upgraded file is the one that is written today"
    assert path.read_bytes() != data, "the old file was changed"
    broken = bytearray(path.read_bytes())
    broken[-1] ^= 1
    path.write_bytes(broken)
    with pytest.raises(errors.DigestError):
        file.read(path)


def test_a_compact_file_is_a_source_of_the_second_generation(tmp_path):
    first = sample()
    file.write(first, tmp_path / "x.lrc")
    lora = api.load_lora(tmp_path / "x.lrc")
    assert "compact file" in lora.warnings[0] and lora.extras == first.extras
    again = api.convert(lora, "lowrank")
    assert again.fidelity.captured > 1 - 1e-5 and again.warnings == lora.warnings


def test_leaving_out_a_target_leaves_out_what_belongs_to_it():
    lora = random_lora()
    names = [t.target.name for t in lora.targets]
    extras = [ExtraTensor(n, "F32", (1,), bytes(4), "magnitude") for n in names]
    extras += [ExtraTensor(n.replace("weight", "bias"), "F32", (1,), bytes(4), "add") for n in names]
    lora = replace(lora, extras=tuple(sorted(extras, key=lambda e: (e.name, e.use))))
    kept = api.convert(lora, "lowrank", exclude=[names[0]]).compact.extras
    assert {e.name for e in kept} == {names[1], names[1].replace("weight", "bias")}
