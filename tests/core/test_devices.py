"""Devices that are not there are refused before any work; merges compute without torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import ADAPTERS, BASES

from lrconvert import api
from lrconvert.cli import cli
from lrconvert.core.devices import torch_device
from lrconvert.core.errors import OptionError

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.mark.parametrize("name", ("cuda:99", "meta", "nonsense"))
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(OptionError, match=f"the device '{name}' cannot be used here"):
        torch_device(name)


@no_gpu
@pytest.mark.parametrize(
    "verb",
    (
        lambda out: api.convert(api.load_lora(ADAPTERS / "llama-plain"), "vblora", target_ratio=8, device="cuda"),
        lambda out: api.statistics(BASES / "tiny-llama", [], out, device="cuda"),
    ),
    ids=("convert", "statistics"),
)
def test_verbs_refuse_a_gpu_that_is_not_there(verb: Callable[[Path], Any], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="E-OPTION: the device 'cuda' cannot be used here"):
        verb(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@no_gpu
@pytest.mark.parametrize(
    "words",
    (
        ("lora-to-vblora", "LORA", "-o", "OUT"),
        ("statistics", "BASE", "--data", "TEXTS", "-o", "OUT"),
        ("refine", "FILE", "--base", "BASE", "--teacher", "LORA", "--data", "TEXTS", "-o", "OUT"),
    ),
    ids=lambda words: words[0],
)
def test_the_command_line_refuses_a_gpu_that_is_not_there(words: tuple[str, ...], tmp_path: Path) -> None:
    lora = api.load_lora(ADAPTERS / "llama-plain")
    api.write(api.convert(lora, "lowrank", bits=4).compact, tmp_path / "x.lrc")
    (tmp_path / "texts.txt").write_text("a few words\n" * 20)
    places = {
        "BASE": BASES / "tiny-llama",
        "LORA": ADAPTERS / "llama-plain",
        "OUT": tmp_path / "out",
        "FILE": tmp_path / "x.lrc",
        "TEXTS": tmp_path / "texts.txt",
    }
    done = CliRunner().invoke(cli, [*(str(places.get(word, word)) for word in words), "--device", "cuda"])
    assert isinstance(done.exception, OptionError) or (done.exit_code == 1 and "E-OPTION" in done.output), done.output
    assert not (tmp_path / "out").exists()


def test_merges_need_no_torch(tmp_path: Path) -> None:
    """Merge, verify and unmerge, in a fresh interpreter."""
    script = (
        "import sys; from lrconvert import api; base, lora, out, back = sys.argv[1:]; api.merge(base, lora, out);"
        "assert api.verify(out, base, lora).ok; api.unmerge(out, back);"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    words = [BASES / "tiny-llama", ADAPTERS / "llama-plain", tmp_path / "out", tmp_path / "back"]
    done = subprocess.run([sys.executable, "-c", script, *map(str, words)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
