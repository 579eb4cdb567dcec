"""Adapters of a known update in every layout that a reader reads, as the tools write them: ``{file name: bytes}``.

Written straight from the layouts' definitions, without the code of the readers. `samples` has one for each reader.
`WRITERS` are the layouts that hypothesis draws.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
# Modules as layouts name them: of a U-Net, of a decoder, and of GGUF.
UNET = ("down_blocks.0.attentions.1.proj_in", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
TEXT = ("model.layers.20.self_attn.q_proj", "model.layers.21.mlp.down_proj")
BLOCKS = ("blk.3.attn_v", "blk.4.ffn_up")


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


def torchtune(pairs: Sequence[Known]) -> Folder:
    """Write torchtune's own file: nothing states alpha."""
    tensors: dict[str, Array] = {}
    for pair in pairs:
        tensors |= {f"{pair.module}.lora_a.weight": pair.a, f"{pair.module}.lora_b.weight": pair.b}
    return {"adapter_0.safetensors": safetensors_file(tensors)}


# --- strategies -----------------------------------------------------------------------------------------------------

# Layout: how it is written, its modules, and whether all modules have one rank and alpha.
WRITERS: Mapping[str, tuple[Callable[[Sequence[Known]], Folder], tuple[str, ...], bool]] = {
    "kohya": (kohya, UNET, False),
    "diffusers": (diffusers, UNET, False),
    "mlx": (mlx, TEXT, True),
    "mlx npz": (lambda pairs: mlx(pairs, npz=True), TEXT, True),
    "raw": (raw, TEXT, False),
    "cloneofsimo": (cloneofsimo, ("0", "1"), False),
    "gguf": (gguf, BLOCKS, True),
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
