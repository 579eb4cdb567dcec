"""Fleets: what goes in comes out, what is shared lies once, what a member costs, and what readers and writers may rely
on. The second reader, written from formats/fleet-v1.md alone, reads every fleet that is made here."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FIXTURES, random_lora
from hostile_fleets import fleets
from hypothesis import given
from hypothesis import strategies as st
from second_readers import fleet as second

from lrconvert import Fleet, api
from lrconvert.core import errors
from lrconvert.core.dtypes import Stored
from lrconvert.core.errors import LrcError
from lrconvert.formats.fleet import head as heads
from lrconvert.formats.fleet import index, manifests, names, opened, records, writing
from lrconvert.formats.fleet.index import Entry, Tree
from lrconvert.formats.fleet.intake import Arrival
from lrconvert.formats.fleet.opened import OpenFleet
from lrconvert.formats.lrc import file
from lrconvert.io import durable
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter, LoraTarget, Provenance, Target
from lrconvert.methods import base as methods
from lrconvert.testing.fleets import variants

GOLDEN = FIXTURES / "golden"
PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")


def golden_files() -> list[Path]:
    return sorted(GOLDEN.glob("v*/*/*.lrc"))


def decoder(count: int, per_layer: int) -> LoraAdapter:
    """A LoRA with the names of a decoder's targets."""
    rng = np.random.default_rng(count)
    listed = (*PARTS, "mlp.down_proj")[:per_layer]
    named = sorted(
        Target(f"model.layers.{n // per_layer}.{listed[n % per_layer]}.weight", (8, 8)) for n in range(count)
    )

    def numbers(*shape: int) -> Stored:
        return Stored("F32", rng.standard_normal(shape).astype("<f4"))

    pairs = tuple(LoraTarget(target, numbers(2, 8), numbers(8, 2), 2.0) for target in named)
    return LoraAdapter(pairs, (), Provenance("5a" * 32, "org/base", "main", "CAUSAL_LM", {"source_format": "peft"}))


@cache
def small(seed: int = 0) -> CompactAdapter:
    return api.convert(random_lora(seed=seed), "bone", rank=2, bits=8).compact


@cache
def wide() -> CompactAdapter:
    return api.convert(decoder(12, 6), "bone", rank=3, bits=8).compact


def whole(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir()}


def encoded(compact: CompactAdapter) -> bytes:
    return b"".join(file.encode(compact))


def build(root: Path, members: Mapping[str, CompactAdapter], **options: Any) -> Fleet:
    return Fleet.build(root, members, **options)


def some(root: Path, count: int = 4) -> Fleet:
    return build(root, {f"m{n}": one for n, one in enumerate(variants(small(), count))})


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The bytes of every read while the context lasts."""
    made: list[int] = []
    real = os.preadv

    def preadv(descriptor: int, buffers: Any, offset: int) -> int:
        made.append(real(descriptor, buffers, offset))
        return made[-1]

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", preadv)
        yield made


# --- in and out -----------------------------------------------------------------------------------------------------


@pytest.mark.medium
def test_every_golden_file_comes_out_as_it_went_in(tmp_path: Path) -> None:
    """Of every method, method version and container version: the bytes that went in where those were of the newest
    container version, else the bytes of the upgraded file. Both readers say so."""
    members = {path.relative_to(GOLDEN).as_posix().removesuffix(".lrc"): path for path in golden_files()}
    with Fleet.build(tmp_path / "fleet", members) as fleet:
        theirs = second.members(whole(tmp_path / "fleet"))
        assert list(fleet) == sorted(members) == sorted(theirs)
        for name, path in members.items():
            api.upgrade(path, tmp_path / "new.lrc", overwrite=True)
            expected = (tmp_path / "new.lrc").read_bytes()
            assert fleet.read_bytes(name) == theirs[name] == expected
            version = int(path.relative_to(GOLDEN).parts[0][1:])
            assert fleet.member(name).version == version
            assert version < 3 or expected == path.read_bytes()
        # Twice the same content, under other names: nothing of it lies twice.
        twice = [name for name in members if name.endswith("/0")]
        fleet.add({f"again/{name}": members[name] for name in twice})
        again = sum(fleet.member(f"again/{name}").bytes for name in twice)
        assert again < sum(members[name].stat().st_size for name in twice) / 2
        assert fleet.read_bytes("again/v1/lowrank/0") == fleet.read_bytes("v1/lowrank/0")


def test_the_golden_fleet_means_the_same_forever() -> None:
    """Both readers find in it what it held when it was written."""
    root = GOLDEN / "fleet-v1" / "0"
    digests = json.loads((root.parent / "0.members.json").read_text("utf-8"))
    assert {n: hashlib.sha256(data).hexdigest() for n, data in second.members(whole(root)).items()} == digests
    with Fleet(root) as fleet:
        assert {name: hashlib.sha256(fleet.read_bytes(name)).hexdigest() for name in fleet} == digests
        assert all(result.ok for result in fleet.validate())
        assert [member.shared for member in fleet.members() if member.name == "twice"] != [0]


def test_hostile_fleets_are_refused_by_both_readers() -> None:
    """Every fleet of fixtures/hostile_fleets.py but the sound one; what codes they get is for test_hostile."""
    for name, _, code, files in fleets():
        if code:
            with pytest.raises(Exception):  # noqa: B017 -- whatever a plain reader stumbles over
                second.members(files)
        else:
            assert second.members(files), name


def test_adapters_of_all_kinds_of_sources(tmp_path: Path) -> None:
    """Files by their names, folders by the paths in them, results and adapters in memory, other fleets, and members."""
    folder = tmp_path / "adapters"
    (folder / "team").mkdir(parents=True)
    one, two = list(variants(small(), 2))
    api.write(one, folder / "one.lrc")
    api.write(two, folder / "team" / "two.lrc")
    with Fleet.build(tmp_path / "fleet", folder) as fleet:
        assert list(fleet) == ["one", "team/two"] and "team/two" in fleet and "two" not in fleet and 3 not in fleet
        assert encoded(fleet["team/two"]) == encoded(two)
        done = api.convert(random_lora(seed=9), "bone", rank=1, bits=4)
        taken = fleet.add({"result": done})
        assert [(t.name, t.state, t.whole) for t in taken] == [("result", "added", len(encoded(done.compact)))]
        fleet.add([folder / "one.lrc"])  # the same again: nothing happens
        with Fleet.build(tmp_path / "copy", tmp_path / "fleet") as copy:
            assert list(copy) == ["one", "result", "team/two"]
            copy.add({"renamed": f"{tmp_path / 'fleet'}#team/two"})
            assert copy.read_bytes("renamed") == (folder / "team" / "two.lrc").read_bytes()
        assert fleet.get("one", tmp_path / "one.lrc").read_bytes() == (folder / "one.lrc").read_bytes()
        with pytest.raises(errors.OutputExistsError):
            fleet.get("one", tmp_path / "one.lrc")
        with pytest.raises(KeyError):
            fleet["nothing"]


@pytest.mark.parametrize(
    ("adapters", "error"),
    [
        (FIXTURES / "adapters" / "llama-plain", errors.UnknownLayoutError),
        ([], errors.EmptyAdapterError),
        (3, errors.ArgumentError),
        ("nowhere.lrc", errors.FileKindError),
        ({"a": random_lora()}, errors.ArgumentError),
        ([small()], errors.ArgumentError),
        ([GOLDEN / "v2" / "bone.1" / "0.lrc", GOLDEN / "v3" / "bone.1" / "0.lrc"], errors.OutputExistsError),
    ],
)
def test_what_is_no_member(tmp_path: Path, adapters: Any, error: type[LrcError]) -> None:
    """What cannot become a member is refused by its code, and nothing is left."""
    with pytest.raises(error):
        Fleet.build(tmp_path / "fleet", adapters)
    assert not list(tmp_path.iterdir())


NAMES = ("", "/", "a/", "/a", ".", "..", "../x", "a/../b", "a//b", ".hidden", "a\\b", "a\0b", "a\nb", "a#b", "a" * 256)


@pytest.mark.parametrize("name", [*NAMES, "e\u0301", "a\u202eb", "~", "a*", "\ud800"])
def test_names_that_are_none(name: str) -> None:
    """No name means a path, has two spellings, or moves the cursor."""
    assert not names.is_name(name)
    with pytest.raises(errors.TensorNameError):
        names.check_name(name)


@given(st.text(max_size=12))
def test_names_are_safe_paths(text: str) -> None:
    """Whatever is a name stays below the folder that it is put into."""
    if names.is_name(text):
        assert (Path("/store") / text).is_relative_to("/store") and ".." not in Path(text).parts
        assert text.isprintable() and records.text_of(
            records.Cursor(records.number(len(text.encode())) + text.encode())
        )


# --- what is shared -------------------------------------------------------------------------------------------------


def with_tensor(compact: CompactAdapter, other: CompactAdapter, name: str) -> CompactAdapter:
    """An adapter with a tensor of another one."""
    return replace(compact, tensors={**compact.tensors, name: other.tensors[name]})


def test_what_two_members_have_lies_once(tmp_path: Path) -> None:
    """A bank that all have is in none of them: found when a fleet is built, when one is added to a single member, and
    by `gc`; a later member refers to it, too."""
    first, *others = list(variants(wide(), 4))
    bank = max(wide().tensors, key=lambda name: wide().tensors[name].nbytes)
    members = {f"m{n}": with_tensor(one, first, bank) for n, one in enumerate([first, *others])}
    with build(tmp_path / "all", members) as fleet:
        assert all(member.shared >= 1 for member in fleet.members())
        assert second.members(whole(tmp_path / "all")) == {name: encoded(one) for name, one in members.items()}
        least = fleet.nbytes
    with build(tmp_path / "one", {"m0": members["m0"]}) as fleet:
        fleet.add({"m1": members["m1"]})
        assert [member.shared > 0 for member in fleet.members()] == [False, True]
        fleet.add({name: members[name] for name in ("m2", "m3")})
        assert fleet.gc().after < fleet.nbytes + 1
        assert all(member.shared >= 1 for member in fleet.members()) and abs(fleet.nbytes - least) < 100


def test_named_tensors_are_shared_from_the_first_member_on(tmp_path: Path) -> None:
    """`share` names tensors. A name that no adapter has is refused."""
    bank = max(wide().tensors, key=lambda name: wide().tensors[name].nbytes)
    with build(tmp_path / "named", {"m": wide()}, share=[bank]) as fleet:
        assert fleet.member("m").shared == 1
        with pytest.raises(errors.OptionError):
            fleet.add({"n": wide()}, share=["no such tensor"])
        assert list(fleet) == ["m"]


def test_unneeded_shared_parts_go(tmp_path: Path) -> None:
    """`gc` leaves out frames and tensors that no member has, and the rest is what `build` makes."""
    with build(tmp_path / "fleet", {"a": wide(), "b": wide(), "c": small(1), "d": small(2)}) as fleet:
        assert fleet.remove("a", "b") > 0 and list(fleet) == ["c", "d"]
        fleet.gc()
        assert not fleet.dead
    build(tmp_path / "new", {"c": small(1), "d": small(2)}).close()
    assert (tmp_path / "fleet" / "members-2").read_bytes() == (tmp_path / "new" / "members-1").read_bytes()


# --- what a member costs --------------------------------------------------------------------------------------------

LEAST = {"vblora": {"num_vectors": 16, "vector_length": 4, "top_k": 1}}
SIZES = {36: 4, 224: 7}  # targets, and how many of them a layer has


@pytest.mark.medium
@pytest.mark.parametrize("targets", SIZES)
@pytest.mark.parametrize("method", methods.module_names())
def test_a_member_costs_its_payload_and_at_most_256_bytes(tmp_path: Path, method: str, targets: int) -> None:
    """Of every method, with the notes that a conversion leaves, at 10 members and at 10,000: record and share of the
    index, without the payload, at most 256 bytes for names of up to 32."""
    lora = decoder(targets, SIZES[targets])
    options = LEAST.get(method) or next(e for e in methods.get(method).examples if "base_term" not in e)
    compact = api.convert(lora, method, **options).compact
    members = {f"customer-{n:06}/support-mails": one for n, one in enumerate(variants(compact, 10))}
    with build(tmp_path / "fleet", members) as fleet:
        payload = file.sizes(compact).payload
        opened_fleet = fleet._open
        for entry in opened_fleet.entries():
            member = opened_fleet.member(entry)
            shared = payload - member.payload
            assert member.payload <= payload and (shared > 0) == bool(member.references)
            overhead = entry.length - member.payload
            for count in (10, 10_000):
                keys = sorted(f"customer-{n:06}/support-mails".encode() for n in range(count))
                run = index.write([Entry(key, n * 10**6, entry.length) for n, key in enumerate(keys)], 1, len)
                assert run is not None and overhead + run.bytes / count <= 256


def test_shared_parts_of_ten_members_are_small(tmp_path: Path) -> None:
    """All of a fleet of ten: payloads, and less than the overhead of ten files."""
    compact = api.convert(decoder(36, 4), "bone", rank=2, bits=4).compact
    sizes = file.sizes(compact)
    with build(tmp_path / "fleet", {f"m{n}": one for n, one in enumerate(variants(compact, 10))}) as fleet:
        assert 10 * sizes.payload < fleet.nbytes < 10 * sizes.payload + 10 * 160 + 800 < 10 * sizes.total + 300


# --- reading a part of it -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fleet of 10,000 members, all but a few of which are one; not to be changed."""
    root = tmp_path_factory.mktemp("large") / "fleet"
    with build(root, {"m": small()}) as fleet:
        entry = fleet._open.entry("m")
        member, body = fleet._open.member(entry), bytes(fleet._open.body(entry.offset, records.MEMBER))
    payload = body[len(body) - member.payload :]

    def stored(name: str) -> bytes:
        return records.encode(records.MEMBER, replace(member, name=name).head() + payload)

    with (root / "members-1").open("ab") as data:
        data.writelines(stored(f"m{n:05}") for n in range(10_000))
    (root / "fleet.json").write_bytes(b"lost")
    assert writing.reindex(root) == 10_001
    arrival = Arrival.of("x", small())

    def load(name: str) -> Arrival:
        return replace(arrival, name=name)

    for n in range(5):  # more runs
        writing.add(root, [(f"late{n}/{k}", partial(load, f"late{n}/{k}")) for k in range(4 ** (4 - n))])
    return root


@pytest.mark.medium
@pytest.mark.parametrize("name", ["m00000", "m05000", "m09999", "late4/0", "late0/77"])
def test_one_of_ten_thousand_members_in_few_reads(large: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Opening a fleet of 10,000 and getting a member reads at most 64 KiB besides it, in few calls; so does asking for
    one that is not there."""
    with counted(monkeypatch) as reads, Fleet(large) as fleet:
        assert len(fleet._open.trees) > 3 and len(fleet) > 10_000
        assert fleet.read_bytes(name) == encoded(small())
    assert sum(reads) < 65_536 + len(encoded(small())) and len(reads) < 40
    with counted(monkeypatch) as reads, Fleet(large) as fleet:
        assert f"{name}x" not in fleet
    assert sum(reads) < 65_536 and len(reads) < 40


@pytest.mark.medium
def test_listing_reads_no_payload(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listing of few by prefix reads few nodes; one of all, a kilobyte of each member."""
    with counted(monkeypatch) as reads, Fleet(large) as fleet:
        assert [member.name for member in fleet.members("m0123")] == [f"m0123{n}" for n in range(10)]
        assert sum(reads) < 131_072


# --- changes --------------------------------------------------------------------------------------------------------


def test_members_keep_every_byte(tmp_path: Path) -> None:
    """What `add`, `remove` and replacing write lies behind what was there, whatever the order."""
    members = {f"m{n}": one for n, one in enumerate(variants(small(), 9))}
    fleet = build(tmp_path / "fleet", {"m0": members["m0"], "m1": members["m1"]})
    data = tmp_path / "fleet" / "members-1"
    steps: list[Callable[[], object]] = [
        *(lambda n=n: fleet.add({f"m{n}": members[f"m{n}"]}) for n in range(2, 6)),  # type: ignore[misc]
        lambda: fleet.remove("m1", "m3"),
        lambda: fleet.add({"m0": members["m7"]}, overwrite=True),
        lambda: fleet.add({"m1": members["m1"]}),
    ]
    for step in steps:
        before = data.read_bytes()
        step()
        assert data.read_bytes()[: len(before)] == before and len(data.read_bytes()) > len(before)
        assert all(result.ok for result in fleet.validate())
    expected = {f"m{n}": encoded(members[f"m{n}"]) for n in (1, 2, 4, 5)} | {"m0": encoded(members["m7"])}
    assert second.members(whole(tmp_path / "fleet")) == expected == {name: fleet.read_bytes(name) for name in fleet}
    # Index, head and dead bytes follow from the data file alone; gc gives what build gives.
    was = heads.read(tmp_path / "fleet")
    writing.reindex(tmp_path / "fleet")
    now = heads.read(tmp_path / "fleet")
    assert (now.members, now.dead, now.bytes) == (was.members, was.dead, was.bytes)
    fleet.refresh()
    fleet.gc()
    build(tmp_path / "new", {name: members["m7" if name == "m0" else name] for name in expected}).close()
    assert (tmp_path / "fleet" / "members-2").read_bytes() == (tmp_path / "new" / "members-1").read_bytes()
    fleet.close()


def test_what_is_refused_changes_nothing(tmp_path: Path) -> None:
    """A name that is taken, a missing one, one of several adapters that is none: not a byte changes."""
    fleet, other = some(tmp_path / "fleet"), next(variants(small(), 1, seed=5))
    before = whole(tmp_path / "fleet")
    with pytest.raises(errors.OutputExistsError, match="m1"):
        fleet.add({"a": small(), "m1": other})
    with pytest.raises(errors.MissingFieldError, match="nothing"):
        fleet.remove("m0", "nothing")
    with pytest.raises(errors.TensorNameError):
        fleet.add({"../m": other})
    with pytest.raises(LrcError):
        fleet.add({"a": small(), "b": tmp_path / "nowhere.lrc"})
    assert whole(tmp_path / "fleet") == before
    fleet.close()


def test_only_a_fleet_is_replaced(tmp_path: Path) -> None:
    """`overwrite` replaces a fleet, and no other folder."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_bytes(b"x")
    with pytest.raises(errors.OutputPathError, match="not replaced"):
        build(tmp_path / "mine", {"m": small()}, overwrite=True)
    assert (tmp_path / "mine" / "precious").exists()
    some(tmp_path / "fleet").close()
    with pytest.raises(errors.OutputExistsError):
        build(tmp_path / "fleet", {"m": small()})
    with build(tmp_path / "fleet", {"m": small()}, overwrite=True) as fleet:
        assert list(fleet) == ["m"]


def test_two_writers_exclude_each_other(tmp_path: Path) -> None:
    """While one holds the lock another is refused at once, and a reader is not."""
    with some(tmp_path / "fleet") as fleet, durable.locked(tmp_path / "fleet"):
        for change in (fleet.gc, partial(fleet.remove, "m0"), partial(fleet.add, {"x": small()})):
            with pytest.raises(errors.LockedError):
                change()
        with pytest.raises(errors.LockedError):
            writing.reindex(tmp_path / "fleet")
        with pytest.raises(errors.LockedError):
            build(tmp_path / "fleet", {"x": small()}, overwrite=True)
        with Fleet(tmp_path / "fleet") as other:
            assert list(other) == list(fleet) and all(result.ok for result in other.validate())


def test_readers_see_one_moment(tmp_path: Path) -> None:
    """A fleet that is open stays as it was while others add, remove and compact; it sees their changes when it asks."""
    with some(tmp_path / "fleet") as reader, Fleet(tmp_path / "fleet") as writer:
        before = {name: reader.read_bytes(name) for name in reader}
        writer.add({"new": small()})
        writer.remove("m1")
        writer.gc()
        writer.add({"newer": small()})
        assert {name: reader.read_bytes(name) for name in reader} == before and len(reader) == 4
        assert all(v.ok for v in reader.validate("m0", "m1"))
        reader.refresh()
        assert list(reader) == list(writer) == ["m0", "m2", "m3", "new", "newer"]


def test_a_reader_that_comes_while_files_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that ends between reading the head and opening what it states: the new head is read. If nobody writes,
    a file that is gone is said to be."""
    some(tmp_path / "fleet").close()
    real, left = heads.read, [lambda: writing.compact(tmp_path / "fleet")]

    def read(root: Path) -> heads.Head:
        found = real(root)
        if left:
            left.pop()()
        return found

    monkeypatch.setattr(opened.heads, "read", read)
    with Fleet(tmp_path / "fleet") as fleet:
        assert len(fleet) == 4 and fleet._open.head.generation == 2
    (tmp_path / "fleet" / "members-2").unlink()
    with pytest.raises(errors.FileKindError, match="members-2"):
        Fleet(tmp_path / "fleet")


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.medium
def test_every_flipped_bit_is_found_and_attributed(tmp_path: Path) -> None:
    """One bit anywhere in a fleet, also in what is dead: `validate` names the file it is in, or the members that it
    concerns; members that do not rest on it are read as before."""
    members = dict(zip("abc", variants(small(), 3), strict=True))
    fleet = build(tmp_path / "fleet", members)
    fleet.remove("b")
    fleet.close()
    rng = np.random.default_rng(0)
    good = {name: encoded(members[name]) for name in "ac"}
    for path in sorted((tmp_path / "fleet").iterdir()):
        data = path.read_bytes()
        for at in range(0, len(data), 2 if path.name != "members-1" else 5):
            changed = bytearray(data)
            changed[at] ^= 1 << rng.integers(8)
            path.write_bytes(changed)
            try:
                with Fleet(tmp_path / "fleet") as fleet:
                    results = list(fleet.validate())
                    bad = {Path(result.path).name for result in results if not result.ok}
                    assert bad, (path.name, at)
                    assert path.name in bad
                    for name in good if path.name == "members-1" else ():
                        if f"fleet#{name}" not in bad:
                            assert fleet.read_bytes(name) == good[name]
            except LrcError as error:
                assert path.name in str(error) or path.name == "fleet.json", (path.name, at, str(error))
        path.write_bytes(data)
    assert not [result for result in Fleet(tmp_path / "fleet").validate() if not result.ok]


def test_a_damaged_member_is_named_and_others_are_read(tmp_path: Path) -> None:
    """A byte of a payload: that member is refused by its name, gc refuses to lose it, and after it was removed, or
    added anew, all is well."""
    with some(tmp_path / "fleet") as fleet:
        entry = fleet._open.entry("m2")
        before = fleet.read_bytes("m2")
        data = bytearray((tmp_path / "fleet" / "members-1").read_bytes())
        data[entry.offset + entry.length - 20] ^= 4
        (tmp_path / "fleet" / "members-1").write_bytes(data)
        with pytest.raises(errors.DigestError, match="fleet#m2"):
            fleet.read_bytes("m2")
        with pytest.raises(errors.DigestError, match="fleet#m2"):
            fleet.gc()
        assert [Path(v.path).name for v in fleet.validate() if not v.ok] == ["members-1", "fleet#m2"]
        assert [fleet.member(name).name for name in fleet] == ["m0", "m1", "m2", "m3"]
        fleet.add({"m2": file.read_bytes(before, tmp_path)}, overwrite=True)
        assert fleet.read_bytes("m2") == before
        assert [Path(v.path).name for v in fleet.validate() if not v.ok] == ["members-1"]
        fleet.gc()
        assert all(v.ok for v in fleet.validate()) and fleet.read_bytes("m2") == before


def test_a_damaged_shared_part_is_named_with_all_that_rest_on_it(tmp_path: Path) -> None:
    """A frame: every member of it; a member of another frame is read."""
    with build(tmp_path / "fleet", {"a": small(1), "b": small(2), "other": wide()}) as fleet:
        frame = fleet._open.member(fleet._open.entry("a")).frame
        data = bytearray((tmp_path / "fleet" / "members-1").read_bytes())
        data[frame + 6] ^= 1
        (tmp_path / "fleet" / "members-1").write_bytes(data)
    with Fleet(tmp_path / "fleet") as fleet:
        bad = [Path(v.path).name for v in fleet.validate() if not v.ok]
        assert bad == ["members-1", "fleet#a", "fleet#b"] and len(fleet["other"].targets) == 12
        refused: list[LrcError] = []
        assert [member.name for member in fleet.members(refused=refused.append)] == ["other"]
        assert [error.path for error in refused] == [f"{tmp_path}/fleet#a", f"{tmp_path}/fleet#b"]
        fleet.add({"a": small(1), "b": small(2)}, overwrite=True)  # which rest on no damaged part then
        assert encoded(fleet["a"]) == encoded(small(1)) and fleet.gc() and all(v.ok for v in fleet.validate())


def test_reindex_makes_head_and_index_anew(tmp_path: Path) -> None:
    """From the data file alone: after a lost run, and after a lost head; but not from damaged data."""
    with some(tmp_path / "fleet") as fleet:
        fleet.remove("m1")
        expected = {name: fleet.read_bytes(name) for name in fleet}
    for lost in ("index-2", "fleet.json"):
        path = tmp_path / "fleet" / (lost if lost == "fleet.json" else next(iter(_runs(tmp_path / "fleet"))))
        path.write_bytes(b"lost")
        with pytest.raises(LrcError):
            list(Fleet(tmp_path / "fleet").validate())
        assert writing.reindex(tmp_path / "fleet") == 3
        with Fleet(tmp_path / "fleet") as fleet:
            assert {name: fleet.read_bytes(name) for name in fleet} == expected
            assert all(v.ok for v in fleet.validate())
    data = bytearray((tmp_path / "fleet" / "members-1").read_bytes())
    data[20] ^= 1
    (tmp_path / "fleet" / "members-1").write_bytes(data)
    with pytest.raises(errors.DigestError, match="members-1"):
        writing.reindex(tmp_path / "fleet")


def _runs(root: Path) -> list[Path]:
    return sorted(root.glob("index-*"))


# --- its parts, by themselves ---------------------------------------------------------------------------------------

KEYS = st.binary(min_size=1, max_size=12)


@given(st.lists(st.dictionaries(KEYS, st.tuples(st.integers(0, 2**40), st.integers(0, 3)), max_size=60), max_size=4))
def test_runs_of_an_index_are_one_table(runs: list[dict[bytes, tuple[int, int]]]) -> None:
    """Whatever keys are in whatever runs: lookup and iteration give the newest entry of each, deleted ones are gone."""
    trees, expected = [], {}
    for n, run in enumerate(runs, 1):
        made = bytearray()
        written = index.write([Entry(key, *run[key]) for key in sorted(run)], n, made.extend)
        expected |= run
        if written is not None:
            trees.append(Tree(written, partial(_piece, bytes(made))))
            assert not [item for item in trees[-1].check() if isinstance(item, LrcError)]
    listed = {e.key: (e.offset, e.length) for e in index.newest([tree.entries() for tree in trees])}
    assert listed == expected and list(listed) == sorted(expected)
    for key in [*expected, b"nothing", b"\xff"]:
        found = index.find(trees, key)
        assert (found is None) == (not expected.get(key, (0, 0))[1])
        assert found is None or (found.offset, found.length) == expected[key]


def _piece(data: bytes, offset: int, nbytes: int) -> bytes:
    return data[offset : offset + nbytes]


def test_nodes_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 20,000 keys a lookup reads one node of each level, of about 4 KiB; from a key on as many as are needed."""
    made = bytearray()
    run = index.write([Entry(f"name-{n:08}".encode(), n, 1) for n in range(20_000)], 1, made.extend)
    assert run is not None
    reads: list[int] = []

    def read(offset: int, nbytes: int) -> bytes:
        reads.append(nbytes)
        return bytes(made[offset : offset + nbytes])

    tree = Tree(run, read)
    assert tree.find(b"name-00012345") == Entry(b"name-00012345", 12345, 1)
    assert len(reads) <= 3 and max(reads) < 4500
    reads.clear()
    first = next(iter(tree.entries(b"name-00019999")))
    assert first.offset == 19_999 and len(reads) <= 3


@given(st.lists(st.integers(1, 40), max_size=40))
def test_runs_stay_few(added: list[int]) -> None:
    """However many entries come at a time: each run has four times as many as the next, at least."""
    runs: list[index.Run] = []
    for count in added:
        merged = index.to_merge(runs, count)
        total = count + sum(run.entries for run in runs[len(runs) - merged :])
        runs = [*runs[: len(runs) - merged], index.Run(1, 1, 1, total, "")]
        sizes = [run.entries for run in runs]
        assert all(one >= index.RATIO * two for one, two in pairwise(sizes))


JSON = st.recursive(
    st.integers(-5, 5) | st.booleans() | st.sampled_from(["", "x", "ab12"]) | st.lists(st.integers(0, 2), max_size=2),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.sampled_from("abc"), JSON, max_size=3)


@given(OBJECTS, OBJECTS)
def test_a_patch_makes_the_manifest_of_its_frame(frame: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Of any frame, unless an empty object is new; and of what two have in common."""
    for one in (frame, manifests.common(frame, manifest)):
        try:
            own = manifests.packed_patch(one, manifest)
        except errors.CanonicalError:
            assert "{}" in repr(manifest)
            continue
        assert repr(_sorted(manifests.whole(one, own))) == repr(_sorted(manifest))
        assert second.applied(one, second.value_at(own, 0, True)[0]) == manifest


def _sorted(value: Any) -> Any:
    return {key: _sorted(value[key]) for key in sorted(value)} if isinstance(value, dict) else value


def test_work_grows_as_the_members_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice as many members are twice as many records written, and no more reads than one of each source."""
    calls = {}
    for count in (20, 40):
        folder = tmp_path / f"{count}"
        folder.mkdir()
        for n, one in enumerate(variants(small(), count)):
            api.write(one, folder / f"m{n}.lrc")
        with counted(monkeypatch) as reads:
            Fleet.build(tmp_path / f"fleet{count}", folder).close()
        calls[count] = len(reads)
    assert calls[40] <= 2 * calls[20]


def test_a_fleet_is_read_by_what_opened_it(tmp_path: Path) -> None:
    """Members are listed with what their files say, and detail is for one."""
    with some(tmp_path / "fleet") as fleet, OpenFleet(tmp_path / "fleet"):
        member = fleet.member("m1")
        assert (member.method, member.targets, member.version) == ("bone", 2, 3)
        assert member.whole == len(fleet.read_bytes("m1")) > member.bytes and 0 <= (member.captured or -1) <= 1
        with pytest.raises(errors.MissingFieldError, match="m1"):
            fleet.member("m11")
        with pytest.raises(errors.UnknownLayoutError):
            Fleet(tmp_path)
