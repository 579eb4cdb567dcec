"""Folders and files that are given for something else: a model for an adapter, an adapter for a model, a web page or a
pointer of Git for either."""

from __future__ import annotations

import struct
from pathlib import Path

from lrconvert.core.errors import ConfigError, FileKindError, LrcError, UnknownLayoutError

ADAPTER_CONFIG = "adapter_config.json"
_MODEL_CONFIGS = ("config.json", "model_index.json")


def is_adapter(path: Path) -> bool:
    """Return true for the folder of an adapter that is no model."""
    return _holds(path, ADAPTER_CONFIG) and not _holds(path, *_MODEL_CONFIGS)


def is_model(path: Path) -> bool:
    """Return true for the folder of a model, or of a pipeline of several, that is no adapter."""
    return _holds(path, *_MODEL_CONFIGS) and not _holds(path, ADAPTER_CONFIG)


def _holds(folder: Path, *names: str) -> bool:
    try:
        return any((folder / name).is_file() for name in names)
    except OSError:
        return False


def for_adapter(path: Path) -> LrcError | None:
    """Return the error that says what `path` is, if it is given for an adapter and plainly is none."""
    return _by_place(path) or by_content(path)


def _by_place(path: Path) -> LrcError | None:
    if path.name == ADAPTER_CONFIG and path.is_file():
        what = "is the configuration of an adapter, without its weights"
        return UnknownLayoutError(what, fix=f"give its folder, {path.parent}", path=path)
    folder = path if path.is_dir() else path.parent
    if is_model(folder):
        what = "is a model, not an adapter" if path.is_dir() else "is a file of a model, not an adapter"
        return UnknownLayoutError(what, fix="give the LoRA here; the model it was trained on is its base", path=path)
    return None


# --- by content -----------------------------------------------------------------------------------------------------

_HEAD_BYTES = 512
_AGAIN = "get the file itself: open its address in a browser, and log in if the page asks for that"
_GGLA = (b"algg", b"ggla")  # llama.cpp's LoRAs before GGUF: a magic number in either order, a version, r and alpha
_OLD = "give the LoRA; llama.cpp's models of today are GGUF"
_BINARY = (
    (b"lmgg", "a model of llama.cpp from before GGUF (ggml)", _OLD),
    (b"fmgg", "a model of llama.cpp from before GGUF (ggmf)", _OLD),
    (b"tjgg", "a model of llama.cpp from before GGUF (ggjt)", _OLD),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras saves weights", "save the adapter as safetensors with its own tool"),
    (b"\x89PNG", "a picture", "give the LoRA; a picture may hold a workflow that names it"),
    (b"\xff\xd8\xff", "a picture", "give the LoRA; a picture may hold a workflow that names it"),
    (b"RIFF", "a picture, or a sound", "give the LoRA"),
    (b"\x1f\x8b", "an archive (gzip)", "unpack it, and give the adapter in it"),
    (b"7z\xbc\xaf", "an archive (7-Zip)", "unpack it, and give the adapter in it"),
    (b"Rar!", "an archive (RAR)", "unpack it, and give the adapter in it"),
)
# In small letters.
_TEXTS = (
    (
        b"version https://git-lfs",
        "a pointer of Git LFS, a few lines that stand for the file",
        "run `git lfs pull` there",
    ),
    (b"<!doctype html", "a web page, not the file that was to be downloaded", _AGAIN),
    (b"<html", "a web page, not the file that was to be downloaded", _AGAIN),
    (b"<?xml", "an XML text, such as a store's error, not the file that was to be downloaded", _AGAIN),
    (b"{", "a JSON text, not weights", "give the weights that it describes, or their folder"),
)


def by_content(path: Path) -> LrcError | None:
    """Return the error that says what a file is, by its place if that tells, if its first bytes are of something that
    holds no adapter."""
    error = _by_first_bytes(path)
    return error if error is None or path.suffix != ".json" else _by_place(path) or error


def _by_first_bytes(path: Path) -> LrcError | None:
    try:
        if not path.is_file():  # a pipe would wait for a writer
            return None
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return None
    if head[:4] in _GGLA:
        return _ggla(head, path)
    if head[:2] == b"PK" and path.suffix == ".zip":
        what = "is an archive (zip)"
        return UnknownLayoutError(what, fix="unpack it, and give the adapter in it", path=path)
    # The length that a file of safetensors begins with may look like the first letter of a text, but has zeros.
    text = head.lstrip().lower() if b"\0" not in head else b""
    for table, start in ((_BINARY, head), (_TEXTS, text)):
        for beginning, what, fix in table:
            if start.startswith(beginning):
                return UnknownLayoutError(f"is {what}", fix=fix, path=path)
    return None


def _ggla(head: bytes, path: Path) -> LrcError:
    shown = ""
    for order in "<>" if len(head) >= 16 else "":
        version, rank, alpha = struct.unpack(f"{order}iii", head[4:16])
        if 0 < version < 100 and 0 < rank < 1 << 16:
            shown = f", version {version}, of rank {rank} and alpha {alpha}"
            break
    return UnknownLayoutError(
        f"is an adapter in llama.cpp's own format of before GGUF (ggla{shown}), which no program reads any more",
        fix="convert the PEFT adapter that it was made of (convert-lora-to-ggml.py); for today's llama.cpp export that "
        "to gguf",
        path=path,
    )


def check_base(path: Path) -> None:
    """Raise E-IO-KIND if `path`, which is given for a base, plainly is an adapter or a file of one."""
    if is_adapter(path):
        fix = "give the model that it was trained on: the folder that holds config.json"
        raise FileKindError("is an adapter, not a model", fix=fix, path=path)


def check_order(base: Path, adapter: Path) -> None:
    """Raise E-CONFIG if a base and an adapter are given the wrong way round."""
    if is_adapter(base) and is_model(adapter):
        what = f"is an adapter, and {adapter} is a model: they are the wrong way round"
        raise ConfigError(what, fix="exchange the two", path=base)
