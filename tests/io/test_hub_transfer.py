"""Uploads to a hub and downloads from it, by real commands against a hub on this machine; and that nothing is sent
where it is not asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ADAPTERS, BASES, ROOT
from huggingface_hub.repocard import metadata_load

from lrconvert import api
from lrconvert.core import errors
from lrconvert.io import hub_transfer
from lrconvert.testing.hub_server import Hub, serving

pytestmark = pytest.mark.medium  # every command is a process of its own

TOKEN = "hf_" + "x9" * 12
PLAIN = ADAPTERS / "llama-plain"
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def hub() -> Iterator[Hub]:
    base = {path.name: path.read_bytes() for path in (BASES / "tiny-llama").iterdir()}
    adapter = {path.name: path.read_bytes() for path in PLAIN.iterdir() if path.name != "expected.safetensors"}
    adapter |= {"optimizer.pt": b"x" * 1000, "checkpoint-1/adapter_model.safetensors": b"x"}
    with serving(Hub({"org/base": base, "org/adapter": adapter})) as made:
        yield made


@pytest.fixture
def run(hub: Hub, tmp_path: Path) -> Run:
    """Run `lrconvert` with the hub, a cache of its own, and a token."""

    def run(*words: object, **changes: str) -> subprocess.CompletedProcess[str]:
        settings = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "PYTHONPATH": str(ROOT),
            **changes,
        }
        done = subprocess.run(
            [sys.executable, "-m", "lrconvert", *map(str, words)],
            env={**os.environ, **settings},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert TOKEN not in done.stdout + done.stderr and "Traceback" not in done.stderr, done.stderr
        return done

    return run


def test_what_is_exported_is_uploaded(run: Run, hub: Hub, tmp_path: Path) -> None:
    """The folder, byte for byte, in one commit; again into the same repository; the token is sent, and kept nowhere."""
    words = (
        "export",
        PLAIN,
        "-o",
        "out",
        "--to",
        "peft-lora",
        "--push-to-hub",
        "me/small",
        "--base-model-id",
        "org/base",
    )
    done = run(*words)
    assert done.returncode == 0 and f"uploaded to {hub.url}/me/small" in done.stdout, done.stderr
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert hub.repositories["me/small"] == {".gitattributes": b"", **written}
    assert f"Bearer {TOKEN}" in hub.tokens
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    front = metadata_load(tmp_path / "out" / "README.md")
    assert front is not None and front["base_model_relation"] == "adapter" and front["library_name"] == "peft"
    assert 'PeftModel.from_pretrained(base, "me/small")' in written["README.md"].decode()
    assert run(*words, "--overwrite").returncode == 0
    assert sum("/commit/" in request for request in hub.requests) == 2


def test_without_a_folder_and_private(run: Run, hub: Hub, tmp_path: Path) -> None:
    done = run("export", PLAIN, "--to", "mlx", "--push-to-hub", "me/private", "--private")
    assert done.returncode == 0 and "wrote" not in done.stdout, done.stderr
    assert "adapters.safetensors" in hub.repositories["me/private"] and hub.private == {"me/private"}
    assert {path.name for path in tmp_path.iterdir()} <= {"home", "cache"}


@pytest.mark.parametrize(
    "words", [("--push-to-hub", "me/x", "--to", "raw"), ("--to", "raw", "-o", "out", "--download")]
)
def test_offline_nothing_is_sent(run: Run, hub: Hub, tmp_path: Path, words: tuple[str, ...]) -> None:
    done = run("export", "org/adapter" if "--download" in words else PLAIN, *words, HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and "E-HUB: HF_HUB_OFFLINE is set" in done.stderr
    assert hub.requests == [] and not (tmp_path / "out").exists()


def test_nothing_is_sent_unless_asked(run: Run, hub: Hub) -> None:
    done = run("inspect", "org/adapter")
    assert done.returncode == 1 and "--download" in done.stderr and hub.requests == []


def test_an_adapter_is_downloaded_once(run: Run, hub: Hub, tmp_path: Path) -> None:
    """Without the files that are no adapter; afterwards it is there without a hub."""
    done = run("inspect", "org/adapter", "--download", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["path"] == "org/adapter", done.stderr
    assert "downloading org/adapter: " in done.stderr
    got = {path.name for path in (tmp_path / "cache").rglob("snapshots/*/*")}
    assert "adapter_model.safetensors" in got and not got & {"optimizer.pt", "checkpoint-1"}
    assert run("inspect", "org/adapter", HF_HUB_OFFLINE="1").returncode == 0


def test_of_a_base_no_more_than_is_needed(run: Run, hub: Hub, tmp_path: Path) -> None:
    """Its config.json where that is enough, then its weights beside it, for a merge."""
    done = run("export", PLAIN, "-o", "out", "--to", "gguf", "--base", "org/base", "--download")
    assert done.returncode == 0 and (tmp_path / "out" / "adapter.gguf").exists(), done.stderr
    assert {r.rpartition("/")[2] for r in hub.requests if "/resolve/" in r} == {"config.json"}
    done = run("merge", "org/base", f"{PLAIN}=0.5", "-o", "merged", "--download")
    assert done.returncode == 0 and (tmp_path / "merged" / "model.safetensors.index.json").exists(), done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("inspect", "org/nobody", "--download"), "the hub has no such model"),
        (("inspect", "org/adapter@v9", "--download"), "no such revision"),
        (("inspect", PLAIN, "--download"), "there is none"),
    ],
    ids=["no model", "no revision", "no hub id"],
)
def test_what_the_hub_does_not_have(run: Run, words: tuple[object, ...], said: str) -> None:
    done = run(*words)
    assert done.returncode == 1 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_a_refused_upload_leaves_the_folder_and_says_how_to_go_on(run: Run, hub: Hub, tmp_path: Path) -> None:
    hub.refusal = 403, f"the token {TOKEN} may not write here"
    done = run("export", PLAIN, "-o", "out", "--to", "raw", "--push-to-hub", "org/small")
    assert done.returncode == 1 and "E-HUB: org/small: the hub answers 403" in done.stderr, done.stderr
    assert "hf auth login" in done.stderr and (tmp_path / "out" / "lora.safetensors").exists()
    done = run("export", PLAIN, "-o", "two", "--to", "raw", "--push-to-hub", "org/s", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 1 and "E-HUB" in done.stderr and "hf upload org/s two" in done.stderr, done.stderr


@pytest.mark.parametrize("name", ["", "a/b/c", "org/name@main", "../x", "org/"])
def test_only_repositories_are_pushed_to(name: str, tmp_path: Path) -> None:
    with pytest.raises(errors.OptionError, match="does not name a repository"):
        api.export(PLAIN, tmp_path / "out", to="raw", push_to_hub=name)
    assert not (tmp_path / "out").exists()


def test_files_that_are_wanted() -> None:
    """Of an adapter its own files, of a base one set of weights, of a pipeline configurations."""
    base = ["config.json", "model.safetensors", "consolidated.safetensors", "pytorch_model.bin", "tokenizer.model"]
    wanted = hub_transfer._wanted
    assert wanted(base, "base", False) == ["config.json", "model.safetensors", "tokenizer.model"]
    assert wanted(base, "config", False) == ["config.json"]
    assert wanted(["config.json", "pytorch_model.bin"], "base", False) == []
    assert wanted(base, "adapter", False) == [] and wanted(["model_index.json"], "adapter", False) == []
    pipeline = ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    assert wanted(pipeline, "base", False) == ["model_index.json", "unet/config.json"]
    assert wanted(["a.bin", "adapter_config.json"], "adapter", False) == ["adapter_config.json"]
    assert wanted(["a.bin", "adapter_config.json"], "adapter", True) == ["a.bin", "adapter_config.json"]
    assert wanted(["x/adapter_config.json", "x/a.safetensors", "b.md"], "adapter", False) == [
        "x/adapter_config.json", "x/a.safetensors", "b.md"
    ]  # fmt: skip
