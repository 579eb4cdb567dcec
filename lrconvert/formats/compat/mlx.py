"""mlx-lm: ``--adapter-path FOLDER``. Its own layout: ``adapters.safetensors`` with ``<module>.lora_a`` (in, r) and
``lora_b`` (r, out), and an adapter_config.json that says which modules of which layers are adapted. A tensor for any
other module ends the loading."""

from __future__ import annotations

import re
from collections.abc import Iterator

from lrconvert.formats.compat.base import Consumer, Finding, NoOptions, verdicts
from lrconvert.formats.compat.shared import whole_names
from lrconvert.formats.compat.shared.rules import export_call, right_base
from lrconvert.formats.compat.shared.subject import MLX_WEIGHTS, Subject, as_number, example

VERSION = "0.32.2"
refuses, wrong, warns = verdicts("mlx", VERSION)

LOAD = "mlx_lm/tuner/utils.py load_adapters"
CONVERT = "mlx_lm/tuner/utils.py linear_to_lora_layers"
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.(.+)")
_OTHER_LAYOUTS = {
    "lrconvert": (
        "a compact lrconvert file: no server loads one",
        "export it to plain LoRA and convert that to mlx-lm's layout",
    ),
    "peft": (
        "a PEFT folder: mlx-lm reads its own layout only",
        "transpose the factors into lora_a and lora_b, with scale instead of lora_alpha",
    ),
    "bare": ("not a folder with adapter_config.json", "give the folder that mlx-lm wrote"),
}


def examine(subject: Subject, options: NoOptions) -> Iterator[Finding]:
    if subject.foreign and subject.layout != "lrconvert":
        fix = f"convert it, and export the result: {export_call('mlx')}"
        yield refuses("layout", f"an adapter in the layout {subject.foreign}", fix, LOAD)
        return
    if subject.layout in _OTHER_LAYOUTS:
        yield refuses("layout", *_OTHER_LAYOUTS[subject.layout], LOAD)
        return
    if not subject.config:
        yield refuses("layout", "there is no adapter_config.json", "use a newer mlx-lm to train, or write it", LOAD)
    if not subject.weights:
        what = f"there is no {MLX_WEIGHTS}" + (", only adapters.npz" if "adapters.npz" in subject.files else "")
        yield refuses("weights", what, "convert the weights to safetensors", LOAD)
    if subject.config and subject.config.get("fine_tune_type", "lora") != "full":
        yield from _config(subject)
        yield from _tensors(subject)


def _parameters(subject: Subject) -> dict[str, object]:
    parameters = subject.config.get("lora_parameters")
    return parameters if isinstance(parameters, dict) else {}


def _config(subject: Subject) -> Iterator[Finding]:
    if "num_layers" not in subject.config:
        old = ", which was lora_layers once" if "lora_layers" in subject.config else ""
        yield refuses("fields", f"the configuration lacks num_layers{old}", "write num_layers", LOAD)
    parameters = _parameters(subject)
    missing = [key for key in ("rank", "scale", "dropout") if key not in parameters]
    if missing:
        hint = "; alpha is not read, scale is alpha / rank" if "alpha" in parameters and "scale" in missing else ""
        yield refuses("fields", f"lora_parameters lacks {', '.join(missing)}{hint}", "write the fields", CONVERT)


def _tensors(subject: Subject) -> Iterator[Finding]:
    leaves = {"lora_a", "lora_b"} | ({"m"} if subject.config.get("fine_tune_type") == "dora" else set())
    halves: dict[str, dict[str, tuple[int, ...]]] = {}
    unknown = []
    for info in subject.tensors:
        module, _, name = info.name.rpartition(".")
        if name in leaves and module:
            halves.setdefault(module, {})[name] = info.shape
        else:
            unknown.append(info.name)
    fix = "remove them, or fuse the model instead"
    yield from refuses.of("names", unknown, "tensors that are no adapter parameter", fix, LOAD)
    yield from whole_names.wrappers(subject, refuses, "which are refused", LOAD, halves)
    lacking = whole_names.placement(subject, modules=halves).lacking
    yield from refuses.of("modules", lacking, f"{len(lacking)} modules are not in the base", right_base(), LOAD)
    if subject.base is None:
        yield from whole_names.doubled(subject, warns, LOAD, modules=halves)
    alone = [module for module, shapes in halves.items() if not {"lora_a", "lora_b"} <= set(shapes)]
    what = "lora_a or lora_b is missing and keeps its initial value"
    yield from wrong.of("pair", alone, what, "the file is incomplete: save it again", LOAD)
    parameters = _parameters(subject)
    if (rank := as_number(parameters.get("rank"))) is not None:
        odd = [module for module, shapes in halves.items() if _other_rank(shapes, rank)]
        what = f"{len(odd)} modules have another rank than lora_parameters says ({rank:g})"
        yield from refuses.of("shape", odd, what, "mlx-lm has one rank: pad with zeros, or correct it", LOAD)
    keys = parameters.get("keys")
    if isinstance(keys, list):
        unlisted = [module for module in halves if module not in keys and _inside(module) not in keys]
        what = "modules that lora_parameters.keys does not list"
        yield from refuses.of("targets", unlisted, what, "list them there", CONVERT)
    depth, count = subject.base_number("num_hidden_layers"), as_number(subject.config.get("num_layers"))
    if depth is not None and count is not None and count > 0:
        early = [m for m in halves if (layer := _LAYER.search(m)) and not depth - count <= int(layer[1]) < depth]
        if early:
            what = f"num_layers {count:g} adapts the last layers of {depth:g} only, not {example(early)}"
            yield refuses("layers", what, "correct num_layers (-1 is all)", CONVERT)


def _other_rank(shapes: dict[str, tuple[int, ...]], rank: float) -> bool:
    a, b = shapes.get("lora_a", ()), shapes.get("lora_b", ())
    return (len(a) == 2 and a[1] != rank) or (len(b) == 2 and b[0] != rank)


def _inside(module: str) -> str:
    """Return a module's name inside its layer."""
    layer = _LAYER.search(module)
    return layer[2] if layer else module


CONSUMER = Consumer("mlx", "mlx-lm", VERSION, examine)
