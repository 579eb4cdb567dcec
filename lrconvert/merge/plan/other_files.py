"""Files of a model's folder beside its weights: what a merge copies, and what it leaves out."""

from __future__ import annotations

import os
from pathlib import Path

from lrconvert.io.checkpoint import INDEX_NAMES, JOURNAL, Checkpoint, contained

RECORDS = ".lrconvert"
UNDONE = f"{RECORDS}/undone.json"  # says which merge was undone last, where others are left
# Weights in other formats would be those of the base, so they are left out; so are indexes of them.
_OTHER_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ggml"),
    *(".tflite", ".ot", ".npz", ".pkl", ".mlmodel", ".bin.index.json", ".h5.index.json", ".msgpack.index.json"),
    ".safetensors.index.json",
)


def is_weights(name: str) -> bool:
    """Return whether a file holds weights, in whatever format, or is an index of such."""
    return name.lower().endswith(_OTHER_WEIGHTS) or name in INDEX_NAMES


def other_files(checkpoint: Checkpoint) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Return the files of the base's folder beside its weights: those to copy (by name), and those left out (hidden
    folders, files that are links out of the folder, weights in other formats)."""
    root = checkpoint.root
    weights = {file.path.name for file in checkpoint.files} | {checkpoint.names.index}
    copies, left_out = {}, []
    for folder, folders, names in os.walk(root):
        place = Path(folder).relative_to(root)
        hidden = [name for name in folders if name.startswith(".") and (place / name).as_posix() != RECORDS]
        left_out += [f"{(place / n).as_posix()}/" for n in folders if n in hidden or (Path(folder) / n).is_symlink()]
        folders[:] = sorted(n for n in folders if n not in hidden and (place / n).as_posix() != JOURNAL)
        for name in names:
            path, shown = Path(folder) / name, (place / name).as_posix()
            if shown in weights or shown == UNDONE:
                continue
            kept = place.parts[:1] == (RECORDS,) or not (is_weights(name) or shown in checkpoint.outdated)
            if path.is_file() and contained(root, path) and kept:
                copies[shown] = path
            else:
                left_out.append(shown)
    return copies, tuple(sorted(left_out))
