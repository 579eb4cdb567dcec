"""Which call of transformers loads a base with a place for an adapter's head."""

from __future__ import annotations

from lrconvert.core.wording import either
from lrconvert.formats.model_card import auto_class
from lrconvert.live.attached_adapter import Adapter
from lrconvert.merge.plan.head_names import LAST_LAYERS


def advice(adapter: Adapter) -> str:
    """Return how to load the base of an adapter with the class of its task, and with as many labels as its head has."""
    heads = [extra for extra in adapter.extras if extra.use == "replace" and extra.name.endswith(LAST_LAYERS)]
    labels = f", num_labels={heads[0].shape[0]}" if heads and heads[0].shape else ""
    name = auto_class(adapter.provenance.task_type) or "AutoModelFor..."
    call = f"transformers.{name}.from_pretrained(...{labels})"
    return either(
        f"load the adapter's own base with {call}", f"save the base once as {call} loads it, and give that folder"
    )
