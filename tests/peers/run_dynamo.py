"""Dynamo's own `LoRAManager`, with its runtime's downloader, and our source: ``python run_dynamo.py < uris.json``."""

from __future__ import annotations

import asyncio
import json
import sys

import runner
import standin

LIB = runner.library("dynamo")
runner.prefer(LIB)
REAL = ["_core", "llm", "llm._unary", "llm.exceptions", "common.lora", "common.lora.manager", "common.lora.once"]
standin.install("dynamo", LIB, [f"dynamo.{name}" for name in [*REAL, "common.utils.env"]])

from dynamo.common.lora.manager import get_lora_manager

from lrconvert.serving import dynamo


async def main() -> list[dict[str, str]]:
    dynamo.register()
    manager = get_lora_manager()
    return [await manager.download_lora(uri) for uri in json.loads(sys.stdin.read())]


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main())))
