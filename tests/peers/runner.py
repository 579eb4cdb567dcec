"""What the runners share: where a peer's files are, and how they are asked. No import of lrconvert here."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def base() -> Path:
    """The base model's folder, the first word of a runner's command line."""
    return Path(sys.argv[1])


def library(peer: str) -> Path:
    return Path(__file__).resolve().parent / ".envs" / peer / "lib"


def prefer(library: Path) -> None:
    """Import from `library` before what is installed."""
    sys.path.insert(0, str(library))


def tensors(folder: Path) -> dict[str, Any]:
    """The tensors of a PEFT folder, as torch tensors."""
    import torch
    from safetensors.torch import load_file

    stored = folder / "adapter_model.safetensors"
    if stored.exists():
        return load_file(stored)
    pickled: dict[str, Any] = torch.load(folder / "adapter_model.bin", weights_only=True)
    return pickled


def norm(scale: float, b: Any, a: Any) -> float:
    """||scale * b @ a||."""
    left, right = np.asarray(b, np.float64), np.asarray(a, np.float64)
    return float(abs(scale) * np.linalg.norm(left @ right))


def serve(load: Callable[[Path, dict[str, Any], dict[str, Any]], dict[str, Any]]) -> None:
    """Answer a list of [folder, options] on stdin with one list on the last line of stdout."""
    settings = base() / "config.json"
    config = json.loads(settings.read_text()) if settings.exists() else {}
    answers = []
    with contextlib.redirect_stdout(sys.stderr):
        for folder, options in json.loads(sys.stdin.read()):
            try:
                answers.append({"outcome": "loads", **load(Path(folder), config, options)})
            except Exception as error:
                answers.append({"outcome": "refuses", "why": f"{type(error).__name__}: {error}"[:300]})
    print(json.dumps(answers))
