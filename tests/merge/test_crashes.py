"""A merge that survives anything: every call that fails, power that is lost at any moment, processes that are killed.

After each there is the old state or the new one, byte for byte, once `recover` has run; and nothing is left over.
"""

from __future__ import annotations

import errno
import json
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
from crashes import ALL, KINDS, Scene, calls_of, failures, power_losses, whole
from models import random_base

from lrconvert import api
from lrconvert.api import merge, verify
from lrconvert.core.errors import DurabilityError, LrcError, UnfinishedError
from lrconvert.io.checkpoint import JOURNAL
from lrconvert.merge import recover
from lrconvert.merge.signed_json import sign
from lrconvert.testing import faults

pytestmark = pytest.mark.medium


@dataclass(frozen=True)
class States:
    """Every file of a model before it is changed, and after."""

    old: dict[str, bytes]
    new: dict[str, bytes]

    @classmethod
    def of(cls, before: Path, after: Path) -> States:
        return cls(whole(before), whole(after))


def check_recovered(model: Path, states: States, expected: str = "") -> None:
    """Run `recover`: the model is wholly in one of the two states, the one that is reported and expected."""
    reported = recover(model).state
    now = whole(model)
    assert now in (states.old, states.new), sorted(now)
    state = "new" if now == states.new else "old"
    assert reported in (state, "clean") and expected in (state, ""), (reported, state, expected)
    assert [p.name for p in model.parent.iterdir()] == [model.name]


WRITING = ("E-IO-WRITE", "E-IO-READ", "E-LOCKED")


# --- every call may fail --------------------------------------------------------------------------------------------


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def fail_every_call(scene: Scene, act: str, place: Path, ways: Callable[[int], list[Any]]) -> int:
    """Let every call fail; return how many there are."""
    before, after, run = scene.acts()[act]
    states = States.of(before, after)

    def run_on(model: Path, resume: bool) -> None:
        run(model, resume=resume)

    descriptors = open_files()
    for failure in failures(place, ways, lambda model, resume: shutil.copytree(before, model), run_on):
        model, caught, (resume,) = failure.out, failure.caught, failure.options
        assert open_files() == descriptors, failure
        if not isinstance(caught, UnfinishedError | DurabilityError) and not failure.persistent and not resume:
            assert not (model / JOURNAL).exists(), failure  # it cleans up by itself
        if caught is None:
            check_recovered(model, states, "new")
            continue
        unfinished = isinstance(caught, UnfinishedError)
        assert isinstance(caught, UnfinishedError | DurabilityError) or caught.code in WRITING, caught
        if resume and (unfinished or caught.code in ("E-IO-WRITE", "E-IO-READ")):
            run(model, resume=True)
            check_recovered(model, states, "new")
        else:
            check_recovered(model, states, "old" if caught.code in WRITING else "")
    return failure.n


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
@pytest.mark.parametrize(
    "resume", ["by turns", *(pytest.param(word, marks=pytest.mark.long) for word in ("no", "yes"))]
)
@pytest.mark.parametrize("act", ("merge", "unmerge"))
@pytest.mark.parametrize("kind", KINDS)
def test_every_call_may_fail_in_every_way(
    kind: str, act: str, resume: str, scenes: dict[str, Scene], place: Path
) -> None:
    def ways(n: int) -> list[Any]:
        turns = [(n + number) % 2 == 0 if resume == "by turns" else resume == "yes" for number in range(len(ALL))]
        return [(*way, turn) for way, turn in zip(ALL, turns, strict=True)]

    fail_every_call(scenes[kind], act, place, ways)


def fail_new_folder(scene: Scene, place: Path, ways: Callable[[int], list[Any]]) -> None:
    """A merge into a new folder, new or in place of another: whole or not at all, and with `resume` what is finished
    stays and is gone on with."""
    merged, before = whole(scene.merged), whole(scene.base)
    scene = replace(scene, base=shutil.copytree(scene.base, place / "base"))  # on the same disk as what is written

    def prepare(out: Path, resume: bool, overwrite: bool) -> None:
        if overwrite:
            shutil.copytree(scene.base, out)

    def run(out: Path, resume: bool, overwrite: bool) -> None:
        merge(scene.base, [scene.adapter], out, resume=resume, overwrite=overwrite)

    for failure in failures(place, ways, prepare, run):
        out, caught, (resume, overwrite) = failure.out, failure.caught, failure.options
        old, now = before if overwrite else {}, whole(out)
        if caught is None or isinstance(caught, DurabilityError):
            assert now == merged, failure
        else:
            assert caught.code in WRITING, caught
            # What was set aside `recover` brings back.
            assert now == old or (failure.persistent and overwrite and not now)
            if resume:
                run(out, resume, overwrite)
                now = whole(out)
                assert now == merged
        if not failure.persistent and not resume and not isinstance(caught, DurabilityError):
            assert [p.name for p in out.parent.iterdir()] == ["out"] * bool(now)
        if any(out.parent.iterdir()):
            recover(out)
            now = whole(out)
        assert now in (old, merged)
        assert [p.name for p in out.parent.iterdir()] == ["out"] * bool(now)


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
    """Lose power at these moments; return the states that the model came to."""
    states, seen = States.of(before, after), set()
    existed = before.exists()
    for model, reported in power_losses(
        place, lambda model: existed and shutil.copytree(before, model), run, moments, tries
    ):
        if existed or any(model.parent.iterdir()):
            recover(model)
        now = whole(model)
        assert now in (states.old, states.new), sorted(now)
        assert [p.name for p in model.parent.iterdir()] == [model.name] * bool(now)
        assert now == states.new or not reported, "success was reported too early"
        seen.add("new" if now == states.new else "old")
    assert whole(place / "work" / "out") == states.new
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
    scene = scenes["swap"]
    before = scene.base if old else tmp_path / "none"

    def run(model: Path) -> None:
        merge(scene.base, [scene.adapter], model, overwrite=old)

    seen = lose_power(before, scene.merged, tmp_path, run, lambda n: [*range(0, n, 2), n], 2)
    assert seen == {"old", "new"}


def recorded(scene: Scene, work: Path) -> faults.Recorder:
    """A merge in place in a new folder, call by call."""
    work.mkdir()
    shutil.copytree(scene.base, work / "model")
    with faults.installed(faults.Recorder(work)) as disk:
        scene.merge(work / "model")
    return disk


def test_power_loss_while_recovering(scenes: dict[str, Scene], tmp_path: Path) -> None:
    """Taking back is broken off too, and taken back again."""
    scene = scenes["swap"]
    disk = recorded(scene, tmp_path / "work")
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
            check_recovered(again / "model", States.of(scene.base, scene.merged))
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
    api.write(api.convert(lora, "lowrank", bits=8).compact, adapter)
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
            assert done.returncode == 0, done.stderr  # also if it had ended before it was killed
            assert whole(place) == whole(merged if act == "new" else after), (run, act)
            assert verify(place, base, [api.read(adapter)]).ok or act == "unmerge"
            assert not list(work.glob(".*"))
        shutil.rmtree(work)


@pytest.mark.medium
def test_killed_at_random(tmp_path: Path) -> None:
    kill_at_random(tmp_path, 6)


@pytest.mark.slow
@pytest.mark.long
def test_killed_at_random_often(tmp_path: Path) -> None:
    kill_at_random(tmp_path, 200)


# --- damage, and folders that cannot be written ---------------------------------------------------------------------


def test_every_flipped_byte_of_a_journal(scenes: dict[str, Scene], tmp_path: Path) -> None:
    """Of a merge that was broken off between two states: refused, or one of the two states all the same."""
    scene = scenes["mixed"]
    disk = recorded(scene, tmp_path / "work")
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
            states = (copy, scene.base, scene.merged)
            (copy / path.relative_to(model)).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            try:
                recover(copy)
            except LrcError:
                assert (copy / JOURNAL / "ready.json").exists()  # it is still known to be between two states
            else:
                now, *allowed = ({p.name: p.read_bytes() for p in f.iterdir() if p.is_file()} for f in states)
                assert now in allowed, (path.name, at)
            shutil.rmtree(tmp_path / "copy")
            flipped += 1
    assert flipped > 80


def test_a_lying_journal_of_finished_files(scenes: dict[str, Scene], tmp_path: Path) -> None:
    """What `resume` finds is hashed again: a changed file, base or line is done again, not trusted."""
    scene = scenes["swap"]
    for what in ("model-00001-of-00002.safetensors", "undo.bin", "done.jsonl", "plan.json", "base"):
        base = shutil.copytree(scene.base, tmp_path / what / "base")
        out = tmp_path / what / "out"
        made = calls_of(lambda base=base, what=what: merge(base, [scene.adapter], tmp_path / what / "whole"))
        with faults.installed(faults.Faulty(len(made) - 6, errno.ENOSPC)), pytest.raises(LrcError):
            merge(base, [scene.adapter], out, resume=True)
        work = tmp_path / what / ".out.partial"
        assert len((work / "done.jsonl").read_bytes().splitlines()) == 2
        path = base / "model-00001-of-00002.safetensors" if what == "base" else next(work.rglob(what))
        data = bytearray(path.read_bytes())
        data[-4 if what == "base" else len(data) // 2] ^= 1
        path.write_bytes(data)
        merge(base, [scene.adapter], out, resume=True)
        if what != "base":
            assert whole(out) == whole(scene.merged)
        assert verify(out, base, [scene.adapter]).ok and not work.exists()


@pytest.mark.parametrize("field", ("tallies", "tensors", "added"))
def test_a_signed_line_of_the_journal_that_is_not_of_its_file(
    field: str, scenes: dict[str, Scene], tmp_path: Path
) -> None:
    """A line whose digest is right, but which lacks a tensor of its file, or has one more, is done again."""
    scene = scenes["swap"]
    at = len(calls_of(lambda: merge(scene.base, [scene.adapter], tmp_path / "whole"))) - 6
    with faults.installed(faults.Faulty(at, errno.ENOSPC)), pytest.raises(LrcError, match="No space left"):
        merge(scene.base, [scene.adapter], tmp_path / "out", resume=True)
    path = tmp_path / ".out.partial" / "done.jsonl"
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    for line in lines:
        line[field] = line["added"] | {"more": "0" * 64} if field == "added" else type(line[field])()
    path.write_bytes(b"".join(sign(line) + b"\n" for line in lines))
    report = merge(scene.base, [scene.adapter], tmp_path / "out", resume=True)
    assert len(report.tensors) == 2 and whole(tmp_path / "out") == whole(scene.merged)


def test_resume_keeps_what_is_finished(scenes: dict[str, Scene], tmp_path: Path) -> None:
    """The file that was finished is not written again; without `resume` nothing of it is used."""
    scene = scenes["swap"]
    at = len(calls_of(lambda: merge(scene.base, [scene.adapter], tmp_path / "whole"))) - 6
    for resume in (True, False):
        out = tmp_path / f"out-{resume}"
        with faults.installed(faults.Faulty(at, errno.ENOSPC)), pytest.raises(LrcError, match="No space left"):
            merge(scene.base, [scene.adapter], out, resume=True)
        made = tmp_path / f".{out.name}.partial" / "model" / "model-00001-of-00002.safetensors"
        os.utime(made, (1, 1))
        merge(scene.base, [scene.adapter], out, resume=resume)
        assert ((out / made.name).stat().st_mtime == 1) == resume
        assert whole(out) == whole(scene.merged)


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
    api.write(api.convert(lora, "lowrank", bits=4).compact, tmp_path / "x.lrc")
    for limit in (300, 3000, 14000):
        words = [sys.executable, "-c", script, base, tmp_path / "x.lrc", limit]
        before = whole(base)
        # The limit would cut off the compiled modules that an import writes, too, and break every later import.
        env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=env)
        assert "E-IO-WRITE" in done.stderr, (limit, done.stderr)
        assert whole(base) == before
