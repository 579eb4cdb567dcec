"""What a release promises: golden files that stay, one version everywhere, metadata that is true."""

from __future__ import annotations

import hashlib
import re
import tomllib
from typing import Any

import golden
import pytest
from conftest import ROOT

import lrconvert

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SETTINGS: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FROZEN = {
    "frozen-0.1.0.txt": "a2c5d5dfc51c28c602ea1d90815a677272105cf613f4339047fc1cf4d80b5b36"
}  # of the lists themselves: one line for each release, never another


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_the_lists_of_frozen_files_stay() -> None:
    """A release's list is written once."""
    lists = {path.name: sha256(path.read_bytes()) for path in golden.GOLDEN.parent.glob("frozen-*.txt")}
    assert lists == FROZEN


def test_frozen_golden_files_stay() -> None:
    """Every golden file that a release has frozen is there, with the same bytes."""
    root, frozen = golden.GOLDEN.parent, golden.frozen()
    assert len(frozen) > 100 and {name.split("/")[0] for name in frozen} >= {"v1", "v2"}
    for name, digest in frozen.items():
        assert (root / name).is_file(), f"{name} is gone: files that people have are read forever"
        assert sha256((root / name).read_bytes()) == digest, f"{name} was changed: that needs a new version"


def test_a_release_freezes_every_golden_file() -> None:
    """Without .dev in the version no golden file is outside of the lists."""
    files = {p.relative_to(golden.GOLDEN.parent).as_posix() for p in golden.GOLDEN.parent.glob("v*/*/*") if p.is_file()}
    if ".dev" not in lrconvert.__version__:
        assert files == set(golden.frozen())


def test_one_version() -> None:
    """The package, the citation and the changelog have the same version."""
    version = lrconvert.__version__
    assert re.search(rf"^version: {re.escape(version)}$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[0] == version


def test_metadata_is_true() -> None:
    """Classifiers name the Pythons from the lower bound on, and every extra has its reason in the README or docs/."""
    named = re.findall(r"Python :: 3\.(\d+)$", "\n".join(PROJECT["classifiers"]), re.M)
    assert list(map(int, named)) == list(range(int(PROJECT["requires-python"].rpartition(".")[2]), int(named[-1]) + 1))
    ci = (ROOT / ".ci" / "run").read_text()
    assert all(f"3.{minor}" in ci for minor in named), "a Python is promised that CI does not look at"
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    texts = " ".join(page.read_text() for page in pages)
    unexplained = [name for name in PROJECT["optional-dependencies"] if f"[{name}]" not in texts]
    assert unexplained == []
    assert PROJECT["license"] == "Apache-2.0" and (ROOT / "LICENSE").is_file() and (ROOT / "SECURITY.md").is_file()


def test_all_files_of_the_package_are_packed() -> None:
    """Whatever is no Python lies under one of the patterns; .ci/release.py compares the wheel itself."""
    package = ROOT / "lrconvert"
    packed = {path for pattern in SETTINGS["package-data"]["lrconvert"] for path in package.glob(pattern)}
    others = {p for p in package.rglob("*") if p.is_file() and p.suffix != ".py" and "__pycache__" not in p.parts}
    assert others - packed == set() and any("model.safetensors" in path.name for path in packed)


@pytest.mark.parametrize("pattern", SETTINGS["package-data"]["lrconvert"])
def test_no_pattern_is_idle(pattern: str) -> None:
    assert list((ROOT / "lrconvert").glob(pattern))
