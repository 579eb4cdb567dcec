"""On every architecture and with every kind of adapter, what lrconvert makes of it is what PEFT says.

The table is docs/architectures.md; a sample of its cells runs by default, all with `-m slow`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import since_transformers

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import architecture_table as table
import torch
from architecture_cells import Base, run
from architecture_features import FEATURES
from architectures import ARCHITECTURES

EXPECTED = table.expected()

# Every feature, and every way in which models differ: ties under all names, scales, orientation, experts, both sides.
SAMPLE = {
    "llama-tied": "all-linear saved-head resized-lora fsdp sharded",
    "gemma3-text": "embedding tokens",
    "gpt2": "both-ends saved-tied",
    "gpt-oss-square": "experts",
    "qwen3-moe": "all-linear",
    "bert": "head lora-bias",
    "modernbert": "saved-embedding resized",
    "t5": "tied-ends",
    "bart-scaled": "saved-both dora-ends",
    "whisper": "embedding",
    "mamba": "tied-ends bias",
    "qwen2.5-vl": "linear resized-saved",
    "roberta-classifier": "saved-head patterns",
    "rwkv": "rslora dora",
    "qwen2": "compiled parallel checkpointed bare doubled named headless",
    "mistral": "resized-tokens",
}


def verdicts(name: str, features: list[str], folder: Path) -> dict[str, str]:
    """Run the cells; the same random models are made and asked whatever ran before."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        base = Base(ARCHITECTURES[name], folder / "base")
        return {feature: table.verdict(run(base, FEATURES[feature], folder / "work")) for feature in features}
    finally:
        torch.set_num_threads(threads)
        transformers.logging.set_verbosity(level)


def test_every_cell_has_a_verdict() -> None:
    assert {name: set(row) for name, row in EXPECTED.items()} == {name: set(FEATURES) for name in ARCHITECTURES}


def test_nothing_is_wrong() -> None:
    wrong = {f"{name}/{f}" for name, row in EXPECTED.items() for f, said in row.items() if table.mark(said) == "✗"}
    assert not wrong


@since_transformers("5.22")  # before, ModernBERT's configuration does not take its own defaults
def test_what_is_as_peft_merges_is_known() -> None:
    """Where PEFT's attached model and its merged one differ, ours is never the merged one but where the attached one
    leaves a part out: the head's bias beside trained tokens, and a layer whose weight is used without its call."""
    merged = {f"{name}/{f}" for name, row in EXPECTED.items() for f, said in row.items() if "MERGED" in said}
    models = {name.partition("/")[0] for name in merged if name.endswith("tokens")}
    assert {name for name in merged if not name.endswith("tokens")} == {"jamba/all-linear"}
    assert all(ARCHITECTURES[name].build().get_output_embeddings().bias is not None for name in models)


def test_the_page_is_what_the_data_says() -> None:
    assert table.PAGE.read_text() == table.page(json.loads(table.DATA.read_text()))


@pytest.mark.medium
@pytest.mark.parametrize("name", SAMPLE)
def test_the_sample(name: str, place: Path) -> None:
    features = SAMPLE[name].split()
    assert verdicts(name, features, place) == {feature: EXPECTED[name][feature] for feature in features}


def test_the_sample_has_every_feature() -> None:
    assert {feature for features in SAMPLE.values() for feature in features.split()} == set(FEATURES)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_table(name: str, place: Path) -> None:
    assert verdicts(name, list(FEATURES), place) == EXPECTED[name]
