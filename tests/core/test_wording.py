"""Messages speak the language of who reads them: keywords in Python, flags on the command line."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from conftest import ADAPTERS, ROOT

import lrconvert
from lrconvert.cli import cli
from lrconvert.core.wording import either, on_command_line, spelled, verb
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.methods import base as methods

PACKAGE = ROOT / "lrconvert"
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
# Of other programs: of servers, of their converters, of the hub's own command; the end of names of buckets.
THEIRS = {"--x-s", "--max-lora-rank", "--revision", "--repo-type", "--lora", "--model", "--adapter-path", "--prompt"}
COMMANDS_SPEAK = ("cli", "report", "demo", "testing")  # what only a command prints


def strings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The texts of a module that may reach a user, by line: neither documentation nor help of an option."""
    passed: set[int] = set()
    for node in ast.walk(tree):
        name = getattr(node.func, "id", getattr(node.func, "attr", "")) if isinstance(node, ast.Call) else ""
        if name in ("option", "field", "Command", "spelled", "either") or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ):
            passed |= {id(inner) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in passed:
            yield node.lineno, node.value


@pytest.mark.parametrize("folder", sorted(p.name for p in PACKAGE.iterdir() if (p / "__init__.py").is_file()))
def test_no_message_spells_a_flag_itself(folder: str) -> None:
    """Outside of what commands alone print, options are named by `spelled`."""
    if folder in COMMANDS_SPEAK:
        return
    for path in sorted((PACKAGE / folder).rglob("*.py")):
        for line, text in strings(ast.parse(path.read_text())):
            left = set(FLAG.findall(text.replace("the converter --base", ""))) - THEIRS
            assert not left, f"{path.relative_to(ROOT)}:{line}: {min(left)} is for `spelled`"


def keywords() -> set[str]:
    """Every keyword that a verb takes: its own, and the fields of all options."""
    verbs = [getattr(lrconvert, name) for name in lrconvert.__all__]
    own = {name for v in verbs if inspect.isfunction(v) for name in inspect.signature(v).parameters}
    kinds = [v for v in verbs if is_dataclass(v)] + [method.Options for method in methods.all_methods()]
    reading = {entry.name for entry in fields(ReadOptions)}
    return own | {entry.name for kind in kinds for entry in fields(kind)} | reading


def flags() -> set[str]:
    """Every option of every command."""
    context = click.Context(cli)
    commands = [cli.get_command(context, name) for name in cli.list_commands(context)]
    return {text for command in commands if command for option in command.params for text in option.opts}


def test_what_is_named_is_there() -> None:
    """Whatever `spelled` names is a keyword in Python, and an option on the command line."""
    known_keywords, known_flags, seen = keywords(), flags(), 0
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "spelled"):
                continue
            given = [argument.value if isinstance(argument, ast.Constant) else None for argument in node.args]
            name, flag = given[0], given[2] if len(given) > 2 else None
            if name is None:
                continue  # of a field, which is an option by itself
            seen += 1
            where = f"{path.relative_to(ROOT)}:{node.lineno}"
            assert name in known_keywords, f"{where}: Python has no {name}"
            assert (flag or "--" + name.replace("_", "-")) in known_flags, f"{where}: no command has {flag or name}"
    assert seen > 80


def test_the_words() -> None:
    """A value is spelled as each side writes it; the command line's words end with the context."""
    python = [spelled("bits"), spelled("bits", 4), spelled("undo", False, "--no-undo"), spelled("base", ...)]
    with on_command_line():
        command = [spelled("bits"), spelled("bits", 4), spelled("undo", False, "--no-undo"), spelled("base", ...)]
        assert verb("recover") == "lrconvert recover" and either("a", "b") == "b"
    assert python == ["bits", "bits=4", "undo=False", "base=..."]
    assert command == ["--bits", "--bits 4", "--no-undo", "--base"]
    assert verb("recover") == "lrconvert.recover" and either("a", "b") == "a"


def test_one_error_on_both_sides(tmp_path: Path) -> None:
    """The same refusal reads as Python in Python and as a flag from a command, with the same code."""
    made = lrconvert.convert(ADAPTERS / "llama-plain", "lowrank", target_ratio=4)
    lrconvert.write(made, tmp_path / "x.lrc")
    with pytest.raises(lrconvert.OutputExistsError, match="overwrite=True"):
        lrconvert.write(made, tmp_path / "x.lrc")
    words = ["lora-to-lowrank", ADAPTERS / "llama-plain", "-o", tmp_path / "x.lrc", "--target-ratio", 4]
    refused = CliRunner().invoke(cli, [str(word) for word in words]).exception
    assert isinstance(refused, lrconvert.OutputExistsError) and "--overwrite" in str(refused)
    words = ["lora-to-lowrank", ADAPTERS / "llama-plain", ADAPTERS / "llama-lmhead", "-o", tmp_path, "-j", "1"]
    words += ["--target-ratio", "4"]
    (tmp_path / "llama-plain.lrc").write_bytes(b"another's")
    done = CliRunner().invoke(cli, [str(word) for word in words])
    assert "--overwrite" in done.output and "overwrite=True" not in done.output
