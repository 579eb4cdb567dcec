"""What a fleet of many compact adapters costs, beside as many files: bytes, processor seconds, memory, reads.

    python benchmarks/pack.py             measures what is missing, each step in a process of its own
    python benchmarks/pack.py --render    writes the table of docs/guides/fleets.md

Members are made of one adapter of the form bone, 4 bits, rank 2 on 64 x 64 targets with the names of a decoder: the
same settings, other numbers, another source and another share captured. Processor time is user and system time of a
whole process on one thread, with its start; peak is its memory. `one` opens the fleet and gets a member in the middle.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cells

SIZES = ((36, 10), (36, 1_000), (36, 10_000), (224, 1_000))  # targets, members
_MAKE = """
from dataclasses import replace
import numpy as np
from lrconvert import api
from lrconvert.core.dtypes import Stored
from lrconvert.lora.adapter import LoraAdapter, LoraTarget, Provenance, Target
from lrconvert.testing.fleets import variants
folder, targets, count = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
         "mlp.down_proj")[: 7 if targets % 7 == 0 else 4]
rng = np.random.default_rng(0)
layers = [(n // len(names), names[n % len(names)]) for n in range(targets)]
listed = sorted(Target(f"model.layers.{layer}.{name}.weight", (64, 64)) for layer, name in layers)
halves = lambda *shape: Stored("F32", rng.standard_normal(shape).astype("<f4"))
pairs = tuple(LoraTarget(target, halves(4, 64), halves(64, 4), 2.0) for target in listed)
lora = LoraAdapter(pairs, (), Provenance("5a" * 32, "org/base", "main", "CAUSAL_LM", {"source_format": "peft"}))
compact = api.convert(lora, "bone", rank=2, bits=4).compact
folder.mkdir()
for n, one in enumerate(variants(compact, count)):
    api.write(one, folder / f"customer-{n:06}.lrc")
sizes = [path.stat().st_size for path in folder.iterdir()]
from lrconvert.formats.lrc import file
print(json.dumps({"files": sum(sizes), "payload": file.sizes(compact).payload}))
"""
_STEP = """
import os
from lrconvert import Fleet
step, root, source, count = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
more = {}
if step == "build":
    with Fleet.build(root, source) as fleet:
        more = {"bytes": fleet.nbytes, "member": fleet.member("customer-000003").bytes}
elif step == "list":
    more = {"members": sum(1 for _ in Fleet(root).members())}
elif step == "validate":
    more = {"ok": all(result.ok for result in Fleet(root).validate())}
elif step == "gc":
    Fleet(root).gc()
elif step == "add":
    Fleet(root).add({"later": next(pathlib.Path(source).glob("*.lrc"))})
elif step == "one":
    reads, real = [], os.preadv
    def preadv(*arguments):
        reads.append(real(*arguments))
        return reads[-1]
    os.preadv = preadv
    fleet = Fleet(root)
    fleet.read_bytes(f"customer-{count // 2:06}")
    more = {"reads": len(reads), "read_bytes": sum(reads)}
used = os.times()
print(json.dumps({"cpu_seconds": round(used.user + used.system, 2), "peak_kib": peak(), **more}))
"""
STEPS = ("build", "one", "list", "add", "validate", "gc")


def measure(targets: int, count: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as place:
        source, root = f"{place}/files", f"{place}/fleet"
        made = cells.child("-c", cells.PEAK + _MAKE, source, str(targets), str(count))
        steps = {step: cells.child("-c", cells.PEAK + _STEP, step, root, source, str(count)) for step in STEPS}
        shutil.rmtree(source)
    return {**made, **steps}


def all_cells() -> Iterator[cells.Cell]:
    for targets, count in SIZES:
        yield f"{targets} targets, {count} members", partial(measure, targets, count)


def table() -> str:
    done, rows = cells.read("pack"), []
    for targets, count in SIZES:
        cell = done.get(f"{targets} targets, {count} members")
        if cell is None or "bytes" not in cell["build"]:
            continue
        own = cell["files"] / count, cell["build"]["bytes"] / count
        overhead = [f"{each - cell['payload']:.0f}" for each in own]
        times = [f"{cell[s]['cpu_seconds']:.1f}" if s in cell else "-" for s in ("build", "list", "validate", "gc")]
        peak = f"{cell['build']['peak_kib'] / 1024:.0f}"
        one = f"{cell['one']['reads']} reads, {cell['one']['read_bytes'] / 1000:.1f} KB"
        rows.append([f"{count:,} of {targets}", f"{cell['payload']:,}", *overhead, *times, peak, one])
    head = ["members of targets", "payload", "more as a file", "more in the fleet", "build s", "list s", "validate s"]
    return cells.markdown([*head, "gc s", "build, MiB", "open and get one"], rows)


if __name__ == "__main__":
    cells.main("pack", __doc__, all_cells, table)
