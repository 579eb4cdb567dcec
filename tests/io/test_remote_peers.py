"""A real server of S3 on this machine, with s3fs: pages, requests, conditions, failures, credentials, kills. Without
the peer's environment all of it is skipped by name: see tests/peers/README.md."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ADAPTERS, ROOT
from peers import oracle

import lrconvert

pytestmark = pytest.mark.slow

LORA = ADAPTERS / "llama-plain"
KEY, SECRET = "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMIsecret"
WRONG = "AKIAWRONGWRONGWRONG1"
_RUN = "import sys; sys.path.insert(0, sys.argv.pop(1)); from lrconvert.cli import main; main()"


class Server:
    """The server, and clients in processes of their own."""

    def __init__(self, url: str, library: Path, scratch: Path) -> None:
        self.url, self.library, self.scratch = url, library, scratch

    def environment(self, **more: str) -> dict[str, str]:
        own = {"AWS_ENDPOINT_URL": self.url, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
        own |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "HF_HUB_OFFLINE": "1"}
        own |= {"PYTHONPATH": f"{self.library}{os.pathsep}{ROOT}", "LRCONVERT_SCRATCH": str(self.scratch)}
        return {**os.environ, **own, "OMP_NUM_THREADS": "1", **more}

    def command(self, *words: object, **more: str) -> subprocess.CompletedProcess[str]:
        """Run lrconvert."""
        command = [sys.executable, "-c", _RUN, str(self.library), *map(str, words)]
        return subprocess.run(command, env=self.environment(**more), capture_output=True, text=True, timeout=120)

    def python(self, code: str, *words: object) -> Any:
        """Run a few lines that print one JSON value."""
        command = [sys.executable, "-c", code, *map(str, words)]
        done = subprocess.run(command, env=self.environment(), capture_output=True, text=True, timeout=120)
        assert not done.returncode, done.stderr
        return json.loads(done.stdout)

    def _ask(self, path: str, data: bytes | None = None) -> Any:
        with urllib.request.urlopen(f"{self.url}{path}", data, timeout=60) as answer:
            return json.load(answer)

    def asked(self) -> list[str]:
        """What was asked since the last time."""
        told: list[str] = self._ask("/-/log")
        return told

    def fail(self, *faults: dict[str, Any]) -> None:
        self._ask("/-/faults", json.dumps(faults).encode())
        self.asked()

    def put(self, key: str, data: bytes = b"x") -> None:
        """Store an object as anybody may: the server takes unsigned requests."""
        head = {"Content-Type": "application/octet-stream"}
        request = urllib.request.Request(f"{self.url}/bkt/{key}", data, head, method="PUT")
        urllib.request.urlopen(request, timeout=60).close()

    def keys(self, prefix: str) -> list[str]:
        with urllib.request.urlopen(f"{self.url}/bkt?list-type=2&prefix={prefix}", timeout=60) as answer:
            return re.findall("<Key>([^<]*)</Key>", answer.read().decode())


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    library = oracle.needed("s3")
    runner = Path(oracle.__file__).with_name("run_s3.py")
    process = subprocess.Popen([sys.executable, runner], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdin is not None
    server = Server(process.stdout.readline().strip(), library, tmp_path_factory.mktemp("scratch"))
    request = urllib.request.Request(f"{server.url}/bkt", b"", method="PUT")
    urllib.request.urlopen(request, timeout=60).close()
    yield server
    process.stdin.close()
    process.wait(30)


def lora_at(s3: Server, *folders: str) -> None:
    for folder in folders:
        for path in LORA.glob("adapter_*"):
            s3.put(f"{folder}/{path.name}", path.read_bytes())
    s3.asked()


_LIST = """
import json, sys
from lrconvert.io import remote
from lrconvert.io.remote import s3
s3._PAGE = 20
told = [[a.path, a.state] for a in remote.adapters(remote.open_store("s3://bkt/many"))]
print(json.dumps(told))
"""


def test_s3_lists_in_pages(s3):
    """Of 25 folders of two keys in pages of 20: three, each asked for once, and one look for a configuration."""
    s3.python(
        "import asyncio, fsspec\n"
        "fs = fsspec.filesystem('s3')\n"
        "names = ('adapter_config.json', 'adapter_model.safetensors')\n"
        "fs.pipe({f'bkt/many/{n:05}/{name}': b'{}' for n in range(25) for name in names})\n"
        "print(1)"
    )
    s3.asked()
    told = s3.python(_LIST)
    asked = s3.asked()
    assert [path for path, _ in told] == [f"{n:05}/" for n in range(25)] and all(state for _, state in told)
    assert len([one for one in asked if "list-type=2" in one]) == 3 and len(asked) == 4, asked


def test_s3_requests_of_one_adapter(s3, tmp_path):
    """They are stated in docs/guides/object-stores.md, and S3 asks money for them."""
    lora_at(s3, "one/lora")
    done = s3.command("lora-to-lowrank", "s3://bkt/one/lora", "-o", "s3://bkt/one/small.lrc", "--bits", "8", "-q")
    assert not done.returncode, done.stderr
    assert sorted(one.partition("?")[0] for one in s3.asked()) == [
        "GET /bkt",
        "GET /bkt",
        "GET /bkt/one/lora/adapter_config.json",
        "GET /bkt/one/lora/adapter_model.safetensors",
        "HEAD /bkt/one/small.lrc",
        "HEAD /bkt/one/small.lrc",
        "HEAD /bkt/one/small.lrc",
        "PUT /bkt/one/small.lrc",
    ]
    done = s3.command("export", "s3://bkt/one/small.lrc", "--to", "peft-lora", "-o", "s3://bkt/one/peft")
    assert not done.returncode, done.stderr
    puts = [one for one in s3.asked() if one.startswith("PUT")]
    assert puts[-1] == "PUT /bkt/one/peft/adapter_config.json" and len(puts) == 4


def test_s3_does_not_replace_what_is_there(s3, tmp_path):
    """Looked at before any work, and refused by the upload itself if it came meanwhile."""
    lora_at(s3, "there/lora")
    s3.put("there/x.lrc", b"another's")
    words = ["lora-to-lowrank", "s3://bkt/there/lora", "--bits", "8", "-q", "-o", "s3://bkt/there/x.lrc"]
    done = s3.command(*words)
    assert done.returncode == 1 and done.stderr.startswith("E-OUT-EXISTS: s3://bkt/there/x.lrc: exists already")
    assert s3.python(_BOTH) == [["E-OUT-EXISTS", "another's"], ["", "mine"]]


_BOTH = """
import json, pathlib, tempfile
from lrconvert.core.errors import LrcError
from lrconvert.io import remote
made = pathlib.Path(tempfile.mkdtemp()) / "made"
made.write_text("mine")
told = []
for overwrite in (False, True):
    code = ""
    try:
        remote.publish(made, "s3://bkt/there/x.lrc", overwrite=overwrite)
    except LrcError as error:
        code = error.code
    told.append([code, remote.open_store("s3://bkt/there/x.lrc").files.cat_file("bkt/there/x.lrc").decode()])
print(json.dumps(told))
"""

SLOW_DOWN = {"status": 503, "code": "SlowDown"}
BROKEN = {"status": 500, "code": "InternalError"}


def test_s3_failures_that_pass_are_waited_for(s3):
    """Throttling, 500s, an answer that is cut off, and an upload whose answer was lost."""
    lora_at(s3, "weak/lora")
    s3.fail(
        {"match": "GET /bkt.*list-type", "times": 2, **SLOW_DOWN},
        {"match": "GET .*adapter_config", "times": 6, **BROKEN},
        {"match": "GET .*adapter_model", "times": 1, "cut": True},
        {"match": "PUT ", "times": 1, "after": True, **BROKEN},
    )
    done = s3.command("lora-to-lowrank", "s3://bkt/weak/lora", "-o", "s3://bkt/weak/x.lrc", "--bits", "8", "-q")
    assert not done.returncode, done.stderr
    s3.fail()
    assert s3.keys("weak/x") == ["weak/x.lrc"]


def test_s3_says_one_clear_line(s3):
    """What it cannot reach, may not see, or does not have: no secret, no traceback."""
    lora_at(s3, "said/lora")
    wrong = s3.command("inspect", "s3://bkt/said/lora", AWS_ACCESS_KEY_ID=WRONG)
    absent = s3.command("inspect", "s3://bkt/said/absent")
    s3.fail({"match": "GET ", "times": 99, "status": 403, "code": "AccessDenied"})
    denied = s3.command("inspect", "s3://bkt/said/lora")
    assert len(s3.asked()) == 1  # a refusal is not tried again
    s3.fail()
    for done, code in ((wrong, "E-ACCESS"), (absent, "E-IO-KIND"), (denied, "E-ACCESS")):
        lines = done.stderr.strip().splitlines()
        assert done.returncode == 1 and len(lines) == 1 and lines[0].startswith(f"{code}: s3://"), done.stderr
        assert WRONG not in done.stderr and KEY not in done.stderr and SECRET not in done.stderr


_PUBLISH = """
import datetime, json, pathlib, sys
from lrconvert.io import remote
from lrconvert.io.remote import s3
s3._ONE_PUT, s3._PART, s3._STALE = 10 << 20, 5 << 20, datetime.timedelta(0)
remote.publish(pathlib.Path(sys.argv[1]), "s3://bkt/killed/x.lrc", overwrite=True)
place = remote.open_store("s3://bkt/killed/x.lrc")
left = place._call("list_multipart_uploads", Prefix="killed/").get("Uploads", ())
print(json.dumps([len(left), place.read_digest()]))
place.remove()
"""


@pytest.mark.parametrize(("nbytes", "puts"), [(8_000_000, 1), (11_000_000, 3)], ids=["put", "multipart"])
def test_s3_shows_nothing_of_a_killed_upload(s3, tmp_path, nbytes, puts):
    """Neither of one PUT nor of a multipart upload, which the next run ends before it writes the whole."""
    made = tmp_path / "made"
    made.write_bytes(os.urandom(nbytes))
    s3.fail({"match": "PUT /bkt/killed/x.lrc", "times": puts, "wait": 2})
    process = subprocess.Popen([sys.executable, "-c", _PUBLISH, made], env=s3.environment())
    deadline = time.time() + 60
    while not any(one.startswith("PUT") for one in s3.asked()) and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(3)  # what the server still does with what it got
    before = s3.keys("killed/")
    assert before == []
    s3.fail()
    assert s3.python(_PUBLISH, made) == [0, hashlib.sha256(made.read_bytes()).hexdigest()]


def test_s3_a_prefix_becomes_another(s3, tmp_path):
    """In processes of lrconvert's own, one of which is killed in the middle: nothing half-made is there, and the next
    run makes what is missing; the one after that asks for the listings alone."""
    lora_at(s3, *(f"fleet/{n}" for n in range(4)))
    own = {"LRCONVERT_CACHE": str(tmp_path / "cache")}
    words = ["lora-to-lowrank", "s3://bkt/fleet", "-o", "s3://bkt/small", "--bits", "8", "--json", "-j", "1"]
    s3.fail({"match": "PUT /bkt/small/2.lrc", "times": 1, "wait": 60})
    command = [sys.executable, "-c", _RUN, str(s3.library), *words]
    process = subprocess.Popen(command, env=s3.environment(**own), start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not any(one.startswith("PUT /bkt/small/2") for one in s3.asked()) and time.time() < deadline:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert s3.keys("small/") == ["small/0.lrc", "small/1.lrc"]
    s3.fail()
    done = s3.command(*words, **own)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one.get("state") for one in told[:-1]] == ["skipped", "skipped", "done", "done"], done.stderr
    assert s3.keys("small/") == [*(f"small/{n}.lrc" for n in range(4)), "small/manifest.jsonl"]
    asked = s3.asked()
    each = {n: [one.split()[0] for one in asked if f"fleet/{n}/" in one or f"small/{n}.lrc" in one] for n in (2, 3)}
    lists = [one for one in asked if "prefix=fleet%2F3%2F" in one]
    assert Counter(each[3]) == {"GET": 2, "HEAD": 4, "PUT": 1} and len(lists) == 3, asked
    done = s3.command(*words, **own)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one.get("state") for one in told[:-1]] == ["skipped"] * 4, done.stderr
    assert [one.partition("?")[0] for one in s3.asked()] == [
        "GET /bkt",
        "HEAD /bkt/fleet/adapter_config.json",
        "GET /bkt",
    ]
    wrong = s3.command(*words, AWS_ACCESS_KEY_ID=WRONG, **own)
    assert wrong.returncode == 1 and wrong.stderr.startswith("E-ACCESS: s3://bkt/fleet: the store refuses access")


_SIGN = """
import json, fsspec
print(json.dumps(fsspec.filesystem("s3").sign("bkt/signed/x.lrc", expiration=600)))
"""


def test_s3_signed_urls_are_read(s3, tmp_path):
    """As a browser would; of the signature nothing is shown."""
    made = tmp_path / "x.lrc"
    lrconvert.write(lrconvert.convert(LORA, "lowrank", bits=8), made)
    s3.put("signed/x.lrc", made.read_bytes())
    url = s3.python(_SIGN)
    assert "Signature=" in url
    done = s3.command("validate", url)
    assert done.returncode == 0 and f"{s3.url}/bkt/signed/x.lrc?" in done.stdout, done.stderr
    absent = s3.command("validate", url.replace("x.lrc", "y.lrc"))
    assert absent.returncode == 1 and absent.stderr.startswith("E-IO-KIND: http://"), absent.stderr
    for part in url.partition("?")[2].split("&"):
        if "Signature" in part or "AccessKeyId" in part or "Credential" in part:
            assert part.partition("=")[2] not in done.stdout + absent.stderr
