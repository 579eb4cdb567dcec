"""Tied tensors of which an adapter changes some: each name that gets other values becomes a tensor of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lrconvert.core.errors import PlacementError
from lrconvert.lora import architecture, base_names, ties
from lrconvert.lora.architecture import TIE
from lrconvert.lora.ties import BaseClass, Tie
from lrconvert.merge.plan import head_names, tied_tensors
from lrconvert.merge.plan.placement import Draft
from lrconvert.merge.plan.whole_tensors import same_bytes, same_tensor


def settle(draft: Draft, known: BaseClass) -> None:
    """Make tensors of their own of shared ones that do not change alike."""
    broken = []
    for tie in draft.ties:
        _follow_resized(draft, tie)
        if len({_content(draft, tie.stored.get(name, name)) for name in tie.names}) > 1:
            broken.append(tie)
        else:  # what is not stored is what it is tied to, an output head the embedding
            draft.added = [extra for extra in draft.added if extra.name not in tie.names]
    added = {extra.name for extra in draft.added}
    untied = tied_tensors.untie(known, draft.ties, broken, draft.checkpoint, added)
    draft.copies.update(untied.copies)
    for tie in draft.ties:
        for name in (n for n in tie.names if n in untied.copies and tie not in broken):  # as all of its tie
            if tie.origin in draft.replaced:
                draft.added.append(replace(draft.replaced[tie.origin], name=name))
                del draft.copies[name]
            for extra, places in draft.rows.items():
                if set(places) >= set(tie.stored.values()):
                    draft.rows[extra] = (*places, name)
    for key, value in untied.config.items():
        both = isinstance(value, dict) and key in draft.changes
        draft.changes[key] = {**value, **draft.changes[key], TIE: False} if both else value


def _follow_resized(draft: Draft, tie: Tie) -> None:
    """Give a resized tensor to the stored names of its tie that the adapter does not change: they have its rows."""
    shape = draft.checkpoint.tensors[tie.origin].shape
    extras = [draft.replaced[name] for name in tie.stored.values() if name in draft.replaced]
    extras += [extra for extra in draft.added if extra.name in tie.names]
    resized = [extra for extra in extras if extra.shape != shape]
    if resized and all(same_tensor(extra, resized[0]) for extra in resized) and resized[0].name not in draft.merged:
        for name in tie.stored.values():
            if _content(draft, name) is None:
                draft.replaced[name] = replace(resized[0], name=name)


def _content(draft: Draft, name: str) -> Any:
    """Return what the tensor of this name gets: None for the base's values, and equal for equal ones."""
    rows = frozenset(extra for extra, places in draft.rows.items() if name in places)
    shared = next((tie for tie in draft.ties if name in tie.names and name not in tie.stored), None)
    if shared is not None:  # it follows the stored ones if those rows are of all
        rows |= {extra for extra, places in draft.rows.items() if {*shared.stored.values()} == {*places}}
    if name in draft.values or (name in draft.updated and draft.has_magnitudes):
        return name
    if name in draft.updated:
        return tied_tensors.factors(name, draft.resolved)
    extra = draft.replaced.get(name) or next((e for e in draft.added if e.name == name), None)
    if extra is None:
        return rows or None
    stored = draft.checkpoint.tensors[shared.origin if shared else name]
    same = same_bytes(extra, stored, draft.checkpoint)
    return None if same else (extra.dtype, extra.shape, extra.data, rows)


def guess(draft: Draft) -> None:
    """Untie embeddings where transformers has no class for the base: as far as its configuration and its tensors show,
    and refused where they do not. Raises E-PLACE."""
    family = architecture.of(draft.config)
    if ties.states_no_tie(draft.config) or (family is not None and not family.is_tied):
        return
    for name in sorted(draft.updated - draft.checkpoint.tensors.keys()):
        source = base_names.tied_source(name, draft.checkpoint)
        if source is not None:  # an output head that is not stored, not a stack that is stored in parts
            draft.copies[name] = source
    vocabulary = draft.vocabulary
    embedding = next((n for n in vocabulary if not n.endswith(base_names.HEADS)), None)
    if _head_equals(draft, embedding):
        return
    new_head = bool(draft.copies) or any(e.name.endswith(base_names.HEADS) for e in draft.added)
    is_headless = head_names.is_headless(draft.architecture)
    if not new_head and (is_headless or not any(draft.is_changed(name) for name in vocabulary)):
        return
    replaced = [draft.replaced.get(name) for name in vocabulary]
    alike = [e for e in replaced if e is not None and replaced[0] is not None and same_tensor(e, replaced[0])]
    if len(vocabulary) > 1 and len(alike) == len(vocabulary):
        return
    if (len(vocabulary) < 2 and not new_head) or (family is not None and family.computes_by_tie):
        raise PlacementError(
            f"{embedding!r} may be tied to an output layer, and transformers has no class {draft.architecture!r} "
            "that tells",
            fix='state "tie_word_embeddings": false in the config.json of the base if it has none',
        )
    if new_head or draft.config.get(TIE) is not None:
        draft.changes[TIE] = False
    text = draft.config.get("text_config")
    if isinstance(text, dict) and TIE in text:
        draft.changes["text_config"] = {**draft.changes.get("text_config", text), TIE: False}


def _head_equals(draft: Draft, embedding: str | None) -> bool:
    """Return whether the adapter brings an output head that is the embedding it is tied to; it is then left out."""
    head = next((e for e in draft.added if e.name.endswith(base_names.HEADS)), None)
    if head is None or embedding is None or embedding in draft.updated or embedding in draft.values:
        return False
    if not same_bytes(head, draft.replaced.get(embedding) or draft.checkpoint.tensors[embedding], draft.checkpoint):
        return False
    draft.added.remove(head)
    return True
