"""The cost of serving compact files of an 8B model by name: the first request for one, the next, and many at once.

    python benchmarks/serving.py             measures what is missing, each cell in a process of its own
    python benchmarks/serving.py --render    writes the table of docs/benchmarks.md

The LoRA is that of `scale.py`: rank 16 on the seven linear layers of Llama-3-8B, random. Its compact files are
expanded to PEFT folders in BF16 by a process that has expanded another file before, as a server has. *First*: the file
is read, checked, expanded, and the folder written and synced. *Again*: the folder is there; the least of 50. *Eight*:
as many processes ask for a new file at the same moment. Processor time is user and system time.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import cells
import loading

FORMS = [*((method, "1.6 %") for method in ("lowrank", "vblora", "sbora")), ("lowrank", "10 %")]
_MEASURE = """
import multiprocessing, tempfile
from lrconvert.api import expanding
path, known = sys.argv[1:]
options = expanding.ExpandOptions(dtype="BF16")

def ask(cache, file=path):
    cpu, wall = time.process_time(), time.perf_counter()
    made = expanding.expand(expanding.local_file(file), cache, options)
    return made, time.process_time() - cpu, time.perf_counter() - wall

def one_of_eight(cache, barrier, answers):
    barrier.wait()
    made, cpu, wall = ask(cache)
    answers.put((made.was_there, cpu, wall))

with tempfile.TemporaryDirectory() as scratch:
    ask(scratch + "/warm", known)
    made, cpu, wall = ask(scratch + "/one")
    again = [ask(scratch + "/one") for _ in range(50)]
    assert not made.was_there and all(hit.was_there for hit, *_ in again)
    fork = multiprocessing.get_context("fork")
    barrier, answers = fork.Barrier(8), fork.Queue()
    askers = [fork.Process(target=one_of_eight, args=(scratch + "/eight", barrier, answers)) for _ in range(8)]
    for asker in askers:
        asker.start()
    eight = [answers.get() for _ in askers]
    for asker in askers:
        asker.join()
    files = {p.name: p.stat().st_size for p in made.folder.iterdir()}
    print(json.dumps({
        "first_cpu": round(cpu, 3), "first_wall": round(wall, 3),
        "again_ms": round(1e3 * min(cpu for _, cpu, _ in again), 2),
        "made_by_eight": sum(not was_there for was_there, *_ in eight),
        "eight_cpu": round(sum(cpu for _, cpu, _ in eight), 3), "eight_wall": round(max(w for *_, w in eight), 3),
        "folder_bytes": sum(files.values()), "rank": json.loads((made.folder / "adapter_config.json").read_text())["r"],
    }))
"""


def measure(method: str, share: str) -> dict[str, Any]:
    """Return what one form costs."""
    path = loading.compact(method, share)
    known = cells.ROOT / "fixtures" / "golden" / "v1" / "lowrank" / "0.lrc"
    return {"bytes": path.stat().st_size, **cells.child("-c", cells.PEAK + _MEASURE, str(path), str(known))}


def all_cells() -> Iterator[cells.Cell]:
    yield from ((f"{method} {share}", partial(measure, method, share)) for method, share in FORMS)


def table() -> str:
    """Return the table of docs/benchmarks.md."""
    rows = []
    for name, cell in cells.read("serving").items():
        first = f"{cell['first_cpu']:.2f} s ({cell['first_wall']:.2f})"
        eight = f"{cell['made_by_eight']} made, {cell['eight_cpu']:.2f} s ({cell['eight_wall']:.2f})"
        again = f"{cell['again_ms']:.1f} ms"
        rows.append([name, f"{cell['bytes']:,}", f"{cell['folder_bytes']:,}", cell["rank"], first, again, eight])
    head = ["file", "bytes", "bytes of the folder", "rank", "first", "again", "eight at once"]
    return cells.markdown(head, rows)


if __name__ == "__main__":
    cells.main("serving", __doc__, all_cells, table)
