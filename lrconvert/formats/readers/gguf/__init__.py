"""llama.cpp's LoRA: a GGUF file with ``<module>.weight.lora_a`` (r, in), ``<module>.weight.lora_b`` (out, r) and one
alpha. The scale is alpha / r, and 1 if alpha is 0. Stacks of experts have a dimension more; of token_embd A is (tokens,
r).

With a base, names and the order of rows of q and k become those of transformers; without one they are llama.cpp's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from lrconvert.core.errors import ConfigError, NotLoraError, PairError, UnsupportedLoraError
from lrconvert.formats.readers.base import Reader
from lrconvert.formats.readers.gguf import experts, names
from lrconvert.formats.readers.gguf.file import MAGIC, GgufFile
from lrconvert.formats.readers.shared import naming, pairs
from lrconvert.formats.readers.shared.notes import unused
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.formats.readers.shared.pairs import Labels, Parts
from lrconvert.formats.readers.shared.weights import Weights, load_finite
from lrconvert.lora.adapter import TRANSPOSED, LoraAdapter, LoraTarget, Target

LABELS = Labels("lora_a", "lora_b")
EMBEDDING = "token_embd"
_USED = ("adapter.type", "adapter.lora.alpha", "adapter.lora.task_name", "adapter.lora.prompt_prefix")
_PARTS = {".weight.lora_a": "A", ".weight.lora_b": "B"}


def recognises(path: Path) -> bool:
    """Return whether a file begins with GGUF's four letters."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def _split(name: str) -> tuple[str, str] | None:
    for suffix, part in _PARTS.items():
        if name.endswith(suffix) and name != suffix:
            return name.removesuffix(suffix), part
    return ("", name) if name.endswith("_norm.weight") else None


def read(path: Path, options: ReadOptions) -> LoraAdapter:
    """Read a GGUF adapter. Raises E-NOT-LORA for models and other adapters, E-LORA-FEATURE, E-TENSOR, E-PAIR, E-EMPTY,
    E-BASE, E-LIMIT, E-DTYPE, E-VALUE, E-CONFIG, and E-VER and the E-HDR and E-OFF codes for broken files."""
    component = naming.base_component(options)
    file = GgufFile(path)
    with Weights(path, [file]) as weights:
        alpha = _alpha(file)
        architecture = file.metadata.get("general.architecture", "")
        modules = pairs.sort_parts(weights, _split)
        norms = modules.pop("", {})
        pairs.check_both_halves(modules, LABELS)
        targets: list[LoraTarget] = []
        stacks: dict[str, list[LoraTarget]] = {}
        for module, parts in modules.items():
            own = list(_targets(module, parts, alpha, weights))
            if component is None:
                targets += own
            elif own[0].target.view.kind == "expert":
                stacks[module] = own
            else:
                targets += [names.placed(pair, module, architecture, component) for pair in own]
        if component is not None and stacks:
            targets += experts.placed(stacks, names.family_of(architecture, component), component)
        notes = [*unused({key: value for key, value in file.fields.items() if value != ()}, _USED)]
        notes += _notes(architecture, list(norms), named=component is not None)
        model = file.metadata.get("general.base_model.0.name") or file.metadata.get("general.name", "")
        return pairs.build_adapter(
            weights, targets, layout="gguf", warnings=notes, base_model=model, used=file.metadata
        )


def _alpha(file: GgufFile) -> float:
    """Return adapter.lora.alpha of a LoRA. Raises E-NOT-LORA, E-LORA-FEATURE, E-CONFIG."""
    kind, adapter = file.metadata.get("general.type", "model"), file.metadata.get("adapter.type", "")
    if kind != "adapter" or adapter != "lora":
        shown = f"an adapter of the type {adapter!r:.40}" if kind == "adapter" else f"a {kind:.40}"
        raise NotLoraError(f"the GGUF file is {shown}, not a LoRA", fix="give the adapter's file")
    if file.fields.get("adapter.alora.invocation_tokens", ()) != ():
        what = "Activated LoRA acts only after its invocation tokens, which no weight can hold"
        raise UnsupportedLoraError(what, fix="use it as it is")
    alpha = file.fields.get("adapter.lora.alpha")
    if not isinstance(alpha, float) or not math.isfinite(alpha):
        raise ConfigError(f"adapter.lora.alpha is {alpha!r:.40}, expected a number")
    return alpha


def _targets(module: str, parts: Parts, alpha: float, weights: Weights) -> Iterator[LoraTarget]:
    a, b = pairs.halves(module, parts, LABELS)
    if module == EMBEDDING:
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != b.shape[1]:
            raise PairError(f"{module}: lora_a {list(a.shape)} and lora_b {list(b.shape)} do not fit; A is (tokens, r)")
        (tokens, rank), features = a.shape, b.shape[0]
        pairs.check_rank(module, rank)
        target = Target(f"{module}.weight", (tokens, features), TRANSPOSED)
        left = pairs.transpose(load_finite(weights, a))
        yield LoraTarget(target, left, load_finite(weights, b), _scale(module, alpha, rank))
    elif len(a.shape) == 3:
        experts, rank, _ = a.shape
        if len(b.shape) != 3 or (b.shape[0], b.shape[2]) != (experts, rank):
            raise PairError(f"{module}: lora_a {list(a.shape)} and lora_b {list(b.shape)} do not fit")
        pairs.check_rank(module, rank)
        scale = _scale(module, alpha, rank)
        yield from pairs.read_experts(f"{module}.weight", load_finite(weights, a), load_finite(weights, b), scale)
    else:
        yield pairs.read_pair(module, parts, lambda rank: _scale(module, alpha, rank), weights, LABELS)


def _scale(module: str, alpha: float, rank: int) -> float:
    return pairs.scale_of(module, alpha, rank) if alpha else 1.0


def _notes(architecture: str, norms: list[str], *, named: bool) -> list[str]:
    notes = []
    if not named:
        notes.append(naming.unnamed("GGUF"))
        if names.reorders(architecture):
            notes.append(f"rows of attn_q and attn_k are in llama.cpp's own order for {architecture!r:.40}")
    if norms:
        notes.append(f"{len(norms)} norms are left out, as llama.cpp leaves them out: {norms[0]!r:.120} for one")
    return notes


READER = Reader("gguf", "GGUF LoRA file", read, recognises)
