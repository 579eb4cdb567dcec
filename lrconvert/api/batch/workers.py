"""The processes that a batch starts for itself: pools of the standard library with one process each.

A pool breaks when a process of it dies, and takes every job with it that it was given. So each process has a pool of
its own, and one job at a time: a death takes that job alone, and the next job there gets a new pool.

Processes are spawned, so that locks of torch and its threads are not copied, without running the caller's script again;
each computes with one thread, so that an output does not depend on how many there are. This module is the first that a
process imports, and loads nothing that reads the settings of those threads.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import connection
from multiprocessing.context import SpawnContext, SpawnProcess
from types import ModuleType
from typing import Any

from lrconvert.core.errors import OptionError
from lrconvert.core.wording import spelled

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_GRACE = 10.0  # seconds to put things in order in
_FILES, _SPARE_FILES = 10, 100  # open in the parent for each process, and for all else
# Processor seconds after which loading the compiled loops of the entropy coder costs little beside what was done: they
# save a tenth of a second for a million numbers, which no adapter of that size pays for alone. The bytes are the same.
_LOOPS_PAY_AFTER = 4.0


class WorkerLost(BrokenProcessPool):
    """A process ended in the middle of a job; the text says how."""


class Workers(Executor):
    """An executor of `count` processes, each started when it is first needed. It survives the death of any of them: the
    future of the job in it raises `WorkerLost`. At most `count` jobs may be given to it at once.

    Raises E-OPTION where the system allows too few open files for so many.
    """

    def __init__(self, count: int) -> None:
        _allow_files(_FILES * count + _SPARE_FILES)
        self.count = count
        self._lanes = [_Lane() for _ in range(count)]
        self._free = deque(self._lanes)

    def submit(self, call: Callable[..., Any], /, *given: Any, **named: Any) -> Future[Any]:
        """Give a job to a free process. Raises RuntimeError if none is free."""
        if not self._free:
            raise RuntimeError("every process has a job")
        lane, promised = self._free.popleft(), Future[Any]()
        promised.set_running_or_notify_cancel()

        def land(future: Future[Any]) -> None:
            error = future.exception()
            if isinstance(error, BrokenProcessPool):
                error = WorkerLost(lane.reset())
            self._free.append(lane)
            if error is None:
                promised.set_result(future.result())
            else:
                promised.set_exception(error)

        lane.submit(call, *given, **named).add_done_callback(land)
        return promised

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End all processes: what is begun is finished, or with `cancel_futures` put away in order, at once."""
        if cancel_futures:
            for lane in self._lanes:
                lane.end()
        for lane in self._lanes:
            lane.shutdown()
        for lane in self._lanes if wait else ():
            lane.join()


class _Lane:
    """A pool of one process, made when it is needed."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._context = _Context()

    def submit(self, call: Callable[..., Any], *given: Any, **named: Any) -> Future[Any]:
        """Start the process, if there is none, and give it a job."""
        if self._pool is not None:
            with suppress(BrokenProcessPool):  # it died while it had nothing to do
                return self._pool.submit(_worked, call, *given, **named)
        self._pool = ProcessPoolExecutor(1, self._context, _begin)
        return self._pool.submit(_worked, call, *given, **named)

    def reset(self) -> str:
        """Forget a broken pool; return what its process came to."""
        self._pool, process = None, self._context.process
        if process is None:
            return "ended"
        process.join(_GRACE)  # its pipe is closed somewhat before its status can be had
        return _how(process.exitcode)

    def end(self) -> None:
        """Ask the process to end, and make it if it does not."""
        process = self._context.process
        if self._pool is None or process is None:
            return
        process.terminate()
        process.join(_GRACE)
        if process.is_alive():
            process.kill()

    def shutdown(self) -> None:
        """Let the process end when it has nothing more to do."""
        if self._pool is not None:
            self._pool.shutdown(wait=False)

    def join(self) -> None:
        """Wait until the process has ended."""
        if self._context.process is not None:
            self._context.process.join()


class _Context(SpawnContext):
    """Spawns processes without the caller's script, and keeps the last of them."""

    process: SpawnProcess | None = None

    def Process(self, *given: Any, **named: Any) -> SpawnProcess:  # type: ignore[override]
        """Make a process, as multiprocessing's contexts do."""
        self.process = _Process(*given, **named)
        return self.process


class _Process(SpawnProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        with _without_script():
            return SpawnProcess._Popen(process_obj)


@contextmanager
def _without_script() -> Iterator[None]:
    """Hide the module that the caller runs: a spawned process runs it again, and scripts without a guard would start
    processes for ever."""
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


def _allow_files(needed: int) -> None:
    """Let this process open so many files, as far as it may. Raises E-OPTION if it may not."""
    try:
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if needed <= soft or soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        what = f"so many processes need {needed:,} open files, and the system allows {hard:,} (ulimit -Hn)"
        raise OptionError(what, fix=f"choose {spelled('jobs', max(1, (hard - _SPARE_FILES) // _FILES))}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _how(code: int | None) -> str:
    if code == -signal.SIGKILL:
        return "was killed, as the system does when memory runs out"
    return f"ended by signal {-code}" if code is not None and code < 0 else f"ended with status {code}"


# --- in the process -------------------------------------------------------------------------------------------------


def _begin() -> None:
    """Prepare a new process, before anything that computes is loaded."""
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the one that started us
    os.dup2(2, 1)  # what libraries print is no answer
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ask this process to end as soon as the one that started it is gone: nobody waits for its answers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)


def _worked(call: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """Return what a call returns. A request to end is an exception meanwhile, so that nothing half-written is left."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        answer = call(*given, **named)
    except SystemExit as request:
        os._exit(request.code if isinstance(request.code, int) else 1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if time.process_time() > _LOOPS_PAY_AFTER:
        from lrconvert.kernels import jit

        jit.load("rans", math.inf, exact=True)
    return answer
