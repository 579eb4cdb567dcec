"""Processes that work on jobs: each takes the next one when it is done with the last. One that dies takes its job with
it, not the others', and is replaced.

Every process computes with one thread, so that an output does not depend on how many there are.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextvars import copy_context
from typing import Any

from lrconvert.core.errors import WorkerError
from lrconvert.core.wording import spelled

Answer = dict[str, Any]
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from lrconvert.api.batch import worker; worker.main()"
)
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_GRACE = 10.0  # seconds to put things in order in


class _Process:
    """A worker process, started when it is first asked."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._ending = False
        self._lock = threading.Lock()

    def ask(self, job: Mapping[str, Any]) -> Answer:
        with self._lock:
            if self._ending:
                return _ended(job, "was stopped")
            if self._process is None:
                environment = {**os.environ, **dict.fromkeys(_THREADS, "1"), "PYTHONIOENCODING": "utf-8"}
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _START, json.dumps(sys.path)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    encoding="utf-8",
                    env=environment,
                )
            process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        if line.endswith("\n"):
            answer: Answer = json.loads(line)
            return answer
        with self._lock:
            self._process = None
        return _ended(job, _how(process.wait()))

    def end(self) -> None:
        """Let the process end: at once, but in order."""
        with self._lock:
            self._ending = True
            process = self._process
        if process is not None:
            process.terminate()
            try:
                process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _how(code: int) -> str:
    if code == -signal.SIGKILL:
        return "was killed, as the system does when memory runs out"
    return f"ended by signal {-code}" if code < 0 else f"ended with status {code}"


def _ended(job: Mapping[str, Any], how: str) -> Answer:
    error = WorkerError(f"the process that worked on it {how}", fix=f"try fewer {spelled('jobs')}", path=job["path"])
    return {"state": "failed", "code": error.code, "message": str(error)}


def run(jobs: Iterable[Mapping[str, Any]], count: int, advance: Callable[[int, Answer], None]) -> None:
    """Work on jobs in `count` processes; `advance` (number of the job, answer) is called when each answer comes in, one
    at a time. A job is asked for when a process is free, and nothing of it is kept.

    If this is interrupted, the processes put away what they have begun and end.
    """
    numbered: Iterator[tuple[int, Mapping[str, Any]]] = iter(enumerate(jobs))
    lock = threading.Lock()

    def serve(process: _Process) -> None:
        while True:
            with lock:
                number, job = next(numbered, (-1, {}))
            if number < 0:
                return
            answer = process.ask(job)
            with lock:
                advance(number, answer)

    processes = [_Process() for _ in range(max(1, count))]
    with ThreadPoolExecutor(len(processes)) as threads:
        try:
            served = [threads.submit(copy_context().run, serve, process) for process in processes]
            for done in wait(served, return_when=FIRST_EXCEPTION).done:
                done.result()
        finally:
            with lock:
                numbered = iter(())  # nothing more is begun
            for process in processes:
                process.end()
