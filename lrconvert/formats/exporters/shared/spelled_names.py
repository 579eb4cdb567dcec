"""Names that a layout spells in its own way, as the layout that is written has them.

Modules of diffusion transformers go by the tables of their family (`lrconvert.formats.families`), those of UNets and
CLIP are taken apart by the words that diffusers and CLIP have for them; what no base and no table explains is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lrconvert.core.errors import ExportError
from lrconvert.core.wording import spelled
from lrconvert.formats import unet_names
from lrconvert.formats.base_class import renamed_by
from lrconvert.formats.families import base as families
from lrconvert.formats.families.base import DIFFUSERS
from lrconvert.formats.families.shared import spelling, translate
from lrconvert.formats.families.shared.translate import Reading
from lrconvert.formats.readers.kohya import sgm
from lrconvert.formats.readers.shared import naming
from lrconvert.formats.readers.shared.naming import Component
from lrconvert.lora.adapter import Adapter, CompactAdapter, ExtraTensor, Target
from lrconvert.methods.shared.plain_lora import plain_lora

# Names of kohya, GGUF, LoRA-ViT and cloneofsimo.
_SPELLED = re.compile(r"(?:lora|lycoris)_[a-z0-9]+_[^.]+\.weight|blk\.\d+\..+|w_\d{5}\.weight|[a-z_0-9]+:\d+\.weight")
_KOHYA = re.compile(r"(?:lora|lycoris)_(?P<role>unet|transformer|te|te1|te2|te3)_(?P<inside>[^.]+)\.weight")
_LYCORIS = re.compile(r"lycoris_(?!(?:unet|te\d?|prior)_)(?P<inside>[^.]+)\.weight")
_DOTTED = re.compile(r"(?P<model>transformer|transformer_2|diffusion_model|unet)\.(?P<inside>.+)\.weight")
_IN_UNETS = re.compile(r"(?:down_blocks|up_blocks|mid_block|conv_in|conv_out|time_embedding|add_embedding)\b")
_OF_UNETS = re.compile(r"(?:down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block)[._]")
_SGM = re.compile(r"(?:input_blocks|output_blocks|middle_block|time_embed|label_emb)[._]|out\.2$")
_CLIP = ("text_model", "encoder", "layers", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj", "mlp", "fc1", "fc2")
_T5 = re.compile(r"encoder_block_(\d+)_layer_(\d+)_(SelfAttention|DenseReluDense)_(q|k|v|o|wi|wi_0|wi_1|wo)")
_TEXT_ENCODERS = {"te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2"}
_T5_OF = {"flux1": "text_encoder_2", "sd3": "text_encoder_3"}  # FLUX has no third text encoder
_UNET = Component("", Path(), {"_class_name": unet_names.CLASS}, {})


@dataclass(frozen=True)
class _Denoiser:
    """Targets of one transformer: the model's name in a pipeline, and its modules by the names of their targets."""

    model: str
    is_flat: bool
    modules: dict[str, str]


def resolved(
    adapter: Adapter, scheme: str = DIFFUSERS, config: Mapping[str, Any] | None = None, *, written_flat: bool = False
) -> tuple[Adapter, tuple[str, ...]]:
    """Return an adapter with the names that a scheme (`families.DIFFUSERS`, `families.ORIGINAL`) has for modules of
    diffusion models, after the name of the model in a pipeline, and notes; `config` is the base's config.json, `scheme`
    "" that of the source. `written_flat`: they are written with underscores for dots. Raises E-EXPORT where that needs
    a base."""
    family, known = "", (config or {}).get("_class_name")
    only = next((name for name, one in families.families().items() if known in one.classes), "")
    if only:  # on a base of one model, whose parameters have no model's name before theirs
        adapter = renamed_by(adapter, lambda name: f"transformer.{name}" if _is_bare(name, only) else name)
    shapes = {target.name: target for target in adapter.shapes()}
    notes: list[str] = []
    if not scheme:  # the source's, which the names have already unless a base changed them
        own = spelling.parse(adapter.provenance.fields.get(spelling.FIELD, ""))
        if own is None or not own.scheme:
            return adapter, ()
        scheme = own.scheme
    is_diffusion = bool(only) or adapter.provenance.fields.get("source_format") in ("kohya", "diffusers")
    for denoiser in _denoisers(shapes, is_diffusion) if only or not known else ():
        modules = {module: shapes[name].matrix_shape for name, module in denoiser.modules.items()}
        choice = translate.chosen(modules, denoiser.is_flat, scheme, only, written_flat=written_flat)
        if choice is None:
            continue
        family = choice.reading.id
        before = adapter
        adapter = _translated(adapter, denoiser, choice.reading, scheme)
        notes += [choice.note] if choice.note else []
        notes += _changes(before, adapter, choice.titles)
    named, more = _taken_apart(adapter, family)
    return named, (*notes, *more)


def _is_bare(name: str, family: str) -> bool:
    module = name.rpartition(".")[0]
    return any(scheme.find(module, False) for scheme in families.families()[family].schemes.values())


def _denoisers(shapes: Mapping[str, Target], is_diffusion: bool) -> list[_Denoiser]:
    """Return the transformers among the models that targets are of; names without a model are one's if it is known that
    these are of a diffusion model. A UNet is none."""
    groups: dict[tuple[str, bool], dict[str, str]] = {}
    for name in shapes:
        flat, dotted = _LYCORIS.fullmatch(name) or _KOHYA.fullmatch(name), _DOTTED.fullmatch(name)
        if flat is not None:
            if flat.groupdict().get("role", "unet") in ("unet", "transformer"):
                groups.setdefault(("transformer", True), {})[name] = flat["inside"].removeprefix("_")
        elif dotted is not None:
            model = dotted["model"].replace("diffusion_model", "transformer")
            groups.setdefault((model, False), {})[name] = dotted["inside"]
        elif is_diffusion and families.is_known(name.removesuffix(".weight")):
            groups.setdefault(("transformer", False), {})[name] = name.removesuffix(".weight")
    return [
        _Denoiser(model, is_flat, modules)
        for (model, is_flat), modules in groups.items()
        if model != "unet" and not any(_OF_UNETS.match(module) for module in modules.values())
    ]


def _translated(adapter: Adapter, denoiser: _Denoiser, reading: Reading, scheme: str) -> Adapter:
    """The adapter with the targets of one transformer under the names of a scheme."""
    mine = {t.name: (denoiser.modules[t.name], t.matrix_shape) for t in adapter.shapes() if t.name in denoiser.modules}
    if not any(reading.moves_rows(module, shape, denoiser.is_flat, scheme) for module, shape in mine.values()):
        becomes = {n: reading.becomes(*where, denoiser.is_flat, scheme) or ("",) for n, where in mine.items()}
        if all(new for (new,) in becomes.values()):
            new_names = {name: f"{denoiser.model}.{new}.weight" for name, (new,) in becomes.items()}
            return renamed_by(adapter, lambda name: _along(name, new_names))
    lora = plain_lora(adapter) if isinstance(adapter, CompactAdapter) else adapter
    beside: dict[str, list[ExtraTensor]] = {}
    for extra in lora.extras:
        beside.setdefault(extra.name, []).append(extra)
    pieces = [
        translate.piece_of(pair, denoiser.modules[pair.target.name], beside)
        for pair in lora.targets
        if pair.target.name in denoiser.modules
    ]
    moved = translate.translated(pieces, reading, denoiser.is_flat, scheme)
    gone = {id(extra) for piece in pieces for extra in piece.extras.values()}
    named = {f"{denoiser.model}.{piece.pair.target.name}": piece for piece in moved}
    targets = [replace(p.pair, target=replace(p.pair.target, name=name)) for name, p in named.items()]
    others = [pair for pair in lora.targets if pair.target.name not in denoiser.modules]
    extras = [extra for extra in lora.extras if id(extra) not in gone]
    extras += [replace(e, name=f"{denoiser.model}.{e.name}") for piece in moved for e in piece.extras.values()]
    return replace(lora, targets=tuple(sorted([*targets, *others], key=lambda p: p.target)), extras=tuple(extras))


def _along(name: str, new: Mapping[str, str]) -> str:
    """The new name of a parameter: its own, or beside that of its module's weight."""
    owner, _, leaf = name.rpartition(".")
    weight = new.get(f"{owner}.weight")
    return new.get(name) or (f"{weight.removesuffix('.weight')}.{leaf}" if weight else name)


def _changes(before: Adapter, after: Adapter, titles: str) -> list[str]:
    """Return the note of what modules are called now, if any: not of the model's name before theirs."""
    old, new = (sorted(target.name for target in adapter.shapes()) for adapter in (before, after))
    kept = {*new, *(name.partition(".")[2] for name in new)}
    changed = [name for name in old if name not in kept and not (_DOTTED.match(name) and _inside(name) in kept)]
    if not changed:
        return []
    first = next((name for name in new if name not in set(old)), "")
    counts = "" if len(old) == len(new) else f"; {len(old)} layers there, {len(new)} here"
    return [f"names are those of {titles}: {changed[0]!r:.120} is {first!r:.120}{counts}"]


def _inside(name: str) -> str:
    return name.partition(".")[2]


# --- UNets and text encoders -----------------------------------------------------------------------------------------


def _taken_apart(adapter: Adapter, family: str) -> tuple[Adapter, tuple[str, ...]]:
    """Return the adapter with the rest of the names that no program but the one that wrote them knows taken apart."""
    names = [target.name for target in adapter.shapes()]
    own = [name for name in names if _SPELLED.fullmatch(name)]
    new = {name: _parameter(name, family) for name in own}
    if isinstance(adapter, CompactAdapter):
        new = {name: module for name, module in new.items() if module is not None}
    new |= {name: _of_unet(name) for name in names if name.startswith(("diffusion_model.", "unet.")) and _of_unet(name)}
    unknown = next((name for name, module in new.items() if module is None), None)
    if unknown is not None:
        raise _unexplained(unknown, adapter.provenance.fields)
    changed = next((name for name, other in new.items() if name != other), None)
    if changed is None:
        return adapter, ()
    note = f"names were taken apart without a base: {changed!r:.120} is {new[changed]!r:.120}"
    found = {name: module for name, module in new.items() if module is not None}
    return renamed_by(adapter, lambda name: _along(name, found)), (note,)


def _unexplained(name: str, fields: Mapping[str, str]) -> ExportError:
    layout = fields.get("source_format", "")
    what = f"no base was given that says what the names of the layout {layout} mean, {name!r:.120} for one"
    as_it_was = "; an export to original keeps them" if spelling.FIELD in fields else ""
    return ExportError(what, fix=f"give {spelled('base', ...)}; its config.json is enough{as_it_was}")


def _of_unet(name: str) -> str | None:
    """The parameter of a UNet that Stability AI's name with dots means, or None."""
    inside = name.partition(".")[2]
    if not _SGM.match(inside.removesuffix(".weight")):
        return None
    theirs = {original: ours for ours, original in unet_names.stability_names().items()}
    renamed = unet_names.renamed(inside.removesuffix(".weight"), theirs, ".")
    return None if renamed is None else f"unet.{renamed}.weight"


def _parameter(name: str, family: str) -> str | None:
    """The parameter that one of kohya's names means, None if it may be one of several, or is none that is known."""
    match = _KOHYA.fullmatch(name)
    if match is None:
        return None
    inside, role = match["inside"], match["role"]
    if role == "te3":
        t5 = _T5.fullmatch(inside)
        model = _T5_OF.get(family)
        if t5 is None or model is None:
            return None
        block, layer, kind, leaf = t5.groups()
        return f"{model}.encoder.block.{block}.layer.{layer}.{kind}.{leaf}.weight"
    model = _TEXT_ENCODERS.get(role)
    ways = naming.parses(inside, _CLIP) if model else naming.parses(sgm.renamed(inside, _UNET))
    if len(ways) != 1:
        return None
    in_unet = role == "unet" and _IN_UNETS.match(ways[0])
    return f"{model or ('unet' if in_unet else 'transformer')}.{ways[0]}.weight"
