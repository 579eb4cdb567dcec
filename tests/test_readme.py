"""README's examples run as they stand, on a fixture under the names they use."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner
from conftest import ADAPTERS, BASES, ROOT

from lrconvert.cli import cli

README = (ROOT / "README.md").read_text()


def block(language: str) -> str:
    (content,) = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    return content


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(ADAPTERS / "llama-plain", tmp_path / "my-adapter")
    for name in ("one", "two"):
        shutil.copytree(ADAPTERS / "llama-plain", tmp_path / "my-adapters" / name)
    shutil.copytree(BASES / "tiny-llama", tmp_path / "base-model")
    for name in ("texts", "other-texts"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(f'{{"text": "{name} {n}: a line."}}' for n in range(9)))
    return tmp_path


def test_python_example(folder):
    subprocess.run([sys.executable, "-c", block("python")], cwd=folder, check=True, capture_output=True)
    assert (folder / "merged-model" / "config.json").exists()


@pytest.mark.medium
def test_console_example(folder, monkeypatch):
    """Sizes and times are those of a large adapter; the tiny fixture gets what suits it."""
    monkeypatch.chdir(folder)
    for line in block("console").splitlines():
        line = line.replace("--target-ratio 50", "--target-ratio 8").replace("--target-ratio 30", "--target-ratio 8")
        words = shlex.split(line.replace("200KB", "6KB").replace("--budget-minutes 10", "--budget-minutes 0.1"))
        assert words[0] == "lrconvert"
        done = CliRunner().invoke(cli, words[1:])
        assert done.exit_code == 0, (line, done.output, done.exception)
    assert (folder / "for-vllm" / "adapter_config.json").exists()


def test_two_commands_do_all_the_set_up():
    commands = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    assert len(commands) == 2 and all(len(c.strip().splitlines()) == 1 for c in commands)
    assert "lrconvert demo" in commands[0] and "pytest" in commands[1]


@pytest.fixture(scope="module")
def commands() -> dict[str, click.Command]:
    context = click.Context(cli)
    return {name: cli.get_command(context, name) for name in cli.list_commands(context)}


def test_every_command_is_documented(commands):
    assert len(commands) > 20 and [name for name in commands if name not in README] == []
    assert all(command.help for command in commands.values())


def test_every_option_that_is_named_exists(commands):
    options = {name for command in commands.values() for option in command.params for name in option.opts}
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", re.sub(r"```sh.*?```", "", README, flags=re.DOTALL)))
    others = {"--render", "--help"}  # of the benchmarks, of all commands
    assert len(named) > 30 and named - options - others == set()
