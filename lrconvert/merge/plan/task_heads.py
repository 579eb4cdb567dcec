"""Heads of tasks that adapters bring: the architecture that the merged model has then, and what that leaves out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lrconvert.core.errors import PlacementError
from lrconvert.lora import base_names
from lrconvert.lora.adapter import ExtraTensor
from lrconvert.merge.plan import head_names
from lrconvert.merge.plan.placement import Draft
from lrconvert.merge.plan.updates import targets_of
from lrconvert.merge.plan.whole_tensors import no_place, whole


def heads(draft: Draft) -> list[ExtraTensor]:
    """Return the extras outside the base model: tensors of a task's head."""
    inside = _base_prefix(draft)
    outside = [
        e
        for name, e in draft.replaced.items()
        if not head_names.is_inside(e.name, inside) and not head_names.is_inside(name, inside)
    ]
    return [*outside, *(e for e in draft.added if not (e.name in draft.tied_names or _is_usual_head(draft, e.name)))]


def new_architecture(draft: Draft) -> str:
    """Return the architecture that the heads need, or "" if it is the base's own."""
    if not heads(draft):
        return ""
    classes = {head_names.class_of(adapter, draft.architecture) for adapter in draft.adapters if whole(adapter)} - {""}
    if len(classes) > 1:
        both = " and ".join(sorted(classes))
        raise PlacementError(f"the adapters bring heads of {both}", fix="merge one of them")
    return next(iter(classes), "") if classes != {draft.architecture} else ""


def old_head(draft: Draft, architecture: str) -> Iterable[str]:
    """Return the stored tensors that the new architecture lacks: another head, a pooler or decoder without use."""
    prefix, part = _base_prefix(draft), head_names.part_of(architecture, draft.config)
    has_prefix = draft.prefixes == {""}
    pooled = architecture.endswith("ForSequenceClassification") and not any(
        e.name.endswith("out_proj.weight") for e in heads(draft)
    )
    unused = (
        *(() if pooled else ("pooler.",)),
        *(("decoder.",) if head_names.has_no_decoder(architecture, draft.config) else ()),
    )
    for name in draft.checkpoint.tensors:
        if name in draft.replaced or (draft.new_prefix + name).startswith(part):
            continue
        outside = not name.startswith(prefix) if has_prefix else name.partition(".")[0] in head_names.HEAD_MODULES
        if outside or name.removeprefix(prefix).startswith(unused):
            if name in draft.targets:
                raise PlacementError(f"{name!r} is a target of the adapter, but {architecture} does not have it")
            yield name


def check_added(draft: Draft, architecture: str) -> None:
    """Raise E-PLACE for an added tensor that is neither of a head of the merged architecture nor an untied output
    head."""
    for extra in draft.added:
        if not architecture and extra.name in draft.tied_names:
            continue
        if extra.name.endswith(base_names.HEADS):
            if (
                not architecture
                and not head_names.is_headless(draft.architecture)
                and base_names.tied_source(extra.name, draft.checkpoint)
            ):
                continue
            raise no_place(extra, "the base has no such tensor")
        if not architecture and _class_of_heads(draft) != draft.architecture:
            raise no_place(
                extra,
                "the base has no such tensor, and the adapter's task does not say which architecture has it",
                "set task_type in adapter_config.json (SEQ_CLS, TOKEN_CLS, QUESTION_ANS)",
            )
        of_head = extra.name.partition(".")[0] in head_names.HEAD_MODULES or extra.name.startswith(
            head_names.part_of(architecture, draft.config)
        )
        if not of_head and head_names.is_inside(extra.name, _base_prefix(draft)):
            raise no_place(extra, "the base has no such tensor")
    if architecture and len(draft.prefixes) != 1:
        raise PlacementError("the names of the adapter's targets do not show how the base model is named")


def check_complete(draft: Draft, architecture: str, dropped: Sequence[str], prefix: str) -> None:
    """Raise E-PLACE if the task needs what neither the base nor the adapter has. PEFT saves only the modules that
    it is told to save; others it drew at random, and draws again."""
    part = head_names.part_of(architecture, draft.config)
    names = [prefix + name for name in draft.checkpoint.tensors if name not in dropped]
    if part != "." and not any(name.startswith(part) for name in (*names, *(e.name for e in draft.added))):
        raise PlacementError(
            f"{architecture} needs {part.strip('.')!r}, which neither the base nor the adapter has",
            fix="train the adapter with it in modules_to_save",
        )
    tasks = [head_names.CLASSES.get(adapter.provenance.task_type, "") for adapter in draft.adapters]
    task = next((t for t in tasks if t not in draft.architecture), "")
    if task and draft.architecture and not heads(draft):
        raise PlacementError(
            f"the adapter's task needs a model {task}, and neither it nor the base has the head",
            fix="train it with the head in modules_to_save, or take task_type out of adapter_config.json",
        )


def _is_usual_head(draft: Draft, name: str) -> bool:
    """Return whether an output head is taken for one by its name, as the class is not known."""
    return draft.known is None and name.endswith(base_names.HEADS)


def _base_prefix(draft: Draft) -> str:
    """Return the first segment, with its dot, of every name inside the base model ("bert."), or ""."""
    firsts = {
        t.name.partition(".")[0] for adapter in draft.adapters for t in targets_of(adapter)
    } - head_names.HEAD_MODULES
    return f"{next(iter(firsts))}." if len(firsts) == 1 else ""


def _class_of_heads(draft: Draft) -> str:
    return next((c for a in draft.adapters if whole(a) and (c := head_names.class_of(a, draft.architecture))), "")
