"""axolotl's own merge, shard by shard: ``python run_axolotl.py [BASE ADAPTER OUT]...``; none of its training part."""

from __future__ import annotations

import sys
from pathlib import Path

import runner
import standin

standin.install("axolotl", runner.library("axolotl"), ["axolotl.cli.utils.lora_merge"])

from axolotl.cli.utils.lora_merge import merge_lora_sharded_efficient


def merge(base: Path | str, adapter: Path | str, out: Path | str) -> None:
    merge_lora_sharded_efficient(base, adapter, out)


if __name__ == "__main__":
    for job in zip(*[iter(sys.argv[1:])] * 3, strict=True):
        merge(*job)
