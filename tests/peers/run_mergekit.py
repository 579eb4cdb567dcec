"""mergekit's own extraction of a LoRA: ``python run_mergekit.py BASE MODEL OUT RANK``. The card it writes beside the
adapter asks the hub about both models, so that one is left empty."""

from __future__ import annotations

import sys

import runner

sys.path.insert(0, str(runner.library("mergekit")))

from mergekit.scripts import extract_lora  # noqa: E402


def extract(base: str, model: str, out: str, rank: str) -> None:
    extract_lora.generate_card_lora = lambda *_, **__: ""
    words = ["--base-model", base, "--model", model, "--out-path", out, "--max-rank", rank]
    extract_lora.main(args=[*words, "--exclude-regex", "embed_tokens"], standalone_mode=False)


if __name__ == "__main__":
    extract(*sys.argv[1:5])
