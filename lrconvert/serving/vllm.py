"""The plugin for vLLM: compact files by name, through its own `LoRAResolver`.

vLLM finds `register` by the entry point ``vllm.general_plugins``. It does nothing unless LRCONVERT_STORE is set.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lrconvert.serving.library import Library

NAME = "lrconvert"
_SWITCH = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
log = logging.getLogger(__name__)


def register() -> None:
    """Register the resolver, once in a process, and with Dynamo's manager of adapters if that is there. Raises ours
    for settings that mean nothing: a server that cannot serve should not start."""
    if not os.environ.get("LRCONVERT_STORE", "").strip():
        return
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    from lrconvert.serving import dynamo
    from lrconvert.serving.library import Library
    from lrconvert.serving.settings import Settings

    if NAME in LoRAResolverRegistry.get_supported_resolvers():
        return
    settings = Settings.of(os.environ)
    assert settings is not None
    library = Library.of(settings)
    _log_as_vllm()
    LoRAResolver.register(Resolver)
    LoRAResolverRegistry.register_resolver(NAME, Resolver(library))
    dynamo.register_where_it_runs(library)
    if os.environ.get(_SWITCH, "").strip().lower() not in ("1", "true"):
        log.warning("vLLM looks for adapters by name only if %s=True is set", _SWITCH)


def _log_as_vllm() -> None:
    """Let our lines be seen where vLLM's are, unless whoever runs the server has set up something else."""
    ours, theirs = logging.getLogger("lrconvert.serving"), logging.getLogger("vllm")
    if ours.handlers or ours.level or not theirs.handlers:
        return
    ours.handlers, ours.level = list(theirs.handlers), theirs.level
    ours.propagate = theirs.propagate


class Resolver:
    """A `vllm.lora.resolver.LoRAResolver` that gives the adapters of a library."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._running: dict[tuple[str, str], asyncio.Task[Path | None]] = {}

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        """Return a `LoRARequest` for an adapter, None if the store has none of that name. Requests for one that come
        while it is being expanded wait for that. Raises ValueError, which vLLM answers with 400, for a file that is
        broken or of another base; RuntimeError, 500, if store or disk fail."""
        from vllm.lora.request import LoRARequest

        folder = await self._folder(base_model_name, lora_name)
        if folder is None:
            return None
        return LoRARequest(lora_name=lora_name, lora_int_id=number_of(lora_name), lora_path=str(folder))

    async def _folder(self, base: str, name: str) -> Path | None:
        from lrconvert.core import errors
        from lrconvert.serving.library import said

        key = (base, name)
        task = self._running.get(key)
        if task is None:
            task = asyncio.create_task(asyncio.to_thread(self._library.folder, name, base))
            self._running[key] = task
            task.add_done_callback(lambda _: self._running.pop(key, None))
        try:
            return await asyncio.shield(task)
        except errors.LrcError as error:
            log.error("adapter %r cannot be served: %s", name, error)
            ours = (errors.HubError, errors.FileReadError, errors.FileWriteError, errors.DurabilityError)
            kind = RuntimeError if isinstance(error, ours) else ValueError
            raise kind(f"LoRA adapter {name!r:.200} cannot be served: {said(error)}") from error


def number_of(name: str) -> int:
    """Return the number of an adapter, the same in every process; vLLM puts its own in its place."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) % (2**31 - 1) + 1
