"""The placement of extra tensors in a merged model, and its draft: what adapters and base say, and what is settled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lrconvert.io.checkpoint import Checkpoint
from lrconvert.lora import base_names, ties
from lrconvert.lora.adapter import MAGNITUDES, ExtraTensor
from lrconvert.merge.plan import head_names, tied_tensors
from lrconvert.merge.plan.updates import Adapter, targets_of
from lrconvert.merge.plan.whole_tensors import gather, same_bytes, updated


@dataclass(frozen=True)
class Placement:
    """The outcome for all extra tensors.

    `replaced`: stored name -> tensor that takes its place. `values`: name -> values to take, and to add an update to,
    in place of the base's. `added`: new tensors. `copies`: new name -> stored tensor whose values it starts from (an
    untied head). `dropped`: stored names that are left out. `prefix`: put before every stored name. `config`: fields to
    set, or to remove where the value is None. `has_effect`: whether tensors beside updated ones differ from the base's.
    `rows`: name of trained rows -> the tensors that they go into.
    """

    replaced: Mapping[str, ExtraTensor] = field(default_factory=dict)
    values: Mapping[str, ExtraTensor] = field(default_factory=dict)
    added: tuple[ExtraTensor, ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    prefix: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    has_effect: bool = False
    rows: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


class Draft:
    """A placement that is being made.

    `replaced`, `values`, `added`, `copies` and `rows` are as in `Placement`, `changes` fields of the configuration.
    """

    def __init__(
        self, adapters: Sequence[Adapter], resolved: Sequence[Adapter], checkpoint: Checkpoint, merged: frozenset[str]
    ) -> None:
        self.adapters, self.checkpoint, self.config = adapters, checkpoint, checkpoint.config
        self.resolved, self.merged = resolved, merged
        self.has_magnitudes = any(e.use in MAGNITUDES for adapter in adapters for e in adapter.extras)
        self.extras = gather(adapters)
        self.index = base_names.NameIndex.of(checkpoint)
        self.targets = {t.name for adapter in resolved for t in targets_of(adapter)}
        self.updated = {name for adapter in resolved for name in updated(adapter)}
        self.prefixes = {
            self._prefix(own.name, stored.name)
            for adapter, other in zip(adapters, resolved, strict=True)
            for own, stored in zip(targets_of(adapter), targets_of(other), strict=True)
            if stored.name in checkpoint.tensors
        }
        self.asks_class = self._asks_class()
        self.known = ties.of(self.config) if self.asks_class else None
        self.ties = () if self.known is None else self.known.ties(checkpoint)
        self.vocabulary = tied_tensors.vocabulary(self.known, checkpoint) if self.asks_class else []
        self.tied_names = {name for tie in self.ties for name in tie.names}
        self.merged |= {self.name_of(name) for name in merged}
        self.rows = {e.name: self._row_places(e.name) for a in adapters for e in a.extras if e.use == "rows"}
        self.replaced: dict[str, ExtraTensor] = {}
        self.values: dict[str, ExtraTensor] = {}
        self.added: list[ExtraTensor] = []
        self.copies: dict[str, str] = {}
        self.changes: dict[str, Any] = {}

    @property
    def architecture(self) -> str:
        """The class of the base, or ""."""
        named = self.config.get("architectures")
        return named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""

    @property
    def new_prefix(self) -> str:
        """The text that the names of the base lack in front, if it has to be added."""
        return next(iter(self.prefixes)) or "" if len(self.prefixes) == 1 else ""

    def is_changed(self, name: str | None) -> bool:
        """Return whether a stored tensor gets other bits, as far as settled."""
        if name is None:
            return False
        if name in self.updated or name in self.values:
            return True
        extra = self.replaced.get(name)
        return extra is not None and not same_bytes(extra, self.checkpoint.tensors[name], self.checkpoint)

    def name_of(self, name: str) -> str:
        """The name that the class has for a tensor that is not stored, if it shares it with a stored one."""
        place = None if self.known is None else self.known.find(name)
        return place if place is not None and place in self.tied_names else name

    def _asks_class(self) -> bool:
        """Return whether the adapter touches what only transformers' class of the base tells."""
        if not self.extras and self.targets <= self.checkpoint.tensors.keys() and ties.shares_nothing(self.config):
            return False
        names = {t.name for adapter in self.adapters for t in targets_of(adapter)} | self.targets
        names |= {extra.name for adapter in self.adapters for extra in adapter.extras}
        return any(ties.may_be_tied(name, self.config) for name in names)

    def _row_places(self, name: str) -> tuple[str, ...]:
        """The tensors that trained rows go into: with the input embedding, all that share it, as in PEFT."""
        place = self.index.find(name)
        if self.known is None:
            place = place or base_names.tied_source(name, self.checkpoint)
            ends = self.vocabulary if base_names.ties_embeddings(self.config) else []
            return () if place is None else tuple(dict.fromkeys((place, *(ends if place in ends else ()))))
        tie = next((t for t in self.ties if self.known.find(name) in t.names), None)
        if tie is None:
            return () if place is None else (place,)
        others = {self.known.find(e.name) for a in self.adapters for e in a.extras if e.use == "rows"}
        if tie.is_input and self.known.find(name) in self.known.architecture.inputs and len(others & {*tie.names}) == 1:
            return tuple(tie.stored.values())
        return (place or self.name_of(name),)

    def _prefix(self, own: str, stored: str) -> str | None:
        """Return what the adapter's name has before the stored one, None if they differ otherwise. Of names that a
        release renamed only those of a bare model lack a prefix: what others differ in at the front is renaming."""
        if own.endswith(stored):
            return own.removesuffix(stored)
        own, stored = self.index.canonical(own), self.index.canonical(stored)
        if not (own.endswith(stored) or stored.endswith(own)):
            return None
        return own.removesuffix(stored) if head_names.is_bare(self.architecture) and own.endswith(stored) else ""
