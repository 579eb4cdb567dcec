"""No work for a target grows with the number of the others: calls are counted, never seconds."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from conftest import random_lora
from fits import random_compact

from lrconvert import api
from lrconvert.formats.lrc import file
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter
from lrconvert.methods import base as methods
from lrconvert.methods.base import FitContext

METHODS = [m.id for m in methods.all_methods()]
FITTED = [m for m in METHODS if m != "vblora"]  # which trains for some steps, whatever it is given
FEW, MANY = 16, 48


def calls(work: Callable[[], Any]) -> int:
    """How many functions, in Python and in C, are called by `work`."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


def lora_of(count: int) -> LoraAdapter:
    lora = random_lora([(24, 16)] * count, rank=2, seed=3)
    return replace(lora, targets=tuple(sorted(lora.targets, key=lambda pair: pair.target)))


def growth(work: Callable[[int], Callable[[], Any]]) -> float:
    """Calls for `MANY` targets over those for `FEW`, in units of what linear growth would give: at most 1."""
    few, many = work(FEW), work(MANY)
    few(), many()  # tables that are made once
    return calls(many) / calls(few) * FEW / MANY


def random_file(name: str, count: int) -> CompactAdapter:
    """Any numbers of the method's first example."""
    method, lora = methods.get(name), lora_of(count)
    config = method.plan(lora, method.Options(**method.examples[0]), None, FitContext())
    return random_compact(method, config, lora.shapes())


@pytest.mark.parametrize("method", METHODS)
def test_expanding_is_linear(method):
    """The factors of all targets are found with work in proportion to their number."""

    def work(count: int) -> Callable[[], Any]:
        compact = random_file(method, count)
        return lambda: [None for _ in methods.expand_all(compact)]

    assert growth(work) < 1.2


@pytest.mark.parametrize("method", FITTED)
def test_files_are_linear(method, tmp_path):
    """So are writing and reading."""

    def work(count: int) -> Callable[[], Any]:
        compact = api.convert(lora_of(count), method, target_ratio=2).compact
        path = tmp_path / f"{count}.lrc"
        return lambda: (file.write(compact, path, overwrite=True), file.read(path))

    assert growth(work) < 1.2


@pytest.mark.parametrize("method", METHODS)
def test_nothing_keeps_an_adapter(method):
    """An adapter that nobody uses any more is gone, whatever was computed from it."""
    compact = random_file(method, 3)
    for _ in methods.expand_all(compact):
        pass
    gone = weakref.ref(compact.config)
    del compact
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("method", FITTED)
def test_fits_are_linear(method):
    """A conversion under a budget looks at every target a number of times that does not grow with the others'; the
    steps of a search, which do a little, leave room."""

    def work(count: int) -> Callable[[], Any]:
        lora = lora_of(count)
        return lambda: api.convert(lora, method, target_ratio=4)

    assert growth(work) < 2


def test_leaving_out_is_linear():
    """Targets are left out by looking at each once."""

    def work(count: int) -> Callable[[], Any]:
        lora = lora_of(count)
        return lambda: api.convert(lora, "lowrank", bits=12, exclude=["[02468][.]proj"], dry_run=True)

    assert growth(work) < 1.2
