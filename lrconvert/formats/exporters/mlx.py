"""mlx-lm: ``adapters.safetensors`` with ``<module>.lora_a`` (in, r) and ``lora_b`` (r, out), and an adapter_config.json
that lists every adapted module by its whole name, for ``--adapter-path FOLDER``. One rank, one scale.

Modules of mlx-lm's models are called as in transformers, but for GPT-2, whose ``transformer.h`` is ``model.h`` there,
and models that see, whose ``model.language_model`` is ``language_model.model``, as it was in transformers 4.
"""

from __future__ import annotations

import re

from lrconvert.core.errors import ExportError, OptionError
from lrconvert.core.wording import spelled
from lrconvert.formats.exporters.base import Exporter, ExportOptions, Folder
from lrconvert.formats.exporters.shared.files import entry, json_file, weights_file
from lrconvert.formats.exporters.shared.plain import exclude, factors, module_of, refuse_extras
from lrconvert.lora.adapter import Adapter, Target

_LAYOUT = "mlx-lm's layout"
_SAME = re.compile(r"(?:language_model\.)?model\.(?:layers\.\d+\..+|embed_tokens)|(?:language_model\.)?lm_head")
_SEEING = re.compile(r"model\.language_model\.(.+)")
_GPT2 = re.compile(r"(?:transformer\.)?(h\.\d+\.(?:attn|mlp)\.c_\w+|wte|wpe)")


def files(adapter: Adapter, options: ExportOptions) -> Folder:
    """Return the configuration and the weights. Raises E-EXPORT for what mlx-lm has no place for, E-OPTION for ranks by
    module."""
    if options.keep_ranks:
        raise OptionError("mlx-lm has one rank for all modules", fix=f"leave {spelled('keep_ranks', True)} out")
    refuse_extras(adapter, _LAYOUT)
    made = factors(adapter, options)
    by_module = {_module(pair.target): pair for pair in made.pairs}
    tensors = []
    for module, pair in by_module.items():
        tensors.append(entry(f"{module}.lora_a", made.dtype, pair.a.T))
        tensors.append(entry(f"{module}.lora_b", made.dtype, pair.b.T))
        rank = pair.rank
    config = {
        "fine_tune_type": "lora",
        "num_layers": -1,  # all: which modules are adapted is for the keys to say
        "lora_parameters": {"rank": rank, "scale": made.scale, "dropout": 0.0, "keys": sorted(by_module)},
        "model": adapter.provenance.base_model,
    }
    weights = weights_file(tensors, adapter)
    return Folder({"adapter_config.json": json_file(config), "adapters.safetensors": weights}, made.notes)


def _module(target: Target) -> str:
    """Return mlx-lm's name of a target's module. Raises E-EXPORT for models that it calls otherwise, or not at all."""
    module = module_of(target, _LAYOUT)
    if target.view.kind == "conv":
        raise ExportError(f"{target.name!r:.120} is a convolution, which mlx-lm does not adapt", fix=exclude())
    seeing = _SEEING.fullmatch(module)
    if seeing is not None:
        module = f"language_model.model.{seeing[1]}"
    if _SAME.fullmatch(module):
        return module
    renamed = _GPT2.fullmatch(module)
    if renamed is None:
        raise ExportError(
            f"{target.name!r:.120} is in no model whose names in mlx-lm are known here",
            fix="names like model.layers.0.self_attn.q_proj.weight are; or merge the adapter and convert the model",
        )
    return f"model.{renamed[1]}"


EXPORTER = Exporter(
    "mlx",
    "an adapter folder of mlx-lm",
    files,
    kind="mlx-lm LoRA",
    library="mlx",
    usage='sh\nmlx_lm.generate --model {base} --adapter-path THIS-FOLDER --prompt "..."',
    consumers=("mlx",),
)
