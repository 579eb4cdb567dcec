"""The examples of README and the guides run as they stand, on a fixture under the names they use."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from conftest import ADAPTERS, BASES, ROOT

from lrconvert.cli import cli

README = (ROOT / "README.md").read_text()
PAGES = {"README": README, **{page.stem: page.read_text() for page in sorted((ROOT / "docs" / "guides").glob("*.md"))}}
ALL = "\n".join(PAGES.values())


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(ADAPTERS / "llama-plain", tmp_path / "my-adapter")
    for name in ("one", "two"):
        shutil.copytree(ADAPTERS / "llama-plain", tmp_path / "my-adapters" / name)
    for name in ("base-model", "my-only-copy"):
        shutil.copytree(BASES / "tiny-llama", tmp_path / name)
    for name in ("texts", "other-texts"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(f'{{"text": "{name} {n}: a line."}}' for n in range(9)))
    return tmp_path


def test_python_example(folder: Path) -> None:
    (example,) = blocks(README, "python")
    subprocess.run([sys.executable, "-c", example], cwd=folder, check=True, capture_output=True)
    assert (folder / "merged-model" / "config.json").exists()


@pytest.mark.medium
@pytest.mark.parametrize("page", PAGES)
def test_console_examples(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes and times are those of a large adapter; the tiny fixture gets what suits it."""
    monkeypatch.chdir(folder)
    lines = [line for block in blocks(PAGES[page], "console") for line in block.splitlines()]
    assert lines
    for line in lines:
        line = re.sub(r"--target-ratio [2-5]0", "--target-ratio 8", line)
        words = shlex.split(line.replace("200KB", "6KB").replace("--budget-minutes 10", "--budget-minutes 0.1"))
        assert words[0] == "lrconvert"
        done = CliRunner().invoke(cli, words[1:])
        assert done.exit_code == 0, (line, done.output, done.exception)
        for option in ("-o", "--html"):
            assert option not in words or Path(words[words.index(option) + 1]).exists(), line


def test_two_commands_do_all_the_set_up() -> None:
    commands = blocks(README, "sh")
    assert len(commands) == 2 and all(len(c.strip().splitlines()) == 1 for c in commands)
    assert "lrconvert demo" in commands[0] and "pytest" in commands[1]


def test_readme_is_short_and_its_links_lead_somewhere() -> None:
    """Also from every page of docs/, to files and to headings of them."""
    assert len(README.encode()) <= 9000
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if "://" in target:
                continue
            path, _, heading = target.partition("#")
            place = page.parent / path if path else page
            assert place.exists(), (page.name, target)
            headings = re.findall(r"^#+ (.*)$", place.read_text(), re.MULTILINE) if heading else []
            anchors = [re.sub(r"[^\w -]", "", text).strip().lower().replace(" ", "-") for text in headings]
            assert not heading or heading in anchors, (page.name, target)


@pytest.fixture(scope="module")
def commands() -> dict[str, click.Command]:
    context = click.Context(cli)
    return {name: command for name in cli.list_commands(context) if (command := cli.get_command(context, name))}


def test_every_command_is_documented(commands: dict[str, click.Command]) -> None:
    assert len(commands) > 20 and [name for name in commands if f"`{name}`" not in README] == []
    assert all(command.help for command in commands.values())


def test_every_option_that_is_named_exists(commands: dict[str, click.Command]) -> None:
    options = {name for command in commands.values() for option in command.params for name in option.opts}
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", re.sub(r"```sh.*?```", "", ALL, flags=re.DOTALL)))
    assert len(named) > 30 and named - options - {"--help"} == set()
