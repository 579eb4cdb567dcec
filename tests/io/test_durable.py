"""Atomic files and folders: there is the old state or the new one, whatever fails, and nothing is left behind."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lrconvert.core.errors import (
    DiskSpaceError,
    DurabilityError,
    FileChangedError,
    FileReadError,
    FileWriteError,
    LrcError,
    OutputExistsError,
    OutputPathError,
)
from lrconvert.io import durable
from lrconvert.io.durable import atomic_directory, atomic_file, check_output, require_space
from lrconvert.io.durable.system import System
from lrconvert.testing import faults


@pytest.fixture(autouse=True)
def disk_itself() -> Iterator[None]:
    """Unlike the other tests, these wait for the disk."""
    with faults.installed(System()):
        yield


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write(path: Path, data: bytes = b"new", overwrite: bool = False) -> None:
    with atomic_file(path, overwrite=overwrite) as file:
        file.write(data)


def build(path: Path, overwrite: bool = False) -> None:
    with atomic_directory(path, overwrite=overwrite) as folder:
        with folder.create("a") as file:
            file.write(b"12")
            file.write(memoryview(b"345"))
        folder.write_bytes("sub/b", b"b" * 1000)


# --- files ----------------------------------------------------------------------------------------------------------


def test_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with atomic_file(path, overwrite=False) as file:
        assert file.write(b"abc") == 3
        assert file.write(bytearray(b"de")) == 2
        assert file.position == 5
        assert not path.exists()
    assert path.read_bytes() == b"abcde"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", (ValueError, KeyboardInterrupt, SystemExit))
def test_failure_leaves_no_file(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "old").write_bytes(b"old")
    for name, overwrite in (("new", False), ("old", True)):
        with pytest.raises(error), atomic_file(tmp_path / name, overwrite=overwrite) as file:
            file.write(b"half")
            raise error
    assert names(tmp_path) == ["old"] and (tmp_path / "old").read_bytes() == b"old"


def test_mode_is_by_umask_or_as_before(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "new")
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
        (tmp_path / "new").chmod(0o604)
        write(tmp_path / "new", b"newer", overwrite=True)
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o604
    finally:
        os.umask(before)


def test_existing_output_is_refused_or_replaced(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with pytest.raises(OutputExistsError, match=r"E-OUT-EXISTS: .*out: exists already\. .*overwrite=True"):
        write(path)
    assert path.read_bytes() == b"old"
    write(path, overwrite=True)
    assert path.read_bytes() == b"new"


def test_file_that_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with pytest.raises(OutputExistsError, match="meanwhile"), atomic_file(path, overwrite=False) as file:
        file.write(b"ours")
        path.write_bytes(b"theirs")
    assert path.read_bytes() == b"theirs" and names(tmp_path) == ["out"]


def test_file_systems_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    write(tmp_path / "out")
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", (False, True))
def test_paths_that_are_refused(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "real").write_bytes(b"real")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, what in (
        ("link", "symbolic link"),
        ("dangling", "symbolic link"),
        ("folder", "not a regular file"),
        ("pipe", "not a regular file"),
        ("absent/out", "does not exist. Create it first: mkdir -p"),
        ("real/out", "is not a folder"),
        ("..", "does not end in a name"),
    ):
        before = names(tmp_path)
        with pytest.raises(OutputPathError, match=f"E-OUT-PATH: .*{what}"):
            write(tmp_path / name, overwrite=overwrite)
        assert names(tmp_path) == before
    assert (tmp_path / "real").read_bytes() == b"real"


def test_hard_linked_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"1")
    os.link(tmp_path / "one", tmp_path / "two")
    with pytest.raises(OutputPathError, match="has 2 hard links"):
        write(tmp_path / "one", overwrite=True)


def test_inputs_are_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "w").write_bytes(b"")
    (tmp_path / "alias").symlink_to("base")
    for out, what in (("base", "is also the input"), (".", "holds the input"), ("base/out", "lies inside the input")):
        with pytest.raises(OutputPathError, match=what):
            check_output(tmp_path / out, True, [tmp_path / "base"], directory=True)
    with pytest.raises(OutputPathError, match="is also the input"):
        check_output(tmp_path / "base" / "w", True, [tmp_path / "alias" / "w"])
    assert check_output(tmp_path / "other", False, [tmp_path / "base"]) is None


def test_check_output_takes_either_kind_unless_told(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    assert check_output(tmp_path / "folder", False) is not None  # empty
    (tmp_path / "folder" / "x").write_bytes(b"")
    with pytest.raises(OutputExistsError, match="not empty"):
        check_output(tmp_path / "folder", False)
    assert check_output(tmp_path / "folder", True) is not None
    with pytest.raises(OutputPathError, match="not a folder"):
        check_output(tmp_path / "file", True, directory=True)
    with pytest.raises(OutputPathError, match="not a regular file"):
        check_output(tmp_path / "folder", True, directory=False)


def test_space(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(DiskSpaceError, match=r"E-OUT-SPACE: .*: 1152921504606846976 bytes are needed and \d+ are free"):
        require_space(tmp_path, 1 << 60)


# --- folders --------------------------------------------------------------------------------------------------------


def test_folder_appears_whole(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(bytes(range(256)) * 5000)
    (tmp_path / "alias").symlink_to("source")
    out = tmp_path / "out"
    with atomic_directory(out, overwrite=False) as folder:
        with folder.create("deep/er/a") as file:
            file.write(b"a")
            descriptor = os.open(tmp_path / "source", os.O_RDONLY)
            file.copy(descriptor, 3, 700_000)
            os.close(descriptor)
            assert file.position == 700_001
        assert folder.copy_file(tmp_path / "alias", "copy") == 1_280_000
        assert not out.exists()
    source = (tmp_path / "source").read_bytes()
    assert tree(out) == {"copy": source, "deep/er/a": b"a" + source[3:700_003]}
    assert not (out / "copy").is_symlink()
    assert names(tmp_path) == ["alias", "out", "source"]


@pytest.mark.parametrize("error", (errno.EXDEV, errno.EOPNOTSUPP, None))
def test_copying_without_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int | None) -> None:
    """Where copy_file_range refuses, or stops early, bytes are read and written."""
    (tmp_path / "source").write_bytes(os.urandom(100_000))

    def refuse(*args: Any) -> int:
        if error is None:
            return 0
        raise OSError(error, "no")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    with atomic_directory(tmp_path / "out", overwrite=False) as folder:
        folder.copy_file(tmp_path / "source", "copy")
    assert (tmp_path / "out" / "copy").read_bytes() == (tmp_path / "source").read_bytes()


def test_source_that_shrinks_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"1234")
    descriptor = os.open(tmp_path / "source", os.O_RDONLY)
    with (
        pytest.raises(FileChangedError, match="ended early"),
        atomic_directory(tmp_path / "out", overwrite=False) as folder,
        folder.create("copy") as file,
    ):
        file.copy(descriptor, 2, 3)
    os.close(descriptor)
    assert names(tmp_path) == ["source"]


def test_only_regular_files_are_copied(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "absent", "."):
        with pytest.raises(FileReadError), atomic_directory(tmp_path / "out", overwrite=False) as folder:
            folder.copy_file(tmp_path / name, "copy")
    assert names(tmp_path) == ["pipe"]


@pytest.mark.parametrize("name", ("../x", "/x", "a/../../x", ""))
def test_names_stay_inside(tmp_path: Path, name: str) -> None:
    with (
        pytest.raises(OutputPathError, match="not a name inside"),
        atomic_directory(tmp_path / "out", overwrite=False) as folder,
    ):
        folder.write_bytes(name, b"")
    assert names(tmp_path) == []


@pytest.mark.parametrize("exchange", (True, False))
@pytest.mark.parametrize("error", (None, ValueError, KeyboardInterrupt))
def test_folder_is_replaced_in_one_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool, error: type[BaseException] | None
) -> None:
    if not exchange:
        monkeypatch.setattr(durable.system.System, "exchange", lambda self, one, other: False)
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    (out / "sub" / "old").write_bytes(b"old")
    with pytest.raises(OutputExistsError):
        build(out)
    if error is None:
        build(out, overwrite=True)
        assert tree(out) == {"a": b"12345", "sub/b": b"b" * 1000}
    else:
        with pytest.raises(error), atomic_directory(out, overwrite=True) as folder:
            folder.write_bytes("a", b"a")
            raise error
        assert tree(out) == {"sub/old": b"old"}
    assert names(tmp_path) == ["out"]


def test_empty_folder_may_be_there(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    build(tmp_path / "out")
    assert names(tmp_path / "out") == ["a", "sub"]


def test_folder_that_filled_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputExistsError), atomic_directory(out, overwrite=False) as folder:
        folder.write_bytes("a", b"a")
        out.mkdir()
        (out / "theirs").write_bytes(b"")
    assert tree(out) == {"theirs": b""} and names(tmp_path) == ["out"]


def test_folders_that_must_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "a" / "b"
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    for path in (place, tmp_path / "a", tmp_path):
        with pytest.raises(OutputPathError):
            build(path, overwrite=True)
    assert place.exists()


# --- failures of the system -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("persistent", (False, True))
@pytest.mark.parametrize("error", faults.ERRORS)
@pytest.mark.parametrize("overwrite", (False, True))
def test_every_call_may_fail(tmp_path: Path, overwrite: bool, error: int, persistent: bool) -> None:
    """SQLite's loop: fail call n = 1, 2, ... until nothing is left to fail; each time old or new, and no leftovers."""
    (tmp_path / "source").write_bytes(b"s" * 5000)
    (tmp_path / "work").mkdir()
    for kind in ("file", "folder"):
        n, finished = 0, False
        while not finished:
            n += 1
            work = tmp_path / "work" / f"{kind}{n}"
            work.mkdir()
            out = work / "out"
            if overwrite and kind == "file":
                out.write_bytes(b"old")
            elif overwrite:
                out.mkdir()
                (out / "old").write_bytes(b"old")
            failed = None
            with faults.installed(faults.Faulty(n, error, persistent)) as disk:
                try:
                    if kind == "file":
                        write(out, overwrite=overwrite)
                    else:
                        with atomic_directory(out, overwrite=overwrite) as folder:
                            folder.write_bytes("sub/a", b"new")
                            folder.copy_file(tmp_path / "source", "s")
                except LrcError as caught:
                    failed = caught
            finished = not disk.reached
            new = out.is_file() and out.read_bytes() == b"new"
            if kind == "folder":
                new = out.is_dir() and tree(out) == {"sub/a": b"new", "s": b"s" * 5000}
            if finished:
                assert failed is None and new
            elif isinstance(failed, DurabilityError):
                assert new
            elif failed is not None:
                assert isinstance(failed, FileWriteError | FileReadError)
                assert tree(work) in ({}, {"out": b"old"}, {"out/old": b"old"}) or persistent
                assert not new
            else:
                assert new  # a call that has a substitute, like copy_file_range
            if not persistent and not isinstance(failed, DurabilityError):
                assert names(work) in ([], ["out"])
        assert n > 8


def test_a_killed_process_leaves_the_old_state(tmp_path: Path) -> None:
    """SIGKILL in the middle: the old file and folder are untouched, and leftovers carry our name."""
    program = """
import sys, time
from pathlib import Path
from lrconvert.io.durable import atomic_directory, atomic_file
with atomic_file(sys.argv[1] + "/file", overwrite=True) as file:
    file.write(b"new" * 1000)
    with atomic_directory(sys.argv[1] + "/folder", overwrite=True) as folder:
        folder.write_bytes("a", b"new")
        print("ready", flush=True)
        time.sleep(60)
"""
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_bytes(b"old")
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert (tmp_path / "file").read_bytes() == b"old" and tree(tmp_path / "folder") == {"a": b"old"}
    left = [name for name in names(tmp_path) if name not in ("file", "folder")]
    assert len(left) == 2 and all(f".{process.pid}." in name for name in left)


def test_data_is_synced_before_it_gets_its_name(tmp_path: Path) -> None:
    """fsync of the file, then the name, then fsync of the folder: in that order."""
    with faults.installed(faults.Faulty(10**9, errno.EIO)) as disk:
        write(tmp_path / "out")
    order = [name for name in disk.made if name in ("write", "fsync", "link", "unlink")]
    assert order == ["write", "fsync", "link", "unlink", "fsync"]
    with faults.installed(faults.Faulty(10**9, errno.EIO)) as disk:
        build(tmp_path / "folder")
    order = [name for name in disk.made if name in ("write", "fsync", "rename")]
    assert order == ["write", "write", "fsync", "write", "fsync", "fsync", "fsync", "rename", "fsync"]


def test_many_small_writes_are_one_call_each(tmp_path: Path) -> None:
    with (
        faults.installed(faults.Faulty(10**9, errno.EIO)) as disk,
        atomic_file(tmp_path / "out", overwrite=False) as file,
    ):
        for _ in range(500):
            file.write(b"x" * 100)
    assert disk.made.count("write") == 500 and (tmp_path / "out").stat().st_size == 50_000


def test_a_user_without_a_home_replaces_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As containers have them, under a number that no list of users knows."""

    def nowhere() -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    (tmp_path / "out").mkdir()
    with durable.atomic_directory(tmp_path / "out", overwrite=True) as folder:
        folder.write_bytes("new", b"1")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]
