"""llama.cpp itself, llama-server in the process: ``python run_xllamacpp.py MODEL.gguf < jobs.json``.

A job is [adapter.gguf, options]. Options: ``model``, instead of that of the command line; ``more``, other adapters;
``requests``, each with ``prompt`` (token ids), ``n`` (tokens to write) and, where the scales of adapters are not 1,
``scales``; ``out``, an .npz for the log probabilities (n, vocabulary) of every request. The answer has the tokens of
every request. A job has a process of its own, since llama.cpp aborts where it cannot go on.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
from pathlib import Path
from typing import Any

import runner

LIB = runner.library("xllamacpp")
MODEL = runner.base()
runner.prefer(LIB)

import numpy as np
import xllamacpp

F32 = xllamacpp.ggml_type.GGML_TYPE_F32


def load(adapter: Path, base: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Raises RuntimeError, with what the program said last, if it refuses or aborts."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        os.dup2(writing, 2)
        status = 1
        try:
            _serve(adapter, options)
            status = 0
        except Exception as error:
            os.write(2, f"\n{type(error).__name__}: {error}".encode())
            # As a program ends in C: what its thread has still to log is written first.
            ctypes.CDLL(None).exit(status)
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, errors="replace") as pipe:
        said = pipe.read()
    status = os.waitpid(child, 0)[1]
    if status:
        how = f"aborts ({signal.Signals(os.WTERMSIG(status)).name})" if os.WIFSIGNALED(status) else "stops"
        lines = [
            line for line in said.splitlines() if "GGML_ASSERT" in line or "error" in line.lower() or "failed" in line
        ]
        raise RuntimeError(f"llama.cpp {how}: {(lines or said.splitlines() or [''])[0][-250:]}")
    answer: dict[str, Any] = json.loads(Path(options["out"]).with_suffix(".json").read_text())
    return answer


def _serve(adapter: Path, options: dict[str, Any]) -> None:
    params = xllamacpp.CommonParams()
    params.model.path = options.get("model", str(MODEL))
    params.n_ctx, params.n_parallel, params.warmup, params.cpuparams.n_threads = 128, 1, False, 1
    params.cache_type_k = params.cache_type_v = F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    paths = [str(adapter), *options.get("more", ())]
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in paths]
    server = xllamacpp.Server(params)
    logs, tokens = {}, []
    for number, request in enumerate(options["requests"]):
        body = {"prompt": request["prompt"], "max_tokens": request["n"], "temperature": 0, "cache_prompt": False}
        body |= {
            "n_probs": options["vocabulary"],
            "lora": [{"id": n, "scale": s} for n, s in enumerate(request["scales"])],
        }
        answer = server.handle_completions(body)
        if "error" in answer:
            raise RuntimeError(answer["error"]["message"])
        places = answer["choices"][0]["logprobs"]["content"]
        tokens.append([place["id"] for place in places])
        logs[str(number)] = np.array([_in_order(place["top_logprobs"]) for place in places])
    np.savez(options["out"], **logs)
    Path(options["out"]).with_suffix(".json").write_text(json.dumps({"tokens": tokens}))


def _in_order(listed: list[dict[str, Any]]) -> np.ndarray:
    """Log probabilities of all tokens, by their number."""
    values = np.full(len(listed), np.nan)
    for entry in listed:
        values[entry["id"]] = entry["logprob"]
    return values


if __name__ == "__main__":
    runner.serve(load)
