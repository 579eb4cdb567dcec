"""The library of a server: the folder of an adapter, by its name."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from lrconvert.api.expanding import expand, notes_of
from lrconvert.core.errors import LrcError
from lrconvert.formats.expansions.cache import Cache
from lrconvert.io.durable import FileLock
from lrconvert.serving.base_check import check_base
from lrconvert.serving.settings import Settings
from lrconvert.serving.store import Store, open_store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Library:
    """Adapters of a store, expanded when they are asked for.

    A server reads a folder again whenever it takes up an adapter that it had put aside, so what this gives stays in
    the cache until the process ends.
    """

    settings: Settings
    store: Store
    _used: dict[Path, FileLock | None] = field(default_factory=dict, repr=False)
    _guard: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @classmethod
    def of(cls, settings: Settings) -> Library:
        """Return the library of a server. Raises what `open_store` raises."""
        return cls(settings, open_store(settings.store))

    def has(self, name: str) -> bool:
        """Say whether there is an adapter of that name. Raises E-IO-READ, E-HUB."""
        return self.store.find(name) is not None

    def folder(self, name: str, served: str = "") -> Path | None:
        """Return the PEFT folder of an adapter, None if there is none of that name. `served` is the model that it is
        for, as the server calls it. Raises E-FPR if it is for another, and what `expanded` raises."""
        source = self.store.find(name)
        if source is None:
            return None
        accept = partial(check_base, served=served, aliases=self.settings.base_names)
        options = self.settings.options
        cached = expand(source, None, options, base=self.settings.base, accept=accept)
        self._use(cached.folder)
        for line in notes_of(cached):
            log.warning("%s: %s", name, line)
        log.info("%s: %s %s", name, "found at" if cached.was_there else "expanded to", cached.folder)
        return cached.folder

    def _use(self, folder: Path) -> None:
        with self._guard:
            if folder not in self._used:
                self._used[folder] = Cache(folder.parent).use(folder.name)

    def close(self) -> None:
        """Let others remove what this has used."""
        with self._guard:
            for lock in self._used.values():
                if lock is not None:
                    lock.close()
            self._used.clear()


def said(error: LrcError) -> str:
    """Return what of an error a server's client is told: the code and what is wrong, no path and no advice."""
    return f"{error.code}: {error.what}"
