"""The files of an adapter in a folder: its configuration and its weights, by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from lrconvert.core.errors import FileKindError, LrcError
from lrconvert.formats.readers.shared import frameworks
from lrconvert.io.container import read_json

CONFIG_NAME = "adapter_config.json"
PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
INDEX = ".index.json"  # after the name of a file of weights that is kept in shards
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
WEIGHT_SUFFIXES = (".safetensors", ".npz", ".gguf", ".bin", ".pt", ".pth", ".ckpt")
# What a training tool calls its last result; checkpoints of earlier steps lie beside it.
_FINAL_NAMES = ("pytorch_lora_weights.safetensors", "adapters.safetensors", "adapters.npz", "pytorch_lora_weights.bin")


def weight_files(path: Path) -> list[Path]:
    """Return the files of weights directly inside `path`, the index for those in shards; none if it has an adapter's
    configuration."""
    files = _entries(path, lambda e: e.suffix in WEIGHT_SUFFIXES and e.is_file() and not frameworks.is_state(e.name))
    indexes = _entries(path, lambda entry: entry.name.endswith(INDEX) and entry.is_file())
    return [*(file for file in files if not (indexes and _SHARD.search(file.name))), *indexes]


def only_file(path: Path) -> Path | None:
    """Return `path` if it is a file, or the one file of weights in it that counts; None if that is not clear."""
    if path.is_file():
        return path
    files = weight_files(path)
    final = [entry for entry in files if entry.name.removesuffix(INDEX) in _FINAL_NAMES]
    if final:
        return final[0]
    return files[0] if len(files) == 1 else None


def inner_folders(path: Path) -> list[Path]:
    """Return the folders directly inside `path` that hold an adapter's configuration; none if `path` has one itself."""
    return _entries(path, lambda entry: (entry / CONFIG_NAME).is_file())


def weights_in(path: Path, names: Sequence[str]) -> Path:
    """Return the first file of `names` in a folder, or its index if it is in shards; `path` itself if it is no folder.
    Raises E-IO-KIND."""
    if not path.is_dir():
        return path
    for name in names:
        for entry in (path / name, path / f"{name}{INDEX}"):
            if entry.exists():
                return entry
    shards = sorted(entry.name for entry in path.iterdir() if _SHARD.search(entry.name))
    if shards:
        fix = "the download or the copy is incomplete: get the index, too"
        raise FileKindError(f"the folder holds the shard {shards[0]!r:.120} and no index of shards", fix=fix, path=path)
    checkpoint = frameworks.refused(path)
    if checkpoint is not None:
        raise checkpoint
    raise FileKindError(f"the folder has no {' and no '.join(n for n in names if not n.endswith('.bin'))}", path=path)


def config_path(path: Path) -> Path:
    """Return the place of the configuration of the adapter at `path`: in the folder, or beside the file of weights."""
    return (path if path.is_dir() else path.parent) / CONFIG_NAME


def peft_type(path: Path) -> object:
    """Return what the configuration of a folder says in `peft_type`; None without one. Never raises."""
    try:
        return read_json(path / CONFIG_NAME).get("peft_type") if path.is_dir() else None
    except LrcError:
        return None


def _entries(path: Path, wanted: Callable[[Path], bool]) -> list[Path]:
    try:
        if not path.is_dir() or (path / CONFIG_NAME).exists():
            return []
        return sorted(entry for entry in path.iterdir() if wanted(entry))
    except OSError:  # not to be looked into
        return []
