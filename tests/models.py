"""Models for tests: folders made, cast, loaded, and merged by PEFT; what live models read and answer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from lrconvert.core.dtypes import TORCH_NAMES, Stored, round_to
from lrconvert.io.checkpoint import open_checkpoint
from lrconvert.io.container import ContainerFile, encode_header
from lrconvert.lora.adapter import CompactAdapter, ExtraTensor, LoraAdapter, LoraTarget, Target
from lrconvert.lora.base_weights import BaseWeights
from lrconvert.methods import base as methods


def load_all(folder: Path) -> dict[str, Stored]:
    """Every stored tensor of a model folder."""
    with open_checkpoint(folder) as checkpoint:
        return {name: checkpoint.file_of(info).load(info) for name, info in checkpoint.tensors.items()}


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a model folder, but for the records of merges."""
    paths = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: p.read_bytes() for name, p in paths.items() if not name.startswith(".lrconvert/")}


def config_of(folder: Path) -> dict[str, Any]:
    """The configuration, but for the release of transformers that wrote it."""
    value: dict[str, Any] = json.loads((folder / "config.json").read_text())
    value.pop("transformers_version", None)
    return value


def save_base(folder: Path, shards: Sequence[Mapping[str, Stored]], config: Mapping[str, Any] | None = None) -> Path:
    """A model folder of one file, or of several with an index."""
    folder.mkdir(parents=True)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
    for name, tensors in zip(names, shards, strict=True):
        entries = [(key, value.dtype, value.shape) for key, value in tensors.items()]
        data = b"".join(value.array.tobytes() for value in tensors.values())
        (folder / name).write_bytes(encode_header(entries, {"format": "pt"}) + data)
    if len(shards) > 1:
        weight_map = {key: name for name, tensors in zip(names, shards, strict=True) for key in tensors}
        total = sum(value.nbytes for tensors in shards for value in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    (folder / "config.json").write_text(json.dumps(dict(config or {"model_type": "llama"}), indent=2) + "\n")
    return folder


def random_base(folder: Path, lora: LoraAdapter, dtype: str = "F32", shards: int = 1, seed: int = 0) -> Path:
    """A base that has the targets of `lora`, and a norm in each shard."""
    rng = np.random.default_rng(seed)
    parts: list[dict[str, Stored]] = [{} for _ in range(shards)]
    shapes = {pair.target.name: pair.target.shape for pair in lora.targets}
    for n, (name, shape) in enumerate(shapes.items()):
        parts[n % shards][name] = Stored(dtype, round_to(rng.standard_normal(shape) * 0.02, dtype))
    for n, part in enumerate(parts):
        part[f"norm.{n}.weight"] = Stored(dtype, round_to(rng.standard_normal(7), dtype))
    return save_base(folder, parts)


def updates_on(compact: CompactAdapter, base: Path) -> dict[str, np.ndarray]:
    """The dense updates (out, in) of an adapter whose updates depend on the base, as merges compute them."""
    with open_checkpoint(base) as checkpoint:
        weights = BaseWeights(compact, checkpoint, checkpoint.content_digest())
        return {
            target.name: np.concatenate([rows for _, rows in parts])
            for target, _, parts in methods.updates_on(compact, weights)
        }


def updates(compact: CompactAdapter, base: Path | None = None) -> list[np.ndarray]:
    """The dense updates (out, in) of any compact adapter."""
    if methods.get(compact.method).needs_base(compact.config):
        assert base is not None
        return list(updates_on(compact, base).values())
    return [b.astype(np.float64) @ a for _, a, b in methods.expand_all(compact)]


_BASES: dict[tuple[Target, ...], tuple[Path, TemporaryDirectory[str]]] = {}


def wanted_base(method: str, options: Mapping[str, Any], lora: LoraAdapter) -> dict[str, Path]:
    """``{"base": folder}`` for options of a method whose updates depend on the base, a random one; else nothing."""
    form = methods.get(method)
    own = {field.name: options[field.name] for field in fields(form.Options) if field.name in options}
    if not form.wants_base(form.Options(**own)):
        return {}
    targets = lora.shapes()
    if targets not in _BASES:
        kept = TemporaryDirectory()
        _BASES[targets] = random_base(Path(kept.name) / "base", lora), kept
    return {"base": _BASES[targets][0]}


def one_target(target: Target, rank: int = 3, scale: float = 0.5, seed: int = 0, whole: bool = False) -> LoraTarget:
    rng = np.random.default_rng(seed)
    out, inner = target.matrix_shape
    a, b = (rng.integers(-4, 5, s) / 8 if whole else rng.standard_normal(s) for s in ((rank, inner), (out, rank)))
    return LoraTarget(target, Stored("F32", a.astype("<f4")), Stored("F32", b.astype("<f4")), scale)


def renamed(lora: LoraAdapter, *names: str) -> LoraAdapter:
    """A LoRA with other names for its targets."""
    pairs = [replace(p, target=replace(p.target, name=name)) for name, p in zip(names, lora.targets, strict=True)]
    return replace(lora, targets=tuple(pairs))


def extra(name: str, values: Any, dtype: str = "F32") -> ExtraTensor:
    array = round_to(np.asarray(values, np.float32), dtype)
    return ExtraTensor(name, dtype, array.shape, array.tobytes())


def cast_base(source: Path, folder: Path, dtype: str) -> Path:
    """A fixture base in another dtype, sharded as before."""
    shutil.copytree(source, folder)
    for path in folder.glob("*.safetensors"):
        with ContainerFile(path) as file:
            stored = {i.name: file.load(i) for i in file.tensors}
            metadata = file.metadata
        cast = {name: Stored(dtype, round_to(value.decode(), dtype)) for name, value in stored.items()}
        entries = [(name, dtype, value.shape) for name, value in cast.items()]
        path.write_bytes(encode_header(entries, metadata) + b"".join(v.array.tobytes() for v in cast.values()))
    config = config_of(folder) | {"dtype": TORCH_NAMES[dtype]}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return folder


def auto(kind: str) -> Any:
    import transformers

    return getattr(transformers, f"AutoModelFor{kind}")


def peft_merged(kind: str, base: Path, adapter: Path, wide: bool = True, **options: Any) -> Any:
    """The model that PEFT's merge_and_unload gives."""
    import peft

    model = auto(kind).from_pretrained(base, dtype="auto", **options)
    model = peft.PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=wide)
    return model.merge_and_unload().eval()


def load_clean(kind: str, folder: Path, dtype: Any = "auto") -> Any:
    """The model in `folder`; fails if loading leaves anything over or makes anything up."""
    model, info = auto(kind).from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    return model.eval()


def logits(model: Any, seed: int = 0) -> Any:
    import torch

    ids = torch.randint(4, 100, (2, 24), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def saved_adapter(kind: str, base: Path, folder: Path, **options: Any) -> Path:
    """A PEFT adapter with random factors on a fixture base, saved by PEFT."""
    import peft
    import torch

    torch.manual_seed(0)
    labels = options.pop("num_labels", None)
    model = auto(kind).from_pretrained(base, dtype=torch.float32, **({"num_labels": labels} if labels else {}))
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **options))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return folder


# --- refinement -----------------------------------------------------------------------------------------------------


def token_batches(count: int, rows: int, length: int) -> list[dict[str, Any]]:
    """Batches of random tokens, the same for the same numbers."""
    import torch

    draw = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 100, (rows, length), generator=draw)} for _ in range(count)]


def bert_classifier() -> tuple[LoraAdapter, Any, list[dict[str, Any]]]:
    """The fixture LoRA of a classifier with its head, its model, and batches."""
    from conftest import ADAPTERS, BASES

    from lrconvert import api

    lora = api.load_lora(ADAPTERS / "bert-classifier")
    heads = {"num_labels": 3} if any(e.shape == (3, 32) for e in lora.extras) else {}
    model = auto("SequenceClassification").from_pretrained(BASES / "tiny-bert", **heads).eval()
    return lora, model, token_batches(8, 6, 9)


def held_out(batches: Sequence[Mapping[str, Any]], kind: str = "decoder") -> Sequence[Mapping[str, Any]]:
    """Those of the batches that a refinement with seed 0 holds out."""
    from lrconvert.refine import data

    return data.split(data.Pool(kind, model_inputs=tuple(batches)), 0).held_out.model_inputs


def answers_on(batches: Sequence[Mapping[str, Any]], model: Any, lora: LoraAdapter, compact: CompactAdapter) -> Any:
    """The answers of `compact` against those of `lora`, as `compare` measures them."""
    from lrconvert.live import compare_outputs

    return compare_outputs.measure(model, lora, [compact], batches).answers[0]
