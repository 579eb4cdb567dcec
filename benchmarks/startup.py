"""How long commands take before they work: processor time against that of an interpreter that imports numpy and click.

python benchmarks/startup.py        prints the table; each command runs 11 times, the least counts
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLI = [sys.executable, "-m", "lrconvert"]
COMMANDS = {
    "import numpy, click": [sys.executable, "-c", "import numpy, click"],
    "lrconvert --help": [*CLI, "--help"],
    "lrconvert validate": [*CLI, "validate", str(ROOT / "fixtures" / "golden" / "v1" / "lowrank" / "0.lrc")],
    "lrconvert inspect": [*CLI, "inspect", str(ROOT / "fixtures" / "adapters" / "llama-plain")],
}
RUNS = 11


def seconds(words: list[str]) -> float:
    """The least processor time of a process, user and system."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    least = float("inf")
    for _ in range(RUNS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(words, stdout=subprocess.DEVNULL, check=True, env=environment)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        least = min(least, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return least


if __name__ == "__main__":
    measured = {name: seconds(words) for name, words in COMMANDS.items()}
    peer = measured["import numpy, click"]
    for name, time in measured.items():
        print(f"{name:22} {time:6.3f} s  {time / peer:5.2f}")
