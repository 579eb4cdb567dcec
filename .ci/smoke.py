"""Import every module, and take an adapter through the commands that need no torch: what CI runs on every other Python.

Without torch, transformers and scipy, which would cost minutes for each; the tests run with them on one Python.
"""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import lrconvert

ROOT = Path(__file__).resolve().parent.parent
ADAPTER, BASE = ROOT / "fixtures/adapters/llama-plain", ROOT / "fixtures/bases/tiny-llama"
FILE = ROOT / "fixtures/golden/v1/lowrank/0.lrc"
ABSENT = ("torch", "transformers", "scipy", "peft", "triton")


def import_all() -> int:
    count = 0
    for module in pkgutil.walk_packages(lrconvert.__path__, "lrconvert."):
        if module.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            if str(error.name).partition(".")[0] not in ABSENT:
                raise
        count += 1
    return count


def run(*arguments: object) -> None:
    command = [sys.executable, "-W", "error", "-m", "lrconvert", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def main() -> None:
    warnings.simplefilter("error")
    count = import_all()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run("--help")
        run("inspect", ADAPTER)
        run("inspect", FILE)
        run("validate", FILE)
        run("check", ADAPTER, "--for", "vllm")
        run("merge-into-base", BASE, ADAPTER, "-o", folder / "merged")
        run("verify", folder / "merged", "--base", BASE, "--adapter", ADAPTER)
        run("unmerge", folder / "merged", "-o", folder / "back")
        run("recover", folder / "merged")
    print(f"Python {sys.version.split()[0]}: {count} modules, 9 commands")


if __name__ == "__main__":
    main()
