"""Verbs for live models: attach, detach, set_active, disabled."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from lrconvert.api.shared import AnyPath, refuse_rest, take_reading
from lrconvert.formats import loading
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.lora.adapter import CompactAdapter, LoraAdapter

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lrconvert.live.attached_adapter import AttachedAdapter


def attach(
    model: nn.Module,
    adapter: AnyPath | LoraAdapter | CompactAdapter,
    *,
    name: str = "default",
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    trainable: bool = False,
    base: AnyPath | None = None,
    **more: Any,
) -> AttachedAdapter:
    """Put an adapter (lrconvert file, LoRA folder, or loaded) on a live torch model, unmerged, beside those it has.

    Its numbers are held in `dtype` (float32 without it), in a module of their own that is returned; `trainable` takes
    their gradients. Heads, biases and token rows are installed. `base` (the model's folder), and `more`
    (`allow_pickle`, `layout`, `alpha`), are those of `load`. Raises E-ATTACH, E-BASE, E-PLACE; the model is untouched
    then.

    >>> from transformers import AutoModelForCausalLM
    >>> model = AutoModelForCausalLM.from_pretrained("base-model")
    >>> attached = attach(model, "my-adapter", name="one")
    >>> with disabled(model):
    ...     pass  # the model computes as its base does
    >>> detach(model)
    """
    import torch

    from lrconvert.live import attach as attaching

    reading = take_reading(more, base)
    refuse_rest(more, "attach", ReadOptions)
    loaded = loading.adapter(adapter, reading)
    return attaching.attach(model, loaded, name=name, scale=scale, dtype=dtype or torch.float32, trainable=trainable)


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter, or all, off a live model; without adapters it is the object that it was. Raises E-ATTACH."""
    from lrconvert.live import attach as attaching

    attaching.detach(model, name)


def set_active(model: nn.Module, names: str | Sequence[str]) -> None:
    """Choose which attached adapters a live model uses; their updates add up. Raises E-ATTACH."""
    from lrconvert.live import attach as attaching

    attaching.set_active(model, names)


def disabled(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which a live model computes without its adapters."""
    from lrconvert.live import attach as attaching

    return attaching.disabled(model)
