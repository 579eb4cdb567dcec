"""`pack`, and members of fleets in every command that takes an adapter."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
from conftest import BASES, CommandLine, random_lora

from lrconvert import Fleet, api
from lrconvert.cli.packing import pack
from lrconvert.core import errors
from lrconvert.formats.lrc import file
from lrconvert.serving.store import FleetStore, open_store
from lrconvert.testing.fleets import variants


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the compact files `a/one.lrc` and `a/team/two.lrc`, in which commands run."""
    (tmp_path / "a" / "team").mkdir(parents=True)
    compact = api.convert(random_lora(), "bone", rank=2, bits=8).compact
    for path, one in zip(("one", "team/two"), variants(compact, 2), strict=True):
        api.write(one, tmp_path / "a" / f"{path}.lrc")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_fleet_from_the_command_line(command_line: CommandLine, work: Path) -> None:
    """Built, added to, listed, taken from, compacted and checked; what is said is short, and says what to do."""
    assert "wrote fleet: 2 members" in command_line("pack", "build", "a", "-o", "fleet")[1]
    code, out, _ = command_line("pack", "list", "fleet")
    assert code == 0 and "team/two" in out and "2 members" in out and max(map(len, out.splitlines())) <= 100
    listed = json.loads(command_line("pack", "list", "fleet", "--prefix", "team/", "--json")[1])
    assert listed["members"] == 2 and [member["name"] for member in listed["listed"]] == ["team/two"]
    assert "byte for byte" in command_line("pack", "list", "fleet", "one")[1]
    assert command_line("pack", "get", "fleet", "team/two")[0] == 0
    assert (work / "two.lrc").read_bytes() == (work / "a" / "team" / "two.lrc").read_bytes()
    assert "unchanged" in command_line("pack", "add", "fleet", "a/one.lrc")[1]
    code, _, err = command_line("pack", "add", "fleet", "a/one.lrc", "--name", "team/two")
    assert code == 1 and err.startswith("E-OUT-EXISTS: fleet: ") and "--overwrite" in err and err.count("\n") == 1
    assert "replaced" in command_line("pack", "add", "fleet", "a/one.lrc", "--name", "team/two", "--overwrite")[1]
    assert "1 member left" in command_line("pack", "remove", "fleet", "one")[1]
    assert command_line("validate", "fleet")[1] == "ok: fleet: 1 member\n"
    assert command_line("validate", "fleet", "team/two")[1] == "ok: fleet: 1 member\n"
    assert "before" in command_line("pack", "gc", "fleet")[1]
    assert command_line("pack", "reindex", "fleet")[1] == "fleet: 1 member\n"
    rows = [json.loads(line) for line in command_line("validate", "fleet", "--json")[1].splitlines()]
    assert [row["ok"] for row in rows] == [True, True, True] and rows[-1]["path"] == "fleet#team/two"


def test_every_command_of_pack_has_help(command_line: CommandLine) -> None:
    """In the order of a user's work, each with a line of its own."""
    context = click.Context(pack)
    names = pack.list_commands(context)
    assert names == ["build", "add", "list", "get", "remove", "gc", "reindex"]
    assert all(command_line("pack", name, "-h")[1].startswith("Usage: ") for name in names)


@pytest.mark.medium
def test_a_member_is_taken_wherever_an_adapter_is(command_line: CommandLine, work: Path) -> None:
    """By verbs that read, convert, write and measure; a fleet itself is refused with advice, or stands for all."""
    Fleet.build("fleet", "a").close()
    two, same = "fleet#team/two", work / "a" / "team" / "two.lrc"
    assert b"".join(file.encode(api.read(two))) == same.read_bytes() and repr(api.load(two)) == repr(api.read(same))
    assert api.inspect(two)["bytes"]["total"] == same.stat().st_size and api.validate(two).path == two
    assert [finding.consumer for finding in api.check(two, ["vllm"])] == ["vllm"]
    assert api.expanded(two, "cache").is_dir() and api.expanded(two, "cache") == api.expanded(same, "cache")
    assert api.upgrade(two, "new.lrc") and (work / "new.lrc").read_bytes() == same.read_bytes()
    assert command_line("lora-to-bone", two, "-o", "bone.lrc", "--bits", "8", "-q")[0] == 0
    assert command_line("export", two, "--to", "peft-lora", "-o", "out", "-q")[0] == 0 and (work / "out").is_dir()
    code, out, _ = command_line("inspect", "fleet")
    assert code == 0 and "fleet#team/two" in out and "2 adapters" in out
    for words in (["export", "fleet", "--to", "peft-lora", "-o", "x"], ["expand", "fleet"]):
        code, _, err = command_line(*words)
        assert code == 1 and "fleet#NAME" in err
    for name, error in (("none", "E-MISSING"), ("../one", "E-NAME")):
        code, _, err = command_line("inspect", f"fleet#{name}")
        assert code == 1 and err.startswith(error), err
    (work / "fleet#odd.lrc").write_bytes(same.read_bytes())
    assert api.read("fleet#odd.lrc").method == "bone"  # a path that exists is that path
    assert command_line("pack", "add", "fleet", "fleet#odd.lrc")[2].startswith("E-NAME")
    code, _, err = command_line("lora-to-bone", two, "-o", "fleet", "--bits", "8", "--overwrite")
    assert code == 1 and err.startswith("E-OUT-PATH")


def test_a_fleet_is_the_store_of_a_server(work: Path) -> None:
    """Members by their names, as they are now; what is no name is none."""
    Fleet.build("fleet", "a").close()
    store = open_store("fleet")
    assert isinstance(store, FleetStore) and store.find("nothing") is None and store.find("../a/one") is None
    source = store.find("team/two")
    assert source is not None and source.shown.endswith("fleet#team/two")
    with source.opened(work / "records") as opened:
        assert opened.path().read_bytes() == (work / "a" / "team" / "two.lrc").read_bytes()
    with Fleet("fleet") as fleet:
        fleet.add({"later": work / "a" / "one.lrc"})
        fleet.remove("team/two")
    assert store.find("later") is not None and store.find("team/two") is None
    with pytest.raises(errors.MissingFieldError), source.opened(work / "records"):
        pass


def test_members_are_merged(work: Path) -> None:
    """A member with a scale, and the files that they came from: the same model."""
    lora = api.load_lora(BASES.parent / "adapters" / "llama-plain")
    api.write(api.convert(lora, "bone", rank=2, bits=8).compact, "small.lrc")
    Fleet.build("fleet", "small.lrc").close()
    for source, out in (("small.lrc", "x"), ("fleet#small", "y")):
        api.merge(BASES / "tiny-llama", api.Scaled(source, 0.5), out, undo=False)
    weights = [sorted((work / out).glob("*.safetensors")) for out in "xy"]
    assert [path.read_bytes() for path in weights[0]] == [path.read_bytes() for path in weights[1]]
