"""The places of an adapter's extra tensors in a merged model, and what follows: names, configuration, ties.

An adapter that was trained for a task carries its head (``classifier``, ``score``) and perhaps whole embeddings. The
merged model is the one that PEFT's ``merge_and_unload().save_pretrained()`` writes: the head under its own name, the
architecture that has it, its labels in the configuration, without the head it takes the place of. Nothing is guessed
from a live model: what the names, the task and the base's configuration do not settle is refused (E-PLACE).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lrconvert.core.dtypes import FLOATS
from lrconvert.core.errors import PlacementError
from lrconvert.io.checkpoint import Checkpoint
from lrconvert.lora import base_names
from lrconvert.lora.adapter import ExtraTensor
from lrconvert.merge.plan import head_names, task_heads, untying
from lrconvert.merge.plan.placement import Draft, Placement
from lrconvert.merge.plan.updates import Adapter
from lrconvert.merge.plan.whole_tensors import cast, no_place, same_values

_BASE_LAYER = ".base_layer."


def place(
    adapters: Sequence[Adapter], resolved: Sequence[Adapter], checkpoint: Checkpoint, merged: frozenset[str]
) -> Placement:
    """Return the placement of all extra tensors. `resolved` are the adapters after `base_names.resolve`, `merged` the
    whole tensors in them that have an update in them already.

    Raises E-PLACE for a tensor without a place, E-BASE for an ambiguous name.
    """
    try:
        return _placed(Draft(adapters, resolved, checkpoint, merged))
    except PlacementError as error:
        raise error.at(checkpoint.root) from None


def _placed(draft: Draft) -> Placement:
    """Return the placement that a draft becomes."""
    for extra in draft.extras:
        if _BASE_LAYER in f".{extra.name}":
            _place_base_layer(draft, extra)
        else:
            _place_extra(draft, extra)
    architecture = task_heads.new_architecture(draft)
    _check_shapes(draft)
    dropped: tuple[str, ...] = ()
    if architecture:
        draft.changes["architectures"] = [architecture]
        if head_names.has_no_decoder(architecture, draft.config):
            draft.changes.update(is_encoder_decoder=False, use_cache=False)
        dropped = tuple(task_heads.old_head(draft, architecture))
    elif draft.known is not None:
        untying.settle(draft, draft.known)
    elif draft.asks_class:
        untying.guess(draft)
    if draft.added or draft.copies:
        task_heads.check_added(draft, architecture)
    prefix = draft.new_prefix if architecture or draft.added or draft.copies else ""
    task_heads.check_complete(draft, architecture, dropped, prefix)
    effect = bool(draft.added or draft.values or any(map(draft.is_changed, draft.replaced)))
    config = _config_changes(draft)
    added = tuple(sorted(draft.added, key=lambda extra: extra.name))
    return Placement(draft.replaced, draft.values, added, draft.copies, dropped, prefix, config, effect, draft.rows)


def _place_base_layer(draft: Draft, extra: ExtraTensor) -> None:
    """The base's own weight, which PEFT stores beside the LoRA of an embedding or head."""
    name = extra.name.replace("base_layer.", "")
    stored = draft.index.find(name) or base_names.tied_source(name, draft.checkpoint)
    if stored is None:
        raise no_place(extra, f"the base has no {name!r}")
    info = draft.checkpoint.tensors[stored]
    if info.shape != extra.shape:
        raise no_place(
            extra, f"it is {list(extra.shape)}, the base's {stored!r} {list(info.shape)}", "resize the base first"
        )
    if info.dtype not in FLOATS or extra.dtype not in FLOATS:
        raise no_place(extra, f"it is {extra.dtype}, the base's {stored!r} {info.dtype}")
    if not same_values(extra, info, draft.checkpoint):
        target = draft.index.find(name) or draft.name_of(name)
        draft.values[target] = cast(extra, info.dtype)


def _place_extra(draft: Draft, extra: ExtraTensor) -> None:
    """Any other tensor: it takes the place of a stored one, or is added."""
    stored = draft.index.find(extra.name)
    if extra.name.partition(".")[0] in head_names.TASK_HEADS and stored != extra.name:
        stored = None  # a head of another name (`sop_classifier.classifier`) is another head
    if (stored or extra.name) in draft.targets:
        raise no_place(extra, "it is also a target of an update")
    if stored is not None:
        draft.replaced[stored] = extra
    else:
        draft.added.append(replace(extra, name=draft.name_of(extra.name)))


def _check_shapes(draft: Draft) -> None:
    """Raise E-PLACE where a tensor has another shape than the one it replaces, but for rows of a task's head and of
    the vocabulary."""
    vocabulary = set()
    heads = {e.name for e in task_heads.heads(draft)}
    for stored, extra in draft.replaced.items():
        info = draft.checkpoint.tensors[stored]
        if extra.shape == info.shape:
            continue
        rows_only = len(extra.shape) == len(info.shape) and extra.shape[1:] == info.shape[1:]
        if rows_only and stored in draft.vocabulary:
            vocabulary.add(extra.shape[0])
        elif not rows_only or extra.name not in heads:
            raise no_place(extra, f"it is {list(extra.shape)}, the base's {stored!r} {list(info.shape)}")
    if vocabulary:
        _resize_vocabulary(draft, vocabulary)


def _resize_vocabulary(draft: Draft, sizes: set[int]) -> None:
    """Raise E-PLACE unless all stored embeddings and heads were replaced by ones of one size."""
    stale = [name for name in draft.vocabulary if name not in draft.replaced]
    if len(sizes) > 1 or stale:
        what = f"{stale[0]!r} keeps its own" if stale else f"tensors disagree on it: {sorted(sizes)}"
        raise PlacementError(
            f"the adapter changes the size of the vocabulary, but {what}",
            fix="resize the base first: model.resize_token_embeddings(), save it, and merge into that",
        )
    size = sizes.pop()
    text = draft.config.get("text_config")
    if isinstance(text, dict) and "vocab_size" in text:
        draft.changes["text_config"] = {**text, "vocab_size": size}
    if "vocab_size" in draft.config or "text_config" not in draft.changes:
        draft.changes["vocab_size"] = size


def _config_changes(draft: Draft) -> dict[str, Any]:
    """Return the fields of the configuration that change, with the labels of the head's last layer."""
    changes = dict(draft.changes)
    last = [e for e in task_heads.heads(draft) if len(e.shape) == 2 and e.name.endswith(head_names.LAST_LAYERS)]
    last.sort(key=lambda e: next(n for n, tail in enumerate(head_names.LAST_LAYERS) if e.name.endswith(tail)))
    if last:
        changes.update(head_names.labels(draft.config, last[0].shape[0]))
    return {key: value for key, value in changes.items() if draft.config.get(key) != value}
