"""The places of an adapter's extra tensors in a merged model, and what follows: names, configuration, ties.

An adapter that was trained for a task carries its head (``classifier``, ``score``) and perhaps whole embeddings. The
merged model is the one that PEFT's ``merge_and_unload().save_pretrained()`` writes: the head under its own name, the
architecture that has it, its labels in the configuration, without the head it takes the place of. Nothing is guessed
from a live model: what the names, the task and the base's configuration do not settle is refused (E-PLACE).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lrconvert.core.dtypes import FLOATS
from lrconvert.core.errors import PlacementError
from lrconvert.io.checkpoint import Checkpoint
from lrconvert.lora import architecture, base_names, ties
from lrconvert.lora.adapter import ExtraTensor
from lrconvert.lora.architecture import TIE
from lrconvert.lora.ties import BaseClass, Tie
from lrconvert.merge.plan import tied_tensors
from lrconvert.merge.plan.updates import Adapter, targets_of
from lrconvert.merge.plan.whole_tensors import (
    cast,
    gather,
    no_place,
    same_bytes,
    same_tensor,
    same_values,
    updated,
    whole,
)

# The class of a task, as transformers names it after the architecture.
_CLASSES = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
_STEM = re.compile(r"(.+?)(?:PreTrainedModel|Model|LMHeadModel|DoubleHeadsModel|For[A-Z]\w*)")
_NAME_LENGTH = 256  # of a class; the patterns here take quadratic time
_LANGUAGE_MODEL = re.compile(r".*(?:LMHeadModel|DoubleHeadsModel|ForCausalLM|ForConditionalGeneration)")
_HEADLESS = re.compile(r".*(?:Model|ForSequenceClassification|ForTokenClassification|ForQuestionAnswering)")
# First segments of names that are a head, where a checkpoint was saved without its architecture's prefix.
_HEAD_MODULES = frozenset(
    (
        *("lm_head", "embed_out", "cls", "predictions", "final_logits_bias", "vocab_projector", "vocab_transform"),
        *("vocab_layer_norm", "generator_predictions", "generator_lm_head", "discriminator_predictions"),
        *("classifier", "score", "qa_outputs", "classification_head", "multiple_choice_head", "pre_classifier"),
        *("sop_classifier", "lm_predictions", "mask_predictions", "logits_proj"),
    )
)
_TASK_HEADS = _HEAD_MODULES - {"lm_head", "embed_out"}
# Parts of a task's class beside its base model and its last layer: those of the base serve, as they do for PEFT.
_SEQUENCES = ("ForSequenceClassification",)
_PARTS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "bert": ("bert.pooler.", _SEQUENCES),
    "albert": ("albert.pooler.", _SEQUENCES),
    "deberta": ("pooler.", _SEQUENCES),
    "deberta-v2": ("pooler.", _SEQUENCES),
    "modernbert": ("head.", tuple(_CLASSES.values())),
    **dict.fromkeys(("t5", "mt5", "umt5", "bart", "mbart"), ("classification_head.", _SEQUENCES)),
}
# The last layer of a head: its rows are the labels.
_LAST_LAYERS = ("out_proj.weight", "classifier.weight", "score.weight", "qa_outputs.weight")
# Families of encoders and decoders whose classes for tokens have the encoder alone.
_T5_LIKE = frozenset({"t5", "mt5", "umt5", "longt5", "switch_transformers"})
_BASE_LAYER = ".base_layer."


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


def place(
    adapters: Sequence[Adapter], resolved: Sequence[Adapter], checkpoint: Checkpoint, merged: frozenset[str]
) -> Placement:
    """Return the placement of all extra tensors. `resolved` are the adapters after `base_names.resolve`, `merged` the
    whole tensors in them that have an update in them already.

    Raises E-PLACE for a tensor without a place, E-BASE for an ambiguous name.
    """
    try:
        return _Planner(adapters, resolved, checkpoint, merged).plan()
    except PlacementError as error:
        raise error.at(checkpoint.root) from None


class _Planner:
    def __init__(
        self, adapters: Sequence[Adapter], resolved: Sequence[Adapter], checkpoint: Checkpoint, merged: frozenset[str]
    ) -> None:
        self.adapters, self.checkpoint, self.config = adapters, checkpoint, checkpoint.config
        self.resolved, self.merged = resolved, merged
        self.has_magnitudes = any(extra.use == "magnitude" for adapter in adapters for extra in adapter.extras)
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
        self.merged |= {self._name(name) for name in merged}
        self.rows = {e.name: self._row_places(e.name) for a in adapters for e in a.extras if e.use == "rows"}
        self.replaced: dict[str, ExtraTensor] = {}
        self.values: dict[str, ExtraTensor] = {}
        self.added: list[ExtraTensor] = []
        self.copies: dict[str, str] = {}
        self.changes: dict[str, Any] = {}

    def plan(self) -> Placement:
        for extra in self.extras:
            if _BASE_LAYER in f".{extra.name}":
                self._place_base_layer(extra)
            else:
                self._place_extra(extra)
        architecture = self._new_architecture()
        self._check_shapes()
        dropped: tuple[str, ...] = ()
        if architecture:
            self.changes["architectures"] = [architecture]
            if self._encodes(architecture):
                self.changes.update(is_encoder_decoder=False, use_cache=False)
            dropped = tuple(self._old_head(architecture))
        elif self.known is not None:
            self._settle_ties(self.known)
        elif self.asks_class:
            self._guess_ties()
        if self.added or self.copies:
            self._check_added(architecture)
        prefix = self._new_prefix if architecture or self.added or self.copies else ""
        self._check_complete(architecture, dropped, prefix)
        effect = bool(self.added or self.values or any(map(self._changes, self.replaced)))
        config = self._config_changes()
        added = tuple(sorted(self.added, key=lambda extra: extra.name))
        return Placement(self.replaced, self.values, added, self.copies, dropped, prefix, config, effect, self.rows)

    # --- one tensor ---

    def _asks_class(self) -> bool:
        """Return whether the adapter touches what only transformers' class of the base tells."""
        if not self.extras and self.targets <= self.checkpoint.tensors.keys() and ties.shares_nothing(self.config):
            return False
        names = {t.name for adapter in self.adapters for t in targets_of(adapter)} | self.targets
        names |= {extra.name for adapter in self.adapters for extra in adapter.extras}
        return any(ties.may_be_tied(name, self.config) for name in names)

    def _name(self, name: str) -> str:
        """The name that the class has for a tensor that is not stored, if it shares it with a stored one."""
        place = None if self.known is None else self.known.find(name)
        return place if place is not None and place in self.tied_names else name

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
        return (place or self._name(name),)

    def _place_base_layer(self, extra: ExtraTensor) -> None:
        """The base's own weight, which PEFT stores beside the LoRA of an embedding or head."""
        name = extra.name.replace("base_layer.", "")
        stored = self.index.find(name) or base_names.tied_source(name, self.checkpoint)
        if stored is None:
            raise no_place(extra, f"the base has no {name!r}")
        info = self.checkpoint.tensors[stored]
        if info.shape != extra.shape:
            raise no_place(
                extra, f"it is {list(extra.shape)}, the base's {stored!r} {list(info.shape)}", "resize the base first"
            )
        if info.dtype not in FLOATS or extra.dtype not in FLOATS:
            raise no_place(extra, f"it is {extra.dtype}, the base's {stored!r} {info.dtype}")
        if not same_values(extra, info, self.checkpoint):
            target = self.index.find(name) or self._name(name)
            self.values[target] = cast(extra, info.dtype)

    def _place_extra(self, extra: ExtraTensor) -> None:
        stored = self.index.find(extra.name)
        if extra.name.partition(".")[0] in _TASK_HEADS and stored != extra.name:
            stored = None  # a head of another name (`sop_classifier.classifier`) is another head
        if (stored or extra.name) in self.targets:
            raise no_place(extra, "it is also a target of an update")
        if stored is not None:
            self.replaced[stored] = extra
        else:
            self.added.append(replace(extra, name=self._name(extra.name)))

    # --- the architecture ---

    def _prefix(self, own: str, stored: str) -> str | None:
        """Return what the adapter's name has before the stored one, None if they differ otherwise. Of names that a
        release renamed only those of a bare model lack a prefix: what others differ in at the front is renaming."""
        if own.endswith(stored):
            return own.removesuffix(stored)
        own, stored = self.index.canonical(own), self.index.canonical(stored)
        if not (own.endswith(stored) or stored.endswith(own)):
            return None
        bare = self._architecture.endswith("Model") and not _LANGUAGE_MODEL.fullmatch(self._architecture)
        return own.removesuffix(stored) if bare and own.endswith(stored) else ""

    @property
    def _new_prefix(self) -> str:
        """The text that the names of the base lack in front, if it has to be added."""
        return next(iter(self.prefixes)) or "" if len(self.prefixes) == 1 else ""

    @property
    def _architecture(self) -> str:
        named = self.config.get("architectures")
        return named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""

    def _heads(self) -> list[ExtraTensor]:
        """Return the extras outside the base model: tensors of a task's head."""
        inside = self._base_prefix()
        heads = [e for name, e in self.replaced.items() if not _inside(e.name, inside) and not _inside(name, inside)]
        return [*heads, *(e for e in self.added if not (e.name in self.tied_names or self._is_usual_head(e.name)))]

    def _is_usual_head(self, name: str) -> bool:
        """Return whether an output head is taken for one by its name, as the class is not known."""
        return self.known is None and name.endswith(base_names.HEADS)

    def _base_prefix(self) -> str:
        """Return the first segment, with its dot, of every name inside the base model ("bert."), or ""."""
        firsts = {t.name.partition(".")[0] for adapter in self.adapters for t in targets_of(adapter)} - _HEAD_MODULES
        return f"{next(iter(firsts))}." if len(firsts) == 1 else ""

    def _new_architecture(self) -> str:
        """Return the architecture that the heads need, or "" if it is the base's own."""
        heads = self._heads()
        if not heads:
            return ""
        classes = {self._class_of(adapter) for adapter in self.adapters if whole(adapter)} - {""}
        if len(classes) > 1:
            both = " and ".join(sorted(classes))
            raise PlacementError(f"the adapters bring heads of {both}", fix="merge one of them")
        return next(iter(classes), "") if classes != {self._architecture} else ""

    def _class_of(self, adapter: Adapter) -> str:
        named = adapter.provenance.fields.get("base_model_class", "")
        if named:
            return named
        suffix = _CLASSES.get(adapter.provenance.task_type)
        stem = _STEM.fullmatch(self._architecture[:_NAME_LENGTH])
        return f"{stem[1]}{suffix}" if suffix and stem else ""

    def _check_added(self, architecture: str) -> None:
        """Raise E-PLACE for an added tensor that is neither of a head of the merged architecture nor an untied output
        head."""
        for extra in self.added:
            if not architecture and extra.name in self.tied_names:
                continue
            if extra.name.endswith(base_names.HEADS):
                if not architecture and not self._is_headless and base_names.tied_source(extra.name, self.checkpoint):
                    continue
                raise no_place(extra, "the base has no such tensor")
            if not architecture and self._class_of_heads() != self._architecture:
                raise no_place(
                    extra,
                    "the base has no such tensor, and the adapter's task does not say which architecture has it",
                    "set task_type in adapter_config.json (SEQ_CLS, TOKEN_CLS, QUESTION_ANS)",
                )
            of_head = extra.name.partition(".")[0] in _HEAD_MODULES or extra.name.startswith(self._part(architecture))
            if not of_head and _inside(extra.name, self._base_prefix()):
                raise no_place(extra, "the base has no such tensor")
        if architecture and len(self.prefixes) != 1:
            raise PlacementError("the names of the adapter's targets do not show how the base model is named")

    def _encodes(self, architecture: str) -> bool:
        """Return whether the class has no decoder although others of its family do."""
        return architecture.endswith("ForTokenClassification") and self.config.get("model_type") in _T5_LIKE

    def _part(self, architecture: str) -> str:
        """Return the beginning of names that `architecture` has beside its base model and last layer; "." for none."""
        part, classes = _PARTS.get(str(self.config.get("model_type")), (".", ()))
        return part if architecture.endswith(classes) else "."

    def _check_complete(self, architecture: str, dropped: Sequence[str], prefix: str) -> None:
        """Raise E-PLACE if the task needs what neither the base nor the adapter has. PEFT saves only the modules that
        it is told to save; others it drew at random, and draws again."""
        part = self._part(architecture)
        names = [prefix + name for name in self.checkpoint.tensors if name not in dropped]
        if part != "." and not any(name.startswith(part) for name in (*names, *(e.name for e in self.added))):
            raise PlacementError(
                f"{architecture} needs {part.strip('.')!r}, which neither the base nor the adapter has",
                fix="train the adapter with it in modules_to_save",
            )
        tasks = [_CLASSES.get(adapter.provenance.task_type, "") for adapter in self.adapters]
        task = next((t for t in tasks if t not in self._architecture), "")
        if task and self._architecture and not self._heads():
            raise PlacementError(
                f"the adapter's task needs a model {task}, and neither it nor the base has the head",
                fix="train it with the head in modules_to_save, or take task_type out of adapter_config.json",
            )

    def _class_of_heads(self) -> str:
        return next((c for a in self.adapters if whole(a) and (c := self._class_of(a))), "")

    def _old_head(self, architecture: str) -> Iterable[str]:
        """Return the stored tensors that the new architecture lacks: another head, a pooler or decoder without use."""
        prefix, part = self._base_prefix(), self._part(architecture)
        has_prefix = self.prefixes == {""}
        pooled = architecture.endswith("ForSequenceClassification") and not any(
            e.name.endswith("out_proj.weight") for e in self._heads()
        )
        unused = (*(() if pooled else ("pooler.",)), *(("decoder.",) if self._encodes(architecture) else ()))
        for name in self.checkpoint.tensors:
            if name in self.replaced or (self._new_prefix + name).startswith(part):
                continue
            outside = not name.startswith(prefix) if has_prefix else name.partition(".")[0] in _HEAD_MODULES
            if outside or name.removeprefix(prefix).startswith(unused):
                if name in self.targets:
                    raise PlacementError(f"{name!r} is a target of the adapter, but {architecture} does not have it")
                yield name

    # --- shapes ---

    def _check_shapes(self) -> None:
        """Raise E-PLACE where a tensor has another shape than the one it replaces, but for rows of a task's head and of
        the vocabulary."""
        vocabulary = set()
        heads = {e.name for e in self._heads()}
        for stored, extra in self.replaced.items():
            info = self.checkpoint.tensors[stored]
            if extra.shape == info.shape:
                continue
            rows_only = len(extra.shape) == len(info.shape) and extra.shape[1:] == info.shape[1:]
            if rows_only and stored in self.vocabulary:
                vocabulary.add(extra.shape[0])
            elif not rows_only or extra.name not in heads:
                raise no_place(extra, f"it is {list(extra.shape)}, the base's {stored!r} {list(info.shape)}")
        if vocabulary:
            self._resize_vocabulary(vocabulary)

    def _resize_vocabulary(self, sizes: set[int]) -> None:
        """Raise E-PLACE unless all stored embeddings and heads were replaced by ones of one size."""
        stale = [name for name in self.vocabulary if name not in self.replaced]
        if len(sizes) > 1 or stale:
            what = f"{stale[0]!r} keeps its own" if stale else f"tensors disagree on it: {sorted(sizes)}"
            raise PlacementError(
                f"the adapter changes the size of the vocabulary, but {what}",
                fix="resize the base first: model.resize_token_embeddings(), save it, and merge into that",
            )
        size = sizes.pop()
        text = self.config.get("text_config")
        if isinstance(text, dict) and "vocab_size" in text:
            self.changes["text_config"] = {**text, "vocab_size": size}
        if "vocab_size" in self.config or "text_config" not in self.changes:
            self.changes["vocab_size"] = size

    # --- tied embeddings ---

    def _settle_ties(self, known: BaseClass) -> None:
        """Make tensors of their own of shared ones that do not change alike."""
        broken = []
        for tie in self.ties:
            self._follow_resized(tie)
            if len({self._content(tie.stored.get(name, name)) for name in tie.names}) > 1:
                broken.append(tie)
            else:  # what is not stored is what it is tied to, an output head the embedding
                self.added = [extra for extra in self.added if extra.name not in tie.names]
        added = {extra.name for extra in self.added}
        untied = tied_tensors.untie(known, self.ties, broken, self.checkpoint, added)
        self.copies.update(untied.copies)
        for tie in self.ties:
            for name in (n for n in tie.names if n in untied.copies and tie not in broken):  # as all of its tie
                if tie.origin in self.replaced:
                    self.added.append(replace(self.replaced[tie.origin], name=name))
                    del self.copies[name]
                for extra, places in self.rows.items():
                    if set(places) >= set(tie.stored.values()):
                        self.rows[extra] = (*places, name)
        for key, value in untied.config.items():
            both = isinstance(value, dict) and key in self.changes
            self.changes[key] = {**value, **self.changes[key], TIE: False} if both else value

    def _follow_resized(self, tie: Tie) -> None:
        """Give a resized tensor to the stored names of its tie that the adapter does not change: they have its rows."""
        shape = self.checkpoint.tensors[tie.origin].shape
        extras = [self.replaced[name] for name in tie.stored.values() if name in self.replaced]
        extras += [extra for extra in self.added if extra.name in tie.names]
        resized = [extra for extra in extras if extra.shape != shape]
        if resized and all(same_tensor(extra, resized[0]) for extra in resized) and resized[0].name not in self.merged:
            for name in tie.stored.values():
                if self._content(name) is None:
                    self.replaced[name] = replace(resized[0], name=name)

    def _content(self, name: str) -> Any:
        """Return what the tensor of this name gets: None for the base's values, and equal for equal ones."""
        rows = frozenset(extra for extra, places in self.rows.items() if name in places)
        shared = next((tie for tie in self.ties if name in tie.names and name not in tie.stored), None)
        if shared is not None:  # it follows the stored ones if those rows are of all
            rows |= {extra for extra, places in self.rows.items() if {*shared.stored.values()} == {*places}}
        if name in self.values or (name in self.updated and self.has_magnitudes):
            return name
        if name in self.updated:
            return tied_tensors.factors(name, self.resolved)
        extra = self.replaced.get(name) or next((e for e in self.added if e.name == name), None)
        if extra is None:
            return rows or None
        stored = self.checkpoint.tensors[shared.origin if shared else name]
        same = same_bytes(extra, stored, self.checkpoint)
        return None if same else (extra.dtype, extra.shape, extra.data, rows)

    def _guess_ties(self) -> None:
        """The same where transformers has no class for the base: as far as its configuration and its tensors show, and
        refused where they do not. Raises E-PLACE."""
        family = architecture.of(self.config)
        if ties.states_no_tie(self.config) or (family is not None and not family.is_tied):
            return
        for name in sorted(self.updated - self.checkpoint.tensors.keys()):
            source = base_names.tied_source(name, self.checkpoint)
            if source is not None:  # an output head that is not stored, not a stack that is stored in parts
                self.copies[name] = source
        vocabulary = self.vocabulary
        embedding = next((n for n in vocabulary if not n.endswith(base_names.HEADS)), None)
        if self._head_equals(embedding):
            return
        new_head = bool(self.copies) or any(e.name.endswith(base_names.HEADS) for e in self.added)
        if not (new_head or any(self._changes(name) for name in vocabulary)) or (self._is_headless and not new_head):
            return
        replaced = [self.replaced.get(name) for name in vocabulary]
        alike = [e for e in replaced if e is not None and replaced[0] is not None and same_tensor(e, replaced[0])]
        if len(vocabulary) > 1 and len(alike) == len(vocabulary):
            return
        if (len(vocabulary) < 2 and not new_head) or (family is not None and family.computes_by_tie):
            raise PlacementError(
                f"{embedding!r} may be tied to an output layer, and transformers has no class {self._architecture!r} "
                "that tells",
                fix='state "tie_word_embeddings": false in the config.json of the base if it has none',
            )
        if new_head or self.config.get(TIE) is not None:
            self.changes[TIE] = False
        text = self.config.get("text_config")
        if isinstance(text, dict) and TIE in text:
            self.changes["text_config"] = {**self.changes.get("text_config", text), TIE: False}

    def _changes(self, name: str | None) -> bool:
        if name is None:
            return False
        if name in self.updated or name in self.values:
            return True
        extra = self.replaced.get(name)
        return extra is not None and not same_bytes(extra, self.checkpoint.tensors[name], self.checkpoint)

    def _head_equals(self, embedding: str | None) -> bool:
        """Return whether the adapter brings an output head that is the embedding it is tied to; it is then left out."""
        head = next((e for e in self.added if e.name.endswith(base_names.HEADS)), None)
        if head is None or embedding is None or embedding in self.updated or embedding in self.values:
            return False
        if not same_bytes(head, self.replaced.get(embedding) or self.checkpoint.tensors[embedding], self.checkpoint):
            return False
        self.added.remove(head)
        return True

    @property
    def _is_headless(self) -> bool:
        """True if the base's architecture is known to have no output head."""
        named = self._architecture
        return not _LANGUAGE_MODEL.fullmatch(named) and _HEADLESS.fullmatch(named) is not None

    # --- configuration ---

    def _config_changes(self) -> dict[str, Any]:
        changes = dict(self.changes)
        last = [e for e in self._heads() if len(e.shape) == 2 and e.name.endswith(_LAST_LAYERS)]
        last.sort(key=lambda e: _LAST_LAYERS.index(next(tail for tail in _LAST_LAYERS if e.name.endswith(tail))))
        if last:
            changes.update(self._labels(last[0].shape[0]))
        return {key: value for key, value in changes.items() if self.config.get(key) != value}

    def _labels(self, count: int) -> dict[str, Any]:
        """Return the fields for that many labels as transformers writes them: two is its default, not written."""
        named = self.config.get("id2label")
        before = len(named) if isinstance(named, dict) else self.config.get("num_labels", 2)
        if count == before:
            return {}
        if count == 2:
            return {"id2label": None, "label2id": None, "num_labels": None}
        labels = [f"LABEL_{i}" for i in range(count)]
        return {
            "id2label": {str(i): label for i, label in enumerate(labels)},
            "label2id": {label: i for i, label in enumerate(labels)},
            "num_labels": None,
        }


def _inside(name: str, prefix: str) -> bool:
    """Return whether a name lies inside the base model, stored with or without its prefix."""
    return name.startswith(prefix) if prefix else name.partition(".")[0] not in _HEAD_MODULES
