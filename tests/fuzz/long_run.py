"""Fuzzing at length: every surface of surfaces.py, guided by coverage, in processes that end, so it can be resumed.

    python tests/fuzz/long_run.py STATE --minutes 60            all surfaces in turn; again: it goes on
    python tests/fuzz/long_run.py STATE --surfaces gguf record  some of them
    python tests/fuzz/long_run.py STATE --show                  the figures so far
    python tests/fuzz/long_run.py STATE --again FIND            one find once more, with its traceback

STATE is a folder: `figures.json`, what each surface has kept (`corpus/`), and `finds/`. No package is needed beside the
project's own and pytest; from Python 3.12 on, tracing costs nearly nothing (`sys.monitoring`), before that one
execution in eight is traced.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from types import CodeType, FrameType
from typing import Any

import lrconvert

FOLDER = Path(__file__).resolve().parent
PACKAGE = str(Path(lrconvert.__file__).parent)
STINT = 90.0  # seconds of one process
HANG = 5.0  # seconds of processor time of one execution
MEMORY = 4 << 30  # of address space, beyond what is loaded
GROWTH = 512 << 10  # KiB that sixteen executions may add to the most that was ever held
CORPUS = 400  # inputs that a surface keeps


class Hang(BaseException):
    """An execution took longer than `HANG`."""


# --- coverage -------------------------------------------------------------------------------------------------------


class Coverage:
    """Counts what the package has run for the first time: lines, and both ways of a branch."""

    def __init__(self) -> None:
        self.new = 0
        self._seen: dict[Any, int] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        monitoring = getattr(sys, "monitoring", None)
        if monitoring is None:  # `one` does it
            yield
            return
        tool, events = monitoring.PROFILER_ID, monitoring.events
        local = events.LINE | events.BRANCH

        def on_start(code: CodeType, _: int) -> Any:
            if code.co_filename.startswith(PACKAGE):
                monitoring.set_local_events(tool, code, local)
            return monitoring.DISABLE

        def on_line(code: CodeType, line: int) -> Any:
            self.new += 1
            return monitoring.DISABLE

        def on_branch(code: CodeType, at: int, to: int) -> Any:
            ways = self._seen.setdefault((code, at), to)
            if ways == to:
                return None
            self.new += 1
            return monitoring.DISABLE

        monitoring.use_tool_id(tool, "fuzz")
        for event, call in ((events.PY_START, on_start), (events.LINE, on_line), (events.BRANCH, on_branch)):
            monitoring.register_callback(tool, event, call)
        monitoring.set_events(tool, events.PY_START)
        try:
            yield
        finally:
            monitoring.set_events(tool, 0)
            monitoring.free_tool_id(tool)

    @contextmanager
    def one(self, number: int) -> Iterator[None]:
        """Watch an execution where there is no `sys.monitoring`, which is slow: the first ones, and one in eight."""
        if hasattr(sys, "monitoring") or (number % 8 and number > 300):
            yield
            return
        sys.settrace(self._on_call)
        try:
            yield
        finally:
            sys.settrace(None)

    def _on_call(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        code, last = frame.f_code, 0

        def on_line(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal last
            step = (code, last, frame.f_lineno)
            if step not in self._seen:
                self._seen[step] = 1
                self.new += 1
            last = frame.f_lineno
            return on_line

        return on_line


def dictionary() -> list[str]:
    """The texts in the package's source: names of keys, of tensors, of kinds."""
    words: set[str] = set()
    for path in Path(PACKAGE).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
                words.add(node.value)
    return sorted(word for word in words if 1 < len(word) < 50)


# --- one process ----------------------------------------------------------------------------------------------------


def as_text(files: dict[str, bytes]) -> str:
    return json.dumps({name: data.decode("latin-1") for name, data in files.items()})


def as_files(text: str) -> dict[str, bytes]:
    return {name: data.encode("latin-1") for name, data in json.loads(text).items()}


def memory_folder() -> Path:
    shared = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="lrconvert-fuzz-", dir=shared if os.access(shared, os.W_OK) else None))


class Stint:
    """So many executions, or seconds, of one surface from one seed. Answers with figures; finds are kept in `state`."""

    def __init__(self, name: str, seed: str, state: Path | None) -> None:
        from mutate import Mutator
        from surfaces import SURFACES

        self.name, self.state = name, state
        self.surface = SURFACES[name]()
        self.random = Random(f"{name} {seed}")
        self.mutator = Mutator(self.random, dictionary())
        self.coverage = Coverage()
        self.corpus = list(self.surface.seeds)
        self.kept = 0
        kept = state / "corpus" / name if state else None
        self.folder = kept
        if kept:
            kept.mkdir(parents=True, exist_ok=True)
            self.corpus += [as_files(path.read_text()) for path in sorted(kept.iterdir())]
        self.finds: dict[str, str] = {}
        self.root = memory_folder()
        self.count = 0
        self.held = 0
        self.recent: list[dict[str, bytes]] = []

    def run(self, seconds: float, executions: int = 1 << 60) -> dict[str, Any]:
        """Run, and return the figures."""

        def hangs(*_: Any) -> None:
            raise Hang

        before = signal.signal(signal.SIGVTALRM, hangs)
        stop = time.monotonic() + seconds
        try:
            with self.coverage.watching():
                for files in list(self.corpus):
                    self.execute(files)
                at_start, self.coverage.new = self.coverage.new, 0
                while time.monotonic() < stop and self.count < executions:
                    one = self.pick()
                    files = self.surface.mutate(self.mutator, one, self.pick())
                    self.coverage.new = 0
                    self.execute(files)
                    if self.coverage.new:
                        self.keep(files)
        finally:
            signal.signal(signal.SIGVTALRM, before)
            shutil.rmtree(self.root, ignore_errors=True)
        return {"executions": self.count, "kept": self.kept, "covered": at_start, "finds": self.finds}

    def pick(self) -> dict[str, bytes]:
        """An input to change: every other time one of the newest."""
        recent = self.corpus[-20:] if self.random.random() < 0.4 else self.corpus
        return self.random.choice(recent)

    def keep(self, files: dict[str, bytes]) -> None:
        self.corpus.append(files)
        self.kept += 1
        if self.folder:
            text = as_text(files)
            name = hashlib.sha256(text.encode()).hexdigest()[:16]
            if len(list(self.folder.iterdir())) < CORPUS:
                (self.folder / name).write_text(text)

    def execute(self, files: dict[str, bytes]) -> None:
        place = self.root / "x"
        place.mkdir()
        signal.setitimer(signal.ITIMER_VIRTUAL, HANG)
        try:
            with self.coverage.one(self.count):
                self.surface.check(place, files)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            self.found(files, error, traceback.format_exc())
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            shutil.rmtree(place, ignore_errors=True)
        self.count += 1
        self.recent = [*self.recent[-15:], files]
        if self.count % 16 == 0:
            self.watch_memory()

    def watch_memory(self) -> None:
        """Note as finds the last inputs, if memory grew much meanwhile. The system takes its time to tell."""
        held, self.held = self.held, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if held and self.held - held > GROWTH:
            for number, files in enumerate(self.recent):
                error = MemoryError(f"{(self.held - held) >> 10} MiB more in 16 executions, input {number}")
                self.found(files, error, str(error), f"memory, input {number}")

    def found(self, files: dict[str, bytes], error: BaseException, text: str, place: str = "outside") -> None:
        """Note a find, once for each kind and place."""
        for frame, line in traceback.walk_tb(error.__traceback__):
            if frame.f_code.co_filename.startswith((PACKAGE, str(FOLDER))):
                place = f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}:{line}"
        key = f"{self.name}: {type(error).__name__} at {place}"
        if key in self.finds:
            return
        self.finds[key] = f"{error!r:.200}"
        if self.state:
            finds = self.state / "finds"
            finds.mkdir(exist_ok=True)
            stem = hashlib.sha256(key.encode()).hexdigest()[:12]
            (finds / f"{stem}.json").write_text(json.dumps({"surface": self.name, "files": json.loads(as_text(files))}))
            (finds / f"{stem}.txt").write_text(f"{key}\n\n{text}")


def work(name: str, seed: str, state: Path, seconds: float) -> None:
    """Be the process of one stint; the figures go to standard output."""
    stint = Stint(name, seed, state)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    answer = stint.run(seconds)
    print(json.dumps(answer))


# --- the run --------------------------------------------------------------------------------------------------------


def load(state: Path) -> dict[str, Any]:
    path = state / "figures.json"
    figures: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return figures


def add(figures: dict[str, Any], name: str, answer: dict[str, Any]) -> None:
    figure = figures.setdefault(name, {"executions": 0, "stints": 0, "kept": 0, "covered": 0, "finds": {}})
    for key in ("executions", "kept"):
        figure[key] += answer[key]
    figure["stints"] += 1
    figure["covered"] = max(figure["covered"], answer["covered"] + answer["kept"])
    for key, text in answer["finds"].items():
        figure["finds"].setdefault(key, text)


def campaign(state: Path, names: list[str], minutes: float, say: Callable[[str], None] = print) -> None:
    """Give every surface its stints in turn, each in a process of its own and on the source as it is then."""
    state.mkdir(exist_ok=True)
    stop = time.monotonic() + 60 * minutes
    while time.monotonic() < stop:
        for name in names:
            figures = load(state)
            number = figures.get(name, {}).get("stints", 0)
            command = [sys.executable, __file__, str(state), "--stint", name, "--seed", str(number)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            try:
                answer = json.loads(done.stdout.splitlines()[-1])
            except (IndexError, ValueError):
                key = f"{name}: the process ended with {done.returncode}"
                answer = {"executions": 0, "kept": 0, "covered": 0, "finds": {key: done.stderr[-400:]}}
            add(figures, name, answer)
            new = state / "figures.json.new"
            new.write_text(json.dumps(figures, indent=1))
            new.replace(state / "figures.json")
            total = sum(f["executions"] for f in figures.values())
            say(f"{time.strftime('%T')} {name} {number}: {answer['executions']} executions, {answer['kept']} kept, "
                f"{len(answer['finds'])} finds; {total} in all")  # fmt: skip
            for key, text in answer["finds"].items():
                say(f"    {key}: {text}")


def _possible(names: list[str]) -> list[str]:
    """Leave out what needs torch, where it is not."""
    from surfaces import NEED_TORCH

    return [name for name in names if importlib.util.find_spec("torch") or name not in NEED_TORCH]


def show(state: Path) -> None:
    print("| surface | executions | processes | inputs kept |\n|---|---|---|---|")
    figures = load(state)
    for name, figure in sorted(figures.items()):
        print(f"| {name} | {figure['executions']:,} | {figure['stints']} | {figure['kept']:,} |")
    print(f"| all | {sum(f['executions'] for f in figures.values()):,} | | |")
    for figure in figures.values():
        for key, text in figure["finds"].items():
            print(f"{key}: {text}")


def again(find: Path) -> None:
    """Run the input of a find, without coverage."""
    from surfaces import SURFACES

    given = json.loads(find.read_text())
    root = memory_folder()
    try:
        SURFACES[given["surface"]]().check(root, as_files(json.dumps(given["files"])))
    finally:
        shutil.rmtree(root)
    print("no find any more")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("state", type=Path)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--surfaces", nargs="*")
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--again", type=Path)
    parser.add_argument("--stint", help=argparse.SUPPRESS)
    parser.add_argument("--seed", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=STINT, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.stint:
        work(given.stint, given.seed, given.state, given.seconds)
    elif given.show:
        show(given.state)
    elif given.again:
        again(given.again)
    else:
        from surfaces import SURFACES

        campaign(given.state, given.surfaces or _possible(list(SURFACES)), given.minutes)


if __name__ == "__main__":
    main()
