"""Fleets: what an adapter of a million numbers costs in a batch, and what a hundred thousand cost the process that
gives out the work.

    python benchmarks/fleet.py            measures what is missing
    python benchmarks/fleet.py --render   writes the table of docs/scale.md

`COUNT` random adapters of 981,504 numbers (rank 8 on the 7 linear layers of 9 blocks, 768 wide) are converted by two
processes; processor time is that of all processes, their starts included. ``again`` is the same command when every
output is there, with the manifest of the folder and without it.

Of `MANY` tiny adapters (two files each, links to the same ones) the conversions cost nothing: a stand-in copies one
output, and what is left is the work of the parent. Its peak memory is measured, and its processor time.

`CONVERTED` tiny adapters (rank 4 on two layers of two blocks, 64 wide; links to 64 different ones) are converted in
earnest by two processes, with a line of JSON for each, and passed by in a second run. The parent's peak memory is read
when so many lines have come as `MARKS` says. This takes a quarter of an hour of processor time and 1.5 GB of the disk.

`LARGE` adapters of 5.2 million numbers (links to 4 different ones) are converted by one process and by two.

The table on paper (`million`) is computed from these cells: what a million adapters of 40 million numbers cost.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import batch
import cells

from lrconvert.api.batch import manifest

COUNT = 64
MANY = (2_000, 20_000)
METHODS = ("lowrank", "nola", "sbora", "bone")
CONVERTED = 100_000
MARKS = (1_000, 10_000, 50_000, 100_000)
_DIFFERENT = 64
_LINKS = 20_000  # of one file; a file system allows some 65,000
LARGE = 1_000
_LARGE_DIFFERENT, _LARGE_BLOCKS = 4, 18
NUMBERS = 5_234_688  # of each
_PAPER_COUNT, _PAPER_NUMBERS, _PAPER_RATIO = 1_000_000, 40_000_000, 50
# What one adapter costs a store, counted by a server of S3: its state before and after and its files, those two files,
# the state of the output three times and of what was stored, the output.
_RECORD = 575  # bytes of a record with its digests, which the stand-in does not make
_REQUESTS = {"listings": 3, "reads": 2, "states (HEAD)": 4, "writes": 1}
PARENT = """
from concurrent.futures import Executor, Future
from pathlib import Path
from lrconvert import Outcome, convert_many
from lrconvert.api.batch import places
class Copies(Executor):
    def submit(self, call, job):
        output = Path(job.output)
        output.parent.mkdir(exist_ok=True)
        output.write_bytes(b"compact")
        stamps = places.source_state(job.source).digest, places.output_state(job.output).digest
        report = {"targets": list(range(1000))}
        future = Future()
        future.set_result(Outcome(job.source, job.output, "done", 7, 7, 0.9, report=report, stamps=stamps))
        return future
options = {"executor": Copies(), "in_flight": 2, "on_outcome": lambda outcome: None}
done = convert_many(sys.argv[1], sys.argv[2], "lowrank", **options)
print(json.dumps({"cpu_seconds": round(time.process_time(), 2), "peak_mib": peak() // 1024, **done.counts}))
"""


def convert(method: str) -> dict[str, Any]:
    """Processor seconds of a batch of a million numbers each, and again with its manifest and without."""
    layers = {layer: (out * 3 // 4, inner * 3 // 4) for layer, (out, inner) in batch.LAYERS.items()}
    with tempfile.TemporaryDirectory() as scratch:
        root, out = Path(scratch) / "in", Path(scratch) / "out"
        for number in range(COUNT):
            batch.adapter(root / f"adapter-{number:03}", number, 8, 9, layers)
        words = [f"lora-to-{method}", root, "-o", out, "--target-ratio", "50", "--jobs", "2"]
        first, again = seconds(words), seconds(words)
        (out / manifest.NAME).unlink()
        return {"cpu_seconds": first, "again_seconds": again, "checked_seconds": seconds(words)}


def seconds(words: list[Any]) -> float:
    """Return the processor seconds of a command and its processes. Raises CalledProcessError if it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    batch.command(words)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2)


def many(count: int) -> dict[str, Any]:
    """The parent's processor seconds and peak memory for so many adapters, and again when all are finished."""
    with tempfile.TemporaryDirectory() as scratch:
        root, out = Path(scratch) / "in", Path(scratch) / "out"
        for number in range(count):
            folder = root / f"adapter-{number:06}"
            folder.mkdir(parents=True)
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                first = Path(scratch) / f"{number // _LINKS}-{name}"
                if not first.exists():
                    first.write_text("{}")
                os.link(first, folder / name)
        made, again = (cells.child("-c", cells.PEAK + PARENT, str(root), str(out)) for _ in range(2))
        line = round((out / manifest.NAME).stat().st_size / count)
        peaks = {"again_seconds": again["cpu_seconds"], "again_peak_mib": again["peak_mib"]}
        return {**made, **peaks, "manifest_bytes": line}


def converted(count: int) -> dict[str, Any]:
    """The parent's peak memory as so many tiny adapters are converted, and as they are passed by; the processor
    seconds of all processes, of the parent alone, and by the clock."""
    layers = dict.fromkeys(("self_attn.q_proj", "self_attn.v_proj"), (64, 64))
    with tempfile.TemporaryDirectory() as scratch:
        root, out = Path(scratch) / "in", Path(scratch) / "out"
        first = [batch.adapter(Path(scratch) / f"first-{n}", n, 4, 2, layers) for n in range(_DIFFERENT)]
        for number in range(count):
            folder = root / f"adapter-{number:06}"
            folder.mkdir(parents=True)
            for file in first[number % _DIFFERENT].iterdir():
                os.link(file, folder / file.name)
        words = ["lora-to-bone", root, "-o", out, "--rank", "2", "--bits", "16", "--jobs", "2", "--json"]
        made, again = watched(words), watched(words)
        return {**made, **{f"again_{name}": value for name, value in again.items()}}


def large(processes: int) -> dict[str, Any]:
    """Adapters of 5.2 million numbers: seconds of all processes and by the clock, of a second run, and the parent."""
    with tempfile.TemporaryDirectory() as scratch:
        root, out = Path(scratch) / "in", Path(scratch) / "out"
        first = [batch.adapter(Path(scratch) / f"f{n}", n, blocks=_LARGE_BLOCKS) for n in range(_LARGE_DIFFERENT)]
        for number in range(LARGE):
            folder = root / f"adapter-{number:04}"
            folder.mkdir(parents=True)
            for file in first[number % _LARGE_DIFFERENT].iterdir():
                os.link(file, folder / file.name)
        words = ["lora-to-lowrank", root, "-o", out, "--target-ratio", "50", "--jobs", processes, "--json"]
        made, again = watched(words, (LARGE,)), watched(words, (LARGE,))
        return {**made, **{f"again_{name}": value for name, value in again.items()}}


def watched(words: list[Any], marks: Sequence[int] = MARKS) -> dict[str, Any]:
    """Run a command that prints a line for each adapter: `peaks`, MiB of the command itself after so many lines, and
    `files`, the most that it had open then."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    peaks, parent, lines, files = {}, 0.0, 0, 0
    with subprocess.Popen(
        [sys.executable, "-m", "lrconvert.cli", *map(str, words)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for lines, _ in enumerate(process.stdout, 1):
            if lines in marks:
                proc = Path(f"/proc/{process.pid}")
                files = max(files, len(list(proc.joinpath("fd").iterdir())))
                peaks[f"{lines:,}"] = int(proc.joinpath("status").read_text().split("VmHWM:")[1].split()[0]) // 1024
                ticks = proc.joinpath("stat").read_text().rpartition(")")[2].split()[11:13]
                parent = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    if process.returncode:
        raise SystemExit(f"the batch ended with status {process.returncode} after {lines} lines")
    after, clock = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    shown = {"files": files, "peaks": peaks}
    return {**shown, "cpu_seconds": round(used, 2), "parent_seconds": parent, "clock_seconds": round(clock, 1)}


def all_cells() -> Iterator[cells.Cell]:
    for method in METHODS:
        yield method, partial(convert, method)
    for count in MANY:
        yield f"{count:,}", partial(many, count)
    for processes in (1, 2):
        yield f"{LARGE:,} of 5 M, --jobs {processes}", partial(large, processes)
    yield f"{CONVERTED:,} converted", partial(converted, CONVERTED)


def table() -> str:
    done = cells.read("fleet")
    rows: list[list[Any]] = []
    for method in METHODS:
        cell = done.get(method, {})
        rows.append([f"{COUNT} of 1 M numbers, {method}", *_row(cell, COUNT), ""])
    for count in MANY:
        cell = done.get(f"{count:,}", {})
        peak = max(cell["peak_mib"], cell["again_peak_mib"]) if cell else "not run"
        rows.append([f"{count:,}, the parent alone", *_row(cell, count), peak])
    for processes in (1, 2):
        cell = done.get(f"{LARGE:,} of 5 M, --jobs {processes}", {})
        shown = {**cell, "again_seconds": cell["again_cpu_seconds"]} if cell else {}
        row = [*_row(shown, LARGE), max(_peaks(cell), default="not run")]
        rows.append([f"{LARGE:,} of 5.2 M numbers, lowrank, --jobs {processes}", *row])
    cell = done.get(f"{CONVERTED:,} converted", {})
    if cell:
        cell = {**cell, "again_seconds": cell["again_cpu_seconds"]}
    rows.append([f"{CONVERTED:,} small ones, bone", *_row(cell, CONVERTED), max(_peaks(cell), default="not run")])
    again = ["again", "again, without the manifest", "again, seconds in all"]
    whole = cells.markdown(["processor milliseconds for each", "first", *again, "MiB of the parent"], rows)
    return "\n\n".join([whole, *([_growth(cell)] if cell else []), million()])


def million() -> str:
    """On paper, from the cells: what a million adapters of 40 million numbers cost, read from a store and written to
    it, at a ratio of 50."""
    done = cells.read("fleet")
    cell, few, parent = (done.get(name) for name in (f"{LARGE:,} of 5 M, --jobs 1", f"{MANY[0]:,}", f"{MANY[-1]:,}"))
    if cell is None or few is None or parent is None:
        return "On paper: not measured yet."
    kept = 2**20 * (parent["again_peak_mib"] - few["again_peak_mib"]) / (MANY[-1] - MANY[0])
    scale = _PAPER_NUMBERS / NUMBERS
    core_hours = cell["cpu_seconds"] / LARGE * scale * _PAPER_COUNT / 3600
    again_hours = parent["again_seconds"] / MANY[-1] * _PAPER_COUNT / 3600
    source = 2 * _PAPER_NUMBERS * _PAPER_COUNT
    rows: list[list[Any]] = [
        ["processor time of all workers", f"{core_hours:,.0f} hours"],
        ["cores that do it in a day", f"{core_hours / 24:,.0f}"],
        ["processor time of the parent", f"{parent['cpu_seconds'] / MANY[-1] * _PAPER_COUNT / 60:,.0f} minutes"],
        ["a second run on one disk, when all is done", f"{60 * again_hours:,.0f} minutes"],
        ["bytes read", f"{source / 1e12:,.0f} TB"],
        ["bytes written", f"{source / _PAPER_RATIO / 1e12:,.1f} TB"],
        ["read by each core", f"{source / core_hours / 3600 / 1e6:,.0f} MB/s"],
        *([f"requests: {what}", f"{count * _PAPER_COUNT / 1e6:,.0f} million"] for what, count in _REQUESTS.items()),
        ["the manifest", f"{_RECORD * _PAPER_COUNT / 1e9:,.1f} GB"],
        ["memory of the parent", f"{parent['again_peak_mib'] + kept * _PAPER_COUNT / 2**20:,.0f} MiB"],
    ]
    return cells.markdown(["on paper: a million adapters of 40 M numbers, lowrank, ratio 50", ""], rows)


def _peaks(cell: dict[str, Any]) -> list[int]:
    return [peak for name in ("peaks", "again_peaks") for peak in cell.get(name, {}).values()]


def _growth(cell: dict[str, Any]) -> str:
    """Memory of the parent when so many lines have come."""
    rows = [[what, *cell[name].values()] for what, name in (("converted", "peaks"), ("passed by", "again_peaks"))]
    return cells.markdown(["MiB of the parent after so many", *cell["peaks"]], rows)


def _row(cell: dict[str, Any], count: int) -> list[Any]:
    if not cell:
        return ["not run"] * 4
    names = ("cpu_seconds", "again_seconds", "checked_seconds")
    each = {name: 1000 * cell[name] / count for name in names if name in cell}
    return [*(f"{each[name]:.{0 if each[name] > 1 else 2}f}" if name in each else "" for name in names), cell[names[1]]]


if __name__ == "__main__":
    cells.main("fleet", __doc__, all_cells, table)
