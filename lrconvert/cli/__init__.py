"""The command line: each command parses, calls the API, and renders text or JSON.

Exit 0 done, 1 refused or failed (one line: code, file, what, what to do), 2 usage.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from lrconvert.cli import adapters, allocating, converting, measuring, merging, refining
from lrconvert.cli.shared import ByteSize
from lrconvert.core.errors import EXIT_REFUSED, LrcError
from lrconvert.core.version import __version__

__all__ = ["ByteSize", "cli", "main"]


class Group(click.Group):
    """Commands in the order of a user's work; converter commands are found by scanning the methods."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in self.commands if name != "merge"]


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="lrconvert")
def cli() -> None:
    """Make LoRA adapters 10 to 100 times smaller, with the loss measured.

    Every command takes -h. Sizes: 1 KB = 1000 bytes. Exit status: 0 done, 1 refused or failed, 2 usage.
    """


def main() -> None:
    """Run the CLI; our errors become one line on stderr and exit status 1."""
    try:
        code = cli(standalone_mode=False)  # what a command raised as Exit comes back as its code
        sys.exit(code if isinstance(code, int) else 0)
    except LrcError as error:
        click.echo(str(error), err=True)
        sys.exit(EXIT_REFUSED)
    except click.exceptions.Abort:
        click.echo("aborted", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(EXIT_REFUSED)


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Keep the files in this new folder.")
@click.pass_context
def demo(context: click.Context, output: Path | None) -> None:
    """Run the whole pipeline on the bundled model and LoRA, and print what it measures."""
    from lrconvert.cli.demo import run

    run(context.find_root().command, output, click.echo)


_LOOKING = (adapters.inspect, adapters.validate, adapters.upgrade, measuring.compare, measuring.statistics)
_MERGING = (merging.merge_into_base, merging.unmerge, merging.verify, merging.recover)
_GOING_OUT = (adapters.export, adapters.check_command(), *_MERGING, demo)
for _command in (
    *_LOOKING,
    converting.compress_command(),
    *converting.commands(),
    allocating.command(),
    refining.command(),
    *_GOING_OUT,
):
    cli.add_command(_command)
cli.add_command(merging.merge_into_base, "merge")
