"""Merging, verifying and undoing with products of another device: the same bytes, also where another one goes on."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import ADAPTERS, BASES
from crashes import KINDS, Scene, whole

from lrconvert import api
from lrconvert.api import merge, unmerge, verify
from lrconvert.cli import cli
from lrconvert.core.errors import DeviceError, LrcError, OptionError, UnfinishedError
from lrconvert.merge.arithmetic import products
from lrconvert.merge.arithmetic.products import OnDevice
from lrconvert.merge.in_place import recover
from lrconvert.testing import faults

pytestmark = pytest.mark.usefixtures("quick_disk")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Gives "cuda" torch's CPU to compute on; the shapes of the products that it computes from then on."""
    made: list[tuple[int, ...]] = []
    real = products.on

    class Noted(OnDevice):
        def __call__(self, left: Any, right: Any) -> Any:
            made.append((*left.shape, right.shape[1]))
            return super().__call__(left, right)

    monkeypatch.setattr(products, "on", lambda name: Noted(torch.device("cpu")) if name == "cuda" else real(name))
    return made


def took(made: list[tuple[int, ...]]) -> bool:
    """Whether the device has computed something since it was asked last."""
    found = bool(made)
    made.clear()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bytes(kind: str, scenes: dict[str, Scene], other: list[Any], tmp_path: Path) -> None:
    """Model and record, in a new folder and in place, there and back."""
    given, out = scenes[kind], tmp_path / "out"
    merge(given.base, [given.adapter], out, device="cuda")
    assert whole(out) == whole(given.merged) and took(other)
    assert verify(out, given.base, [given.adapter], device="cuda").ok and took(other)
    unmerge(out, tmp_path / "back", device="cuda")
    assert whole(tmp_path / "back") == whole(given.base) and took(other)
    given.merge(model := shutil.copytree(given.base, tmp_path / "model"), device="cuda")
    assert whole(model) == whole(given.merged) and took(other)
    given.unmerge(model, device="cuda")
    assert whole(model) == whole(given.base) and took(other)


@pytest.mark.parametrize(("base", "adapter"), [("tiny-gpt2-hub", "gpt2-conv1d"), ("tiny-llama", "llama-dora")])
def test_fixtures(base: str, adapter: str, other: list[Any], tmp_path: Path) -> None:
    """Transposed weights; DoRA, whose formula is computed here in any case."""
    api.merge(BASES / base, ADAPTERS / adapter, tmp_path / "here")
    api.merge(BASES / base, ADAPTERS / adapter, tmp_path / "there", device="cuda")
    assert whole(tmp_path / "here") == whole(tmp_path / "there")
    assert took(other) == (adapter != "llama-dora")
    assert api.verify(tmp_path / "there", BASES / base, ADAPTERS / adapter, device="cuda").ok


@pytest.mark.parametrize(("first", "then"), [("cpu", "cuda"), ("cuda", "cpu")])
@pytest.mark.parametrize("in_place", (False, True))
def test_resume_with_another_device(
    in_place: bool, first: str, then: str, scenes: dict[str, Scene], other: list[Any], tmp_path: Path
) -> None:
    """Broken off at a tenth, half and nine tenths of all calls: the bytes are those of a run without a break."""
    given, n = scenes["swap"], 0

    def run(model: Path, out: Path, device: str) -> None:
        if in_place:
            given.merge(model, resume=True, device=device)
        else:
            merge(model, [given.adapter], out, resume=True, device=device)

    with faults.installed(faults.Faulty(10**9, errno.EIO)) as disk:
        run(shutil.copytree(given.base, tmp_path / "whole"), tmp_path / "whole-out", "cpu")
    for n in (len(disk.made) // 10, len(disk.made) // 2, len(disk.made) * 9 // 10):
        model, out = shutil.copytree(given.base, tmp_path / f"model-{n}"), tmp_path / f"out-{n}"
        with faults.installed(faults.Faulty(n, errno.ENOSPC, persistent=True)), pytest.raises(LrcError):
            run(model, out, first)
        run(model, out, then)
        assert whole(model if in_place else out) == whole(given.merged)


def test_a_device_that_fails_midway(scenes: dict[str, Scene], tmp_path: Path, monkeypatch: Any) -> None:
    """The old state is back; with `resume` what is done is kept, and goes on without the device."""
    given, calls = scenes["swap"], [0]

    class Weak(OnDevice):
        def __call__(self, left: Any, right: Any) -> Any:
            calls[0] -= 1
            if calls[0] <= 0:
                raise self._failed(torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate"))
            return super().__call__(left, right)

    real = products.on
    monkeypatch.setattr(products, "on", lambda name: Weak(torch.device("cpu")) if name == "cuda" else real(name))
    model = shutil.copytree(given.base, tmp_path / "model")
    for at, resume, error in ((2, False, DeviceError), (5, False, DeviceError), (5, True, UnfinishedError)):
        calls[0] = at  # two of a file, with that of its record; the fifth is computed while weights change
        with pytest.raises(error, match=r"the device 'cpu' failed: CUDA out of memory"):
            given.merge(model, device="cuda", resume=resume)
        if not resume:
            assert whole(model) == whole(given.base)
    assert recover(model).state == "old"
    calls[0] = 3
    with pytest.raises(DeviceError):
        merge(given.base, [given.adapter], tmp_path / "out", device="cuda", resume=True)
    assert not (tmp_path / "out").exists()
    kept = tmp_path / ".out.partial" / "model" / "model-00001-of-00002.safetensors"
    before = kept.stat().st_mtime_ns
    merge(given.base, [given.adapter], tmp_path / "out", resume=True)
    assert whole(tmp_path / "out") == whole(given.merged)
    assert (tmp_path / "out" / kept.name).stat().st_mtime_ns == before


@no_gpu
def test_a_device_that_is_not_there(scenes: dict[str, Scene], tmp_path: Path) -> None:
    """Refused before anything is read or written."""
    given, out = scenes["swap"], tmp_path / "out"
    verbs: tuple[Callable[[], Any], ...] = (
        lambda: merge(given.base, [given.adapter], out, device="cuda"),
        lambda: merge(given.base, [given.adapter], in_place=True, device="cuda"),
        lambda: unmerge(given.merged, out, device="cuda"),
        lambda: unmerge(given.merged, in_place=True, device="cuda"),
        lambda: verify(given.merged, given.base, [given.adapter], device="cuda"),
        lambda: api.convert(api.load_lora(ADAPTERS / "llama-plain"), "vblora", target_ratio=8, device="cuda"),
        lambda: api.statistics(BASES / "tiny-llama", [], out, device="cuda"),
    )
    before = whole(given.base), whole(given.merged)
    for verb in verbs:
        with pytest.raises(OptionError, match="E-OPTION: the device 'cuda' cannot be used here"):
            verb()
    assert (whole(given.base), whole(given.merged)) == before and list(tmp_path.iterdir()) == []


@no_gpu
@pytest.mark.parametrize(
    "words",
    (
        ("merge-into-base", "BASE", "LORA", "-o", "OUT"),
        ("verify", "BASE", "--base", "BASE", "--adapter", "LORA"),
        ("unmerge", "BASE", "-o", "OUT"),
        ("lora-to-vblora", "LORA", "-o", "OUT"),
        ("statistics", "BASE", "--data", "TEXTS", "-o", "OUT"),
        ("refine", "FILE", "--base", "BASE", "--teacher", "LORA", "--data", "TEXTS", "-o", "OUT"),
    ),
    ids=lambda words: words[0],
)
def test_the_command_line_refuses_a_gpu_that_is_not_there(words: tuple[str, ...], tmp_path: Path) -> None:
    lora = api.load_lora(ADAPTERS / "llama-plain")
    api.write(api.convert(lora, "lowrank", bits="4").compact, tmp_path / "x.lrc")
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


def test_without_a_device_no_torch(tmp_path: Path) -> None:
    """Merge, verify and unmerge, in a fresh interpreter."""
    script = (
        "import sys; from lrconvert import api; base, lora, out, back = sys.argv[1:]; api.merge(base, lora, out);"
        "assert api.verify(out, base, lora).ok; api.unmerge(out, back);"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    words = [BASES / "tiny-llama", ADAPTERS / "llama-plain", tmp_path / "out", tmp_path / "back"]
    done = subprocess.run([sys.executable, "-c", script, *map(str, words)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu(kind: str, scenes: dict[str, Scene], tmp_path: Path) -> None:
    """The bytes of a merge, of its record, and of what it was made from."""
    given, out = scenes[kind], tmp_path / "out"
    merge(given.base, [given.adapter], out, device="cuda")
    assert whole(out) == whole(given.merged)
    assert verify(out, given.base, [given.adapter], device="cuda").ok
    unmerge(out, tmp_path / "back", device="cuda")
    assert whole(tmp_path / "back") == whole(given.base)
