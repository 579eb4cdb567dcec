"""onnxruntime-genai: its builder makes an ONNX model of a base and an adapter, which runs.

``python run_onnxruntime.py BASE < folders.json``; options: ``tokens``, what is asked; ``out``, an .npy for logits
(tokens, vocabulary).
"""

from __future__ import annotations

import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

import runner

BASE = runner.base()
runner.prefer(runner.library("onnxruntime"))

import numpy as np
import onnxruntime_genai


def load(folder: Path, base: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as made:
        sys.argv = ["builder", "-i", str(BASE), "-o", made, "-p", "fp32", "-e", "cpu", "-c", made]
        sys.argv += ["--extra_options", f"adapter_path={folder}"]
        runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
        model, logits = onnxruntime_genai.Model(made), []
        for count in range(1, len(options["tokens"]) + 1):  # logits are given of the last token alone
            settings = onnxruntime_genai.GeneratorParams(model)
            settings.set_search_options(max_length=count + 1)
            generator = onnxruntime_genai.Generator(model, settings)
            generator.append_tokens(np.array([options["tokens"][:count]], np.int32))
            logits.append(generator.get_logits()[0, -1])
    np.save(options["out"], np.array(logits))
    return {}


if __name__ == "__main__":
    runner.serve(load)
