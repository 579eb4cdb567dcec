"""A hub of models on this machine, with the endpoints of the Hugging Face Hub that huggingface_hub uses to create a
repository, upload a commit, and download: enough to test against, with everything that was asked recorded."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Hub:
    """Repositories by name, each {path: bytes}; `private` are those made so. `requests` are "METHOD path", `tokens`
    what they were authorized with. `refusal`: the status and message with which no repository is made."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    stored: dict[str, bytes] = field(default_factory=dict)
    refusal: tuple[int, str] | None = None
    url: str = ""

    def commit_of(self, repo: str) -> str:
        """Return the commit that a repository is at."""
        digest = hashlib.sha1(repo.encode())
        for name, data in sorted(self.repositories[repo].items()):
            digest.update(name.encode() + hashlib.sha1(data).digest())
        return digest.hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def _answer(self, status: int, value: Any = None, data: bytes = b"", **headers: str) -> None:
        body = data if value is None else json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        if status >= 400 and isinstance(value, dict):
            self.send_header("X-Error-Message", value["error"])
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        self.hub.tokens.add(self.headers.get("Authorization", ""))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for pattern, answer in _ROUTES.items():
            match = re.fullmatch(pattern, f"{self.command} {path}")
            if match:
                answer(self, body, **match.groupdict())
                return
        self._answer(404, {"error": "Not Found"})

    do_GET = do_HEAD = do_POST = do_PUT = _route

    # --- writing ---

    def _refused(self) -> bool:
        if self.hub.refusal is None:
            return False
        status, message = self.hub.refusal
        self._answer(status, {"error": message})
        return True

    def create(self, body: bytes) -> None:
        if self._refused():
            return
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if name in self.hub.repositories:
            self._answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
            return
        self.hub.repositories[name] = {".gitattributes": b""}
        if wanted.get("private") or wanted.get("visibility") == "private":
            self.hub.private.add(name)
        self._answer(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def preupload(self, body: bytes, repo: str) -> None:
        files = json.loads(body)["files"]
        modes = [{"path": f["path"], "uploadMode": _mode(f["path"]), "shouldIgnore": False} for f in files]
        self._answer(200, {"files": modes})

    def validate_yaml(self, body: bytes) -> None:
        self._answer(200, {"errors": [], "warnings": []})

    def batch(self, body: bytes, repo: str) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}}
            for one in json.loads(body)["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._answer(400, {"error": "other bytes than announced"})
            return
        self.hub.stored[oid] = body
        self._answer(200)

    def commit(self, body: bytes, repo: str) -> None:
        files = self.hub.repositories[repo]
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                files[entry["value"]["path"]] = self.hub.stored[entry["value"]["oid"]]
        oid = self.hub.commit_of(repo)
        self._answer(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"})

    # --- reading ---

    def _known(self, repo: str, revision: str = "main") -> bool:
        if repo not in self.hub.repositories:
            self._answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return False
        if revision not in ("main", self.hub.commit_of(repo)):
            self._answer(404, {"error": f"Invalid rev id: {revision}"}, X_Error_Code="RevisionNotFound")
            return False
        return True

    def info(self, body: bytes, repo: str, revision: str = "main") -> None:
        if self._known(repo, revision):
            files = self.hub.repositories[repo]
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            self._answer(200, {"id": repo, "sha": self.hub.commit_of(repo), "siblings": siblings, "private": False})

    def tree(self, body: bytes, repo: str, revision: str, inside: str | None = None) -> None:
        """Answer with what is in a folder: its files and folders, or with ``recursive`` all files below it."""
        if not self._known(repo, revision):
            return
        prefix = f"{unquote(inside)}/" if inside else ""
        below = {n[len(prefix) :]: d for n, d in self.hub.repositories[repo].items() if n.startswith(prefix)}
        if not below and prefix:
            self._answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
            return
        direct = {n: d for n, d in below.items() if "/" not in n}
        folders = {n.partition("/")[0] for n in below if "/" in n}
        if re.search(r"recursive=true", urlsplit(self.path).query, re.IGNORECASE):
            direct, folders = below, set()
        listed = [{"type": "file", "path": f"{prefix}{n}", "size": len(d), "oid": _oid(d)} for n, d in direct.items()]
        listed += [{"type": "directory", "path": f"{prefix}{n}", "size": 0, "oid": ""} for n in sorted(folders)]
        self._answer(200, listed)

    def resolve(self, body: bytes, repo: str, revision: str, name: str) -> None:
        if not self._known(repo, revision):
            return
        data = self.hub.repositories[repo].get(name)
        if data is None:
            self._answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
            return
        self._answer(200, data=data, ETag=f'"{_oid(data)}"', X_Repo_Commit=self.hub.commit_of(repo))


def _mode(path: str) -> str:
    return "lfs" if path.endswith((".safetensors", ".gguf", ".bin")) else "regular"


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


_ROUTES: dict[str, Callable[..., None]] = {
    r"POST /api/repos/create": _Handler.create,
    r"POST /api/validate-yaml": _Handler.validate_yaml,
    rf"POST /api/models/{_REPO}/preupload/[^/]+": _Handler.preupload,
    rf"POST /{_REPO}\.git/info/lfs/objects/batch": _Handler.batch,
    r"PUT /lfs/(?P<oid>[0-9a-f]{64})": _Handler.put,
    rf"POST /api/models/{_REPO}/commit/[^/]+": _Handler.commit,
    rf"GET /api/models/{_REPO}": _Handler.info,
    rf"GET /api/models/{_REPO}/revision/(?P<revision>[^/]+)": _Handler.info,
    rf"GET /api/models/{_REPO}/tree/(?P<revision>[^/]+)(?:/(?P<inside>.*))?": _Handler.tree,
    rf"(?:GET|HEAD) /{_REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)": _Handler.resolve,
}


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve `hub` on a free port of this machine alone; its `url` is set."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
