"""llama.cpp's own converter on adapters, the file read back: ``python run_llamacpp.py BASE < folders.json``.

What the runtime does with the file (`src/llama-adapter.cpp`, C++, not built here) is repeated below in Python.
"""

from __future__ import annotations

import logging
import runpy
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import runner

LIB = runner.library("llamacpp")
BASE = runner.base()
sys.path[:0] = [str(LIB), str(LIB / "gguf-py")]

import gguf
import numpy as np

MODULES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
WHOLE = {"token_embd": "model.embed_tokens", "output": "lm_head"}


def load(folder: Path, base: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """`options`: ``outtype`` of the converter; ``out``, an .npz for tensors; ``written``, a file to read instead;
    ``kept``, a file for what the converter wrote; ``as_base``, a file to convert `folder`, a base, to."""
    if "as_base" in options:
        return _convert_base(folder, Path(options["as_base"]), options["outtype"])
    if "written" in options:
        return _read(Path(options["written"]), options)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "adapter.gguf"
        sys.argv = ["convert", "--base", options.get("base", str(BASE)), "--outfile", str(out), str(folder)]
        sys.argv += ["--outtype", options.get("outtype", "f32")]
        try:
            runpy.run_path(str(LIB / "convert_lora_to_gguf.py"), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"the converter ended with {end.code}") from None
        finally:
            logging.getLogger().handlers.clear()
        if "kept" in options:
            shutil.copy(out, options["kept"])
        return _read(out, options)


def _convert_base(folder: Path, out: Path, outtype: str) -> dict[str, Any]:
    """Convert a base as ``convert_hf_to_gguf.py`` does, with a vocabulary of made-up words: it takes tokenizers that it
    knows by a digest, which those of tiny models are not."""
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    kind = get_model_class(get_model_architecture(ModelBase.load_hparams(folder, False), ModelType.TEXT))

    class Base(kind):  # type: ignore[misc,valid-type]
        model_arch = kind.model_arch

        def set_vocab(self) -> None:
            count, writer = self.hparams["vocab_size"], self.gguf_writer
            writer.add_tokenizer_model("gpt2")
            writer.add_tokenizer_pre("gpt-2")
            writer.add_token_list([f"w{number}." for number in range(count)])
            writer.add_token_types([gguf.TokenType.NORMAL] * count)
            writer.add_token_merges(["w 0"])
            writer.add_eos_token_id(0)

    types = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
    Base(folder, gguf.LlamaFileType[types[outtype]], out).write()
    return {"bytes": out.stat().st_size}


def _read(path: Path, options: dict[str, Any]) -> dict[str, Any]:
    reader = gguf.GGUFReader(path)
    if "out" in options:
        np.savez(options["out"], **{f"{t.name}:{t.tensor_type.name}": np.array(t.data) for t in reader.tensors})
    alpha = reader.fields["adapter.lora.alpha"].contents()
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    norms, dropped, shapes = {}, [], {}
    for name, a in stored.items():
        if name.endswith("_norm.weight"):
            dropped.append(name)  # llama_adapter_lora_init_impl skips them
        if not name.endswith(".lora_a"):
            continue
        module = name.removesuffix(".weight.lora_a")
        b = stored[f"{module}.weight.lora_b"]
        if module == "token_embd":
            a = a.T  # stored flipped, see build_inp_embd
        rank = b.shape[1]
        shapes[module] = [b.shape[0], a.shape[1]]
        scale = alpha / rank if alpha else 1.0  # llama_adapter_lora_weight::get_scale
        full = WHOLE.get(module)
        if full is None:
            _, block, kind = module.split(".")
            full = f"model.layers.{block}.{MODULES.get(kind, kind)}"
        norms[full] = runner.norm(scale, b, a)
    fields = {key: value.contents() for key, value in reader.fields.items() if not key.startswith("GGUF.")}
    return {"norms": norms, "dropped": dropped, "shapes": shapes, "fields": fields}


if __name__ == "__main__":
    runner.serve(load)
