"""Adapters at URLs, on stores in memory: what a listing means, what is fetched, what is published, what is tried again.
tests/io/test_remote_peers.py has a real server."""

from __future__ import annotations

import datetime
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ADAPTERS, ROOT
from hypothesis import given
from hypothesis import strategies as st

from lrconvert.core import errors
from lrconvert.io import remote
from lrconvert.io.durable.scratch import Scratch
from lrconvert.io.remote import failures, fetching, listing, publishing
from lrconvert.io.remote.failures import Patience, asked
from lrconvert.io.remote.stores import Entry, Store, version
from lrconvert.io.remote.urls import Url
from lrconvert.testing.hub_server import Hub, serving

fsspec = pytest.importorskip("fsspec")
from fsspec.implementations.memory import MemoryFileSystem

LORA = ADAPTERS / "llama-plain"
NOW = Patience(attempts=4, first=0.0)


class Renaming(MemoryFileSystem):  # type: ignore[misc]
    """A store of the kind whose files do not appear whole: half of a file is there before the whole of it."""

    protocol = "renaming"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs: list[str] = [""]  # noqa: RUF012
    seen: list[str] = []  # noqa: RUF012
    broken = ""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.replace("renaming://", "memory://"))

    def put_file(self, lpath: str, rpath: str, callback: Any = None, **more: Any) -> None:
        data = Path(lpath).read_bytes()
        self.pipe_file(rpath, data[: len(data) // 2])
        self.seen.append(rpath)
        if self.broken == "put":
            raise KeyboardInterrupt
        self.pipe_file(rpath, data if self.broken != "damage" else data[:-1] + b"?")

    def mv(self, path1: str, path2: str, **more: Any) -> None:
        if self.broken == "mv":
            raise KeyboardInterrupt
        self.pipe_file(path2, self.cat_file(path1))
        self.rm_file(path1)


fsspec.register_implementation("renaming", Renaming, clobber=True)


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Empty stores, a scratch folder of the test's own, and nobody who waits."""
    monkeypatch.setenv(fetching.SCRATCH, str(tmp_path / "scratch"))
    monkeypatch.setattr(failures.time, "sleep", lambda seconds: None)
    fetching._scratch.cache_clear()
    fetching._copies.cache_clear()
    publishing._leftovers.cache_clear()
    for kind in (MemoryFileSystem, Renaming):
        kind.store.clear()
        kind.pseudo_dirs[:] = [""]
    Renaming.broken, Renaming.seen[:] = "", []
    yield
    fetching._scratch.cache_clear()
    fetching._copies.cache_clear()


def stored(*names: str, data: bytes = b"123", protocol: str = "memory") -> None:
    for name in names:
        fsspec.filesystem(protocol).pipe_file(f"/bkt/{name}", data)


def at(inside: str, protocol: str = "memory") -> Store:
    return replace(remote.open_store(f"{protocol}://bkt/{inside}"), patience=NOW)


def lora_at(*folders: str) -> None:
    for folder in folders:
        for path in LORA.glob("adapter_*"):
            stored(f"{folder}/{path.name}", data=path.read_bytes())


def scratch_files(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()]


# --- listings -----------------------------------------------------------------------------------------------------


def paths(inside: str) -> list[str]:
    return [adapter.path for adapter in remote.adapters(at(inside))]


def test_what_is_an_adapter_follows_from_the_names():
    lora_at("fleet/a", "fleet/b/c", "fleet/b/c/checkpoint-5", "fleet/b/c/00")
    stored("fleet/0.lrc", "fleet/d/x.safetensors", "fleet/d/notes.txt", "fleet/.hidden/x.lrc", "fleet/d/.x.lrc")
    stored("fleet/b/c/optimizer.pt", "fleet/e/optimizer.pt", "fleet/m/config.json", "fleet/m/model.safetensors")
    assert paths("fleet") == ["0.lrc", "a/", "b/c/", "d/x.safetensors", "m/"]
    assert paths("fleet/") == paths("fleet")
    assert paths("fleet/a") == [""] and paths("fleet/0.lrc") == [""] and paths("fleet/b") == ["c/"]
    with pytest.raises(errors.FileKindError, match="nothing of that name in 'bkt'"):
        paths("absent")
    assert paths("fleet/e") == []


NAMES = st.sampled_from(["adapter_config.json", "adapter_model.safetensors", "x.lrc", "a.npz", "Z.bin", "note.txt"])
TREE = st.sets(
    st.builds(lambda folders, name: "/".join([*folders, name]), st.lists(st.sampled_from("aZ0-_"), max_size=3), NAMES),
    max_size=25,
)


def plainly(names: set[str]) -> set[str]:
    """The adapters among names, by the rule itself."""
    folders = {name.removesuffix("adapter_config.json") for name in names if name.endswith("adapter_config.json")}
    folders = {one for one in folders if not any(one != other and one.startswith(other) for other in folders)}
    inside = {name for name in names if any(name.startswith(folder) for folder in folders)}
    return folders | {name for name in names - inside if listing.is_weights(name.rpartition("/")[2])}


@given(TREE)
def test_a_listing_is_told_as_it_comes(names):
    """In one pass over names in the order of their bytes, with at most one question for each folder."""
    questions: list[str] = []

    def has_config(folder: str) -> bool:
        questions.append(folder)
        return f"{folder}adapter_config.json" in names

    entries = [Entry(name, 1, "v") for name in sorted(names, key=str.encode)]
    told = [adapter.path for adapter in listing._told(entries, has_config)]
    assert set(told) == plainly(names) and len(told) == len(set(told))
    assert len(questions) == len(set(questions))


def test_a_long_listing_is_not_kept():
    """Of 5,000 folders each is given as soon as the next one begins: nothing is collected, and nothing asked twice."""
    read, questions = [0], [0]

    def entries() -> Iterator[Entry]:
        for n in range(5_000):
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                read[0] += 1
                yield Entry(f"{n:06}/{name}", 1, "v")

    def has_config(folder: str) -> bool:
        questions[0] += 1
        return False

    for count, _ in enumerate(listing._told(entries(), has_config), 1):
        assert read[0] <= 2 * count + 1
    assert count == 5_000 and questions[0] == 1


def test_an_order_in_which_folders_cannot_be_told_is_refused():
    class Shuffled(Store):
        def walk(self) -> Iterator[Entry]:
            yield from (Entry("b/x.lrc", 1), Entry("a/x.lrc", 1))

    with pytest.raises(errors.FileReadError, match="no order"):
        list(remote.adapters(Shuffled(None, "/bkt", Url("memory://bkt/x"))))


def test_the_state_of_an_adapter_is_that_of_what_is_read_of_it():
    """The same from a listing and from a look at it, another one after any file of it has changed, and no other."""
    lora_at("fleet/a", "fleet/b")
    stored("fleet/a/optimizer.pt", "fleet/x.safetensors")

    def states() -> dict[str, str]:
        return {one.path: one.state for one in remote.adapters(at("fleet"))}

    before = states()
    assert all(before.values()) and len(set(before.values())) == 3
    for path, state in before.items():
        assert remote.files_of(at(f"fleet/{path}")).adapter.state == state
    stored("fleet/a/optimizer.pt", data=b"other")
    assert states() == before
    stored("fleet/a/adapter_config.json", data=b"{}")
    assert {path for path, state in states().items() if state != before[path]} == {"a/"}


def test_versions():
    """An ETag or a generation counts alone, since listings and heads give other times; without any, the times do."""
    tagged = {"ETag": '"abc"', "size": 3}
    assert version({**tagged, "LastModified": 1}) == version({**tagged, "LastModified": 2}) != ""
    assert version(tagged) != version({**tagged, "ETag": '"abd"'}) != version({**tagged, "size": 4})
    assert version({"mtime": 1.0, "size": 3}) != version({"mtime": 2.0, "size": 3}) and version({"size": 3}) == ""


# --- fetching -----------------------------------------------------------------------------------------------------


def test_only_what_is_needed_is_fetched(tmp_path, monkeypatch):
    lora_at("run")
    stored(*(f"run/{name}" for name in ("optimizer.pt", "tokenizer.json", "README.md", "checkpoint-1/x.lrc", "x.bin")))
    with remote.fetched("memory://bkt/run") as path:
        assert path.name == "run"
        fetched = sorted(one.name for one in path.rglob("*"))
        assert fetched == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
        assert (path / "adapter_model.safetensors").read_bytes() == (LORA / "adapter_model.safetensors").read_bytes()
    assert not scratch_files(tmp_path)


def test_of_a_model_only_what_says_so_is_fetched(tmp_path):
    stored("base/config.json", "base/model.safetensors", data=b"{}")
    with remote.fetched("memory://bkt/base") as path:
        assert [one.name for one in path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["adapter_model.bin", "adapter_config.json"], ["adapter_config.json", "adapter_model.bin"]),
        (
            [f"adapter_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
            + ["adapter_config.json", "adapter_model.safetensors.index.json"],
            None,
        ),
        (["adapter_config.json", "adapters.safetensors", "0001_adapters.safetensors"], None),
        (["adapter_config.json", "a.gguf", "b.pt"], ["a.gguf", "adapter_config.json"]),
    ],
)
def test_the_files_of_an_adapter(names, wanted):
    needed = sorted(entry.name for entry in listing.needed([Entry(name, 1) for name in names]))
    assert needed == sorted(wanted or names)


def test_sizes_are_bounded_before_and_while(tmp_path, monkeypatch):
    stored("x.lrc", data=b"1" * 100)
    monkeypatch.setattr(fetching, "MAX_FETCHED", 99)
    with pytest.raises(errors.LimitError, match="100 bytes"), remote.fetched("memory://bkt/x.lrc"):
        pass
    place = at("x.lrc")
    with pytest.raises(errors.LimitError, match="longer than the 50 bytes"):
        place.get(tmp_path / "x", 50)
    with pytest.raises(errors.FileChangedError):
        fetching._fetch(place, Entry("x.lrc", 101), tmp_path)
    with pytest.raises(errors.FileChangedError):
        fetching._fetch(at("gone.lrc"), Entry("gone.lrc", 101), tmp_path)
    monkeypatch.setattr(fetching, "require_space", _no_space)
    monkeypatch.setattr(fetching, "MAX_FETCHED", 100)
    with pytest.raises(errors.DiskSpaceError), remote.fetched("memory://bkt/x.lrc"):
        pass
    assert not scratch_files(tmp_path)


def _no_space(place: Path, nbytes: int) -> None:
    raise errors.DiskSpaceError(f"{nbytes} bytes are needed and 0 are free")


def test_a_copy_is_fetched_once_for_each_version(tmp_path, monkeypatch):
    stored("x.lrc")
    got: list[str] = []
    get = Store.get
    monkeypatch.setattr(Store, "get", lambda self, *words: (got.append(self.root), get(self, *words))[1])
    first = remote.local_copy("memory://bkt/x.lrc")
    assert remote.local_copy("memory://bkt/x.lrc") == first and len(got) == 1
    stored("x.lrc", data=b"other")
    assert remote.local_copy("memory://bkt/x.lrc").read_bytes() == b"other" and len(got) == 2
    assert not first.exists()


def test_copies_are_bounded(tmp_path, monkeypatch):
    """The oldest go when all have more than LRCONVERT_SCRATCH_SIZE; those that a verb may be reading stay."""
    monkeypatch.setenv(fetching.SCRATCH_SIZE, "100")
    for n in range(40):
        stored(f"{n}.lrc", data=b"1" * 10)
        remote.local_copy(f"memory://bkt/{n}.lrc")
    kept = sorted(int(path.stem) for path in scratch_files(tmp_path))
    assert kept == list(range(40 - len(kept), 40)) and 16 <= len(kept) <= 18


def test_what_a_killed_process_left_goes_with_the_next(tmp_path):
    """And nothing else: not what a living one holds, nor what is not ours."""
    root = tmp_path / "scratch"
    code = "import os; from lrconvert.io import remote\nwith remote.folder('x') as f: (f / 'y').touch(); os._exit(9)"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    (root / "mine").mkdir()
    living = Scratch(root)
    held = living.folder("held")
    assert sorted(path.name for path in root.iterdir()) == sorted([living.path.name, "mine"])
    other = Scratch(root)
    assert held.is_dir()
    living.close()
    other.close()
    assert [path.name for path in root.iterdir()] == ["mine"]


def test_a_scratch_folder_of_others_is_refused(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("open", "link"):
        with pytest.raises(errors.OutputPathError, match="LRCONVERT_SCRATCH"):
            Scratch(tmp_path / name)


# --- failures -----------------------------------------------------------------------------------------------------


class Client(Exception):
    """An error of an HTTP client, with a status."""

    def __init__(self, text: str = "no", **more: Any) -> None:
        super().__init__(text)
        self.__dict__.update(more)


def of_botocore(status: int) -> Exception:
    return Client(response={"Error": {"Code": "x"}, "ResponseMetadata": {"HTTPStatusCode": status}})


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


Lost = type("ServerDisconnectedError", (Exception,), {"__module__": "aiohttp.client_exceptions"})
Nobody = type("NoCredentialsError", (Exception,), {"__module__": "botocore.exceptions"})
PASSING = [TimeoutError(), ConnectionResetError(), OSError(errno.EBUSY, "slow down"), OSError(errno.EREMOTEIO, "500")]
PASSING += [Client(status=503), Client(code="500"), Client(status_code=429), of_botocore(503), Lost("gone")]
PASSING += [raised_from(FileNotFoundError("url"), Client(status=502)), raised_from(OSError(5, "x"), of_botocore(500))]
REFUSED = [PermissionError("denied"), Client(status=403), of_botocore(401), Nobody("Unable to locate credentials")]
REFUSED += [raised_from(FileNotFoundError("url"), Client(status=403))]
Offline = type("OfflineModeIsEnabled", (ConnectionError,), {})
OTHER = [ValueError("what"), Offline("offline mode is enabled"), Client(status=400)]
OTHER += [OSError(errno.EINVAL, "no such bucket name")]


def tried(error: Exception, url: str = "s3://bkt/key") -> tuple[int, Exception]:
    count = [0]

    def call() -> None:
        count[0] += 1
        raise error

    with pytest.raises(Exception) as caught:
        asked(Url(url), call, NOW, lambda seconds: None)
    return count[0], caught.value


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_what_passes_is_tried_again(error):
    count, raised = tried(error)
    assert count == 4 and isinstance(raised, errors.RemoteError) and "4 times" in str(raised)


@pytest.mark.parametrize("error", REFUSED, ids=repr)
def test_what_is_refused_is_not(error):
    count, raised = tried(error)
    assert count == 1 and isinstance(raised, errors.AccessError) and "AWS_PROFILE" in str(raised)


@pytest.mark.parametrize("error", OTHER, ids=repr)
def test_nor_is_what_nobody_knows(error):
    count, raised = tried(error)
    assert count == 1 and isinstance(raised, errors.RemoteError) and "refuses this" in str(raised)


@pytest.mark.parametrize("error", [FileNotFoundError("x"), Client(status=404), of_botocore(404)], ids=repr)
def test_what_is_missing_is_said_at_once(error):
    assert tried(error)[0] == 1 and isinstance(tried(error)[1], FileNotFoundError)


def test_a_failure_that_ends_is_no_failure():
    answers = iter([TimeoutError(), Client(status=500), "here"])
    waited: list[float] = []

    def call() -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert asked(Url("s3://bkt/x"), call, Patience(), waited.append) == "here"
    assert len(waited) == 2 and 0.25 <= waited[0] <= 0.5 <= waited[1] <= 1.0


def test_waits_double_up_to_a_bound():
    waits = list(Patience(attempts=12).waits())
    assert len(waits) == 11 and all(2**n / 4 <= wait <= 2**n / 2 for n, wait in enumerate(waits[:5]))
    assert max(waits) <= 20


@pytest.mark.parametrize("error", [Client("https://h/x?X-Amz-Signature=S3CRET\nmore", status=s) for s in (403, 500)])
def test_what_a_driver_says_is_one_line_without_secrets(error):
    raised = tried(error, "s3://me:S3CRET@bkt/key?sig=S3CRET")[1]
    assert "S3CRET" not in str(raised) and "\n" not in str(raised) and "s3://***@bkt/key" in str(raised)


# --- publishing ---------------------------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path: Path) -> Path:
    path = tmp_path / "made.lrc"
    path.write_bytes(bytes(range(256)) * 8)
    return path


@pytest.mark.parametrize("protocol", ["memory", "renaming"])
def test_a_file_is_published_once(made, tmp_path, protocol):
    url = f"{protocol}://bkt/out/x.lrc"
    remote.check_output(url, False)
    remote.publish(made, url, overwrite=False)
    assert at("out/x.lrc", protocol).files.cat_file("/bkt/out/x.lrc") == made.read_bytes()
    with pytest.raises(errors.OutputExistsError):
        remote.check_output(url, False)
    other = tmp_path / "other"
    other.write_bytes(b"other")
    with pytest.raises(errors.OutputExistsError, match="meanwhile"):
        remote.publish(other, url, overwrite=False)
    assert at("out/x.lrc", protocol).files.cat_file("/bkt/out/x.lrc") == made.read_bytes()
    remote.check_output(url, True)
    remote.publish(other, url, overwrite=True)
    assert [one.name for one in at("out", protocol).names()] == ["x.lrc"]
    assert at("out/x.lrc", protocol).files.cat_file("/bkt/out/x.lrc") == b"other"


@pytest.mark.parametrize("broken", ["put", "mv", "damage"])
def test_what_is_broken_off_is_never_seen(made, broken):
    """Under its name there is nothing, or what was there, and nothing is left beside it."""
    Renaming.broken = broken
    for before in (None, b"before"):
        if before:
            stored("out/x.lrc", data=before, protocol="renaming")
        with pytest.raises(errors.FileWriteError if broken == "damage" else KeyboardInterrupt):
            remote.publish(made, "renaming://bkt/out/x.lrc", overwrite=broken != "mv")
        assert [one.name for one in at("out", "renaming").names()] == (["x.lrc"] if before else [])
        if before:
            assert at("out", "renaming").files.cat_file("/bkt/out/x.lrc") == before
        if broken == "mv":
            break
    assert all(name.endswith(".tmp") for name in Renaming.seen)


def test_leftovers_of_killed_runs_are_tidied_when_they_are_old(made):
    names = [f"out/.y.lrc.12.{n:08x}.tmp" for n in (1, 2)]
    stored(*names, "out/.mine.tmp", protocol="renaming")
    files = fsspec.filesystem("renaming")
    old = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=2)
    files.store[f"/bkt/{names[0]}"].created = old
    remote.publish(made, "renaming://bkt/out/x.lrc", overwrite=False)
    assert sorted(one.name for one in at("out", "renaming").names()) == [".mine.tmp", Path(names[1]).name, "x.lrc"]


def test_a_store_that_holds_other_bytes_is_noticed(made, monkeypatch):
    monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda *words, **more: b"")
    put = Store.put

    def damaged(self: Store, source: Path, *, exclusive: bool) -> None:
        put(self, source, exclusive=exclusive)
        files = self.files
        files.store["/bkt/out/x.lrc"].seek(0)
        files.store["/bkt/out/x.lrc"].write(b"?")

    monkeypatch.setattr(Store, "put", damaged)
    with pytest.raises(errors.FileWriteError, match="other bytes"):
        remote.publish(made, "memory://bkt/out/x.lrc", overwrite=False)
    assert at("out/x.lrc").stat() is None


def test_an_upload_whose_answer_was_lost_has_not_failed(made, monkeypatch):
    """It is tried again, finds its own bytes under the name, and is content."""
    pipe = MemoryFileSystem.pipe_file
    times = [0]

    def lost(self: Any, *words: Any, **more: Any) -> None:
        pipe(self, *words, **more)
        times[0] += 1
        if times[0] == 1:
            raise ConnectionResetError

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", lost)
    assert remote.publish(made, "memory://bkt/out/x.lrc", overwrite=False).size == 2048


def test_a_folder_becomes_an_adapter_last(tmp_path):
    """Whenever it is looked at, what is there is no adapter, or the whole of one."""
    source = tmp_path / "made"
    source.mkdir()
    names = ["adapter_config.json", "adapter_model.safetensors", "zzz.json"]
    for name in names:
        (source / name).write_bytes(b"{}")
    seen: list[list[str]] = []
    files = fsspec.filesystem("memory")
    pipe = files.pipe_file
    for overwrite in (False, True):
        seen.clear()

        def watched(path: str, *words: Any, **more: Any) -> None:
            pipe(path, *words, **more)
            seen.append([one.name for one in at("out").names()])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MemoryFileSystem, "pipe_file", lambda self, *words, **more: watched(*words, **more))
            remote.publish_folder(source, names, "memory://bkt/out", overwrite=overwrite)
        assert all("adapter_config.json" not in names for names in seen[:-1]) and len(seen[-1]) == 3
    stored("out/other")
    with pytest.raises(errors.OutputPathError, match="'other'"):
        remote.publish_folder(source, names, "memory://bkt/out", overwrite=True)


_ASK = """
import os, pathlib, sys
from lrconvert.core.errors import LrcError
from lrconvert.io import remote
def ask(call, *words, **more):
    try:
        print(call(*words, **more))
    except LrcError as error:
        print(error.code)
with remote.fetched("hf://org/loras/a") as path:
    print(sorted(os.listdir(path)))
ask(lambda: [a.path for a in remote.adapters(remote.open_store("hf://org/loras@main"))])
ask(lambda: list(remote.adapters(remote.open_store("hf://org/absent/x"))))
ask(lambda: remote.publish(pathlib.Path(sys.argv[1]), "hf://org/loras/out/x.lrc", overwrite=False).size)
ask(remote.check_output, "hf://org/loras/out/x.lrc", False)
"""


@pytest.mark.medium
def test_a_repository_of_the_hub(tmp_path, made):
    """Read as a folder is, and written to in one commit; a token is huggingface_hub's affair."""
    files = {f"{name}/{path.name}": path.read_bytes() for name in "ab" for path in LORA.glob("adapter_*")}
    with serving(Hub({"org/loras": {**files, "x.lrc": b"1"}})) as hub:
        own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        own |= {"HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT), "HF_TOKEN": "hf_0123456789abcdefghij"}
        command = [sys.executable, "-c", _ASK, str(made)]
        done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, check=True)
        names = "['adapter_config.json', 'adapter_model.safetensors']"
        assert done.stdout.splitlines() == [names, "['a/', 'b/', 'x.lrc']", "E-IO-KIND", "2048", "E-OUT-EXISTS"]
        assert hub.repositories["org/loras"]["out/x.lrc"] == made.read_bytes()


# --- URLs ---------------------------------------------------------------------------------------------------------

NOT_TAKEN: list[tuple[str, type[errors.LrcError]]] = [
    ("simplecache::memory://x/y", errors.OptionError),
    ("zip://a.lrc::memory://x/y.zip", errors.OptionError),
    ("reference://x", errors.OptionError),
    ("memory://", errors.OptionError),
    ("memory://a\nb", errors.OptionError),
    ("nothing://x/y", errors.OptionError),
    ("file://elsewhere/x", errors.OptionError),
]


@pytest.mark.parametrize(("url", "error"), NOT_TAKEN)
def test_what_is_no_place(url, error):
    with pytest.raises(error):
        remote.local_path(url) or remote.open_store(url)


def test_a_driver_that_is_not_there_is_named():
    known = {"s3": "s3fs", "gs": "gcsfs", "abfs": "adlfs", "https": "aiohttp"}
    absent = {scheme: package for scheme, package in known.items() if not _is_installed(package)}
    for scheme, package in absent.items():
        with pytest.raises(errors.DependencyError, match=f"pip install {package}"):
            remote.open_store(f"{scheme}://bkt/x")


def _is_installed(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


def test_a_url_is_shown_without_secrets_and_given_whole():
    url = Url("s3://me:SECRET@bkt/folder/x.lrc")
    assert os.fspath(url) == url.text and "SECRET" not in f"{url} {url!r} {[url]} {url / 'y'}"
    assert url.name == "x.lrc" and os.fspath(url / "y") == f"{url.text}/y"
    assert Url("https://h/a%20b.lrc?X-Amz-Signature=a/b#c").name == "a b.lrc"


@pytest.mark.parametrize("text", ["s3://b/x", "hf://org/name", "https://h/x", "memory://b", "zip::s3://b"])
def test_urls_are_told_from_paths(text, tmp_path):
    assert remote.is_url(text) and not remote.is_url(text.replace("://", ":").replace("::", "")), text
    assert not remote.is_url(tmp_path) and not remote.is_url("org/name@main") and not remote.is_url("C:\\x")


def test_a_web_server_is_read_and_not_written(made, monkeypatch):
    monkeypatch.setattr(publishing, "open_store", lambda url: Store(None, url, Url(url)))
    for call in (remote.check_output, lambda url, overwrite: remote.publish(made, url, overwrite=overwrite)):
        with pytest.raises(errors.OptionError, match="takes no files"):
            call("https://h/x.lrc", False)
