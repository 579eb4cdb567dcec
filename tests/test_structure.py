"""The structure that CONTRIBUTING.md promises: one way through the code, and cheap imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "lrconvert"

# Each group may import from the groups before it, and from its own; nothing imports upward.
ORDER = [
    {"errors", "limits"},
    {
        *("strictjson", "dtypes", "container", "durable", "hub"),
        *("packing", "straight", "subvectors", "vectorbank", "devices", "products", "exact", "prng"),
    },
    {
        *("adapter", "canonical", "renamings", "unets", "llamacpp", "targets", "fingerprint", "quantized"),
        *("moments", "base_weights", "students"),
    },
    {"methods"},
    {"manifest", "file", "report", "validation", "modelcard", "statistics_file"},
    {"readers", "loading", "exporters", "consumers"},
    {"heads", "merging", "baking", "attaching", "live", "texts", "collecting", "measuring"},
    {"converting"},
    {"gathering", "compressing", "ablating", "allocating", "swapping", "refining", "retraining"},
    {"api"},
    {"render", "page", "demo", "many", "cli", "testing", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
# Lower-level numerics may use the plain nouns of the next group.
ALLOWED = {("vectorbank", "adapter"), ("vectorbank", "moments"), ("exact", "adapter")}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    """The lrconvert rooms that a file imports, wherever in it; under TYPE_CHECKING they count as well."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lrconvert":
            parts = node.module.split(".")
            found += [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [a.name.split(".")[1] for a in node.names if a.name.startswith("lrconvert.")]
    return [name for name in found if name != "__version__"]


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py" or p.parent != PACKAGE)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    here = room(path)
    assert here in LEVEL, f"{here} has no place in the import order"
    for name in imports(path):
        assert name in LEVEL, f"{path.name} imports the unknown room {name}"
        assert LEVEL[name] <= LEVEL[here] or (here, name) in ALLOWED, f"{here} imports {name}, which lies above it"


def test_the_import_check_works():
    assert LEVEL["cli"] > LEVEL["methods"] > LEVEL["container"]
    assert "durable" in imports(PACKAGE / "file.py") and "container" in imports(PACKAGE / "file.py")


def test_no_junk_drawers():
    assert not [p for p in PACKAGE.rglob("*.py") if p.stem in ("utils", "util", "helpers", "misc", "common")]


def test_only_durable_writes():
    """durable is the only room that creates, renames or deletes files; faults.py stands in for its disk."""
    verbs = {
        "mkdir",
        "unlink",
        "rename",
        "replace",
        "rmdir",
        "rmtree",
        "write_bytes",
        "write_text",
        "touch",
        "symlink_to",
    }
    for path in FILES:
        if room(path) == "durable" or path.name == "faults.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            of = node.value if isinstance(node, ast.Attribute) else None
            staged = getattr(of, "attr", getattr(of, "id", "")) in ("folder", "content", "files")
            if isinstance(node, ast.Attribute) and node.attr in verbs - {"replace"} and not staged:
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
        ["lora-to-lowrank", str(ROOT / "fixtures" / "adapters" / "llama-plain"), "--dry-run"]
    ),
    "check": CLI.format(["check", str(ROOT / "fixtures" / "adapters" / "llama-dora"), "--for", "all"]),
    "methods": "from lrconvert.methods import base\nbase.all_methods()",
}


@pytest.mark.parametrize("name", LIGHT)
def test_import_budget(name):
    assert loaded(LIGHT[name]) == set()


def test_the_budget_check_works():
    assert loaded("import torch") >= {"torch"}


def test_every_public_name_is_there() -> None:
    import lrconvert

    assert all(hasattr(lrconvert, name) for name in lrconvert.__all__)
