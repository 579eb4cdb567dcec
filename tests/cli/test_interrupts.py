"""Ctrl-C at any moment: nothing is left, or something that the same command goes on with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
from conftest import ADAPTERS
from kills import ONE_FILE, Kills, commands

from lrconvert import api


@pytest.mark.slow
def test_interrupted_before_any_call_of_the_disk(tmp_path: Path) -> None:
    """What writes one file is sampled at every tenth or so of its calls, and at the last ones; a merge, an export and a
    refinement at some: repeated, they leave the bytes of a run without a break, and nothing else."""
    chosen = {
        c.name: c for c in commands() if c.name in (*ONE_FILE, "merge", "export", "refine", "merge in place, resume")
    }
    kills, draw = Kills(tmp_path, chosen), Random(0)
    moments = []
    for name, calls in kills.calls.items():
        count = 4 if name in ("compress", "refine") else 6
        moments += [(name, at) for at in sorted({1, calls, *draw.sample(range(1, calls + 1), min(count, calls))})]
    problems = [problem for name, at in moments if (problem := kills.interrupt(name, at))]
    assert not problems and len(moments) > 25


@pytest.mark.parametrize("after", [0.0, 0.4, 0.8])
def test_an_interrupted_fit_leaves_nothing(after: float, tmp_path: Path) -> None:
    """At sampled shares of the work; nothing is on the disk before the end."""

    def stop(share: float, text: str) -> None:
        if share >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.write(api.compress(ADAPTERS / "llama-plain", target_ratio=8, progress=stop).compact, tmp_path / "x.lrc")
    assert not list(tmp_path.iterdir())


def test_ctrl_c_is_one_line(tmp_path: Path) -> None:
    """The program says so in a line, without a traceback, and ends with the status that shells expect."""
    code = (
        "import sys\nfrom lrconvert import api, cli\n"
        "def compress(*a, **k): raise KeyboardInterrupt\n"
        "api.compress = compress\ncli.main()"
    )
    words = ["compress", ADAPTERS / "llama-plain", "-o", tmp_path / "x.lrc"]
    done: Any = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 130 and done.stderr.strip() == "aborted" and not list(tmp_path.iterdir())
