"""Verbs take what people have at hand: paths, sizes as text, loaded adapters, and the results of other verbs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import ADAPTERS, BASES, ROOT

import lrconvert
from lrconvert.core.errors import FileKindError, OptionError, UnknownLayoutError
from lrconvert.formats.lrc import file

PLAIN = ADAPTERS / "llama-plain"


def content(item: Any) -> bytes:
    return b"".join(file.encode(item.compact))


@pytest.mark.parametrize("verb", ["convert", "compress", "allocate"])
def test_a_lora_is_a_path_or_loaded(verb: str) -> None:
    more = {"convert": {"method": "lowrank"}, "compress": {"forms": ["lowrank"]}}.get(verb, {})
    make = getattr(lrconvert, verb)
    made = [make(lora, **more, target_size="6KB") for lora in (PLAIN, str(PLAIN), lrconvert.load_lora(PLAIN))]
    assert len({content(result) for result in made}) == 1
    with pytest.raises(UnknownLayoutError):
        make(BASES, **more, target_size=6000)
    with pytest.raises(OptionError, match="a layout and an alpha are for files of other tools"):
        make(lrconvert.load_lora(PLAIN), **more, target_size=6000, alpha=2)


def test_alora_is_a_method_of_convert() -> None:
    one, two = lrconvert.convert(PLAIN, "alora", total_rank=9), lrconvert.allocate(PLAIN, total_rank=9)
    assert content(one) == content(two) and one.modules == two.modules


def test_sizes_are_numbers_or_texts() -> None:
    sizes = [
        lrconvert.convert(PLAIN, "lowrank", target_size=size).sizes for size in (6000, "6KB", "6000 b", "0.006 MB")
    ]
    assert len(set(sizes)) == 1
    with pytest.raises(OptionError, match="'6 bananas' is not a size"):
        lrconvert.convert(PLAIN, "lowrank", target_size="6 bananas")


def test_results_go_where_compact_adapters_go(tmp_path: Path) -> None:
    made = lrconvert.convert(PLAIN, "lowrank", target_size=6000)
    best = lrconvert.compress(PLAIN, forms=["lowrank"], target_size=6000)
    lrconvert.write(made, tmp_path / "made.lrc")
    lrconvert.write(best, tmp_path / "best.lrc")
    assert content(made) == (tmp_path / "made.lrc").read_bytes()
    assert content(best) == (tmp_path / "best.lrc").read_bytes()
    files = [made, made.compact, str(tmp_path / "made.lrc"), tmp_path / "made.lrc"]
    reports = lrconvert.compare(PLAIN, files)
    assert len({(report.captured, report.adapter_bytes) for report in reports}) == 1
    assert [report.captured for report in lrconvert.compare(str(PLAIN), files[2])] == [reports[0].captured]
    assert lrconvert.export(made, tmp_path / "a", to="peft-lora").files
    lrconvert.merge(BASES / "tiny-llama", [made, lrconvert.Scaled(made.compact, 0.5)], tmp_path / "merged")
    adapters = [tmp_path / "made.lrc", lrconvert.Scaled(made.compact, 0.5)]
    assert lrconvert.verify(tmp_path / "merged", BASES / "tiny-llama", adapters).ok
    with pytest.raises(FileKindError):
        lrconvert.compare(PLAIN, tmp_path / "absent.lrc")


def test_what_is_printed_is_short() -> None:
    lora = lrconvert.load_lora(PLAIN)
    made = lrconvert.convert(lora, "lowrank", target_size=6000)
    best = lrconvert.compress(lora, forms=["lowrank"], target_size=6000)
    ranks = lrconvert.allocate(lora, total_rank=9)
    report = lrconvert.compare(lora, made)[0]
    texts = [repr(item) for item in (lora, made, made.compact, best, ranks, report)]
    assert all(len(text) < 160 and "array" not in text for text in texts), texts
    assert texts[0] == f"<LoraAdapter: 14 targets, rank 8, {lora.half_bytes:,} bytes at 16 bit>"
    assert texts[1].startswith("<Conversion: lowrank, ") and texts[4].startswith("<Allocation: lowrank, ")


def test_the_bytes_of_a_file_are_its_own() -> None:
    """A file of an older container is compared by what it takes on the disk, not by what it would take today."""
    path = min((ROOT / "fixtures" / "golden" / "v1").rglob("*.lrc"))
    (row,) = lrconvert.compare(lrconvert.load_lora(path), path)
    assert row.total_bytes == path.stat().st_size != file.sizes(lrconvert.load(path)).total
