"""The cache of expansions: made once, whole or not there, and bounded."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from conftest import random_lora

from lrconvert.core.dtypes import Stored
from lrconvert.core.errors import FileChangedError, FileWriteError, LrcError
from lrconvert.formats.expansions import ranks, sources
from lrconvert.formats.expansions.cache import LIST, Cache, Expansion, Files
from lrconvert.formats.expansions.sources import LocalFile
from lrconvert.io import durable
from lrconvert.lora import svd
from lrconvert.lora.adapter import LoraTarget, Target
from lrconvert.testing import faults

KEY, OTHER, THIRD = ("0" * 64, "1" * 64, "2" * 64)
FILES = {"weights": b"w" * 1000, "config": b"{}"}


def make(files: Mapping[str, bytes] = FILES) -> tuple[Files, Mapping[str, Any]]:
    return {name: [data[:7], data[7:]] for name, data in files.items()}, {"about": 1}


def never() -> Any:
    raise AssertionError("it is there, and must not be made again")


def content(expansion: Expansion) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in expansion.folder.iterdir() if path.name != LIST}


def hidden(root: Path) -> list[str]:
    return [path.name for path in root.iterdir() if path.name.startswith(".")]


# --- once ---------------------------------------------------------------------------------------------------------


def test_what_is_there_is_not_made_again(tmp_path):
    first = Cache(tmp_path / "cache").get(KEY, make)
    second = Cache(tmp_path / "cache").get(KEY, never)
    assert (first.was_there, second.was_there) == (False, True)
    assert first.folder == second.folder and second.facts == {"about": 1} and content(second) == FILES


def _ask(root: Path, log: Path) -> None:
    def slow() -> Any:
        with log.open("a") as file:
            file.write("x")
        time.sleep(0.2)  # the others are waiting by now
        return make()

    assert content(Cache(root).get(KEY, slow)) == FILES


def test_processes_that_ask_at_once_make_it_once(tmp_path):
    fork = multiprocessing.get_context("fork")
    askers = [fork.Process(target=_ask, args=(tmp_path / "cache", tmp_path / "log")) for _ in range(6)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert [asker.exitcode for asker in askers] == [0] * 6
    assert (tmp_path / "log").read_text() == "x"


def _die_making(root: Path) -> None:
    def killed() -> Any:
        files, facts = make()

        def chunks() -> Iterator[bytes]:
            yield b"half"
            os.kill(os.getpid(), 9)

        return {**files, "weights": chunks()}, facts

    Cache(root).get(KEY, killed)


def test_a_killed_maker_leaves_nothing_that_is_taken_for_whole(tmp_path):
    """Its lock ends with it, what it had written is cleared away, and the next one makes the expansion."""
    dying = multiprocessing.get_context("fork").Process(target=_die_making, args=(tmp_path,))
    dying.start()
    dying.join()
    assert dying.exitcode == -9 and hidden(tmp_path)
    assert Cache(tmp_path).present(KEY) is None
    made = Cache(tmp_path).get(KEY, make)
    assert content(made) == FILES and not hidden(tmp_path)


def test_a_folder_that_was_just_made_is_no_leftover(tmp_path, monkeypatch):
    """Another process looks for leftovers after a folder was made and before it is locked."""
    lock, looks = durable.system.current.lock, []

    def late(descriptor: int) -> None:
        if not looks:
            looks.append(hidden(tmp_path))
            Cache(tmp_path).shrink()
        lock(descriptor)

    monkeypatch.setattr(durable.system.current, "lock", late)
    assert content(Cache(tmp_path).get(KEY, make)) == FILES
    assert len(looks) == 1 and len(looks[0]) == 1


def test_a_maker_killed_at_any_call(tmp_path):
    for at in count(1):
        root = tmp_path / str(at)
        root.mkdir()
        try:
            with faults.installed(faults.Killer(at)) as disk:
                Cache(root).get(KEY, make)
        except faults.Killed:
            pass
        finished = disk.made < at
        with faults.installed(faults.Quick()):
            assert content(Cache(root).get(KEY, never if finished else make)) == FILES
            assert not hidden(root)
        if finished:
            break
    assert at > 10


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, faults.SHORT])
def test_any_call_that_fails(tmp_path, error):
    """An error is one of ours, and afterwards the expansion is whole or not there."""
    for at in count(1):
        root = tmp_path / str(at)
        root.mkdir()
        with faults.installed(faults.Faulty(at, error)) as disk:
            try:
                assert content(Cache(root).get(KEY, make)) == FILES
            except LrcError:
                assert error != faults.SHORT
        with faults.installed(faults.Quick()):
            assert content(Cache(root).get(KEY, make)) == FILES
        if not disk.reached:
            break


def test_power_loss(tmp_path):
    """Whatever the disk has kept: what is taken for whole is whole."""
    root = tmp_path / "cache"
    root.mkdir()
    with faults.installed(faults.Recorder(root)) as disk:
        Cache(root).get(KEY, make)
    random = Random(0)
    with faults.installed(faults.Quick()):
        for number, calls in enumerate(range(len(disk.calls) + 1)):
            for again in range(3):
                left = tmp_path / f"left-{number}-{again}"
                disk.after_power_loss(calls, random, left)
                present = Cache(left).present(KEY)
                assert present is None or content(present) == FILES
                assert content(Cache(left).get(KEY, make)) == FILES


# --- damage -------------------------------------------------------------------------------------------------------


def shorter(folder: Path) -> None:
    (folder / "weights").write_bytes(b"w" * 999)


def other_bytes(folder: Path) -> None:
    (folder / "weights").write_bytes(b"v" * 1000)


def lost(folder: Path) -> None:
    (folder / "config").unlink()


def more(folder: Path) -> None:
    (folder / "another").write_bytes(b"")


def no_list(folder: Path) -> None:
    (folder / LIST).unlink()


def torn_list(folder: Path) -> None:
    (folder / LIST).write_bytes((folder / LIST).read_bytes()[:30])


@pytest.mark.parametrize("damage", [shorter, other_bytes, lost, more, no_list, torn_list])
def test_a_damaged_expansion_is_made_again(tmp_path, damage):
    folder = Cache(tmp_path).get(KEY, make).folder
    damage(folder)
    assert Cache(tmp_path).present(KEY) is None
    assert content(Cache(tmp_path).get(KEY, make)) == FILES


def test_a_copy_with_other_times_is_still_whole(tmp_path):
    """Times say where to look; contents decide."""
    Cache(tmp_path / "one").get(KEY, make)
    shutil.copytree(tmp_path / "one", tmp_path / "two", copy_function=shutil.copyfile)
    assert Cache(tmp_path / "two").get(KEY, never).was_there


def test_a_hit_reads_no_weights(tmp_path, monkeypatch):
    """Names, sizes and times are enough."""
    Cache(tmp_path).get(KEY, make)
    monkeypatch.setattr("lrconvert.formats.expansions.cache.file_digest", never)
    assert Cache(tmp_path).get(KEY, never).was_there


def test_no_locks(tmp_path):
    """Where the file system has none, expansions are made and found all the same, and nothing is removed."""
    with faults.installed(faults.Remote(errno.ENOLCK)):
        cache = Cache(tmp_path, size=1, lease=0)
        assert content(cache.get(KEY, make)) == FILES
        assert cache.get(KEY, never).was_there
        assert cache.get(OTHER, make).excess > 0
        assert len(cache.entries()) == 2 and cache.use(KEY) is None


def test_a_cache_that_cannot_be_written_to(tmp_path):
    """What is there is found."""
    Cache(tmp_path).get(KEY, make)
    with faults.installed(faults.Faulty(1, errno.EROFS, persistent=True)):
        assert Cache(tmp_path).get(KEY, never).was_there
        with pytest.raises(FileWriteError):
            Cache(tmp_path).get(OTHER, make)


# --- space --------------------------------------------------------------------------------------------------------


def filled(root: Path, lease: float = 0) -> Cache:
    """A cache with two expansions, in this order, that has room for two."""
    cache = Cache(root, size=3000, lease=lease)
    cache.get(KEY, make)
    time.sleep(0.02)  # clocks of file systems tick
    cache.get(OTHER, make)
    time.sleep(0.02)
    return cache


def keys(cache: Cache) -> list[str]:
    return [key for key, _ in cache.entries()]


def test_the_least_recently_used_goes(tmp_path):
    cache = filled(tmp_path)
    cache.get(KEY, never)
    time.sleep(0.02)
    assert cache.get(THIRD, make).excess == 0
    assert keys(cache) == [KEY, THIRD]
    assert not (tmp_path / "locks" / f"{OTHER}.lock").exists()


def test_one_in_use_stays(tmp_path):
    cache = filled(tmp_path)
    used = cache.use(KEY)
    assert used is not None
    cache.get(THIRD, make)
    assert keys(cache) == [KEY, THIRD]
    used.close()
    time.sleep(0.02)
    cache.get(OTHER, make)
    assert keys(cache) == [THIRD, OTHER]


def _use(root: Path, ready: Any, stop: Any) -> None:
    cache = Cache(root)
    used = cache.use(KEY)
    ready.set()
    stop.wait()
    assert used is not None


def test_one_in_use_of_another_process_stays_until_that_ends(tmp_path):
    cache = filled(tmp_path)
    fork = multiprocessing.get_context("fork")
    ready, stop = fork.Event(), fork.Event()
    user = fork.Process(target=_use, args=(tmp_path, ready, stop))
    user.start()
    ready.wait()
    cache.get(THIRD, make)
    assert keys(cache) == [KEY, THIRD]
    stop.set()
    user.join()
    time.sleep(0.02)
    cache.get(OTHER, make)
    assert KEY not in keys(cache)


def test_what_was_asked_for_lately_stays(tmp_path):
    """The bound gives way, and says by how much."""
    cache = filled(tmp_path, lease=600)
    assert cache.get(THIRD, make).excess > 0
    assert len(cache.entries()) == 3


def test_nothing_of_others_is_removed(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_bytes(b"x" * 10_000)
    (tmp_path / ("3" * 64)).symlink_to(tmp_path / "mine")
    cache = filled(tmp_path)
    cache.get(THIRD, make)
    assert (tmp_path / "mine" / "file").exists() and (tmp_path / ("3" * 64)).is_symlink()


# --- sources ------------------------------------------------------------------------------------------------------


def digest(path: Path, records: Path) -> str:
    with LocalFile(path).opened(records) as opened:
        return opened.digest


def test_a_file_is_not_read_again(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"one")
    os.utime(path, (1, 1))
    before = digest(path, tmp_path / "records")
    with monkeypatch.context() as patched:
        patched.setattr(sources, "read_digest", never)
        assert digest(path, tmp_path / "records") == before
    path.write_bytes(b"two")
    os.utime(path, (1, 1))  # the same size and time; the time of its inode is another
    assert digest(path, tmp_path / "records") != before


def test_a_file_that_was_just_written_is_read_again(tmp_path):
    """It may change once more within one tick of the clock."""
    path = tmp_path / "file"
    path.write_bytes(b"one")
    digest(path, tmp_path / "records")
    assert not (tmp_path / "records").exists()


def test_a_file_that_changes_meanwhile(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"one")
    with LocalFile(path).opened(tmp_path / "records") as opened:
        opened.check()
        path.write_bytes(b"other")
        with pytest.raises(FileChangedError):
            opened.check()


# --- ranks --------------------------------------------------------------------------------------------------------


def test_the_rank_that_is_needed():
    """Factors of rank 6 whose product has rank 2, and a third of 1 %."""
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((24, 3)), rng.standard_normal((3, 16))
    left, right = np.linalg.qr(left)[0], np.linalg.qr(right.T)[0].T
    spread = rng.standard_normal((3, 6))
    b = (left * (1, 0.5, 0.003)) @ spread
    a = np.linalg.pinv(spread) @ right
    pair = LoraTarget(
        Target("x.weight", (24, 16)), *(Stored("F32", np.ascontiguousarray(x, np.float32)) for x in (a, b)), 1.0
    )
    need = ranks.needed(svd.spectra([pair]), 6)
    assert need is not None
    assert (need.stored, need.exact, need.close) == (6, 3, 2)
    assert need.error == pytest.approx(0.003 / np.sqrt(1.25), rel=1e-3)


def test_an_update_of_zero_needs_none():
    assert ranks.needed([np.zeros(3)], 3) is None


@pytest.mark.parametrize(("rank", "vllm"), [(1, 1), (2, 8), (16, 16), (17, 32), (512, 512), (513, 0)])
def test_ranks_that_vllm_has(rank, vllm):
    assert ranks.vllm_rank(rank) == vllm


def test_plain_lora_is_needed_whole():
    lora = random_lora(rank=4, decay=1.0)
    need = ranks.needed(svd.spectra(lora.targets), 4)
    assert need is not None and need.exact == need.close == 4
