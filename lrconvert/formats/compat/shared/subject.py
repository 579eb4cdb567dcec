"""An adapter as consumers see it, from its configuration, the headers of its tensors and the names of its files."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lrconvert.core.dtypes import FLOATS
from lrconvert.core.errors import FileKindError, UnknownLayoutError
from lrconvert.core.limits import MAX_PATTERNS
from lrconvert.formats import loading
from lrconvert.formats.lrc import file
from lrconvert.formats.readers import base as readers
from lrconvert.formats.readers.gguf.file import GgufFile
from lrconvert.formats.readers.peft.patterns import check_work, compile_pattern
from lrconvert.formats.readers.shared import bundled, folders, naming
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.io import mistaken
from lrconvert.io.checkpoint import INDEX_NAME, PIPELINE_NAME, SINGLE_NAME, open_checkpoint
from lrconvert.io.container import ContainerFile, TensorInfo, read_json

Layout = Literal["peft", "mlx", "bare", "lrconvert"]  # bare: weights without a configuration

CONFIG_NAME = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_PICKLES = ("adapter_model.bin", "adapter_model.pt")
MLX_WEIGHTS = "adapters.safetensors"
PEFT_PREFIX = "base_model.model."

_MOST_ALPHAS = 1 << 14
_FACTOR = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?:(?P<half>[AB])\.weight|embedding_(?P<embedding>[AB]))"
)


@dataclass(frozen=True)
class Pair:
    """The two factors stored for one module; `embedding` if they are PEFT's lora_embedding_A and _B."""

    a: TensorInfo | None
    b: TensorInfo | None
    embedding: bool

    @property
    def rank(self) -> int | None:
        """r of the stored factors, if they are the halves of one matrix."""
        if self.a is None or self.b is None or len(self.a.shape) < 2 or len(self.b.shape) < 2:
            return None
        return self.a.shape[0] if self.a.shape[0] == self.b.shape[1] else None


@dataclass(frozen=True, eq=False)
class Subject:
    """An adapter before any weight is read.

    `config` is its adapter_config.json, or the fields of a GGUF file.
    `weights` names the file that `tensors` are from, or "". `pickle` names a pickle that holds the weights instead; it
    is not opened. `foreign` is the reader of the layout where it is another tool's, "" for PEFT's, mlx-lm's and names
    that may be anybody's. `base` is the base's config.json, None if no base was given; `base_modules` are the modules
    whose weight the base stores, empty if unknown. Of a pipeline of diffusers, `pipeline` is its class and `components`
    are the modules of each of its models. `metadata` are the texts of the file's header, `alphas` the numbers of the
    tensors called so. A value of the configuration that has another type than expected
    reads as None or empty.
    """

    layout: Layout
    config: Mapping[str, Any] = field(default_factory=dict)
    tensors: tuple[TensorInfo, ...] = ()
    weights: str = ""
    pickle: str = ""
    files: frozenset[str] = frozenset()
    added_tokens: Mapping[str, Any] = field(default_factory=dict)
    foreign: str = ""
    base: Mapping[str, Any] | None = None
    base_modules: frozenset[str] = frozenset()
    metadata: Mapping[str, str] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    pipeline: str = ""
    components: Mapping[str, frozenset[str]] = field(default_factory=dict)

    # --- configuration ---

    def number(self, key: str, default: float | None = None) -> float | None:
        return as_number(self.config.get(key, default))

    def flag(self, key: str) -> bool:
        """Return True if a feature is set to anything but nothing."""
        return self.config.get(key) not in (None, False, "", [], {}, "none")

    def names(self, key: str) -> list[str]:
        """Return the strings of a list."""
        value = self.config.get(key)
        return [v for v in value if isinstance(v, str)] if isinstance(value, list) else []

    @cached_property
    def targets(self) -> frozenset[str]:
        """The names of a list in target_modules."""
        return frozenset(self.names("target_modules"))

    def pattern(self, key: str) -> dict[str, Any]:
        value = self.config.get(key)
        return value if isinstance(value, dict) and len(value) <= MAX_PATTERNS else {}

    @property
    def kind(self) -> str:
        value = self.config.get("peft_type")
        return value if isinstance(value, str) else ""

    @property
    def architecture(self) -> str:
        """The base's model class, or "" if unknown."""
        classes = (self.base or {}).get("architectures")
        return classes[0] if isinstance(classes, list) and classes and isinstance(classes[0], str) else ""

    def base_number(self, key: str) -> float | None:
        """Return a number of the base's configuration, or of its text part."""
        base = self.base or {}
        text = base.get("text_config")
        return as_number(base.get(key, text.get(key) if isinstance(text, dict) else None))

    # --- tensors ---

    @cached_property
    def by_name(self) -> dict[str, TensorInfo]:
        return {info.name: info for info in self.tensors}

    @cached_property
    def pairs(self) -> dict[str, Pair]:
        """LoRA factors by module, with or without PEFT's prefix."""
        halves: dict[tuple[str, bool], dict[str, TensorInfo]] = {}
        for info in self.tensors:
            if name := _FACTOR.fullmatch(info.name):
                embedding = name["embedding"] is not None
                halves.setdefault((name["module"], embedding), {})[name["half"] or name["embedding"]] = info
        return {module: Pair(ab.get("A"), ab.get("B"), kind) for (module, kind), ab in sorted(halves.items())}

    @cached_property
    def others(self) -> tuple[str, ...]:
        """The names of tensors that are not LoRA factors."""
        return tuple(info.name for info in self.tensors if not _FACTOR.fullmatch(info.name))

    # --- PEFT's meaning of ranks and alphas ---

    @cached_property
    def _rules(self) -> dict[str, list[tuple[str, re.Pattern[str], float | None]]]:
        rules = {
            key: [(text, compile_pattern(text), as_number(value)) for text, value in self.pattern(key).items()]
            for key in ("rank_pattern", "alpha_pattern")
        }
        check_work([text for patterns in rules.values() for text, _, _ in patterns], self.pairs)
        return rules

    def _by_pattern(self, key: str, module: str, default: float | None) -> float | None:
        for text, rule, value in self._rules[key]:
            if text == module or rule.match(module):
                return value
        return default

    def rank(self, module: str) -> float | None:
        """Return the rank that the configuration gives a module (PEFT: the first pattern that matches)."""
        return self._by_pattern("rank_pattern", module, self.number("r", 8))

    def alpha(self, module: str) -> float | None:
        return self._by_pattern("alpha_pattern", module, self.number("lora_alpha", 8))

    def scale(self, module: str) -> float | None:
        """Return the factor on B @ A that PEFT computes; None if the configuration gives none."""
        rank, alpha = self.rank(module), self.alpha(module)
        if rank is None or alpha is None or rank <= 0:
            return None
        return alpha / math.sqrt(rank) if self.flag("use_rslora") else alpha / rank


def as_number(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def leaf(module: str) -> str:
    """Return the last part of a module's name."""
    return module.rpartition(".")[2]


def example(names: Sequence[str]) -> str:
    """Return the first of `names` and the count of the others, for a message."""
    return f"{names[0]!r:.160}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


# --- looking at a path ----------------------------------------------------------------------------------------------


# Readers of what the consumers have rules of their own for, or that names alone do not tell from PEFT's tensors.
_OWN_RULES = ("peft", "peft_miss", "peft_vblora", "mlx", "raw")
_GGUF = "gguf"


def look(path: Path, options: ReadOptions | None = None) -> Subject:
    """Return the `Subject` at `path`, a folder or a file, from headers and small JSON files. `options.layout` counts
    before the content.

    Raises E-LAYOUT if nothing there could be an adapter, E-OPTION for a layout or an alpha that is not for it, and the
    container's errors for broken files.
    """
    options = options or ReadOptions()
    base = _base_facts(options.base) if options.base is not None else {}
    layout = options.layout
    if layout is None and readers.named(_GGUF).recognises(path):
        layout = _GGUF
    if layout == _GGUF and path.is_file():
        with GgufFile(path) as opened:
            subject = Subject("bare", opened.fields, opened.tensors, weights=path.name, **base)
    else:
        subject = _subject_at(path, base)
    if subject.layout == "lrconvert":
        loading.refuse_options(options, path)
        return subject
    if layout is None:
        layout = subject.layout if subject.layout != "bare" else _layout_by_names(subject)
    if layout is None:
        loading.refuse_options(options)
        return subject
    readers.check_taken(readers.named(layout), options, path)
    if layout == "mlx":
        return replace(subject, layout="mlx")
    return subject if layout in _OWN_RULES else replace(subject, foreign=layout)


def _layout_by_names(subject: Subject) -> str | None:
    names = [info.name for info in subject.tensors if not bundled.is_bundled(info.name)]
    return next((reader.id for reader in readers.all_readers() if reader.knows(names)), None)


def _subject_at(path: Path, base: dict[str, Any]) -> Subject:
    if mistaken.is_model(path):
        raise mistaken.for_adapter(path) or AssertionError
    if path.is_dir():
        alone = None if (path / CONFIG_NAME).exists() else folders.only_file(path)
        if alone is None or alone.suffix != ".safetensors" or alone.name in (PEFT_WEIGHTS, MLX_WEIGHTS):
            return _subject_in_folder(path, base)
        return replace(_subject_at(alone, base), files=frozenset(entry.name for entry in path.iterdir()))
    if not path.exists():
        raise UnknownLayoutError("there is no such file or folder", path=path)
    if (mistake := mistaken.for_adapter(path)) is not None and not path.name.endswith(".safetensors"):
        raise mistake
    if file.is_lrconvert(path):
        return Subject("lrconvert", **base)
    if path.name in (PEFT_WEIGHTS, MLX_WEIGHTS, *PEFT_PICKLES) and (path.parent / CONFIG_NAME).exists():
        return _subject_in_folder(path.parent, base)
    return Subject("bare", weights=path.name, **_headers(path), **base)


def _headers(path: Path) -> dict[str, Any]:
    """The fields of a file: its tensors, its texts and its alphas, which are a few bytes each."""
    with ContainerFile(path) as opened:
        alphas = [info for info in opened.tensors if info.name.endswith(".alpha") and math.prod(info.shape) == 1]
        values = {info.name: opened.load(info) for info in alphas[:_MOST_ALPHAS] if info.dtype in FLOATS}
        numbers = {name: float(stored.decode().reshape(-1)[0]) for name, stored in values.items()}
        return {"tensors": opened.tensors, "metadata": opened.metadata, "alphas": numbers}


def _subject_in_folder(path: Path, base: dict[str, Any]) -> Subject:
    try:
        files = frozenset(p.name for p in path.iterdir())
    except OSError as error:
        raise FileKindError(f"cannot be listed: {error.strerror}", path=path) from None
    config = read_json(path / CONFIG_NAME) if CONFIG_NAME in files else {}
    of_mlx = "peft_type" not in config and (
        not {"fine_tune_type", "lora_parameters"}.isdisjoint(config)
        or (not {MLX_WEIGHTS, "adapters.npz"}.isdisjoint(files) and PEFT_WEIGHTS not in files)
    )
    if not config and not any(name.endswith((".safetensors", ".npz", ".bin", ".pt")) for name in files):
        raise UnknownLayoutError("the folder holds neither an adapter_config.json nor weights", path=path)
    weights = MLX_WEIGHTS if of_mlx else PEFT_WEIGHTS
    present = weights in files
    return Subject(
        "mlx" if of_mlx else "peft" if CONFIG_NAME in files else "bare",
        config,
        weights=weights if present else "",
        pickle="" if present else next((name for name in PEFT_PICKLES if name in files), ""),
        files=files,
        added_tokens=read_json(path / "added_tokens.json") if "added_tokens.json" in files else {},
        **(_headers(path / weights) if present else {}),
        **base,
    )


def _base_facts(base: Path) -> dict[str, Any]:
    mistaken.check_base(base)
    if (base / PIPELINE_NAME).is_file():
        index = read_json(base / PIPELINE_NAME)
        models = {part.name: frozenset(part.modules) for part in naming.base_names(base).components}
        return {"base": index, "pipeline": str(index.get("_class_name", "")), "components": models}
    config = read_json(base / "config.json")
    modules: frozenset[str] = frozenset()
    # A quantized base stores other tensors under other names.
    if not config.get("quantization_config") and any((base / n).exists() for n in (INDEX_NAME, SINGLE_NAME)):
        with open_checkpoint(base, quantized=True) as checkpoint:
            modules = frozenset(name.removesuffix(".weight") for name in checkpoint.tensors if name.endswith(".weight"))
    return {"base": config, "base_modules": modules}
