"""One adapter of a known update for each reader, as a tool of its layout writes it: `SAMPLES`, by the id of the reader,
for the law tests. A new reader's goes there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lrconvert.core.dtypes import F64, Array
from lrconvert.testing.layouts import (
    BLOCKS,
    TEXT,
    UNET,
    Folder,
    Known,
    cloneofsimo,
    diffusers,
    gguf,
    kohya,
    lora_vit,
    mlx,
    peft,
    peft_folder,
    raw,
    safetensors_file,
    torchtune,
)


@dataclass(frozen=True, eq=False)
class Sample:
    """An adapter as a tool of that layout writes it, and what its reader must make of it.

    `updates` are the (out, in) updates of the parameters, by name, in float64. `alpha` is what a user must say where
    the layout does not; `base` are the shapes of the base's parameters where the file does not say how wide layers are.
    """

    files: Folder
    updates: Mapping[str, F64]
    alpha: float | None = None
    base: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


_OUT, _INNER, _RANK, _ALPHA = 6, 8, 2, 3.0


def floats(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _of_pairs(
    write: Callable[[Sequence[Known]], Folder],
    modules: Sequence[str],
    names: str = "{module}",
    scale: float | None = None,
    alpha: float | None = None,
) -> Callable[[], Sample]:
    """Return the sample of a layout that stores A and B. `names` spells the modules as the reader names them."""

    def sample() -> Sample:
        pairs = [
            Known(module, floats(_RANK, _INNER, seed=n), floats(_OUT, _RANK, seed=n + 9), _ALPHA)
            for n, module in enumerate(modules)
        ]
        updates = {}
        for n, pair in enumerate(pairs):
            name = names.format(n=n, module=pair.module, flat=pair.module.replace(".", "_"))
            updates[f"{name}.weight"] = (pair.scale if scale is None else scale) * pair.product
        return Sample(write(pairs), updates, alpha)

    return sample


def _vblora() -> Sample:
    """PEFT's VB-LoRA: every sub-vector of A, and of the transpose of B, is a mixture of two vectors of the bank."""
    rng, length = np.random.default_rng(3), 2
    bank = floats(5, length)
    tensors: dict[str, Array] = {"base_model.vblora_vector_bank": bank}
    updates = {}
    for module in TEXT:
        halves = []
        for half, shape in (("A", (_RANK, _INNER // length)), ("B", (_OUT // length, _RANK))):
            indices = np.argsort(rng.random((*shape, len(bank))), axis=2)[:, :, :2]
            first = (0.5 + rng.random((*shape, 1)) / 2).astype(np.float32)
            stem = f"{module}.vblora_logits_{half}"
            tensors |= {f"{stem}_topk_indices": indices.astype("<i8"), f"{stem}_topk_weights": first}
            weights = np.concatenate([first, 1 - first], axis=2).astype(np.float64)
            halves.append(np.einsum("nmk,nmkb->nmb", weights, bank.astype(np.float64)[indices]))
        a, b = halves[0].reshape(_RANK, _INNER), halves[1].swapaxes(1, 2).reshape(_OUT, _RANK)
        updates[f"{module}.weight"] = b @ a
    config = {"r": _RANK, "num_vectors": len(bank), "vector_length": length, "topk": 2}
    return Sample(peft_folder(tensors, "VBLORA", **config), updates)


def _miss() -> Sample:
    """PEFT's MiSS: a block (r, out) that repeats along the inputs."""
    blocks = {module: floats(_RANK, _OUT, seed=n) for n, module in enumerate(TEXT)}
    files = peft_folder({f"{module}.miss_block": block for module, block in blocks.items()}, "MISS", r=_RANK)
    updates = {f"{m}.weight": np.tile(block, (_INNER // _RANK, 1)).T.astype(np.float64) for m, block in blocks.items()}
    return Sample(files, updates, base={name: update.shape for name, update in updates.items()})


def _sbora() -> Sample:
    """SBoRA-FA: A are unit vectors, of which the file has the numbers of the inputs."""
    tensors: dict[str, Array] = {}
    updates = {}
    for n, module in enumerate(TEXT):
        inputs, b = np.array([5, n]), floats(_OUT, _RANK, seed=n)
        tensors |= {f"{module}.lora_A": inputs.astype("<i8"), f"{module}.lora_B.weight": b}
        update = np.zeros((_OUT, _INNER))
        update[:, inputs] = _ALPHA / _RANK * b.astype(np.float64)
        updates[f"{module}.weight"] = update
    files = peft_folder(tensors, "SBORA", r=_RANK, lora_alpha=_ALPHA, adapter_name="sbora_fa")
    return Sample(files, updates, base={name: update.shape for name, update in updates.items()})


def _nola() -> Sample:
    """NOLA of a vision transformer: coefficients of bases that torch draws from seed 0."""
    import torch

    tensors: dict[str, Array] = {}
    updates = {}
    for layer, (inner, out) in {"fc1": (12, 20), "fc2": (20, 12)}.items():
        alpha, beta = floats(5, seed=inner), floats(7, seed=out)
        generator = torch.Generator().manual_seed(0)
        drawn = [
            torch.nn.init.kaiming_uniform_(torch.zeros(shape), a=math.sqrt(5), generator=generator).double().numpy()
            for shape in ((5, inner, _RANK), (7, _RANK, out))
        ]
        a, b = np.tensordot(alpha, drawn[0], 1), np.tensordot(beta, drawn[1], 1)
        updates[f"blocks.0.mlp.{layer}.weight"] = (a @ b).T / _RANK
        tensors |= {f"{layer}_alpha_000": alpha, f"{layer}_beta_000": beta}
        if layer == "fc1":
            tensors["fc1_A_000"] = drawn[0][0, :10, 0].astype(np.float32)
    files = {"nola.safetensors": safetensors_file(tensors)}
    return Sample(files, updates, base={name: update.shape for name, update in updates.items()})


def _torchtune() -> Sample:
    sample = _of_pairs(torchtune, ("layers.20.attn.v_proj", "layers.21.mlp.w2"), alpha=_ALPHA)()
    names = ("model.layers.20.self_attn.v_proj.weight", "model.layers.21.mlp.down_proj.weight")
    return replace(sample, updates=dict(zip(names, sample.updates.values(), strict=True)))


def _lycoris() -> Sample:
    """A LoHa and a LoKr of LyCORIS, in sd-scripts' names: the second of a whole w1, whose alpha goes with w2."""
    one, other = (f"lora_unet_{module.replace('.', '_')}" for module in UNET)
    w1a, w2a = floats(_OUT, _RANK, seed=1), floats(_OUT, _RANK, seed=2)
    w1b, w2b = floats(_RANK, _INNER, seed=3), floats(_RANK, _INNER, seed=4)
    left, b, a = floats(2, 4, seed=5), floats(3, 1, seed=6), floats(1, 2, seed=7)
    alpha = np.array(_ALPHA, np.float32)
    tensors = {f"{one}.hada_w1_a": w1a, f"{one}.hada_w1_b": w1b, f"{one}.hada_w2_a": w2a, f"{one}.hada_w2_b": w2b}
    tensors |= {f"{other}.lokr_w1": left, f"{other}.lokr_w2_a": b, f"{other}.lokr_w2_b": a}
    tensors |= {f"{one}.alpha": alpha, f"{other}.alpha": alpha}
    halves = [part.astype(np.float64) for part in (w1a, w1b, w2a, w2b)]
    updates: dict[str, Any] = {
        f"{one}.weight": _ALPHA / _RANK * (halves[0] @ halves[1]) * (halves[2] @ halves[3]),
        f"{other}.weight": _ALPHA * np.kron(left.astype(np.float64), b.astype(np.float64) @ a),
    }
    return Sample({"lora.safetensors": safetensors_file(tensors)}, updates)


def _products(kind: str) -> Callable[[], Sample]:
    """PEFT's folder of a kind whose layers are products: LoHa, LoKr of a whole w1, AdaLoRA, and VeRA."""

    def sample() -> Sample:
        tensors: dict[str, Array] = {}
        updates = {}
        a, b = floats(_RANK, _INNER + 2, seed=20), floats(_OUT + 3, _RANK, seed=21)
        if kind == "VERA":
            tensors |= {"base_model.vera_A": a, "base_model.vera_B": b}
        for n, module in enumerate(TEXT):
            parts, update = _product(kind, 10 * n, a[:, :_INNER].astype(np.float64), b[:_OUT].astype(np.float64))
            tensors |= {f"{module}.{part}": values for part, values in parts.items()}
            updates[f"{module}.weight"] = update
        alpha = {"LOHA": {"alpha": _ALPHA}, "LOKR": {"alpha": _ALPHA}, "ADALORA": {"lora_alpha": _ALPHA}}.get(kind, {})
        shapes = {name: update.shape for name, update in updates.items()} if kind == "VERA" else {}
        return Sample(peft_folder(tensors, kind, r=_RANK, **alpha), updates, base=shapes)

    return sample


def _product(kind: str, seed: int, a: F64, b: F64) -> tuple[dict[str, Array], F64]:
    """Return the parts of one module, and its update. `a`, `b` are the shared matrices."""
    if kind == "VERA":
        parts = {"vera_lambda_b": floats(_OUT, seed=seed), "vera_lambda_d": floats(_RANK, seed=seed + 1)}
        rows, inner = (part.astype(np.float64) for part in parts.values())
        return parts, (rows[:, None] * b * inner) @ a
    if kind == "LOKR":
        parts = {"lokr_w1": floats(2, 4, seed=seed), "lokr_w2_a": floats(3, _RANK, seed=seed + 1)}
        parts["lokr_w2_b"] = floats(_RANK, 2, seed=seed + 2)
        left, one, other = (part.astype(np.float64) for part in parts.values())
        kronecker = np.kron(left, one @ other)
        return parts, np.asarray(_ALPHA / _RANK * kronecker, np.float64)
    down, up = floats(_RANK, _INNER, seed=seed), floats(_OUT, _RANK, seed=seed + 1)
    product: F64 = up.astype(np.float64) @ down.astype(np.float64)
    if kind == "ADALORA":
        values = floats(_RANK, 1, seed=seed + 2)
        inner = values.astype(np.float64) * down.astype(np.float64)
        update: F64 = _ALPHA / (_RANK + 1e-5) * up.astype(np.float64) @ inner
        return {"lora_A": down, "lora_B": up, "lora_E": values}, update
    w2a, w2b = floats(_OUT, _RANK, seed=seed + 2), floats(_RANK, _INNER, seed=seed + 3)
    parts = {"hada_w1_a": up, "hada_w1_b": down, "hada_w2_a": w2a, "hada_w2_b": w2b}
    whole: F64 = _ALPHA / _RANK * product * (w2a.astype(np.float64) @ w2b.astype(np.float64))
    return parts, whole


def _ia3() -> Sample:
    """PEFT's (IA)^3: two factors that are not 1 on outputs, and on inputs. The tests' base is all zeros, and so are its
    updates."""
    outputs, inputs = np.ones((_OUT, 1), np.float32), np.ones((1, _INNER), np.float32)
    outputs[1:3, 0], inputs[0, 4:6] = (0.5, 2.0), (-1.0, 3.0)
    tensors = {f"{TEXT[0]}.ia3_l": outputs, f"{TEXT[1]}.ia3_l": inputs}
    updates = {f"{module}.weight": np.zeros((_OUT, _INNER)) for module in TEXT}
    files = peft_folder(tensors, "IA3", feedforward_modules=["down_proj"], fan_in_fan_out=False)
    return Sample(files, updates, base={name: update.shape for name, update in updates.items()})


def _clip_lora() -> Sample:
    """The tensors of CLIP-LoRA's nested file, whose scale is alpha / sqrt(r)."""
    tensors: dict[str, Array] = {}
    updates = {}
    for number, (leaf, ours) in enumerate((("q_proj", "q_proj"), ("proj", "out_proj"))):
        a, b = floats(_RANK, _INNER, seed=number), floats(_OUT, _RANK, seed=number + 9)
        tensors |= {f"layer_{number}.{leaf}.w_lora_A": a, f"layer_{number}.{leaf}.w_lora_B": b}
        name = f"text_model.encoder.layers.{10 + number}.self_attn.{ours}.weight"
        updates[name] = 3 / math.sqrt(_RANK) * (b.astype(np.float64) @ a.astype(np.float64))
    # The last two layers of a text encoder.
    metadata = {"r": str(_RANK), "alpha": "3", "encoder": "text", "params": "['q', 'o']", "position": "top2"}
    return Sample({"lora.safetensors": safetensors_file(tensors, metadata)}, updates)


# By the id of the reader. A reader that is not here fails the law tests.
SAMPLES: Mapping[str, Callable[[], Sample]] = {
    "clip_lora": _clip_lora,
    "cloneofsimo": _of_pairs(cloneofsimo, ("0", "1"), "unet:{n}", scale=1.0),
    "diffusers": _of_pairs(diffusers, UNET, "unet.{module}"),
    "gguf": _of_pairs(gguf, BLOCKS),
    "kohya": _of_pairs(kohya, UNET, "lora_unet_{flat}"),
    "lycoris": _lycoris,
    "lora_vit": _of_pairs(lora_vit, ("query", "value"), "w_{n:05d}", scale=1.0),
    "mlx": _of_pairs(mlx, TEXT),
    "nola": _nola,
    "peft": _of_pairs(peft, TEXT),
    **{f"peft_{kind.lower()}": _products(kind) for kind in ("ADALORA", "LOHA", "LOKR", "VERA")},
    "peft_ia3": _ia3,
    "peft_miss": _miss,
    "peft_vblora": _vblora,
    "raw": _of_pairs(raw, TEXT, alpha=_ALPHA),
    "sbora": _sbora,
    "torchtune": _torchtune,
}
