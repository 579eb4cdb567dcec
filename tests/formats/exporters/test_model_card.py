"""The card of an export: what hubs read in its front matter, the code that loads it, what was measured."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ADAPTERS, random_lora
from huggingface_hub.repocard import metadata_load

from lrconvert import api
from lrconvert.formats import model_card
from lrconvert.formats.exporters import base as exporters
from lrconvert.formats.model_card import Written

PLAIN = ADAPTERS / "llama-plain"
REFINED = {
    "refined_before": "KL 0.5 of 2, agreement 0.5000, 1234 items",
    "refined_after": "KL 0.02 of 2, agreement 0.9500, 1234 items",
}


def test_front_matter_is_what_hubs_and_peft_have(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for path in PLAIN.iterdir():
        (tmp_path / "a" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "a" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    api.export(tmp_path / "a", tmp_path / "out", to="peft-lora", base_model_id="org/base")
    assert metadata_load(tmp_path / "out" / "README.md") == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:org/base", "lora", "lrconvert", "transformers"],
    }


@pytest.mark.parametrize("layout", sorted({*exporters.ids()} - {"original"}))  # that is for any program
def test_every_layout_says_how_it_is_loaded(layout: str) -> None:
    """With the name of the base and where the adapter is; Python is Python."""
    exporter = exporters.get(layout)
    lora = api.load_lora(PLAIN)
    adapter = replace(lora, provenance=replace(lora.provenance, base_model="org/base"))
    card = model_card.model_card(
        adapter, Written(exporter.kind, exporter.library, exporter.usage, "me/it"), None
    ).decode()
    language, _, code = card.split("```")[1].partition("\n")
    assert "{" not in code and ("org/base" in code or layout == "gguf")
    if language == "python":
        ast.parse(code)


def test_what_was_measured_stands_in_it() -> None:
    """Answers before and after a refinement, as the file notes them; a file without, and a LoRA, have no such table."""
    compact = api.convert(random_lora(), "lowrank", bits=4).compact
    fields = {**compact.provenance.fields, **REFINED}
    refined = replace(compact, provenance=replace(compact.provenance, fields=fields))
    card = model_card.model_card(refined, Written("LoRA"), None).decode()
    assert "1,234 held-out items" in card
    assert "| base alone | 2 | 0.0% | - |" in card
    assert "| before refinement | 0.5 | 75.0% | 0.5000 |" in card
    assert "| as published | 0.02 | 99.0% | 0.9500 |" in card
    assert "held-out" not in model_card.model_card(compact, Written("LoRA"), None).decode()
    assert "## Measured" not in model_card.model_card(random_lora(), Written("LoRA"), None).decode()


@pytest.mark.parametrize(
    "text", ["", "KL", "KL x of y, 3 items", "KL 1 of 0, 3 items", "<b>KL</b> 1 of 2, 3 items", "KL 1 of 2, 9" * 99]
)
def test_notes_of_strangers_are_no_numbers(text: str) -> None:
    """A file may say anything of its refinement: what is no measurement is left out."""
    compact = api.convert(random_lora(), "lowrank", bits=4).compact
    fields = {**compact.provenance.fields, "refined_after": text, "refined_before": text}
    card = model_card.model_card(
        replace(compact, provenance=replace(compact.provenance, fields=fields)), Written("LoRA"), None
    )
    assert b"<b>" not in card


def test_a_rounded_export_says_so(tmp_path: Path) -> None:
    """Bit for bit where it is, and what was rounded where it is not."""
    for n, (options, said) in enumerate((({}, "bit for bit"), ({"dtype": "F16"}, "factors are rounded to F16"))):
        done = api.export(PLAIN, tmp_path / str(n), to="peft-lora", **options)
        card = (tmp_path / str(n) / "README.md").read_text()
        assert said in card and ("bit for bit" in card) == (not options)
        assert any("rounded" in note for note in done.notes) == bool(options)
