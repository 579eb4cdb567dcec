"""Folders and files that are given for something else: a model for an adapter, an adapter for a model."""

from __future__ import annotations

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
    if path.name == ADAPTER_CONFIG and path.is_file():
        what = "is the configuration of an adapter, without its weights"
        return UnknownLayoutError(what, fix=f"give its folder, {path.parent}", path=path)
    folder = path if path.is_dir() else path.parent
    if is_model(folder):
        what = "is a model, not an adapter" if path.is_dir() else "is a file of a model, not an adapter"
        return UnknownLayoutError(what, fix="give the LoRA here; the model it was trained on is its base", path=path)
    return None


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
