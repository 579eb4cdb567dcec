"""Features that a file states in `requires` (formats/lrconvert-v3.md, 5): stated where they are used and nowhere else,
so that a reader that does not know one refuses the file instead of taking it for something else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import random_lora
from test_file import edit, resign

from lrconvert import api
from lrconvert.core import errors
from lrconvert.formats.lrc import file
from lrconvert.lora.adapter import CompactAdapter, ExtraTensor, LoraAdapter, Target, View
from lrconvert.testing.container_versions import encoded
from lrconvert.testing.raw_files import RawFile


def film() -> LoraAdapter:
    lora = random_lora([(24, 16)])
    target = Target("film.weight", (24, 4, 1, 2, 2), View("conv:1x2x2:1"))
    return replace(lora, targets=(replace(lora.targets[0], target=target),))


def carrying(use: str, name: str = "layers.0.proj.weight") -> LoraAdapter:
    values = np.ones(16, "<f4")
    return replace(random_lora([(24, 16)]), extras=(ExtraTensor(name, "F32", (16,), values.tobytes(), use),))


USING = {
    "conv3d": (film, "E-JSON-SYNTAX"),
    "input_magnitude": (lambda: carrying("input_magnitude"), "E-UNKNOWN"),
    "textual_inversion": (lambda: carrying("textual_inversion", "bundle_emb.word.clip_l"), "E-UNKNOWN"),
}


def made(feature: str) -> CompactAdapter:
    return api.convert(USING[feature][0](), "lowrank", rank=2, bits=3).compact


@pytest.mark.parametrize("feature", USING)
def test_a_file_states_what_it_uses(feature: str, tmp_path: Path) -> None:
    compact = made(feature)
    data = b"".join(file.encode(compact))
    assert RawFile.of(data).manifest["requires"] == [feature]
    (tmp_path / "x.lrc").write_bytes(data)
    assert file.read(tmp_path / "x.lrc").targets == compact.targets
    assert file.read(tmp_path / "x.lrc").extras == compact.extras


@pytest.mark.parametrize("feature", USING)
@pytest.mark.parametrize("what", ("left out", "not used", "unknown", "unsorted", "older version"))
def test_and_nothing_else(feature: str, what: str, tmp_path: Path) -> None:
    compact = made(feature)
    data = b"".join(file.encode(compact))
    others = sorted({*USING} - {feature})
    data, code = {
        "left out": (resign(data, edit(requires=[])), USING[feature][1]),
        "not used": (resign(data, edit(requires=sorted([feature, others[0]]))), "E-CANON"),
        "unknown": (resign(data, edit(requires=sorted([feature, "teleport"]))), "E-VER"),
        "unsorted": (resign(data, edit(requires=sorted([feature, others[0]])[::-1])), "E-VER"),
        "older version": (encoded(compact, 2), "E-VER"),
    }[what]
    (tmp_path / "x.lrc").write_bytes(data)
    with pytest.raises(errors.LrcError) as caught:
        file.read(tmp_path / "x.lrc")
    assert caught.value.code == code


def test_what_the_first_release_knows_requires_nothing() -> None:
    assert (
        RawFile.of(b"".join(file.encode(api.convert(random_lora(), "lowrank", bits=3).compact))).manifest["requires"]
        == []
    )
