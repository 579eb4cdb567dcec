"""Batches on other programs' clusters: Dask while its workers are killed, and the recipe for Ray. Each runs in an
environment of its own (tests/peers), and is skipped by name without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import random_lora
from peers import make

from lrconvert import api

HERE = Path(__file__).resolve().parent.parent / "peers"
DIFFERENT = 8


def tiny(root: Path, count: int) -> Path:
    """A folder of that many tiny adapters; a few are different, the others links to them."""
    (root / "first").mkdir()
    for number in range(DIFFERENT):
        lora = random_lora([(32, 32)] * 2, seed=number)
        api.export(lora, root / "first" / f"{number}", to="peft-lora")
    for number in range(count):
        folder = root / "in" / f"adapter-{number:04}"
        folder.mkdir(parents=True)
        for file in (root / "first" / f"{number % DIFFERENT}").iterdir():
            os.link(file, folder / file.name)
    return root / "in"


def run(peer: str, *words: object) -> dict[str, Any]:
    """What the runner of a peer prints; skips the test without its environment."""
    if make.environment(peer) is None:
        pytest.skip(f"no environment of {peer}: python tests/peers/make.py {peer}")
    script = [sys.executable, str(HERE / f"run_{peer}.py"), *map(str, words)]
    path = os.pathsep.join([str(HERE.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(script, capture_output=True, text=True, check=False, env=environment, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def outputs(folder: Path) -> dict[int, set[bytes]]:
    """The contents of the outputs, by which of the different adapters they were made from."""
    made: dict[int, set[bytes]] = {}
    for path in folder.glob("*.lrc"):
        made.setdefault(int(path.stem[-4:]) % DIFFERENT, set()).add(path.read_bytes())
    return made


@pytest.mark.slow
def test_workers_of_dask_are_killed_at_random(tmp_path: Path) -> None:
    """Of 1,000 adapters none is lost and none fails; only those begin again that were in flight at a worker that was
    killed, or whose outcome had just come from it; nothing half-written is left, and equal adapters have equal bytes.
    """
    count, kills = 1000, 6
    told = run("dask", tiny(tmp_path, count), tmp_path / "out", tmp_path / "log", kills)
    assert told["killed"] >= 3, told
    assert sum(told["counts"].values()) == count and set(told["counts"]) <= {"done", "skipped"}, told
    assert told["late"] == told["unexplained"] == [], told
    assert told["unheard"] <= told["held"], told  # those that the scheduler had not heard to have arrived
    assert len(list((tmp_path / "out").glob("*.lrc"))) == count
    assert {p.name for p in (tmp_path / "out").iterdir() if p.suffix != ".lrc"} - {"manifest.jsonl"} == set()
    assert {len(contents) for contents in outputs(tmp_path / "out").values()} == {1}
    assert (tmp_path / "out" / "manifest.jsonl").read_text().count('{"state":"done"') == count


@pytest.mark.slow
def test_the_recipe_for_ray(tmp_path: Path) -> None:
    """Every job of a batch is done by tasks that call `convert_one`."""
    assert run("ray", tiny(tmp_path, 40), tmp_path / "out") == {"done": 40}
    assert sum(map(len, outputs(tmp_path / "out").values())) == DIFFERENT
