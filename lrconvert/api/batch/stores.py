"""Folders at URLs as sources and outputs of a batch: each is listed once, in pages, and of an adapter no more is kept
than its path and sixteen bytes that tell its state.

The manifest of outputs at a URL lies in the user's cache while a batch runs, where a kill leaves it for the next run,
and is written to ``URL/manifest.jsonl`` at the end; a machine that has none yet begins with that.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np

from lrconvert.api.batch import manifest
from lrconvert.api.batch.manifest import Manifest
from lrconvert.api.expanding import cache_folder
from lrconvert.core.errors import LrcError, OutputPathError, UnknownLayoutError
from lrconvert.io import remote
from lrconvert.io.durable import atomic_file, make_folder
from lrconvert.io.remote import Url

_STATE = 16  # bytes
_BATCHES = "batches"  # a folder of the cache


def are_many(source: Url, output: Path | Url | None) -> bool:
    """Return true if a URL is to be converted into files in a folder: it holds several adapters, or one below it that
    is to be converted into an existing folder."""
    first = list(islice(remote.adapters(remote.open_store(source)), 2))
    is_folder = output.text.endswith("/") if isinstance(output, Url) else output is not None and output.is_dir()
    return len(first) > 1 or (is_folder and bool(first) and first[0].path != "")


def listed(source: Url, out: Path | Url | None) -> tuple[Sequence[str], bytes]:
    """Return the paths of the adapters at a URL, and their states, sixteen bytes each, zeros where there is none.
    Raises E-LAYOUT for a folder without adapters, E-OUT-PATH for an output folder inside it, and what listing does."""
    if isinstance(out, Url) and f"{out.text.rstrip('/')}/".startswith(f"{source.text.rstrip('/')}/"):
        raise OutputPathError(f"lies inside the source '{source}'", fix="choose another output", path=out)
    paths, states = [], bytearray()
    for adapter in remote.adapters(remote.open_store(source)):
        paths.append(adapter.path)
        states += bytes.fromhex(adapter.state) if adapter.state else bytes(_STATE)
    if not paths:
        raise UnknownLayoutError("no adapter was found in this folder", path=source)
    return paths, bytes(states)


def state_at(states: bytes, number: int) -> str:
    """Return the state of the adapter of a number, "" where it is not known."""
    state = states[number * _STATE : (number + 1) * _STATE]
    return state.hex() if any(state) else ""


class OutputStates:
    """The states of the files below a URL, from one listing."""

    def __init__(self, root: Url) -> None:
        keys, states = array("q"), bytearray()
        for entry in remote.open_store(root).walk():
            keys.append(hash(entry.name))
            states += bytes.fromhex(remote.state_of(entry))
        self._root = root
        known = np.frombuffer(keys, np.int64) if keys else np.zeros(0, np.int64)
        order = np.argsort(known)
        self._keys = known[order]
        self._states = np.frombuffer(bytes(states), np.uint8).reshape(-1, _STATE)[order]

    def of(self, target: str) -> str:
        """Return the digest of the state of an output, given its URL; that of nothing if it is not there."""
        key = hash(target[len(self._root.text.rstrip("/")) + 1 :])
        at = int(np.searchsorted(self._keys, key))
        if at == len(self._keys) or self._keys[at] != key:
            return remote.state_of(None)
        return bytes(self._states[at]).hex()


@contextmanager
def manifest_of(root: Url) -> Iterator[Manifest]:
    """Give the manifest of the outputs at a URL. What keeps it from being written there in the end is a note: the
    outputs do not depend on it. Raises E-LOCKED if another batch of this machine writes there."""
    folder = cache_folder(None) / _BATCHES
    make_folder(folder)
    path = folder / f"{hashlib.sha256(root.text.rstrip('/').encode()).hexdigest()[:32]}.jsonl"
    url = root / manifest.NAME
    if not path.exists():
        _begin(path, url)
    with manifest.opened(path) as kept:
        before = path.stat().st_size
        yield kept
        notes = kept.notes
    if not path.exists() or path.stat().st_size == before:
        return
    try:
        remote.publish(path, url, overwrite=True)
    except LrcError as error:
        notes.append(f"the manifest was not written to {url}, and is in {path}: {error}")


def _begin(path: Path, url: Url) -> None:
    """Begin with the manifest that another machine has left at a URL, if it did."""
    with remote.fetched_file(os.fspath(url)) as there:
        if there is not None:
            with atomic_file(path, overwrite=True) as file:
                file.write(there.read_bytes())
