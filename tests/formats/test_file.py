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
from lrconvert.lora.fingerprint import fingerprint
from lrconvert.methods import base as methods
from lrconvert.methods.lowrank import form as coded_lowrank
from lrconvert.methods.lowrank import v1 as lowrank
from lrconvert.testing.container_versions import VERSIONS, encoded, raw_version_1, versions
from lrconvert.testing.raw_files import V1, RawFile

EXTRAS = (
    ExtraTensor("classifier.bias", "F32", (2,), np.array([np.nan, -0.0], np.float32).tobytes()),
    ExtraTensor("größe.weight", "BF16", (), b"\x01\x02"),
)


NUMPY = {"F16": np.float16, "U8": np.uint8}


def by_hand(shapes: Iterable[Target], extras=(), levels=(3,), rank=4) -> CompactAdapter:
    """Low rank of version 1, with random numbers."""
    targets = tuple(sorted(shapes))
    config = lowrank.Config(levels, ((rank,) * len(levels),) * len(targets), 0)
    rng = np.random.default_rng(1)
    tensors = {
        spec.name: rng.integers(0, 1 << spec.bits, spec.shape, np.uint8)
        if spec.kind == "code"
        else packing.round_half(rng.standard_normal(spec.shape))
        for spec in lowrank.METHOD.specs(config, targets)
    }
    came = Provenance("ab" * 32, "org/base", "main", "SEQ_CLS", {"peft_version": "0.21"})
    extras = tuple(sorted(extras, key=lambda e: (e.name, e.use)))
    return CompactAdapter("lowrank.v1", config, targets, tensors, extras, came, fingerprint(targets))


def sample(extras=EXTRAS) -> CompactAdapter:
    return by_hand(random_lora().shapes(), extras)


def same(one: file.CompactAdapter, two: file.CompactAdapter) -> bool:
    return (
        replace(one, tensors={}) == replace(two, tensors={})
        and set(one.tensors) == set(two.tensors)
        and all(np.array_equal(one.tensors[k], two.tensors[k]) for k in one.tensors)
    )


def resign(data: bytes, edit) -> bytes:
    """The file with its manifest changed by `edit`, spelled canonically, its digests made right again."""
    raw = RawFile.of(data)
    content = raw.manifest["digests"]["content"] if isinstance(raw, V1) else ""
    raw.manifest = edit(raw.manifest) or raw.manifest
    broken = AttributeError, KeyError, TypeError, ValueError
    with contextlib.suppress(*broken):  # digests too broken to be signed stay so
        if not isinstance(raw, V1) or raw.manifest["digests"]["content"] == content:
            raw.sign_content()
    text = strictjson.dump_canonical(raw.manifest)
    return raw.file(text if isinstance(raw, V1) else None)


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
        again = safetensors.numpy.save(arrays, opened.metadata or None)
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
    return sorted((FIXTURES / "golden").glob("v*/*/*.lrc"))


def named(path: Path) -> str:
    return f"{path.parent.parent.name}-{path.parent.name}-{path.stem}"


def test_there_are_golden_files_of_every_method():
    newest = {f"{method.id}.{method.version}" for method in methods.all_methods()}
    assert newest <= {p.parent.name for p in golden_files() if p.parent.parent.name == f"v{VERSIONS[-1]}"}
    assert {p.parent.name for p in golden_files() if p.parent.parent.name == "v1"} == set(methods.module_names())


@pytest.mark.parametrize("path", golden_files(), ids=named)
def test_golden_files_mean_the_same_forever(path, tmp_path):
    """Read, expand, and compare with the factors stored when the file was written; writing gives the same bytes, or
    what was written in an older container version in the newest."""
    from safetensors.numpy import load_file

    compact = file.read(path)
    version = int(path.parent.parent.name.removeprefix("v"))
    assert encoded(compact, version) == path.read_bytes()
    written = b"".join(file.encode(compact))
    assert written == encoded(compact, VERSIONS[-1])
    assert len(written) < path.stat().st_size + (4 if version > 1 else -500)
    (tmp_path / "x.lrc").write_bytes(written)
    assert same(file.read(tmp_path / "x.lrc"), compact)
    stored = load_file(path.with_suffix(".expanded.safetensors"))
    seen = set()
    if methods.get(compact.method).needs_base(compact.config):
        shutil.copy(path.with_suffix(".base.safetensors"), tmp_path / "model.safetensors")
        updates = updates_on(compact, tmp_path)
        assert updates.keys() == stored.keys() and all(np.array_equal(updates[key], stored[key]) for key in updates)
        return
    for target, a, b in methods.expand_all(compact):
        if a.shape[0] == 0:  # no update, no factors
            continue
        assert np.array_equal(a, stored[f"{target.name}.A"]) and np.array_equal(b, stored[f"{target.name}.B"])
        seen |= {f"{target.name}.A", f"{target.name}.B"}
    assert seen == set(stored)


def smallest_of_each_version() -> list[Path]:
    """The smallest golden file of every version of every method, in every version of the container."""
    by_version: dict[Path, list[Path]] = {}
    for path in golden_files():
        by_version.setdefault(path.parent, []).append(path)
    return [min(paths, key=lambda path: path.stat().st_size) for paths in by_version.values()]


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


@pytest.mark.parametrize("path", golden_files(), ids=named)
def test_flipped_bits_are_found(path, tmp_path):
    """A sample: 100 bits of every golden file, drawn anew only when the file changes. The slow test has them all."""
    good = path.read_bytes()
    bits = Random(good).sample(range(8 * len(good)), 100)
    assert missed_flips(good, tmp_path / "x.lrc", bits) == []


@pytest.mark.medium
def test_every_flipped_bit_of_the_frame_is_found(tmp_path):
    """Header, version, digest and manifest of a file with extra tensors, bit by bit."""
    good = b"".join(file.encode(sample()))
    frame = len(good) - file.sizes(sample()).payload
    assert missed_flips(good, tmp_path / "x.lrc", range(8 * frame)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=() if path in smallest_of_each_version() else pytest.mark.long, id=named(path))
        for path in golden_files()
    ],
)
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


ONLY_V1 = {
    "newer container": (edit(version=2), "E-VER"),
    "version 0": (edit(version=0), "E-VER"),
    "version as text": (edit(version="1"), "E-VER"),
    "other format": (edit(format="gguf"), "E-VER"),
    "digest in capitals": (lambda m: m["base"].update(names="AB" * 32), "E-DIGEST"),
    "digest of nothing": (lambda m: m["digests"]["tensors"].update(ghost="00" * 32), "E-MISSING"),
    "names of other targets": (lambda m: m["base"].update(names="00" * 32), "E-DIGEST"),
    "base without names": (lambda m: {**m, "base": {}}, "E-MISSING"),
}
MANIFESTS = {
    "unknown feature": (edit(requires=["teleport"]), "E-VER"),
    "unknown method": (method(id="nope"), "E-VER"),
    "newer method": (method(version=9), "E-VER"),
    "unknown field": (edit(more=1), "E-UNKNOWN"),
    "unknown config field": (config(more=1), "E-UNKNOWN"),
    "missing section": (lambda m: {k: v for k, v in m.items() if k != "base"}, "E-MISSING"),
    "no features": (lambda m: {k: v for k, v in m.items() if k != "requires"}, "E-VER"),
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
    "extra renamed twice": (lambda m: m["extras"].append(m["extras"][0]), "E-CANON"),
    "extra of another size": (lambda m: m["extras"][0].update(shape=[3]), "E-SHAPE"),
    "unknown extra dtype": (lambda m: m["extras"][0].update(dtype="F4"), "E-DTYPE"),
    "extra of 4 GiB": (lambda m: m["extras"][0].update(dtype="U8", shape=[2**31 - 1, 2]), "E-SHAPE"),
    "extra of five dimensions": (lambda m: m["extras"][0].update(shape=[1, 1, 1, 1, 2]), "E-SHAPE"),
    "extra without a name": (lambda m: m["extras"][0].update(name=""), "E-NAME"),
    "extra of the use left out": (lambda m: m["extras"][0].update(use="replace"), "E-UNKNOWN"),
    "target without a name": (targets(lambda t: [{"name": "", "shape": [24, 16]}]), "E-NAME"),
    "view of three kernel dimensions": (targets(member(view="conv:1x1x1:1", shape=[24, 16, 1, 1])), "E-JSON-SYNTAX"),
    "view with a leading zero": (targets(member(view="rows:0:024")), "E-JSON-SYNTAX"),
    "view that is left out": (targets(member(view="matrix")), "E-CANON"),
    "kernel with a leading zero": (targets(member(view="conv:01:1", shape=[24, 16, 1])), "E-JSON-SYNTAX"),
    "view in digits of another script": (targets(member(view="rows:0:2\N{ARABIC-INDIC DIGIT FOUR}")), "E-JSON-SYNTAX"),
    "source that is no digest": (lambda m: m["provenance"].update(source="org/adapter"), "E-DIGEST"),
    "empty hint": (lambda m: m["provenance"].update(revision=""), "E-CANON"),
    "content that is no digest": (lambda m: m["base"].update(content="AB" * 32), "E-DIGEST"),
    "levels of booleans": (config(levels=[True]), "E-JSON-SYNTAX"),
    "groups longer than every row": (config(group_size=24), "E-CANON"),
}


def test_groups_without_scales_are_refused(tmp_path):
    good = b"".join(file.encode(by_hand(random_lora().shapes(), levels=(16,))))
    (tmp_path / "x.lrc").write_bytes(resign(good, config(group_size=8)))
    with pytest.raises(errors.CanonicalError, match="group_size"):
        file.read(tmp_path / "x.lrc")


@pytest.mark.parametrize("half", [rb"o\\ud800", rb"oo\ud800"], ids=["in the manifest", "in the header"])
def test_half_a_character_is_refused(half, tmp_path):
    good = encoded(sample(), 1)
    assert good.count(b"org/base") == 1
    (tmp_path / "x.lrc").write_bytes(good.replace(b"org/base", half))
    assert {f.code for f in validate(tmp_path / "x.lrc").findings} == {"E-HDR-TEXT"}


def refused(data: bytes, path: Path) -> set[str]:
    """The codes of all findings; `read` raises one of them."""
    path.write_bytes(data)
    codes = {f.code for f in validate(path).findings}
    with pytest.raises(errors.LrcError) as caught:
        file.read(path)
    assert caught.value.code in codes
    return codes


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", [*MANIFESTS, *ONLY_V1])
def test_manifests_that_are_refused(case, version, tmp_path):
    if version > 1 and case in ONLY_V1:
        pytest.skip("nothing of the kind stands in a manifest of version 2 or later")
    change, code = {**MANIFESTS, **ONLY_V1}[case]
    names = ["0.a", "0.b"] if case == "unsorted targets" else ["0.a", "1.a"]
    compact = by_hand((Target(f"layers.{name}.weight", (24, 16)) for name in names), sample().extras)
    assert code in refused(resign(encoded(compact, version), change), tmp_path / "x.lrc")


def test_a_file_of_two_versions_is_refused(tmp_path):
    """What has a manifest in its metadata is of version 1, to which the packed tensor of version 2 is unknown."""
    raw = raw_version_1(sample())
    raw.tensors["lrconvert"] = "U8", [1], b"\2"
    assert "E-UNKNOWN" in refused(raw.sign().file(), tmp_path / "x.lrc")


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
    "manifest over 1 MiB": (came(fields={f"f{n}": "z" * 4096 for n in range(256)}), "E-LIMIT"),
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
            api.convert(lora, "lowrank", bits=12, dry_run=dry_run)


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
    "conv:2x1x2:1": (4, 3, 2, 1, 2),
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
    return CompactAdapter("lowrank.v1", config, tuple(targets), tensors, tuple(extras), notes, fingerprint(targets))


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_what_is_written_is_read_back(tmp_path_factory, data):
    """Any adapter is either refused with one of our errors, or read as it was, from a file of the size foretold that
    is the only spelling of it; and from one of an older container version as well."""
    path = tmp_path_factory.getbasetemp() / "property.lrc"
    try:
        compact = data.draw(compacts())
        written = b"".join(file.encode(compact))
    except errors.LrcError:
        return
    path.write_bytes(written)
    assert same(file.read(path), compact)
    assert file.sizes(compact).total == len(written)
    assert b"".join(file.encode(file.read(path))) == written
    bit = data.draw(st.integers(0, 8 * len(written) - 1))
    assert missed_flips(written, path, [bit]) == []
    path.write_bytes(encoded(compact, data.draw(st.sampled_from(versions(compact)))))
    assert same(file.read(path), compact)


def test_every_finding_is_reported(tmp_path):
    """One file, three independent faults: a damaged tensor, an unknown tensor's digest, a wrong base section."""

    def damage(manifest):
        manifest["digests"]["tensors"]["ghost"] = "00" * 32
        manifest["base"] = {"names": "zz"}

    data = bytearray(resign(encoded(sample(), 1), damage))
    data[-1] ^= 1
    path = tmp_path / "x.lrc"
    path.write_bytes(data)
    findings = {(f.level, f.code) for f in validate(path).findings}
    assert {("structure", "E-DIGEST"), ("semantics", "E-MISSING"), ("semantics", "E-DIGEST")} <= findings


def test_every_finding_of_the_newest_version_is_reported(tmp_path):
    """Four independent faults: a wrong digest, a field more, a wrong base section, a shape of nothing."""
    raw = RawFile.of(b"".join(file.encode(sample())))
    raw.manifest |= {"more": 1, "base": {"content": "zz"}}
    raw.manifest["targets"][0]["members"][0]["shape"] = [0, 1]
    path = tmp_path / "x.lrc"
    path.write_bytes(raw.file())
    assert {(f.level, f.code) for f in validate(path).findings} == {
        ("structure", "E-UNKNOWN"),
        ("structure", "E-DIGEST"),
        ("structure", "E-SHAPE"),
        ("semantics", "E-DIGEST"),
    }


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


LLAMA = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
BERT = {
    "attention.self.query": (384, 384),
    "attention.self.key": (384, 384),
    "attention.self.value": (384, 384),
    "attention.output.dense": (384, 384),
    "intermediate.dense": (1536, 384),
    "output.dense": (384, 1536),
}
UNET = {
    "attn1.to_q": (1, 1),
    "attn1.to_k": (1, 1),
    "attn1.to_v": (1, 1),
    "attn1.to_out.0": (1, 1),
    "attn2.to_q": (1, 1),
    "attn2.to_k": (1, 768),
    "attn2.to_v": (1, 768),
    "attn2.to_out.0": (1, 1),
}
UNET_BLOCKS = [
    (f"unet.{part}.{n}.attentions.{m}.transformer_blocks.0", width)
    for part, attentions, widths in (
        ("down_blocks", 2, {0: 320, 1: 640, 2: 1280}),
        ("up_blocks", 3, {1: 1280, 2: 640, 3: 320}),
    )
    for n, width in widths.items()
    for m in range(attentions)
] + [("unet.mid_block.attentions.0.transformer_blocks.0", 1280)]


def blocks(prefix: str, layers: int, modules: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    return {f"{prefix}.{n}.{m}.weight": shape for n in range(layers) for m, shape in modules.items()}


# Names as the reader yields them, what the source's configuration says, and the most bytes beside the payload.
OVERHEADS = {
    "llama": (blocks("model.layers", 32, LLAMA), "meta-llama/Meta-Llama-3.1-8B-Instruct", "CAUSAL_LM", 600),
    "bert": (blocks("bert.encoder.layer", 6, BERT), "sentence-transformers/all-MiniLM-L6-v2", "SEQ_CLS", 400),
    "unet": (
        {
            f"{block}.{module}.weight": (width, width if inner == 1 else inner)
            for block, width in UNET_BLOCKS
            for module, (_, inner) in UNET.items()
        },
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "",
        600,
    ),
}


def overhead_case(name: str, scale: int = 1) -> tuple[tuple[Target, ...], Provenance, int]:
    shapes, base_model, task, most = OVERHEADS[name]
    targets = [Target(n, (max(out // scale, 8), max(inner // scale, 8))) for n, (out, inner) in shapes.items()]
    notes = {"source_format": "peft", "peft_version": "0.18.0", "budget": "0000655360", "captured": "0.5432"}
    return tuple(sorted(targets)), Provenance("5a" * 32, base_model, "main", task, notes), most


@pytest.mark.parametrize("name", OVERHEADS)
def test_small_stays_small(name):
    """Header, version, digest and manifest of low rank on real names and shapes, the base's and source's digests and
    all notes of a conversion included."""
    targets, came, most = overhead_case(name)
    config = coded_lowrank.Config((16,) * len(targets), ((40, 40),) * 16 * len(targets), 650_000)
    base = replace(fingerprint(targets), content="c0" * 32)
    compact = CompactAdapter("lowrank", config, targets, {}, (), came, base)
    assert file.sizes(compact).overhead <= most


@pytest.mark.medium
@pytest.mark.parametrize("name", OVERHEADS)
@pytest.mark.parametrize("method_id", methods.module_names())
def test_small_stays_small_in_every_form(name, method_id):
    """The same of every method, fitted to small matrices."""
    targets, came, most = overhead_case(name, 128)
    pairs = [replace(random_lora([target.matrix_shape], rank=4).targets[0], target=target) for target in targets]
    done = api.convert(LoraAdapter(tuple(pairs), provenance=came), method_id, target_ratio=10)
    compact = replace(done.compact, base=replace(done.compact.base, content="c0" * 32))
    assert file.sizes(compact).overhead <= most


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


def test_an_older_version_is_upgraded_in_memory(tmp_path):
    """Digests and spelling are checked against version 1; what is written of it is a file of the newest."""
    compact = sample()
    path, new = tmp_path / "old.lrc", tmp_path / "new.lrc"
    path.write_bytes(old := encoded(compact, 1))
    assert same(file.read(path), compact)
    newest = encoded(compact, VERSIONS[-1])
    assert api.upgrade(path, new).total == len(newest)
    assert new.read_bytes() == newest and path.read_bytes() == old
    path.write_bytes(old[:-1] + bytes([old[-1] ^ 1]))
    with pytest.raises(errors.DigestError):
        file.read(path)
    raw = RawFile.of(old)
    path.write_bytes(raw.file(raw.spelled().replace(b":", b": ", 1)))
    with pytest.raises(errors.CanonicalError):
        file.read(path)


def test_a_compact_file_is_a_source_of_the_second_generation(tmp_path):
    first = sample()
    file.write(first, tmp_path / "x.lrc")
    lora = api.load_lora(tmp_path / "x.lrc")
    assert "compact adapter" in lora.warnings[0] and lora.extras == first.extras
    again = api.convert(lora, "lowrank", bits=12)
    assert again.fidelity.captured > 1 - 1e-5 and again.warnings == lora.warnings


def test_leaving_out_a_target_leaves_out_what_belongs_to_it():
    lora = random_lora()
    names = [t.target.name for t in lora.targets]
    extras = [ExtraTensor(n, "F32", (1,), bytes(4), "magnitude") for n in names]
    extras += [ExtraTensor(n.replace("weight", "bias"), "F32", (1,), bytes(4), "add") for n in names]
    lora = replace(lora, extras=tuple(sorted(extras, key=lambda e: (e.name, e.use))))
    kept = api.convert(lora, "lowrank", bits=12, exclude=[names[0]]).compact.extras
    assert {e.name for e in kept} == {names[1], names[1].replace("weight", "bias")}
