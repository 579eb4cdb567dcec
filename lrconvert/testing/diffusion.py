"""LoRAs of diffusion transformers as trainers spell them: a module for every line of a family's table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lrconvert.core.dtypes import Array
from lrconvert.formats.families.base import Family
from lrconvert.formats.families.shared.spelling import HALVES, Spelling
from lrconvert.formats.families.shared.table import Line, filled
from lrconvert.testing.layouts import Known

_SHARE = 5  # rows of a part of which a line says nothing


@dataclass(frozen=True)
class Trained:
    """A spelling of a trainer, for the families of a scheme; `name` is what it is called in tests and documents."""

    name: str
    scheme: str
    spelling: Spelling


TRAINED = (
    Trained("kohya", "original", Spelling("lora_unet_", "lora_down", True)),
    Trained("comfyui", "original", Spelling("diffusion_model.", "lora_A", False)),
    Trained("down-up", "original", Spelling("diffusion_model.", "lora_down", True)),
    Trained("bare", "original", Spelling("", "lora_down", True)),
    Trained("prefixed", "original", Spelling("transformer.", "lora_A", False)),
    Trained("diffusers", "diffusers", Spelling("transformer.", "lora_A", False)),
    Trained("ai-toolkit", "diffusers", Spelling("diffusion_model.", "lora_A", False)),
    Trained("onetrainer", "diffusers", Spelling("lora_transformer_", "lora_down", True)),
    Trained("lightning", "diffusers", Spelling("", "lora_down", True)),
    Trained("xlabs", "xlabs", Spelling("", "down", False)),
)


def modules(
    family: Family, scheme: str, width: int = 4, blocks: Sequence[int] = (0, 11)
) -> Iterator[tuple[str, int, int, Line]]:
    """Yield (module, out, in, line) for every line of a scheme, with each of these numbers in its holes; of several
    lines of one name each has a number of its own."""
    seen: dict[str, int] = {}
    for line in family.schemes[scheme].lines:
        turn = seen[line.name] = seen.get(line.name, -1) + 1
        shares = line.rows.count(None)
        out = sum(rows * width for rows in line.rows if rows is not None) + shares * (
            max(1, width // 3) if line.rows[0] else _SHARE
        )
        for number in blocks if "#" in line.name else (0,):
            numbers = (str(number + turn),) * line.name.count("#")
            yield filled(line.name, numbers), out, width, line


def pairs(
    family: Family, scheme: str, *, rank: int = 2, alpha: float = 1.0, width: int = 4, block: int = 1
) -> list[Known]:
    """Return a random update for every line of a scheme, in one block."""
    made = []
    for n, (module, out, inner, _) in enumerate(modules(family, scheme, width, (block,))):
        rng = np.random.default_rng(n)
        a, b = (rng.standard_normal(shape).astype("<f4") for shape in ((rank, inner), (out, rank)))
        made.append(Known(module, a, b, alpha))
    return made


def tensors(known: Sequence[Known], spelling: Spelling) -> Mapping[str, Array]:
    """Return the tensors of a file in this spelling, by their names."""
    down, up = HALVES[spelling.halves]
    stored: dict[str, Array] = {}
    for one in known:
        name = spelling.name(one.module)
        stored |= {name + down: one.a, name + up: one.b}
        if spelling.has_alpha:
            stored[f"{name}.alpha"] = np.array(one.alpha, np.float32)
    return stored
