"""Every verb that takes an adapter takes its URL, and writes to one: the same as with paths, and no secret is shown."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click.testing
import pytest
from conftest import ADAPTERS, BASES

import lrconvert
from lrconvert.cli import cli, printing
from lrconvert.core import errors
from lrconvert.io import hub, remote
from lrconvert.io.remote import fetching

fsspec = pytest.importorskip("fsspec")
LORA = ADAPTERS / "llama-plain"
SECRET = "S3CRETx"
# A bucket of this store may have any name: this one looks as a URL with a password does.
PLACE = f"memory://me:{SECRET}@bkt"


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A LoRA at ``PLACE/lora``, and nothing else at any URL."""
    monkeypatch.setenv(fetching.SCRATCH, str(tmp_path / "scratch"))
    fetching._scratch.cache_clear()
    fetching._copies.cache_clear()
    files = fsspec.filesystem("memory")
    files.store.clear()
    for path in LORA.glob("adapter_*"):
        files.pipe_file(f"/me:{SECRET}@bkt/lora/{path.name}", path.read_bytes())
    yield files
    files.store.clear()
    fetching._scratch.cache_clear()
    fetching._copies.cache_clear()


def content(files: Any, inside: str) -> bytes:
    data: bytes = files.cat_file(f"/me:{SECRET}@bkt/{inside}")
    return data


def test_verbs_in_python(store, tmp_path):
    """Results and bytes are those of the same adapter at a path; its name in the file is that at the URL."""
    url = f"{PLACE}/lora"
    folder = tmp_path / "lora"
    folder.mkdir()
    for path in LORA.glob("adapter_*"):
        (folder / path.name).write_bytes(path.read_bytes())
    assert lrconvert.inspect(url) == lrconvert.inspect(folder)
    assert lrconvert.check(url, ["peft"]) == lrconvert.check(folder, ["peft"])
    made = lrconvert.convert(url, "lowrank", bits=8)
    sizes = lrconvert.write(made, f"{PLACE}/out/small.lrc")
    small = tmp_path / "small.lrc"
    assert sizes == lrconvert.write(lrconvert.convert(folder, "lowrank", bits=8), small)
    assert content(store, "out/small.lrc") == small.read_bytes() and SECRET.encode() not in small.read_bytes()
    again = f"{PLACE}/out/small.lrc"
    done = lrconvert.validate(again)
    assert done.ok and done.path == "memory://***@bkt/out/small.lrc"
    assert lrconvert.read(again).method == "lowrank"
    assert lrconvert.compare(url, again) == lrconvert.compare(folder, small)
    assert lrconvert.upgrade(again, f"{PLACE}/out/new.lrc") == lrconvert.upgrade(small, tmp_path / "new.lrc")
    assert content(store, "out/new.lrc") == (tmp_path / "new.lrc").read_bytes()
    exported = lrconvert.export(again, f"{PLACE}/peft", to="peft-lora")
    assert exported.files == lrconvert.export(small, tmp_path / "peft", to="peft-lora").files
    for name in exported.files:
        assert content(store, f"peft/{name}") == (tmp_path / "peft" / name).read_bytes(), name
    cache = tmp_path / "cache"
    assert lrconvert.expanded(again, cache) == lrconvert.expanded(small, cache)
    assert lrconvert.load(f"file://{folder}").targets and lrconvert.load_all([url, again])


def test_compress_writes_to_a_url(store, tmp_path):
    lrconvert.compress(f"{PLACE}/lora", target_ratio=8, forms=["lowrank"], out=f"{PLACE}/best.lrc")
    lrconvert.compress(LORA, target_ratio=8, forms=["lowrank"], out=tmp_path / "best.lrc")
    assert content(store, "best.lrc") == (tmp_path / "best.lrc").read_bytes()
    with pytest.raises(errors.OptionError, match="unfinished work"):
        lrconvert.compress(f"{PLACE}/lora", out=f"{PLACE}/b.lrc", resume=True)


def test_what_is_there_stays(store):
    for verb in (
        lambda **more: lrconvert.write(lrconvert.convert(LORA, "lowrank", bits=8), f"{PLACE}/x.lrc", **more),
        lambda **more: lrconvert.export(LORA, f"{PLACE}/folder", to="peft-lora", **more),
    ):
        verb()
        with pytest.raises(errors.OutputExistsError, match="overwrite=True") as caught:
            verb()
        assert SECRET not in str(caught.value)
        verb(overwrite=True)


def test_errors_of_a_copy_name_the_url(store):
    """Not the file of this machine, which is gone when they are read."""
    store.pipe_file(f"/me:{SECRET}@bkt/broken.lrc", b"x" * 100)
    store.pipe_file(f"/me:{SECRET}@bkt/lora/adapter_config.json", b'{"peft_type": "LORA", "r": 0}')
    for name, call in (("broken.lrc", lrconvert.read), ("broken.lrc", lrconvert.load), ("lora", lrconvert.load)):
        with pytest.raises(errors.LrcError, match=rf"memory://\*\*\*@bkt/{name}") as caught:
            call(f"{PLACE}/{name}")
        assert "scratch" not in str(caught.value)
    (finding,) = lrconvert.validate(f"{PLACE}/broken.lrc").findings[:1]
    assert "memory://***@bkt/broken.lrc" in finding.message and "scratch" not in finding.message


def test_what_takes_no_url_says_so(tmp_path):
    """A base above all: no gigabytes are fetched because a word was a URL."""
    url = f"{PLACE}/lora"
    lrconvert.write(lrconvert.convert(LORA, "lowrank", bits=8), tmp_path / "x.lrc")
    calls = [
        lambda: lrconvert.convert(LORA, "lowrank", base=url),
        lambda: lrconvert.merge(url, LORA, tmp_path / "merged"),
        lambda: lrconvert.merge(BASES / "tiny-llama", LORA, url),
        lambda: lrconvert.expanded(tmp_path / "x.lrc", url),
        lambda: lrconvert.load(Path(url)),
        lambda: hub.output(Path("s3://bkt/x.lrc")),
    ]
    for call in calls:
        with pytest.raises(errors.OptionError, match=r"is a URL") as caught:
            call()
        assert SECRET not in str(caught.value)
    assert not Path("memory:").exists() and not Path("s3:").exists()


# --- batches ------------------------------------------------------------------------------------------------------


def fleet(store: Any, count: int) -> str:
    for n in range(count):
        for path in LORA.glob("adapter_*"):
            store.pipe_file(f"/me:{SECRET}@bkt/fleet/team/{n}/{path.name}", path.read_bytes())
    store.pipe_file(f"/me:{SECRET}@bkt/fleet/broken.safetensors", b"x" * 100)
    return f"{PLACE}/fleet"


def batch(sources: Any, out: Any, **more: Any) -> lrconvert.Batch:
    with ThreadPoolExecutor(1) as executor:  # this store is of this process alone
        return lrconvert.convert_many(sources, out, "lowrank", bits=8, executor=executor, **more)


def test_a_prefix_into_a_prefix(store, tmp_path, monkeypatch):
    """As a folder into a folder; the second run reads and writes nothing, and asks one listing of each; a machine that
    has no manifest takes the one that is there."""
    monkeypatch.setenv("LRCONVERT_CACHE", str(tmp_path / "cache"))
    source, out = fleet(store, 3), f"{PLACE}/small"
    done = batch(source, out, metrics=tmp_path / "figures.jsonl", verbose=True)
    assert SECRET not in repr(done.outcomes) + done._repr_html_() + (tmp_path / "figures.jsonl").read_text()
    assert done.counts == {"done": 3, "failed": 1} and not done.notes
    (failed,) = (one for one in done.outcomes if one.state == "failed")
    assert failed.source == "memory://***@bkt/fleet/broken.safetensors" == failed.message.split(": ")[1]
    assert {one.output for one in done.outcomes} >= {f"memory://***@bkt/small/team/{n}.lrc" for n in range(3)}
    lrconvert.write(lrconvert.convert(LORA, "lowrank", bits=8), tmp_path / "small.lrc")
    for n in range(3):
        made = lrconvert.read(f"{out}/team/{n}.lrc")
        assert made.method == "lowrank" and "request" in made.provenance.fields
    asked: list[str] = []
    for name in ("get", "put", "stat"):
        monkeypatch.setattr(remote.Store, name, _noted(asked, name, getattr(remote.Store, name)))
    store.rm_file(f"/me:{SECRET}@bkt/fleet/broken.safetensors")
    assert batch(source, out).counts == {"skipped": 3} and asked == ["stat"]  # is the folder team an adapter?
    monkeypatch.setenv("LRCONVERT_CACHE", str(tmp_path / "other"))
    assert batch(source, out).counts == {"skipped": 3} and asked == ["stat", *["stat"] * 2, "get"]
    store.pipe_file(f"/me:{SECRET}@bkt/fleet/team/1/adapter_config.json", b"{}")
    store.pipe_file(f"/me:{SECRET}@bkt/small/team/2.lrc", b"damaged")
    again = batch(source, out, overwrite=True)
    assert [one.state for one in again.outcomes] == ["skipped", "failed", "done"]
    manifest = content(store, "small/manifest.jsonl")
    assert SECRET.encode() not in manifest and b"team/0.lrc" in manifest


def test_a_manifest_that_cannot_be_written_is_a_note(store, tmp_path, monkeypatch):
    """The outputs are there, and a later run of this machine knows them."""
    monkeypatch.setenv("LRCONVERT_CACHE", str(tmp_path / "cache"))
    source = fleet(store, 1)
    put = remote.Store.put

    def refused(self: remote.Store, source: Path, **more: Any) -> None:
        if self.url.name == "manifest.jsonl":
            raise errors.AccessError("the store refuses access", path=self.url)
        put(self, source, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote.Store, "put", refused)
        done = batch(f"{source}/team", f"{PLACE}/small")
    assert done.counts == {"done": 1} and "E-ACCESS" in done.notes[0] and SECRET not in done.notes[0]
    assert batch(f"{source}/team", f"{PLACE}/small").counts == {"skipped": 1}


def _noted(asked: list[str], name: str, call: Any) -> Any:
    return lambda self, *words, **more: (asked.append(name), call(self, *words, **more))[1]


def test_prefixes_and_folders_mix(store, tmp_path):
    source = fleet(store, 2)
    assert batch([source, LORA], tmp_path / "local").counts == {"done": 3, "failed": 1}
    assert (tmp_path / "local" / "team" / "1.lrc").is_file() and (tmp_path / "local" / "llama-plain.lrc").is_file()
    assert SECRET not in (tmp_path / "local" / "manifest.jsonl").read_text()
    assert batch([source, LORA], tmp_path / "local").counts == {"skipped": 3, "failed": 1}
    one = batch(f"{source}/team/0", f"{PLACE}/one")
    assert [outcome.output for outcome in one.outcomes] == ["memory://***@bkt/one/0.lrc"]
    for bad, error in (
        ((source, f"{source}/inside"), errors.OutputPathError),
        ((f"{PLACE}/absent", tmp_path / "x"), errors.FileKindError),
        ((source, "https://me:pw@host/x"), errors.LrcError),
    ):
        with pytest.raises(error) as caught:
            batch(*bad)
        assert SECRET not in str(caught.value) and "pw" not in str(caught.value)


# --- the command line ---------------------------------------------------------------------------------------------


def command(*words: str) -> tuple[int, str]:
    """The exit status of a command, and all that it prints."""
    done = click.testing.CliRunner().invoke(cli, list(words), catch_exceptions=True)
    said = done.output
    if isinstance(done.exception, Exception) and not isinstance(done.exception, SystemExit):
        assert isinstance(done.exception, (errors.LrcError, click.ClickException)), done.exception
        said += str(done.exception)
    return done.exit_code, said


SHOWING = [
    ["inspect", f"{PLACE}/lora"],
    ["inspect", PLACE],
    ["inspect", f"{PLACE}/lora", "--json"],
    ["check", f"{PLACE}/lora", "--for", "peft", "--json"],
    ["validate", f"{PLACE}/small.lrc"],
    ["validate", f"{PLACE}/small.lrc", f"{PLACE}/lora/adapter_config.json", "--json"],
    ["compare", f"{PLACE}/lora", f"{PLACE}/small.lrc", "-v"],
    ["compare", f"{PLACE}/lora", f"{PLACE}/small.lrc", "--json"],
    ["compare", f"{PLACE}/lora", f"{PLACE}/small.lrc", "--html", "page.html"],
    ["lora-to-lowrank", f"{PLACE}/lora", "-o", f"{PLACE}/out.lrc", "--bits", "8", "-v"],
    ["lora-to-lowrank", f"{PLACE}/lora", "-o", f"{PLACE}/small.lrc", "--bits", "8"],
    ["lora-to-lowrank", f"{PLACE}/lora", "-o", f"{PLACE}/out2.lrc", "--bits", "8", "--json"],
    ["lora-to-lowrank", f"{PLACE}/absent", "-o", "x.lrc"],
    ["compress", f"{PLACE}/lora", "--methods", "lowrank", "-o", f"{PLACE}/best.lrc"],
    ["export", f"{PLACE}/small.lrc", "--to", "peft-lora", "-o", f"{PLACE}/exported"],
    ["export", f"{PLACE}/small.lrc", "--to", "peft-lora", "-o", "exported"],
    ["upgrade", f"{PLACE}/small.lrc", "-o", f"{PLACE}/new.lrc"],
    ["expand", f"{PLACE}/small.lrc", "--cache", "cache", "--json"],
    ["merge-into-base", f"{PLACE}/base", f"{PLACE}/lora", "-o", "merged"],
    ["merge-into-base", str(BASES / "tiny-llama"), f"{PLACE}/lora=0.5", "-o", "merged"],
    ["merge-into-base", str(BASES / "tiny-llama"), f"{PLACE}/lora=half", "-o", "merged2"],
    ["lora-to-lowrank", f"{PLACE}/lora", "--base", f"{PLACE}/base", "-o", "x.lrc"],
    ["inspect", f"nothing://me:{SECRET}@bkt/x?sig={SECRET}"],
]


@pytest.mark.medium
def test_no_secret_is_shown_or_stored(store, tmp_path, monkeypatch, caplog):
    """Of a URL with one: in nothing that commands print or write, whether they end well or not."""
    caplog.set_level(logging.DEBUG, logger="lrconvert")
    monkeypatch.chdir(tmp_path)
    lrconvert.write(lrconvert.convert(LORA, "lowrank", bits=8), f"{PLACE}/small.lrc")
    codes = []
    for words in SHOWING:
        monkeypatch.setattr("sys.argv", ["lrconvert", *words])
        fetching._copies.cache_clear()
        code, said = command(*words)
        assert SECRET not in said, words
        is_named = "://***@bkt" in said or "no place for a URL" in said
        assert is_named or words[0] in ("expand", "check", "merge-into-base", "compare", "export"), (
            words,
            said,
        )
        codes.append(code)
    assert codes.count(0) == 16, dict(zip(map(" ".join, SHOWING), codes, strict=True))
    assert SECRET not in caplog.text
    for path in tmp_path.rglob("*"):
        assert SECRET not in str(path)
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path
    for path, stored in store.store.items():
        assert SECRET.encode() not in stored.getvalue(), path


def test_a_url_as_output_is_called_so(store, monkeypatch):
    monkeypatch.setattr(printing, "command_line", lambda: "")
    code, said = command("lora-to-lowrank", f"{PLACE}/lora", "-o", f"{PLACE}/out.lrc", "--bits", "8", "--json")
    told = json.loads(said)
    assert code == 0 and told["source"] == "memory://***@bkt/lora" and told["output"] == "memory://***@bkt/out.lrc"
    assert content(store, "out.lrc") and os.fspath(remote.Url(PLACE)) == PLACE
