"""The command line as a user meets it: exit codes, one-line refusals, nothing left behind, JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ADAPTERS, BASES

from lrconvert.cli import printing
from lrconvert.cli.flags import ByteSize

SOURCE = str(ADAPTERS / "llama-plain")


def lrconvert(*words, cwd=None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "lrconvert.cli", *map(str, words)], capture_output=True, text=True, cwd=cwd, check=False
    )


def test_inspect_json_lists_the_targets():
    found = json.loads(lrconvert("inspect", SOURCE, "--json").stdout)
    assert found["schema"] == 1 and len(found["targets"]) == 14
    first = found["targets"][0]
    assert {"name", "out", "in", "rank", "scale", "dtype", "spectrum", "singular_values"} <= set(first)


def test_dry_run_prints_the_exact_size_and_writes_nothing(tmp_path):
    words = ["lora-to-lowrank", SOURCE, "--target-ratio", "10", "--json"]
    planned = json.loads(lrconvert(*words, "--dry-run", cwd=tmp_path).stdout)
    assert list(tmp_path.iterdir()) == []
    done = json.loads(lrconvert(*words, "-o", "x.lrc", cwd=tmp_path).stdout)
    assert planned["bytes"] == done["bytes"] and done["bytes"]["total"] == (tmp_path / "x.lrc").stat().st_size
    assert 0 < done["captured"] < 1 and len(done["targets"]) == 14


REFUSED = {
    "no such input": (["lora-to-lowrank", "absent", "-o", "x.lrc"], "E-LAYOUT"),
    "impossible size": (["lora-to-lowrank", SOURCE, "-o", "x.lrc", "--target-size", "100"], "E-BUDGET"),
    "no folder": (["lora-to-lowrank", SOURCE, "-o", "a/b/x.lrc"], "E-OUT-PATH"),
    "no target left": (["lora-to-lowrank", SOURCE, "-o", "x.lrc", "--include", "zzz"], "E-EMPTY"),
    "size and ratio": (
        ["lora-to-lowrank", SOURCE, "-o", "x.lrc", "--target-size", "9KB", "--target-ratio", "9"],
        "E-OPTION",
    ),
    "other base": (["lora-to-lowrank", SOURCE, "-o", "x.lrc", "--base", str(BASES / "tiny-bert")], "E-BASE"),
    "merge of another model's adapter": (["merge", str(BASES / "tiny-bert"), SOURCE, "-o", "out"], "E-BASE"),
    "validate a text": (["validate", __file__], "E-HDR"),
    "export of a model": (["export", str(BASES / "tiny-llama"), "-o", "out", "--to", "peft-lora"], "E-LAYOUT"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_line_and_leave_nothing(case, tmp_path):
    words, code = REFUSED[case]
    done = lrconvert(*words, cwd=tmp_path)
    line = (done.stderr + done.stdout).strip()
    assert done.returncode == 1 and len(line.splitlines()) == 1 and line.startswith(code), line
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_kept_unless_told(tmp_path):
    (tmp_path / "x.lrc").write_text("precious")
    done = lrconvert("lora-to-lowrank", SOURCE, "-o", "x.lrc", "--bits", "12", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("E-OUT-EXISTS")
    assert (tmp_path / "x.lrc").read_text() == "precious"
    small = "--bits", "12"
    assert lrconvert("lora-to-lowrank", SOURCE, "-o", "x.lrc", *small, "--overwrite", cwd=tmp_path).returncode == 0
    assert lrconvert("validate", "x.lrc", "--base", BASES / "tiny-llama", cwd=tmp_path).returncode == 0


def test_usage_errors_exit_2(tmp_path):
    assert lrconvert("lora-to-lowrank", SOURCE, cwd=tmp_path).returncode == 2
    assert lrconvert("no-such-command").returncode == 2
    assert lrconvert("lora-to-lowrank", SOURCE, "-o", "x", "--target-size", "lots", cwd=tmp_path).returncode == 2


def test_validate_finds_another_base(tmp_path):
    lrconvert("lora-to-lowrank", SOURCE, "-o", "x.lrc", "--bits", "12", "--base", BASES / "tiny-llama", cwd=tmp_path)
    assert lrconvert("validate", "x.lrc", "--base", BASES / "tiny-llama", cwd=tmp_path).returncode == 0
    found = json.loads(
        lrconvert("validate", "x.lrc", "--base", BASES / "tiny-llama-bf16", "--json", cwd=tmp_path).stdout
    )
    assert not found["ok"] and {f["code"] for f in found["files"][0]["findings"]} <= {"E-FPR", "E-BASE"}


@pytest.mark.parametrize(("text", "size"), [("200KB", 200_000), ("1.5MiB", 1_572_864), ("4096", 4096), ("2 kb", 2000)])
def test_sizes(text, size):
    assert ByteSize().convert(text, None, None) == size


def test_progress_without_a_terminal_is_a_line_every_half_minute(monkeypatch, capsys):
    """The share that is done, and how long the rest takes at that speed, if that says anything yet: at first after some
    seconds; nothing when quiet, and nothing of what ends before."""
    clock = iter([0.0, 3.0, 10.0, 31.0, 61.0, 300.0])
    monkeypatch.setattr(printing, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with printing.progress_bar("refine", quiet=False) as update:
        for fraction, text in ((0.1, "a"), (0.25, "b"), (0.3, "c"), (0.004, "d"), (0.5, "e")):
            update(fraction, text)
    with printing.progress_bar("refine", quiet=True) as update:
        update(0.9, "f")
    lines = [
        "refine: 25% after 10 s, 30 s left; b",
        "refine: 0% after 61 s; d",
        "refine: 50% after 5 min, 5 min left; e",
    ]
    assert capsys.readouterr().err.splitlines() == lines
