"""Several sources and folders of adapters, tables, messages for what is given for something else, completion."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete
from conftest import ADAPTERS, BASES, FIXTURES, CommandLine, random_lora

from lrconvert import api, cli
from lrconvert.core import errors
from lrconvert.report import tables

BASE = BASES / "tiny-llama"
PLAIN = ADAPTERS / "llama-plain"


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """A folder of adapters with long names, one of them broken, and an lrconvert file."""
    folder = tmp_path / "many"
    for name in ("llama-plain", "llama-dora", "gpt2-conv1d"):
        shutil.copytree(ADAPTERS / name, folder / f"{name}-{'of-a-very-long-name-' * 5}")
    (folder / "broken.safetensors").write_bytes(b"nothing")
    api.write(api.convert(random_lora(), "lowrank", bits=4), folder / "x.lrc")
    return folder


# --- several --------------------------------------------------------------------------------------------------------


def test_inspect_ends_with_a_table(command_line: CommandLine, many: Path) -> None:
    """A row for each adapter below the folder, those that are refused too, and the sums; exit 1 for these."""
    code, out, err = command_line("inspect", many)
    lines = out.splitlines()
    assert code == 1 and "broken.safetensors" in err and lines[0] == f"in {many}:"
    assert [line.split()[1] for line in lines[3:-1]] == ["E-IO-KIND", "LoRA", "LoRA", "LoRA", "lowrank"]
    assert lines[-1].startswith("5 adapters, 1 refused") and max(map(len, lines[1:])) <= 100
    shown = json.loads(command_line("inspect", many, "--json")[1])
    assert [Path(one["path"]).parent for one in shown["sources"]] == [many] * 5
    assert [one.get("error", {}).get("code") for one in shown["sources"]] == ["E-IO-KIND", *[None] * 4]
    assert shown["totals"]["adapters"] == 5 and shown["totals"]["refused"] == 1
    assert shown["totals"]["targets"] == sum(len(one.get("targets", ())) for one in shown["sources"])


def test_one_source_is_shown_as_before(command_line: CommandLine) -> None:
    code, out, _ = command_line("inspect", PLAIN)
    assert code == 0 and "rank for 90 %" in out
    assert json.loads(command_line("inspect", PLAIN, "--json")[1])["path"] == str(PLAIN)
    code, out, _ = command_line("inspect", PLAIN, PLAIN)
    assert code == 0 and out.splitlines()[-1].startswith("2 adapters")


def test_check_ends_with_a_table(command_line: CommandLine, many: Path) -> None:
    """What is found is said once, with the adapters that it is of; a row for each, a column for each program."""
    code, out, err = command_line("check", many, "--for", "all")
    lines = out.splitlines()
    assert code == 1 and "broken" in err
    assert sum("DoRA is not implemented" in line for line in lines if line.startswith("refuses: vllm")) == 1
    start = lines.index(f"in {many}:")
    assert max(map(len, lines[start + 1 :])) <= 100 and lines[-1].startswith("5 adapters")
    assert any(line.startswith("broken") and "E-IO-KIND" in line for line in lines[start:])
    shown = json.loads(command_line("check", many, "--for", "vllm", "--json")[1])
    assert [one["ok"] for one in shown["adapters"]] == [False, True, False, True, False] and not shown["ok"]
    assert shown["totals"] == {"adapters": 5, "refused": 1, "vllm": 2}
    assert json.loads(command_line("check", PLAIN, "--for", "vllm", "--json")[1])["ok"]


def test_validate_takes_folders(command_line: CommandLine, many: Path) -> None:
    """The lrconvert files in them, with a table; a folder without any is refused."""
    code, out, _ = command_line("validate", many)
    assert code == 0 and out.startswith(f"ok: {many / 'x.lrc'}: lowrank")
    (many / "y.lrc").write_bytes((many / "x.lrc").read_bytes()[:-1])
    code, out, _ = command_line("validate", many)
    lines = out.splitlines()
    assert code == 1 and lines[-1].split()[:2] == ["2", "files"] and lines[-1].endswith("1 broken")
    shown = json.loads(command_line("validate", many, "--json")[1])
    assert [one["ok"] for one in shown["files"]] == [True, False] and shown["totals"]["broken"] == 1
    code, _, err = command_line("validate", PLAIN)
    assert code == 1 and "holds no lrconvert file" in err


def test_compare_prints_the_summary(command_line: CommandLine, tmp_path: Path) -> None:
    """Targets with -v alone; the worst of each file on a line."""
    files = [tmp_path / f"{n}.lrc" for n in (8, 50)]
    for file in files:
        api.write(api.convert(PLAIN, "lowrank", target_ratio=float(file.stem)), file)
    code, out, _ = command_line("compare", PLAIN, *files)
    assert code == 0 and len(out.splitlines()) < 15 and out.count("q_proj") <= 2
    assert "worst target of each file" in out
    _, verbose, _ = command_line("compare", PLAIN, *files, "-v")
    assert verbose.count("q_proj") >= 4 and "worst target of each" not in verbose


@pytest.mark.parametrize("name", ["short", "x" * 99, "x" * 500])
def test_tables_fit(name: str) -> None:
    """Names are shortened in the middle; what is beside them stays whole."""
    text = tables.table(["target", "a", "b"], [[name, "12345678", "y" * 20], ["z", "1", "2"]])
    assert max(map(len, text.splitlines())) <= 100
    assert "12345678" in text and "y" * 20 in text and text.splitlines()[2].startswith(name[:5])
    assert tables.shortened("abcdefgh", 5) == "ab…gh" and tables.shortened("abc", 5) == "abc"


def test_a_bat_is_called_so(command_line: CommandLine) -> None:
    """Where a form is named: bone is another one."""
    bat = FIXTURES / "golden" / "v2" / "bone.1" / "7.lrc"
    assert "Bat: " in command_line("inspect", bat)[1] and "Bone" not in command_line("inspect", bat)[1]
    assert ": bat, " in command_line("validate", bat)[1]
    assert command_line("inspect", bat, bat.with_name("0.lrc"))[1].split().count("bat") == 1


# --- messages -------------------------------------------------------------------------------------------------------

MISTAKES = {
    "a base for an adapter": (("inspect", BASE), "E-LAYOUT", r"tiny-llama: is a model, not an adapter"),
    "a base to convert": (("lora-to-lowrank", BASE, "-o", "x"), "E-LAYOUT", "is a model, not an adapter"),
    "a base to export": (("export", BASE, "-o", "x", "--to", "raw"), "E-LAYOUT", "is a model, not an adapter"),
    "a base to check": (("check", BASE, "--for", "peft"), "E-LAYOUT", "is a model, not an adapter"),
    "a file of a base": (("inspect", BASE / "config.json"), "E-LAYOUT", "is a file of a model"),
    "an adapter for a base": (("merge", PLAIN, PLAIN, "-o", "x"), "E-IO-KIND", "is an adapter, not a model"),
    "an adapter for the base of names": (
        ("export", PLAIN, "-o", "x", "--to", "gguf", "--base", PLAIN),
        "E-IO-KIND",
        "is an adapter, not a model",
    ),
    "an adapter for the base of a check": (
        ("check", PLAIN, "--for", "peft", "--base", PLAIN),
        "E-IO-KIND",
        "is an adapter, not a model",
    ),
    "the wrong way round": (("merge", PLAIN, BASE, "-o", "x"), "E-CONFIG", "Exchange the two"),
    "the configuration alone": (("inspect", PLAIN / "adapter_config.json"), "E-LAYOUT", "Give its folder"),
    "the configuration to check": (
        ("check", PLAIN / "adapter_config.json", "--for", "peft"),
        "E-LAYOUT",
        "Give its folder",
    ),
    "the configuration to merge": (
        ("merge", BASE, PLAIN / "adapter_config.json", "-o", "x"),
        "E-LAYOUT",
        "Give its folder",
    ),
    "two LoRAs to compare": (("compare", PLAIN, PLAIN), "E-LAYOUT", "is a LoRA, not a compact adapter"),
    "too small a ratio": (
        ("lora-to-lowrank", PLAIN, "-o", "x", "--target-ratio", "100000"),
        "E-BUDGET",
        r"\d+ bytes, ([\d.]+) times smaller. Ask for at most \1 times",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_is_given_for_something_else(
    case: str, command_line: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line that says what it is, and what to give."""
    monkeypatch.chdir(tmp_path)
    words, code, said = MISTAKES[case]
    status, out, err = command_line(*words)
    (line,) = err.splitlines()
    assert status == 1 and line.startswith(code) and not out and list(tmp_path.iterdir()) == []
    assert re.search(said, line), line


def test_compare_the_wrong_way_round(command_line: CommandLine, tmp_path: Path) -> None:
    file = tmp_path / "x.lrc"
    api.write(api.convert(PLAIN, "lowrank", bits=4), file)
    status, _, err = command_line("compare", file, PLAIN)
    assert status == 1 and "the wrong way round" in err and "Give the LoRA first" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("convert", PLAIN), "`lrconvert compress` takes the best form"),
        (("quantize", PLAIN), "`lrconvert compress`"),
        (("info", PLAIN), "`lrconvert inspect` is meant"),
        (("merg", PLAIN), "merge"),
        (("xyzzy",), "`lrconvert -h` lists all"),
        (("merge", BASE, PLAIN, "--in-place", "-o", "x"), "give one of them"),
        (("merge", BASE, PLAIN), "-o FOLDER writes"),
        (("merge", BASE, f"{PLAIN}=a", "-o", "x"), "is not a scale"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_usage_says_what_is_meant(words: Sequence[object], said: str, command_line: CommandLine) -> None:
    status, out, err = command_line(*words)
    assert status == 2 and said in err and not out


def test_verify_says_what_the_record_says(command_line: CommandLine, tmp_path: Path) -> None:
    """Another scale than was merged, another adapter, the base and the merge exchanged."""
    merged = tmp_path / "m"
    api.merge(BASE, api.Scaled(api.load_lora(PLAIN), 0.5, "llama-plain"), merged)
    status, out, _ = command_line("verify", merged, "--base", BASE, "--adapter", PLAIN)
    assert status == 1 and "it is the merge of llama-plain at scale 0.5, not at 1" in out
    _, out, _ = command_line("verify", merged, "--base", BASE, "--adapter", f"{ADAPTERS / 'llama-rslora'}=0.5")
    assert "llama-plain at scale 0.5, not of what was given" in out
    _, out, _ = command_line("verify", BASE, "--base", merged, "--adapter", f"{PLAIN}=0.5")
    assert "exchange them" in out
    assert command_line("verify", merged, "--base", BASE, "--adapter", f"{PLAIN}=0.5")[0] == 0


def test_the_largest_ratio_is_one_that_can_be_reached(tmp_path: Path) -> None:
    """For every form: what its refusal names is accepted."""
    lora = api.load_lora(PLAIN)
    for form in ("lowrank", "vblora", "bone", "nola", "sbora"):
        with pytest.raises(errors.BudgetError, match="times smaller") as refused:
            api.convert(lora, form, target_ratio=1e6)
        ratio = float(refused.value.fix.split()[4])
        assert api.convert(lora, form, target_ratio=ratio, dry_run=True).ratio >= ratio


# --- completion -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str, command_line: CommandLine) -> None:
    status, out, err = command_line("completion", shell)
    assert status == 0 and not err and f"_LRCONVERT_COMPLETE={shell}_complete" in out


def test_commands_options_and_choices_are_completed() -> None:
    complete = ShellComplete(cli.cli, {}, "lrconvert", "_LRCONVERT_COMPLETE")
    names = {item.value for item in complete.get_completions([], "lora-to-")}
    assert names == {name for name in cli.cli.list_commands(click.Context(cli.cli)) if name.startswith("lora-to-")}
    assert "--push-to-hub" in [item.value for item in complete.get_completions(["export"], "--push")]
    assert {item.value for item in complete.get_completions(["check", "x", "--for"], "v")} == {"vllm"}
    assert [item.type for item in complete.get_completions(["merge"], "x")] == ["file"]
