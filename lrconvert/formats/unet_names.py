"""Facts about a diffusers UNet (``UNet2DConditionModel``) that its configuration says: the modules of its transformers
and residual blocks with their shapes, the order in which a walk meets them, and their names in Stability AI's code.

Names are modules with dots, as in diffusers: ``down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q``. Only the
four kinds of blocks that Stable Diffusion is made of are known.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from lrconvert.core.errors import BaseError

CLASS = "UNet2DConditionModel"
MOST_LEVELS = 8
_MOST_LAYERS = 32
_DOWN = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}  # True: it has attention
_UP = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
_MIDDLE = "UNetMidBlock2DCrossAttn"
# Settings that change shapes or names, and are not set in Stable Diffusion.
_UNSET = (
    "dual_cross_attention", "only_cross_attention", "resnet_time_scale_shift", "reverse_transformer_layers_per_block"
)  # fmt: skip
_TIMES = 4  # the time embedding is that many times as wide as the first block

Shape = tuple[int, ...]


def is_sdxl(config: Mapping[str, Any]) -> bool:
    """Return True for the UNet of Stable Diffusion XL, of three levels and with added embeddings of size and text. The
    refiner, of four levels, is none."""
    return (
        config.get("_class_name") == CLASS
        and config.get("addition_embed_type") == "text_time"
        and config.get("down_block_types") == ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]
        and config.get("layers_per_block", 2) == 2
    )


# --- modules and shapes ---------------------------------------------------------------------------------------------


def modules(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Return the shapes of weights by module: linear layers of attention, (out, in), and of gates, and the layers of
    residual blocks (convolutions (out, in, height, width)). Raises E-BASE for kinds of UNets that are not known
    here."""
    widths = _numbers(config, "block_out_channels", (320, 640, 1280, 1280))
    count = len(widths)
    down = _kinds(config, "down_block_types", _DOWN, [True] * (count - 1) + [False], count)
    up = _kinds(config, "up_block_types", _UP, [False] + [True] * (count - 1), count)
    layers = _each(config, "layers_per_block", 2, count)
    depths = _each(config, "transformer_layers_per_block", 1, count)
    if config.get("mid_block_type", _MIDDLE) != _MIDDLE:
        raise BaseError(f"the UNet's middle block {config['mid_block_type']!r:.60} is not known here")
    for key in _UNSET:
        if config.get(key) not in (None, False, "default"):
            raise BaseError(f"{key} of the UNet is {config[key]!r:.60}, which is not known here")
    contexts = _each(config, "cross_attention_dim", 1280, count)
    time = widths[0] * _TIMES
    shapes: dict[str, Shape] = {}
    for n, width in enumerate(widths):
        before = widths[max(0, n - 1)]
        for layer in range(layers[n]):
            if down[n]:
                shapes |= _attention(f"down_blocks.{n}.attentions.{layer}", width, contexts[n], depths[n])
            shapes |= _resnet(f"down_blocks.{n}.resnets.{layer}", width if layer else before, width, time)
    for n, width in enumerate(reversed(widths)):
        level = count - 1 - n  # that of the way down, whose outputs join
        last = layers[level]
        for layer in range(last + 1):
            skip = widths[max(0, level - 1)] if layer == last else width
            above = width if layer else widths[min(level + 1, count - 1)]
            if up[n]:
                shapes |= _attention(f"up_blocks.{n}.attentions.{layer}", width, contexts[level], depths[level])
            shapes |= _resnet(f"up_blocks.{n}.resnets.{layer}", above + skip, width, time)
    shapes |= _attention("mid_block.attentions.0", widths[-1], contexts[-1], depths[-1])
    for layer in range(2):
        shapes |= _resnet(f"mid_block.resnets.{layer}", widths[-1], widths[-1], time)
    return shapes


def _attention(stem: str, width: int, context: int, depth: int) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for block in range(depth):
        inside = f"{stem}.transformer_blocks.{block}"
        for attention, inner in (("attn1", width), ("attn2", context)):
            shapes |= dict.fromkeys((f"{inside}.{attention}.to_q", f"{inside}.{attention}.to_out.0"), (width, width))
            shapes |= dict.fromkeys((f"{inside}.{attention}.to_k", f"{inside}.{attention}.to_v"), (width, inner))
        shapes[f"{inside}.ff.net.0.proj"] = (8 * width, width)
    return shapes


def _resnet(stem: str, inner: int, out: int, time: int) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {
        f"{stem}.conv1": (out, inner, 3, 3),
        f"{stem}.time_emb_proj": (out, time),
        f"{stem}.conv2": (out, out, 3, 3),
    }
    return shapes if inner == out else {**shapes, f"{stem}.conv_shortcut": (out, inner, 1, 1)}


def _numbers(config: Mapping[str, Any], key: str, default: Sequence[int]) -> Sequence[int]:
    value = config.get(key)
    numbers = default if value is None else value
    fine = isinstance(numbers, (list, tuple)) and 0 < len(numbers) <= MOST_LEVELS
    if not fine or not all(type(n) is int and 0 < n < 1 << 20 for n in numbers):
        raise BaseError(f"{key} of the UNet is {value!r:.80}")
    return numbers


def _each(config: Mapping[str, Any], key: str, default: int, count: int) -> Sequence[int]:
    """Return a number of every level, of which a configuration may give one for all."""
    value = config.get(key)
    single = default if value is None else value
    numbers = _numbers({key: single if isinstance(single, list) else [single] * count}, key, ())
    bound = 1 << 20 if key == "cross_attention_dim" else _MOST_LAYERS
    if len(numbers) != count or max(numbers) > bound:
        raise BaseError(f"{key} of the UNet is {value!r:.80}, for {count} levels")
    return numbers


def _kinds(
    config: Mapping[str, Any], key: str, kinds: Mapping[str, bool], default: Sequence[bool], count: int
) -> Sequence[bool]:
    """Return for each level True if it has attention."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, list) or len(value) != count or not all(isinstance(v, str) and v in kinds for v in value):
        raise BaseError(f"{key} of the UNet is {value!r:.200}; known here are {', '.join(kinds)}")
    return [kinds[kind] for kind in value]


# --- the order of a walk --------------------------------------------------------------------------------------------

ATTENTION, GATE, RESNET = "attention", "gate", "resnet"
_PLACE = re.compile(
    r"(?P<side>down_blocks|up_blocks|mid_block)(?:\.(?P<block>\d+))?\.(?P<kind>attentions|resnets)\.(?P<layer>\d+)\."
    r"(?:transformer_blocks\.(?P<depth>\d+)\.)?(?P<leaf>.+)"
)
_SIDES = ("down_blocks", "up_blocks", "mid_block")  # the middle is made last
_HALVES = ("to_q", "to_k", "to_v", "to_out.0")
_SELF, _CROSS = ([f"{name}.{half}" for half in _HALVES] for name in ("attn1", "attn2"))
_GATES = ["ff.net.0.proj"]
_LAYERS = ("conv1", "time_emb_proj", "conv2", "conv_shortcut")


def walk(names: Iterable[str], parts: Collection[str], gate_last: bool) -> list[str]:
    """Return those of `names` that belong to `parts` (of `ATTENTION`, `GATE`, `RESNET`) in the order of
    ``named_modules()``.

    That is the order in which the constructors make them: the way down, the way up, the middle; in a block all
    attentions before all residual blocks. Within a transformer block, older releases of diffusers make the gate
    between the two attentions, newer ones after both (`gate_last`).
    """
    inner = [*_SELF, *_CROSS, *_GATES] if gate_last else [*_SELF, *_GATES, *_CROSS]
    wanted = {
        **{leaf: n for n, leaf in enumerate(inner) if (GATE if leaf in _GATES else ATTENTION) in parts},
        **{leaf: n for n, leaf in enumerate(_LAYERS) if RESNET in parts},
    }
    keyed = []
    for name in names:
        at = _PLACE.fullmatch(name)
        if at is not None and at["leaf"] in wanted:
            side = _SIDES.index(at["side"])
            key = side, int(at["block"] or 0), at["kind"], int(at["layer"]), int(at["depth"] or 0), wanted[at["leaf"]]
            keyed.append((key, name))
    return [name for _, name in sorted(keyed)]


# --- names in Stability AI's code -----------------------------------------------------------------------------------

_WHOLE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
}
_IN_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def stability_names(levels: int = MOST_LEVELS, layers: int = 2, attended: bool = True) -> dict[str, str]:
    """Return {a module of diffusers, or the beginning of its name: the same in Stability AI's code}:
    ``down_blocks.1.attentions.0`` is ``input_blocks.4.1`` where levels have two layers.

    Each level has `layers` layers and then, but for the last, one that changes the resolution; going up, one layer
    more. `attended`: blocks of the way up that change the resolution have attention, before that.
    """
    names = dict(_WHOLE)
    for n in range(levels):
        for layer in range(layers):
            names |= _block(f"down_blocks.{n}", layer, f"input_blocks.{(layers + 1) * n + layer + 1}")
        names[f"down_blocks.{n}.downsamplers.0.conv"] = f"input_blocks.{(layers + 1) * (n + 1)}.0.op"
        for layer in range(layers + 1):
            names |= _block(f"up_blocks.{n}", layer, f"output_blocks.{(layers + 1) * n + layer}")
        last = (layers + 1) * n + layers
        names[f"up_blocks.{n}.upsamplers.0.conv"] = f"output_blocks.{last}.{2 if attended else 1}.conv"
    names["mid_block.attentions.0"] = "middle_block.1"
    for layer in range(2):
        names |= _in_resnet(f"mid_block.resnets.{layer}", f"middle_block.{2 * layer}")
    return names


def _block(stem: str, layer: int, theirs: str) -> dict[str, str]:
    return {**_in_resnet(f"{stem}.resnets.{layer}", f"{theirs}.0"), f"{stem}.attentions.{layer}": f"{theirs}.1"}


def _in_resnet(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.{name}": f"{theirs}.{other}" for name, other in _IN_RESNET.items()}


def renamed(name: str, table: Mapping[str, str], separator: str) -> str | None:
    """Return `name` with its longest beginning that `table` knows, cut at a `separator`, as it is called there; or
    None."""
    parts = name.split(separator)
    for stop in range(len(parts), 0, -1):
        begin = separator.join(parts[:stop])
        if begin in table:
            return separator.join([table[begin], *parts[stop:]])
    return None
