"""`lrconvert demo`: the commands of the main job on the bundled pair, and what they did to the model's answers."""

from __future__ import annotations

import io
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
    """A command: its words, where names of the folder's files are paths, and how many lines of its output are shown,
    from the first on; and whether the last one is."""

    words: tuple[str | Path, ...]
    first: int
    ends: bool = False


@flags.command(
    "demo",
    flags.output(f"The folder for all files.  [default: ./{FOLDER}]", required=False),
    click.Option(["--full"], is_flag=True, help="Refine here, which takes minutes; else a refined file is bundled."),
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
    made = "is made here" if full else f"is bundled: small.lrc after {STEPS} steps of `refine`"
    echo(f"A tiny LLaMA, and a LoRA that sorts support tickets. All is in {printable(str(folder))}/")
    echo(f"{REFINED} {made}. Dots mark outputs that are cut.")
    with one_thread():
        for step in _steps(folder, full):
            writes = "-o" in step.words or "--html" in step.words
            words = [*step.words, *(["--overwrite"] if overwrite and writes else [])]
            typed = [str(w.relative_to(folder)) if isinstance(w, Path) else w for w in words]
            echo(f"\n{_command(typed)}")
            answer = io.StringIO()
            with redirect_stdout(answer):
                cli.main(args=[str(w) for w in words], standalone_mode=False, obj=typed)
            echo(_cut(answer.getvalue().replace(f"{folder}/", ""), step.first, step.ends))
        from lrconvert.cli.demo_answers import answers

        files = {name: folder / name for name in ("small.lrc", REFINED)}
        echo(f"\n{answers(folder / 'base', folder / 'adapter', files, folder / 'heldout.jsonl')}")
    echo(_next(folder))


def _steps(folder: Path, full: bool) -> Iterator[Step]:
    base, adapter, small, refined = (folder / name for name in ("base", "adapter", "small.lrc", REFINED))
    merged, restored, held_out = (folder / name for name in ("merged", "restored", "heldout.jsonl"))
    yield Step(("inspect", adapter), 2)
    yield Step(("compress", adapter, "-o", small), 8, ends=True)
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


def _cut(text: str, first: int, ends: bool) -> str:
    """The first lines of a text, and the last one if asked for with those that it goes on in, wrapped; three dots stand
    where some are left out."""
    lines = [line for line in text.splitlines() if line.strip()]
    at = len(lines)
    while ends and at > first and (at == len(lines) or lines[at].startswith(" ")):
        at -= 1
    start, end = lines[:first], lines[at:]
    if len(start) + len(end) < len(lines) and start:
        start[-1] += " ..."
    wrapped = (textwrap.wrap(line, _COLUMNS) if len(line) > _COLUMNS else [line] for line in [*start, *end])
    return "\n".join(piece for pieces in wrapped for piece in pieces)


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
        ("lrconvert compress YOUR-LORA -o small.lrc", "yours; with --base and --data by answers"),
        ("lrconvert export small.lrc -o out --to peft-lora", "for programs that know no lrconvert file"),
    )
    width = max(len(command) for command, _ in rows)
    return "\n".join(["\nNext", *(f"  {command.ljust(width)}  {why}" for command, why in rows)])
