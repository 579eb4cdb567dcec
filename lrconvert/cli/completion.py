"""Completion of commands, options and paths in shells, by click."""

from __future__ import annotations

import click

from lrconvert.cli import flags
from lrconvert.cli.printing import say

_VARIABLE = "_LRCONVERT_COMPLETE"  # what click asks the program by


@flags.command("completion", click.Argument(["shell"], type=click.Choice(["bash", "zsh", "fish"])))
def completion(shell: str) -> None:
    """Print the script with which SHELL completes lrconvert's commands, options and paths.

    \b
    bash   eval "$(lrconvert completion bash)"                        in ~/.bashrc
    zsh    eval "$(lrconvert completion zsh)"                         in ~/.zshrc, after compinit
    fish   lrconvert completion fish > ~/.config/fish/completions/lrconvert.fish
    """
    from click.shell_completion import ShellComplete, get_completion_class

    from lrconvert.cli import cli

    made = get_completion_class(shell)
    assert made is not None
    # Not the class's own `source`, which starts bash to ask its version.
    say(ShellComplete.source(made(cli, {}, "lrconvert", _VARIABLE)))
