"""Verbs for live models: attach, detach, set_active, disabled, peft_model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from numbers import Real
from typing import TYPE_CHECKING, Any

from lrconvert.api.shared import AnyAdapter, AnyPath, adapter_of, live_model, refuse_rest, take_reading
from lrconvert.core.errors import ArgumentError
from lrconvert.core.options import described
from lrconvert.formats.readers.shared.options import ReadOptions

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import nn

    from lrconvert.live.attached_adapter import AttachedAdapter


def attach(
    model: nn.Module,
    adapter: AnyAdapter,
    *,
    name: str = "default",
    scale: float = 1.0,
    dtype: torch.dtype | str | None = None,
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
    live_model(model)
    if not isinstance(name, str):
        raise ArgumentError(f"name is {described(name)}; a text was expected")
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise ArgumentError(f"scale is {described(scale)}; a number was expected")
    held = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype or torch.float32
    if not isinstance(held, torch.dtype):
        raise ArgumentError(f"dtype is {described(dtype)}; a torch dtype was expected", fix="such as 'float32'")
    loaded = adapter_of(adapter, reading)
    return attaching.attach(model, loaded, name=name, scale=float(scale), dtype=held, trainable=trainable)


def peft_model(
    model: nn.Module,
    adapter: AnyAdapter,
    name: str = "default",
    *,
    trainable: bool = True,
    base: AnyPath | None = None,
    **more: Any,
) -> PeftModel:
    """Return a `peft.PeftModel` around a live model with any adapter (lrconvert file, LoRA folder, loaded, or a result)
    in it, expanded in memory: what is made for PEFT takes it, such as Trainer, `set_adapter`, `merge_and_unload` and
    `save_pretrained`.

    The adapter is a plain LoRA there, with its own rank in every module, DoRA, heads and trained rows included; updates
    that depend on the base (Bat) are PEFT's MiSS. Of a model that is a `PeftModel` already the adapter becomes one
    more, under another `name`. With `trainable` its numbers take gradients, as those of `get_peft_model`. `base` and
    `more` are those of `load`. Outputs are those of `attach` up to the rounding of float32. Raises E-DEPENDENCY without
    PEFT (``pip install 'lrconvert[peft]'``), E-EXPORT for what PEFT cannot express, E-ATTACH.

    >>> from transformers import AutoModelForCausalLM
    >>> model = peft_model(AutoModelForCausalLM.from_pretrained("base-model"), "my-adapter")
    >>> type(model).__name__, model.active_adapter
    ('PeftModelForCausalLM', 'default')
    """
    from lrconvert.live.peft_model import peft_model as wrapped

    reading = take_reading(more, base)
    refuse_rest(more, "peft_model", ReadOptions)
    if not isinstance(name, str):
        raise ArgumentError(f"name is {described(name)}; a text was expected")
    return wrapped(live_model(model), adapter_of(adapter, reading), name, trainable)


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter, or all, off a live model; without adapters it is the object that it was. Raises E-ATTACH."""
    from lrconvert.live import attach as attaching

    attaching.detach(live_model(model), name)


def set_active(model: nn.Module, names: str | Sequence[str]) -> None:
    """Choose which attached adapters a live model uses; their updates add up. Raises E-ATTACH."""
    from lrconvert.live import attach as attaching

    if not isinstance(names, (str, Sequence)):
        raise ArgumentError(f"names is {described(names)}; the name of an adapter, or several, were expected")
    attaching.set_active(live_model(model), names)


def disabled(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which a live model computes without its adapters."""
    from lrconvert.live import attach as attaching

    return attaching.disabled(live_model(model))
