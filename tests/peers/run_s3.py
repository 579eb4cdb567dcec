"""A server of S3 on this machine (moto's), which can be told to fail: ``python run_s3.py`` prints its address.

    GET  /-/log            every request so far, ["PUT /bucket/key?query", ...], which is forgotten then
    POST /-/faults         a list of {match, times, status, code, cut, wait}: answers instead, the first match

Whoever signs with another key than `KEY` is refused as S3 does it, with the key in the answer.
"""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import runner

KEY = "AKIAIOSFODNN7EXAMPLE"
_ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>{text}</Message>{more}</Error>"


class Failing:
    """A WSGI application before another one: it writes down what is asked, and fails where it is told to."""

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self.app = app
        self.log: list[str] = []
        self.faults: list[dict[str, Any]] = []
        self.lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path, query = environ["PATH_INFO"], environ.get("QUERY_STRING", "")
        if path.startswith("/-/"):
            return self._told(path, environ, start)
        asked = f"{environ['REQUEST_METHOD']} {path}{'?' if query else ''}{query}"
        with self.lock:
            self.log.append(asked)
            fault = next((f for f in self.faults if f["times"] > 0 and re.search(f["match"], asked)), None)
            if fault is not None:
                fault["times"] -= 1
        signed = environ.get("HTTP_AUTHORIZATION", "")
        if signed and f"Credential={KEY}/" not in signed:
            key = re.search("Credential=([^/]*)", signed)
            more = f"<AWSAccessKeyId>{key[1] if key else ''}</AWSAccessKeyId>"
            text = "The AWS Access Key Id you provided does not exist in our records."
            return self._error(environ, start, 403, "InvalidAccessKeyId", text, more)
        if fault is None:
            return self.app(environ, start)
        time.sleep(fault.get("wait", 0))
        if fault.get("damage"):
            return self._damaged(environ, start)
        if fault.get("cut"):
            return self._cut(environ, start)
        if fault.get("after"):  # it is done, and the answer is lost
            list(self.app(environ, lambda *words: None))
            environ = {**environ, "CONTENT_LENGTH": "0"}  # the body was read
        if "status" not in fault:
            return self.app(environ, start)
        return self._error(environ, start, fault["status"], fault["code"], "Told to fail.", "")

    def _told(self, path: str, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        with self.lock:
            if environ["REQUEST_METHOD"] == "POST":
                self.faults = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
            answer, self.log = json.dumps(self.log).encode(), []
        start("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(answer)))])
        return [answer]

    def _error(
        self, environ: dict[str, Any], start: Callable[..., Any], status: int, code: str, text: str, more: str
    ) -> Iterable[bytes]:
        if length := environ.get("CONTENT_LENGTH"):
            environ["wsgi.input"].read(int(length))
        body = _ERROR.format(code=code, text=text, more=more).encode()
        head = environ["REQUEST_METHOD"] == "HEAD"
        start(f"{status} {code}", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [] if head else [body]

    def _cut(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterator[bytes]:
        """The first half of the answer, and then no connection: else the client would wait for the rest, a minute."""
        whole = b"".join(self.app(environ, start))
        yield whole[: len(whole) // 2]
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        raise ConnectionResetError("told to cut")

    def _damaged(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        """The answer with its last byte turned over."""
        whole = b"".join(self.app(environ, start))
        return [whole[:-1] + bytes([whole[-1] ^ 1])] if whole else []


def main() -> None:
    runner.prefer(runner.library("s3"))
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Silent(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, type: str, message: str, *args: Any) -> None:
            """Print nothing."""

    app = Failing(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Silent)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    threading.Thread(target=lambda: (sys.stdin.read(), server.shutdown()), daemon=True).start()
    server.serve_forever()


if __name__ == "__main__":
    main()
