"""Names and files: what a name means in a folder, at a URL and in a repository, and what it never means."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from lrconvert.core import errors
from lrconvert.formats.expansions.sources import Source
from lrconvert.io.remote.failures import Patience
from lrconvert.serving.settings import Settings
from lrconvert.serving.store import FolderStore, UrlStore, is_name, open_store
from lrconvert.testing.hub_server import Hub, serving

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "store" / "team").mkdir(parents=True)
    (tmp_path / "store" / "one.lrc").write_bytes(b"1")
    (tmp_path / "store" / "team" / "two.lrc").write_bytes(b"2")
    (tmp_path / "outside.lrc").write_bytes(b"secret")
    return tmp_path / "store"


@pytest.fixture
def memory(folder: Path) -> Iterator[str]:
    """The same files at a URL."""
    files = fsspec.filesystem("memory")
    files.put(str(folder), "/bucket/store", recursive=True)
    files.pipe_file("/bucket/outside.lrc", b"secret")
    yield "memory://bucket/store"
    files.rm("/bucket", recursive=True)


def content(source: Source | None, records: Path) -> bytes | None:
    if source is None:
        return None
    with source.opened(records) as opened:
        return opened.path().read_bytes()


@pytest.fixture(params=["folder", "file://", "memory://"])
def store(request: pytest.FixtureRequest, folder: Path, memory: str) -> Any:
    return open_store({"folder": str(folder), "file://": folder.as_uri(), "memory://": memory}[request.param])


def test_names_of_files(store, tmp_path):
    assert content(store.find("one"), tmp_path) == b"1"
    assert content(store.find("team/two"), tmp_path) == b"2"
    for unknown in ("three", "team", "team/one", "one/two", "One"):
        assert store.find(unknown) is None, unknown


NOT_NAMES = ["", "/", ".", "..", "../outside", "team/../../outside", "team/../one", "./one", "/one", "//one", "one/"]
NOT_NAMES += ["team//two", "team\\two", "..\\outside", "C:\\one", "one\0", "one\n", "~/one", ".one", "team/.two"]
NOT_NAMES += ["one?versionId=1", "on*", "[o]ne", "on%65", "a" * 300, "a/" * 400 + "a", "\ud800", "file://one"]


@pytest.mark.parametrize("name", NOT_NAMES)
def test_what_is_no_name_is_unknown(store, name):
    """Nothing of it reaches the disk or the network."""
    assert store.find(name) is None


@given(st.text(alphabet="a./\\~\0 :%", max_size=12))
def test_no_name_leaves_the_folder(text: str) -> None:
    inside = Path("/store")
    if is_name(text):
        assert inside in Path(os.path.normpath(inside / f"{text}.lrc")).parents
        assert Path(os.path.normpath(inside / text)) == inside / text


def test_links(folder, tmp_path, caplog):
    """Inside the folder they are followed, as mounts of configurations have them; none leads out."""
    (folder / "inside.lrc").symlink_to("team/two.lrc")
    (folder / "out.lrc").symlink_to(tmp_path / "outside.lrc")
    (folder / "away").symlink_to(tmp_path)
    (folder / "loop.lrc").symlink_to("loop.lrc")
    (folder / "nowhere.lrc").symlink_to("absent")
    store = open_store(str(folder))
    assert content(store.find("inside"), tmp_path) == b"2"
    for name in ("out", "away/outside", "loop", "nowhere"):
        assert store.find(name) is None
    assert "leaves the store" in caplog.text


def test_what_is_no_regular_file(folder):
    os.mkfifo(folder / "pipe.lrc")
    (folder / "folder.lrc").mkdir()
    store = open_store(str(folder))
    assert store.find("pipe") is None and store.find("folder") is None


def test_a_remote_file_is_fetched_when_it_is_needed_and_not_kept(memory, tmp_path, monkeypatch):
    """A version whose digest is known is not fetched; a new one is."""
    store = open_store(memory)
    assert isinstance(store, UrlStore)
    files = store.place.files
    fetched: list[str] = []
    fetch = files.get_file
    monkeypatch.setattr(files, "get_file", lambda path, to, **more: (fetched.append(path), fetch(path, to, **more)))

    def digest() -> tuple[str, Path | None]:
        source = store.find("one")
        assert source is not None
        before = len(fetched)
        with source.opened(tmp_path) as opened:
            return opened.digest, opened.path() if len(fetched) > before else None

    one, place = digest()
    assert place is not None and not place.exists()
    assert digest() == (one, None) and len(fetched) == 1
    files.pipe_file("/bucket/store/one.lrc", b"another")
    assert digest()[0] != one and len(fetched) == 2


def test_a_store_that_does_not_answer(memory, monkeypatch):
    """That is no unknown name. It was asked several times."""
    store = open_store(memory)
    assert isinstance(store, UrlStore)
    asked: list[str] = []

    def timeout(path: str) -> None:
        asked.append(path)
        raise TimeoutError("no answer in 60 s")

    monkeypatch.setattr(store.place.files, "info", timeout)
    impatient = replace(store.place, patience=Patience(attempts=3, first=0.0))
    with pytest.raises(errors.RemoteError, match=r"does not answer: TimeoutError: no answer in 60 s, 3 times"):
        UrlStore(impatient).find("one")
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("absent-folder", errors.FileKindError),
        ("nothing://x", errors.OptionError),
        ("hf://", errors.OptionError),
        ("hf://org/../x", errors.OptionError),
        ("hf://org/name/../x", errors.OptionError),
    ],
)
def test_what_is_no_store(place, error):
    with pytest.raises(error):
        open_store(place)


_ASK = """
import sys
from pathlib import Path
from lrconvert.core.errors import LrcError
from lrconvert.serving.store import open_store
store = open_store(sys.argv[1])
for name in sys.argv[2:]:
    try:
        source = store.find(name)
    except LrcError as error:
        print(error.code)
        continue
    if source is None:
        print(None)
        continue
    with source.opened(Path("records")) as opened:
        print(opened.path().read_bytes())
"""


@pytest.mark.medium
def test_a_repository_of_the_hub(tmp_path):
    """Through huggingface_hub and its cache; without a network what is there is served, and nothing else is known."""

    def ask(place: str, *names: str, **settings: str) -> list[str]:
        own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_CACHE": str(tmp_path / "cache")}
        own |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT), **settings}
        command = [sys.executable, "-c", _ASK, place, *names]
        done = subprocess.run(command, env={**os.environ, **own}, cwd=tmp_path, capture_output=True, text=True)
        assert not done.returncode, done.stderr
        return done.stdout.split()

    files = {"one.lrc": b"1", "team/two.lrc": b"2", "three.lrc": b"3"}
    with serving(Hub({"org/adapters": files})) as hub:
        assert ask("hf://org/adapters", "one", "team/two", "absent") == ["b'1'", "b'2'", "None"]
        assert ask("hf://org/adapters/team", "two", "one") == ["b'2'", "None"]
        assert ask("hf://org/absent", "one") == ["E-HUB"]
        hub.repositories["org/adapters"]["one.lrc"] = b"new"
        assert ask("hf://org/adapters", "one") == ["b'new'"]
    assert ask("hf://org/adapters", "one", "three", HF_HUB_OFFLINE="1") == ["b'new'", "None"]


# --- settings -----------------------------------------------------------------------------------------------------


def test_settings():
    assert Settings.of({}) is None and Settings.of({"LRCONVERT_STORE": " "}) is None
    plain = Settings.of({"LRCONVERT_STORE": "s3://x"})
    assert plain is not None and plain.options.cache_size == 20 * 10**9 and plain.options.dtype is None
    values = {"CACHE_SIZE": "2GiB", "DTYPE": "BF16", "RANK": "32", "MAX_RANK": "16", "MAX_ERROR": "2%"}
    values |= {"BASE_NAMES": "org/a, org/b,", "BASE": "org/base"}
    full = Settings.of({"LRCONVERT_STORE": "x", **{f"LRCONVERT_{name}": text for name, text in values.items()}})
    assert full is not None and full.base_names == ("org/a", "org/b") and full.base == "org/base"
    options = full.options
    assert (options.cache_size, options.dtype, options.rank, options.max_rank) == (2**31, "BF16", 32, 16)
    assert options.max_error == 0.02


@pytest.mark.parametrize(
    ("name", "text"), [("CACHE_SIZE", "10Q"), ("DTYPE", "F8"), ("MAX_RANK", "many"), ("MAX_RANK", "0"), ("RANK", "1.5")]
)
def test_settings_that_mean_nothing(name, text):
    with pytest.raises(errors.OptionError, match=f"LRCONVERT_{name} is '{text}'"):
        Settings.of({"LRCONVERT_STORE": "x", f"LRCONVERT_{name}": text})


def test_a_folder_store_is_one():
    assert isinstance(open_store(str(ROOT)), FolderStore)
