"""Work of a compression by answers that was broken off: what it has measured, in one file beside its output.

Each part of the work that takes long is a piece with a name: a fit, the answers of a form, a size that was tried, a
training. What is kept is not computed again, what is not is computed as it would have been; so the result is that of a
run without a pause. Choices that were made by the clock are pieces, too. The file is replaced as a whole whenever a
piece is done, and holds a training that is under way, as it was some seconds ago.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lrconvert.core.dtypes import Array
from lrconvert.core.errors import StatisticsError
from lrconvert.core.version import __version__
from lrconvert.core.wording import spelled
from lrconvert.io.durable import discard
from lrconvert.lora import statistics_file
from lrconvert.lora.adapter import LoraAdapter
from lrconvert.refine import kept_values

KEY = "lrconvert-compression-partial"
_THINGS = ("base", "data", "LoRA", "lrconvert", "statistics")
EVERY = 30.0  # seconds, at least, between two states of one piece under way
_ANEW = "give what it was begun with, or remove it to start anew"
T = TypeVar("T")


@dataclass(frozen=True)
class _Piece:
    """A value as text, with the digests of what lies beside it, and the seconds that it took."""

    text: str
    blobs: tuple[str, ...]
    seconds: float


@dataclass(eq=False)
class KeptWork:
    """The pieces of a compression, in the file `path`, or nowhere without one. `about` says what they depend on; bytes
    that are in the LoRA, `of_lora`, are not kept again. Make it by `opened`."""

    path: Path | None = None
    about: Mapping[str, str] = field(default_factory=dict)
    of_lora: Mapping[str, bytes] = field(default_factory=dict)
    _pieces: dict[str, _Piece] = field(default_factory=dict)
    _blobs: dict[str, bytes] = field(default_factory=dict)

    @classmethod
    def opened(cls, path: Path | None, about: Mapping[str, str], lora: LoraAdapter) -> KeptWork:
        """Return the work that is kept in `path`, if that is there. Raises E-STATS if it is of another compression, and
        what a damaged file raises."""
        own = {kept_values.digest(extra.data): extra.data for extra in lora.extras}
        work = cls(path, {**about, "lrconvert": __version__, "LoRA": _digest(lora)}, own)
        if path is not None and path.exists():
            work._read(path)
        return work

    def piece(self, name: str, compute: Callable[[], T]) -> T:
        """Return the value of a piece: as it is kept, or as `compute` gives it, which is then kept."""
        if self.path is None:
            return compute()
        if name in self._pieces:
            value: T = self._value(name)
            return value
        started = time.monotonic()
        value = compute()
        self._put(name, value, time.monotonic() - started)
        return value

    def check(self, name: str, value: str) -> None:
        """Keep what the pieces depend on, too, and is known later than `about`. Raises E-STATS if it was another."""
        if self.piece(f"of {name}", lambda: value) != value:
            raise self._other(name)

    def spent(self, names: str) -> float:
        """Return the seconds that kept pieces took whose names begin with `names`."""
        return sum(piece.seconds for name, piece in self._pieces.items() if name.startswith(names))

    def under_way(self, name: str) -> UnderWay:
        """Return where the states of a piece that takes long are kept."""
        return UnderWay(self, f"{name}, under way")

    def end(self) -> None:
        """Remove the file: the result is there, or there will be none."""
        if self.path is not None:
            discard(self.path)

    # --- the file ---

    def _value(self, name: str) -> Any:
        piece = self._pieces[name]
        try:
            return kept_values.of_text(piece.text, {**self._blobs, **self.of_lora})
        except (KeyError, TypeError, ValueError):
            raise StatisticsError(f"the kept {name!r:.80} is not complete", fix="remove it", path=self.path) from None

    def _put(self, name: str, value: Any, seconds: float = 0.0, ended: str = "") -> None:
        blobs: dict[str, bytes] = {}
        text = kept_values.text_of(value, blobs)
        own = {digest: data for digest, data in blobs.items() if digest not in self.of_lora}
        self._pieces[name] = _Piece(text, tuple(own), seconds)
        self._pieces.pop(f"{name}, under way", None)
        needed = {digest for piece in self._pieces.values() for digest in piece.blobs}
        self._blobs = {digest: data for digest, data in (self._blobs | own).items() if digest in needed}
        self._write()

    def _write(self) -> None:
        assert self.path is not None
        entries, arrays = [], [(f"blob.{digest}", "U8", _array(data)) for digest, data in self._blobs.items() if data]
        for n, (name, piece) in enumerate(self._pieces.items()):
            arrays.append((f"text.{n}", "U8", _array(piece.text.encode())))
            empty = [digest for digest in piece.blobs if not self._blobs[digest]]
            held = [digest for digest in piece.blobs if self._blobs[digest]]
            entries.append({"name": name, "seconds": piece.seconds.hex(), "blobs": held, "empty": empty})
        notes = {"compression": 1, "about": dict(self.about), "pieces": entries}
        statistics_file.write_partial(self.path, notes, arrays, key=KEY)

    def _read(self, path: Path) -> None:
        notes, arrays = statistics_file.read_partial(path, key=KEY)
        stated = notes.get("about")
        if not isinstance(stated, dict) or stated.keys() != self.about.keys():
            raise self._other("version of lrconvert")
        for name, value in self.about.items():
            if stated[name] != value:
                raise self._other(name)
        try:
            for n, entry in enumerate(notes["pieces"]):
                self._blobs |= {digest: arrays[f"blob.{digest}"].tobytes() for digest in entry["blobs"]}
                self._blobs |= dict.fromkeys(entry["empty"], b"")
                blobs = (*entry["blobs"], *entry["empty"])
                text = arrays[f"text.{n}"].tobytes().decode()
                self._pieces[entry["name"]] = _Piece(text, blobs, float.fromhex(entry["seconds"]))
        except (KeyError, TypeError, ValueError):
            raise StatisticsError("this unfinished work is not complete", fix="remove it", path=path) from None

    def _other(self, what: str) -> StatisticsError:
        named = what if what in _THINGS or " " in what else spelled(what)
        return StatisticsError(f"is unfinished work with another {named}", fix=_ANEW, path=self.path)


@dataclass(eq=False)
class UnderWay:
    """The state of one piece that is not done yet: what it was, at times, at least `EVERY` seconds apart."""

    work: KeptWork
    name: str
    _written: float = field(default_factory=time.monotonic)

    @property
    def is_kept(self) -> bool:
        """True if states are kept at all."""
        return self.work.path is not None

    def read(self) -> Any:
        """Return the last state, None if there is none."""
        return self.work._value(self.name) if self.name in self.work._pieces else None

    def write(self, state: Callable[[], Any]) -> None:
        """Keep what `state` gives, if enough time has passed since the last one."""
        if self.is_kept and time.monotonic() - self._written >= EVERY:
            self.work._put(self.name, state())
            self._written = time.monotonic()


def _array(data: bytes) -> Array:
    return np.frombuffer(data, np.uint8)


def _digest(lora: LoraAdapter) -> str:
    """sha256 over all that a LoRA does."""
    whole = hashlib.sha256()
    for pair in lora.targets:
        about = (pair.target.name, pair.target.shape, pair.target.view.text, pair.scale.hex(), pair.a.dtype, pair.rank)
        whole.update(repr(about).encode())
        for factor in (pair.a, pair.b):
            whole.update(np.ascontiguousarray(factor.array).tobytes())
    for extra in lora.extras:
        whole.update(repr((extra.name, extra.dtype, extra.shape, extra.use)).encode() + extra.data)
    return whole.hexdigest()
