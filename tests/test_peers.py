"""`lrconvert check` against the programs themselves. A peer without an environment is skipped by name: see
tests/peers/README.md."""

from __future__ import annotations

import ast
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from conftest import ADAPTERS, BASES
from peers import make, oracle, table

from lrconvert.formats.compat import base, llamacpp, sglang, vllm

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("peer", make.loaders())
def test_the_peer_does_what_check_says(peer):
    oracle.needed(peer)
    count, lines = oracle.disagreements(peer)
    assert count > 10
    assert not lines


@pytest.mark.parametrize("peer", make.loaders())
def test_the_facts_are_of_the_version_that_runs(peer):
    assert base.get(peer).version.split()[-1] == make.version(peer)


def test_an_unfaithful_check_is_noticed(tmp_path):
    """The comparison itself: an answer that is right is not taken for wrong, and the other way round."""
    adapter = oracle.cases.plain()
    folder = adapter.write(tmp_path / "a")
    right = oracle.truth(folder, adapter)
    assert oracle.verdict({"outcome": "loads", "norms": right}, right, adapter) == "right"
    assert oracle.verdict({"outcome": "loads", "norms": {}}, right, adapter) == "wrong"
    doubled = {module: 2 * value for module, value in right.items()}
    assert oracle.verdict({"outcome": "loads", "norms": doubled}, right, adapter) == "wrong"
    assert oracle.verdict({"outcome": "refuses"}, right, adapter) == "refuses"


def test_what_cannot_be_had_is_skipped_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "ENVS", tmp_path)
    gone = subprocess.CalledProcessError(1, "pip", stderr="WARNING: slow\nERROR: nothing of that name\nhint: ask\n")
    for error, why in ((gone, "nothing of that name"), (subprocess.TimeoutExpired("pip", 9), "pip took more than")):
        monkeypatch.setattr(make, "_pip", lambda *words, error=error: (_ for _ in ()).throw(error))
        for peer in make.peers():
            assert why in table.reason(peer, ["all"])
            assert table.reason(peer, ["another"]) == "not in LRCONVERT_PEERS"
            assert make.environment(peer) is None


def test_the_table_of_peers():
    peer = make.peers()[0]
    assert table.line(peer, "no network", Counter()).endswith(" skipped: no network")
    counts = Counter({(peer, "passed"): 3, (peer, "failed"): 1})
    assert table.line(peer, "", counts).split()[:2] == [peer, make.version(peer)]
    assert table.line(peer, "", counts).endswith(" ran 4 tests, 1 FAILED")


def test_llamacpp_transposes_conv1d():
    oracle.needed("llamacpp")
    (answer,) = oracle.ask("llamacpp", [(ADAPTERS / "gpt2-conv1d", {})], BASES / "tiny-gpt2")
    assert answer["shapes"]["blk.0.attn_qkv"] == [48, 144]  # (out, in) of the weight are 144, 48
    assert answer["shapes"]["blk.0.attn_output"] == [48, 48]


def test_llamacpp_architectures():
    text = (oracle.needed("llamacpp") / "conversion" / "__init__.py").read_text()
    table = text[text.index("TEXT_MODEL_MAP") : text.index("MMPROJ_MODEL_MAP")]
    assert set(re.findall(r'^    "([^"]+)":', table, re.MULTILINE)) == llamacpp.ARCHITECTURES


def test_sglang_modules():
    text = (oracle.needed("sglang") / "sglang" / "srt" / "lora" / "utils.py").read_text()
    tree = ast.parse(text)
    (known,) = [
        n.value for n in ast.walk(tree) if isinstance(n, ast.Assign) and "_KNOWN_LORA" in ast.unparse(n.targets)
    ]
    names = {n.value for n in ast.walk(known) if isinstance(n, ast.Constant)}
    assert names <= sglang._KNOWN


def test_vllm_ranks_and_models():
    lib = oracle.needed("vllm") / "vllm"
    ranks = re.search(r"MaxLoRARanks = Literal\[([\d, ]+)\]", (lib / "config" / "lora.py").read_text())
    assert ranks and tuple(map(int, ranks[1].split(","))) == vllm.RANKS
    classes = _classes(lib / "model_executor" / "models")
    models = _text_models(lib / "model_executor" / "models" / "registry.py")
    assert {arch for arch, name in models.items() if not _is_a("SupportsLoRA", name, classes)} == vllm.NO_LORA
    capable = {arch: name for arch, name in models.items() if _is_a("SupportsLoRA", name, classes)}
    empty = {arch for arch, name in capable.items() if _embeddings(name, classes) in (None, "{}")}
    assert empty == vllm.NO_EMBEDDINGS


def _classes(folder: Path) -> dict[str, ast.ClassDef]:
    trees = [ast.parse(path.read_text()) for path in sorted(folder.rglob("*.py"))]
    return {n.name: n for tree in reversed(trees) for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}


def _parents(node: ast.ClassDef) -> list[str]:
    return [ast.unparse(parent).split("[")[0].split(".")[-1] for parent in node.bases]


def _is_a(wanted: str, name: str, classes: dict[str, ast.ClassDef]) -> bool:
    return name == wanted or (name in classes and any(_is_a(wanted, p, classes) for p in _parents(classes[name])))


def _text_models(registry: Path) -> dict[str, str]:
    for node in ast.parse(registry.read_text()).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Dict):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if ast.unparse(target) == "_TEXT_GENERATION_MODELS":
                pairs = zip(node.value.keys, node.value.values, strict=True)
                return {ast.literal_eval(k): ast.literal_eval(v)[1] for k, v in pairs if k is not None}
    raise AssertionError("the registry has another form")


def _embeddings(name: str, classes: dict[str, ast.ClassDef]) -> str | None:
    """The nearest embedding_modules of a class and its parents, as text."""
    if name not in classes:
        return None
    for item in classes[name].body:
        if isinstance(item, ast.Assign) and ast.unparse(item.targets[0]) == "embedding_modules":
            return ast.unparse(item.value)
    inherited = (_embeddings(parent, classes) for parent in _parents(classes[name]))
    return next((text for text in inherited if text is not None), None)
