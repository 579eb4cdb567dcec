"""Verbs about adapters and files as they are: read, write, upgrade, inspect, validate, check."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrconvert.api.shared import (
    AnyAdapter,
    AnyCompact,
    AnyPath,
    adapter_at,
    adapter_of,
    compact_of,
    is_remote,
    located,
    lora_of,
    output_of,
    path_of,
    published,
    refuse_rest,
    take_reading,
)
from lrconvert.core.errors import ArgumentError
from lrconvert.core.options import described
from lrconvert.formats import inspection, loading
from lrconvert.formats.fleet import places as fleet_places
from lrconvert.formats.lrc import file, validation
from lrconvert.formats.lrc.validation import Validation
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.io import hub_transfer, remote
from lrconvert.io.durable import check_output
from lrconvert.lora import statistics_file
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter

if TYPE_CHECKING:
    from lrconvert.formats.compat.base import Finding


def load_lora(path: AnyAdapter, *, base: AnyPath | None = None, **reading: Any) -> LoraAdapter:
    """Load the LoRA at `path`: a folder or file in any layout that a reader knows. The options are those of `load`.

    A compact adapter is expanded, with a warning: what is fitted to it is a second generation. Raises E-LAYOUT if no
    reader knows the layout, and the reader's refusals (an `LrcError` with a stable code each).

    >>> from lrconvert import demo
    >>> lora = load_lora(demo.ADAPTER)
    >>> len(lora.targets), lora.targets[0].A.shape  # (r, in)
    (42, (16, 320))

    >>> lora = load_lora("my-adapter")
    >>> len(lora.targets), lora.half_bytes
    (14, 34304)
    """
    return lora_of(path, _reading("load_lora", base, reading), "path")


def load(path: AnyAdapter, *, base: AnyPath | None = None, **reading: Any) -> LoraAdapter | CompactAdapter:
    """Load a LoRA in any known layout, or the compact adapter of an lrconvert file or of a compact layout (PEFT
    VB-LoRA, PEFT MiSS).

    `base` (a model folder or diffusers pipeline) resolves the names of layouts that spell them in their own way, and is
    needed where a file does not say how wide layers are; headers are read, or its config.json alone. `reading`:
    `allow_pickle` loads ``.bin`` and ``.pt`` files too, with torch's loader that builds tensors only; `layout` names
    the reader (``"kohya"``; see `lrconvert.formats.readers`) instead of the content; `alpha` is for layouts that do not
    state one. Raises E-OPTION for an unknown layout, and for an alpha that the layout states itself.

    `layout` and `alpha` mean this wherever a verb takes adapters by their path, and hold for all of these that are not
    lrconvert files; E-OPTION if there is none. An adapter in memory, and that of a result, is returned as it is.
    Wherever an adapter or a base is asked for, `path` may be a hub id (``org/name``, ``org/name@revision``) that is in
    the local Hugging Face cache; see `lrconvert.io.hub`.
    """
    return adapter_of(path, _reading("load", base, reading), "path")


def load_all(
    paths: Sequence[AnyPath], *, base: AnyPath | None = None, **reading: Any
) -> list[LoraAdapter | CompactAdapter]:
    """Load several adapters, as for a merge. The options are those of `load`."""
    listed = [paths] if isinstance(paths, (str, PathLike)) else paths
    if not isinstance(listed, Iterable):
        raise ArgumentError(f"paths is {described(paths)}; a list of paths was expected")
    checked = [path_of(path, "paths", "a path or a hub id") for path in listed]
    return loading.load_all(checked, _reading("load_all", base, reading))


def _reading(verb: str, base: AnyPath | None, keywords: dict[str, Any]) -> ReadOptions:
    options = take_reading(keywords, base)
    refuse_rest(keywords, verb, ReadOptions)
    return options


def read(path: AnyPath) -> CompactAdapter:
    """Read the compact adapter of an lrconvert file, every rule checked. Raises the first finding of `validate`."""
    with adapter_at(path, "path") as where:
        return file.read(where)


def write(compact: AnyCompact, path: AnyPath, *, overwrite: bool = False) -> file.Sizes:
    """Write an lrconvert file, atomically: of a compact adapter, or of the result of a verb. The same content gives the
    same bytes everywhere. Returns its sizes.

    >>> from lrconvert import convert
    >>> write(convert("my-adapter", "lowrank", target_size="6KB"), "small.lrc").adapter <= 6000
    True
    >>> read("small.lrc").method, validate("small.lrc").ok
    ('lowrank', True)
    """
    made = compact_of(compact, "compact")
    if is_remote(path):
        with published(path, overwrite=overwrite) as local:
            return file.write(made, local, overwrite=False)
    return file.write(made, output_of(path, "path"), overwrite=overwrite)


def upgrade(path: AnyPath, out: AnyPath, *, overwrite: bool = False) -> file.Sizes:
    """Write the file at `path`, of whatever container version, as one of the newest; every factor stays as it is.
    A file of the newest version gives the same bytes again."""
    if is_remote(out):
        with published(out, overwrite=overwrite) as local:
            return upgrade(path, local)
    with adapter_at(path, "path") as source:
        target = output_of(out)
        check_output(target, overwrite, inputs=[source])
        return file.write(file.read(source), target, overwrite=overwrite)


def inspect(path: AnyAdapter, *, base: AnyPath | None = None, **reading: Any) -> dict[str, Any]:
    """Return what an adapter is, as JSON values: ``targets`` (shapes, ranks, spectra), bytes, extras, base hint,
    warnings; of a file of input statistics what inputs it has, of how many tokens. The options are those of `load`."""
    options = _reading("inspect", base, reading)
    if isinstance(path, (str, PathLike)):
        with adapter_at(path, "path") as where:
            if where.is_file() and statistics_file.is_statistics(where):
                loading.refuse_options(options, where)
                return inspection.inspect_statistics(statistics_file.read(where), where.stat().st_size)
    adapter = adapter_of(path, options, "path")
    return inspection.inspect_lora(adapter) if isinstance(adapter, LoraAdapter) else inspection.inspect_compact(adapter)


def download(name: str, *, part: hub_transfer.Part = "adapter", allow_pickle: bool = False) -> Path:
    """Download what lrconvert reads of the hub id `name` (``org/name``, ``org/name@revision``) into the local Hugging
    Face cache, and return its folder there; every verb takes the id from then on. Nothing else downloads anything.

    `part`: an "adapter", a "base" with its weights, or its "config" alone. Raises E-HUB, also if HF_HUB_OFFLINE is set,
    E-OPTION for what is no hub id, and what reading the cache raises.
    """
    if not isinstance(name, str):
        raise ArgumentError(f"name is {described(name)}; a hub id was expected")
    return hub_transfer.download(name, part, pickles=allow_pickle)


def validate(path: AnyPath, *, base: AnyPath | None = None) -> Validation:
    """Check an lrconvert file or input statistics, against the base if one is given; every finding is in the result. A
    whole fleet is checked by `Fleet.validate`."""
    folder = None if base is None else located(base, "base")
    with adapter_at(path, "path") as where:
        done = validation.validate(where, folder)
    if not is_remote(path) and not fleet_places.is_member(path):
        return done
    shown = str(remote.Url(fspath(path))) if is_remote(path) else fspath(path)
    named = [replace(one, message=one.message.replace(str(where), shown)) for one in done.findings]
    return replace(done, path=shown, findings=tuple(named))


def check(
    path: AnyPath, consumers: str | Sequence[str] = ("all",), *, base: AnyPath | None = None, **more: Any
) -> tuple[Finding, ...]:
    """Say what `consumers` ("vllm", "sglang", "llamacpp", "mlx", "peft", or "all") would refuse, get wrong or warn of,
    given the adapter at `path`: a folder or file of any kind. Nothing is run and no weight is read.

    `base` (a model folder; its config.json is enough) decides what depends on the base. `more` are fields of the
    consumers' ``Options``, such as `max_lora_rank`, and `layout` and `alpha` as in `load`: what a program makes of the
    adapter does not depend on them, what is said of it may. Raises E-OPTION, E-LAYOUT, E-PATTERN and errors of broken
    files.

    >>> check("my-adapter", ["vllm", "peft"])
    ()
    """
    reading = take_reading(more, base)
    from lrconvert.formats.compat import base as consumer_base

    names = (consumers,) if isinstance(consumers, str) else consumers
    if not isinstance(names, Iterable):
        raise ArgumentError(
            f"consumers is {described(consumers)}; names of programs were expected", fix="such as 'vllm'"
        )
    with adapter_at(path, "path") as where:
        return consumer_base.check(where, tuple(names), reading, more)
