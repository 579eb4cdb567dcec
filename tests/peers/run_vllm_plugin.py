"""vLLM's own plugin loader, registry of resolvers and `OpenAIServingModels` with our plugin: ``python
run_vllm_plugin.py BASE < names.json``. Only the engine is replaced: its `add_lora` does what a worker does, on the CPU.

The first answer is what the loader has found; then one for each name.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
import types
from pathlib import Path
from typing import Any

import runner
import standin

LIB = runner.library("vllm")
runner.prefer(LIB)
REAL = ["plugins", "envs", "exceptions", "lora.resolver", "lora.request", "lora.peft_helper", "lora.lora_model"]
REAL += ["lora.lora_weights", "lora.utils", "utils.counter", "entrypoints.openai.models.serving"]
REAL += ["entrypoints.openai.models.protocol", "entrypoints.serve.engine.protocol", "entrypoints.serve.lora.protocol"]
REAL += ["entrypoints.serve.exception_handling.error_response", "entrypoints.serve.exception_handling.utils"]
standin.install(
    "vllm",
    LIB,
    [f"vllm.{name}" for name in REAL],
    {
        "vllm.utils.torch_utils": {"PIN_MEMORY": False},
        # What is raised and caught has to be a class.
        "vllm.v1.engine.exceptions": {"EngineDeadError": type("EngineDeadError", (Exception,), {})},
        "vllm.logger": {"init_logger": logging.getLogger},
    },
)
logging.Logger.info_once = logging.Logger.info  # type: ignore[attr-defined]

import vllm.plugins as plugins
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

sys.modules["vllm.entrypoints.serve"].create_error_response = create_error_response  # type: ignore[attr-defined]

from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

EXPECTED = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"}


class Engine:
    """The engine, as far as adapters are concerned: `WorkerLoRAManager._load_adapter` without a model."""

    def __init__(self, base: Path, max_rank: int) -> None:
        self.config = json.loads((base / "config.json").read_text())
        self.model_config = types.SimpleNamespace(model=str(base), max_model_len=64)
        self.renderer = self.input_processor = None
        self.max_rank = max_rank
        self.loaded: list[dict[str, Any]] = []

    async def add_lora(self, request: LoRARequest) -> bool:
        helper = PEFTHelper.from_local_dir(request.lora_path, self.config["max_position_embeddings"])
        helper.validate_legal(types.SimpleNamespace(max_lora_rank=self.max_rank))
        model = LoRAModel.from_local_checkpoint(
            request.lora_path,
            EXPECTED,
            helper,
            device="cpu",
            model_vocab_size=self.config["vocab_size"],
            lora_model_id=request.lora_int_id,
        )
        norms = {name: runner.norm(one.scaling, one.lora_b, one.lora_a) for name, one in model.loras.items()}
        self.loaded.append({"name": request.lora_name, "id": request.lora_int_id, "norms": norms, "rank": helper.r})
        return True


def loader() -> dict[str, Any]:
    """Load the plugins twice, as vLLM does in one process or another, and say what is there."""
    resolvers = []
    for _ in range(2):
        plugins.plugins_loaded = False
        plugins.load_general_plugins()
        resolvers.append(dict(LoRAResolverRegistry.resolvers))
    (resolver,) = resolvers[0].values()
    return {
        "found": sorted(plugins.load_plugins_by_group(plugins.DEFAULT_PLUGINS_GROUP)),
        "resolvers": sorted(LoRAResolverRegistry.get_supported_resolvers()),
        "once": resolvers[0] == resolvers[1],
        "is_resolver": isinstance(resolver, LoRAResolver),
    }


async def resolve(models: OpenAIServingModels, name: str) -> dict[str, Any]:
    """The answer to a request for a model of that name: `_check_model`, and the handler of what that raises."""
    try:
        made = await models.resolve_lora(name)
    except Exception as error:
        made = create_error_response(error)
    if isinstance(made, ErrorResponse):
        return {"code": made.error.code, "type": made.error.type, "message": made.error.message}
    return {"code": 200, "name": made.lora_name, "path": made.lora_path, "id": made.lora_int_id}


async def main() -> list[dict[str, Any]]:
    asked = json.loads(sys.stdin.read())
    answers = [loader()]
    engine = Engine(runner.base(), asked["max_lora_rank"])
    models = OpenAIServingModels(engine, [BaseModelPath(name="base", model_path=str(runner.base()))])
    answers += await asyncio.gather(*(resolve(models, name) for name in asked["names"]))
    return [*answers, {"loaded": engine.loaded, "cards": [c.id for c in (await models.show_available_models()).data]}]


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        answers = asyncio.run(main())
    print(json.dumps(answers))
