"""Names that a layout spells in its own way, where no base says what they mean: kohya's are taken apart by the words
that diffusers and CLIP have for their modules, others are refused."""

from __future__ import annotations

import re
from pathlib import Path

from lrconvert.core.errors import ExportError
from lrconvert.core.wording import spelled
from lrconvert.formats import unet_names
from lrconvert.formats.base_class import renamed_by
from lrconvert.formats.readers.kohya import sgm
from lrconvert.formats.readers.shared import naming
from lrconvert.formats.readers.shared.naming import Component
from lrconvert.lora.adapter import Adapter, LoraAdapter

# Names of kohya, GGUF, LoRA-ViT and cloneofsimo.
_SPELLED = re.compile(r"(?:lora|lycoris)_[a-z0-9]+_[^.]+\.weight|blk\.\d+\..+|w_\d{5}\.weight|[a-z_0-9]+:\d+\.weight")
_KOHYA = re.compile(r"(?:lora|lycoris)_(?P<role>unet|transformer|te|te1|te2)_(?P<inside>[^.]+)\.weight")
_IN_UNETS = re.compile(r"(?:down_blocks|up_blocks|mid_block|conv_in|conv_out|time_embedding|add_embedding)\b")
_CLIP = ("text_model", "encoder", "layers", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj", "mlp", "fc1", "fc2")
_TEXT_ENCODERS = {"te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2"}
_UNET = Component("", Path(), {"_class_name": unet_names.CLASS}, {})


def resolved(adapter: Adapter) -> tuple[Adapter, tuple[str, ...]]:
    """Return a LoRA with names of modules that other programs know, and notes. Raises E-EXPORT where that needs a
    base."""
    own = [target.name for target in adapter.shapes() if _SPELLED.fullmatch(target.name)]
    if not own or not isinstance(adapter, LoraAdapter):
        return adapter, ()
    names = {name: _taken_apart(name) for name in own}
    unknown = next((name for name, module in names.items() if module is None), None)
    if unknown is not None:
        layout = adapter.provenance.fields.get("source_format", "")
        what = f"no base was given that says what the names of the layout {layout} mean, {unknown!r:.120} for one"
        raise ExportError(what, fix=f"give {spelled('base', ...)}; its config.json is enough")
    note = f"names were taken apart without a base: {own[0]!r:.120} is {names[own[0]]!r:.120}"
    return renamed_by(adapter, lambda name: names.get(name) or name), (note,)


def _taken_apart(name: str) -> str | None:
    """The parameter that one of kohya's names means, None if it may be one of several, or is none that is known."""
    match = _KOHYA.fullmatch(name)
    if match is None:
        return None
    inside, model = match["inside"], _TEXT_ENCODERS.get(match["role"])
    ways = naming.parses(inside, _CLIP) if model else naming.parses(sgm.renamed(inside, _UNET))
    if len(ways) != 1:
        return None
    in_unet = match["role"] == "unet" and _IN_UNETS.match(ways[0])
    return f"{model or ('unet' if in_unet else 'transformer')}.{ways[0]}.weight"
