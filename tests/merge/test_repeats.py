"""A command that is repeated after a kill does its work once, wherever the kill was: to the very last call."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from conftest import random_lora
from crashes import KINDS, Scene, calls_of, whole
from models import random_base

from lrconvert.api import merge, unmerge
from lrconvert.core import errors
from lrconvert.io.checkpoint import JOURNAL
from lrconvert.merge import Scaled, recover
from lrconvert.testing import faults

pytestmark = pytest.mark.medium

Run = Callable[..., Any]
WAYS = list(product((False, True), repeat=3))  # resume at first, resume then, recover between


@pytest.fixture(scope="module")
def stacks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path, Run]]:
    """On a model that holds a merge already: one more, and undoing that, with its number and without."""
    place = tmp_path_factory.mktemp("stacks")
    one, two = (random_lora(((12, 16), (16, 20)), seed=n, scale=0.3) for n in (1, 2))
    random_base(place / "base", one, "BF16", shards=2)
    first = shutil.copytree(place / "base", place / "first")
    merge(first, [one], in_place=True)
    both = shutil.copytree(first, place / "both")
    merge(both, [Scaled(two, 0.5)], in_place=True)
    noted, numbered = (shutil.copytree(both, place / name) for name in ("noted", "numbered"))
    unmerge(noted, in_place=True)
    unmerge(numbered, in_place=True, number=2)
    assert whole(numbered) == whole(first)
    assert set(whole(noted)) - set(whole(first)) == {".lrconvert/undone.json"}
    return {
        "stacked merge": (first, both, lambda m, **o: merge(m, [Scaled(two, 0.5)], in_place=True, **o)),
        "stacked unmerge": (both, noted, lambda m, **o: unmerge(m, in_place=True, **o)),
        "numbered unmerge": (both, numbered, lambda m, **o: unmerge(m, in_place=True, number=2, **o)),
    }


def once_more(run: Run, model: Path, resume: bool) -> None:
    """Repeat a command as its messages advise."""
    try:
        run(model, resume=resume)
    except errors.UnfinishedError:
        assert not resume
        recover(model)
        once_more(run, model, resume)
    except (errors.UndoError, errors.UndoOrderError) as error:  # there is nothing to undo any more
        assert not resume and ("nothing is left to do" in str(error) or "was undone last" in str(error))


def kill_and_repeat(
    before: Path, after: Path, run: Run, place: Path, ways: Callable[[int, int], Iterable[Any]]
) -> None:
    """Kill the command before every call and after the last, and repeat it."""
    wanted = whole(after)
    for first in (False, True):
        work = shutil.copytree(before, place / "model")
        count = len(calls_of(lambda work=work, first=first: run(work, resume=first)))
        shutil.rmtree(work)
        for at in range(1, count + 2):
            for resume, then, recovers in ways(at, count):
                if resume != first:
                    continue
                model = shutil.copytree(before, place / "model")
                with faults.installed(faults.Killer(at)):
                    try:
                        run(model, resume=resume)
                    except faults.Killed:
                        assert at <= count
                    else:
                        assert at > count and whole(model) == wanted
                if recovers:
                    recover(model)
                once_more(run, model, then)
                assert whole(model) == wanted, (at, count, resume, then, recovers)
                assert not (model / JOURNAL).exists() and recover(model).state == "clean"
                shutil.rmtree(model)


def some(at: int, count: int) -> list[Any]:
    """By turns; of the last calls, where it is over but for tidying, more."""
    return WAYS if at > count - 2 else [WAYS[(at // 3) % len(WAYS)]] if at % 3 == 0 or at > count - 16 else []


@pytest.mark.parametrize("act", ("merge", "unmerge"))
@pytest.mark.parametrize("kind", ("mixed", pytest.param("swap", marks=pytest.mark.slow)))
def test_a_command_repeated_after_a_kill(kind: str, act: str, scenes: dict[str, Scene], place: Path) -> None:
    """The bytes of a run without a break, with `resume` and without, and with `recover` between."""
    kill_and_repeat(*scenes[kind].acts()[act], place, some)


@pytest.mark.parametrize("act", ("stacked merge", "stacked unmerge", "numbered unmerge"))
def test_on_a_stack_nothing_is_done_twice(act: str, stacks: Any, place: Path) -> None:
    """Where one merge too many could be made or undone."""
    kill_and_repeat(*stacks[act], place, some)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("act", ("merge", "unmerge", "stacked merge", "stacked unmerge", "numbered unmerge"))
def test_killed_at_every_call_in_every_way(act: str, scenes: dict[str, Scene], stacks: Any, place: Path) -> None:
    for kind in KINDS if act in ("merge", "unmerge") else ("",):
        kill_and_repeat(*(scenes[kind].acts() if kind else stacks)[act], place, lambda at, count: WAYS)


def test_a_finished_new_folder_is_gone_on_with(scenes: dict[str, Scene], place: Path) -> None:
    """Killed when the output was in place already, and repeated with `resume`: it says so, and tidies. Another output
    of that name stays refused."""
    scene = scenes["swap"]
    made = len(calls_of(lambda: merge(scene.base, [scene.adapter], place / "counted", resume=True)))
    done = 0
    for at in range(made - 12, made + 2):
        out = place / f"out-{at}"
        try:
            with faults.installed(faults.Killer(at)):
                merge(scene.base, [scene.adapter], out, resume=True)
        except faults.Killed:
            pass
        done += merge(scene.base, [scene.adapter], out, resume=True).already_done
        assert whole(out) == whole(scene.merged)
        assert not list(place.glob(".*"))
    assert done > 3
    for options in ({"shard_bytes": 100}, {"undo": False}):
        with pytest.raises(errors.OutputExistsError):
            merge(scene.base, [scene.adapter], out, resume=True, **options)
    with pytest.raises(errors.OutputExistsError):
        merge(scene.base, [Scaled(random_lora(((12, 16), (16, 20))), 0.5)], out, resume=True)
    with pytest.raises(errors.OutputExistsError):
        merge(scene.base, [scene.adapter], out)
