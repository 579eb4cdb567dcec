"""Threads that hash, compress and write what another has computed, each in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

_DEPTH = 2  # jobs that wait while one runs: they hold blocks in memory


class BackgroundWriter:
    """Runs jobs one after the other behind the caller. When the context ends all are done, or an error is raised."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._pending: deque[Future[Any]] = deque()

    def submit(self, job: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Raises what an earlier job raised."""
        while len(self._pending) > _DEPTH:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(job, *arguments))
        return self._pending[-1]

    def flush(self) -> None:
        while self._pending:
            self._pending.popleft().result()

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=error is not None)
        if error is None:
            self.flush()
