"""The source for NVIDIA Dynamo: ``lrconvert://NAME`` in place of ``file://``, ``s3://`` or ``hf://``.

    python -m lrconvert.serving.dynamo dynamo.sglang --model-path BASE ...     a worker that knows the scheme

Dynamo's vLLM workers load vLLM's plugins, and with them this: `python -m dynamo.vllm` is enough. DYN_LORA_ENABLED=true
is needed in any case, as for all adapters. Workers do not say what model they serve: LRCONVERT_BASE does.
"""

from __future__ import annotations

import asyncio
import logging
import os
import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrconvert.core.errors import LrcError, OptionError

if TYPE_CHECKING:
    from lrconvert.serving.library import Library

SCHEME = "lrconvert"
_MANAGER = "dynamo.common.lora.manager"
log = logging.getLogger(__name__)


class Source:
    """A `LoRASourceProtocol`: the adapters of a library."""

    def __init__(self, library: Library) -> None:
        self._library = library

    async def exists(self, lora_uri: str) -> bool:
        """Say whether the store has the adapter of a URI."""
        return await asyncio.to_thread(self._library.has, name_of(lora_uri))

    async def download(self, lora_uri: str, dest_path: Path) -> Path:
        """Return the folder of an adapter, in our cache: Dynamo's `dest_path` stays empty. Raises ours."""
        from lrconvert.serving.library import said

        name = name_of(lora_uri)
        try:
            folder = await asyncio.to_thread(self._library.folder, name, self._library.settings.base or "")
        except LrcError as error:
            log.error("adapter %r cannot be served: %s", name, error)
            raise RuntimeError(f"adapter {name!r:.200} cannot be served: {said(error)}") from error
        if folder is None:
            raise FileNotFoundError(f"the store has no adapter {name!r:.200}")
        return folder


def name_of(uri: str) -> str:
    """Return the name in ``lrconvert://NAME``."""
    return uri.partition("://")[2]


def register(library: Library | None = None) -> None:
    """Register the source with Dynamo's manager of adapters. Raises E-OPTION if LRCONVERT_STORE or DYN_LORA_ENABLED is
    not set."""
    from dynamo.common.lora.manager import get_lora_manager

    from lrconvert.serving.library import Library
    from lrconvert.serving.settings import STORE, Settings

    if library is None:
        settings = Settings.of(os.environ)
        if settings is None:
            raise OptionError(f"{STORE} is not set", fix="set it to a folder, a URL or hf://org/name")
        library = Library.of(settings)
    manager: Any = get_lora_manager()
    if manager is None:
        raise OptionError("Dynamo loads no adapters", fix="set DYN_LORA_ENABLED=true")
    manager.register_custom_source(SCHEME, Source(library))


def register_where_it_runs(library: Library) -> None:
    """Register the source if this process is a worker of Dynamo's that loads adapters."""
    is_enabled = os.environ.get("DYN_LORA_ENABLED", "").strip().lower() in ("1", "true", "yes", "on")
    if _MANAGER in sys.modules and is_enabled:
        register(library)


def main(words: list[str]) -> None:
    """Run a worker of Dynamo's, a module and its arguments, with the source registered."""
    if not words:
        sys.exit("usage: python -m lrconvert.serving.dynamo dynamo.vllm|dynamo.sglang ARGUMENT...")
    try:
        register()
    except LrcError as error:
        sys.exit(str(error))
    sys.argv = list(words)
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
