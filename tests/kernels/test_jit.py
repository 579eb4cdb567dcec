"""Kernels are loaded only where they pay, and nothing needs numba."""

from __future__ import annotations

import importlib
import subprocess
import sys

import numpy as np
import pytest
from conftest import ADAPTERS

from lrconvert.kernels import jit

SMALL = """
import sys
from lrconvert.cli import cli
bits = "--bits", "12"
for words in (["--help"], ["inspect", source], ["lora-to-lowrank", source, "-o", file, *bits],
              ["lora-to-vblora", source, "-o", other, "--target-ratio", "8"], ["validate", file], ["inspect", other]):
    try:
        cli.main(args=words, standalone_mode=False)
    except SystemExit as end:
        assert not end.code
assert not {"numba", "llvmlite"} & set(sys.modules)
"""


@pytest.mark.medium
def test_small_files_load_no_compiler(tmp_path):
    """Neither help nor reading and converting a small adapter imports numba."""
    names = {"source": str(ADAPTERS / "llama-plain"), "file": str(tmp_path / "a.lrc"), "other": str(tmp_path / "b.lrc")}
    code = "".join(f"{name} = {value!r}\n" for name, value in names.items()) + SMALL
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_little_work_and_no_numba_mean_no_kernel(monkeypatch):
    """`load` hands out nothing for work that does not pay, whatever was loaded, nor without numba."""
    assert jit.load("rans", 0.0) is None
    monkeypatch.setattr(jit, "find_spec", lambda name: None)
    assert jit.load("rans", 1e9) is None and jit.load("rans", 1e9, exact=True) is None


@pytest.mark.parametrize("name", ["rans", "rounding", "beam", "merging", "training"])
def test_kernels_are_plain_python_without_numba(monkeypatch, name):
    """Every module of kernels can be imported where numba is absent."""
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, f"lrconvert.kernels.{name}", raising=False)
    module = importlib.import_module(f"lrconvert.kernels.{name}")
    loops = [value for value in vars(module).values() if getattr(value, "__module__", "") == module.__name__]
    assert loops and all(type(loop) is type(test_little_work_and_no_numba_mean_no_kernel) for loop in loops)
    del sys.modules[module.__name__]


def test_without_a_folder_for_machine_code_kernels_are_compiled_again(monkeypatch):
    """numba refuses `cache=True` where it finds no folder; then a kernel is compiled in every process."""
    numba = pytest.importorskip("numba", reason="numba (the extra `fast`) is absent")
    asked = []

    def njit(cache=False, **options):
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(numba, "njit", njit)
    double = jit.compiled()(lambda x: 2 * x)
    assert asked == [True, False] and double(np.float64(3)) == 6
