"""Fleets on disks that fail, fill up or lose power: the old fleet or the new one, whatever call it was, and the next
writer goes on."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import random_lora
from crashes import calls_of, failures, power_losses, whole
from second_readers import fleet as second

from lrconvert import Fleet, api
from lrconvert.core import errors
from lrconvert.core.errors import LrcError
from lrconvert.formats.fleet import writing
from lrconvert.lora.adapter import CompactAdapter
from lrconvert.testing import faults
from lrconvert.testing.fleets import variants

State = dict[str, bytes]
Act = Callable[[Path], Any]


@pytest.fixture(scope="module")
def adapters() -> dict[str, CompactAdapter]:
    compact = api.convert(random_lora(), "bone", rank=1, bits=4).compact
    return {f"m{n}": one for n, one in enumerate(variants(compact, 6))}


@pytest.fixture(scope="module")
def before(adapters: dict[str, CompactAdapter], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fleet with two runs, a removed member and dead bytes."""
    root = tmp_path_factory.mktemp("before") / "fleet"
    with Fleet.build(root, {name: adapters[name] for name in ("m0", "m1", "m2", "m3")}) as fleet:
        fleet.remove("m3")
        fleet.add({"m4": adapters["m4"]})
    return root


def acts(adapters: dict[str, CompactAdapter]) -> dict[str, Act]:
    """Every change of a fleet."""
    new = {"m5": adapters["m5"], "m1": adapters["m3"]}
    given: list[tuple[str, Any]] = [(name, lambda name=name: _arrival(name, new[name])) for name in new]
    return {
        "add": lambda root: writing.add(root, given, overwrite=True),
        "remove": lambda root: writing.remove(root, ["m0", "m4"]),
        "compact": writing.compact,
        "reindex": writing.reindex,
        "build": lambda root: writing.build(root, given, overwrite=True),
    }


def _arrival(name: str, compact: CompactAdapter) -> Any:
    from lrconvert.formats.fleet.intake import Arrival

    return Arrival.of(name, compact)


def state(root: Path) -> State:
    """Members as both readers have them; {} where there is no fleet."""
    if not root.exists():
        return {}
    with Fleet(root) as fleet:
        assert all(result.ok for result in fleet.validate())
        ours = {name: fleet.read_bytes(name) for name in fleet}
    assert second.members({path.name: path.read_bytes() for path in root.iterdir()}) == ours
    return ours


def names(root: Path) -> set[str]:
    return {path.name for path in root.parent.iterdir()} | {path.name for path in root.iterdir()}


@pytest.mark.medium
@pytest.mark.parametrize("act", ["add", "remove", "compact", "reindex", "build"])
def test_every_call_may_fail(place: Path, before: Path, adapters: dict[str, CompactAdapter], act: str) -> None:
    """Whatever call fails, and perhaps all after it, in whatever way: the fleet is the old one or the new one, readers
    find nothing wrong, and the same command once more makes the new one, without leftovers."""
    run = acts(adapters)[act]
    shutil.copytree(before, place / "new")
    run(place / "new")
    old, new, tidy = state(before), state(place / "new"), names(place / "new") - {"new"}
    ways = [(errno.ENOSPC, True), (errno.EIO, False), (faults.SHORT, False)]

    def prepare(out: Path) -> None:
        shutil.copytree(before, out)

    ended = set()
    for failure in failures(place, lambda n: ways[: 1 if n % 3 else 3], prepare, run):
        found = state(failure.out)
        assert found in (old, new), failure
        if failure.caught is None:
            assert found == new
        elif not isinstance(failure.caught, errors.DurabilityError) and failure.error != faults.SHORT:
            ended.add("new" if found == new else "old")
        if act != "remove" or found == old:
            run(failure.out)
        assert state(failure.out) == new
        if act != "build" and (failure.caught is None or found == old):  # what that leaves beside it, `recover` removes
            assert {name[:5] for name in names(failure.out) - {"out"}} <= {name[:5] for name in tidy}
    assert "old" in ended or old == new


@pytest.mark.medium
@pytest.mark.parametrize("act", ["add", "remove", "compact", "reindex"])
def test_power_loss(place: Path, before: Path, adapters: dict[str, CompactAdapter], act: str) -> None:
    """Whatever of what was not synced is on the disk, at every moment: the old fleet or the new one; the new one when
    the writer has said so."""
    run = acts(adapters)[act]
    shutil.copytree(before, place / "new")
    run(place / "new")
    old, new = state(before), state(place / "new")

    def every(count: int) -> Iterator[int]:
        return iter(range(count + 1))

    for left, is_done in power_losses(place, lambda out: shutil.copytree(before, out), run, every):
        found = state(left)
        assert found == new if is_done else found in (old, new)


def test_what_an_ended_writer_left_is_not_read(place: Path, before: Path, adapters: dict[str, CompactAdapter]) -> None:
    """Bytes behind those that count, files that the head does not state, a head that was not put in place: readers pass
    them by, the next writer removes them, and nothing else."""
    root = place / "fleet"
    shutil.copytree(before, root)
    expected = state(root)
    with (root / "members-1").open("ab") as data:
        data.write(b"half a record")
    for name in ("members-2", "index-99", "fleet.json.new", "members-02", "notes.txt", "index-1.bak"):
        (root / name).write_bytes(b"x")
    with Fleet(root) as fleet:
        assert {name: fleet.read_bytes(name) for name in fleet} == expected
        assert all(result.ok for result in fleet.validate())
        fleet.add({"m5": adapters["m5"]})
    assert set(state(root)) == {*expected, "m5"}
    left = {path.name for path in root.iterdir()}
    assert {"notes.txt", "members-02", "index-1.bak"} < left
    assert not {"members-2", "index-99", "fleet.json.new"} & left


def test_a_full_disk_leaves_no_bytes(place: Path, before: Path, adapters: dict[str, CompactAdapter]) -> None:
    """If there is no room for what comes, the data file ends where it did."""
    root = place / "fleet"
    shutil.copytree(before, root)
    content = whole(root)
    writes = [
        n for n, name in enumerate(calls_of(lambda: acts(adapters)["add"](_copy(before, place))), 1) if name == "write"
    ]
    for n in writes:
        with faults.installed(faults.Faulty(n, errno.ENOSPC)), pytest.raises(errors.FileWriteError):
            acts(adapters)["add"](root)
        assert whole(root)["members-1"] == content["members-1"]
    assert state(root) == state(before)


def _copy(before: Path, place: Path) -> Path:
    return Path(shutil.copytree(before, place / "copy"))


def test_links_are_not_followed(place: Path, before: Path, adapters: dict[str, CompactAdapter]) -> None:
    """A data file with another name, or one that is a link, is not appended to; the head is replaced, not written
    through."""
    for kind in ("hard", "soft"):
        root = place / kind
        shutil.copytree(before, root)
        outside = place / f"outside-{kind}"
        if kind == "hard":
            outside.hardlink_to(root / "members-1")
        else:
            (root / "members-1").rename(outside)
            (root / "members-1").symlink_to(outside)
        content = outside.read_bytes()
        with pytest.raises(LrcError):
            acts(adapters)["add"](root)
        assert outside.read_bytes() == content
    root, outside = place / "head", place / "outside.json"
    shutil.copytree(before, root)
    (root / "fleet.json").rename(outside)
    (root / "fleet.json").symlink_to(outside)
    content = outside.read_bytes()
    acts(adapters)["add"](root)
    assert outside.read_bytes() == content and not (root / "fleet.json").is_symlink()
