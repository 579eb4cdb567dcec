"""Everything hostile: the files that fixtures/hostile.py makes, and what is no small file, built here.

Each is refused with its code, in one line that names the file, by an error of ours; nothing is written, opened,
imported or sent besides, and the work is bounded: bytes and calls are counted, and memory, not seconds.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hostile
import pytest
from conftest import ADAPTERS, BASES, FIXTURES, ROOT, random_lora, write_files

from lrconvert import Fleet, api, cli
from lrconvert.core import errors
from lrconvert.core.limits import FOREIGN, MAX_CONFIG_BYTES, MAX_INDEX_BYTES, MAX_SHARDS, OWN, Limits
from lrconvert.formats.lrc import file
from lrconvert.formats.lrc.validation import validate
from lrconvert.io import container
from lrconvert.io.checkpoint import INDEX_NAME, SINGLE_NAME, open_checkpoint
from lrconvert.testing.raw_files import spelled, with_header

CASES = {case.path: case for case in hostile.cases()}
GOLDEN = FIXTURES / "golden" / "v1" / "lowrank" / "4.lrc"
SHARD = hostile.tensors(h__0__q__weight=hostile.zeros(6, 4))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- watching -------------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What happened inside `watched`: reads as (calls, bytes), and (event, subject) of everything else that counts."""

    calls: int = 0
    nbytes: int = 0
    peak: int = 0
    events: list[tuple[str, str]] = field(default_factory=list)

    def named(self, *events: str) -> list[tuple[str, str]]:
        return [(event, what) for event, what in self.events if event.split(".")[0] in events or event in events]


_watching: list[Seen] = []
_HARMFUL = ("socket", "subprocess", "os.system", "os.exec", "os.posix_spawn", "pickle.find_class", "urllib.Request")
_WRITING = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")

_COUNTED = {"import", *_HARMFUL, *_WRITING}


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    if event == "open":
        path, mode, flags = arguments
        writes = "w" in str(mode) or "a" in str(mode) or (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR))
        if "__pycache__" not in str(path):
            _watching[-1].events.append(("write" if writes else "open", str(path)))
    elif "__pycache__" not in str(arguments) and _COUNTED & {event, event.split(".")[0]}:
        _watching[-1].events.append((event, str(arguments[0]) if arguments else ""))


sys.addaudithook(_hook)


@contextlib.contextmanager
def watched(*, memory: bool = True) -> Iterator[Seen]:
    """Count reads and bytes, note what is opened, written, imported, started or sent, and measure peak memory (which
    takes five times as long)."""
    seen = Seen()

    def counting(real: Callable[..., Any], size: Callable[[Any], int]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            done = real(*arguments)
            seen.calls += 1
            seen.nbytes += size(done)
            return done

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name, size in (("preadv", int), ("pread", len), ("read", len)):
            patch.setattr(os, name, counting(getattr(os, name), size))
        if memory:
            tracemalloc.start()
        _watching.append(seen)
        try:
            yield seen
        finally:
            _watching.pop()
            if memory:
                seen.peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()


@pytest.fixture(scope="module", autouse=True)
def _warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Import what the verbs import when they are first used, so that it is not counted for the first case."""
    folder = tmp_path_factory.mktemp("warm")
    lora = api.load_lora(ADAPTERS / "vit-query-value")
    api.write(api.convert(lora, "lowrank", bits=14).compact, folder / "x.lrc")
    api.merge(BASES / "tiny-vit", folder / "x.lrc", folder / "out", dry_run=True)
    for words in (["validate", folder / "x.lrc"], ["inspect", folder / "x.lrc"]):
        run_cli(*words)


def run_cli(*words: Any) -> int:
    """The exit code of the command line, run in this process."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["lrconvert", *map(str, words)])
        cli.main()
    return int(ended.value.code or 0)


def check_message(error: errors.LrcError, place: Path) -> None:
    """One line, its code first, safe for a terminal, and it names the file or folder it is about."""
    text = str(error)
    assert type(error) in errors.all_errors()
    assert text.startswith(f"{error.code}: ") and text.isprintable() and len(text) < 2500, text
    assert error.path is not None and str(Path(error.path)).startswith(str(place)), text


def check_bounded(seen: Seen, size: int) -> None:
    """Work in proportion to what was sent: reads, bytes, memory."""
    assert seen.nbytes <= 6 * size + 64, (seen.nbytes, size)
    assert seen.calls <= 64, seen.calls
    assert seen.peak <= (8 << 20) + 100 * size, (seen.peak, size)  # a merge computes in 6 MB, whatever it merges


# --- the cases of fixtures/hostile.py -------------------------------------------------------------------------------

# Of every path and its bytes. If a case was added or meant to change, put the new digest here; if not, this is a fault.
MADE = "576ba6ccf43f0f3c2540422e3100b8c3005895ea346501d2ab463c6e19f1cce4"


def test_the_same_files_are_made_everywhere(hostile_files: Path):
    made = tree(hostile_files)
    assert made == hostile.tree() and sum(map(len, made.values())) < 400_000
    digest = hashlib.sha256()
    for name, data in sorted(made.items()):
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    assert digest.hexdigest() == MADE


def test_the_table_is_sound():
    codes = {error.code for error in errors.all_errors()} | {""}
    assert len(CASES) == len(hostile.cases())
    assert all(case.code in codes and case.reads in hostile.READS for case in CASES.values())


@dataclass(frozen=True)
class Reading:
    """A verb applied to a case; `place` is the file or folder that it reads."""

    name: str
    place: Path
    verb: Callable[[], Any]


def members_of(path: Path) -> list[Any]:
    """Every member of a fleet, read as any adapter."""
    with Fleet(path) as fleet:
        return [api.load(f"{path}#{name}") for name in fleet]


def readings(case: Any, path: Path, folder: Path) -> list[Reading]:
    """Every way in which a case is read from `path`. `folder` is for what has to be put around it."""
    if case.reads == "lrconvert":
        read, load = Reading("read", path, lambda: api.read(path)), Reading("load", path, lambda: api.load(path))
        return [read] if case.code == "E-MISSING" else [read, load]  # without a manifest it is another tool's file
    if case.reads == "lora":
        return [Reading("load", path, lambda: api.load(path))]
    if case.reads == "base":
        return [Reading("open", path, lambda: open_checkpoint(path).__exit__(None, None, None))]
    if case.reads == "fleet":
        return [Reading("members", path, lambda: members_of(path))]
    if case.reads == "merge":
        adapter = path / "adapter" if (path / "adapter").exists() else path / "adapter.lrc"
        return [Reading("merge", path, lambda: api.merge(path / "base", adapter, folder / "out"))]
    data = case.files[""]
    lora = write_files(folder / "lora", hostile.lora(None, data))
    base = write_files(folder / "base", hostile.base(data, {}))
    return [
        Reading("read", path, lambda: api.read(path)),
        Reading("lora", lora, lambda: api.load_lora(lora)),
        Reading("base", base, lambda: open_checkpoint(base)),
    ]


@pytest.mark.parametrize("path", CASES)
def test_cases(path: str, hostile_files: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    case = CASES[path]
    size = sum(map(len, case.files.values())) + 200
    for reading in readings(case, hostile_files / path, tmp_path):
        before = tree(tmp_path)
        with watched() as seen:
            try:
                reading.verb()
                refusal = None
            except errors.LrcError as error:
                refusal = error
        if not case.code:
            assert refusal is None, refusal
        else:
            assert refusal is not None and refusal.code == case.code, (reading.name, refusal)
            check_message(refusal, reading.place)
        check_bounded(seen, size)
        assert seen.named(*_HARMFUL) == []
        assert not [what for event, what in seen.named("import") if what in ("antigravity", "system")]
        inside = str(reading.place), str(tmp_path)
        strays = [(e, p) for e, p in seen.named("open") if not p.startswith(inside) and "site-packages" not in p]
        strays = [p for e, p in strays if "passwd" in p or "/" in p]  # shutil.rmtree opens names below a folder
        assert [p for p in strays if "passwd" in p or ROOT.parent not in Path(p).parents] == []
        if reading.name != "merge":
            assert seen.named("write", *_WRITING) == []
        assert tree(tmp_path) == before, "something was left behind"
    assert capfd.readouterr() == ("", ""), "something ran, or was printed"


@pytest.mark.parametrize("path", [path for path, case in CASES.items() if case.reads in ("container", "lrconvert")])
def test_validation_finds_the_code(path: str, hostile_files: Path) -> None:
    """`validate` reports the code of the case, whatever it finds besides, each in one line."""
    code, findings = CASES[path].code, validate(hostile_files / path).findings
    assert {f.code for f in findings} >= ({code} if code else set()) and len(findings) <= (4 if code else 0)
    assert all(f.message.isprintable() and f.message.count(path) == 1 for f in findings)


@pytest.mark.parametrize("path", CASES)
def test_the_command_line_says_it_in_one_line(
    path: str, hostile_files: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    case, place = CASES[path], hostile_files / path
    words = {
        "container": ["inspect", place],
        "lrconvert": ["validate", place],
        "lora": ["lora-to-lowrank", place, "-o", tmp_path / "x.lrc", "--bits", "12"],
        "base": ["merge", place, hostile_files / "H28-names-of-code", "-o", tmp_path / "out"],
        "merge": ["merge", place / "base", place / "adapter", "-o", tmp_path / "out"],
        "fleet": ["validate", place],
    }[case.reads]
    if case.reads == "merge" and not (place / "adapter").exists():
        words[2] = place / "adapter.lrc"
    code = run_cli(*words)
    out, err = capfd.readouterr()
    assert all(line.isprintable() for line in (out + err).splitlines()), out + err
    if not case.code:
        return
    assert code == errors.EXIT_REFUSED and list(tmp_path.iterdir()) == []
    if case.reads != "container":  # which by itself is no adapter: E-LAYOUT
        line = (out + err).strip()
        assert case.code in line and "Traceback" not in line


def test_every_case_of_the_list_is_covered():
    """Each id has cases, or its line on the page names tests; no line is without a state."""
    page = (ROOT / "formats" / "threats.md").read_text()
    rows = dict(re.findall(r"^\| (H\d\d) \|.*\|.*\| (.*) \|$", page, re.MULTILINE))
    made = {case.id for case in CASES.values()}
    assert list(rows) == [f"H{n:02}" for n in range(1, 38)]
    for identity, state in rows.items():
        assert re.match(r"(tested|in part|later|none)\b", state), identity
        tests = re.findall(r"`test_\w+::test_\w+", state)
        assert tests, f"{identity} names no test"
        assert identity not in made or "`test_hostile::test_cases`" in state, identity


# --- H01: what is no file -------------------------------------------------------------------------------------------


@pytest.fixture
def alarm() -> Iterator[None]:
    """A reader that blocks is interrupted and fails."""

    def late(signum: int, frame: Any) -> None:
        raise AssertionError("blocked")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def plain_folders(root: Path) -> dict[str, Path]:
    """A file, a LoRA and a base in shards that are all sound."""
    shards = hostile.sharded({"h.0.q.weight": "m.safetensors"}, m=SHARD)
    write_files(root, {"x.lrc": GOLDEN.read_bytes()})
    lora = write_files(root / "lora", hostile.lora())
    base = write_files(root / "base", {"config.json": b'{"model_type": "llama"}', **shards})
    return {"file": root / "x.lrc", "lora": lora, "base": base}


def read_all(made: dict[str, Path]) -> None:
    api.read(made["file"])
    api.load_lora(made["lora"])
    with open_checkpoint(made["base"]):
        pass


SPECIAL: dict[str, Callable[[Path], Any]] = {
    "pipe": os.mkfifo,
    "folder": os.mkdir,
    "socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
    "null device": lambda path: path.symlink_to("/dev/null"),
    "zeros without end": lambda path: path.symlink_to("/dev/zero"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "nothing": lambda path: None,
}
PLACES = (
    ("file", ""),
    ("lora", "adapter_config.json"),
    ("lora", "adapter_model.safetensors"),
    ("base", "config.json"),
    ("base", "model.safetensors.index.json"),
    ("base", "m.safetensors"),
)


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_file(kind: str, tmp_path: Path, alarm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipes, devices, sockets, folders in every place where a file belongs: refused, and nothing blocks."""
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    for n, (which, inner) in enumerate(PLACES):
        root = Path(str(n))
        root.mkdir()
        made = plain_folders(root)
        read_all(made)
        place = made[which] / inner
        place.unlink()
        SPECIAL[kind](place)
        if kind == "nothing" and inner == "config.json":
            continue  # a base need not have one
        with watched() as seen, pytest.raises(errors.LrcError) as caught:
            read_all(made)
        allowed = {"E-IO-KIND", "E-PATH", "E-CONFIG", "E-LAYOUT"}
        assert caught.value.code in allowed, (inner, caught.value)
        check_message(caught.value, root)
        assert seen.nbytes < 10_000


# --- H02, H03, H19: giants, and work in proportion ------------------------------------------------------------------


def sparse(path: Path, start: bytes, size: int) -> Path:
    """A file that claims `size` bytes and has those of `start`."""
    with path.open("wb") as out:
        out.write(start)
        try:
            out.truncate(size)
        except OSError:
            pytest.skip("the file system has no files that large")
    return path


@pytest.mark.parametrize("part", ["header", "file"])
@pytest.mark.parametrize("limits", [OWN, FOREIGN], ids=["our cap", "the library's cap"])
def test_giants_are_not_read(limits: Limits, part: str, tmp_path: Path) -> None:
    if part == "header":
        start, size = (limits.header_bytes + 1).to_bytes(8, "little"), limits.header_bytes + 9
        code, nbytes = "E-HDR-LEN", 8
    else:
        start, size, code, nbytes = b"", limits.file_bytes + 1, "E-LIMIT", 0
    path = sparse(tmp_path / "x", start, size)
    with watched() as seen, pytest.raises(errors.LrcError) as caught:
        container.ContainerFile(path, limits)
    assert caught.value.code == code and seen.nbytes == nbytes and seen.peak < 1 << 16


@pytest.mark.parametrize(
    ("which", "inner", "size"),
    [
        ("lora", "adapter_config.json", MAX_CONFIG_BYTES),
        ("base", "config.json", MAX_CONFIG_BYTES),
        ("base", "model.safetensors.index.json", MAX_INDEX_BYTES),
    ],
)
def test_giant_texts_are_not_read(which: str, inner: str, size: int, tmp_path: Path) -> None:
    made = plain_folders(tmp_path)
    sparse(made[which] / inner, b"{", size + 1)
    with watched() as seen, pytest.raises(errors.LimitError):
        api.load_lora(made["lora"]) if which == "lora" else open_checkpoint(made["base"])
    assert seen.nbytes < 1000 and seen.peak < 1 << 20


def test_shards_are_counted_before_any_is_opened(tmp_path: Path) -> None:
    weight_map = {f"t{n}": f"m{n}.safetensors" for n in range(MAX_SHARDS + 1)}
    (tmp_path / INDEX_NAME).write_bytes(spelled({"weight_map": weight_map}))
    with watched() as seen, pytest.raises(errors.LimitError, match="10001 shards"):
        open_checkpoint(tmp_path)
    assert seen.calls == 1


# Headers of one kind of thing over and over; the last is the sound one.
SHAPES: dict[str, Callable[[int], bytes]] = {
    "one string": lambda n: b'{"a":"' + b"x" * n + b'"}',
    "escapes": lambda n: b'{"a":"' + b"\\u0041" * (n // 6) + b'"}',
    "backslashes": lambda n: b'{"a":"' + b"\\\\" * (n // 2) + b'"}',
    "quotes": lambda n: b"{" + b'"' * n,
    "spaces": lambda n: b"{" + b" " * n + b"}",
    "spaces behind": lambda n: b"{}" + b" " * n,
    "numbers": lambda n: b'{"a":[' + b"1," * (n // 2) + b"1]}",
    "digits": lambda n: b'{"a":' + b"1" * n + b"}",
    "lists": lambda n: b'{"a":[' + b"[]," * (n // 3) + b"[]]}",
    "objects": lambda n: b'{"a":[' + b"{}," * (n // 3) + b"{}]}",
    "strings": lambda n: b'{"a":[' + b'"b",' * (n // 4) + b'"b"]}',
    "keys": lambda n: b"{" + b",".join(b'"%08x":1' % i for i in range(n // 13)) + b"}",
    "one key": lambda n: b"{" + b",".join([b'"a":1'] * (n // 6)) + b"}",
    "dimensions": lambda n: b'{"a":{"dtype":"U8","data_offsets":[0,1],"shape":[' + b"1," * (n // 2) + b"1]}}",
    "metadata": lambda n: b'{"__metadata__":{' + b",".join(b'"%08x":""' % i for i in range(n // 14)) + b"}}",
    "tensors": lambda n: (
        b"{"
        + b",".join(b'"%07x":{"dtype":"U8","shape":[1],"data_offsets":[%d,%d]}' % (i, i, i + 1) for i in range(n // 70))
        + b"}"
    ),
}


def work(text: bytes, limits: Any = OWN) -> int:
    """Calls of functions, in Python and in C, that parsing a header takes."""
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        with contextlib.suppress(errors.LrcError):
            container.parse_header(text, 0, limits, Path("x"))
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("shape", SHAPES)
def test_headers_are_parsed_in_linear_time(shape: str) -> None:
    """Twice the text, twice the calls; tests of strictjson show the same for the scan, which makes no calls."""
    make = SHAPES[shape]
    assert work(make(80_000)) <= 2.2 * work(make(40_000)) + 50


@pytest.mark.parametrize("shape", SHAPES)
def test_headers_take_memory_in_proportion(shape: str, tmp_path: Path) -> None:
    text = SHAPES[shape](400_000)
    (tmp_path / "x").write_bytes(with_header(text))
    with watched() as seen, contextlib.suppress(errors.LrcError):
        container.ContainerFile(tmp_path / "x")
    assert seen.peak <= 40 * len(text), seen.peak / len(text)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_headers_just_under_the_cap(shape: str, tmp_path: Path) -> None:
    """8 MiB of header, of which there is nothing that anyone would wait for: it is read once, in one call."""
    text = SHAPES[shape](OWN.header_bytes - 2000)
    assert OWN.header_bytes - 700_000 < len(text) <= OWN.header_bytes
    (tmp_path / "x").write_bytes(with_header(text))
    with watched(memory=False) as seen, contextlib.suppress(errors.LrcError):
        container.ContainerFile(tmp_path / "x", OWN)
    assert seen.nbytes == 8 + len(text) and seen.calls == 2


def test_lists_by_the_million_are_refused_before_they_are_parsed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(with_header(SHAPES["lists"](16_000_000)))
    with watched() as seen, pytest.raises(errors.LimitError, match="objects and lists"):
        container.ContainerFile(path, FOREIGN)
    assert seen.peak <= 4 * 16_000_000


def test_many_dimensions_and_deep_patterns(tmp_path: Path) -> None:
    """What is too long for a case: 100,000 dimensions, and groups in groups until the parser gives up."""
    (tmp_path / "x").write_bytes(with_header({"a": hostile.entry(shape=(1,) * 100_000)}, b"1234"))
    with pytest.raises(errors.ShapeError) as caught:
        container.ContainerFile(tmp_path / "x")
    check_message(caught.value, tmp_path)
    for depth in (10, 100, 300, 490):
        write_files(tmp_path, hostile.lora(rank_pattern={"(" * depth + "a" + ")" * depth: 2}))
        with contextlib.suppress(errors.PatternError):
            api.load_lora(tmp_path)


BOMBS = [path for path, case in CASES.items() if case.id == "H19"]


@pytest.mark.parametrize("path", BOMBS)
def test_bombs_take_no_memory(path: str, hostile_files: Path) -> None:
    """What claims terabytes is refused in less than a megabyte."""
    with watched() as seen, pytest.raises(errors.LrcError):
        api.load(hostile_files / path)
    assert seen.peak < 1 << 20 or path == "H19-rank", seen.peak


def test_a_bomb_has_one_finding(hostile_files: Path) -> None:
    """What cannot be known without the shapes is not reported as well."""
    assert [finding.code for finding in api.validate(hostile_files / "H19-shapes.lrc").findings] == ["E-LIMIT"]


# --- H23, H24: links ------------------------------------------------------------------------------------------------


def test_links_that_leave_the_folder(tmp_path: Path) -> None:
    """A shard, the only weights, or a whole folder above them may be a link; what lies outside is not read."""
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(hostile.tensors(a=hostile.zeros(2)))
    for n, files in enumerate((hostile.sharded({"a": "m.safetensors"}), {})):
        root = write_files(tmp_path / str(n), files)
        (root / ("m.safetensors" if files else SINGLE_NAME)).symlink_to(outside)
        with watched() as seen, pytest.raises(errors.ShardPathError) as caught:
            open_checkpoint(root)
        check_message(caught.value, root)
        assert not [p for _, p in seen.named("open") if "outside" in p]
    real = write_files(tmp_path / "real", {SINGLE_NAME: outside.read_bytes()})
    (tmp_path / "alias").symlink_to(real)  # the user's own: given, not found in a file
    with open_checkpoint(tmp_path / "alias") as base:
        assert set(base.tensors) == {"a"}


def test_links_out_of_the_folder_are_not_copied(tmp_path: Path) -> None:
    """A merge copies the other files of a base, but not what a link fetches from elsewhere, nor its code's output."""
    made = plain_folders(tmp_path)
    (tmp_path / "secret").write_text("secret")
    (made["base"] / "tokenizer.json").symlink_to(tmp_path / "secret")
    (made["base"] / "vocab").symlink_to(tmp_path / "lora")
    report = api.merge(made["base"], made["lora"], tmp_path / "out")
    assert set(report.left_out) == {"tokenizer.json", "vocab/"}
    written = [name for name in sorted(tree(tmp_path / "out")) if not name.startswith(".lrconvert/")]
    assert written == ["config.json", "m.safetensors", INDEX_NAME]


# --- H28: the network -----------------------------------------------------------------------------------------------


def test_nothing_goes_out(
    hostile_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every verb on files full of URLs and class names, with sockets that refuse: none is made, nothing is started."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    adapter, lrc = hostile_files / "H28-names-of-code", tmp_path / "x.lrc"
    remote = {"auto_map": {"AutoModel": "org/repo--antigravity.Model"}, "model_type": "antigravity"}
    config = {**remote, "_name_or_path": "https://evil.invalid/x"}
    model = write_files(tmp_path / "base", hostile.base(SHARD, config))
    with watched() as seen:
        for words in (
            ["inspect", adapter],
            ["lora-to-lowrank", adapter, "-o", lrc, "--bits", "12", "--base", model],
            ["validate", lrc, "--base", model],
            ["inspect", lrc],
            ["inspect", hostile_files / "H28-hints.lrc"],
            ["compare", adapter, lrc],
            ["merge", model, lrc, "-o", tmp_path / "merged"],
            ["export", lrc, "-o", tmp_path / "folder", "--to", "peft-lora"],
        ):
            assert run_cli(*words) == 0, (words[0], capfd.readouterr())
    assert seen.named(*_HARMFUL) == []
    assert not [what for _, what in seen.named("import") if what == "antigravity"]
    assert not [what for _, what in seen.named("open") if "passwd" in what]


# --- H29: files that change -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["cut", "grown", "rewritten", "replaced"])
def test_files_that_change_while_they_are_read(change: str, tmp_path: Path) -> None:
    """The file changes before each of its reads in turn: refused, or read as one of its two states."""
    good = GOLDEN.read_bytes()
    path = tmp_path / "x.lrc"

    def alter() -> None:
        if change == "cut":
            os.truncate(path, len(good) // 2)
        elif change == "grown":
            with path.open("ab") as out:
                out.write(b"more")
        elif change == "rewritten":
            with path.open("r+b") as out:
                out.write(bytes(len(good)))
        else:
            (tmp_path / "new").write_bytes(bytes(len(good)))
            (tmp_path / "new").replace(path)

    real = os.preadv
    codes: list[str] = []
    for number in range(1, 10):
        path.write_bytes(good)
        os.utime(path, ns=(10**9, 10**9))  # so that any change is seen, however coarse the clock
        calls = 0

        def altering(*arguments: Any, number: int = number) -> int:
            nonlocal calls
            calls += 1
            if calls == number:
                alter()
            return real(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "preadv", altering)
            try:
                api.read(path)
                codes.append("")
            except errors.LrcError as error:
                codes.append(error.code)
        if calls < number:
            break
    assert calls < number and codes[-1] == ""
    if change == "replaced":  # the open file is the old one
        assert set(codes) == {""}
    else:
        assert "" not in codes[:-1], codes


@pytest.mark.parametrize("error", [errno.EACCES, errno.EIO, errno.ELOOP, errno.EMFILE])
def test_files_that_cannot_be_opened(error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = plain_folders(tmp_path)

    def fail(*arguments: Any) -> int:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(container.os, "open", fail)
    with pytest.raises(errors.LrcError) as caught:
        api.read(made["file"])
    assert caught.value.code == "E-IO-KIND"
    check_message(caught.value, tmp_path)


def test_reads_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The n-th read of each file gives an I/O error, or only some of its bytes."""
    made = plain_folders(tmp_path)
    real = os.preadv
    state = {"left": 0}

    def failing(*arguments: Any) -> int:
        state["left"] -= 1
        if state["left"] == 0:
            raise OSError(errno.EIO, "Input/output error")
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", failing)
    for n in range(1, 100):
        state["left"] = n
        try:
            read_all(made)
        except errors.LrcError as error:
            check_message(error, tmp_path)
            assert error.code == "E-IO-READ" or n > 1, error
        if state["left"] > 0:
            break
    assert 8 < n < 60
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: real(fd, [buffers[0][:7]], at))
    read_all(made)


# --- H33: two writers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_writers(overwrite: bool, tmp_path: Path) -> None:
    """Both begin, then both finish: one of the two files is there, whole; without --overwrite the other one is told."""
    path = tmp_path / "x.lrc"
    made = [api.convert(random_lora(seed=n), "lowrank", bits=4).compact for n in (1, 2)]
    whole = [b"".join(file.encode(compact)) for compact in made]
    gate, results = threading.Barrier(2), []
    waited = set()
    real = os.fsync

    def together(descriptor: int) -> None:
        if threading.get_ident() not in waited:  # both have written, neither has its name yet
            waited.add(threading.get_ident())
            gate.wait(60)
        real(descriptor)

    def work(compact: Any) -> None:
        try:
            api.write(compact, path, overwrite=overwrite)
            results.append("")
        except errors.LrcError as error:
            results.append(error.code)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", together)
        threads = [threading.Thread(target=work, args=(compact,)) for compact in made]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(results) == (["", ""] if overwrite else ["", "E-OUT-EXISTS"])
    assert path.read_bytes() in whole and [p.name for p in tmp_path.iterdir()] == ["x.lrc"]


def test_leftovers_are_in_nobodys_way(tmp_path: Path) -> None:
    """Parts that a killed process left lie under hidden names: they are not read, and stop no one."""
    made = plain_folders(tmp_path)
    (tmp_path / ".x.lrc.1.0badcafe.tmp").write_bytes(b"half")
    (tmp_path / ".out.1.0badcafe.partial").mkdir()
    (made["base"] / ".m.safetensors.1.0badcafe.tmp").write_bytes(b"half")
    api.write(api.convert(random_lora(), "lowrank", bits=4).compact, made["file"], overwrite=True)
    api.merge(made["base"], made["lora"], tmp_path / "out")
    read_all({**made, "base": tmp_path / "out"})
    assert (tmp_path / ".x.lrc.1.0badcafe.tmp").read_bytes() == b"half"


# --- H35, H36 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [["inspect"], ["inspect", "--json"], ["lora-to-lowrank", "--bits", "12", "--dry-run", "-v"]]
)
def test_nothing_moves_the_cursor(words: list[str], hostile_files: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Names, hints and patterns full of escapes: what is printed has none."""
    assert run_cli(words[0], hostile_files / "H35-escapes", *words[1:]) == 0
    out, err = capfd.readouterr()
    assert out and all(line.isprintable() for line in (out + err).splitlines()), repr(out + err)


@pytest.mark.medium
@pytest.mark.parametrize(
    "environment", [{"PYTHONHASHSEED": "77", "LC_ALL": "C", "TZ": "Asia/Tokyo"}, {"PYTHONHASHSEED": "1"}]
)
def test_same_bytes_of_vblora_everywhere(environment: dict[str, str], tmp_path: Path) -> None:
    """A fit with random numbers in it: hash seed, locale and time zone change no byte."""
    command = [sys.executable, "-m", "lrconvert", "lora-to-vblora", str(ADAPTERS / "vit-query-value"), "-q"]
    command += ["--num-vectors", "32", "--vector-length", "8"]
    for name, given in (("one", {"PYTHONHASHSEED": "0"}), ("two", environment)):
        output = str(tmp_path / f"{name}.lrc")
        subprocess.run([*command, "-o", output], check=True, env={**os.environ, "OMP_NUM_THREADS": "1", **given})
    assert (tmp_path / "one.lrc").read_bytes() == (tmp_path / "two.lrc").read_bytes()
