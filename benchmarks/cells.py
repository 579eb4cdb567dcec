"""Benchmark cells: measured once, appended to ``benchmarks/results/*.jsonl``, rendered into tables of README and docs.

A cell is one JSON line: its name, what was measured, the commit, the machine, the seconds it took. Running again skips
cells that are there; ``--only PATTERN`` and ``--again`` choose.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results"
ASSETS = ROOT.parent / "shared" / "assets"  # real adapters and data sets; what needs them is skipped without

Cell = tuple[str, Callable[[], dict[str, Any]]]  # its name, and what measures it

# Python for child processes: the peak memory of a process in KiB. VmHWM, not getrusage: that of a child starts with the
# peak of the process that started it.
PEAK = """
import json, pathlib, sys, time
def peak():
    return int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


def child(*words: str, two_threads: bool = False) -> dict[str, Any]:
    """Run Python with these arguments and return the JSON object of its last line, or ``{"failed": why}``."""
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS") if two_threads else ()
    environment = {**os.environ, **dict.fromkeys(threads, "2")}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:200]}
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def peft_config(rank: int, alpha: int, modules: Iterable[str]) -> str:
    """Return the adapter_config.json of a LoRA on these modules, given by their names in a layer."""
    targets = sorted({module.split(".")[-1] for module in modules})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": targets, "task_type": "CAUSAL_LM"}
    return json.dumps({**config, "base_model_name_or_path": "llama-3-8b-shaped"})


def machine() -> str:
    """Return processor count, model and memory of this machine; no host name."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"model name\s*: (.+)", cpuinfo.read_text())
        model = match[1] if match else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{len(os.sched_getaffinity(0))} cores of {model}, {memory:.0f} GiB"


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def read(name: str) -> dict[str, dict[str, Any]]:
    """Return the latest measurement of every cell of a benchmark, by cell name."""
    path = RESULTS / f"{name}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {cell["cell"]: cell for cell in map(json.loads, lines)}


def measure(name: str, cells: Iterable[Cell], *, only: str = "", again: bool = False) -> None:
    """Run the cells that are missing (or chosen) and append what they return."""
    done = read(name)
    RESULTS.mkdir(exist_ok=True)
    for cell, run in cells:
        if not re.search(only, cell) or (cell in done and not again):
            continue
        start = time.perf_counter()
        measured = run()
        row = {
            "cell": cell,
            **measured,
            "wall_seconds": round(time.perf_counter() - start, 2),
            "commit": commit(),
            "machine": machine(),
        }
        with (RESULTS / f"{name}.jsonl").open("a") as out:
            out.write(json.dumps(row) + "\n")
        print(cell, {k: v for k, v in row.items() if k not in ("cell", "machine", "commit")}, flush=True)


def main(name: str, about: str | None, cells: Callable[[], Iterable[Cell]], table: Callable[[], str]) -> None:
    """Run the command line that every benchmark has."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a pattern that cell names must contain")
    parser.add_argument("--again", action="store_true", help="measure cells that are there, too")
    parser.add_argument("--render", action="store_true", help="write the table and measure nothing")
    arguments = parser.parse_args()
    if arguments.render:
        render(name, table())
    else:
        measure(name, cells(), only=arguments.only, again=arguments.again)


def render(name: str, table: str) -> None:
    """Put `table` between the markers of that name, in README.md or a page of docs/."""
    start, end = f"<!-- table {name} -->", f"<!-- end table {name} -->"
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    path = next((page for page in pages if start in page.read_text()), None)
    if path is None or end not in path.read_text():
        raise SystemExit(f"no page has markers for {name}")
    text = path.read_text()
    head, tail = text.split(start)[0], text.split(end)[1]
    path.write_text(f"{head}{start}\n{table.strip()}\n{end}{tail}")


def markdown(head: list[str], rows: list[list[Any]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join(['---'] + ['---:'] * (len(head) - 1))}|"]
    return "\n".join(lines + [f"| {' | '.join(map(str, row))} |" for row in rows])
