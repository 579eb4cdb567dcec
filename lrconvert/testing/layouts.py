"""Adapters of a known update in every layout that a reader reads, as the tools write them: ``{file name: bytes}``.

Written straight from the layouts' definitions, without the code of the readers. `SAMPLES` has one for each reader, by
its id, for the law tests; a new reader's goes there. `WRITERS` are the layouts that hypothesis draws.
"""

from __future__ import annotations

import io
import json
import math
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lrconvert.core.dtypes import F64, Array
from lrconvert.testing import lazy
from lrconvert.testing.gguf import Field, gguf_file
from lrconvert.testing.raw_files import spelled, with_header

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

Folder = dict[str, bytes]
Tensors = Mapping[str, Array]
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True, eq=False)
class Known:
    """One module and its update ``alpha / r * b @ a``: `a` (r, in), or (r, in, K, L) of a convolution; `b` (out, r).
    Both float32 or float16."""

    module: str
    a: Array
    b: Array
    alpha: float

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def b_like_a(self) -> Array:
        """B in as many dimensions as A."""
        return self.b.reshape(*self.b.shape, *(1 for _ in self.a.shape[2:]))

    @property
    def product(self) -> F64:
        """``b @ a`` in float64, (out, in)."""
        product: F64 = self.b.astype(np.float64) @ self.a.reshape(self.rank, -1).astype(np.float64)
        return product


def safetensors_file(tensors: Tensors, metadata: Mapping[str, str] | None = None) -> bytes:
    """Return a safetensors file of these arrays."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    data = b""
    for name, array in tensors.items():
        dtype = {"f": "F", "i": "I", "u": "U"}[array.dtype.kind] + str(8 * array.dtype.itemsize)
        stop = len(data) + array.nbytes
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(data), stop]}
        data += array.tobytes()
    return with_header(header, data)


def npz_file(tensors: Tensors, compress: bool = False) -> bytes:
    """Return a ``.npz`` of these arrays."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        for name, array in tensors.items():
            entry = io.BytesIO()
            np.lib.format.write_array(entry, array, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), entry.getvalue(), archive.compression)
    return buffer.getvalue()


# --- layouts --------------------------------------------------------------------------------------------------------


def kohya(pairs: Sequence[Known], prefix: str = "lora_unet") -> Folder:
    """Write sd-scripts' file."""
    tensors: dict[str, Array] = {}
    for pair in pairs:
        name = f"{prefix}_{pair.module.replace('.', '_')}"
        tensors[f"{name}.alpha"] = np.array(pair.alpha, np.float32)
        tensors |= {f"{name}.lora_down.weight": pair.a, f"{name}.lora_up.weight": pair.b_like_a}
    return {"lora.safetensors": safetensors_file(tensors, {"ss_network_module": "networks.lora"})}


def diffusers(pairs: Sequence[Known], model: str = "unet", form: str = "peft") -> Folder:
    """Write pytorch_lora_weights.safetensors. `form`: "peft" (lora_A), "lora" (lora.down), "linear"
    (lora_linear_layer.down), "processor" (the oldest, attention layers only, without the model's name)."""
    names = {
        "peft": ("lora_A.weight", "lora_B.weight"),
        "lora": ("lora.down.weight", "lora.up.weight"),
        "linear": ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    }
    tensors: dict[str, Array] = {}
    for pair in pairs:
        if form == "processor":
            attention, _, leaf = pair.module.removesuffix(".0").rpartition(".")
            stem = f"{attention}.processor.{leaf}_lora"
            tensors |= {f"{stem}.down.weight": pair.a, f"{stem}.up.weight": pair.b_like_a}
            continue
        stem = f"{model}.{pair.module}"
        tensors |= {f"{stem}.{names[form][0]}": pair.a, f"{stem}.{names[form][1]}": pair.b_like_a}
        if pair.scale != 1:
            tensors[f"{stem}.alpha"] = np.array(pair.alpha, np.float32)
    return {"pytorch_lora_weights.safetensors": safetensors_file(tensors, {"format": "pt"})}


def mlx(pairs: Sequence[Known], npz: bool = False) -> Folder:
    """Write mlx-lm's folder: one rank and one scale for all."""
    tensors: dict[str, Array] = {}
    for pair in pairs:
        tensors[f"{pair.module}.lora_a"] = np.ascontiguousarray(pair.a.T)
        tensors[f"{pair.module}.lora_b"] = np.ascontiguousarray(pair.b.T)
    parameters = {"rank": pairs[0].rank, "scale": pairs[0].scale, "dropout": 0.0}
    config = spelled({"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": parameters})
    weights = {"adapters.npz": npz_file(tensors)} if npz else {"adapters.safetensors": safetensors_file(tensors)}
    return {"adapter_config.json": config, **weights}


def raw(pairs: Sequence[Known], suffix: str = "") -> Folder:
    """Write loralib's state dict: nothing states alpha."""
    tensors: dict[str, Array] = {}
    for pair in pairs:
        tensors |= {f"{pair.module}.lora_A{suffix}": pair.a, f"{pair.module}.lora_B{suffix}": pair.b}
    return {"lora.safetensors": safetensors_file(tensors)}


def cloneofsimo(pairs: Sequence[Known]) -> Folder:
    """Write cloneofsimo's file, modules by number: the scale is 1 whatever alpha is."""
    tensors: dict[str, Array] = {}
    metadata = {"unet": json.dumps(["CrossAttention"]), "<s1>": "<embed>"}
    for place, pair in enumerate(pairs):
        tensors |= {f"unet:{place}:up": pair.b, f"unet:{place}:down": pair.a}
        metadata[f"unet:{place}:rank"] = str(pair.rank)
    tensors["<s1>"] = np.arange(4, dtype=np.float32)
    return {"lora.safetensors": safetensors_file(tensors, metadata)}


def lora_vit(pairs: Sequence[Known], turned: bool = False) -> Folder:
    """Write LoRA-ViT's file: query and value of each block, by number; the scale is 1."""
    tensors: dict[str, Array] = {}
    for place, pair in enumerate(pairs):
        a, b = (pair.a.T, pair.b.T) if turned else (pair.a, pair.b)
        tensors |= {f"w_a_{place:03d}": np.ascontiguousarray(a), f"w_b_{place:03d}": np.ascontiguousarray(b)}
    return {"lora.safetensors": safetensors_file(tensors)}


_GGML = {"f4": 0, "f2": 1}


def gguf_parts(pairs: Sequence[Known], architecture: str = "llama") -> tuple[dict[str, Field], dict[str, Any]]:
    """Return (fields, tensors) of llama.cpp's adapter: one alpha for all."""
    fields: dict[str, Field] = {
        "general.architecture": architecture,
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": float(pairs[0].alpha),
    }
    tensors = {}
    for pair in pairs:
        for half, array in (("a", pair.a), ("b", pair.b)):
            tensors[f"{pair.module}.weight.lora_{half}"] = (_GGML[array.dtype.str[1:]], array.shape, array.tobytes())
    return fields, tensors


def gguf(pairs: Sequence[Known], architecture: str = "llama") -> Folder:
    """Write llama.cpp's adapter."""
    return {"lora.gguf": gguf_file(*gguf_parts(pairs, architecture))[0]}


def peft_folder(tensors: Tensors, kind: str, **config: Any) -> Folder:
    """Write PEFT's folder for adapters of a `kind` (``peft_type``); names are those after PEFT's prefix."""
    named = {name if name.startswith("base_model.") else PEFT_PREFIX + name: value for name, value in tensors.items()}
    text = spelled({"peft_type": kind, "target_modules": ["q_proj", "down_proj"], **config})
    return {"adapter_config.json": text, "adapter_model.safetensors": safetensors_file(named, {"format": "pt"})}


def peft(pairs: Sequence[Known]) -> Folder:
    """Write PEFT's LoRA: one rank and one alpha for all."""
    halves = {f"{p.module}.lora_{half}.weight": getattr(p, half.lower()) for p in pairs for half in "AB"}
    return peft_folder(halves, "LORA", r=pairs[0].rank, lora_alpha=pairs[0].alpha)


# --- one sample for each reader -------------------------------------------------------------------------------------


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


_UNET = ("down_blocks.0.attentions.1.proj_in", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
_TEXT = ("model.layers.20.self_attn.q_proj", "model.layers.21.mlp.down_proj")
_BLOCKS = ("blk.3.attn_v", "blk.4.ffn_up")
_OUT, _INNER, _RANK, _ALPHA = 6, 8, 2, 3.0


def _floats(*shape: int, seed: int = 0) -> Array:
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
            Known(module, _floats(_RANK, _INNER, seed=n), _floats(_OUT, _RANK, seed=n + 9), _ALPHA)
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
    bank = _floats(5, length)
    tensors: dict[str, Array] = {"base_model.vblora_vector_bank": bank}
    updates = {}
    for module in _TEXT:
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
    blocks = {module: _floats(_RANK, _OUT, seed=n) for n, module in enumerate(_TEXT)}
    files = peft_folder({f"{module}.miss_block": block for module, block in blocks.items()}, "MISS", r=_RANK)
    updates = {f"{m}.weight": np.tile(block, (_INNER // _RANK, 1)).T.astype(np.float64) for m, block in blocks.items()}
    return Sample(files, updates, base={name: update.shape for name, update in updates.items()})


def _sbora() -> Sample:
    """SBoRA-FA: A are unit vectors, of which the file has the numbers of the inputs."""
    tensors: dict[str, Array] = {}
    updates = {}
    for n, module in enumerate(_TEXT):
        inputs, b = np.array([5, n]), _floats(_OUT, _RANK, seed=n)
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
        alpha, beta = _floats(5, seed=inner), _floats(7, seed=out)
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


def torchtune(pairs: Sequence[Known]) -> Folder:
    """Write torchtune's own file: nothing states alpha."""
    tensors: dict[str, Array] = {}
    for pair in pairs:
        tensors |= {f"{pair.module}.lora_a.weight": pair.a, f"{pair.module}.lora_b.weight": pair.b}
    return {"adapter_0.safetensors": safetensors_file(tensors)}


def _torchtune() -> Sample:
    sample = _of_pairs(torchtune, ("layers.20.attn.v_proj", "layers.21.mlp.w2"), alpha=_ALPHA)()
    names = ("model.layers.20.self_attn.v_proj.weight", "model.layers.21.mlp.down_proj.weight")
    return replace(sample, updates=dict(zip(names, sample.updates.values(), strict=True)))


def _lycoris() -> Sample:
    """A LoHa and a LoKr of LyCORIS, in sd-scripts' names: the second of a whole w1, whose alpha goes with w2."""
    one, other = (f"lora_unet_{module.replace('.', '_')}" for module in _UNET)
    w1a, w2a = _floats(_OUT, _RANK, seed=1), _floats(_OUT, _RANK, seed=2)
    w1b, w2b = _floats(_RANK, _INNER, seed=3), _floats(_RANK, _INNER, seed=4)
    left, b, a = _floats(2, 4, seed=5), _floats(3, 1, seed=6), _floats(1, 2, seed=7)
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
        a, b = _floats(_RANK, _INNER + 2, seed=20), _floats(_OUT + 3, _RANK, seed=21)
        if kind == "VERA":
            tensors |= {"base_model.vera_A": a, "base_model.vera_B": b}
        for n, module in enumerate(_TEXT):
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
        parts = {"vera_lambda_b": _floats(_OUT, seed=seed), "vera_lambda_d": _floats(_RANK, seed=seed + 1)}
        rows, inner = (part.astype(np.float64) for part in parts.values())
        return parts, (rows[:, None] * b * inner) @ a
    if kind == "LOKR":
        parts = {"lokr_w1": _floats(2, 4, seed=seed), "lokr_w2_a": _floats(3, _RANK, seed=seed + 1)}
        parts["lokr_w2_b"] = _floats(_RANK, 2, seed=seed + 2)
        left, one, other = (part.astype(np.float64) for part in parts.values())
        kronecker = np.kron(left, one @ other)
        return parts, np.asarray(_ALPHA / _RANK * kronecker, np.float64)
    down, up = _floats(_RANK, _INNER, seed=seed), _floats(_OUT, _RANK, seed=seed + 1)
    product: F64 = up.astype(np.float64) @ down.astype(np.float64)
    if kind == "ADALORA":
        values = _floats(_RANK, 1, seed=seed + 2)
        inner = values.astype(np.float64) * down.astype(np.float64)
        update: F64 = _ALPHA / (_RANK + 1e-5) * up.astype(np.float64) @ inner
        return {"lora_A": down, "lora_B": up, "lora_E": values}, update
    w2a, w2b = _floats(_OUT, _RANK, seed=seed + 2), _floats(_RANK, _INNER, seed=seed + 3)
    parts = {"hada_w1_a": up, "hada_w1_b": down, "hada_w2_a": w2a, "hada_w2_b": w2b}
    whole: F64 = _ALPHA / _RANK * product * (w2a.astype(np.float64) @ w2b.astype(np.float64))
    return parts, whole


def _ia3() -> Sample:
    """PEFT's (IA)^3: two factors that are not 1 on outputs, and on inputs. The tests' base is all zeros, and so are its
    updates."""
    outputs, inputs = np.ones((_OUT, 1), np.float32), np.ones((1, _INNER), np.float32)
    outputs[1:3, 0], inputs[0, 4:6] = (0.5, 2.0), (-1.0, 3.0)
    tensors = {f"{_TEXT[0]}.ia3_l": outputs, f"{_TEXT[1]}.ia3_l": inputs}
    updates = {f"{module}.weight": np.zeros((_OUT, _INNER)) for module in _TEXT}
    files = peft_folder(tensors, "IA3", feedforward_modules=["down_proj"], fan_in_fan_out=False)
    return Sample(files, updates, base={name: update.shape for name, update in updates.items()})


def clip_lora_metadata() -> dict[str, str]:
    """Return what CLIP-LoRA says of the sample: the last two layers of a text encoder."""
    return {"r": str(_RANK), "alpha": "3", "encoder": "text", "params": "['q', 'o']", "position": "top2"}


def _clip_lora() -> Sample:
    """The tensors of CLIP-LoRA's nested file, whose scale is alpha / sqrt(r)."""
    tensors: dict[str, Array] = {}
    updates = {}
    for number, (leaf, ours) in enumerate((("q_proj", "q_proj"), ("proj", "out_proj"))):
        a, b = _floats(_RANK, _INNER, seed=number), _floats(_OUT, _RANK, seed=number + 9)
        tensors |= {f"layer_{number}.{leaf}.w_lora_A": a, f"layer_{number}.{leaf}.w_lora_B": b}
        name = f"text_model.encoder.layers.{10 + number}.self_attn.{ours}.weight"
        updates[name] = 3 / math.sqrt(_RANK) * (b.astype(np.float64) @ a.astype(np.float64))
    return Sample({"lora.safetensors": safetensors_file(tensors, clip_lora_metadata())}, updates)


# By the id of the reader. A reader that is not here fails the law tests.
SAMPLES: Mapping[str, Callable[[], Sample]] = {
    "clip_lora": _clip_lora,
    "cloneofsimo": _of_pairs(cloneofsimo, ("0", "1"), "unet:{n}", scale=1.0),
    "diffusers": _of_pairs(diffusers, _UNET, "unet.{module}"),
    "gguf": _of_pairs(gguf, _BLOCKS),
    "kohya": _of_pairs(kohya, _UNET, "lora_unet_{flat}"),
    "lycoris": _lycoris,
    "lora_vit": _of_pairs(lora_vit, ("query", "value"), "w_{n:05d}", scale=1.0),
    "mlx": _of_pairs(mlx, _TEXT),
    "nola": _nola,
    "peft": _of_pairs(peft, _TEXT),
    **{f"peft_{kind.lower()}": _products(kind) for kind in ("ADALORA", "LOHA", "LOKR", "VERA")},
    "peft_ia3": _ia3,
    "peft_miss": _miss,
    "peft_vblora": _vblora,
    "raw": _of_pairs(raw, _TEXT, alpha=_ALPHA),
    "sbora": _sbora,
    "torchtune": _torchtune,
}


# --- strategies -----------------------------------------------------------------------------------------------------

# Layout: how it is written, its modules, and whether all modules have one rank and alpha.
WRITERS: Mapping[str, tuple[Callable[[Sequence[Known]], Folder], tuple[str, ...], bool]] = {
    "kohya": (kohya, _UNET, False),
    "diffusers": (diffusers, _UNET, False),
    "mlx": (mlx, _TEXT, True),
    "mlx npz": (lambda pairs: mlx(pairs, npz=True), _TEXT, True),
    "raw": (raw, _TEXT, False),
    "cloneofsimo": (cloneofsimo, ("0", "1"), False),
    "gguf": (gguf, _BLOCKS, True),
}
_VALUES = (0.0, 1.0, -0.5, 3.25, -(2.0**-20), 65504.0)


def known_loras(modules: Sequence[str], one_rank: bool) -> SearchStrategy[list[Known]]:
    """Draw small LoRAs on some of these modules, with numbers that both float16 and float32 hold."""
    st = lazy.st

    @st.composite
    def one(draw: DrawFn) -> list[Known]:
        names = modules[: draw(st.integers(1, len(modules)))]
        rank, alpha = draw(st.integers(1, 3)), draw(st.sampled_from([1.0, 4.0, 0.5, 16.0]))
        pairs = []
        for name in names:
            if not one_rank:
                rank, alpha = draw(st.integers(1, 3)), draw(st.sampled_from([1.0, 4.0, 0.5, 16.0]))
            out, inner = draw(st.integers(rank, 5)), draw(st.integers(rank, 5))
            dtype = draw(st.sampled_from(["<f4", "<f2"]))
            a, b = (
                np.array([draw(st.sampled_from(_VALUES)) for _ in range(n * m)], dtype).reshape(n, m)
                for n, m in ((rank, inner), (out, rank))
            )
            pairs.append(Known(name, a, b, alpha))
        return pairs

    return one()


def layout_folders(layout: str) -> SearchStrategy[tuple[list[Known], Folder]]:
    """Draw (what is in it, the folder) of one of `WRITERS`."""
    write, modules, one_rank = WRITERS[layout]
    return known_loras(modules, one_rank).map(lambda pairs: (pairs, write(pairs)))


def npz_header(data: bytes, name: str, header: str) -> bytes:
    """Return the ``.npz`` with another text as the header of one of its arrays, however wrong."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(buffer, "w") as out:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename == f"{name}.npy":
                length = struct.unpack("<H", content[8:10])[0]
                text = header.encode("latin-1")
                content = content[:8] + struct.pack("<H", len(text)) + text + content[10 + length :]
            out.writestr(zipfile.ZipInfo(entry.filename), content)
    return buffer.getvalue()
