"""mlx-lm: ``--adapter-path FOLDER``. Its own layout: ``adapters.safetensors`` with ``<module>.lora_a`` (in, r) and
``lora_b`` (r, out), and an adapter_config.json that says which modules of which layers are adapted. A tensor for any
other module ends the loading."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial

from lrconvert.formats.compat.base import MLX_WEIGHTS, Consumer, Finding, NoOptions, Subject, as_number, example

VERSION = "0.32.2"
refuses = partial(Finding, "refuses", "mlx", VERSION)
wrong = partial(Finding, "wrong", "mlx", VERSION)

LOAD = "mlx_lm/tuner/utils.py load_adapters"
CONVERT = "mlx_lm/tuner/utils.py linear_to_lora_layers"
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.(.+)")


def examine(subject: Subject, options: NoOptions) -> Iterator[Finding]:
    if subject.layout == "lrconvert":
        fix = "export it to plain LoRA and convert that to mlx-lm's layout"
        yield refuses("layout", "a compact lrconvert file: no server loads one", fix, LOAD)
        return
    if subject.foreign:
        fix = "convert it, and export the result: `lrconvert export FILE -o DIR --to mlx`"
        yield refuses("layout", f"an adapter in the layout {subject.foreign}", fix, LOAD)
        return
    if subject.layout == "peft":
        fix = "transpose the factors into lora_a and lora_b, with scale instead of lora_alpha"
        yield refuses("layout", "a PEFT folder: mlx-lm reads its own layout only", fix, LOAD)
        return
    if subject.layout == "bare":
        yield refuses("layout", "not a folder with adapter_config.json", "give the folder that mlx-lm wrote", LOAD)
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
    found = subject.config.get("lora_parameters")
    return found if isinstance(found, dict) else {}


def _config(subject: Subject) -> Iterator[Finding]:
    if "num_layers" not in subject.config:
        old = ", which was lora_layers once" if "lora_layers" in subject.config else ""
        yield refuses("fields", f"the configuration lacks num_layers{old}", "write num_layers", LOAD)
    given = _parameters(subject)
    missing = [key for key in ("rank", "scale", "dropout") if key not in given]
    if missing:
        hint = "; alpha is not read, scale is alpha / rank" if "alpha" in given and "scale" in missing else ""
        what = f"lora_parameters lacks {', '.join(missing)}{hint}"
        yield refuses("fields", what, "write the fields", CONVERT)


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
    if unknown:
        what = f"tensors that are no adapter parameter: {example(unknown)}"
        yield refuses("names", what, "remove them, or fuse the model instead", LOAD)
    alone = [module for module, found in halves.items() if not {"lora_a", "lora_b"} <= set(found)]
    if alone:
        what = f"lora_a or lora_b is missing and keeps its initial value: {example(alone)}"
        yield wrong("pair", what, "the file is incomplete: save it again", LOAD)
    rank = as_number(_parameters(subject).get("rank"))
    odd = [m for m, found in halves.items() if rank is not None and _other_rank(found, rank)]
    if odd:
        what = f"{len(odd)} modules have another rank than lora_parameters says ({rank:g}): {example(odd)}"
        yield refuses("shape", what, "mlx-lm has one rank: pad with zeros, or correct it", LOAD)
    keys = _parameters(subject).get("keys")
    if isinstance(keys, list) and (loose := [m for m in halves if m not in keys and _inside(m) not in keys]):
        what = f"modules that lora_parameters.keys does not list: {example(loose)}"
        yield refuses("targets", what, "list them there", CONVERT)
    depth, count = subject.base_number("num_hidden_layers"), as_number(subject.config.get("num_layers"))
    if depth is not None and count is not None and count > 0:
        early = [m for m in halves if (found := _LAYER.search(m)) and not depth - count <= int(found[1]) < depth]
        if early:
            what = f"num_layers {count:g} adapts the last layers of {depth:g} only, not {example(early)}"
            yield refuses("layers", what, "correct num_layers (-1 is all)", CONVERT)


def _other_rank(found: dict[str, tuple[int, ...]], rank: float) -> bool:
    a, b = found.get("lora_a", ()), found.get("lora_b", ())
    return (len(a) == 2 and a[1] != rank) or (len(b) == 2 and b[0] != rank)


def _inside(module: str) -> str:
    """A module's name inside its layer."""
    found = _LAYER.search(module)
    return found[2] if found else module


CONSUMER = Consumer("mlx", "mlx-lm", VERSION, examine)
