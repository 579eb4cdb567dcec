"""llama.cpp for measurements: logits of given tokens, and quantized bases, by its C interface.

The library is that of the wheel `xllamacpp`, the converter that of `llama-cpp-python`, both in the environments of the
peers (``python tests/peers/make.py llamacpp xllamacpp``). Facts of the interface are those of ``include/llama.h``; the
two structures that are passed by value are checked against their defaults before anything is changed in them.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cells
import numpy as np

_ENVS = cells.ROOT / "tests" / "peers" / ".envs"
_CONVERTER = _ENVS / "llamacpp" / "lib"
_LIBRARY = _ENVS / "xllamacpp" / "lib" / "xllamacpp" / "xllamacpp.abi3.so"
_PLACES = 512  # tokens in a batch, and in a text


def absent() -> str:
    """Return which peer is missing, or ""."""
    wanted = {"llamacpp": _CONVERTER, "xllamacpp": _LIBRARY}
    return next((f"the peer {name} has no environment" for name, path in wanted.items() if not path.exists()), "")


# --- bases ----------------------------------------------------------------------------------------------------------

# What ``convert_hf_to_gguf.py --outtype bf16`` does; the script itself is not in the environment. The vocabulary is
# read from tokenizer.json.
_CONVERT = """
import sys
from pathlib import Path
import gguf
from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
base, out = map(Path, sys.argv[1:])
kind = get_model_class(get_model_architecture(ModelBase.load_hparams(base, False), ModelType.TEXT))
kind.set_vocab = kind._set_vocab_gpt2
kind(base, gguf.LlamaFileType.MOSTLY_BF16, out).write()
"""


def convert(base: Path, out: Path) -> Path:
    """Convert a base to GGUF in bf16, unless `out` is there."""
    if not out.exists():
        partial = out.with_suffix(".partial")
        words = [sys.executable, "-c", _CONVERT, str(base), str(partial)]
        environment = {"PYTHONPATH": f"{_CONVERTER}:{_CONVERTER / 'gguf-py'}", "HF_HUB_OFFLINE": "1"}
        subprocess.run(words, check=True, capture_output=True, env=environment)
        partial.rename(out)
    return out


def _q4_k_m(name: str, columns: int, blocks: int) -> str:
    """Return the type that llama-quantize gives a layer of a Llama with tied embeddings as Q4_K_M
    (``src/llama-quant.cpp``): its types of 256 columns fall back to others where a row is no multiple of that."""
    if name == "token_embd.weight":
        return "Q6_K" if columns % 256 == 0 else "Q8_0"
    block = int(name.split(".")[1])
    more = block < blocks // 8 or block >= 7 * blocks // 8 or (block - blocks // 8) % 3 == 2
    if more and re.search(r"\.(attn_v|ffn_down)\.", name):
        return "Q6_K" if columns % 256 == 0 else "Q8_0"
    return "Q4_K" if columns % 256 == 0 else "Q5_0"


_MIXES: dict[str, Callable[[str, int, int], str]] = {
    "q8_0": lambda name, columns, blocks: "Q8_0",
    "q4_k_m": _q4_k_m,
    "q4_0": lambda name, columns, blocks: "Q8_0" if name == "token_embd.weight" else "Q4_0",
}


def quantize(source: Path, out: Path, mix: str) -> dict[str, int]:
    """Quantize a bf16 GGUF by llama.cpp's own code, unless `out` is there; return how many layers got each type."""
    gguf = _gguf()
    reader = gguf.GGUFReader(source)
    matrices = [tensor for tensor in reader.tensors if len(tensor.shape) == 2]
    blocks = 1 + max(int(t.name.split(".")[1]) for t in matrices if t.name.startswith("blk."))
    kinds = {t.name: _MIXES[mix](t.name, int(t.shape[0]), blocks) for t in matrices}
    if not out.exists():
        partial = out.with_suffix(".partial")
        writer = gguf.GGUFWriter(partial, "llama")
        for field in reader.fields.values():
            if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                kind = field.types[0]
                writer.add_key_value(
                    field.name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None
                )
        for tensor in reader.tensors:
            kind = gguf.GGMLQuantizationType[kinds[tensor.name]] if tensor.name in kinds else tensor.tensor_type
            data = tensor.data
            if tensor.name in kinds:
                data = _quantized(gguf.dequantize(tensor.data, tensor.tensor_type), kind)
            writer.add_tensor(tensor.name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.rename(out)
    return {kind: list(kinds.values()).count(kind) for kind in sorted(set(kinds.values()))}


def _quantized(values: np.ndarray, kind: Any) -> np.ndarray:
    rows, columns = values.shape
    values = np.ascontiguousarray(values, np.float32)
    row_bytes = _gguf().quant_shape_to_byte_shape((columns,), kind)[0]
    out = np.empty((rows, row_bytes), np.uint8)
    pointer, counts = ctypes.c_void_p, [ctypes.c_int64] * 3
    chunk = _library().ggml_quantize_chunk
    chunk.argtypes, chunk.restype = [ctypes.c_int, pointer, pointer, *counts, pointer], ctypes.c_size_t
    made = chunk(int(kind), values.ctypes.data, out.ctypes.data, 0, rows, columns, None)
    assert made == out.nbytes, (kind, made, out.nbytes)
    return out


def _gguf() -> Any:
    place = str(_CONVERTER / "gguf-py")
    if place not in sys.path:
        sys.path.insert(0, place)
    import gguf

    return gguf


# --- the runtime ----------------------------------------------------------------------------------------------------


class _ModelParams(ctypes.Structure):
    _fields_ = [("raw", ctypes.c_uint8 * 80)]  # all defaults


class _ContextParams(ctypes.Structure):
    """``llama_context_params``; only the first numbers are changed."""

    _fields_ = [
        ("n_ctx", ctypes.c_uint32), ("n_batch", ctypes.c_uint32), ("n_ubatch", ctypes.c_uint32),
        ("n_seq_max", ctypes.c_uint32), ("n_rs_seq", ctypes.c_uint32), ("n_outputs_max", ctypes.c_uint32),
        ("n_outputs_max_per_seq", ctypes.c_uint32), ("n_threads", ctypes.c_int32),
        ("n_threads_batch", ctypes.c_int32), ("rest", ctypes.c_uint8 * 132),
    ]  # fmt: skip


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32), ("token", ctypes.POINTER(ctypes.c_int32)), ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p), ("n_seq_id", ctypes.c_void_p), ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]  # fmt: skip


_QUIET = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, data: None)


def _library() -> Any:
    lib = ctypes.CDLL(str(_LIBRARY))
    pointer = ctypes.c_void_p
    for name, result, arguments in (
        ("llama_log_set", None, [type(_QUIET), pointer]),
        ("llama_model_default_params", _ModelParams, []),
        ("llama_context_default_params", _ContextParams, []),
        ("llama_model_load_from_file", pointer, [ctypes.c_char_p, _ModelParams]),
        ("llama_init_from_model", pointer, [pointer, _ContextParams]),
        ("llama_adapter_lora_init", pointer, [pointer, ctypes.c_char_p]),
        ("llama_set_adapters_lora", ctypes.c_int32, [pointer, pointer, ctypes.c_size_t, pointer]),
        ("llama_get_memory", pointer, [pointer]),
        ("llama_memory_clear", None, [pointer, ctypes.c_bool]),
        ("llama_decode", ctypes.c_int32, [pointer, _Batch]),
        ("llama_get_logits", ctypes.POINTER(ctypes.c_float), [pointer]),
        ("llama_model_get_vocab", pointer, [pointer]),
        ("llama_vocab_n_tokens", ctypes.c_int32, [pointer]),
        ("llama_free", None, [pointer]),
        ("llama_model_free", None, [pointer]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


class Model:
    """A base on one thread, with an adapter or none."""

    def __init__(self, path: Path, adapter: Path | None = None) -> None:
        self.lib = lib = _library()
        lib.llama_log_set(_QUIET, None)
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        settings = lib.llama_context_default_params()
        expected = [512, 2048, 512, 1, 0, 0, 1, 4, 4]
        if [getattr(settings, name) for name, _ in settings._fields_[:-1]] != expected:
            raise RuntimeError("this llama.cpp has other context parameters; see include/llama.h")
        settings.n_ctx = settings.n_batch = settings.n_ubatch = settings.n_outputs_max = _PLACES
        settings.n_outputs_max_per_seq = _PLACES
        settings.n_threads = settings.n_threads_batch = 1
        self.context = self.model and lib.llama_init_from_model(self.model, settings)
        if not self.context:
            raise RuntimeError(f"llama.cpp does not load {path.name}")
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        if adapter is not None:
            loaded = lib.llama_adapter_lora_init(self.model, str(adapter).encode())
            if not loaded:
                raise RuntimeError(f"llama.cpp does not load {adapter.name}")
            pointers, scales = (ctypes.c_void_p * 1)(loaded), (ctypes.c_float * 1)(1.0)
            if lib.llama_set_adapters_lora(self.context, pointers, 1, scales):
                raise RuntimeError(f"llama.cpp does not apply {adapter.name}")

    def logits(self, tokens: Sequence[int], first: int) -> np.ndarray:
        """Return float32 (tokens - 1 - first, vocabulary): the logits at all places from `first` on but the last."""
        lib, count = self.lib, len(tokens) - 1
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        batch = _Batch(count, (ctypes.c_int32 * count)(*tokens[:count]))
        batch.logits = (ctypes.c_int8 * count)(*(int(place >= first) for place in range(count)))
        if lib.llama_decode(self.context, batch):
            raise RuntimeError(f"llama.cpp does not decode {count} tokens")
        return np.ctypeslib.as_array(lib.llama_get_logits(self.context), (count - first, self.vocabulary)).copy()

    def close(self) -> None:
        """Free the memory, of the adapter as well."""
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)


def logs(model: Model, texts: Sequence[tuple[Sequence[int], int]]) -> Iterator[np.ndarray]:
    """Yield float32 log probabilities (answer tokens, vocabulary) of a text after the other; a text is its tokens, and
    how many of them are the prompt."""
    for tokens, prompt in texts:
        logits = model.logits(tokens, prompt - 1)
        top = logits.max(1, keepdims=True)
        yield logits - top - np.log(np.exp(logits - top).sum(1, keepdims=True))
