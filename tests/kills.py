"""Every command that writes, killed at a random moment and repeated: the bytes of a run without a break.

    python tests/kills.py 500               kill 500 commands, each number with its own seed
    python tests/kills.py 40 --first 460    numbers 460 to 499 again, to the same moments in calls
    python tests/kills.py 40 --only refine  of one command

A kill is SIGKILL, before a random call that changes the disk, or after a random time; in a batch, of the process alone
or with its workers. Then `recover` runs, or not, and the same command once more, as its messages advise. Whatever is in
the folder in the end must be what a run without a break leaves, to the byte, and nothing else. The test in
tests/merge/test_kills.py does a few; the figures of a long run are in formats/threats.md.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import click
from conftest import ADAPTERS, BASES
from crashes import whole

from lrconvert import api
from lrconvert.api.batch import manifest
from lrconvert.cli import cli
from lrconvert.core import errors
from lrconvert.testing import faults

Run = Callable[[Path], Any]
ONE_FILE = ("compress", "convert", "allocate", "upgrade")  # commands that write one, in one step
_HANGS = 90  # seconds


@dataclass(frozen=True)
class Command:
    """One that writes: `prepare` makes what it needs in an empty folder, `run` is it, `outputs` what it writes there.
    `weight`: how often it is drawn. `by_time`: calls of other processes are not counted, so it is killed by time."""

    name: str
    run: Run
    outputs: tuple[str, ...] = ("out",)
    prepare: Run = lambda work: None
    weight: int = 1
    by_time: bool = False


def _content(work: Path) -> dict[str, Any]:
    """Everything in a folder but the manifests of batches, whose lines have times, in the order of the work."""
    return {name: value for name, value in whole(work).items() if not name.endswith(f"/{manifest.NAME}")}


def words(*parts: str) -> Run:
    """A command of the command line; OUT, LORA, BASE, FILE and MODEL stand for paths."""

    def run(work: Path) -> None:
        places = {
            **{"OUT": work / "out", "MODEL": work / "model", "FILE": work.parent / "x.lrc"},
            **{"LORA": ADAPTERS / "llama-plain", "OTHER": ADAPTERS / "llama-bf16", "BASE": BASES / "tiny-llama"},
            **{"MERGED": work.parent / "merged", "FLEET": work / "fleet"},
        }
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            cli.main([str(places.get(part, part)) for part in parts], standalone_mode=False)

    return run


def copied(name: str) -> Run:
    return lambda work: shutil.copytree(work.parent / name, work / (name if name == "fleet" else "model"))


def refining() -> Run:
    from lrconvert.live.load_model import load_model

    model, lora = load_model(BASES / "tiny-llama").float(), api.load_lora(ADAPTERS / "llama-plain")
    compact, data = api.convert(lora, "lowrank", bits=2, rank=3).compact, batches(8)
    options = {"steps": 4, "eval_every": 1, "checkpoint_every": 1, "batch_tokens": 96, "lr": 0.1, "layerwise": False}
    return lambda work: api.refine(compact, lora, model, data, work / "out", resume=True, **options)


def measuring() -> Run:
    from lrconvert.live.load_model import load_model

    model, data = load_model(BASES / "tiny-llama").float(), batches(3)
    return lambda work: api.statistics(model, data, work / "out", checkpoint_seconds=0)


def batches(count: int) -> list[dict[str, Any]]:
    import torch

    draw = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 100, (2, 8), generator=draw)} for _ in range(count)]


MANY = ("llama-plain", "llama-bf16", "llama-rslora")


def batch(work: Path) -> None:
    done = api.convert_many([ADAPTERS / name for name in MANY], work / "out", "lowrank", bits=4, rank=2, jobs=2)
    if not done.ok:
        raise RuntimeError([outcome.message for outcome in done.outcomes])


def commands() -> list[Command]:
    """All of them. Batches, compress and refine are drawn most: their work is the longest."""
    many = tuple(f"out/{name}.lrc" for name in MANY)
    in_place = ("model",)
    return [
        Command("batch", batch, many, weight=6, by_time=True),
        Command("compress", words("compress", "LORA", "-o", "OUT", "--target-ratio", "8"), weight=6),
        Command("refine", refining(), weight=6),
        Command("statistics", measuring(), weight=2),
        Command("convert", words("lora-to-lowrank", "LORA", "-o", "OUT", "--target-ratio", "4")),
        Command("allocate", words("lora-to-alora", "LORA", "-o", "OUT", "--total-rank", "12")),
        Command("upgrade", words("upgrade", "FILE", "-o", "OUT")),
        Command("pack build", words("pack", "build", "FILE", "-o", "OUT")),
        Command("pack add", words("pack", "add", "FLEET", "FILE", "--name", "new"), ("fleet",), copied("fleet"), 2),
        Command("export", words("export", "FILE", "--to", "peft-lora", "-o", "OUT"), weight=2),
        Command("merge", words("merge", "BASE", "LORA", "-o", "OUT")),
        Command("merge, resume", words("merge", "BASE", "LORA", "-o", "OUT", "--resume"), weight=2),
        Command("unmerge", words("unmerge", "MERGED", "-o", "OUT")),
        Command("unmerge, one step", words("unmerge", "MODEL"), in_place, copied("merged")),
        Command("merge in place", words("merge", "MODEL", "OTHER", "--in-place"), in_place, copied("merged"), 2),
        Command(
            "merge in place, resume",
            words("merge", "MODEL", "OTHER", "--in-place", "--resume"),
            *(in_place, copied("merged"), 2),
        ),
        Command("unmerge in place", words("unmerge", "MODEL", "--in-place"), in_place, copied("both"), 2),
        Command(
            "unmerge in place, resume",
            words("unmerge", "MODEL", "--in-place", "--resume"),
            *(in_place, copied("both"), 2),
        ),
    ]


class Mortal(faults.Quick):
    """A disk whose process is killed before call number `at`; without it, calls are counted."""

    def __init__(self, at: int = 0) -> None:
        self.at, self.made = at, 0

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Interrupted(Mortal):
    """A disk whose user presses Ctrl-C before call number `at`."""

    def die(self) -> None:
        raise KeyboardInterrupt


def _mortal(name: str) -> Any:
    real = getattr(faults.Quick, name)

    def call(self: Mortal, *arguments: Any) -> Any:
        self.made += 1
        if self.made == self.at:
            self.die()
        return real(self, *arguments)

    return call


for _name in faults.OPERATIONS:
    setattr(Mortal, _name, _mortal(_name))


@dataclass
class Kills:
    """The folder `place` with all that commands need, and what they are to leave, by name."""

    place: Path
    commands: dict[str, Command]
    wanted: dict[str, dict[str, bytes]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        lora = ADAPTERS / "llama-plain"
        api.write(api.convert(api.load_lora(lora), "lowrank", bits=4, rank=2).compact, self.place / "x.lrc")
        api.Fleet.build(self.place / "fleet", self.place / "x.lrc").close()
        api.merge(BASES / "tiny-llama", lora, self.place / "merged")
        api.merge(self.place / "merged", ADAPTERS / "llama-bf16", self.place / "both")
        for name, command in self.commands.items():
            with self.work(command) as work, faults.installed(Mortal()) as disk:
                start = time.monotonic()
                command.run(work)
                self.seconds[name] = time.monotonic() - start
                self.wanted[name], self.calls[name] = _content(work), disk.made

    @contextmanager
    def work(self, command: Command) -> Iterator[Path]:
        work = self.place / "work"
        work.mkdir()
        command.prepare(work)
        try:
            yield work
        finally:
            shutil.rmtree(work)

    def kill(self, number: int) -> str:
        """Kill a command and repeat it; return what is wrong then, or ""."""
        draw = Random(number)
        names = list(self.commands)
        name = draw.choices(names, [self.commands[n].weight for n in names])[0]
        command = self.commands[name]
        at = draw.randint(1, self.calls[name] + 1)
        after = draw.uniform(0, 1.2 * self.seconds[name])
        by_time = command.by_time or draw.random() < 0.2
        with_workers, recovers = draw.random() < 0.5, draw.random() < 0.5
        with self.work(command) as work:
            status = self._run_and_kill(command, work, 0 if by_time else at, after, with_workers)
            self.counts[name] += 1
            self.counts["killed"] += status == -signal.SIGKILL
            self.counts["hung"] += status == -signal.SIGALRM  # killed as well, some time later
            if status not in (0, -signal.SIGKILL, -signal.SIGALRM):
                return f"{name}: ended with {status}"
            if recovers:
                self._recover(command, work)
            problem = self._done_again(command, work)
        how = f"after {after:.3f} s" if by_time else f"before call {at} of {self.calls[name]}"
        return f"{name}, killed {how}, recovers={recovers}: {problem}" if problem else ""

    def interrupt(self, name: str, at: int) -> str:
        """Interrupt a command before a call that changes the disk, and repeat it; return what is wrong then, or "".
        What writes one file leaves nothing, or the whole of it."""
        command = self.commands[name]
        with self.work(command) as work:
            with suppress(KeyboardInterrupt, click.Abort), faults.installed(Interrupted(at)):
                command.run(work)
            left = _content(work)
            if name in ONE_FILE and left not in ({}, self.wanted[name]):
                return f"{name}, interrupted before call {at} of {self.calls[name]}: left {sorted(left)[:5]}"
            problem = self._done_again(command, work)
        return f"{name}, interrupted before call {at} of {self.calls[name]}: {problem}" if problem else ""

    def _done_again(self, command: Command, work: Path) -> str:
        """Repeat a command; return what is wrong with what is there then."""
        wanted = self.wanted[command.name]
        problem = self._repeat(command, work)
        self._recover(command, work)
        found = _content(work)
        if command.name in ("refine", "statistics") and found.get("out"):
            found.pop("out.partial", None)  # `recover` names unfinished work, and never deletes it
        if not problem and found != wanted:
            differing = {k for k in found.keys() | wanted if found.get(k) != wanted.get(k)}
            problem = f"other bytes, or others' names: {sorted(differing)[:5]}"
        return problem

    def _run_and_kill(self, command: Command, work: Path, at: int, after: float, with_workers: bool) -> int:
        child = os.fork()
        if child == 0:
            os.setsid()
            signal.alarm(
                _HANGS
            )  # a fork takes over locks that a thread of a library held, and may wait for one forever
            code = 1
            with suppress(BaseException), faults.installed(Mortal(at)):
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                command.run(work)
                code = 0
            os._exit(code)
        if not at:
            time.sleep(after)
            with suppress(ProcessLookupError):
                (os.killpg if with_workers else os.kill)(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with suppress(ProcessLookupError):  # workers end when nobody asks them any more
            for _ in range(3000):
                os.killpg(child, 0)
                time.sleep(0.02)
        return status

    def _repeat(self, command: Command, work: Path) -> str:
        try:
            command.run(work)
        except errors.UnfinishedError:
            self._recover(command, work)
            return self._repeat(command, work)
        except (errors.OutputExistsError, errors.UndoError, errors.UndoOrderError):
            return ""  # it was done: the bytes say whether that is true
        except errors.LrcError as error:
            return str(error)
        return ""

    def _recover(self, command: Command, work: Path) -> None:
        for output in command.outputs:
            with suppress(errors.FileKindError):  # there is nothing
                api.recover(work / output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--minutes", type=float, default=1e9)
    given = parser.parse_args()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        kills = Kills(Path(folder), {c.name: c for c in commands() if given.only in ("", c.name)})
        stop, number, problems = time.monotonic() + 60 * given.minutes, given.first, 0
        while number < given.first + given.count and time.monotonic() < stop:
            problem = kills.kill(number)
            number += 1
            if problem:
                problems += 1
                print(f"{number - 1}: {problem}", flush=True)
        print(f"next {number}, {problems} problems, {dict(kills.counts)}", flush=True)
    raise SystemExit(problems > 0)


if __name__ == "__main__":
    main()
