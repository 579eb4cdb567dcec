"""Text of strangers on the terminal: names of files, targets and settings move no cursor and make no line."""

from __future__ import annotations

import ast
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ADAPTERS, BASES, ROOT
from peers.cases import PREFIX, plain, renamed

from lrconvert import api
from lrconvert.cli import main

EVIL = "\x1b[2J\x1b]0;pwned\x07\nINJECTED \u202e\x85"
"""Clears the screen, renames the window, begins a line, turns the reading round."""


Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command as `main` does; return what it prints, on both streams."""

    def called(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["lrconvert", *map(str, words)])
        with pytest.raises(SystemExit):
            main()
        printed = capsys.readouterr()
        return printed.out + printed.err

    return called


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an adapter, a file, and a base, each under an evil name too; it is where commands run."""
    monkeypatch.chdir(tmp_path)
    for name in ("ad", f"ad{EVIL}"):
        shutil.copytree(ADAPTERS / "llama-plain", tmp_path / name)
    compact = api.convert(api.load_lora(tmp_path / "ad"), "lowrank", target_ratio=4).compact
    for name in ("ok.lrc", f"ok{EVIL}.lrc"):
        api.write(compact, tmp_path / name)
    shutil.copytree(BASES / "tiny-llama", tmp_path / f"base{EVIL}")
    return tmp_path


def clean(printed: str) -> bool:
    """Whether nothing of what strangers wrote acts: no character but line breaks, and none that they made."""
    return all(c == "\n" or c.isprintable() for c in printed) and not re.search("^INJECTED", printed, re.MULTILINE)


E_LRC, E_AD, E_BASE = f"ok{EVIL}.lrc", f"ad{EVIL}", f"base{EVIL}"
# Every command on evil names, as it works and as it refuses; in order, since later ones take what earlier ones wrote.
COMMANDS: list[tuple[object, ...]] = [
    ("validate", E_LRC),
    ("validate", E_LRC, "--json"),
    ("validate", f"none{EVIL}"),
    ("inspect", E_LRC),
    ("inspect", E_AD),
    ("inspect", E_AD, "--json"),
    ("inspect", f"none{EVIL}"),
    ("inspect", "ad", "--from", EVIL),
    ("compare", "ad", E_LRC, "-v"),
    ("compare", E_AD, E_LRC, "--json"),
    ("upgrade", E_LRC, "-o", f"new{EVIL}.lrc"),
    ("upgrade", E_LRC, "-o", f"none{EVIL}/new.lrc"),
    ("export", E_LRC, "-o", f"out{EVIL}", "--to", "peft-lora"),
    ("export", E_LRC, "-o", f"out{EVIL}", "--to", "peft-lora"),
    ("export", E_LRC, "-o", "never", "--to", EVIL),
    ("export", E_LRC, "-o", "never", "--to", "peft-lora", "--base-model-id", EVIL),
    ("check", f"out{EVIL}", "--for", "all"),
    ("check", E_LRC, "--for", "all"),
    ("check", f"none{EVIL}", "--for", "all"),
    ("merge", E_BASE, E_LRC, "-o", f"merged{EVIL}"),
    ("merge", E_BASE, E_LRC, "-o", f"merged{EVIL}"),
    ("merge", E_BASE, f"{E_LRC}={EVIL}", "-o", "never"),
    ("verify", f"merged{EVIL}", "--base", E_BASE, "--adapter", E_LRC),
    ("verify", E_BASE, "--base", E_BASE, "--adapter", E_LRC),
    ("unmerge", f"merged{EVIL}", "-o", f"again{EVIL}"),
    ("recover", f"merged{EVIL}"),
    ("recover", f"none{EVIL}"),
    ("lora-to-lowrank", E_AD, "-o", f"one{EVIL}.lrc", "--target-ratio", 4),
    ("lora-to-lowrank", E_AD, "-o", f"one{EVIL}.lrc", "--target-ratio", 4),
    ("lora-to-lowrank", E_AD, "ad", f"none{EVIL}", "-o", f"many{EVIL}", "--target-ratio", 4),
    ("lora-to-lowrank", "ad", "-o", "never", "--include", f"({EVIL}"),
    ("compress", E_AD, "-o", f"c{EVIL}.lrc", "--target-ratio", 8, "--forms", "lowrank"),
    ("statistics", E_BASE, "--data", f"none{EVIL}", "-o", f"s{EVIL}"),
    ("refine", E_LRC, "--base", E_BASE, "--teacher", f"none{EVIL}", "-o", f"r{EVIL}.lrc"),
    (f"frob{EVIL}",),
    ("inspect", f"--{EVIL}"),
]


@pytest.mark.medium
def test_no_command_prints_what_acts(scene: Path, run: Run) -> None:
    for words in COMMANDS:
        printed = run(*words)
        assert printed and clean(printed), (words, printed)
    for made in ("out", "merged", "many"):
        assert (scene / f"{made}{EVIL}").is_dir(), made


@pytest.mark.parametrize("where", ["modules", "base", "fields"])
def test_what_an_adapter_says_of_itself_does_not_act(where: str, tmp_path: Path, run: Run) -> None:
    adapter = plain(modules=("self_attn.q_proj", "self_attn.v_proj"))
    if where == "modules":
        adapter = renamed(adapter, "layers.1", f"layers.1.{EVIL}")
    elif where == "base":
        adapter.config["base_model_name_or_path"] = f"/home/{EVIL}/org"
    else:
        adapter.config |= {EVIL: 1, "task_type": EVIL, "rank_pattern": {re.escape(EVIL): 8}}
    folder = adapter.write(tmp_path / "a")
    for words in (("inspect", folder), ("check", folder, "--for", "all"),
                  ("lora-to-lowrank", folder, "-o", tmp_path / "a.lrc", "--bits", "12"),
                  ("export", tmp_path / "a.lrc", "-o", tmp_path / "out", "--to", "peft-lora", "--source", folder),
                  ("merge", BASES / "tiny-llama", folder, "-o", tmp_path / "m")):  # fmt: skip
        printed = run(*words)
        assert clean(printed), (words, printed)


def test_json_is_json(scene: Path, run: Run) -> None:
    assert json.loads(run("inspect", E_AD, "--json"))["path"] == E_AD


def test_commands_print_through_one_function() -> None:
    """`say` escapes whatever it is given, so nothing else in the command line prints."""
    for path in sorted((ROOT / "lrconvert" / "cli").glob("*.py")):
        tree = ast.parse(path.read_text())
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        allowed = {"click.echo"} if path.name == "printing.py" else set()
        printing = {"print", "click.echo", "click.secho", "sys.stdout.write", "sys.stderr.write"}
        assert not calls & printing - allowed, path


# --- the model card -------------------------------------------------------------------------------------------------

MARKUP = "x`|[a](javascript:alert(1))<script>alert(1)</script>![i](http://evil.example/i.png)"


def test_a_model_card_has_no_markup_of_strangers(tmp_path: Path) -> None:
    """Names of targets, of the base and of the command line are text there, whatever they look like."""
    adapter = plain(modules=("self_attn.q_proj", "self_attn.v_proj"), base_model_name_or_path=MARKUP)
    source = renamed(adapter, f"{PREFIX}model.", f"{PREFIX}{MARKUP.replace('.', '-')}.").write(tmp_path / "a")
    lora = api.load_lora(source)
    compact = api.convert(lora, "lowrank", bits=12).compact
    command = f"lrconvert export '{MARKUP}\n```\n# {EVIL}'"
    api.export(compact, tmp_path / "out", to="peft-lora", source=lora, command=command)
    front, body = (tmp_path / "out" / "README.md").read_text().split("\n---\n", 1)
    assert all(c == "\n" or c.isprintable() for c in front + body)
    fence = re.compile(r"^(`{3,})\n(.*?)\n\1$", re.MULTILINE | re.DOTALL)
    outside = re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", fence.sub("", body))
    assert "javascript" not in outside and "<script" not in outside and "![" not in outside
    rows = [line for line in body.splitlines() if line.startswith("| ")][1:]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {6}


@pytest.mark.parametrize(
    ("link", "kept"),
    [("https://example.org/licence", True), ("http://example.org", True), ("javascript:alert(1)", False),
     ("LICENSE", False), ("file:///etc/passwd", False), ("https:/nohost", False), ("//example.org/x", False)],
)  # fmt: skip
def test_only_web_addresses_become_links(link: str, kept: bool, tmp_path: Path) -> None:
    source = plain(modules=("self_attn.q_proj",)).write(tmp_path / "a")
    (source / "README.md").write_text(f"---\nlicense: other\nlicense_name: mine\nlicense_link: {link}\n---\n")
    compact = api.convert(api.load_lora(source), "lowrank", bits=12).compact
    api.export(compact, tmp_path / "out", to="peft-lora")
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("license_link" in card) == kept
    assert kept or f"`{link}`" in card  # said, as text
