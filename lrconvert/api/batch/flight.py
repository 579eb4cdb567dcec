"""Jobs on their way through an executor: some at a time, and each outcome as it comes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import NamedTuple

from lrconvert.api.batch.job import Job, Outcome
from lrconvert.api.batch.workers import WorkerLost, Workers
from lrconvert.core.errors import WorkerError
from lrconvert.core.wording import spelled


class _Flying(NamedTuple):
    number: int
    job: Job
    is_second: bool


class Flight:
    """Jobs that an executor works on with `call`, at most as many as `limit` says at the time. What has not begun when
    its context ends is cancelled.

    A job whose process dies is given again, once, when no other is on its way: what took all memory together may well
    fit alone. If its process dies again, the job has failed.
    """

    def __init__(self, executor: Executor, call: Callable[[Job], Outcome], limit: Callable[[], int]) -> None:
        self._executor, self._call, self._limit = executor, call, limit
        self._done: SimpleQueue[Future[Outcome]] = SimpleQueue()
        self._flying: dict[Future[Outcome], _Flying] = {}
        self._aside: deque[_Flying] = deque()
        self._is_alone = False

    def __len__(self) -> int:
        return len(self._flying) + len(self._aside)

    @property
    def is_full(self) -> bool:
        """True if nothing may be added before an outcome has come."""
        return len(self._flying) >= max(1, self._limit()) or bool(self._aside) or self._is_alone

    def add(self, number: int, job: Job) -> None:
        """Give a job to the executor. Raises E-WORKER if that takes no more."""
        self._submit(_Flying(number, job, False))

    def _submit(self, one: _Flying) -> None:
        try:
            future = self._executor.submit(self._call, one.job)
        except (BrokenExecutor, RuntimeError) as error:
            raise self._broken(error, one) from None
        self._flying[future] = one
        future.add_done_callback(self._done.put)

    def next(self, seconds: float) -> tuple[int, Outcome] | None:
        """Return the number and the outcome of a job, None if none came within so many seconds, or one is to be done
        again. Raises E-WORKER if the executor is broken for good."""
        if self._aside and not self._flying:
            self._is_alone = True
            self._submit(self._aside.popleft())
        try:
            future = self._done.get(timeout=seconds)
        except Empty:
            return None
        one = self._flying.pop(future)
        self._is_alone = self._is_alone and bool(self._flying)
        return self._landed(one, future)

    def _landed(self, one: _Flying, future: Future[Outcome]) -> tuple[int, Outcome] | None:
        try:
            return one.number, future.result()
        except WorkerLost as error:
            if not one.is_second:
                self._aside.append(one._replace(is_second=True))
                return None
            what = f"the process that worked on it {error}, twice, the second time with no other beside it"
            lost = WorkerError(what, fix=f"try it alone, with {spelled('jobs', 1)}, where there is more memory")
        except (BrokenExecutor, CancelledError) as error:
            raise self._broken(error, one) from None
        except Exception as error:
            message = (str(error).strip().splitlines() or [""])[0]
            lost = WorkerError(f"the executor lost it: {type(error).__name__}: {message:.300}", fix="look at its logs")
        return one.number, _failed(one.job, lost)

    def _broken(self, error: BaseException, one: _Flying) -> WorkerError:
        """The error where an executor that is not ours works no more. What has come before is kept, and passed by."""
        count = len(self._flying) + 1
        what = f"the executor works no more ({type(error).__name__}); {count:,} adapters were in work, this among them"
        fix = "give the same command again, which goes on from here; a batch with processes of its own survives this"
        return WorkerError(what, fix=fix, path=one.job.shown or one.job.source)

    def __enter__(self) -> Flight:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for future in list(self._flying):
            future.cancel()
        if isinstance(self._executor, Workers):
            self._executor.shutdown(cancel_futures=bool(self._flying))


def _failed(job: Job, error: WorkerError) -> Outcome:
    shown = job.shown or job.source
    return Outcome(shown, job.output, "failed", code=error.code, message=str(error.at(shown)), method=job.work.method)
