"""The class of transformers that has a place for an adapter's head, and the call that loads it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrconvert.core.errors import PlacementError
from lrconvert.core.wording import either
from lrconvert.formats.model_card import auto_class
from lrconvert.live.attached_adapter import Adapter
from lrconvert.lora.adapter import ExtraTensor
from lrconvert.lora.base_names import NameIndex
from lrconvert.merge.plan.head_names import CLASSES, LAST_LAYERS, class_of


def advice(adapter: Adapter) -> str:
    """Return how to load the base of an adapter with the class of its task, and with as many labels as its head has."""
    heads = _heads(adapter)
    labels = f", num_labels={heads[0].shape[0]}" if heads and heads[0].shape else ""
    name = auto_class(adapter.provenance.task_type) or "AutoModelFor..."
    call = f"transformers.{name}.from_pretrained(...{labels})"
    return either(
        f"load the adapter's own base with {call}", f"save the base once as {call} loads it, and give that folder"
    )


@dataclass(frozen=True)
class TaskClass:
    """The name of a class of transformers, and how many labels its head has."""

    name: str
    labels: int


def needed(adapter: Adapter, config: Any, named: str) -> TaskClass | None:
    """Return the class that an adapter's own head needs where that of the base, `named` by its `config`, has no such
    place; None if the base serves as it is, or the adapter does not say its task."""
    import transformers

    heads, architecture = _heads(adapter), named or f"{type(config).__name__.removesuffix('Config')}Model"
    wanted = class_of(adapter, architecture)
    if not heads or not heads[0].shape or not wanted.endswith(tuple(CLASSES.values())):
        return None
    labels = heads[0].shape[0]
    if named.endswith(tuple(CLASSES.values())) and (named != wanted or config.num_labels == labels):
        return None
    name = wanted if hasattr(transformers, wanted) else auto_class(adapter.provenance.task_type)
    return TaskClass(name, labels) if name else None


def check(adapter: Adapter, names: NameIndex, made_up: Iterable[str], base: Path) -> None:
    """Raise E-PLACE if transformers made up a parameter that the adapter does not bring: with random numbers it is not
    the model that the adapter was trained on. `names` are those of the model."""
    own = {names.find(extra.name.replace("base_layer.", "")) for extra in adapter.extras if extra.use == "replace"}
    lacking = sorted(set(made_up) - own)
    if lacking:
        more = f" nor {len(lacking) - 1} more" if len(lacking) > 1 else ""
        what = f"the class of the adapter's task needs {lacking[0]!r:.160}, which the base lacks{more}, and the adapter"
        fix = "save the base once with the numbers that the adapter was trained on, and give that folder"
        raise PlacementError(f"{what} does not bring it", fix=fix, path=base)


def _heads(adapter: Adapter) -> list[ExtraTensor]:
    """The last layers of heads that an adapter brings."""
    return [extra for extra in adapter.extras if extra.use == "replace" and extra.name.endswith(LAST_LAYERS)]
