"""A model's weights as a folder holds them: one safetensors file, or shards with an index, and the configuration."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from lrconvert.core import errors, registry
from lrconvert.core.dtypes import FLOATS
from lrconvert.core.limits import MAX_INDEX_BYTES, MAX_SHARDS
from lrconvert.core.wording import spelled, verb
from lrconvert.io import mistaken
from lrconvert.io.container import ContainerFile, TensorInfo, combined_digest, read_json, tensor_digest

PIPELINE_NAME = "model_index.json"  # of a diffusers pipeline
JOURNAL = ".lrconvert/journal"  # of a model that is being changed in place
READY_NAME = "ready.json"  # in it from the first changed byte to the last
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SHARED_BLOB = re.compile(r"([0-9a-f]{2})/\1[0-9a-f]{62}")
BITSANDBYTES = "bitsandbytes"
METHODS = "lrconvert.io.quantized"  # a file for each method of storing quantized weights
QUANTIZATION = "quantization_config"
_UNNAMED = "a method that is not named"
_COPY_BYTES = 1 << 22


@dataclass(frozen=True)
class WeightNames:
    """The names of a folder's weight files, as transformers and diffusers give them."""

    stem: str = "model"
    variant: str = ""

    @property
    def _dotted(self) -> str:
        return f".{self.variant}" if self.variant else ""

    @property
    def single(self) -> str:
        return f"{self.stem}{self._dotted}.safetensors"

    @property
    def index(self) -> str:
        return f"{self.stem}.safetensors.index{self._dotted}.json"

    def shard(self, number: int, count: int) -> str:
        """Return the name of shard `number`, from 1 on, of `count`."""
        return f"{self.stem}{self._dotted}-{number:05}-of-{count:05}.safetensors"

    def are_in(self, root: Path) -> bool:
        return _present(root / self.index) or _present(root / self.single)


_STEMS = ("model", "diffusion_pytorch_model")
_PLAIN = tuple(WeightNames(stem) for stem in _STEMS)
_VARIANTS = tuple(WeightNames(stem, name) for name in ("fp16", "bf16", "fp32", "ema", "non_ema") for stem in _STEMS)
INDEX_NAME, SINGLE_NAME = _PLAIN[0].index, _PLAIN[0].single
INDEX_NAMES = tuple(names.index for names in (*_PLAIN, *_VARIANTS))


@dataclass(frozen=True)
class KnownContent:
    """The digest of a checkpoint's contents, and what its files were when it was taken: path, size, modification in
    nanoseconds and inode of each. Good for one run, in which many adapters are converted on one base."""

    digest: str
    files: tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model folder: `config` (config.json, or {}), the open shards in order, and all tensors by name. `outdated` are
    other files that describe the stored weights, where this checkpoint has them in another form."""

    root: Path
    config: dict[str, Any]
    files: tuple[ContainerFile, ...]
    index_path: Path | None
    index: dict[str, Any] = field(default_factory=dict)
    outdated: frozenset[str] = frozenset()
    names: WeightNames = _PLAIN[0]

    @property
    def is_derived(self) -> bool:
        """True where headers and configuration are others than those on the disk."""
        return False

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        return {info.name: info for file in self.files for info in file.tensors}

    @cached_property
    def _by_path(self) -> dict[Path, ContainerFile]:
        return {file.path: file for file in self.files}

    def file_of(self, info: TensorInfo) -> ContainerFile:
        return self._by_path[info.file]

    def read(self, info: TensorInfo, offset: int = 0, nbytes: int | None = None) -> bytearray:
        return self.file_of(info).read(info, offset, nbytes)

    def read_into(self, info: TensorInfo, offset: int, view: memoryview) -> None:
        self.file_of(info).read_into(info, offset, view)

    def _chunks(self, info: TensorInfo) -> Iterator[bytearray]:
        for offset in range(0, info.nbytes, _COPY_BYTES):
            yield self.read(info, offset, min(_COPY_BYTES, info.nbytes - offset))

    @property
    def _identities(self) -> tuple[tuple[str, int, int, int], ...]:
        return tuple(file.identity for file in self.files)

    def known_content(self) -> KnownContent:
        """Return the digest of the contents, for a later run. Raises E-IO-CHANGED if a file changed meanwhile."""
        content = KnownContent(self.content_digest(), self._identities)
        for file in self.files:
            file.check_unchanged()
        return content

    def content_digest(self, known: KnownContent | None = None) -> str:
        """Return the sha256 over name, dtype, shape and bytes of every tensor; the same however they are sharded.

        With `known` nothing is read: it is that digest. Raises E-IO-CHANGED if the files are others than they were.
        """
        if known is not None:
            if known.files != self._identities:
                raise errors.FileChangedError("the base changed after its contents were digested", path=self.root)
            return known.digest
        return combined_digest(
            (t.name, tensor_digest(t.name, t.dtype, t.shape, self._chunks(t))) for t in self.tensors.values()
        )

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self.files:
            file.close()


def contained(root: Path, path: Path) -> bool:
    """Return true if a (possibly linked) file stays in its folder, or in the blobs of the hub cache that it lies in."""
    try:
        real_root, real = root.resolve(), path.resolve()
    except (OSError, RuntimeError):  # a link that leads to itself
        return False
    if real_root.parent.name != "snapshots":
        return real.is_relative_to(real_root)
    model = real_root.parent.parent
    shared = model.parent / "blobs"  # huggingface_hub 2: files of several models, named by their content
    if real.is_relative_to(shared):
        return _SHARED_BLOB.fullmatch(real.relative_to(shared).as_posix()) is not None
    return real.is_relative_to(real_root) or real.is_relative_to(model / "blobs")


def shard_paths(index: Mapping[str, Any], path: Path, suffix: str = ".safetensors") -> list[Path]:
    """Return the files of the shard index at `path`, sorted. Raises E-PATH, E-INDEX-MAP, E-LIMIT."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise errors.ShardIndexError("the index has no weight_map", path=path)
    names = set()
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _SHARD.fullmatch(name) or not name.endswith(suffix):
            what = f"the index sends {tensor!r} to {name!r:.80}, which is not a plain {suffix} file name"
            raise errors.ShardPathError(what, path=path)
        names.add(name)
    if len(names) > MAX_SHARDS:
        raise errors.LimitError(f"the index names {len(names)} shards; at most {MAX_SHARDS} are read", path=path)
    if len({name.casefold() for name in names}) != len(names):
        raise errors.ShardIndexError("two shard names differ only in upper and lower case", path=path)
    shards = [path.parent / name for name in sorted(names)]
    for shard in shards:
        if not contained(path.parent, shard):
            raise errors.ShardPathError("the shard is a link that leaves its folder", path=shard)
    return shards


def _present(path: Path) -> bool:
    """True also for a link that leads nowhere, so that it is refused and not overlooked."""
    return path.is_symlink() or path.exists()


def _settings(config: Mapping[str, Any]) -> Any:
    """The settings of quantization in a configuration, or in its part for the language model; None without."""
    text = config.get("text_config")
    return config.get(QUANTIZATION) or (text.get(QUANTIZATION) if isinstance(text, dict) else None)


def quantization_settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a configuration says of how its weights are quantized; {} if nothing."""
    settings = _settings(config)
    return settings if isinstance(settings, dict) else {}


def quantization_name(config: Mapping[str, Any]) -> str:
    """Return how a configuration says that its weights are quantized (``bitsandbytes 4 bit``, ``gptq``), or ""."""
    if not _settings(config):
        return ""
    table = quantization_settings(config)
    bits = next((f" {n} bit" for n in (4, 8) if table.get(f"load_in_{n}bit")), "")
    method = table.get("quant_method") or (BITSANDBYTES if bits else None)
    if method == BITSANDBYTES:
        return f"{BITSANDBYTES}{bits}"
    return method if isinstance(method, str) else _UNNAMED


def dequantizer(config: Mapping[str, Any]) -> str:
    """Return the module of the folder ``quantized`` that reads what a configuration names, or ""."""
    name = quantization_name(config).partition(" ")[0].replace("-", "_")
    return name if name in registry.names(METHODS) else ""


def quantized_base(config: Mapping[str, Any], root: Path, what: str = "") -> errors.QuantizedBaseError:
    """Return the error for a quantized base, by the name of how it is, or for `what` of it."""
    name = quantization_name(config)
    advice = "use the unquantized parent of this checkpoint"
    if dequantizer(config):
        allow = spelled("dequantize", True)
        advice += f", so that the error of quantizing stays out; or pass {allow} to merge into what it stands for"
    return errors.QuantizedBaseError(f"{what}the base is stored quantized, by {name:.60}", fix=advice, path=root)


def _check_quantization(config: Mapping[str, Any], allowed: bool, root: Path) -> None:
    """Raise E-BASE-QUANT for a quantized base, but where one is `allowed` whose method is named."""
    name = quantization_name(config)
    if name and not (allowed and name != _UNNAMED):
        raise quantized_base(config, root)


def is_between_states(root: Path) -> bool:
    """Return whether a model folder is between two states: whatever reads or changes one asks this first."""
    return _present(root / JOURNAL / READY_NAME)


def unfinished(root: Path) -> errors.UnfinishedError:
    """Return the error for a model folder in which a merge or unmerge in place was broken off."""
    what = "is between two states: a merge or unmerge in place was broken off"
    return errors.UnfinishedError(
        what, fix=f"run {verb('recover')}, or the same again with {spelled('resume', True)}", path=root
    )


def is_without_weights(root: Path) -> bool:
    """Return true if a folder has the configuration of a model or a pipeline, and no file of a model's weights."""
    if not ((root / "config.json").is_file() or (root / PIPELINE_NAME).is_file()):
        return False
    return not (any(names.are_in(root) for names in (*_PLAIN, *_VARIANTS)) or any(root.glob("pytorch_model*.bin")))


def weight_names(root: Path, *more: Path) -> WeightNames:
    """Return how the weight files in a folder, and in `more` that hold files of it, are named; a variant only where no
    others are there. Raises E-IO-KIND for several variants."""
    plain = next((names for names in _PLAIN if any(map(names.are_in, (root, *more)))), None)
    variants = [names for names in _VARIANTS if any(map(names.are_in, (root, *more)))]
    if plain is None and len(variants) > 1:
        listed = " and ".join(f"{names.stem}.{names.variant}" for names in variants)
        raise errors.FileKindError(f"holds {listed}", fix="leave the one that is meant in the folder", path=root)
    return plain or (variants[0] if variants else _PLAIN[0])


def open_checkpoint(path: str | os.PathLike[str], *, quantized: bool = False) -> Checkpoint:
    """Open a Hugging Face model folder (one weight file, or an index and its shards; of transformers, or a component of
    a diffusers pipeline), headers only.

    With `quantized` also one that is stored quantized, its tensors as they are. Raises E-IO-KIND, E-PATH,
    E-INDEX-MAP, E-BASE-QUANT (a quantized checkpoint; with `quantized` one whose tensors do not bear that out),
    E-UNFINISHED, and the container's errors.
    """
    root = Path(path)
    if not root.is_dir():
        raise errors.FileKindError("is not a model folder", fix="give the folder that holds config.json", path=root)
    if is_between_states(root):
        raise unfinished(root)
    config = read_json(root / "config.json") if _present(root / "config.json") else {}
    _check_quantization(config, quantized, root)
    checkpoint = _opened(root, config)
    if quantization_name(config) and all(info.dtype in FLOATS for info in checkpoint.tensors.values()):
        checkpoint.__exit__(None, None, None)
        what = "none of its tensors shows it, but the base is stored quantized"
        name = quantization_name(config)
        fix = "use the unquantized parent of this checkpoint"
        raise errors.QuantizedBaseError(f"{what}, by {name:.60}", fix=fix, path=root)
    return checkpoint


def _opened(root: Path, config: dict[str, Any]) -> Checkpoint:
    """The checkpoint in a folder with this configuration."""
    names = weight_names(root)
    index_path = root / names.index
    if not _present(index_path):
        return Checkpoint(root, config, (_single_file(root, names.single),), None, names=names)
    index = read_json(index_path, MAX_INDEX_BYTES)
    files: list[ContainerFile] = []
    try:
        for shard in shard_paths(index, index_path):
            files.append(ContainerFile(shard))
        stored = [(info.name, file.path.name) for file in files for info in file.tensors]
        check_index(index["weight_map"], stored, index_path)
    except BaseException:
        for file in files:
            file.close()
        raise
    return Checkpoint(root, config, tuple(files), index_path, index, names=names)


def _single_file(root: Path, name: str) -> ContainerFile:
    """The one weight file of a folder without an index."""
    single = root / name
    if not single.exists():
        pickles = sorted(p.name for p in root.glob("pytorch_model*.bin"))
        if pickles:
            fix = "save it again with save_pretrained(..., safe_serialization=True)"
            raise errors.PickleError(f"the base is stored as pickles ({pickles[0]})", fix=fix, path=root)
        mistaken.check_base(root)
        if (root / PIPELINE_NAME).is_file():
            fix = "give the folder of one of its models, such as unet or transformer"
            raise errors.FileKindError("is a pipeline of several models", fix=fix, path=root)
        raise errors.FileKindError(f"holds neither {SINGLE_NAME} nor {INDEX_NAME}", path=root)
    if not contained(root, single):
        raise errors.ShardPathError("the file is a link that leaves its folder", path=single)
    return ContainerFile(single)


def check_index(declared: Mapping[str, str], stored: Sequence[tuple[str, str]], path: Path) -> None:
    """Raise E-INDEX-MAP unless every tensor of `stored`, (name, name of its file), is there once, where the index says,
    and none is absent."""
    names = {name for name, _ in stored}
    if len(names) != len(stored):
        raise errors.ShardIndexError("a tensor is stored in two shards", path=path)
    misplaced = sorted(name for name, file in stored if declared.get(name) != file)
    absent = sorted(set(declared) - names)
    if misplaced or absent:
        problem = f"{misplaced[0]!r} is stored elsewhere" if misplaced else f"{absent[0]!r} is in no shard"
        raise errors.ShardIndexError(f"the index and the shards disagree: {problem}", path=path)


def config_text(config: Mapping[str, Any], key: str) -> str:
    """Return a string field of a foreign config, or "". Raises E-CONFIG if it has another type."""
    value = config.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise errors.ConfigError(f"{key} is {value!r:.60}, expected a string")
    return value
