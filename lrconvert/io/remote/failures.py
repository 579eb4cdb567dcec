"""Failures of stores: which of them pass by themselves, how often and how long they are waited for, and what of them a
user is told.

Drivers raise what they like: OSError with a number, exceptions of their HTTP client, of botocore. Nothing of them is
imported here: a status is looked for in what they carry, and in what they were raised from.
"""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from lrconvert.core.errors import AccessError, FileKindError, LrcError, RemoteError
from lrconvert.core.redaction import redacted
from lrconvert.io.remote.urls import Url

T = TypeVar("T")
_PASSING = {408, 409, 425, 429, 500, 502, 503, 504}
_REFUSED = {401, 403, 407}
_MISSING = {404, 410}
_TAKEN = 412  # of a condition that nothing be there
_NUMBERS = {
    *(errno.EBUSY, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.EPIPE, errno.ECONNRESET, errno.ECONNABORTED),
    *(errno.ECONNREFUSED, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTUNREACH, errno.ENETDOWN),
    getattr(errno, "EREMOTEIO", errno.EBUSY),
}
# Classes of HTTP clients and of botocore, by name, for failures before there is a status.
_CLIENTS = ("aiohttp", "botocore", "aiobotocore", "urllib3", "requests", "httpx", "httpcore", "azure", "google")
_LOST: tuple[str, ...] = (
    "Timeout",
    "Connection",
    "Disconnected",
    "Payload",
    "IncompleteRead",
    "HTTPClientError",
    "EndpointConnection",
)
_LOST += ("ResponseStreaming", "ProxyConnection", "ServiceRequest", "ServiceResponse", "Protocol", "NetworkError")
_LOST += ("ReadError", "WriteError", "ConnectError", "ServerError", "TooManyRequests", "ServiceUnavailable")
_OFFLINE = "OfflineModeIsEnabled"  # of huggingface_hub
_UNKNOWN: tuple[str, ...] = (
    "NoCredentials",
    "PartialCredentials",
    "CredentialRetrieval",
    "TokenRetrieval",
    "DefaultCredentials",
)
_UNKNOWN += ("UnauthorizedSSO", "SSOToken", "Login", "ProfileNotFound", "ClientAuthentication", "RefreshError")


@dataclass(frozen=True)
class Patience:
    """The times that a call is made before it has failed, and the seconds before the second: twice as many before each
    further one, with a random part, up to `longest`."""

    attempts: int = 5
    first: float = 0.5
    longest: float = 20.0

    def waits(self) -> Iterator[float]:
        for n in range(self.attempts - 1):
            yield min(self.first * 2**n, self.longest) * (0.5 + random.random() / 2)


PATIENCE = Patience()


def asked(
    url: Url, call: Callable[[], T], patience: Patience = PATIENCE, sleep: Callable[[float], None] = time.sleep
) -> T:
    """Return what `call` returns, which is made again after failures that pass by themselves: timeouts, lost
    connections, throttling, 5xx. FileNotFoundError, FileExistsError and NotADirectoryError are let through, all else is
    E-ACCESS, E-REMOTE or another LrcError."""
    waits = patience.waits()
    while True:
        try:
            return call()
        except (FileExistsError, NotADirectoryError, LrcError):
            raise
        except Exception as error:  # whatever the driver of that protocol raises
            # aiohttp's driver says of any failure that the file is not there, and why in what it was raised from.
            is_missing = isinstance(error, FileNotFoundError) and not passes(error) and not _is_refused(error)
            if is_missing or _status(error) in _MISSING:
                raise FileNotFoundError(errno.ENOENT, "is not there") from None
            if _status(error) == _TAKEN:
                raise FileExistsError(errno.EEXIST, "is there") from None
            pause = next(waits, None) if passes(error) else None
            if pause is None:
                raise told(url, error, patience) from None
            sleep(pause)


def missing(url: Url) -> LrcError:
    """Return the error for what is not there."""
    bucket = "/".join(str(url).partition("://")[2].split("/")[: 2 if url.scheme == "hf" else 1])
    is_host = url.scheme in ("http", "https")
    what = "there is nothing at this address" if is_host else f"there is nothing of that name in {bucket!r}"
    return FileKindError(what, fix="is it spelled right, and may these credentials see it?", path=url)


def told(url: Url, error: Exception, patience: Patience = PATIENCE) -> LrcError:
    """Return what a user is told of a driver's error: one line, without secrets."""
    said = f"{type(error).__name__}: {_first_line(error)}"
    if _is_refused(error):
        what = f"the store refuses access with the credentials that there are ({said})"
        return AccessError(what, fix=_login(url.scheme), path=url)
    if passes(error):
        what = f"the store does not answer: {said}, {patience.attempts} times"
        return RemoteError(what, fix="see to the network or the store, then run it again", path=url)
    return RemoteError(f"the store refuses this: {said}", path=url, status=_status(error))


def passes(error: BaseException) -> bool:
    """Return true for a failure that may not be there the next time."""
    if _is_refused(error) or any(type(cause).__name__ == _OFFLINE for cause in _causes(error)):
        return False
    status = _status(error)
    if status:
        return status in _PASSING
    for cause in _causes(error):
        if isinstance(cause, (TimeoutError, ConnectionError)):
            return True
        if isinstance(cause, OSError) and cause.errno in _NUMBERS:
            return True
        if _is_of(cause, _LOST):
            return True
    return False


def _is_refused(error: BaseException) -> bool:
    refused = _status(error) in _REFUSED
    return refused or any(isinstance(cause, PermissionError) or _is_of(cause, _UNKNOWN) for cause in _causes(error))


def _is_of(error: BaseException, names: tuple[str, ...]) -> bool:
    """Return true if a class of an error is one of a client's of these names."""
    for kind in type(error).__mro__:
        if kind.__module__.partition(".")[0] in _CLIENTS and any(name in kind.__name__ for name in names):
            return True
    return False


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and what it was raised from."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error, or what it was raised from, carries."""
    for cause in _causes(error):
        response: Any = getattr(cause, "response", None)
        if isinstance(response, dict):  # of botocore
            response = response.get("ResponseMetadata", {})
            values = [response.get("HTTPStatusCode")] if isinstance(response, dict) else []
        else:
            values = [getattr(response, name, None) for name in ("status_code", "status")]
        values += [getattr(cause, name, None) for name in ("status_code", "status", "code")]
        for value in values:
            if isinstance(value, str) and value.isdecimal():  # of gcsfs
                value = int(value)
            if isinstance(value, int) and 100 <= value <= 599:
                return value
    return None


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return redacted(lines[0] if lines else "no reason given")[:300]


def _login(scheme: str) -> str:
    """Return how the driver of a protocol gets credentials."""
    own = {
        "s3": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, of a user who may read and write there",
        "gs": "log in with `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
        "abfs": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_STORAGE_CONNECTION_STRING",
        "hf": "log in with `hf auth login`, or set HF_TOKEN",
    }
    kin = {"s3a": "s3", "gcs": "gs", "az": "abfs", "abfss": "abfs"}
    return own.get(kin.get(scheme, scheme), "see the documentation of its driver in fsspec for credentials")
