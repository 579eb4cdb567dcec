"""The table of architectures and features, held against PEFT, in docs/architectures.md, and the verdicts of its test.

python benchmarks/architectures.py CELLS            runs the cells that are missing in CELLS, a file of JSON lines
python benchmarks/architectures.py CELLS --render   writes both from CELLS

``--only PATTERN`` chooses cells ("gpt2/", "/tokens$"), ``--again`` measures those that are there, too, ``--failed``
those of them that are not ok. All of them take half an hour on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def measure(path: Path, wanted: set[str]) -> None:
    """Run these cells and append them."""
    import architecture_table as table
    import torch
    import transformers
    from architecture_cells import Base, run
    from architecture_features import FEATURES
    from architectures import ARCHITECTURES

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    memory = Path("/dev/shm")
    for architecture in ARCHITECTURES.values():
        features = [f for f in FEATURES.values() if f"{architecture.name}/{f.name}" in wanted]
        with TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as place:
            base = Base(architecture, Path(place) / "base")
            for feature in features:
                start = time.perf_counter()
                cell = run(base, feature, Path(place) / "work")
                name = f"{architecture.name}/{feature.name}"
                row = {"cell": name, **cell, "seconds": round(time.perf_counter() - start, 2)}
                with path.open("a") as out:
                    out.write(json.dumps(row) + "\n")
                print(name, table.verdict(cell), flush=True)


def chosen(done: dict[str, Any], only: str, again: bool, failed: bool) -> set[str]:
    """Return the names of the cells that are to be run."""
    import architecture_table as table
    from architecture_features import FEATURES
    from architectures import ARCHITECTURES

    names = {f"{architecture}/{feature}" for architecture in ARCHITECTURES for feature in FEATURES}
    fine = {name for name, cell in done.items() if table.verdict(cell) == "ok" or "steps" not in cell}
    kept = set() if again else fine if failed else set(done)
    return {name for name in names - kept if re.search(only, name)}


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Return the newest measurement of every cell."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {cell["cell"]: cell for cell in map(json.loads, lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--failed", action="store_true")
    parser.add_argument("--render", action="store_true")
    given = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    done = read(given.cells)
    if given.render:
        import architecture_table

        architecture_table.write(done)
    else:
        measure(given.cells, chosen(done, given.only, given.again, given.failed))


if __name__ == "__main__":
    main()
