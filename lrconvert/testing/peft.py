"""PEFT LoRA: configurations as ``LoraConfig.save_pretrained`` writes them, and folders with weights that fit them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lrconvert.testing import lazy
from lrconvert.testing.raw_files import spelled, with_header

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_KEYS = ("q_proj", "layers.0.v_proj", ".*dense", r"model\.layers\.1\..*", "model.layers.0.q_proj", "none_such")
_MODULES = ("model.layers.0.q_proj", "model.layers.0.v_proj", "model.layers.1.q_proj", "score.dense")


def peft_configs() -> SearchStrategy[dict[str, Any]]:
    """Return configurations of plain LoRAs, with patterns that are names, ends of names and regular expressions."""
    st = lazy.st
    ranks, alphas = st.integers(1, 3), st.integers(0, 64) | st.sampled_from([0.5, 1e-3, 16.0])
    keys = st.sampled_from(_KEYS)
    return st.fixed_dictionaries(
        {"peft_type": st.just("LORA"), "r": ranks, "lora_alpha": alphas},
        optional={
            "alpha_pattern": st.dictionaries(keys, alphas, max_size=3),
            "rank_pattern": st.dictionaries(keys, ranks, max_size=3),
            "auto_mapping": st.none() | st.just({"base_model_class": "BertModel", "parent_library": "transformers"}),
            "base_model_name_or_path": st.none() | st.sampled_from(["org/base", "/home/me/base", "../../etc/passwd"]),
            "bias": st.just("none"),
            "fan_in_fan_out": st.booleans(),
            "inference_mode": st.booleans(),
            "init_lora_weights": st.sampled_from([True, False, "gaussian", "orthogonal", None]),
            "layers_to_transform": st.none(),
            "lora_dropout": st.sampled_from([0.0, 0.05]),
            "modules_to_save": st.none() | st.just(["classifier"]),
            "peft_version": st.just("0.21.2"),
            "revision": st.none() | st.just("main"),
            "target_modules": st.sampled_from([["q_proj", "v_proj"], ".*_proj", None]),
            "task_type": st.none() | st.sampled_from(["CAUSAL_LM", "SEQ_CLS"]),
            "use_dora": st.just(False),
            "use_rslora": st.booleans(),
        },
    )


def _rank(config: Mapping[str, Any], module: str) -> int:
    """Return the rank by PEFT's rule: that of the first key that is the module's name, or matches the end of it."""
    matching = (r for key, r in config.get("rank_pattern", {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return int(next(matching, config["r"]))


def peft_folders() -> SearchStrategy[dict[str, bytes]]:
    """Return folders, ``{name: bytes}``, with a configuration and small F32 weights, some of which are zero."""
    st = lazy.st

    @st.composite
    def folders(draw: DrawFn) -> dict[str, bytes]:
        config = draw(peft_configs())
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        data = b""
        for module in sorted(draw(st.sets(st.sampled_from(_MODULES), min_size=1, max_size=3))):
            rank = _rank(config, module)
            for half, shape in (("A", [rank, draw(st.integers(1, 3))]), ("B", [draw(st.integers(1, 3)), rank])):
                numbers = [draw(st.sampled_from(_NUMBERS)) for _ in range(shape[0] * shape[1])]
                stop = len(data) + 4 * len(numbers)
                name = f"base_model.model.{module}.lora_{half}.weight"
                header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), stop]}
                data += b"".join(numbers)
        return {CONFIG_NAME: spelled(config), WEIGHTS_NAME: with_header(header, data)}

    return folders()


# float32: 0, -0, 1, -0.5, the largest, the smallest.
_NUMBERS = tuple(bytes.fromhex(h) for h in ("00000000", "00000080", "0000803f", "000000bf", "ffff7f7f", "01000000"))
