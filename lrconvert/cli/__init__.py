"""The command line: each command parses, calls the API, and renders text or JSON. A command is loaded when it is used.

Exit 0 done, 1 refused or failed (one line: code, file, what, what to do), 2 usage.
"""

from __future__ import annotations

import difflib
import importlib
import io
import sys
from typing import Any

import click
from click.shell_completion import CompletionItem

from lrconvert.cli.printing import say
from lrconvert.core import registry
from lrconvert.core.errors import EXIT_REFUSED, LrcError
from lrconvert.core.redaction import redacted
from lrconvert.core.version import __version__
from lrconvert.core.wording import on_command_line

__all__ = ["cli", "main"]

# Name, where the command is bound, and its line in the help: before the converters, and after them.
_FIRST = {
    "inspect": ("inspecting:inspect", "Show what adapters are: targets, ranks, spectrum, bytes."),
    "validate": ("validating:validate", "Check lrconvert files and input statistics."),
    "upgrade": ("validating:upgrade", "Write an lrconvert FILE in the newest version of the format."),
    "compare": ("measuring:compare", "Measure lrconvert FILES against the LoRA they came from."),
    "statistics": ("measuring:statistics", "Measure what flows into the layers of BASE on texts."),
    "compress": ("converting:compress", "Try every form under a size or a share to keep, write the best."),
}
_LAST = {
    "lora-to-alora": ("converting:allocate", "Give every module the rank it deserves under one budget."),
    "fleet": ("fleets:fleet", "Say what became of many adapters, from the manifest of their batch."),
    "extract": ("extracting:extract", "Write what a fine-tuned model has more than its base, as an adapter."),
    "combine": ("combining:combine", "Make one adapter of several ADAPTERs, each with a weight."),
    "refine": ("refining:refine", "Train FILE for a short while to answer as its LoRA does."),
    "export": ("adapters:export", "Write any adapter as a folder that other tools load."),
    "expand": ("expanding:expand", "Print the folder in which a server finds FILE, expanded once."),
    "pack": ("packing:pack", "Keep many compact adapters in one folder, with what they share stored once."),
    "check": ("adapters:check", "Say what a server would refuse or get wrong in an adapter."),
    "merge-into-base": ("merging:merge_into_base", "Bake ADAPTERs into a copy of the model folder BASE."),
    "unmerge": ("merging:unmerge", "Undo the last merge of the model folder MERGED."),
    "verify": ("merging:verify", "Confirm that MERGED is BASE with the ADAPTERs merged in."),
    "recover": ("merging:recover", "Bring PATH, in which a merge was broken off, to its old state or the new one."),
    "completion": ("completion:completion", "Print the script with which a shell completes commands."),
    "demo": ("demo:demo", "Run the whole pipeline on the bundled model and LoRA."),
}
_ALIASES = {"merge": "merge-into-base"}


class _Commands(click.Group):
    """Commands in the order of a user's work; those of the methods are found by scanning them."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; its messages speak of flags."""
        with on_command_line():
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*_FIRST, *_of_methods(), *_LAST]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        name = _ALIASES.get(cmd_name, cmd_name)
        if name in _FIRST | _LAST:
            module, attribute = (_FIRST | _LAST)[name][0].split(":")
            command: click.Command = getattr(importlib.import_module(f"lrconvert.cli.{module}"), attribute)
            return command
        if name not in _of_methods():  # reading the methods takes longer than all else
            return None
        from lrconvert.cli.converting import method_command

        return method_command(name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that is called; for a name that is none, say which is meant."""
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            raise click.UsageError(_no_command(args[0], self.list_commands(ctx)), ctx)
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Return the commands that begin so, without loading them, and the options."""
        about = {name: text for name, (_, text) in (_FIRST | _LAST).items()} | _of_methods()
        named = [CompletionItem(name, help=text) for name, text in about.items() if name.startswith(incomplete)]
        return [*named, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without loading them."""
        about = {name: text for name, (_, text) in (_FIRST | _LAST).items()} | _of_methods()
        with formatter.section("Commands"):
            formatter.write_dl([(name, about[name]) for name in self.list_commands(ctx)])


_MEANT = {  # words of other tools, and the command that does it here
    **dict.fromkeys(("convert", "shrink", "quantize", "resize", "lora-to"), "compress"),
    **dict.fromkeys(("info", "show", "ls"), "inspect"),
    **dict.fromkeys(("push", "upload"), "export"),
    **dict.fromkeys(("expanded", "serve", "decompress"), "expand"),
    **dict.fromkeys(("eval", "evaluate", "diff"), "compare"),
}


def _no_command(name: str, names: list[str]) -> str:
    """Return the words about a command that does not exist."""
    if name in _MEANT:
        advice = f"`lrconvert {_MEANT[name]}` is meant"
        if _MEANT[name] == "compress":
            forms = ", ".join(_of_methods())
            advice = f"`lrconvert compress` takes the best form, and one form each: {forms}"
        return f"there is no command {name!r}: {advice}"
    known = [*names, *_ALIASES]
    near = [one for one in known if one.startswith(name)] or difflib.get_close_matches(name, [*known, *_MEANT], 2)
    meant = dict.fromkeys(_MEANT.get(one, one) for one in near)
    return f"there is no command {name!r}" + (f": {' or '.join(meant)}?" if meant else "; `lrconvert -h` lists all")


def _of_methods() -> dict[str, str]:
    """Return the names and help lines of the converters, as the methods declare them in `Command`."""
    folder = "lrconvert.methods"
    declared = (registry.calls(folder, method, "Command") for method in registry.names(folder))
    return {name: text for commands in declared for name, text, *_ in commands}


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="lrconvert")
def cli() -> None:
    """Make LoRA adapters 10 to 200 times smaller, with the loss measured.

    Every command takes -h. Sizes: 1 KB = 1000 bytes. Exit status: 0 done, 1 refused or failed, 2 usage.
    """


def main() -> None:
    """Run the CLI; our errors become one line on stderr and exit status 1."""
    try:
        code = cli(standalone_mode=False)  # what a command raised as Exit comes back as its code
        sys.exit(code if isinstance(code, int) else 0)
    except LrcError as error:
        say(str(error), err=True)
        sys.exit(EXIT_REFUSED)
    except click.exceptions.Abort:
        say("aborted", err=True)
        sys.exit(130)
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(shown)
        say(redacted(shown.getvalue()), err=True, nl=False)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(EXIT_REFUSED)
