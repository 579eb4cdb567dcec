"""The command line and Python have the same defaults: a command adds nothing to what the verb takes anyway."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import ADAPTERS, BASES

import lrconvert
from lrconvert import api
from lrconvert.cli import cli
from lrconvert.methods import base as methods

PLAIN, BASE = ADAPTERS / "llama-plain", BASES / "tiny-llama"
# The verb behind a command, its words, and the keywords that these words, or the place of the call, give.
COMMANDS: dict[str, tuple[str, tuple[object, ...], set[str]]] = {
    "inspect": ("inspect", (PLAIN,), set()),
    "upgrade": ("upgrade", ("x.lrc", "-o", "new.lrc"), set()),
    "compare": ("compare", (PLAIN, "x.lrc"), set()),
    "statistics": ("statistics", (BASE, "--data", "x.txt", "-o", "s"), {"out"}),
    "compress": ("compress", (PLAIN, "-o", "new.lrc"), {"out"}),
    "lora-to-alora": ("allocate", (PLAIN, "-o", "new.lrc", "--total-rank", 9), {"total_rank"}),
    "refine": ("refine", ("x.lrc", "--base", BASE, "--teacher", PLAIN, "-o", "new.lrc"), {"out"}),
    "export": ("export", ("x.lrc", "-o", "folder", "--to", "peft-lora"), {"out", "to", "command"}),
    "check": ("check", (PLAIN, "--for", "vllm"), {"consumers"}),
    "extract": ("extract", (BASE, "--base", BASE, "-o", "new.lrc"), {"base", "method", "out"}),  # a file has a form
    "combine": ("combine", (f"{PLAIN}=0.5", "-o", "new.lrc"), {"method", "out"}),
    "merge-into-base": ("merge", (BASE, PLAIN, "-o", "merged"), {"out"}),
    "unmerge": ("unmerge", (BASE, "-o", "again"), {"out"}),
    "verify": ("verify", (BASE, "--base", BASE, "--adapter", PLAIN), set()),
    "recover": ("recover", (BASE,), set()),
    **{
        command.name: (
            "convert",
            (PLAIN, "-o", "new.lrc", *(("--base", BASE) if command.name == "lora-to-bat" else ())),
            {"base", *command.fixed},
        )
        for method in methods.all_methods()
        for command in method.commands
    },
}


class Recorded(Exception):
    """Ends a command where it would call the verb."""


def default_of(name: str) -> set[Any]:
    """The defaults of the fields of that name in the options that verbs take, and in methods' own."""
    kinds = [value for value in (getattr(lrconvert, name) for name in lrconvert.__all__) if is_dataclass(value)]
    kinds += [method.Options for method in methods.all_methods()]
    return {entry.default for kind in kinds for entry in fields(kind) if entry.name == name}


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_a_command_adds_no_default_of_its_own(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that is typed without options calls its verb with the verb's own defaults."""
    monkeypatch.chdir(tmp_path)
    lrconvert.write(lrconvert.convert(PLAIN, "lowrank", target_ratio=4), "x.lrc")
    Path("x.txt").write_text("a text of some words\n")
    verb, words, given = COMMANDS[command]
    signature = inspect.signature(getattr(api, verb))
    calls: list[inspect.BoundArguments] = []

    def record(*arguments: Any, **keywords: Any) -> Any:
        calls.append(signature.bind(*arguments, **keywords))
        raise Recorded

    monkeypatch.setattr(api, verb, record)
    done = CliRunner().invoke(cli, [command, *map(str, words)])
    assert isinstance(done.exception, Recorded), (done.output, done.exception)
    for name, value in calls[0].arguments.items():
        parameter = signature.parameters[name]
        if parameter.kind is parameter.VAR_KEYWORD:
            strange = {key: v for key, v in value.items() if key not in given and v not in default_of(key)}
            assert strange == {}
        elif parameter.default is not parameter.empty and name not in given | {"progress"}:
            assert value == parameter.default, f"{command} passes {name}={value!r}, not {parameter.default!r}"


def test_every_command_is_looked_at() -> None:
    context = cli.make_context("lrconvert", ["--help"], resilient_parsing=True)
    assert set(cli.list_commands(context)) - set(COMMANDS) <= {
        "validate",
        "demo",
        "completion",
        "download",
        "expand",
        "fleet",
        "pack",
    }


def test_expand_adds_no_default_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command goes below the verb `expanded`, whose defaults it has."""
    from lrconvert.api import expanding

    given: list[tuple[Any, ...]] = []

    def record(file: Any, cache: Any, options: Any, **more: Any) -> Any:
        given.append((cache, options, more))
        raise Recorded

    monkeypatch.setattr(expanding, "expand", record)
    lrconvert.write(lrconvert.convert(PLAIN, "lowrank", target_ratio=4), tmp_path / "x.lrc")
    assert isinstance(CliRunner().invoke(cli, ["expand", str(tmp_path / "x.lrc")]).exception, Recorded)
    defaults = inspect.signature(lrconvert.expanded).parameters
    more = {name: defaults[name].default for name in ("to", "base")}
    assert given == [(defaults["cache"].default, lrconvert.ExpandOptions(), more)]


@pytest.mark.parametrize("options", ["ConvertOptions", "StatisticsOptions", "CompareOptions", "RunOptions"])
def test_the_device_is_the_same(options: str) -> None:
    """Without a device it is a GPU where there is one, in Python as on the command line."""
    kind: Callable[[], Any] = getattr(lrconvert, options)
    assert kind().device == "auto"
