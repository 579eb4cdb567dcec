"""The servers' own code with our plugins, no GPU and no engine. A peer without an environment is skipped by name: see
tests/peers/README.md."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ADAPTERS, BASES
from peers import make, oracle, table

import lrconvert

pytestmark = pytest.mark.slow

LLAMA = BASES / "tiny-llama"
FORMS = {"lowrank": {"bits": 12}, "sbora": {"bits": 8}, "vblora": {}, "bone": {"rank": 4}}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store with a file of each form, one that is broken, one of another base and one of a large rank."""
    folder = tmp_path / "store"
    folder.mkdir()
    for form, options in FORMS.items():
        lrconvert.write(
            lrconvert.convert(ADAPTERS / "llama-plain", form, base=LLAMA, **options), folder / f"{form}.lrc"
        )
    (folder / "broken.lrc").write_bytes((folder / "lowrank.lrc").read_bytes()[:-9])
    other = lrconvert.convert(ADAPTERS / "bert-classifier", "lowrank", bits=12)
    lrconvert.write(other, folder / "other.lrc")
    wide = lrconvert.convert(ADAPTERS / "llama-plain", "sbora", variant="fa", rank=20, bits=8)
    lrconvert.write(wide, folder / "wide.lrc")
    monkeypatch.setenv("LRCONVERT_STORE", str(folder))
    monkeypatch.setenv("LRCONVERT_CACHE", str(tmp_path / "cache"))
    for name in ("VLLM_PLUGINS", "LRCONVERT_DTYPE", "LRCONVERT_MAX_RANK", "LRCONVERT_BASE_NAMES"):
        monkeypatch.delenv(name, raising=False)
    return folder


def ask_vllm(*names: str, max_lora_rank: int = 16) -> list[dict[str, Any]]:
    """What the loader of plugins finds, what each name leads to, and what the engine has got in the end."""
    oracle.needed("vllm")
    asked = {"names": names, "max_lora_rank": max_lora_rank}
    printed = oracle.run("vllm_plugin", LLAMA, text=json.dumps(asked))
    answers: list[dict[str, Any]] = json.loads(printed.strip().splitlines()[-1])
    return answers


@pytest.mark.parametrize("peer", ["vllm"])
def test_vllm_loads_the_plugin_and_what_it_gives(peer, store, tmp_path, monkeypatch):
    """The loader finds the entry point, the registry has one resolver, `resolve_lora` loads every form through vLLM's
    own checks, with the norm of each update; names asked for at once are loaded once; a rank that is too large is
    reduced where that is asked for."""
    monkeypatch.setenv("LRCONVERT_MAX_RANK", "16")
    loader, *answers, wide, engine = ask_vllm(*FORMS, "lowrank", "lowrank", "wide")
    assert wide["code"] == 200 and [one["rank"] for one in engine["loaded"] if one["name"] == "wide"] == [16]
    engine["loaded"] = [one for one in engine["loaded"] if one["name"] != "wide"]
    engine["cards"].remove("wide")
    assert loader == {"found": ["lrconvert"], "resolvers": ["lrconvert"], "once": True, "is_resolver": True}
    assert [answer["code"] for answer in answers] == [200] * 6
    assert sorted(one["name"] for one in engine["loaded"]) == sorted(FORMS)
    assert sorted(engine["cards"]) == sorted([*FORMS, "base"])
    assert len({answer["id"] for answer in answers}) == len(FORMS)
    for one in engine["loaded"]:
        path = store / f"{one['name']}.lrc"
        rows = lrconvert.inspect(path)["targets"]
        expected = {row["name"].removesuffix(".weight"): row["norm"] for row in rows if row["norm"]}
        norms = {name: norm for name, norm in one["norms"].items() if norm}
        assert norms == pytest.approx(expected, rel=1e-4)
    (answer,) = {answer["path"] for answer in answers if answer["name"] == "lowrank"}
    assert Path(answer) == lrconvert.expanded(store / "lowrank.lrc", tmp_path / "cache", max_rank=16)


@pytest.mark.parametrize("peer", ["vllm"])
def test_vllm_answers_404_and_400(peer, store):
    """Unknown names, and those that lead out, are not found; what is there and no good is a bad request, with the
    reason; the engine hears of none of them."""
    _, absent, outside, broken, other, wide, engine = ask_vllm("absent", "../store/lowrank", "broken", "other", "wide")
    assert [(one["code"], one["type"]) for one in (absent, outside)] == [(404, "NotFoundError")] * 2
    assert [(one["code"], one["type"]) for one in (broken, other, wide)] == [(400, "BadRequestError")] * 3
    assert "'broken' cannot be served: E-" in broken["message"]
    assert "'other' cannot be served: E-FPR" in other["message"]
    assert "found but could not be loaded" in wide["message"]  # by the engine: rank 20, and 16 are allowed
    assert engine["loaded"] == []


@pytest.mark.parametrize("peer", ["dynamo"])
def test_dynamo_downloads_through_its_manager(peer, store, monkeypatch, tmp_path):
    """`LoRAManager.download_lora` with the runtime's own downloader beside our source."""
    oracle.needed("dynamo")
    monkeypatch.setenv("DYN_LORA_ENABLED", "true")
    monkeypatch.setenv("DYN_LORA_PATH", str(tmp_path / "dynamo"))
    uris = [f"lrconvert://{name}" for name in ("lowrank", "absent", "../store/lowrank", "broken")]
    one, absent, outside, broken = json.loads(oracle.run("dynamo", text=json.dumps(uris)).strip().splitlines()[-1])
    folder = lrconvert.expanded(store / "lowrank.lrc", tmp_path / "cache")
    assert one == {"status": "success", "local_path": str(folder)}
    assert absent == {"status": "error", "message": "LoRA not found at lrconvert://absent"}
    assert outside["status"] == "error" and "not found" in outside["message"]
    assert "'broken' cannot be served: E-" in broken["message"]


@pytest.mark.parametrize("peer", ["dynamo"])
def test_dynamo_is_of_the_version_that_the_docs_name(peer):
    assert make.version(peer) == "1.6.1"


@pytest.mark.parametrize("peer", ["sglang"])
def test_sglang_loads_an_expansion_by_request(peer, store, tmp_path):
    """The folder is loaded with its updates, and the request of the docs is one that the server has."""
    library = oracle.needed("sglang")
    folder = lrconvert.expanded(store / "lowrank.lrc", tmp_path / "cache")
    (answer,) = oracle.ask("sglang", [(folder, {})], LLAMA)
    assert answer["outcome"] == "loads", answer
    rows = lrconvert.inspect(store / "lowrank.lrc")["targets"]
    total = sum(row["norm"] ** 2 for row in rows)
    assert sum(norm**2 for norm in answer["norms"].values()) == pytest.approx(total, rel=1e-4)
    struct = library / "sglang" / "srt" / "managers" / "io_struct.py"
    if not struct.exists():
        pytest.skip("the environment of sglang is of before this test: python tests/peers/make.py sglang")
    (request,) = [
        node
        for node in ast.parse(struct.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "LoadLoRAAdapterReqInput"
    ]
    names = {ast.unparse(n.target) for n in request.body if isinstance(n, ast.AnnAssign) and n.value is None}
    assert names == {"lora_name", "lora_path"}
    assert '"/load_lora_adapter"' in (library / "sglang" / "srt" / "entrypoints" / "http_server.py").read_text()


def test_ci_runs_these():
    assert "serving/test_serving_peers.py" in table.TESTS
