"""Options of a merge and of an unmerge."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lrconvert.core.errors import OptionError
from lrconvert.core.options import option
from lrconvert.core.wording import spelled


@dataclass(frozen=True)
class MergeOptions:
    """Options of a merge.

    `in_place` changes the base itself. With `resume` work that is broken off stays, and the same merge goes on from
    there. Without `undo` the record holds digests only. `shard_bytes` bounds the weight files of the output; without it
    they are cut as the base's. `dequantize` takes a quantized base as bf16. `component` is the one model of a diffusers
    pipeline to merge into; without it all that the adapters name are merged. A merge in place that the model's records
    have already is not made a second time, but with `again`.
    """

    in_place: bool = option(False, "Change BASE itself, file by file; a crash is taken back by `recover`.")
    resume: bool = option(False, "Keep what is done if it is broken off, and go on from there.")
    again: bool = option(False, "Merge once more what the model holds already, as its records say.")
    dry_run: bool = option(False, "Print what would be written; write nothing.")
    undo: bool = option(True, "Write no undo record: only the base itself can undo it then.", flag="--no-undo")
    shard_bytes: int | None = option(
        None, "Largest weight file, as 5GB; default: cut as the base is.", kind="size", flag="--out-shard-size"
    )
    allow_no_op: bool = option(False, "Write a copy of the base even if the adapter changes nothing.")
    dequantize: bool = option(False, "Take a quantized base (FP8, MXFP4, NVFP4, NF4, GPTQ, AWQ...) as bf16.")
    component: str = option("", "Model of a diffusers pipeline, as unet; default: those that the adapters name.")
    overwrite: bool = False

    def check(self, out: Path | None) -> None:
        """Raise E-OPTION for options that exclude each other, and for a missing output."""
        if not self.in_place:
            if out is None:
                raise OptionError(
                    "a merge needs an output",
                    fix=f"give {spelled('out', ..., '--output')}, or {spelled('in_place', True)}",
                )
            return
        refuse_with_in_place(
            {spelled("out", ..., "--output"): out, **_set(overwrite=self.overwrite, dequantize=self.dequantize)}
        )
        if self.shard_bytes is not None:
            raise OptionError(
                f"{spelled('in_place', True)} keeps the weight files as they are cut",
                fix=f"leave out {spelled('shard_bytes', None, '--out-shard-size')}",
            )
        if not self.undo:
            raise OptionError(
                f"{spelled('in_place', True)} needs its undo record: a broken off merge is taken back with it"
            )


@dataclass(frozen=True)
class UnmergeOptions:
    """Options of an unmerge. `number` insists on a certain merge, which must be the last. `from_base` takes the bytes
    from the base, where the record is gone or was made without undo."""

    in_place: bool = option(False, "Change MERGED file by file, with one file of extra space.")
    resume: bool = option(False, "Finish an unmerge in place that was broken off.")
    number: int | None = option(None, "Insist on this merge; only the last one can be undone.", flag="--merge")
    from_base: Path | None = option(None, "Take the bytes from this base.", kind="path")
    overwrite: bool = False

    def check(self, out: Path | None) -> None:
        """Raise E-OPTION for options that exclude each other."""
        if self.in_place:
            base = spelled("from_base", ...)
            refuse_with_in_place(
                {spelled("out", ..., "--output"): out, base: self.from_base, **_set(overwrite=self.overwrite)}
            )


def _set(**switches: bool) -> dict[str, object]:
    return {spelled(name, True): value for name, value in switches.items()}


def refuse_with_in_place(options: dict[str, object]) -> None:
    """Raise E-OPTION for the first of these options that is set."""
    for name, value in options.items():
        if value:
            raise OptionError(f"{name} does not go with {spelled('in_place', True)}", fix="leave out one of them")
