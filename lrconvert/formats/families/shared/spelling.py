"""Spellings of trainers: how a file writes the names of modules and of their factors, whatever the modules are called.

A spelling is what stands before a module's name, what the two factors are called, and whether alphas are stated. A
prefix that ends with an underscore has underscores for the dots of names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

FIELD = "spelling"  # of a provenance
# What the factors are called -> the ends of their names.
HALVES = {
    "lora_A": (".lora_A.weight", ".lora_B.weight"),
    "lora_A.default": (".lora_A.default.weight", ".lora_B.default.weight"),
    "lora_down": (".lora_down.weight", ".lora_up.weight"),
    "lora.down": (".lora.down.weight", ".lora.up.weight"),
    "down": (".down.weight", ".up.weight"),  # XLabs
}
# What stands before the names of a UNet's or a transformer's modules.
PREFIXES = (
    *("lora_unet_", "lora_transformer_", "lycoris_", "base_model.model.", "diffusion_model."),
    *("transformer.", "unet."),
)
_SECOND = "transformer_2."  # Wan 2.2's, called as the first one is
_TEXT = re.compile(r"(?:lora_|lycoris_)?te\d?_|lora_te|text_encoder")
_NO_FACTORS = (".alpha", ".dora_scale", ".diff_b", ".diff", ".lora_magnitude_vector", ".lora_mid.weight", ".bias")


@dataclass(frozen=True)
class Spelling:
    """`prefix` before a module's name, `halves` (a key of `HALVES`) after it, whether alphas are stated, and the
    `scheme` of the modules' names where those of the adapter are others."""

    prefix: str
    halves: str
    has_alpha: bool
    scheme: str = ""

    @property
    def is_flat(self) -> bool:
        return self.prefix.endswith("_")

    def name(self, module: str) -> str:
        """Return what the file calls a module, named with dots."""
        return self.prefix + (module.replace(".", "_") if self.is_flat else module)

    @property
    def text(self) -> str:
        """The spelling as a line of a provenance."""
        words = (f"{self.prefix}*", self.halves, *(["alpha"] if self.has_alpha else []), self.scheme)
        return " ".join(words).strip()


def parse(text: str) -> Spelling | None:
    """Return the spelling that a provenance notes; None for what is none."""
    prefix, _, rest = text.partition("* ")
    halves, *words = rest.split(" ")
    if halves not in HALVES or prefix not in (*PREFIXES, ""):
        return None
    has_alpha = words[:1] == ["alpha"]
    return Spelling(prefix, halves, has_alpha, *words[has_alpha:][:1])


def of(names: Iterable[str]) -> Spelling | None:
    """Return the spelling of a file's tensors, those of text encoders aside; None for one that is not written here, or
    for several in one file."""
    seen: set[tuple[str, str]] = set()
    has_alpha = False
    for name in names:
        has_alpha |= name.endswith(".alpha")
        if _TEXT.match(name) or name.endswith(_NO_FACTORS):
            continue
        halves = [key for key, ends in HALVES.items() if name.endswith(ends) and _is_whole(name, key)]
        name = f"transformer.{name.removeprefix(_SECOND)}" if name.startswith(_SECOND) else name
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
        seen.add((prefix, halves[0] if halves else ""))
    if len(seen) != 1:
        return None
    prefix, halves_of_all = seen.pop()
    return Spelling(prefix, halves_of_all, has_alpha) if halves_of_all else None


def _is_whole(name: str, halves: str) -> bool:
    """Return whether an ending is not that of a longer one."""
    return halves != "down" or (".processor." in name and not name.endswith((".lora.down.weight", ".lora.up.weight")))


def fields(names: Iterable[str], scheme: str) -> dict[str, str]:
    """Return the note of a provenance on the spelling of a file, if it has one; `scheme` is that of its names where a
    base has others."""
    own = of(names)
    return {} if own is None else {FIELD: replace(own, scheme=scheme).text}
