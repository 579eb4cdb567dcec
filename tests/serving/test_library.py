"""The library of a server: folders by name, of the right base, kept while they are used; and the plugins around it."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import threading
import time
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ADAPTERS, BASES, random_lora

import lrconvert
from lrconvert.core import errors
from lrconvert.formats.expansions.cache import Cache
from lrconvert.serving import dynamo, vllm
from lrconvert.serving.base_check import check_base
from lrconvert.serving.library import Library
from lrconvert.serving.settings import Settings

LLAMA = BASES / "tiny-llama"


def write(path: Path, lora: Any = None, base: str = "org/base") -> None:
    made = lrconvert.convert(lora or random_lora(), "lowrank", bits=8).compact
    lrconvert.write(replace(made, provenance=replace(made.provenance, base_model=base)), path)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    (tmp_path / "store").mkdir()
    write(tmp_path / "store" / "one.lrc")
    (tmp_path / "store" / "broken.lrc").write_bytes(b"not a file of ours, by far")
    monkeypatch.setenv("LRCONVERT_CACHE", str(tmp_path / "cache"))
    settings = Settings.of({"LRCONVERT_STORE": str(tmp_path / "store"), "LRCONVERT_DTYPE": "BF16"})
    assert settings is not None
    return Library.of(settings)


def test_a_folder_by_name(library, tmp_path):
    folder = library.folder("one", "org/base")
    assert folder == lrconvert.expanded(tmp_path / "store" / "one.lrc", tmp_path / "cache", dtype="BF16")
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert library.folder("absent", "org/base") is None and library.folder("../store/one", "org/base") is None
    with pytest.raises(errors.LrcError, match=r"broken\.lrc"):
        library.folder("broken", "org/base")
    assert library.has("one") and not library.has("absent")


def test_what_a_server_has_got_stays(library, tmp_path):
    """Whatever the space: a server reads the folder again when it takes up the adapter anew."""
    folder = library.folder("one", "org/base")
    Cache(tmp_path / "cache", size=1, lease=0).shrink()
    assert folder.exists()
    library.close()
    Cache(tmp_path / "cache", size=1, lease=0).shrink()
    assert not folder.exists()


# --- the base -----------------------------------------------------------------------------------------------------


def facts(model: str) -> dict[str, Any]:
    return {"base": {"model": model}}


def never() -> Any:
    raise AssertionError("the file need not be read for that")


@pytest.mark.parametrize(
    ("noted", "served"),
    [
        ("org/base", "org/base"),
        ("Org/Base", "org/base"),
        ("org/base", "/models/base/"),
        ("base", "org/base"),
        ("org/base", "/cache/models--org--base/snapshots/0123456789abcdef"),
        ("C:\\models\\base", "org/base"),
    ],
)
def test_the_right_base(noted, served):
    check_base(facts(noted), never, served)


@pytest.mark.parametrize(
    ("noted", "served"), [("org/base", "org/other"), ("org/base", "else/base"), ("base", "org/base-instruct")]
)
def test_another_base(noted, served):
    with pytest.raises(errors.FingerprintError, match=f"made for '{noted}', and '{served}' is served.*BASE_NAMES"):
        check_base(facts(noted), never, served)
    check_base(facts(noted), never, served, ["org/x", noted])
    check_base(facts(noted), never, served, ["*"])


def llama(adapter: str = "llama-plain") -> Callable[[], Any]:
    return lambda: lrconvert.convert(ADAPTERS / adapter, "lowrank", bits=12).compact


@pytest.mark.parametrize("noted", ["", "org/base"])
def test_a_folder_whose_name_says_nothing_is_looked_into(noted, caplog):
    """Targets of another model do not fit; those that do are allowed, with a line in the log."""
    caplog.set_level(logging.INFO)
    check_base(facts(noted), llama(), str(LLAMA))
    assert "it fits" in caplog.text
    with pytest.raises(errors.FingerprintError, match="does not fit"):
        check_base(facts(noted), llama("bert-classifier"), str(LLAMA))


def test_what_cannot_be_told_is_allowed(caplog, tmp_path):
    caplog.set_level(logging.INFO)
    check_base(facts(""), never, "org/not-in-the-cache")
    (tmp_path / "config.json").write_text("{}")
    check_base(facts("org/base"), never, str(tmp_path))
    assert caplog.text.count("cannot be told") == 2


def test_a_file_of_another_base_is_refused_each_time(library):
    """Before it is expanded, and when it is there."""
    for _ in range(2):
        with pytest.raises(errors.FingerprintError, match=r"one\.lrc"):
            library.folder("one", "org/other")
        library.folder("one", "org/base")


# --- vLLM's resolver, with stand-ins for vLLM ---------------------------------------------------------------------


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """The parts of vLLM that the plugin touches; tests/peers has the program itself."""
    import abc

    resolvers: dict[str, Any] = {}
    registry = types.SimpleNamespace(
        get_supported_resolvers=resolvers.keys, register_resolver=resolvers.__setitem__, resolvers=resolvers
    )
    resolver = types.ModuleType("vllm.lora.resolver")
    resolver.LoRAResolver, resolver.LoRAResolverRegistry = abc.ABCMeta("LoRAResolver", (), {}), registry
    request = types.ModuleType("vllm.lora.request")
    request.LoRARequest = types.SimpleNamespace
    for name, module in (("vllm.lora.resolver", resolver), ("vllm.lora.request", request)):
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("vllm", "vllm.lora"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    return types.SimpleNamespace(registry=registry, base=resolver.LoRAResolver)


def resolve(resolver: vllm.Resolver, *names: str, base: str = "org/base") -> list[Any]:
    async def all_at_once() -> list[Any]:
        asked = [resolver.resolve_lora(base, name) for name in names]
        return await asyncio.gather(*asked, return_exceptions=True)

    return asyncio.run(all_at_once())


def test_requests(library, fake_vllm):
    resolver = vllm.Resolver(library)
    one, absent, outside = resolve(resolver, "one", "absent", "../one")
    assert absent is None and outside is None
    assert one.lora_name == "one" and one.lora_path == str(library.folder("one", "org/base"))
    assert one.lora_int_id == vllm.number_of("one") > 0


def test_broken_files_are_the_requests_fault_and_a_lost_store_is_not(library, fake_vllm, monkeypatch):
    """vLLM answers a ValueError with 400, and what it does not know with 500; a client is told no path."""
    (broken,) = resolve(vllm.Resolver(library), "broken")
    (other,) = resolve(vllm.Resolver(library), "one", base="org/other")
    assert type(broken) is type(other) is ValueError
    assert "'broken' cannot be served: E-" in str(broken) and str(library.settings.store) not in str(broken)
    assert "E-FPR" in str(other)
    store = types.SimpleNamespace(find=lambda name: (_ for _ in ()).throw(errors.HubError("no network")))
    (lost,) = resolve(vllm.Resolver(replace(library, store=store)), "one")
    assert type(lost) is RuntimeError and "E-HUB: no network" in str(lost)


def test_requests_for_one_adapter_share_its_expansion(library, fake_vllm, monkeypatch):
    """And those for others are not kept waiting."""
    asked, free = [], threading.Event()

    def slow(self: Library, name: str, served: str) -> Path:
        asked.append(name)
        if name == "one":
            assert free.wait(30)
        else:
            free.set()
        return Path("/folder")

    monkeypatch.setattr(Library, "folder", slow)
    answers = resolve(vllm.Resolver(library), *["one"] * 5, "two")
    assert sorted(asked) == ["one", "two"] and all(answer.lora_path == "/folder" for answer in answers)


def test_a_request_that_is_given_up_breaks_no_other(library, fake_vllm, monkeypatch):
    monkeypatch.setattr(Library, "folder", lambda *_: time.sleep(0.2) or Path("/folder"))
    resolver = vllm.Resolver(library)

    async def race() -> Any:
        first = asyncio.create_task(resolver.resolve_lora("b", "one"))
        second = asyncio.create_task(resolver.resolve_lora("b", "one"))
        await asyncio.sleep(0.05)
        first.cancel()
        return await second

    assert asyncio.run(race()).lora_path == "/folder"


def test_register(fake_vllm, monkeypatch, tmp_path, caplog):
    """Nothing without a store; once, however often it is called; a store that is none stops the server."""
    monkeypatch.delenv("LRCONVERT_STORE", raising=False)
    vllm.register()
    assert not fake_vllm.registry.resolvers
    monkeypatch.setenv("LRCONVERT_STORE", str(tmp_path / "absent"))
    with pytest.raises(errors.FileKindError, match="LRCONVERT_STORE"):
        vllm.register()
    monkeypatch.setenv("LRCONVERT_STORE", str(tmp_path))
    handler = logging.NullHandler()
    monkeypatch.setattr(logging.getLogger("vllm"), "handlers", [handler])
    monkeypatch.setattr(logging.getLogger("lrconvert.serving"), "handlers", [])
    monkeypatch.setattr(logging.getLogger("lrconvert.serving"), "propagate", True)
    vllm.register()
    assert logging.getLogger("lrconvert.serving").handlers == [handler]  # our lines are seen with vLLM's
    (resolver,) = fake_vllm.registry.resolvers.values()
    vllm.register()
    assert list(fake_vllm.registry.resolvers.values()) == [resolver]
    assert isinstance(resolver, fake_vllm.base) and "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in caplog.text


def test_register_is_light(tmp_path):
    """Every process of every vLLM calls it where both are installed: without a store it loads nothing of ours."""
    import subprocess

    code = "import sys\nfrom lrconvert.serving.vllm import register\nregister()\n"
    code += "print(sorted(m for m in sys.modules if m == 'numpy' or m.startswith('lrconvert.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(
        ["lrconvert.core", "lrconvert.core.version", "lrconvert.serving", "lrconvert.serving.vllm"]
    )


# --- Dynamo -------------------------------------------------------------------------------------------------------


def test_dynamos_source(library, monkeypatch):
    """`exists` and `download` of its protocol, by URI."""
    source = dynamo.Source(library)
    asked = [asyncio.run(source.exists(f"lrconvert://{name}")) for name in ("one", "absent", "../store/one")]
    assert asked == [True, False, False]
    folder = asyncio.run(source.download("lrconvert://one", Path("/unused")))
    assert folder == library.folder("one")
    with pytest.raises(RuntimeError, match="'broken' cannot be served: E-"):
        asyncio.run(source.download("lrconvert://broken", Path("/unused")))
    other = dynamo.Source(replace(library, settings=replace(library.settings, base=None)))
    assert asyncio.run(other.download("lrconvert://one", Path("/unused"))) == folder


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The sources of a stand-in for Dynamo's manager of adapters."""
    sources: dict[str, Any] = {}
    module = types.ModuleType("dynamo.common.lora.manager")
    made = types.SimpleNamespace(register_custom_source=sources.__setitem__)
    module.get_lora_manager = lambda: made
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("dynamo", "dynamo.common", "dynamo.common.lora"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    return sources


def test_vllms_plugin_registers_with_dynamo_in_its_workers(manager, library, monkeypatch):
    monkeypatch.delenv("DYN_LORA_ENABLED", raising=False)
    dynamo.register_where_it_runs(library)
    assert not manager
    monkeypatch.setenv("DYN_LORA_ENABLED", "true")
    dynamo.register_where_it_runs(library)
    assert isinstance(manager["lrconvert"], dynamo.Source)


def test_a_worker_is_started_with_the_source(manager, library, monkeypatch, tmp_path, capsys):
    """Under its own name, with its own arguments; without a store it is not started."""
    (tmp_path / "a_worker.py").write_text("import sys; print(__name__, sys.argv[1:])")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["before"])
    words = ["a_worker", "--model", "x"]
    monkeypatch.delenv("LRCONVERT_STORE", raising=False)
    with pytest.raises(SystemExit, match="LRCONVERT_STORE is not set"):
        dynamo.main(words)
    monkeypatch.setenv("LRCONVERT_STORE", library.settings.store)
    dynamo.main(words)
    assert capsys.readouterr().out == "__main__ ['--model', 'x']\n" and "lrconvert" in manager


def test_dynamo_says_how_it_is_called():
    with pytest.raises(SystemExit, match="usage"):
        dynamo.main([])
