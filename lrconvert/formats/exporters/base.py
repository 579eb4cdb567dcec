"""The contract of an exporter, and the registry that finds exporters by scanning this folder.

An exporter is one file here that binds ``EXPORTER``. It is a pure function from a compact adapter to the files of a
folder; writing them is not its business.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lrconvert.core import registry
from lrconvert.core.errors import ExportError, FileKindError, OptionError, OutputPathError
from lrconvert.core.options import option
from lrconvert.core.wording import spelled
from lrconvert.formats import base_class
from lrconvert.formats.exporters.shared.files import json_file
from lrconvert.formats.families.base import DIFFUSERS
from lrconvert.formats.fidelity import Fidelity
from lrconvert.formats.model_card import CARD, Written, model_card, sidecar
from lrconvert.io import hub, mistaken
from lrconvert.io.checkpoint import PIPELINE_NAME
from lrconvert.io.container import read_json
from lrconvert.lora.adapter import Adapter

Files = Mapping[str, Iterable[bytes]]


@dataclass(frozen=True)
class ExportOptions:
    """Settings of an export; `command` is what they ran, for the model card. `base_config` is the
    base's config.json (`base_config`), for layouts whose names or orders depend on it."""

    keep_ranks: bool = option(False, "Write rank_pattern and alpha_pattern instead of one padded rank.")
    pad_rank: int | None = option(
        None,
        "Pad with zeros to this rank; without it to the largest. vLLM's --max-lora-rank has few values.",
        least=1,
    )
    dtype: str | None = option(
        None, "Of the factors; without it F32, and of a LoRA its own.", choices=("F32", "F16", "BF16")
    )
    keep_names: bool = option(
        False, "Keep the source's names, for a model loaded in another class (AutoModel) than the base's."
    )
    base_model_id: str | None = option(None, "How the output names the base: org/name, or org/name@revision.")
    push_to_hub: str | None = option(None, "Upload the folder to this repository (org/name) of the Hugging Face Hub.")
    private: bool = option(False, "With --push-to-hub: a repository that is made for it is private.")
    command: str = ""
    base_config: Mapping[str, Any] | None = None

    def rank(self, top: int) -> int:
        """Return the one rank of an adapter whose largest is `top`. Raises E-OPTION for a `pad_rank` below it."""
        if self.pad_rank is None:
            return top
        if self.keep_ranks:
            raise OptionError("one rank for all and their own ranks exclude each other", fix="leave one out")
        if self.pad_rank < top:
            fix = "give that or more, or convert it with fewer ranks"
            raise OptionError(f"{spelled('pad_rank')} is {self.pad_rank}, and the adapter has a rank of {top}", fix=fix)
        return self.pad_rank


def base_config(root: Path) -> Mapping[str, Any]:
    """Return the config.json of a model folder, of a diffusers pipeline that of its UNet or transformer. Raises
    E-IO-KIND and what reading raises."""
    mistaken.check_base(root)
    path = root / "config.json"
    if not path.exists() and (root / PIPELINE_NAME).is_file():
        parts = [root / name / "config.json" for name in ("unet", "transformer")]
        present = [part for part in parts if part.is_file()]
        if not present:
            raise FileKindError("the pipeline holds neither a UNet nor a transformer", path=root)
        path = present[0]
    return read_json(path)


_SIDECAR = "lrconvert.json"
_WRITTEN = re.compile(r"README\.md|[a-z_]+\.json|[a-z_]+\.(?:safetensors|gguf)")  # names that exports give


def check_replaceable(out: Path) -> None:
    """Raise E-OUT-PATH unless `out` is a folder as an export writes it, empty, or not there: nothing else is replaced,
    and no file of anybody else deleted."""
    entries = sorted(out.iterdir()) if out.is_dir() else []
    others = [e for e in entries if e.is_symlink() or not e.is_file() or not _WRITTEN.fullmatch(e.name)]
    if others or (entries and not (out / _SIDECAR).is_file()):
        what = f"holds {others[0].name!r}" if others else f"has no {_SIDECAR}"
        raise OutputPathError(
            f"{what}: no export wrote it, so it is not replaced", fix="choose another output", path=out
        )


@dataclass(frozen=True)
class Folder:
    """Files, notes for the user, a line each, and the `consumers` that load them where these are not all of the
    layout's."""

    files: Files
    notes: tuple[str, ...] = ()
    consumers: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Exporter:
    """One output layout.

    `title` says what it is in the help of `--to`. `files(adapter, options)` maps file names to their bytes in pieces,
    with notes or without, and raises E-EXPORT for what the layout cannot express. `kind` and `library` are what the
    model card calls the adapter, and the library that loads it; `usage` is the code that does, with {adapter}, {base}
    and {auto_class} in it. `consumers` are the ids of the programs that load it, which `check` asks about what was
    written: the folder, or the file `weights` in it. `own_names`: modules are called as the layout has them, not as
    the base's class. `scheme` is what modules of diffusion transformers are called (`formats.families`), "" for that
    of the source, `is_flat` that the dots of names are written as underscores.
    """

    id: str
    title: str
    files: Callable[[Adapter, ExportOptions], Files | Folder]
    kind: str
    library: str = ""
    usage: str = ""
    consumers: tuple[str, ...] = ()
    weights: str = ""
    own_names: bool = False
    scheme: str = DIFFUSERS
    is_flat: bool = False

    def folder(self, adapter: Adapter, options: ExportOptions, fidelity: Fidelity | None) -> Folder:
        """Return the files with a model card, and with ``lrconvert.json`` unless the layout has one of its own."""
        keep = self.own_names or options.keep_names
        named, notes = (adapter, ()) if keep else base_class.renamed(adapter, options.base_config)
        made = self.files(named, options)
        made = made if isinstance(made, Folder) else Folder(made)
        about = Written(self.kind, self.library, self.usage, options.push_to_hub or "", options.command, made.notes)
        card = model_card(adapter, about, fidelity)
        every = {CARD: [card], _SIDECAR: json_file(sidecar(adapter)), **made.files}
        return Folder(every, (*notes, *made.notes), self.consumers if made.consumers is None else made.consumers)


def ids() -> list[str]:
    """Return the names for `--to`, from the file names of this folder."""
    return [name.replace("_", "-") for name in registry.names("lrconvert.formats.exporters")]


def get(exporter_id: str) -> Exporter:
    """Return the exporter of that id. Raises E-EXPORT for an unknown one."""
    if exporter_id not in ids():
        raise ExportError(f"there is no export to {exporter_id!r}", fix=f"known: {', '.join(ids())}")
    exporter: Exporter = registry.load("lrconvert.formats.exporters", exporter_id.replace("-", "_"), "EXPORTER")
    return exporter


@dataclass(frozen=True)
class Exported:
    """The names of the files that were written, notes for the user, a line each, and where they were uploaded to."""

    files: tuple[str, ...]
    notes: tuple[str, ...] = ()
    url: str = ""

    def __repr__(self) -> str:
        shown = ", ".join(self.files[:3]) + (f" and {len(self.files) - 3} more" if len(self.files) > 3 else "")
        return f"<Exported: {shown:.120}>"


def public(adapter: Adapter, base_model_id: str | None) -> tuple[Adapter, tuple[str, ...]]:
    """Return `adapter` as it may be given to others, and notes: the base named by `base_model_id` (``org/name``,
    ``org/name@revision``) if there is one, else without the folders of a path. Raises E-OPTION for what is no name."""
    provenance = adapter.provenance
    if base_model_id is not None:
        name, _, revision = base_model_id.partition("@")
        if not name or not base_model_id.isprintable():
            raise OptionError(f"{base_model_id!r:.80} does not name a base model", fix="write org/name")
        notes = (f"the base is named by a private path, {name!r:.80}",) if hub.is_private(name) else ()
        return replace(adapter, provenance=replace(provenance, base_model=name, revision=revision)), notes
    if not hub.is_private(provenance.base_model):
        return adapter, ()
    short = hub.last_part(provenance.base_model)
    names_it = f"{spelled('base_model_id', ...)} names it"
    note = f"the base was named by a private path, of which {short!r:.80} is kept; {names_it}"
    return replace(adapter, provenance=replace(provenance, base_model=short)), (note,)
