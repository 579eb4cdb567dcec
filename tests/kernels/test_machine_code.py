"""Machine code of loops that is kept in files: used without numba, refused where anything of it does not fit."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from lrconvert.kernels import machine_code
from lrconvert.kernels.machine_code import Signature

numba = pytest.importorskip("numba", reason="numba (the extra `fast`) is absent")
llvm = pytest.importorskip("llvmlite.binding", reason="llvmlite is absent")
pytestmark = pytest.mark.medium  # compiling takes some seconds

ALONE = """
import sys
import numpy as np
from lrconvert.kernels import jit
rows = jit.load("rounding", 1e9)
codes = np.empty((2, 3), np.int32)
numbers = np.array([[0.5, -1.5, 2.5], [9, -9, 0]], np.float32)
rows.round_rows(numbers, np.array([1, 0.4, 7], np.float32), np.empty((2, 3), np.int64), np.empty((2, 4)), codes,
                np.empty((4, 3), np.int64))
print(codes.tolist(), "numba" in sys.modules)
"""


def run(tmp_path) -> str:
    environment = {"NUMBA_CACHE_DIR": str(tmp_path), "PATH": "", "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-c", ALONE]
    return subprocess.run(words, capture_output=True, text=True, check=True, env=environment).stdout.strip()


def test_a_second_process_does_without_numba(tmp_path):
    """The first one compiles and keeps the code; the next one, without numba, computes the same."""
    outcomes = [run(tmp_path) for _ in range(2)]
    assert outcomes == ["[[0, -1, 2], [7, -7, 0]] True", "[[0, -1, 2], [7, -7, 0]] False"]
    assert [path.suffix for path in tmp_path.glob("lrconvert.*")] == [".o"]


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The file of a loop that was compiled and kept, and the loop."""

    def total(numbers, factor):
        result = 0
        for n in numbers:
            result += n * factor
        return result

    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    module = SimpleNamespace(LOOPS={"total": Signature(("i8 1", "i8"), 1)}, total=numba.njit(total))
    loops = machine_code.compiled("rounding", module)
    (path,) = tmp_path.glob("lrconvert.*")
    return path, loops


def test_damage_is_noticed_before_anything_is_linked(kept):
    """A byte in the digest, the header or the code, or a missing end: nothing is loaded."""
    path, loops = kept
    numbers = np.arange(5)
    assert loops.total(numbers, 3) == machine_code.load("rounding").total(numbers, 3) == 30
    whole = path.read_bytes()
    for place in (0, 31, 40, whole.index(b"\n") + 100, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert machine_code.load("rounding") is None
    for end in (0, 10, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert machine_code.load("rounding") is None


def test_code_of_other_loops_or_versions_is_not_taken(kept, monkeypatch):
    monkeypatch.setattr(machine_code, "_key", lambda name, llvm: "another")
    assert machine_code.load("rounding") is None
    assert machine_code.load("no-such-loops") is None


@pytest.mark.parametrize("numbers", [np.arange(5.0), np.arange(10)[::2], np.ones((2, 2), np.int64)], ids=str)
def test_other_arrays_are_refused(kept, numbers):
    """Another dtype, strides, or dimensions: the code would read what is not there."""
    with pytest.raises(TypeError, match="takes"):
        kept[1].total(numbers, 3)
    with pytest.raises(ValueError, match="zip"):
        kept[1].total(np.arange(5))


def test_code_that_needs_numba_is_not_kept(tmp_path, monkeypatch):
    """A loop that allocates."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    square = numba.njit(lambda numbers: int((numbers * numbers)[0]))
    module = SimpleNamespace(LOOPS={"square": Signature(("i8 1",), 1)}, square=square)
    assert machine_code.compiled("rounding", module) is None and not list(tmp_path.glob("lrconvert.*"))


def test_code_of_a_numba_that_was_not_tested_is_not_called(tmp_path, monkeypatch):
    """How compiled functions are called is no promise of numba's."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(numba, "__version__", "0.99.0")
    module = SimpleNamespace(LOOPS={"one": Signature(("i8",), 1)}, one=numba.njit(lambda n: n + 1))
    assert machine_code.compiled("rounding", module) is None and not list(tmp_path.glob("lrconvert.*"))


def test_without_a_folder_that_can_be_written_to_loops_are_compiled_all_the_same(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr(machine_code, "_paths", lambda name, llvm: [tmp_path / "file" / "a.o", tmp_path / "b.o"])
    module = SimpleNamespace(LOOPS={"one": Signature(("i8",), 1)}, one=numba.njit(lambda n: n + 1))
    assert machine_code.compiled("rounding", module).one(2) == 3
    assert machine_code.load("rounding").one(2) == 3 and (tmp_path / "b.o").exists()
