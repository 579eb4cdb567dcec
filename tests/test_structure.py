"""The structure that docs/architecture.md promises: one way through the code, and cheap imports."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "lrconvert"
RULE = "core < kernels < io < lora < methods < formats < merge < live < convert < refine < report < api < serving < cli"
FOLDERS = RULE.split(" < ")
ABOVE = ("demo", "testing", "__main__", "__init__")  # may import any folder; no folder imports them
FLAT = {"__init__.py", "__main__.py", "py.typed"}


def module(path: Path, package: Path = PACKAGE) -> str:
    """The dotted name of a file of the package."""
    return ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, package: Path = PACKAGE) -> Iterator[str]:
    """The modules of the package that a file imports, wherever in it; under TYPE_CHECKING they count as well."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] != package.name:
                continue
            inside = package.parent.joinpath(*parts)
            whole = inside.with_suffix(".py").exists() or (inside / "__init__.py").exists()
            yield name if whole else ".".join(parts[:-1])


def graph(package: Path = PACKAGE) -> dict[str, set[str]]:
    """For every file the files that it imports."""
    return {module(p, package): set(imports(p, package)) - {module(p, package)} for p in sorted(package.rglob("*.py"))}


def folder(name: str) -> str:
    """The folder of the package that a module lies in; ``__init__`` for the package itself."""
    return ([*name.split("."), "__init__"])[1]


def upward(files: dict[str, set[str]]) -> list[str]:
    """Every import that the rule forbids."""
    level = {name: n for n, name in enumerate(FOLDERS)} | dict.fromkeys(ABOVE, len(FOLDERS))
    return [
        f"{one} imports {other}"
        for one, others in files.items()
        for other in sorted(others)
        if folder(one) != folder(other)
        and not level[folder(other)] < level[folder(one)]
        and not (folder(one) in ABOVE and folder(other) in ABOVE)
    ]


def circle(files: dict[str, set[str]]) -> list[str]:
    """The modules of a circle of imports; none if there is no circle."""
    try:
        TopologicalSorter(files).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_imports_go_one_way() -> None:
    assert upward(graph()) == []


def test_no_circle_of_files() -> None:
    assert circle(graph()) == []


def test_the_rule_stands_in_the_documents() -> None:
    assert RULE in (ROOT / "docs" / "architecture.md").read_text()


def test_nothing_lies_flat() -> None:
    assert {p.name for p in PACKAGE.iterdir() if p.is_file()} == FLAT
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders == {*FOLDERS, "demo", "testing"}


def test_tests_mirror_the_folders() -> None:
    mirrored = {p.parent.relative_to(ROOT / "tests").parts[0] for p in (ROOT / "tests").glob("*/test_*.py")}
    assert mirrored == set(FOLDERS)


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A package in which everything is right."""
    package = tmp_path / "lrconvert"
    for name in ("core", "io", "cli"):
        (package / name).mkdir(parents=True)
        (package / name / "__init__.py").write_text("")
    (package / "__init__.py").write_text("")
    (package / "core" / "one.py").write_text("from lrconvert.core import two\n")
    (package / "core" / "two.py").write_text("x = 1\n")
    (package / "io" / "file.py").write_text("from lrconvert.core.two import x\n")
    assert upward(graph(package)) == [] and circle(graph(package)) == []
    return package


@pytest.mark.parametrize(
    "line",
    [
        "from lrconvert.io import file",
        "def late():\n    from lrconvert.io.file import x",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import lrconvert.io.file",
        "from lrconvert import api",
    ],
)
def test_the_check_of_the_way_bites(house: Path, line: str) -> None:
    (house / "core" / "two.py").write_text(line + "\n")
    assert len(upward(graph(house))) == 1


def test_the_check_of_circles_bites(house: Path) -> None:
    (house / "core" / "two.py").write_text("def late():\n    from lrconvert.core.one import two\n")
    assert {"lrconvert.core.one", "lrconvert.core.two"} == set(circle(graph(house)))


def test_no_junk_drawers() -> None:
    assert not [p for p in PACKAGE.rglob("*.py") if p.stem in ("utils", "util", "helpers", "misc", "common")]


WRITING = {"mkdir", "unlink", "rename", "rmdir", "rmtree", "write_bytes", "write_text", "touch", "symlink_to"}


def test_only_durable_writes() -> None:
    """io/durable alone creates, renames or deletes files; faults.py stands in for its disk."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.parent.name == "durable" or path.name == "faults.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            of = node.value if isinstance(node, ast.Attribute) else None
            staged = getattr(of, "attr", getattr(of, "id", "")) in ("folder", "content", "files")
            if isinstance(node, ast.Attribute) and node.attr in WRITING and not staged:
                raise AssertionError(f"{path.name}:{node.lineno} calls .{node.attr}")


HEAVY = "torch", "transformers", "peft", "scipy"


def loaded(code: str) -> set[str]:
    """The heavy packages that a fresh interpreter has loaded after running `code`."""
    script = f"import sys\n{code}\nprint('LOADED', *[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("LOADED")[2].split())


CLI = "import lrconvert.cli as c\ntry:\n  c.cli({!r})\nexcept SystemExit as e: pass"
LIGHT = {
    "import lrconvert": "import lrconvert",
    "--help": CLI.format(["--help"]),
    "validate": CLI.format(["validate", str(ROOT / "fixtures" / "golden" / "v1" / "lowrank" / "0.lrc")]),
    "inspect": CLI.format(["inspect", str(ROOT / "fixtures" / "adapters" / "llama-plain")]),
    "lora-to-lowrank": CLI.format(
        ["lora-to-lowrank", str(ROOT / "fixtures" / "adapters" / "llama-plain"), "--bits", "12", "--dry-run"]
    ),
    "check": CLI.format(["check", str(ROOT / "fixtures" / "adapters" / "llama-dora"), "--for", "all"]),
    "methods": "from lrconvert.methods import base\nbase.all_methods()",
}


@pytest.mark.parametrize("name", LIGHT)
def test_import_budget(name: str) -> None:
    assert loaded(LIGHT[name]) == set()


def test_commands_load_nothing_of_others() -> None:
    script = "import sys\n{}\nprint('LOADED', *sys.modules)"
    for name, absent in {
        "--help": {"numpy"},
        "validate": {"lrconvert.api", "lrconvert.lora.input_statistics", "tqdm"},
        "inspect": {"lrconvert.merge", "lrconvert.convert", "lrconvert.formats.exporters", "lrconvert.formats.compat"},
    }.items():
        code = [sys.executable, "-c", script.format(LIGHT[name])]
        modules = subprocess.run(code, capture_output=True, text=True, check=True).stdout.rpartition("LOADED")[2]
        assert not absent & set(modules.split()), name


def test_the_budget_check_works() -> None:
    assert loaded("import torch") >= {"torch"}


def test_every_public_name_is_there() -> None:
    import lrconvert

    assert all(hasattr(lrconvert, name) for name in lrconvert.__all__)


def test_names_of_the_api_are_imported_from_where_a_type_checker_finds_them() -> None:
    """What is imported at first use, what a type checker reads, and `__all__` are the same names."""
    from lrconvert import api

    nodes = ast.walk(ast.parse((PACKAGE / "api" / "__init__.py").read_text()))
    imports = [
        node for node in nodes if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lrconvert")
    ]
    read = {alias.name: node.module for node in imports for alias in node.names}
    assert read == {name: f"lrconvert.{module}" for name, module in api._HOME_OF.items()}
    assert sorted(read) == api.__all__


def test_folders_do_not_hide_the_verbs_of_their_names() -> None:
    import lrconvert
    from lrconvert.convert.convert import convert  # binds the folder `convert` in the package
    from lrconvert.refine.refine import refine

    assert callable(lrconvert.convert) and callable(lrconvert.merge) and callable(lrconvert.refine)
    assert lrconvert.convert is not convert and lrconvert.refine is not refine


def bounds() -> dict[str, str]:
    """{package: lower bound} of what pyproject.toml asks for, the tests' own packages too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    return dict(entry.split(">=") for entry in asked)


def pins(name: str) -> dict[str, str]:
    """{package: release} of a file of constraints."""
    lines = (ROOT / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_ci_runs_on_the_lower_bounds() -> None:
    """constraints-lowest.txt has the bounds of pyproject.toml, exactly, but for torch, and says so; constraints.txt has
    a release of each that is no older."""
    declared, lowest, newest = bounds(), pins("constraints-lowest.txt"), pins("constraints.txt")
    assert lowest == declared | {"torch": newest["torch"]}
    assert "torch is the exception" in (ROOT / "constraints-lowest.txt").read_text()
    for package, bound in declared.items():
        old, new = (tuple(map(int, text.split("."))) for text in (bound, newest[package]))
        assert old <= new, package
    assert "constraints-lowest.txt" in (ROOT / ".ci" / "run").read_text()
