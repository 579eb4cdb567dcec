"""A merge that survives anything: every call that fails, power that is lost at any moment, processes that are killed.

After each there is the old state or the new one, byte for byte, once `recover` has run; and nothing is left over.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from conftest import random_lora
from crashes import ALL, KINDS, Scene, nothing_fails, whole
from models import random_base

from lrconvert import api
from lrconvert.api import merge, verify
from lrconvert.core.errors import DurabilityError, LrcError, UnfinishedError
from lrconvert.io.container import JOURNAL
from lrconvert.merge import recover
from lrconvert.testing import faults

pytestmark = pytest.mark.usefixtures("quick_disk")


@dataclass(frozen=True)
class States:
    """Every file of a model before it is changed, and after."""

    old: dict[str, bytes]
    new: dict[str, bytes]

    @classmethod
    def of(cls, before: Path, after: Path) -> States:
        return cls(whole(before), whole(after))


def check_recovered(model: Path, states: States, said: str = "") -> str:
    """Run `recover`; what the model is then, which has to be what is said, and one of the two wholly."""
    found = recover(model).state
    now = whole(model)
    assert now in (states.old, states.new), sorted(now)
    state = "new" if now == states.new else "old"
    assert found in (state, "clean") and said in (state, ""), (found, state, said)
    assert [p.name for p in model.parent.iterdir()] == [model.name]
    return state


# --- every call may fail --------------------------------------------------------------------------------------------


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def fail_every_call(given: Scene, act: str, place: Path, ways: Callable[[int], list[Any]]) -> int:
    """SQLite's loop: let call n = 1, 2, ... fail until nothing is left to fail; returns how many there are."""
    before, after, run = given.acts()[act]
    states = States.of(before, after)
    n, reached, descriptors = 0, True, open_files()
    while reached:
        n += 1
        assert open_files() == descriptors, n
        disk: faults.Faulty | None = None
        for error, persistent, resume in ways(n):
            if nothing_fails(disk, n, error):
                continue
            model = shutil.copytree(before, place / "model")
            caught: LrcError | None = None
            with faults.installed(faults.Faulty(n, error, persistent)) as disk:
                try:
                    run(model, resume=resume)
                except LrcError as raised:
                    caught = raised
            reached = disk.reached
            if not isinstance(caught, UnfinishedError | DurabilityError) and not persistent and not resume:
                assert not (model / JOURNAL).exists(), (n, error)  # it cleans up by itself
            if caught is None:
                check_recovered(model, states, "new")
            elif isinstance(caught, DurabilityError):
                check_recovered(model, states)
            elif isinstance(caught, UnfinishedError):
                if resume:
                    run(model, resume=True)
                    check_recovered(model, states, "new")
                else:
                    check_recovered(model, states)
            else:
                assert caught.code in ("E-IO-WRITE", "E-IO-READ", "E-LOCKED"), caught
                if resume and caught.code != "E-LOCKED":
                    run(model, resume=True)
                    check_recovered(model, states, "new")
                else:
                    check_recovered(model, states, "old")
            shutil.rmtree(model)
    return n


OFTEN = [kind if kind == "mixed" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]


@pytest.mark.medium
@pytest.mark.parametrize("act", ("merge", "unmerge"))
@pytest.mark.parametrize("kind", OFTEN)
def test_every_call_may_fail_in_place(kind: str, act: str, scenes: dict[str, Scene], place: Path) -> None:
    """Each in one way, by turns; `test_every_call_may_fail_in_every_way` has them all."""

    def ways(n: int) -> list[Any]:
        error, persistent = ALL[(n * 7 + len(kind)) % len(ALL)]
        return [(error, persistent, n % 2 == 0)]

    assert fail_every_call(scenes[kind], act, place, ways) > 60


@pytest.mark.slow
@pytest.mark.parametrize("resume", (False, True))
@pytest.mark.parametrize("act", ("merge", "unmerge"))
@pytest.mark.parametrize("kind", KINDS)
def test_every_call_may_fail_in_every_way(
    kind: str, act: str, resume: bool, scenes: dict[str, Scene], place: Path
) -> None:
    fail_every_call(scenes[kind], act, place, lambda n: [(*way, resume) for way in ALL])


def fail_new_folder(given: Scene, place: Path, ways: Callable[[int], list[Any]]) -> None:
    """A merge into a new folder, new or in place of another: whole or not at all, and with `resume` what is finished
    stays and is gone on with."""
    wanted, before = whole(given.merged), whole(given.base)
    given = replace(given, base=shutil.copytree(given.base, place / "base"))  # on the same disk as what is written
    n, reached = 0, True
    while reached:
        n += 1
        disk: faults.Faulty | None = None
        for error, persistent, resume, overwrite in ways(n):
            if nothing_fails(disk, n, error):
                continue
            (place / "work").mkdir()
            out = place / "work" / "out"
            if overwrite:
                shutil.copytree(given.base, out)
            old = before if overwrite else {}

            def run(out: Path = out, resume: bool = resume, overwrite: bool = overwrite) -> None:
                merge(given.base, [given.adapter], out, resume=resume, overwrite=overwrite)

            caught: LrcError | None = None
            with faults.installed(faults.Faulty(n, error, persistent)) as disk:
                try:
                    run()
                except LrcError as raised:
                    caught = raised
            reached = disk.reached
            now = whole(out)
            if caught is None or isinstance(caught, DurabilityError):
                assert now == wanted, (n, error, persistent)
            else:
                assert caught.code in ("E-IO-WRITE", "E-IO-READ", "E-LOCKED"), caught
                assert now == old or (persistent and overwrite and not now)  # set aside: recover brings it back
                if resume:
                    run()
                    now = whole(out)
                    assert now == wanted
            if not persistent and not resume and not isinstance(caught, DurabilityError):
                assert [p.name for p in out.parent.iterdir()] == ["out"] * bool(now)
            if any(out.parent.iterdir()):
                recover(out)
                now = whole(out)
            assert now in (old, wanted)
            assert [p.name for p in out.parent.iterdir()] == ["out"] * bool(now)
            shutil.rmtree(out.parent)


def test_every_call_may_fail_in_a_new_folder(scenes: dict[str, Scene], place: Path) -> None:
    fail_new_folder(scenes["swap"], place, lambda n: [(*ALL[(n * 7) % len(ALL)], n % 2 == 0, False)])


@pytest.mark.slow
@pytest.mark.parametrize("resume", (False, True))
@pytest.mark.parametrize("overwrite", (False, True))
def test_every_call_may_fail_in_a_new_folder_in_every_way(
    overwrite: bool, resume: bool, scenes: dict[str, Scene], place: Path
) -> None:
    fail_new_folder(scenes["mixed"], place, lambda n: [(*way, resume, overwrite) for way in ALL])


# --- power loss -----------------------------------------------------------------------------------------------------


def lose_power(
    before: Path, after: Path, place: Path, run: Callable[[Path], Any], moments: Callable[[int], Any], tries: int
) -> set[str]:
    """Do it once, then make what the disk may hold if power failed at these moments. Returns the states it came to."""
    work = place / "work"
    work.mkdir()
    model = work / "model"
    if before.exists():
        shutil.copytree(before, model)
    with faults.installed(faults.Recorder(work)) as disk:
        run(model)
    states = States.of(before, after)
    assert whole(model) == states.new
    seen = set()
    for moment in moments(len(disk.calls)):
        for attempt in range(tries):
            left = place / "left"
            left.mkdir()
            disk.after_power_loss(moment, Random(1000 * moment + attempt), left)
            if before.exists() or any(left.iterdir()):
                recover(left / "model")
            now = whole(left / "model")
            assert now in (states.old, states.new), (moment, attempt, sorted(now))
            assert [p.name for p in left.iterdir()] == ["model"] * bool(now), (moment, attempt)
            assert now == states.new or moment < len(disk.calls) or attempt < 0, "success was reported too early"
            seen.add("new" if now == states.new else "old")
            shutil.rmtree(left)
    return seen


@pytest.mark.parametrize("act", ("merge", "unmerge"))
@pytest.mark.parametrize("kind", KINDS)
def test_power_loss_in_place(kind: str, act: str, scenes: dict[str, Scene], tmp_path: Path) -> None:
    before, after, run = scenes[kind].acts()[act]
    seen = lose_power(before, after, tmp_path, run, lambda n: [*range(0, n, 3), n], 1)
    assert seen == {"old", "new"}


@pytest.mark.slow
@pytest.mark.parametrize("act", ("merge", "unmerge"))
@pytest.mark.parametrize("kind", KINDS)
def test_power_loss_at_every_moment(kind: str, act: str, scenes: dict[str, Scene], tmp_path: Path) -> None:
    before, after, run = scenes[kind].acts()[act]
    lose_power(before, after, tmp_path, run, lambda n: range(n + 1), 4)


@pytest.mark.parametrize("old", (False, True))
def test_power_loss_in_a_new_folder(old: bool, scenes: dict[str, Scene], tmp_path: Path) -> None:
    given = scenes["swap"]
    before = given.base if old else tmp_path / "none"
    seen = lose_power(
        before,
        given.merged,
        tmp_path,
        lambda model: merge(given.base, [given.adapter], model, overwrite=old),
        lambda n: [*range(0, n, 2), n],
        2,
    )
    assert seen == {"old", "new"}


def test_power_loss_while_recovering(scenes: dict[str, Scene], tmp_path: Path) -> None:
    """Taking back is broken off too, and taken back again."""
    given = scenes["swap"]
    work = tmp_path / "work"
    work.mkdir()
    shutil.copytree(given.base, work / "model")
    with faults.installed(faults.Recorder(work)) as disk:
        given.merge(work / "model")
    renames = [n for n, call in enumerate(disk.calls) if call[0] == "rename"]
    left, again = tmp_path / "left", tmp_path / "again"
    for moment in renames[2:5]:
        left.mkdir()
        disk.after_power_loss(moment + 3, Random(moment), left)
        with faults.installed(faults.Recorder(left)) as second:
            recover(left / "model")
        for other in range(0, len(second.calls), 4):
            again.mkdir()
            second.after_power_loss(other, Random(other), again)
            check_recovered(again / "model", States.of(given.base, given.merged))
            shutil.rmtree(again)
        shutil.rmtree(left)


def test_the_model_of_power_loss_is_not_too_kind(tmp_path: Path) -> None:
    """A program that does not sync loses everything in it: names, bytes, and both orders."""
    work = tmp_path / "work"
    work.mkdir()
    disk = faults.Recorder(work)
    descriptor = disk.open(work / "a", os.O_WRONLY | os.O_CREAT)
    disk.write(descriptor, memoryview(b"1234"))
    disk.close(descriptor)
    disk.rename(work / "a", work / "b")
    folder = disk.open_folder(work)
    seen = set()
    for attempt in range(300):
        left = tmp_path / f"left{attempt}"
        disk.after_power_loss(len(disk.calls), Random(attempt), left)
        seen.add(tuple(sorted(whole(left).items())))
    assert {(), (("a", b""),), (("a", b"1234"),), (("b", b""),), (("b", b"1234"),), (("b", b"12"),)} <= seen
    disk.fsync(folder)
    os.close(folder)
    disk.after_power_loss(len(disk.calls), Random(3), tmp_path / "synced")
    assert list(whole(tmp_path / "synced")) == ["b"]


# --- processes that are killed --------------------------------------------------------------------------------------

PROGRAM = """
import sys
from pathlib import Path
from lrconvert import api
from lrconvert.lora import statistics_file
print("ready", flush=True)
base, adapter, act, out = sys.argv[1:]
if act == "merge":
    api.merge(base, adapter, in_place=True, resume=True)
elif act == "unmerge":
    api.unmerge(base, in_place=True, resume=True)
else:
    api.merge(base, adapter, out, resume=True)
"""


def killed(words: list[Any], after: float) -> bool:
    """Run it and kill it after so many seconds; whether it was still at work."""
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, *map(str, words)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    return process.returncode == -signal.SIGKILL


def kill_at_random(tmp_path: Path, runs: int) -> None:
    lora, number = random_lora(((600, 300),) * 6, scale=0.02), Random(runs)
    base = random_base(tmp_path / "base", lora, "BF16", shards=3)
    adapter = tmp_path / "adapter.lrc"
    api.write(api.convert(lora, "lowrank", bits="8").compact, adapter)
    merged = shutil.copytree(base, tmp_path / "merged")
    start = time.monotonic()
    api.merge(merged, adapter, in_place=True)
    seconds = 3 * (time.monotonic() - start) + 0.05  # a new process is slower
    work = tmp_path / "work"
    for run in range(runs):
        act = ("merge", "unmerge", "new")[run % 3]
        work.mkdir()
        model = shutil.copytree(merged if act == "unmerge" else base, work / "model")
        before, after = (merged, base) if act == "unmerge" else (base, merged)
        words = [model, adapter, act, work / "out"]
        killed(words, number.uniform(0, seconds))
        if run % 2 and act != "new":
            check_recovered(model, States.of(before, after))
        else:
            done = subprocess.run([sys.executable, "-c", PROGRAM, *map(str, words)], capture_output=True, text=True)
            place = work / "out" if act == "new" else model
            if done.returncode:  # it had ended before it was killed
                assert "E-OUT-EXISTS" in done.stderr or "E-UNDO" in done.stderr or "E-FPR" in done.stderr, done.stderr
                recover(place)
            if act == "merge" and whole(place) != whole(after):  # the same: it was merged once more
                api.unmerge(place, in_place=True)
            assert whole(place) == whole(merged if act == "new" else after), (run, act)
            assert verify(place, base, [api.read(adapter)]).ok or act == "unmerge"
            assert not list(work.glob(".*"))
        shutil.rmtree(work)


@pytest.mark.medium
def test_killed_at_random(tmp_path: Path) -> None:
    kill_at_random(tmp_path, 6)


@pytest.mark.slow
def test_killed_at_random_often(tmp_path: Path) -> None:
    kill_at_random(tmp_path, 200)


# --- damage, and folders that cannot be written ---------------------------------------------------------------------


def test_every_flipped_byte_of_a_journal(scenes: dict[str, Scene], tmp_path: Path) -> None:
    """Of a merge that was broken off between two states: refused, or one of the two states all the same."""
    given = scenes["mixed"]
    work = tmp_path / "work"
    work.mkdir()
    shutil.copytree(given.base, work / "model")
    with faults.installed(faults.Recorder(work)) as disk:
        given.merge(work / "model")
    names = [n for n, call in enumerate(disk.calls) if call[0] == "rename" and call[2].endswith(".safetensors")]
    moment = 1 + min(names)
    disk.after_power_loss(moment, Random(0), tmp_path / "left")
    model = tmp_path / "left" / "model"
    files = [p for p in (model / JOURNAL).rglob("*") if p.is_file()]
    assert {"ready.json", "record.json", "undo.bin"} <= {p.name for p in files}
    flipped = 0
    for path in files:
        data = path.read_bytes()
        for at in range(0, len(data), 1 + len(data) // 12):
            copy = shutil.copytree(model, tmp_path / "copy" / "model")
            states = (copy, given.base, given.merged)
            (copy / path.relative_to(model)).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            try:
                recover(copy)
            except LrcError:
                assert (copy / JOURNAL / "ready.json").exists()  # it is still known to be between two states
            else:
                ours, *theirs = ({p.name: p.read_bytes() for p in f.iterdir() if p.is_file()} for f in states)
                assert ours in theirs, (path.name, at)
            shutil.rmtree(tmp_path / "copy")
            flipped += 1
    assert flipped > 80


def test_a_lying_journal_of_finished_files(scenes: dict[str, Scene], tmp_path: Path) -> None:
    """What `resume` finds is hashed again: a changed file, base or line is done again, not trusted."""
    given = scenes["swap"]
    for what in ("model-00001-of-00002.safetensors", "undo.bin", "done.jsonl", "plan.json", "base"):
        base = shutil.copytree(given.base, tmp_path / what / "base")
        out = tmp_path / what / "out"
        with faults.installed(faults.Faulty(10**9, errno.EIO)) as disk:
            merge(base, [given.adapter], tmp_path / what / "whole")
        with faults.installed(faults.Faulty(len(disk.made) - 6, errno.ENOSPC)), pytest.raises(LrcError):
            merge(base, [given.adapter], out, resume=True)
        work = tmp_path / what / ".out.partial"
        assert len((work / "done.jsonl").read_bytes().splitlines()) == 2
        path = base / "model-00001-of-00002.safetensors" if what == "base" else next(work.rglob(what))
        data = bytearray(path.read_bytes())
        data[-4 if what == "base" else len(data) // 2] ^= 1
        path.write_bytes(data)
        merge(base, [given.adapter], out, resume=True)
        if what != "base":
            assert whole(out) == whole(given.merged)
        assert verify(out, base, [given.adapter]).ok and not work.exists()


def test_resume_keeps_what_is_finished(scenes: dict[str, Scene], tmp_path: Path) -> None:
    """The file that was finished is not written again; without `resume` nothing of it is used."""
    given = scenes["swap"]
    with faults.installed(faults.Faulty(10**9, errno.EIO)) as disk:
        merge(given.base, [given.adapter], tmp_path / "whole")
    at = len(disk.made) - 6
    for resume in (True, False):
        out = tmp_path / f"out-{resume}"
        with faults.installed(faults.Faulty(at, errno.ENOSPC)), pytest.raises(LrcError, match="No space left"):
            merge(given.base, [given.adapter], out, resume=True)
        made = tmp_path / f".{out.name}.partial" / "model" / "model-00001-of-00002.safetensors"
        os.utime(made, (1, 1))
        merge(given.base, [given.adapter], out, resume=resume)
        assert ((out / made.name).stat().st_mtime == 1) == resume
        assert whole(out) == whole(given.merged)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folders(scenes: dict[str, Scene], tmp_path: Path) -> None:
    model = shutil.copytree(scenes["swap"].base, tmp_path / "model")
    model.chmod(0o555)
    with pytest.raises(LrcError, match="E-IO-WRITE"):
        scenes["swap"].merge(model)
    model.chmod(0o755)
    assert whole(model) == whole(scenes["swap"].base)


def test_full_disks(scenes: dict[str, Scene], tmp_path: Path) -> None:
    """A limit on the size of files, as a full disk has: the old state, at once."""
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])));"
        "from lrconvert import api; api.merge(sys.argv[1], sys.argv[2], in_place=True)"
    )
    lora = random_lora(((120, 30), (30, 40)))
    base = random_base(tmp_path / "base", lora, "F32", shards=2)
    api.write(api.convert(lora, "lowrank", bits="4").compact, tmp_path / "x.lrc")
    for limit in (300, 3000, 14000):
        words = [sys.executable, "-c", script, base, tmp_path / "x.lrc", limit]
        before = whole(base)
        done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
        assert "E-IO-WRITE" in done.stderr, (limit, done.stderr)
        assert whole(base) == before
