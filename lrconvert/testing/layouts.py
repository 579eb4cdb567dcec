"""Adapters of a known update in the layouts that readers know, as their tools write them: ``{file name: bytes}``.

Written straight from the layouts' definitions, without the code of the readers.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lrconvert.core.dtypes import Array
from lrconvert.testing import lazy
from lrconvert.testing.gguf import Field, gguf_file
from lrconvert.testing.raw_files import spelled, with_header

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

Folder = dict[str, bytes]
Tensors = Mapping[str, Array]


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


def safetensors_file(tensors: Tensors, metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file of these arrays."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    data = b""
    for name, array in tensors.items():
        dtype = {"f": "F", "i": "I", "u": "U"}[array.dtype.kind] + str(8 * array.dtype.itemsize)
        stop = len(data) + array.nbytes
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(data), stop]}
        data += array.tobytes()
    return with_header(header, data)


def npz_file(tensors: Tensors, compress: bool = False) -> bytes:
    """A ``.npz`` of these arrays."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        for name, array in tensors.items():
            entry = io.BytesIO()
            np.lib.format.write_array(entry, array, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), entry.getvalue(), archive.compression)
    return buffer.getvalue()


def _up(known: Known) -> Array:
    """B in as many dimensions as A."""
    return known.b.reshape(*known.b.shape, *(1 for _ in known.a.shape[2:]))


# --- layouts --------------------------------------------------------------------------------------------------------


def kohya(found: Iterable[Known], prefix: str = "lora_unet") -> Folder:
    """sd-scripts."""
    tensors: dict[str, Array] = {}
    for known in found:
        name = f"{prefix}_{known.module.replace('.', '_')}"
        tensors[f"{name}.alpha"] = np.array(known.alpha, np.float32)
        tensors[f"{name}.lora_down.weight"] = known.a
        tensors[f"{name}.lora_up.weight"] = _up(known)
    return {"lora.safetensors": safetensors_file(tensors, {"ss_network_module": "networks.lora"})}


def diffusers(found: Iterable[Known], model: str = "unet", form: str = "peft") -> Folder:
    """pytorch_lora_weights.safetensors. `form`: "peft" (lora_A), "lora" (lora.down), "linear" (lora_linear_layer.down),
    "processor" (the oldest, attention layers only, without the model's name)."""
    names = {
        "peft": ("lora_A.weight", "lora_B.weight"),
        "lora": ("lora.down.weight", "lora.up.weight"),
        "linear": ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    }
    tensors: dict[str, Array] = {}
    for known in found:
        if form == "processor":
            attention, _, leaf = known.module.removesuffix(".0").rpartition(".")
            stem = f"{attention}.processor.{leaf}_lora"
            tensors |= {f"{stem}.down.weight": known.a, f"{stem}.up.weight": _up(known)}
            continue
        stem = f"{model}.{known.module}"
        tensors |= {f"{stem}.{names[form][0]}": known.a, f"{stem}.{names[form][1]}": _up(known)}
        if known.scale != 1:
            tensors[f"{stem}.alpha"] = np.array(known.alpha, np.float32)
    return {"pytorch_lora_weights.safetensors": safetensors_file(tensors, {"format": "pt"})}


def mlx(found: Sequence[Known], npz: bool = False) -> Folder:
    """mlx-lm: one rank and one scale for all."""
    tensors: dict[str, Array] = {}
    for known in found:
        tensors[f"{known.module}.lora_a"] = np.ascontiguousarray(known.a.T)
        tensors[f"{known.module}.lora_b"] = np.ascontiguousarray(known.b.T)
    first = found[0]
    parameters = {"rank": first.rank, "scale": first.scale, "dropout": 0.0}
    config = spelled({"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": parameters})
    weights = {"adapters.npz": npz_file(tensors)} if npz else {"adapters.safetensors": safetensors_file(tensors)}
    return {"adapter_config.json": config, **weights}


def raw(found: Iterable[Known], suffix: str = "") -> Folder:
    """loralib's state dict: nothing states alpha."""
    tensors: dict[str, Array] = {}
    for known in found:
        tensors |= {f"{known.module}.lora_A{suffix}": known.a, f"{known.module}.lora_B{suffix}": known.b}
    return {"lora.safetensors": safetensors_file(tensors)}


def cloneofsimo(found: Iterable[Known]) -> Folder:
    """cloneofsimo's lora, modules by number: the scale is 1 whatever alpha is."""
    tensors: dict[str, Array] = {}
    metadata = {"unet": json.dumps(["CrossAttention"]), "<s1>": "<embed>"}
    for place, known in enumerate(found):
        tensors |= {f"unet:{place}:up": known.b, f"unet:{place}:down": known.a}
        metadata[f"unet:{place}:rank"] = str(known.rank)
    tensors["<s1>"] = np.arange(4, dtype=np.float32)
    return {"lora.safetensors": safetensors_file(tensors, metadata)}


def lora_vit(found: Iterable[Known], turned: bool = False) -> Folder:
    """LoRA-ViT: query and value of each block, by number; the scale is 1."""
    tensors: dict[str, Array] = {}
    for place, known in enumerate(found):
        a, b = (known.a.T, known.b.T) if turned else (known.a, known.b)
        tensors |= {f"w_a_{place:03d}": np.ascontiguousarray(a), f"w_b_{place:03d}": np.ascontiguousarray(b)}
    return {"lora.safetensors": safetensors_file(tensors)}


_GGML = {"f4": 0, "f2": 1}


def gguf_parts(found: Sequence[Known], architecture: str = "llama") -> tuple[dict[str, Field], dict[str, Any]]:
    """(fields, tensors) of llama.cpp's adapter: one alpha for all."""
    fields: dict[str, Field] = {
        "general.architecture": architecture,
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": float(found[0].alpha),
    }
    tensors = {}
    for known in found:
        for half, array in (("a", known.a), ("b", known.b)):
            tensors[f"{known.module}.weight.lora_{half}"] = (_GGML[array.dtype.str[1:]], array.shape, array.tobytes())
    return fields, tensors


def gguf(found: Sequence[Known], architecture: str = "llama") -> Folder:
    """llama.cpp's adapter."""
    return {"lora.gguf": gguf_file(*gguf_parts(found, architecture))[0]}


# --- strategies -----------------------------------------------------------------------------------------------------

_UNET = ("down_blocks.0.attentions.1.proj_in", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
_TEXT = ("model.layers.20.self_attn.q_proj", "model.layers.21.mlp.down_proj")
# Layout: how it is written, its modules, and whether all modules have one rank and alpha.
WRITERS: Mapping[str, tuple[Callable[[Sequence[Known]], Folder], tuple[str, ...], bool]] = {
    "kohya": (kohya, _UNET, False),
    "diffusers": (diffusers, _UNET, False),
    "mlx": (mlx, _TEXT, True),
    "mlx npz": (lambda found: mlx(found, npz=True), _TEXT, True),
    "raw": (raw, _TEXT, False),
    "cloneofsimo": (cloneofsimo, ("0", "1"), False),
    "gguf": (gguf, ("blk.3.attn_v", "blk.4.ffn_up"), True),
}
_VALUES = (0.0, 1.0, -0.5, 3.25, -(2.0**-20), 65504.0)


def known_loras(modules: Sequence[str], one_rank: bool) -> SearchStrategy[list[Known]]:
    """Small LoRAs on some of these modules, with numbers that both float16 and float32 hold."""
    st = lazy.st

    @st.composite
    def one(draw: DrawFn) -> list[Known]:
        names = modules[: draw(st.integers(1, len(modules)))]
        rank, alpha = draw(st.integers(1, 3)), draw(st.sampled_from([1.0, 4.0, 0.5, 16.0]))
        found = []
        for name in names:
            if not one_rank:
                rank, alpha = draw(st.integers(1, 3)), draw(st.sampled_from([1.0, 4.0, 0.5, 16.0]))
            out, inner = draw(st.integers(rank, 5)), draw(st.integers(rank, 5))
            dtype = draw(st.sampled_from(["<f4", "<f2"]))
            a, b = (
                np.array([draw(st.sampled_from(_VALUES)) for _ in range(n * m)], dtype).reshape(n, m)
                for n, m in ((rank, inner), (out, rank))
            )
            found.append(Known(name, a, b, alpha))
        return found

    return one()


def layout_folders(layout: str) -> SearchStrategy[tuple[list[Known], Folder]]:
    """(what is in it, the folder) of one of `WRITERS`."""
    write, modules, one_rank = WRITERS[layout]
    return known_loras(modules, one_rank).map(lambda found: (found, write(found)))


def npz_header(data: bytes, name: str, header: str) -> bytes:
    """The ``.npz`` with another text as the header of one of its arrays, however wrong."""
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
