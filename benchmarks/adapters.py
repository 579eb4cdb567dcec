"""Real adapters trained by strangers, converted by every method at fixed shares of their bytes.

    python benchmarks/adapters.py            measures what is missing
    python benchmarks/adapters.py --render   writes the README table

Shares are of the adapter's factors at 16 bit and bound the whole file without extra tensors. Pickles are read too, with
torch's tensors-only loader. Adapters that are too small for every share (toys of some hundred bytes) share a line.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cells

from lrconvert import api
from lrconvert.core import errors
from lrconvert.lora.adapter import LoraAdapter
from lrconvert.methods import base as methods

SHARES = (0.08, 0.04, 0.016)


def load(path: Path) -> LoraAdapter:
    return api.load_lora(path, allow_pickle=True)


def adapters() -> list[Path]:
    """Return the folders that the readers of this version accept."""
    accepted = []
    for path in sorted((cells.ASSETS / "adapters").glob("*")):
        with contextlib.suppress(errors.LrcError):
            load(path)
            accepted.append(path)
    return accepted


def convert(path: Path, method: str, share: float) -> dict[str, Any]:
    lora = load(path)
    row: dict[str, Any] = {"source_bytes": lora.half_bytes}
    try:
        done = api.convert(lora, method, target_size=int(lora.half_bytes * share))
    except errors.BudgetError as error:
        return {**row, "refused": error.what}
    return {
        **row,
        "bytes": done.sizes.adapter,
        "payload": done.sizes.payload,
        "overhead": done.sizes.overhead,
        "captured": round(done.fidelity.captured, 5) if done.fidelity else None,
        "config": methods.get(method).header(done.compact.config),
    }


def all_cells() -> Iterator[cells.Cell]:
    for path in adapters():
        for method in methods.module_names():
            for share in SHARES:
                yield f"{path.name} {method} {share:g}", lambda p=path, m=method, s=share: convert(p, m, s)


def table() -> str:
    done = cells.read("adapters")
    measured = {cell.split()[0] for cell in done}
    names = sorted({cell.split()[0] for cell, row in done.items() if "refused" not in row})
    ids = sorted({cell.split()[1] for cell in done})
    head = ["adapter", "bytes at 16 bit", *(f"{m} {s:.1%}" for s in SHARES for m in ids)]
    rows = []
    for name in names:
        row: list[Any] = [name, f"{next(v['source_bytes'] for c, v in done.items() if c.split()[0] == name):,}"]
        for share in SHARES:
            for method in ids:
                cell = done.get(f"{name} {method} {share:g}")
                if cell is None:
                    row.append("not run")
                elif "refused" in cell:
                    row.append("too small")
                else:
                    row.append(f"{cell['captured']:.3f} ({cell['bytes']:,})")
        rows.append(row)
    small = ", ".join(sorted(measured - set(names)))
    return cells.markdown(head, rows) + (f"\n\nToo small for every share: {small}." if small else "")


if __name__ == "__main__":
    cells.main("adapters", __doc__, all_cells, table)
