"""What does the work of a batch: processes of its own that may die, and any executor; the outcomes are the same."""

from __future__ import annotations

import errno
import gc
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from conftest import ADAPTERS
from obedient import obey
from test_batch import FOUND, OPTIONS, states, tree, zoo  # noqa: F401

import lrconvert
from lrconvert.api.batch import metrics, workers
from lrconvert.api.batch.flight import Flight
from lrconvert.api.batch.job import Job, Outcome, Work
from lrconvert.api.batch.workers import Workers
from lrconvert.core import errors
from lrconvert.io import durable
from lrconvert.io.durable import system, work
from lrconvert.io.durable.files import hidden_sibling

pytestmark = pytest.mark.medium

WORK = Work("convert", "lowrank", OPTIONS)


def jobs(path: Path, *kinds: str) -> list[Job]:
    return [Job(kind, str(path), WORK, f"adapter-{n}") for n, kind in enumerate(kinds)]


def flown(executor: Executor, listed: list[Job], limit: int) -> list[Outcome]:
    """The outcomes of jobs, in the order of their numbers."""
    outcomes: dict[int, Outcome] = {}
    with Flight(executor, obey, lambda: limit) as flight:
        for number, job in enumerate(listed):
            while flight.is_full:
                outcomes.update([landed] if (landed := flight.next(60)) else [])
            flight.add(number, job)
        while flight:
            outcomes.update([landed] if (landed := flight.next(60)) else [])
    return [outcomes[number] for number in range(len(listed))]


@pytest.mark.parametrize("count", [1, 2])
def test_a_process_that_dies_takes_no_adapter_with_it(count: int, tmp_path: Path) -> None:
    """Its job is done once more, with no other beside it. If it dies again, this one has failed; all others are done,
    each once."""
    listed = jobs(tmp_path / "log", "work", "die", "work", "die once", "exit", "work", "work")
    outcomes = flown(Workers(count), listed, count)
    assert [o.code or o.state for o in outcomes] == ["done", "E-WORKER", "done", "done", "E-WORKER", "done", "done"]
    assert "memory" in outcomes[1].message and "adapter-1" in outcomes[1].message
    assert "status 3, twice" in outcomes[4].message
    lines = (tmp_path / "log").read_text().splitlines()
    begun = [sum(line.startswith(f"adapter-{n} begins") for line in lines) for n in range(7)]
    assert begun == [1, 2, 1, 2, 2, 1, 1]
    again = max(n for n, line in enumerate(lines) if line.startswith("adapter-3 begins"))
    assert lines[again + 1].startswith("adapter-3 ends")


@pytest.mark.parametrize("count", [1, 2])
def test_jobs_are_asked_for_when_a_process_is_free(count: int, tmp_path: Path) -> None:
    """Of many jobs no more than the processes work on are made ahead of the outcomes."""
    ahead, done = [], 0

    def lazily() -> Iterator[Job]:
        for asked, job in enumerate(jobs(tmp_path / "log", *["work"] * 12), 1):
            ahead.append(asked - done)
            yield job

    with Flight(Workers(count), obey, lambda: count) as flight:
        for number, job in enumerate(lazily()):
            flight.add(number, job)
            while flight.is_full:
                done += flight.next(60) is not None
        while flight:
            done += flight.next(60) is not None
    assert done == 12 and max(ahead) <= count


def test_outcomes_that_are_taken_are_not_kept(zoo: Path, tmp_path: Path) -> None:  # noqa: F811
    """With `on_outcome` a batch holds counts alone: the reports of adapters that are done are gone."""
    alive: list[weakref.ref[Outcome]] = []
    seen: dict[str, str] = {}

    def take(outcome: Outcome) -> None:
        gc.collect()
        assert sum(ref() is not None for ref in alive) == 0
        alive.append(weakref.ref(outcome))
        seen[str(Path(outcome.source).relative_to(zoo))] = outcome.code or outcome.state

    done = lrconvert.convert_many(zoo, tmp_path / "out", "lowrank", jobs=1, on_outcome=take, **OPTIONS)
    assert seen == FOUND and done.outcomes == () and not done.ok
    assert [done.count(state) for state in ("done", "skipped", "failed")] == [3, 0, 2]


# --- an end before the end ------------------------------------------------------------------------------------------


def _wait_for(path: Path, text: str) -> list[int]:
    """The processes that a log has with a text, as soon as there is one."""
    while True:
        lines = path.read_text().splitlines() if path.exists() else []
        if begun := [int(line.split()[-1]) for line in lines if text in line]:
            return begun
        time.sleep(0.01)


def _is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return "Z (zombie)" in Path(f"/proc/{pid}/status").read_text()


def test_an_interrupt_ends_the_processes(tmp_path: Path) -> None:
    listed = jobs(tmp_path / "log", "wait", "work", "work")
    with pytest.raises(KeyboardInterrupt), Flight(Workers(2), obey, lambda: 2) as flight:
        for number, job in enumerate(listed[:2]):
            flight.add(number, job)
        (pid,) = _wait_for(tmp_path / "log", "adapter-0 begins")
        raise KeyboardInterrupt
    assert _is_gone(pid)


def test_an_interrupt_cancels_what_has_not_begun(tmp_path: Path) -> None:
    """In an executor of the caller's, too, which goes on to be of use."""
    listed = jobs(tmp_path / "log", *["work"] * 50)
    gate = threading.Event()
    with ThreadPoolExecutor(1) as executor:
        executor.submit(gate.wait)
        with pytest.raises(KeyboardInterrupt), Flight(executor, obey, lambda: 100) as flight:
            for number, job in enumerate(listed):
                flight.add(number, job)
            raise KeyboardInterrupt
        gate.set()
        assert executor.submit(lambda: 1).result() == 1
    assert not (tmp_path / "log").exists()


def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    """A batch that is killed leaves none behind."""
    (tmp_path / "script.py").write_text(
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "from pathlib import Path\nfrom test_batch_workers import *\n"
        "flown(Workers(1), jobs(Path('log'), 'wait'), 1)\n"
    )
    with subprocess.Popen([sys.executable, tmp_path / "script.py"], cwd=tmp_path) as script:
        (pid,) = _wait_for(tmp_path / "log", "begins")
        script.kill()
    for _ in range(500):
        if _is_gone(pid):
            return
        time.sleep(0.02)
    raise AssertionError("the process is still there")


def end_while_it_writes(job: Job) -> Outcome:
    def sync(file: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    durable.File.sync = sync  # type: ignore[method-assign]
    return lrconvert.convert_one(job)


def test_a_request_to_end_leaves_nothing_half_written(tmp_path: Path) -> None:
    """The real work, in a process that is ended while it writes."""
    executor = Workers(1)
    job = Job(str(ADAPTERS / "llama-plain"), str(tmp_path / "x.lrc"), WORK)
    lost = executor.submit(end_while_it_writes, job).exception()
    executor.shutdown()
    assert isinstance(lost, workers.WorkerLost) and f"status {128 + signal.SIGTERM}" in str(lost)
    assert list(tmp_path.iterdir()) == []


# --- executors ------------------------------------------------------------------------------------------------------


def test_any_executor_writes_the_same(zoo: Path, tmp_path: Path) -> None:  # noqa: F811
    """Threads, processes, and one that is slow to say what it has done; the states, too."""
    own = lrconvert.convert_many(zoo, tmp_path / "own", "lowrank", jobs=2, **OPTIONS)
    assert states(own, zoo) == FOUND
    for name, executor in {
        "threads": ThreadPoolExecutor(3),
        "processes": ProcessPoolExecutor(2, get_context("spawn")),
    }.items():
        with executor:
            other = lrconvert.convert_many(zoo, tmp_path / name, "lowrank", executor=executor, **OPTIONS)
        assert states(other, zoo) == FOUND and tree(tmp_path / name) == tree(tmp_path / "own")


def test_an_executor_that_breaks_ends_the_batch(tmp_path: Path) -> None:
    """What came before is kept; the error says what to do."""
    listed, outcomes = jobs(tmp_path / "log", "work", "die", "work"), []
    with (
        ProcessPoolExecutor(1, get_context("spawn")) as executor,
        pytest.raises(errors.WorkerError, match=r"adapter-\d: the executor works no more.*same command again"),
        Flight(executor, obey, lambda: 1) as flight,
    ):
        for number, job in enumerate(listed):
            flight.add(number, job)
            while flight.is_full:
                outcomes.append(flight.next(60))
    assert [landed and landed[0] for landed in outcomes] == [0]


def test_two_ways_to_do_the_work_are_refused(tmp_path: Path) -> None:
    source = [ADAPTERS / "llama-plain"]
    with ThreadPoolExecutor(1) as executor:
        for options in (
            {"jobs": 1, "executor": executor},
            {"jobs": 1, "scheduler": "tcp://127.0.0.1:1"},
            {"jobs": 1, "in_flight": 2},
            {"executor": "dask"},
        ):
            with pytest.raises(errors.OptionError):
                lrconvert.convert_many(source, tmp_path / "out", "lowrank", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_scheduler_needs_dask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dask.distributed", None)
    with pytest.raises(errors.DependencyError, match=r"lrconvert\[scale\]"):
        lrconvert.convert_many([ADAPTERS / "llama-plain"], tmp_path / "out", "lowrank", scheduler="tcp://127.0.0.1:1")
    assert list(tmp_path.iterdir()) == []


def test_more_processes_than_there_may_be_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda which: (64, 1024))
    with pytest.raises(errors.OptionError, match=r"Choose jobs=92"):
        Workers(500)


# --- one job --------------------------------------------------------------------------------------------------------


def test_one_job_may_be_done_at_once_and_again(tmp_path: Path) -> None:
    """Of eight that do it at the same time one writes, and the others pass by; nothing is left beside the file."""
    (job,) = lrconvert.batch_jobs([ADAPTERS / "llama-plain"], tmp_path / "out", "lowrank", **OPTIONS)
    job = pickle.loads(pickle.dumps(job))
    barrier = threading.Barrier(8)

    def convert(number: int) -> Outcome:
        barrier.wait()
        return pickle.loads(pickle.dumps(lrconvert.convert_one(job)))

    with ThreadPoolExecutor(8) as executor:
        outcomes = list(executor.map(convert, range(8)))
    assert {o.state for o in outcomes} <= {"done", "skipped"} and any(o.state == "done" for o in outcomes)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["llama-plain.lrc"]
    assert len({(o.source_digest, o.output_digest, o.total_bytes) for o in outcomes}) == 1
    again = lrconvert.convert_one(job)
    assert again.state == "skipped" and again.output_digest == outcomes[0].output_digest
    assert lrconvert.convert_many([ADAPTERS / "llama-plain"], tmp_path / "out", "lowrank", jobs=1, **OPTIONS).ok


def test_a_job_whose_source_is_another_is_refused(tmp_path: Path) -> None:
    job = Job(str(ADAPTERS / "llama-plain"), str(tmp_path / "x.lrc"), WORK, source_digest="0" * 64)
    outcome = lrconvert.convert_one(job)
    assert (outcome.state, outcome.code) == ("failed", "E-DIGEST") and list(tmp_path.iterdir()) == []


# --- metrics --------------------------------------------------------------------------------------------------------


def test_metrics_are_lines_of_figures(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """One for each adapter, one for each interval, and one for the whole; a second run appends."""
    monkeypatch.setattr(metrics, "INTERVAL", 0.0)
    for _ in range(2):
        done = lrconvert.convert_many(zoo, tmp_path / "out", "lowrank", jobs=1, metrics=tmp_path / "m.jsonl", **OPTIONS)
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    first = lines[: next(n for n, line in enumerate(lines) if line["event"] == "end") + 1]
    adapters = [line for line in first if line["event"] == "adapter"]
    assert len(adapters) == 5 and {line["source"] for line in adapters} == {o.source for o in done.outcomes}
    assert sum(line["event"] == "interval" for line in first) >= 5
    whole = first[-1]
    assert (whole["done"], whole["failed"], whole["left"], whole["queue"]) == (3, 2, 0, 0)
    assert whole["bytes"] == sum(line["bytes"] or 0 for line in adapters) > 0
    assert whole["seconds"] == pytest.approx(sum(line["seconds"] for line in adapters), abs=0.01)
    assert lines[-1]["event"] == "end" and lines[-1]["skipped"] == 3


# --- what killed processes leave ------------------------------------------------------------------------------------


def test_what_killed_processes_have_begun_is_removed(tmp_path: Path) -> None:
    """A batch removes what was begun for its outputs and is no longer being written, also in folders below, for names
    as long as names may be, and for outputs that it passes by. All else stays: what another process writes, other
    outputs' files, links, folders, and names that we do not give."""
    long = "x" * 251
    for name in ("a", "b", "team/a", "team/" + long):
        shutil.copytree(ADAPTERS / "llama-plain", tmp_path / "in" / name)
    out = tmp_path / "out"
    lrconvert.convert_many(tmp_path / "in", out, "lowrank", jobs=1, **OPTIONS)
    (out / "b.lrc").unlink()
    whole = tree(out)

    def begin(output: Path, kind: str = "tmp") -> Path:
        path = hidden_sibling(output, kind)
        path.write_bytes(b"half")
        return path

    gone = [begin(out / name) for name in ("a.lrc", "a.lrc", "b.lrc", "team/a.lrc", f"team/{long}.lrc")]
    kept = [begin(out / "other.lrc"), out / ".a.lrc.1.tmp", out / ".a.lrc.12.0123abcd.tmp.txt", begin(out / "a.lrc")]
    for path in kept[1:3]:
        path.write_bytes(b"another's")
    folder, link = hidden_sibling(out / "a.lrc", "tmp"), hidden_sibling(out / "a.lrc", "tmp")
    folder.mkdir()
    link.symlink_to(kept[0])
    with kept[3].open("rb") as at_work:
        system.current.lock(at_work.fileno())
        batch = lrconvert.convert_many(tmp_path / "in", out, "lowrank", jobs=1, **OPTIONS)
    assert batch.counts == {"done": 1, "skipped": 3} and not batch.notes
    assert not any(path.exists() for path in gone)
    assert folder.is_dir() and link.is_symlink() and all(path.exists() for path in kept)
    for path in (*kept, link):
        path.unlink()
    folder.rmdir()
    lrconvert.convert_many(tmp_path / "in", out, "lowrank", jobs=1, **OPTIONS)
    assert {name: content for name, content in tree(out).items() if name != "b.lrc"} == whole


def test_without_locks_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no lock tells whether a process still writes, a note says that something may be left, and where."""
    shutil.copytree(ADAPTERS / "llama-plain", tmp_path / "in" / "a")
    lrconvert.convert_many(tmp_path / "in", tmp_path / "out", "lowrank", jobs=1, **OPTIONS)
    left = hidden_sibling(tmp_path / "out" / "a.lrc", "tmp")
    left.touch()
    lock = system.current.lock

    def refuse(descriptor: int) -> None:
        if os.fstat(descriptor).st_ino == left.stat().st_ino:
            raise OSError(errno.ENOLCK, "No locks available")
        lock(descriptor)

    monkeypatch.setattr(system.current, "lock", refuse)
    batch = lrconvert.convert_many(tmp_path / "in", tmp_path / "out", "lowrank", jobs=1, **OPTIONS)
    assert batch.ok and left.exists()
    assert any("E-LOCKED" in note and left.name in note for note in batch.notes), batch.notes


def test_nothing_is_looked_for_where_nothing_was_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch asks for its jobs' outputs a second time only if something is there, and looks into each folder once."""
    for name in ("a", "b", "c"):
        shutil.copytree(ADAPTERS / "llama-plain", tmp_path / "in" / name)
    looked: list[Path] = []
    hidden_files = work._hidden_files
    monkeypatch.setattr(work, "_hidden_files", lambda folder: looked.append(folder) or hidden_files(folder))
    monkeypatch.setattr(work, "hidden_stem", lambda path: pytest.fail("nothing was left"))
    assert lrconvert.convert_many(tmp_path / "in", tmp_path / "out", "lowrank", jobs=1, **OPTIONS).ok
    assert looked == [tmp_path / "out"]
