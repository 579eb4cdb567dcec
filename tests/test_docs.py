"""The documents are true: pictures are those of the code and the results, every page is on the site, and links lead
somewhere. Examples of pages run in tests/test_examples.py."""

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
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

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
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
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
    pages = "".join(page.read_text() for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))))
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


# --- the picture of the evidence ------------------------------------------------------------------------------------


@pytest.fixture
def picture(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield importlib.import_module("picture")
    for name in ("picture", "cells"):
        sys.modules.pop(name, None)


def test_the_picture_shows_what_is_measured(picture: ModuleType) -> None:
    """A mark for each cell of a way that is drawn, at its height; whatever the results are, it is well-formed."""
    cells = picture.cells.read("evidence")
    for rows in (cells, {}):
        ElementTree.fromstring(picture.draw(rows))
    row = {"share": 0.4, "closed": [0.9, 0.8, 0.95]}
    name, way = "sst2, 0.4%, ", "LoRAQuant, refit"
    drawn = picture.draw({name + way: row})
    assert (
        drawn.count(picture.WAYS[way][1]) == 3 and picture.WAYS["lowrank, refit"][0] not in drawn
    )  # mark, bar, legend
    assert picture.points({name + way: row}, "sst2", way) == [(0.4, 0.9, 0.8, 0.95)]
    heights = [picture.height_of(closed) for closed in (-1.0, *picture.CLOSED, 0.9999, 1.0)]
    assert heights == sorted(heights) and heights[0] == 0 and heights[-1] == 1


def test_the_picture_that_is_there_is_read_on_both_themes() -> None:
    drawn = (DOCS / "accuracy-per-byte.svg").read_text()
    ElementTree.fromstring(drawn)
    assert "prefers-color-scheme:dark" in drawn and 'class="page"' in drawn


# --- the site -------------------------------------------------------------------------------------------------------

_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
ELSEWHERE = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def sources() -> list[Path]:
    """The Markdown of the site, where the repository has it."""
    return [*(ROOT / name for name in ELSEWHERE.values()), *DOCS.rglob("*.md"), *(ROOT / "formats").rglob("*.md")]


def test_every_page_is_in_the_navigation() -> None:
    """Each once, and nothing else is."""
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2].partition("\nplugins:")[0]
    pages = re.findall(r"^ *- [^:]+: (\S+)$", nav, re.MULTILINE)
    site = {value: key for key, value in ELSEWHERE.items()}
    there = [path.relative_to(ROOT).as_posix() for path in [*sources(), *DOCS.rglob("*.ipynb")]]
    assert sorted(pages) == sorted(site.get(name, name.removeprefix("docs/")) for name in there)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the site makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    plain = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in _HEADING.findall(text))
    return {re.sub(r"[-\s]+", "-", heading) for heading in plain}


def test_every_link_leads_somewhere() -> None:
    """From README and every page, to files and to headings of them."""
    for page in sources():
        text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, heading = target.partition("#")
            if "://" in target:
                continue
            place = page.parent / path if path else page
            assert place.exists(), (page.name, target)
            assert not heading or heading in anchors(place), (page.name, target)


def test_every_error_has_a_remedy() -> None:
    """The page of errors has each code once, with what it means and what to do."""
    rows = re.findall(
        r"^\| `(E-[A-Z-]+)` \| ([^|]+) \| ([^|]+) \|$", (DOCS / "reference/errors.md").read_text(), re.MULTILINE
    )
    codes = {
        kind.code for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.LrcError)
    }
    assert sorted(code for code, _, _ in rows) == sorted(codes - {"E-LRC"})


def test_the_reference_has_every_name() -> None:
    """Of Python, where the site has what is listed; commands come from click by themselves."""
    listed = re.findall(r"^::: lrconvert\.api\.(\w+)$", (DOCS / "reference/python.md").read_text(), re.MULTILINE)
    classes = {name for name, kind in vars(errors).items() if isinstance(kind, type)} - {"LrcError"}
    assert sorted(listed) == sorted(set(api.__all__) - classes)  # errors have a page of their own


# --- the pages ------------------------------------------------------------------------------------------------------


def test_contributing_is_short_and_links_every_example() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    assert len(page.splitlines()) <= 100
    assert set(re.findall(r"docs/examples/(\w+)\.py", page)) == {path.stem for path in (DOCS / "examples").glob("*.py")}


def test_the_changelog_begins_with_this_version() -> None:
    versions = re.findall(r"^## \[?([\w.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert lrconvert.__version__.startswith(versions[0])
