"""What makes an output finished: the digest of all that it depends on, kept in its provenance as ``request``.

    sha256 of the canonical JSON of {verb, method, options, loading, source, inputs}, its first 128 bits in hexadecimal

`source` is the digest of the adapter's files, so that a changed configuration counts, and `inputs` are the digests of
the base's contents, the statistics and the data: names of folders do not count, and neither do times. An output that
holds the digest and passes every check is not made again; a crash leaves no file, or one that is finished.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lrconvert.api.batch.sources import is_adapter
from lrconvert.convert.options import AllocateOptions, CompressOptions, ConvertOptions
from lrconvert.core.errors import FileChangedError, FileReadError, LrcError
from lrconvert.core.options import make, names, take
from lrconvert.formats.lrc import file
from lrconvert.formats.model_card import CARD
from lrconvert.io.checkpoint import KnownContent, open_checkpoint
from lrconvert.lora.adapter import CompactAdapter
from lrconvert.methods import base as methods
from lrconvert.refine.settings import Settings

FIELD = "request"
_CONTENTS = ("base", "statistics", "data")  # options that stand for contents: their digests are among the inputs
_PLACES = ("device",)


def settled(verb: str, method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return `options` in their one spelling: defaults filled in, numbers and choices in the type of their field, and
    without those that stand for contents, or say where the work is done. Raises E-OPTION."""
    own: type[Any] = {"compress": CompressOptions, "allocate": AllocateOptions}.get(verb) or methods.get(method).Options
    rest = dict(options)
    chosen = {
        name: value for kind in (ConvertOptions, own) for name, value in vars(take(kind, None, rest, verb)).items()
    }
    plan = chosen["target_size"], chosen["target_ratio"]
    if verb == "convert" and plan == (None, None) and not any(name in options for name in names(own)):
        ratio = methods.get(method).default_ratio
        chosen["target_ratio"] = None if ratio is None else float(ratio)
    if rest.get("retrain") is not None:
        base = {name: chosen[name] for name in ("length", "batch_tokens")}
        rest["retrain"] = vars(make(Settings, {**base, **rest["retrain"]}, "retrain"))
    return {name: value for name, value in {**chosen, **rest}.items() if name not in (*_CONTENTS, *_PLACES)}


def digest(verb: str, method: str, options: Mapping[str, Any], source: str, inputs: Mapping[str, str]) -> str:
    """The request's digest; `options` are those of the verb and of reading, without paths of `inputs`."""
    whole = {"verb": verb, "method": method, "options": options, "source": source, "inputs": inputs}
    text = json.dumps(whole, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def of_source(path: Path) -> str:
    """sha256 over the files that an adapter may consist of: of a folder all directly in it (and below, if it is an
    adapter only by what lies below), of a file itself with the configurations and the card beside it."""
    if path.is_file():
        beside = [p for p in path.parent.iterdir() if p.suffix == ".json" or p.name == CARD]
        return of_files([path, *(p for p in beside if p != path)], path.parent)
    entries = path.iterdir() if is_adapter(path) else path.rglob("*")
    return of_files(entries, path)


def of_files(paths: Iterable[Path], root: Path) -> str:
    """sha256 over names below `root` and contents of the regular files among `paths`. Raises E-IO-READ."""
    whole = hashlib.sha256()
    for path in sorted(p for p in paths if p.is_file()):
        whole.update(f"{of_file(path)} {path.relative_to(root)}\n".encode())
    return whole.hexdigest()


def of_file(path: Path) -> str:
    """sha256 of a file's bytes. Raises E-IO-READ."""
    try:
        with path.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise FileReadError(f"cannot be read: {error.strerror}", path=path) from None


def of_base(base: Path) -> tuple[str, KnownContent | None]:
    """The digest of a base's contents and configuration, however it is sharded, and the contents for the conversions;
    of its files, and None, where it has no weights (a config.json is enough for some readers)."""
    try:
        with open_checkpoint(base, quantized=True) as checkpoint:
            content = checkpoint.known_content()
            config = json.dumps(checkpoint.config, sort_keys=True, default=str)
            return hashlib.sha256(f"{content.digest} {config}".encode()).hexdigest(), content
    except FileChangedError:
        raise
    except LrcError:
        if not base.is_dir():
            raise
        return of_files(base.iterdir(), base), None


def finished(output: Path, wanted: str) -> CompactAdapter | None:
    """The adapter of an output that was made for this request, None if there is none or it is another's or damaged."""
    if not output.is_file():
        return None
    try:
        compact = file.read(output)
    except LrcError:
        return None
    return compact if compact.provenance.fields.get(FIELD) == wanted else None
