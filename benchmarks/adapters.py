"""Real adapters trained by strangers, converted by every method at fixed shares of their bytes.

    python benchmarks/adapters.py            measures what is missing
    python benchmarks/adapters.py --render   writes the table of docs/benchmarks.md

Shares are of the adapter's factors at 16 bit and bound the whole file without extra tensors. Pickles are read too, with
torch's tensors-only loader. Adapters that are too small for every share (toys of some hundred bytes) share a line.

The bound is that of independent Gaussian numbers with the energies of the singular vectors (reverse water-filling), all
bytes spent on them and none on a header: an optimistic yardstick, not a theorem for these vectors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cells
import numpy as np

from lrconvert import api
from lrconvert.core import errors
from lrconvert.lora import svd
from lrconvert.lora.adapter import LoraAdapter
from lrconvert.methods import base as methods

SHARES = (0.08, 0.04, 0.016, 0.008, 0.004, 0.002)
BOUND = "bound"
SHOWN = ("lowrank", "vblora", BOUND)


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


def bound(path: Path, share: float) -> dict[str, Any]:
    """Return what a code at the Gaussian rate-distortion limit captures, over all distortions of one number."""
    lora = load(path)
    spectra = [svd.singular_values(pair) for pair in lora.targets]
    energy = np.concatenate([s**2 for s in spectra])
    lengths = np.repeat([pair.target.matrix_shape for pair in lora.targets], [len(s) for s in spectra], axis=0)
    energy, lengths = energy[energy > 0], lengths[energy > 0]
    variances = energy[:, None] / lengths

    def captured(distortion: float) -> float:
        bits = (0.5 * lengths * np.log2(np.maximum(variances / distortion, 1))).sum(axis=1)
        kept = energy * np.maximum(1 - distortion / variances, 0).prod(axis=1)
        order = np.argsort(-kept / np.maximum(bits, 1e-9))
        order = order[kept[order] > 0]
        spent = np.cumsum(bits[order])
        return float(np.interp(8 * share * lora.half_bytes, np.r_[0, spent], np.r_[0, np.cumsum(kept[order])]))

    distortions = variances.max() * np.logspace(0, -6, 400)
    return {"source_bytes": lora.half_bytes, "captured": round(max(map(captured, distortions)) / energy.sum(), 5)}


def all_cells() -> Iterator[cells.Cell]:
    for path in adapters():
        for method in methods.module_names():
            for share in SHARES:
                yield f"{path.name} {method} {share:g}", lambda p=path, m=method, s=share: convert(p, m, s)
        for share in SHARES:
            yield f"{path.name} {BOUND} {share:g}", lambda p=path, s=share: bound(p, s)


def table() -> str:
    done = cells.read("adapters")
    measured = {cell.split()[0] for cell in done}
    names = sorted({cell.split()[0] for cell, row in done.items() if "bytes" in row})
    rows = []
    for name in names:
        row: list[Any] = [name, f"{next(v['source_bytes'] for c, v in done.items() if c.split()[0] == name):,}"]
        for share in SHARES:
            parts = []
            for form in SHOWN:
                cell = done.get(f"{name} {form} {share:g}")
                if cell is None:
                    parts.append("not run")
                else:
                    parts.append("-" if "refused" in cell else f"{cell['captured']:.3f}")
            row.append(" / ".join(parts))
        rows.append(row)
    head = ["adapter", "bytes at 16 bit", *(f"{share:.1%}" for share in SHARES)]
    small = ", ".join(sorted(measured - set(names)))
    return cells.markdown(head, rows) + (f"\n\nToo small for every share: {small}." if small else "")


if __name__ == "__main__":
    cells.main("adapters", __doc__, all_cells, table)
