"""Verbs about adapters and files as they are: read, write, upgrade, inspect, validate, check."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lrconvert.api.shared import AnyPath
from lrconvert.formats import fidelity, loading
from lrconvert.formats.compat import base as consumer_base
from lrconvert.formats.compat.base import Finding
from lrconvert.formats.lrc import file, validation
from lrconvert.formats.lrc.validation import Validation
from lrconvert.io import hub
from lrconvert.io.durable import check_output
from lrconvert.lora import statistics_file
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter


def load_lora(
    path: AnyPath,
    *,
    allow_pickle: bool = False,
    base: AnyPath | None = None,
    layout: str | None = None,
    alpha: float | None = None,
) -> LoraAdapter:
    """The LoRA at `path`: a folder or file in any layout that a reader knows. The options are those of `load`.

    `allow_pickle`, here and below: load ``.bin`` and ``.pt`` files too, with torch's loader that builds tensors only.
    A compact adapter is expanded, with a warning: what is fitted to it is a second generation. Raises E-LAYOUT if no
    reader knows the layout, and the reader's refusals (an `LrcError` with a stable code each).
    """
    return loading.lora(path, loading.options(allow_pickle, base, layout, alpha))


def load(
    path: AnyPath,
    *,
    allow_pickle: bool = False,
    base: AnyPath | None = None,
    layout: str | None = None,
    alpha: float | None = None,
) -> LoraAdapter | CompactAdapter:
    """A LoRA in any known layout, or the compact adapter of an lrconvert file or of a compact layout (PEFT VB-LoRA,
    PEFT MiSS).

    `base` (a model folder or diffusers pipeline) resolves the names of layouts that spell them in their own way, and is
    needed where a file does not say how wide layers are; headers are read, or its config.json alone. `layout` names the
    reader (``"kohya"``; see `lrconvert.formats.readers`) instead of the content. `alpha` is for layouts that do not
    state one. Raises E-OPTION for an unknown layout, and for an alpha that the layout states itself.

    `layout` and `alpha` mean this wherever a verb takes adapters by their path, and hold for all of these that are not
    lrconvert files; E-OPTION if there is none. Wherever an adapter or a base is asked for, `path` may be a hub id
    (``org/name``, ``org/name@revision``) that is in the local Hugging Face cache; see `lrconvert.io.hub`.
    """
    return loading.load(path, loading.options(allow_pickle, base, layout, alpha))


def load_all(
    paths: Sequence[AnyPath],
    *,
    allow_pickle: bool = False,
    base: AnyPath | None = None,
    layout: str | None = None,
    alpha: float | None = None,
) -> list[LoraAdapter | CompactAdapter]:
    """Several adapters, as for a merge. The options are those of `load`."""
    return loading.load_all(paths, loading.options(allow_pickle, base, layout, alpha))


def read(path: AnyPath) -> CompactAdapter:
    """The compact adapter of an lrconvert file, every rule checked. Raises the first finding of `validate`."""
    return file.read(Path(path))


def write(compact: CompactAdapter, path: AnyPath, *, overwrite: bool = False) -> file.Sizes:
    """Write an lrconvert file, atomically. The same content gives the same bytes everywhere. Returns its sizes."""
    return file.write(compact, hub.output(path), overwrite=overwrite)


def upgrade(path: AnyPath, out: AnyPath, *, overwrite: bool = False) -> file.Sizes:
    """Write the file at `path`, of whatever container version, as one of the newest; every factor stays as it is.
    A file of the newest version gives the same bytes again."""
    check_output(hub.output(out), overwrite, inputs=[Path(path)])
    return file.write(file.read(Path(path)), Path(out), overwrite=overwrite)


def inspect(
    path: AnyPath,
    *,
    allow_pickle: bool = False,
    base: AnyPath | None = None,
    layout: str | None = None,
    alpha: float | None = None,
) -> dict[str, Any]:
    """What an adapter is, as JSON values: ``targets`` (shapes, ranks, spectra), bytes, extras, base hint, warnings. The
    options are those of `load`. Of a file of input statistics: what inputs it has, of how many tokens."""
    where = hub.locate(path)
    if where.is_file() and statistics_file.is_statistics(where):
        loading.refuse_said(loading.options(layout=layout, alpha=alpha), where)
        return fidelity.inspect_statistics(statistics_file.read(where), where.stat().st_size)
    adapter = load(path, allow_pickle=allow_pickle, base=base, layout=layout, alpha=alpha)
    return fidelity.inspect_lora(adapter) if isinstance(adapter, LoraAdapter) else fidelity.inspect_compact(adapter)


def validate(path: AnyPath, *, base: AnyPath | None = None) -> Validation:
    """Check an lrconvert file or input statistics, against the base if one is given; every finding is in the result."""
    return validation.validate(Path(path), None if base is None else hub.locate(base))


def check(
    path: AnyPath,
    consumers: Sequence[str] = ("all",),
    *,
    base: AnyPath | None = None,
    layout: str | None = None,
    alpha: float | None = None,
    **options: Any,
) -> tuple[Finding, ...]:
    """What `consumers` ("vllm", "sglang", "llamacpp", "mlx", "peft", or "all") would refuse, get wrong or warn of,
    given the adapter at `path`: a folder or file of any kind. Nothing is run and no weight is read.

    `base` (a model folder; its config.json is enough) decides what depends on the base. `layout` and `alpha` are those
    of `load`: what a program makes of the adapter does not depend on them, what is said of it may. `options` are fields
    of the consumers' ``Options``, such as `max_lora_rank`. Raises E-OPTION, E-LAYOUT, E-PATTERN and errors of broken
    files.
    """
    reading = loading.options(base=base, layout=layout, alpha=alpha)
    return consumer_base.check(hub.locate(path), consumers, reading, options)
