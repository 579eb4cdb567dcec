"""The lrconvert file: canonical bytes, exact sizes, every byte guarded, every finding reported."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from conftest import FIXTURES, random_lora
from hypothesis import given, settings
from hypothesis import strategies as st

from lrconvert import api, container, errors, file, strictjson
from lrconvert.adapter import ExtraTensor, LoraAdapter, Provenance, Target, View
from lrconvert.validation import validate

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
    return api.convert(lora, "lowrank", bits="3").compact


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
    with contextlib.suppress(
        AttributeError, KeyError, TypeError, ValueError
    ):  # digests too broken to be signed stay so
        if manifest["digests"]["content"] == content:
            manifest["digests"]["content"] = file.content_digest(manifest["digests"]["tensors"], manifest)
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
        command = [
            sys.executable,
            "-m",
            "lrconvert.cli",
            "lora-to-lowrank",
            str(source),
            "-o",
            str(path),
            "--target-ratio",
            "12",
            "-q",
        ]
        subprocess.run(command, check=True, env={**os.environ, **env})
    assert paths[0].read_bytes() == paths[1].read_bytes()


def golden_files():
    return sorted((FIXTURES / "golden" / "v1").glob("*/*.lrc"))


def test_there_are_golden_files_of_every_method():
    from lrconvert.methods import base as methods

    assert {p.parent.name for p in golden_files()} == set(methods.module_names())


@pytest.mark.parametrize("path", golden_files(), ids=lambda p: p.stem)
def test_golden_files_mean_the_same_forever(path):
    """Read, expand, and compare with the factors stored when the file was written; writing gives the same bytes."""
    from safetensors.numpy import load_file

    from lrconvert.methods import base as methods

    compact = file.read(path)
    stored = load_file(path.with_suffix(".expanded.safetensors"))
    seen = set()
    for target, a, b in methods.expand_all(compact):
        assert np.array_equal(a, stored[f"{target.name}.A"]) and np.array_equal(b, stored[f"{target.name}.B"])
        seen |= {f"{target.name}.A", f"{target.name}.B"}
    assert seen == set(stored)
    assert b"".join(file.encode(compact)) == path.read_bytes()


@pytest.mark.parametrize("path", golden_files(), ids=lambda p: p.stem)
def test_any_flipped_byte_is_found(path, tmp_path):
    """Every byte of every golden file, one bit each (which one varies with the position)."""
    good = path.read_bytes()
    target = tmp_path / "x.lrc"
    missed = []
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 1 << (position % 8)
        target.write_bytes(bad)
        if validate(target).ok:
            missed.append(position)
    assert missed == []


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
}


def _two_kinds() -> LoraAdapter:
    """Two targets in one layer: one entry with two members."""
    lora = random_lora()
    names = ["layers.0.a.weight", "layers.0.b.weight"]
    return replace(
        lora,
        targets=tuple(replace(p, target=replace(p.target, name=n)) for p, n in zip(lora.targets, names, strict=True)),
    )


@pytest.mark.parametrize("case", MANIFESTS)
def test_manifests_that_are_refused(case, tmp_path):
    change, code = MANIFESTS[case]
    lora = _two_kinds() if case == "unsorted targets" else random_lora([(24, 16), (24, 16)])
    compact = api.convert(replace(lora, extras=sample().extras), "lowrank", bits="3").compact
    path = tmp_path / "x.lrc"
    path.write_bytes(resign(b"".join(file.encode(compact)), change))
    result = validate(path)
    assert code in {f.code for f in result.findings}, result.findings
    with pytest.raises(errors.LrcError):
        file.read(path)


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
    found = {(f.level, f.code) for f in validate(path).findings}
    assert {("structure", "E-DIGEST"), ("semantics", "E-MISSING"), ("semantics", "E-DIGEST")} <= found


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
    groups = file.group_targets(targets)
    assert file.group_targets(targets[::-1]) == groups
    try:
        assert list(file._targets(json.loads(json.dumps(groups)))) == targets
    except errors.IndexRangeError:  # one parameter claimed twice
        assert len({t.name for t in targets}) < len(targets)


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
