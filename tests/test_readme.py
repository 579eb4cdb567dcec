"""README is short, its two set-up commands stand as CI runs them, and it names every command. Its examples run in
tests/test_examples.py."""

from __future__ import annotations

import re

import click
from conftest import ROOT

from lrconvert.cli import cli

README = (ROOT / "README.md").read_text()


def test_two_commands_do_all_the_set_up() -> None:
    commands = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    assert len(commands) == 2 and all(len(command.strip().splitlines()) == 1 for command in commands)
    assert "lrconvert demo" in commands[0] and "pytest" in commands[1]


def test_it_is_short() -> None:
    """At most 9 KB, a quickstart of five commands, and Python of ten lines."""
    assert len(README.encode()) <= 9000
    (quickstart,) = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    assert len(quickstart.splitlines()) == 5
    (python,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in python.splitlines() if line]) <= 10


def test_every_command_is_documented() -> None:
    context = click.Context(cli)
    commands = {name: cli.get_command(context, name) for name in cli.list_commands(context)}
    assert len(commands) > 20 and [name for name in commands if f"`{name}`" not in README] == []
    assert all(command is not None and command.help for command in commands.values())
