"""`lrconvert demo`: the commands of the main job on the bundled pair, and what they did to the model's answers."""

from __future__ import annotations

import io
import itertools
import shlex
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import click

from lrconvert.cli import flags
from lrconvert.cli.printing import say
from lrconvert.core.devices import one_thread
from lrconvert.core.errors import printable
from lrconvert.io.durable import atomic_directory, atomic_file, check_output, make_folder

HERE = Path(__file__).resolve().parent.parent / "demo"
FOLDER = Path("lrconvert-demo")
REFINED, LOG = "refined.lrc", "refine.jsonl"
STEPS = 100
_COLUMNS = 100
_TEXTS = ("train.jsonl", "heldout.jsonl")


@dataclass(frozen=True)
class Step:
    """A command: its words, where names of the folder's files are paths, and what is shown of its output: so many of
    the first lines, the facts that begin with one of `facts`, and the last one if it `ends` with it."""

    words: tuple[str | Path, ...]
    first: int
    ends: bool = False
    facts: tuple[str, ...] = ()


@flags.command(
    "demo",
    flags.output(f"The folder for all files.  [default: ./{FOLDER}]", required=False, is_local=True),
    click.Option(["--full"], is_flag=True, help="Refine here, half a minute more; else a refined file is bundled."),
    flags.OVERWRITE,
)
@click.pass_context
def demo(context: click.Context, output: Path | None, full: bool, overwrite: bool) -> None:
    """Run the main commands on a bundled model and LoRA, print what it did to the answers, and keep all files."""
    run(context.find_root().command, output or FOLDER, full=full, overwrite=overwrite, echo=say)


def run(cli: click.Command, folder: Path, *, full: bool, overwrite: bool, echo: Callable[[str], None]) -> None:
    """Run the commands of the group `cli` in `folder`, printing each as a user would type it there, and what it
    answers."""
    check_output(folder, overwrite, directory=True)
    make_folder(folder)
    _unpack(folder, full, overwrite)
    bundled = "" if full else f" {REFINED} is bundled: small.lrc after {STEPS} steps of `refine`."
    echo(f"A tiny LLaMA, and a LoRA that sorts support tickets. All is in {printable(str(folder))}/")
    echo(f"Long outputs are shortened.{bundled}")
    with one_thread():
        for step in _steps(folder, full):
            writes = "-o" in step.words or "--html" in step.words
            words = [*step.words, *(["--overwrite"] if overwrite and writes else [])]
            typed = [str(w.relative_to(folder)) if isinstance(w, Path) else w for w in words]
            goes_on = step.words[0] in ("verify", "unmerge")
            echo(_command(typed) if goes_on else f"\n{_command(typed)}")
            answer = io.StringIO()
            with redirect_stdout(answer):
                cli.main(args=[str(w) for w in words], standalone_mode=False, obj=typed)
            echo(_cut(answer.getvalue().replace(f"{folder}/", ""), step))
        from lrconvert.cli.demo_answers import answers

        files = {name: folder / name for name in ("small.lrc", REFINED)}
        echo(f"\n{answers(folder / 'base', folder / 'adapter', files, folder / 'heldout.jsonl')}")
    echo(_next(folder))


def _steps(folder: Path, full: bool) -> Iterator[Step]:
    base, adapter, small, refined = (folder / name for name in ("base", "adapter", "small.lrc", REFINED))
    merged, restored, held_out = (folder / name for name in ("merged", "restored", "heldout.jsonl"))
    yield Step(("inspect", adapter), 2)
    yield Step(("compress", adapter, "-o", small), 8, ends=True, facts=("note      written at",))
    if full:
        words = "refine", small, "--base", base, "--teacher", adapter, "--data", folder / "train.jsonl", "-o", refined
        yield Step((*words, "--steps", str(STEPS), "--log", folder / LOG), 7)
    measured = "--base", base, "--data", held_out, "--log", folder / LOG, "--html", folder / "report.html"
    yield Step(("compare", adapter, small, refined, *measured), 9)
    yield Step(("merge-into-base", base, refined, "-o", merged), 1)
    yield Step(("verify", merged, "--base", base, "--adapter", refined), 1)
    yield Step(("unmerge", merged, "-o", restored), 0, ends=True)


def _unpack(folder: Path, full: bool, overwrite: bool) -> None:
    """Put the bundled pair, its texts, and the refined file into the folder."""
    for name in ("base", "adapter"):
        with atomic_directory(folder / name, overwrite=overwrite) as stage:
            for file in sorted((HERE / name).iterdir()):
                stage.copy_file(file, file.name)
    for name in _TEXTS if full else (*_TEXTS, REFINED, LOG):
        with atomic_file(folder / name, overwrite=overwrite) as out:
            out.write((HERE / name).read_bytes())


def _cut(text: str, step: Step) -> str:
    """Return what a step shows of an output, wrapped. A fact goes on in lines that begin with spaces."""
    lines = [line for line in text.splitlines() if line.strip()]
    facts: list[list[str]] = []
    for line in lines[step.first :]:
        if line.startswith(" ") and facts:
            facts[-1].append(line)
        else:
            facts.append([line])
    last = len(facts) - 1 if step.ends else None
    shown = [fact for n, fact in enumerate(facts) if n == last or fact[0].startswith(step.facts or ("\0",))]
    kept = itertools.chain(lines[: step.first], *shown)
    return "\n".join(line if len(line) <= _COLUMNS else textwrap.fill(line, _COLUMNS) for line in kept)


def _command(words: Sequence[str]) -> str:
    """A command as one types it, on as many lines as it needs."""
    lines = ["$ lrconvert"]
    for word in map(shlex.quote, words):
        lines = (
            [*lines, f"    {word}"]
            if len(lines[-1]) + len(word) > _COLUMNS - 2
            else [*lines[:-1], f"{lines[-1]} {word}"]
        )
    return " \\\n".join(printable(line, 2000) for line in lines)


def _next(folder: Path) -> str:
    place = printable(str(folder))
    rows = (
        (f"open {place}/report.html", "the comparison as a page, with plots"),
        ("lrconvert compress YOUR-LORA -o small.lrc", "yours; add --base and --data to measure answers"),
        ("lrconvert export small.lrc -o out --to peft-lora", "for programs that do not read .lrc files"),
    )
    width = max(len(command) for command, _ in rows)
    return "\n".join(["\nNext", *(f"  {command.ljust(width)}  {why}" for command, why in rows)])
