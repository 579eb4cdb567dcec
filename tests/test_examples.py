"""Every example of README and docs runs as it stands, page by page, on tiny fixtures under the names it uses.

`bash` and `python` blocks of a page run in the order of the page, in one folder; Python keeps its names from block
to block. `sh` blocks hold what cannot run here: programs that are not ours, and commands for a GPU, whose options are
parsed. Sizes and times that suit a large adapter are replaced by those of the fixture.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import ADAPTERS, BASES, ROOT

from lrconvert.cli import cli
from lrconvert.testing import layouts

FILES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in FILES}
NOTEBOOKS = sorted((ROOT / "docs").rglob("*.ipynb"))
BLOCK = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
RUN = ("bash", "python")
OTHERS = {
    "curl",
    "export",
    "flock",
    "llama-server",
    "python",
    "python3",
    "torchrun",
    "vllm",
}  # programs that `sh` blocks may call
# What suits a large adapter, and what suits the fixture.
SMALLER = (
    (r"--target-ratio \d+", "--target-ratio 4"),
    (r"target_ratio=\d+", "target_ratio=4"),
    (r"--target-size \w+", "--target-size 6KB"),
    (r"--budget-minutes \d+", "--budget-minutes 0.02"),
    (r"--steps \d+", "--steps 2"),
    (r"steps=\d+", "steps=2"),
)


UNET = {
    "_class_name": "UNet2DConditionModel",
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
}


def blocks(page: str, *languages: str) -> list[tuple[str, str]]:
    return [(language, text) for language, text in BLOCK.findall(page) if language in languages]


def commands(block: str) -> list[str]:
    """The commands of a block: a line each, but for those that a backslash continues."""
    lines = block.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def kohya_file() -> bytes:
    """A LoRA on two layers of a UNet."""
    rng = np.random.default_rng(0)
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    pairs = [
        layouts.Known(
            f"{block}.{name}", *(rng.standard_normal(shape).astype("<f4") for shape in ((4, 320), (320, 4))), alpha=4.0
        )
        for name in ("to_q", "to_v")
    ]
    (data,) = layouts.kohya(pairs).values()
    return data


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that examples name, where they run."""
    for name in ("my-adapter", "my-adapters/one", "my-adapters/two"):
        shutil.copytree(ADAPTERS / "llama-plain", tmp_path / name)
    for name in ("base-model", "my-only-copy"):
        shutil.copytree(BASES / "tiny-llama", tmp_path / name)
    shutil.copytree(ADAPTERS / "bert-classifier", tmp_path / "my-classifier")
    shutil.copytree(BASES / "tiny-bert", tmp_path / "encoder")
    (tmp_path / "style.safetensors").write_bytes(kohya_file())
    (tmp_path / "pipeline" / "unet").mkdir(parents=True)
    (tmp_path / "pipeline" / "unet" / "config.json").write_text(json.dumps(UNET))
    for name in ("texts", "other-texts"):
        lines = (json.dumps({"text": f"{name} {n}: a line."}) for n in range(9))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    labelled = (json.dumps({"text": f"a line, {n}.", "label": n % 2}) for n in range(12))
    (tmp_path / "labelled.jsonl").write_text("\n".join(labelled))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_command(line: str) -> None:
    words = shlex.split(line)
    assert words[0] == "lrconvert", line
    done = CliRunner().invoke(cli, words[1:])
    assert done.exit_code == 0, (line, done.output, done.exception)
    for option in ("-o", "--output", "--html", "--log"):
        assert option not in words or Path(words[words.index(option) + 1]).exists(), line


def run_cell(source: str, names: dict[str, Any]) -> str:
    """Run a cell as a notebook does, and return what it shows: its output, and the last line if that is a value."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(tree, "cell", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
            print("" if value is None else repr(value))
    return out.getvalue().strip()


SLOWER = {"docs/guides/choosing.md": pytest.mark.slow}  # it searches, and refines several forms


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=SLOWER.get(p, pytest.mark.medium)) for p, text in PAGES.items() if blocks(text, *RUN)],
)
def test_examples_run(page: str, folder: Path) -> None:
    names: dict[str, Any] = {"__name__": "example"}
    for language, block in blocks(PAGES[page], *RUN):
        for large, small in SMALLER:
            block = re.sub(large, small, block)
        if language == "python":
            run_cell(block, names)
        else:
            for line in commands(block):
                run_command(line)


@pytest.mark.medium
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(notebook: Path, folder: Path) -> None:
    """Each cell runs, and shows what the notebook has, but for digits, which other machines may round otherwise."""
    names: dict[str, Any] = {"__name__": "example"}
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        shown = run_cell("".join(cell["source"]), names)
        kept = [
            "".join(output.get("text") or output["data"]["text/plain"])
            for output in cell["outputs"]
            if output.get("name") != "stderr"
        ]
        forms = [re.sub(r"\s+", " ", re.sub(r"[\d.,]+", "0", text)).strip() for text in (shown, "\n".join(kept))]
        assert forms[0] == forms[1], "run: jupyter nbconvert --to notebook --execute --inplace " + notebook.name


def test_what_does_not_run_is_known_and_ours_is_parsed() -> None:
    """An `sh` block holds programs of others, and commands of ours for machines that are not here."""
    for page, text in PAGES.items():
        for line in (line for _, block in blocks(text, "sh") for line in commands(block)):
            words = shlex.split(line)
            assert words[0] in {*OTHERS, "lrconvert"}, (page, line)
            if ("lrconvert" in words and "-m" in words[: words.index("lrconvert")]) or words[0] == "lrconvert":
                name, *rest = words[words.index("lrconvert") + 1 :]
                command = cli.get_command(click.Context(cli), name)
                assert command is not None, (page, line)
                command.make_context(name, rest)  # raises where an option is none


def test_every_block_has_a_language_that_is_known() -> None:
    """So that no example is left out by a slip; what a command prints is `text`."""
    known = {*RUN, "sh", "text", "json", "yaml"}
    for page, text in PAGES.items():
        opening = re.findall(r"^```(.*)$", text, re.MULTILINE)[::2]
        assert {word.split()[0] if word else "" for word in opening} <= known, page


def test_every_option_that_is_named_exists() -> None:
    context = click.Context(cli)
    named = [cli.get_command(context, name) for name in cli.list_commands(context)]
    inner = [one for command in named if isinstance(command, click.Group) for one in command.commands.values()]
    options = {name for command in [*named, *inner] if command for option in command.params for name in option.opts}
    pages = [
        text for name, text in PAGES.items() if name == "README.md" or name.split("/")[1] in ("guides", "tutorials")
    ]
    text = re.sub(r"```sh.*?```", "", "\n".join(pages), flags=re.DOTALL)
    words = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
    assert len(words) > 30 and words - options - {"--help"} == set()
