"""mergekit's own extraction of a LoRA: ``python run_mergekit.py [BASE MODEL OUT RANK]...``. The card that it writes
beside the adapter asks the hub about both models; it is left empty."""

from __future__ import annotations

import sys

import runner

sys.path.insert(0, str(runner.library("mergekit")))

from mergekit.scripts import extract_lora

extract_lora.generate_card_lora = lambda *_, **__: ""


def extract(base: str, model: str, out: str, rank: str) -> None:
    words = ["--base-model", base, "--model", model, "--out-path", out, "--max-rank", rank]
    extract_lora.main(args=[*words, "--embed-lora", "--exclude-regex", "embed_tokens"], standalone_mode=False)


if __name__ == "__main__":
    for job in zip(*[iter(sys.argv[1:])] * 4, strict=True):
        extract(*job)
