"""The bundled pair: a tiny decoder and a LoRA trained on it with PEFT, both made by ``fixtures/make.py``."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent
BASE, ADAPTER, TRAIN, HELD_OUT = (_HERE / name for name in ("base", "adapter", "train.jsonl", "heldout.jsonl"))
