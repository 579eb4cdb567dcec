"""`lrconvert demo` is what a stranger runs first."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from lrconvert import api
from lrconvert.cli import cli, demo
from lrconvert.core.errors import LrcError, OutputExistsError
from lrconvert.testing import faults


@pytest.mark.slow
def test_the_demo_shows_what_a_stranger_wants_to_know(tmp_path, monkeypatch):
    """Every step, a table in which the refined file has most of the LoRA's answers right, on a screen and a half; all
    files in one folder, the report among them, and the base comes back."""
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, ["demo"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    steps = re.findall(r"^\$ lrconvert (\S+)", done.output, re.M)
    assert steps == ["inspect", "compress", "compare", "merge-into-base", "verify", "unmerge"]
    lines = done.stdout.splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 100
    rows = re.findall(
        r"^(base|LoRA|small.lrc|refined.lrc) +([\d,]+|-) +\S+ +([\d.]+) +([\d.]+)% +([\d.]+)%", done.output, re.M
    )
    assert [row[0] for row in rows] == ["base", "LoRA", "small.lrc", "refined.lrc"]
    loss = {name: float(number) for name, _, number, _, _ in rows}
    right = {name: float(number) for name, _, _, _, number in rows}
    assert right["base"] < 5 and right["LoRA"] > 80 and right["refined.lrc"] > right["LoRA"] - 10
    assert loss["base"] > 10 * loss["LoRA"] and loss["refined.lrc"] <= loss["small.lrc"]
    answer = next(line for line in lines if line.startswith("LoRA") and "{" in line)
    assert json.loads(answer.partition(" ")[2]).keys() == {"fault", "priority", "action"}
    assert [p.name for p in tmp_path.iterdir()] == ["lrconvert-demo"]
    folder = tmp_path / "lrconvert-demo"
    assert {p.name for p in folder.iterdir()} == {
        *("base", "adapter", "train.jsonl", "heldout.jsonl", "small.lrc", "refined.lrc", "refine.jsonl"),
        *("report.html", "merged", "restored"),
    }
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert "lrconvert compare adapter small.lrc refined.lrc" in report and str(tmp_path) not in report
    for path in (folder / "base").iterdir():
        assert (folder / "restored" / path.name).read_bytes() == path.read_bytes()


def test_a_folder_that_is_there_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "lrconvert-demo" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    for words in (["demo"], ["demo", "--full"], ["demo", "-o", str(mine.parent)]):
        refused = CliRunner().invoke(cli, words).exception
        assert isinstance(refused, OutputExistsError) and "--overwrite" in str(refused)
    assert [p.name for p in mine.parent.iterdir()] == ["notes.txt"]


@click.group()
def stub() -> None:
    """Commands that do nothing, by the names of those that the demo runs."""


for _name in ("inspect", "compress", "refine", "compare", "merge-into-base", "verify", "unmerge"):
    _words = click.Argument(["words"], nargs=-1, type=click.UNPROCESSED)
    stub.add_command(
        click.Command(
            _name, params=[_words], callback=lambda words: None, context_settings={"ignore_unknown_options": True}
        )
    )


@pytest.mark.parametrize("full", (False, True))
def test_overwrite_replaces_what_the_demo_writes_and_nothing_else(tmp_path, monkeypatch, full):
    pytest.importorskip("torch")
    from lrconvert.cli import demo_answers

    monkeypatch.setattr(demo_answers, "answers", lambda *given: "a table")
    mine, old = tmp_path / "out" / "notes.txt", tmp_path / "out" / "heldout.jsonl"
    mine.parent.mkdir()
    mine.write_text("mine")
    old.write_text("old")
    said: list[str] = []
    demo.run(stub, mine.parent, full=full, overwrite=True, echo=said.append)
    assert mine.read_text() == "mine"
    assert old.read_bytes() == (demo.HERE / "heldout.jsonl").read_bytes()
    for name in ("base/config.json", "adapter/adapter_config.json", "train.jsonl"):
        assert (mine.parent / name).read_bytes() == (demo.HERE / name).read_bytes()
    assert (mine.parent / demo.REFINED).exists() != full
    assert ("$ lrconvert refine" in "\n".join(said)) == full
    assert "-o small.lrc --overwrite" in "\n".join(said) and "--html report.html" in "\n".join(said)


def test_a_full_disk_is_one_line(tmp_path):
    """What is there is whole."""
    with faults.installed(faults.Faulty(25, 28, persistent=True)), pytest.raises(LrcError, match="E-IO-WRITE"):
        cli.main(["demo", "-o", str(tmp_path / "out")], standalone_mode=False)
    whole = [p for p in (tmp_path / "out").rglob("[!.]*") if p.is_file() and not p.parent.name.startswith(".")]
    for path in whole:
        assert path.read_bytes() == (demo.HERE / path.relative_to(tmp_path / "out")).read_bytes()


def test_the_bundled_file_is_what_the_full_demo_makes():
    """It was refined for as many steps, from the bundled LoRA, on the bundled base, and its log is of that run."""
    path = demo.HERE / demo.REFINED
    assert api.validate(path, base=demo.HERE / "base").ok
    made = api.load(path)
    assert made.provenance.fields["refined_steps"] == str(demo.STEPS)
    again = api.convert(api.load_lora(demo.HERE / "adapter"), "lowrank", rank=1).compact
    assert made.provenance.source == again.provenance.source
    events = [json.loads(line) for line in (demo.HERE / demo.LOG).read_text().splitlines()]
    assert events[0]["event"] == "start" and events[-1]["event"] == "end"
    assert events[0]["settings"]["steps"] == demo.STEPS
    size = sum(p.stat().st_size for p in Path(demo.HERE).rglob("*") if p.is_file() and "__pycache__" not in str(p))
    assert size < 3_200_000  # it is a part of every installation
