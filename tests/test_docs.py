"""The documents are true: their examples run, the picture is the code's, and links lead somewhere."""

from __future__ import annotations

import doctest
import importlib
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import ADAPTERS, BASES, ROOT
from test_structure import PACKAGE, folder, graph

import lrconvert
from lrconvert import api
from lrconvert.cli import cli
from lrconvert.core import errors
from lrconvert.formats.lrc import file, validation
from lrconvert.lora import svd
from lrconvert.methods import base as methods
from lrconvert.testing.layouts import safetensors_file

DOCS = ROOT / "docs"
PLAIN = ADAPTERS / "llama-plain"


# --- the picture ----------------------------------------------------------------------------------------------------


@pytest.fixture
def architecture(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(DOCS)
    return importlib.import_module("architecture")


def test_the_picture_is_what_the_script_draws(architecture: ModuleType) -> None:
    drawn = architecture.draw(architecture.rule(), architecture.measure(architecture.rule()))
    assert architecture.PICTURE.read_text() == drawn, "run python docs/architecture.py"


def test_the_picture_has_the_imports_that_the_structure_test_sees(architecture: ModuleType) -> None:
    seen: dict[str, set[str]] = {name: set() for name in architecture.rule()}
    for module, others in graph().items():
        if folder(module) in seen:
            seen[folder(module)] |= {folder(other) for other in others} - {folder(module), "__init__"}
    assert architecture.measure(architecture.rule()) == seen


def test_the_page_names_what_there_is(architecture: ModuleType) -> None:
    page = (DOCS / "architecture.md").read_text()
    assert list(architecture.holds()) == architecture.rule()
    for name, parts in re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|$", page, re.MULTILINE):
        for part in re.findall(r"`([\w/]+)`", parts):
            places = [*PACKAGE.joinpath(name).glob(part.rstrip("/")), *PACKAGE.joinpath(name).glob(f"{part}.py")]
            assert places or part[0].isupper(), f"{name}: {part}"


# --- the examples ---------------------------------------------------------------------------------------------------

Install = Callable[[str, str], str]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Return a function that puts an example of docs/examples into a scanned folder of the package, under its id."""

    def put(example: str, package: str) -> str:
        entry = example.partition("_")[2]
        place = tmp_path / "installed"
        place.mkdir()
        shutil.copy(DOCS / "examples" / f"{example}.py", place / f"{entry}.py")
        scanned = importlib.import_module(package)
        monkeypatch.setattr(scanned, "__path__", [*scanned.__path__, str(place)])
        importlib.invalidate_caches()
        monkeypatch.delitem(sys.modules, f"{package}.{entry}", raising=False)
        return entry

    yield put
    methods.get.cache_clear()
    for name in [name for name in sys.modules if name.rpartition(".")[2] in ("rankone", "deltas", "tinyserve")]:
        del sys.modules[name]


def run(*words: object) -> str:
    """Run a command and return what it printed."""
    done = CliRunner().invoke(cli, [str(word) for word in words])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def test_every_example_has_a_test() -> None:
    source = Path(__file__).read_text()
    examples = [path.stem for path in (DOCS / "examples").glob("*.py")]
    assert sorted(name.partition("_")[0] for name in examples) == ["consumer", "exporter", "method", "reader"]
    assert all(f'install("{name}"' in source for name in examples)


def test_the_method(tmp_path: Path, install: Install) -> None:
    """It makes files that are read, checked and expanded."""
    assert install("method_rankone", "lrconvert.methods") in methods.module_names()
    run("lora-to-rankone", PLAIN, "-o", tmp_path / "x.lrc")
    assert "--seed" not in run("lora-to-rankone", "-h")
    lora = api.load_lora(PLAIN)
    assert validation.validate(tmp_path / "x.lrc").ok
    for pair, (_, a, b) in zip(lora.targets, methods.expand_all(file.read(tmp_path / "x.lrc")), strict=True):
        assert np.isclose(np.linalg.norm(b @ a, 2), svd.singular_values(pair)[0], rtol=1e-3)
    with pytest.raises(errors.BudgetError, match="smallest possible file has"):
        api.convert(lora, "rankone", target_size=100)


def test_the_reader(tmp_path: Path, install: Install) -> None:
    install("reader_deltas", "lrconvert.formats.readers")
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 6)).astype("<f4"), rng.standard_normal((5, 2)).astype("<f4")
    tensors = {"layer.delta_in": a, "layer.delta_out": b, "layer.delta_scale": np.array([0.5], "<f4")}
    (tmp_path / "x.safetensors").write_bytes(safetensors_file(tensors))
    (pair,) = api.load_lora(tmp_path / "x.safetensors").targets
    assert (pair.target.name, pair.scale) == ("layer.weight", 0.5)
    assert pair.A.tobytes() == a.tobytes() and pair.B.tobytes() == b.tobytes()
    (tmp_path / "x.safetensors").write_bytes(safetensors_file({**tensors, "layer.bias": a}))
    with pytest.raises(errors.TensorUnknownError, match=r"layer\.bias"):
        api.load_lora(tmp_path / "x.safetensors")


def test_the_exporter(tmp_path: Path, install: Install) -> None:
    install("exporter_npz", "lrconvert.formats.exporters")
    compact = api.convert(api.load_lora(PLAIN), "lowrank", target_ratio=4).compact
    api.write(compact, tmp_path / "x.lrc")
    run("export", tmp_path / "x.lrc", "-o", tmp_path / "out", "--to", "npz")
    with np.load(tmp_path / "out" / "factors.npz") as arrays:
        for target, a, b in methods.expand_all(compact):
            np.testing.assert_allclose(arrays[f"{target.name}.B"] @ arrays[f"{target.name}.A"], b @ a, atol=1e-6)


def test_the_consumer(install: Install) -> None:
    install("consumer_tinyserve", "lrconvert.formats.compat")
    assert api.check(PLAIN, ["tinyserve"]) == ()
    assert [finding.rule for finding in api.check(PLAIN, ["tinyserve"], max_rank=1)] == ["rank"]
    assert "dora" in [finding.rule for finding in api.check(ADAPTERS / "llama-dora", ["tinyserve"])]


# --- examples in docstrings -----------------------------------------------------------------------------------------


def with_examples() -> list[str]:
    """The modules of the package whose docstrings hold examples."""
    modules = pkgutil.walk_packages(lrconvert.__path__, "lrconvert.")
    paths = {entry.name: PACKAGE.parent.joinpath(*entry.name.split(".")) for entry in modules}
    files = {name: path / "__init__.py" if path.is_dir() else path.with_suffix(".py") for name, path in paths.items()}
    return ["lrconvert", *(name for name, path in files.items() if ">>> " in path.read_text())]


SLOWER = {"lrconvert.api.live": pytest.mark.medium}  # loads a model


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOWER.get(name, ())) for name in with_examples()])
@pytest.mark.medium
def test_docstrings(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples run in a folder that holds `my-adapter` and `base-model`, in which they may write."""
    shutil.copytree(PLAIN, tmp_path / "my-adapter")
    shutil.copytree(BASES / "tiny-llama", tmp_path / "base-model")
    monkeypatch.chdir(tmp_path)
    assert doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS).failed == 0


# --- benchmarks -----------------------------------------------------------------------------------------------------


def test_the_tables_of_pages_are_those_of_the_results() -> None:
    """Every benchmark is imported, in a process of its own since their names are short, and renders what is there."""
    pages = "".join(page.read_text() for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))
    tables = re.findall(r"<!-- table (\w+) -->\n(.*?)\n<!-- end table", pages, re.DOTALL)
    names = {"statistics": "input_statistics"}  # a file of the first name would hide the standard library's
    script = (
        "import json, importlib, sys; print(json.dumps([importlib.import_module(n).table() for n in sys.argv[1:]]))"
    )
    words = [sys.executable, "-c", script, *(names.get(name, name) for name, _ in tables)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT / "benchmarks"), str(ROOT)))}
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    assert [table.strip() for table in json.loads(done.stdout)] == [table for _, table in tables]
    results = {path.stem for path in (ROOT / "benchmarks" / "results").glob("*.jsonl")}
    assert {name for name, _ in tables} == results - {"encoder_evidence"}  # a part of docs/evidence.md


# --- the pages ------------------------------------------------------------------------------------------------------


def test_contributing_is_short_and_links_every_example() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    assert len(page.splitlines()) <= 100
    assert set(re.findall(r"docs/examples/(\w+)\.py", page)) == {path.stem for path in (DOCS / "examples").glob("*.py")}


def test_the_changelog_begins_with_this_version() -> None:
    versions = re.findall(r"^## \[?([\w.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert lrconvert.__version__.startswith(versions[0])
