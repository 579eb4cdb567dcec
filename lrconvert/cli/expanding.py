"""The command `expand`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lrconvert.cli import flags
from lrconvert.cli.printing import emit, say, warn
from lrconvert.core.errors import printable


def _layouts() -> str:
    from lrconvert.formats.exporters import base as exporters

    return ", ".join(exporters.ids())


def _options() -> list[click.Option]:
    from lrconvert.api.expanding import ExpandOptions

    return flags.of(ExpandOptions)


@flags.command(
    "expand",
    click.Argument(["file"], type=flags.PLACE),
    click.Option(
        ["--cache"],
        type=flags.PATH,
        help="The folder of expansions; without it $LRCONVERT_CACHE, or ~/.cache/lrconvert.",
    ),
    click.Option(["--to"], default="peft-lora", show_default=True, metavar="LAYOUT", help=f"{_layouts()}."),
    flags.base("Base model folder or hub id, for names and for gguf; its config.json is enough.", config_only=True),
    *_options(),
    flags.AS_JSON,
)
def expand(file: Path, cache: Path | None, to: str, base: Path | None, as_json: bool, **given: Any) -> None:
    """Print the folder in which a server finds FILE expanded, made if it is not there: however many ask, once.

    The folder is known by FILE's content and by the options, and stays at least ten minutes after it was asked for.
    """
    from lrconvert.api import expanding
    from lrconvert.core.options import make

    options = make(expanding.ExpandOptions, flags.chosen(given, expanding.ExpandOptions), "expand")
    cached = expanding.expand(expanding.source_at(file), cache, options, to=to, base=base)
    warn(expanding.notes_of(cached))
    if not as_json:
        warn(cached.facts["notes"] if not cached.was_there else ())
        say(printable(str(cached.folder), 5000))
        return
    about = {key: cached.facts.get(key) for key in ("base", "reduced", "notes")}
    emit({"folder": str(cached.folder), "was_there": cached.was_there, **about})
