"""The benchmark for a GPU, at a toy's size on a processor: each of its cells measures something."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import ROOT

pytest.importorskip("peft", reason="peft (the extra `bench`) is absent")
torch = pytest.importorskip("torch")

pytestmark = pytest.mark.medium  # a few steps of small models


@pytest.fixture(scope="module")
def gpu() -> Iterator[Any]:
    """The script as a module; its short names are gone afterwards."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import gpu as module

        yield module
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
        for name in ("gpu", "refining", "decoders", "cells"):
            sys.modules.pop(name, None)


def test_every_cell_measures_seconds(gpu: Any) -> None:
    """Each task runs, and refinement says what a step of a later epoch takes."""
    for task in gpu.TASKS:
        row = gpu.measured(task, "tiny", "cpu")
        assert row["seconds"] > 0, task
        assert ("again" in row) == (task.startswith("refine ") and "PEFT" not in task)


def test_cells_without_their_device_are_skipped_by_name(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are named and not recorded, so that a machine with a GPU measures them; the table says which ran on none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not list(gpu.all_cells(("cuda",)))
    skipped = capsys.readouterr().out.splitlines()
    assert len(skipped) == len(gpu.TASKS) * (len(gpu.SHAPES) - 1)
    assert "refine lowrank, 8b, cuda: skipped, no GPU" in skipped
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert len(list(gpu.all_cells(("cuda",)))) == len(skipped)
    monkeypatch.setattr(gpu.cells, "read", lambda name: {"vblora fit, 8b, cpu": {"seconds": 2.0}})
    assert "| vblora fit, 8b | not run | 2.00 s |" in gpu.table()
