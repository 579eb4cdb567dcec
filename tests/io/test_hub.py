"""Hub ids in a cache made here: what they stand for, hostile caches, and every verb that takes one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ADAPTERS, BASES

import lrconvert
from lrconvert import api
from lrconvert.core import errors
from lrconvert.io import hub

COMMIT, OTHER = "0123456789" * 4, "01fe" + "a" * 36
ADAPTER, BASE = "acme/adapter", "acme/tiny.llama-1"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(folder))  # for processes; this one has read it already
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def repository(cache: Path, name: str) -> Path:
    return cache / f"models--{name.replace('/', '--')}"


def put(cache: Path, name: str, source: Path, commit: str = COMMIT, ref: str = "main") -> Path:
    """`source` as huggingface_hub would have downloaded it; returns the snapshot."""
    place = repository(cache, name)
    snapshot = place / "snapshots" / commit
    for folder in (snapshot, place / "blobs", (place / "refs" / ref).parent):
        folder.mkdir(parents=True, exist_ok=True)
    for n, path in enumerate(sorted(p for p in source.iterdir() if p.name != "expected.safetensors")):
        (place / "blobs" / f"{commit}{n}").write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{commit}{n}")
    if ref:
        (place / "refs" / ref).write_text(commit)
    return snapshot


@pytest.fixture
def adapter(cache):
    return put(cache, ADAPTER, ADAPTERS / "llama-plain")


@pytest.fixture
def base(cache):
    return put(cache, BASE, BASES / "tiny-llama")


def run(*words):
    return subprocess.run(
        [sys.executable, "-m", "lrconvert.cli", *map(str, words)], capture_output=True, text=True, check=False
    )


# --- what an id stands for ------------------------------------------------------------------------------------------


def test_ids():
    assert hub.parse("org/name") == hub.HubId("org/name", "main")
    assert hub.parse("org/na.me_1@refs/pr/3") == hub.HubId("org/na.me_1", "refs/pr/3")
    assert hub.parse("gpt2") == hub.HubId("gpt2")
    for text in (
        *("", "/org/name", "org/name/sub", "org//name", "../name", "org/..", "org/.name", "~/name", "org/name/"),
        *("org/na--me", "org/na..me", "C:\\x", "org/name@", "@main", "o r/name", f"org/{'n' * 100}", "org/name\n"),
        *(f"org/name@{'r' * 300}", "hf://org/name", "örg/name"),
    ):
        assert hub.parse(text) is None, text


def test_a_path_wins(adapter):
    assert hub.locate(ADAPTER) == adapter
    Path(ADAPTER).mkdir(parents=True)
    assert hub.locate(ADAPTER) == Path(ADAPTER)
    assert hub.locate("org/name/sub") == Path("org/name/sub")  # no id: whoever reads it says that it is absent


def test_what_is_written_of_an_input(adapter):
    """Ids are public; of a path, even one that looks like an id, only the last part is."""
    assert hub.hint(ADAPTER) == ADAPTER and hub.hint(f"{ADAPTER}@0123") == f"{ADAPTER}@0123"
    assert hub.hint("customers/secret") == "secret" and hub.hint(Path("/home/me/x.lrc")) == "x.lrc"
    Path(ADAPTER).mkdir(parents=True)
    assert hub.hint(ADAPTER) == "adapter"


def test_a_link_that_leads_nowhere_is_a_path(adapter):
    Path("acme").mkdir()
    Path(ADAPTER).symlink_to("absent")
    assert hub.locate(ADAPTER) == Path(ADAPTER)


def test_words_are_names_of_files_unless_they_are_cached(cache):
    assert hub.locate("gpt2") == Path("gpt2")
    snapshot = put(cache, "gpt2", BASES / "tiny-gpt2")
    assert hub.locate("gpt2") == snapshot


def test_revisions(cache):
    old = put(cache, ADAPTER, ADAPTERS / "llama-plain", OTHER, "v1.0")
    new = put(cache, ADAPTER, ADAPTERS / "llama-plain", COMMIT, "refs/pr/1")
    assert hub.locate(f"{ADAPTER}@v1.0") == old
    assert hub.locate(f"{ADAPTER}@refs/pr/1") == new
    assert hub.locate(f"{ADAPTER}@{COMMIT}") == hub.locate(f"{ADAPTER}@0123") == new
    assert hub.locate(Path(f"{ADAPTER}@{OTHER[:5]}")) == old
    with pytest.raises(errors.FileKindError, match=r"'main'.*refs/pr/1, v1.0, 012345678901.*hf download acme/adapter$"):
        hub.locate(ADAPTER)
    with pytest.raises(errors.FileKindError, match="--revision v2"):
        hub.locate(f"{ADAPTER}@v2")
    for text in ("012", f"{OTHER[:4]}0", "f" * 40, "V1.0 ", "."):
        with pytest.raises(errors.FileKindError, match="does not hold the revision"):
            hub.locate(f"{ADAPTER}@{text}")


def test_a_prefix_must_be_unique(cache):
    put(cache, ADAPTER, ADAPTERS / "llama-plain", COMMIT)
    put(cache, ADAPTER, ADAPTERS / "llama-plain", "0123456" + "b" * 33)
    with pytest.raises(errors.FileKindError, match="2 snapshots"):
        hub.locate(f"{ADAPTER}@0123456")
    assert hub.locate(f"{ADAPTER}@01234567").name == COMMIT


def test_a_full_hash_is_never_a_branch(cache):
    put(cache, ADAPTER, ADAPTERS / "llama-plain", COMMIT, ref="f" * 40)
    with pytest.raises(errors.FileKindError, match="does not hold"):
        hub.locate(f"{ADAPTER}@{'f' * 40}")


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HF_HOME": "~/y"}, "/home/me/y/hub"),
        ({}, "/home/me/.cache/huggingface/hub"),
    ],
)
def test_where_the_cache_is(variables, folder):
    code = "from lrconvert.io import hub; print(hub.cache())"
    environment = {"PATH": os.environ["PATH"], "HOME": "/home/me", **variables}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == folder


def test_the_same_snapshot_as_huggingface_hub(cache):
    from huggingface_hub import snapshot_download

    put(cache, ADAPTER, ADAPTERS / "llama-plain", OTHER, "v1.0")
    put(cache, ADAPTER, ADAPTERS / "llama-plain", COMMIT)
    for revision in ("main", "v1.0", COMMIT):
        theirs = snapshot_download(ADAPTER, revision=revision, local_files_only=True, cache_dir=cache)
        assert hub.locate(f"{ADAPTER}@{revision}") == Path(theirs)


# --- what is not there ----------------------------------------------------------------------------------------------


def test_not_in_the_cache(cache):
    with pytest.raises(errors.FileKindError, match=r"no such file or folder, and .* hf download acme/absent$"):
        hub.locate("acme/absent")
    put(cache, ADAPTER, ADAPTERS / "llama-plain")
    (repository(cache, ADAPTER) / "refs" / "main").write_text(OTHER)
    with pytest.raises(errors.FileKindError, match="knows 'main' of it, but holds no file"):
        hub.locate(ADAPTER)


def test_broken_downloads(cache, adapter, base):
    blob = (adapter / "adapter_model.safetensors").resolve()
    blob.unlink()
    with pytest.raises(errors.FileKindError, match=r"incomplete .*'adapter_model.safetensors' is missing"):
        hub.locate(ADAPTER)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(errors.FileKindError, match="weights is missing"):
        hub.locate(ADAPTER)
    for weights in base.glob("*.safetensors*"):
        weights.unlink()
    assert hub.locate(BASE) == base  # config.json is enough for some commands
    begun = repository(cache, BASE) / "blobs" / "abc.incomplete"
    begun.touch()
    with pytest.raises(errors.FileKindError, match="weights is missing"):
        hub.locate(BASE)
    begun.unlink()
    (base / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors", "b": 3}}')
    with pytest.raises(errors.FileKindError, match=r"'model-1.safetensors' is missing"):
        hub.locate(BASE)


# --- hostile caches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "main", "../../x", COMMIT[:12], COMMIT.replace("a", "A") + "0", "\x00" * 40])
def test_refs_are_commits(cache, adapter, text):
    (repository(cache, ADAPTER) / "refs" / "main").write_text(text)
    with pytest.raises(errors.ShardPathError, match="not a commit"):
        hub.locate(ADAPTER)


def test_refs_are_read_to_a_limit_and_follow_no_link(cache, adapter, tmp_path):
    ref = repository(cache, ADAPTER) / "refs" / "main"
    ref.write_text(COMMIT + " " * 1000)
    with pytest.raises(errors.LimitError):
        hub.locate(ADAPTER)
    (tmp_path / "elsewhere").write_text(COMMIT)
    ref.unlink()
    ref.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(errors.ShardPathError):
        hub.locate(ADAPTER)


@pytest.mark.parametrize("revision", ["../refs/main", "/etc/passwd", "a/../../x", "..", "..\\x", "a\x1b[31m"])
def test_revisions_are_names(adapter, revision):
    with pytest.raises(errors.ShardPathError, match="not the name of a branch") as caught:
        hub.locate(f"{ADAPTER}@{revision}")
    assert str(caught.value).isprintable()


def relink(path: Path, target: Path | str) -> None:
    path.unlink()
    path.symlink_to(target)


@pytest.mark.parametrize("through_blob", [False, True])
@pytest.mark.parametrize("what", ["/etc/passwd", "another model", "a file beside the models", "a false store"])
def test_links_stay_in_the_model(cache, adapter, base, what, through_blob):
    (cache / "loose").write_text("{}")
    (cache / "blobs" / "ab").mkdir(parents=True)
    (cache / "blobs" / "ab" / "secret").write_text("{}")
    target = {
        "/etc/passwd": "/etc/passwd",
        "another model": (base / "config.json").resolve(),
        "a file beside the models": cache / "loose",
        "a false store": cache / "blobs" / "ab" / "secret",
    }[what]
    link = adapter / "adapter_config.json"
    relink(repository(cache, ADAPTER) / "blobs" / Path(link.readlink()).name if through_blob else link, target)
    for text in (ADAPTER, f"{ADAPTER}@{COMMIT}"):
        with pytest.raises(errors.ShardPathError, match="leaves the model's folder"):
            lrconvert.load(text)


def test_the_store_that_models_share_is_followed(cache, adapter):
    """Layout of huggingface_hub 2: the model's blob is a link to a file named by its content."""
    digest = "ab" + "c" * 62
    shared = cache / "blobs" / "ab" / digest
    shared.parent.mkdir(parents=True)
    blob = (adapter / "adapter_model.safetensors").resolve()
    blob.rename(shared)
    blob.symlink_to(f"../../blobs/ab/{digest}")
    assert lrconvert.inspect(ADAPTER) == lrconvert.inspect(ADAPTERS / "llama-plain")


def test_snapshots_are_folders_of_their_own(cache, adapter, base):
    other = adapter.with_name(OTHER)
    other.symlink_to(adapter)
    with pytest.raises(errors.ShardPathError):
        hub.locate(f"{ADAPTER}@{OTHER}")
    relink(other, base)
    with pytest.raises(errors.ShardPathError):
        hub.locate(f"{ADAPTER}@{OTHER}")
    other.unlink()
    other.write_text("a file")
    with pytest.raises(errors.ShardPathError):
        hub.locate(f"{ADAPTER}@{OTHER}")
    (adapter / "inside").symlink_to("/etc")
    with pytest.raises(errors.ShardPathError, match="leaves"):
        hub.locate(ADAPTER)
    relink(adapter / "inside", "inside")
    with pytest.raises(errors.ShardPathError):
        hub.locate(ADAPTER)


def test_a_cache_that_cannot_be_read(adapter, monkeypatch):
    monkeypatch.setattr(Path, "is_dir", lambda self: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(errors.FileReadError, match="Permission denied"):
        hub.locate(ADAPTER)


# --- verbs ----------------------------------------------------------------------------------------------------------


def test_every_verb_takes_ids(adapter, base, tmp_path):
    lora = api.load_lora(ADAPTER)
    done = api.convert(lora, "lowrank", bits=12, base=BASE)
    plain = api.convert(api.load_lora(ADAPTERS / "llama-plain"), "lowrank", bits=12, base=BASES / "tiny-llama")
    api.write(done.compact, "x.lrc")
    api.write(plain.compact, "y.lrc")
    assert Path("x.lrc").read_bytes() == Path("y.lrc").read_bytes()
    assert api.validate("x.lrc", base=BASE).ok
    assert api.compare(ADAPTER, ["x.lrc"])[0].captured > 0.99
    assert api.check(ADAPTER, ("vllm",), base=BASE) == api.check(adapter, ("vllm",), base=base)
    api.export("x.lrc", "exported", to="peft-lora", source=ADAPTER)
    api.merge(BASE, ADAPTER, "merged")
    api.merge(BASES / "tiny-llama", adapter, "merged too")
    assert api.verify("merged", BASE, ADAPTER).ok
    api.unmerge("merged", "restored", from_base=BASE)
    with pytest.raises(errors.OutputPathError):
        api.unmerge(base)  # in place, that would be
    for path in (BASES / "tiny-llama").iterdir():
        assert (Path("merged") / path.name).read_bytes() == (Path("merged too") / path.name).read_bytes()


@pytest.mark.medium
def test_commands_take_ids_and_show_them(cache, adapter, base):
    words = ["lora-to-lowrank", ADAPTER, "-o", "x.lrc", "--bits", "12", "--base", f"{BASE}@main", "--json"]
    done = run(*words)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["source"] == ADAPTER
    assert json.loads(run("inspect", f"{ADAPTER}@0123", "--json").stdout)["path"] == f"{ADAPTER}@0123"
    for line in (
        ["validate", "x.lrc", "--base", BASE],
        ["compare", ADAPTER, "x.lrc"],
        ["check", ADAPTER, "--for", "peft", "--base", BASE],
        ["export", "x.lrc", "-o", "out", "--to", "peft-lora", "--source", ADAPTER],
        ["merge", BASE, ADAPTER, "-o", "merged"],
    ):
        done = run(*line)
        assert done.returncode == 0, (line, done.stderr)
    assert f"--source {ADAPTER}" in Path("out/README.md").read_text()
    for folder in ("x.lrc", "out", "merged"):
        written = [Path(folder)] if Path(folder).is_file() else [p for p in Path(folder).rglob("*") if p.is_file()]
        assert not [p for p in written if str(cache).encode() in p.read_bytes()]


def test_refusals_are_one_line(adapter):
    for text, code in (("acme/absent", "E-IO-KIND"), (f"{ADAPTER}@v9", "E-IO-KIND"), (f"{ADAPTER}@../x", "E-PATH")):
        done = run("lora-to-lowrank", text, "-o", "x.lrc")
        assert done.returncode == 1 and done.stderr.startswith(f"{code}: {text}: "), done.stderr
        assert len(done.stderr.strip().splitlines()) == 1 and not Path("x.lrc").exists()


def test_nothing_is_written_into_the_cache(cache, adapter, base):
    before = sorted(cache.rglob("*"))
    compact = api.convert(api.load_lora(ADAPTER), "lowrank", bits=12).compact
    api.write(compact, "x.lrc")
    Path("alias").symlink_to(cache)
    for out in (adapter / "out", cache / "out", cache / "new" / "out", Path("alias/out")):
        for write in (
            lambda out=out: api.write(compact, out),
            lambda out=out: api.upgrade("x.lrc", out),
            lambda out=out: api.export("x.lrc", out, to="peft-lora"),
            lambda out=out: api.merge(BASE, ADAPTER, out),
        ):
            with pytest.raises(errors.OutputPathError):
                write()
        done = run("lora-to-lowrank", ADAPTER, "-o", out, "--bits", "12")
        assert done.returncode == 1 and "E-OUT-PATH" in done.stderr and "cache" in done.stderr
    for change in (
        lambda: api.merge(base, ADAPTER, in_place=True),
        lambda: api.unmerge(base, in_place=True),
        lambda: api.recover(base),
    ):
        with pytest.raises(errors.OutputPathError):
            change()
    assert sorted(cache.rglob("*")) == before


def test_ids_cost_few_imports_and_no_network(adapter):
    """Of the hub's library its constants alone are loaded, so nothing can be fetched."""
    code = (
        "import sys, socket\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "import lrconvert\n"
        f"lrconvert.inspect({ADAPTER!r})\n"
        "try: lrconvert.inspect('acme/absent')\n"
        "except lrconvert.LrcError: pass\n"
        "heavy = ('torch', 'transformers', 'huggingface_hub.utils', 'requests', 'httpx', 'httpx2')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_bases_in_the_store_that_models_share(cache, base):
    for n, link in enumerate(sorted(base.iterdir())):
        digest = f"{n:02x}" + "c" * 62
        shared = cache / "blobs" / digest[:2] / digest
        shared.parent.mkdir(parents=True)
        blob = link.resolve()
        blob.rename(shared)
        blob.symlink_to(f"../../blobs/{digest[:2]}/{digest}")
    api.merge(BASE, ADAPTERS / "llama-plain", "merged")
    assert {p.name for p in (BASES / "tiny-llama").iterdir()} <= {p.name for p in Path("merged").iterdir()}
