"""Where a LoRA goes that a command made: into a compact file of one form, or into a folder of one layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from lrconvert.lora.adapter import CompactAdapter, LoraAdapter

FORM = "lowrank"  # of a file, where no form and no layout is named


def options() -> list[click.Option]:
    """Return the options that say what is written."""
    from lrconvert.formats.exporters.base import ids
    from lrconvert.methods import base as methods

    # PEFT's compact forms are made of their own methods alone.
    layouts = [name for name in ids() if name == "peft-lora" or not name.startswith("peft-")]
    forms = methods.module_names()
    return [
        click.Option(
            ["--method"],
            type=click.Choice(forms),
            help=f"Form of the compact file that is written.  [default: {FORM}, without --to]",
        ),
        click.Option(
            ["--to"],
            type=click.Choice(layouts),
            help="Write the LoRA instead, as a folder of this layout.",
        ),
    ]


@dataclass(frozen=True)
class Output:
    """The output and its place; `path` is None for a dry run."""

    path: Path | None
    method: str | None
    layout: str | None
    overwrite: bool

    @classmethod
    def of(cls, given: dict[str, Any], inputs: Sequence[Path], dry_run: bool = False) -> Output:
        """Take the output out of what a command was `given`. Raises a usage error, and E-OUT-* before the work."""
        from lrconvert.formats.exporters.base import check_replaceable
        from lrconvert.io import hub
        from lrconvert.io.durable import check_output

        path, method, layout = given.pop("output"), given.pop("method"), given.pop("to")
        overwrite = given.pop("overwrite")
        if method is not None and layout is not None:
            raise click.UsageError("--to writes the LoRA, --method a compact file: give one of them")
        if path is None and not dry_run:
            raise click.UsageError("Missing option '-o' / '--output'.")
        if path is not None:
            check_output(hub.output(path), overwrite, inputs=list(inputs), directory=layout is not None)
            if layout is not None:
                check_replaceable(path)
        return cls(None if dry_run else path, None if layout is not None else method or FORM, layout, overwrite)

    def write(self, lora: LoraAdapter, compact: CompactAdapter | None, base: Path | None) -> tuple[str, ...]:
        """Write what was made, and return notes for the user."""
        from lrconvert import api

        if self.path is None:
            return ()
        if self.layout is None:
            assert compact is not None
            api.write(compact, self.path, overwrite=self.overwrite)
            return ()
        # A rank that is padded to the largest would undo what a bound over all modules saves.
        is_uneven = len({pair.rank for pair in lora.targets}) > 1
        done = api.export(lora, self.path, self.layout, base=base, overwrite=self.overwrite, keep_ranks=is_uneven)
        return tuple(note for note in done.notes if note not in lora.warnings)
