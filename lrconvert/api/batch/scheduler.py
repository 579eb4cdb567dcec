"""A Dask cluster as an executor: ``pip install lrconvert[scale]``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor, Future, InvalidStateError
from contextlib import contextmanager, suppress
from typing import Any

from lrconvert.core.errors import DependencyError, WorkerError
from lrconvert.core.version import __version__
from lrconvert.core.wording import spelled

_CONNECT = 30  # seconds
_COUNTED = 5.0  # seconds for which a count of threads holds
_LEAST = 16  # jobs on their way, while a cluster has no workers yet


@contextmanager
def connected(address: str) -> Iterator[tuple[Executor, Callable[[], int]]]:
    """Give an executor on the Dask cluster at `address`, and how many jobs may be on their way: two for each thread
    that the cluster has at the time. Raises E-DEPENDENCY without dask, E-WORKER if the scheduler does not answer, or a
    worker has another lrconvert, which might write other bytes."""
    try:
        from dask.distributed import Client
    except ImportError:
        what = f"{spelled('scheduler')} needs dask and distributed"
        raise DependencyError(what, fix="pip install 'lrconvert[scale]'") from None
    try:
        client = Client(address, timeout=_CONNECT, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        what = f"the scheduler at {address!r:.200} does not answer: {message:.200}"
        raise WorkerError(what, fix="start it, or give its own address") from None
    with client:
        _check_versions(client)
        yield _Cluster(client), _Threads(client)


def version() -> str:
    """Return the version of lrconvert, as a worker has it."""
    return __version__


def _check_versions(client: Any) -> None:
    try:
        by_worker = client.run(version)
    except Exception as error:
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        what = f"a worker of the cluster cannot load lrconvert: {message:.300}"
        raise WorkerError(what, fix=f"install lrconvert {__version__} where the workers are") from None
    for worker, other in sorted(by_worker.items()):
        if other != __version__:
            what = f"the worker {worker} has lrconvert {other}, and this is {__version__}"
            raise WorkerError(what, fix="install the same version everywhere")


class _Cluster(Executor):
    """A cluster as an executor. Dask's own (`Client.get_executor`) never ends a future whose result is lost together
    with its scheduler."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def submit(self, call: Callable[..., Any], /, *given: Any, **named: Any) -> Future[Any]:
        """Give a job to the scheduler."""
        future, promised = self._client.submit(call, *given, **named, pure=False), Future[Any]()
        promised.add_done_callback(lambda done: future.cancel() if done.cancelled() else None)
        self._client.loop.add_callback(self._land, future, promised)
        return promised

    async def _land(self, future: Any, promised: Future[Any]) -> None:
        with suppress(InvalidStateError):  # it was cancelled meanwhile
            try:
                promised.set_result(await self._client.gather(future, asynchronous=True))
            except Exception as error:
                promised.set_exception(error)
            except BaseException as error:  # as asyncio's CancelledError is
                promised.set_exception(CancelledError(str(error)))


class _Threads:
    """Twice the threads of a cluster, asked for again every few seconds, since it may grow."""

    def __init__(self, client: Any) -> None:
        self._client, self._count, self._until = client, _LEAST, 0.0

    def __call__(self) -> int:
        if time.monotonic() >= self._until:
            with suppress(Exception):  # it does not answer now; a job that cannot be done says so
                self._count = max(_LEAST, 2 * sum(self._client.nthreads().values()))
            self._until = time.monotonic() + _COUNTED
        return self._count
