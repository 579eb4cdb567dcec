"""README's examples run as they stand, on a fixture under the names they use."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ADAPTERS, BASES, ROOT

README = (ROOT / "README.md").read_text()


def block(language: str) -> str:
    found = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert len(found) == 1
    return found[0]


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


def test_console_example(folder):
    """Sizes are those of a large adapter; the tiny fixture gets a ratio that it can reach."""
    for line in block("console").splitlines():
        words = shlex.split(line.replace("--target-ratio 50", "--target-ratio 8").replace("200KB", "6KB"))
        assert words[0] == "lrconvert"
        done = subprocess.run(
            [sys.executable, "-m", "lrconvert.cli", *words[1:]], cwd=folder, check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, (line, done.stderr)
    assert (folder / "for-vllm" / "adapter_config.json").exists()


def test_two_commands_do_all_the_set_up():
    commands = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    assert len(commands) == 2 and all(len(c.strip().splitlines()) == 1 for c in commands)
    assert "lrconvert demo" in commands[0] and "pytest" in commands[1]


def test_every_command_is_documented():
    from lrconvert.cli import cli

    undocumented = {name for name in cli.commands if name not in README} - {"merge"}
    assert not undocumented
    assert all(command.help for command in cli.commands.values())
