"""The contract of a consumer, what it looks at, and the registry that finds consumers by scanning this folder.

A consumer is a program that loads adapters: a server, a converter, a library. It is one file here that binds
``CONSUMER``: a pure function from a `Subject` to findings. It states what the program would do, read in its source at
one version; it never runs the program, and it never reads the data of a tensor.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lrconvert.core import registry
from lrconvert.core.errors import FileKindError, LrcError, OptionError, UnknownLayoutError, printable
from lrconvert.core.limits import MAX_PATTERNS
from lrconvert.formats import loading
from lrconvert.formats.lrc import file
from lrconvert.formats.readers import base as readers
from lrconvert.formats.readers.peft.patterns import check_work, compile_pattern
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.io.container import INDEX_NAME, SINGLE_NAME, ContainerFile, TensorInfo, open_checkpoint, read_json

Severity = Literal["refuses", "wrong", "warns"]
Layout = Literal["peft", "mlx", "bare", "lrconvert"]  # bare: weights without a configuration

CONFIG_NAME = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_PICKLES = ("adapter_model.bin", "adapter_model.pt")
MLX_WEIGHTS = "adapters.safetensors"
PEFT_PREFIX = "base_model.model."
BAKE = "bake the scale into lora_B and write lora_alpha = r without patterns, as `lrconvert export --to peft-lora` does"
RESAVE = "load it with PEFT and save_pretrained it again: that writes safetensors"

_FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<half>[AB])\.weight")
_EMBEDDING = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_embedding_(?P<half>[AB])")
_NUMBERED = re.compile(r"[^.]+\.\d+\..*")


@dataclass(frozen=True)
class Finding:
    """One thing that a consumer would do with an adapter.

    `severity`: it "refuses" the adapter, silently gets it "wrong", or "warns" (a note of ours or of the consumer; the
    result may be right). `version` is the one whose source was read, `source` where in it. `rule` is stable.
    """

    severity: Severity
    consumer: str
    version: str
    rule: str
    what: str
    fix: str
    source: str

    def __str__(self) -> str:
        advice = printable(self.fix[0].upper() + self.fix[1:], 600)
        return f"{self.severity}: {self.consumer} {self.version}: {printable(self.what, 600)}. {advice}."


@dataclass(frozen=True)
class NoOptions:
    """The options of a consumer without any."""


@dataclass(frozen=True)
class Consumer:
    """One program. `Options` is a frozen dataclass of settings that change the answer, each field with
    ``metadata={"help": ...}``; fields of one name in several consumers are one option. `examine(subject, options)`
    yields findings and raises nothing but E-OPTION and E-PATTERN."""

    id: str
    title: str
    version: str
    examine: Callable[[Subject, Any], Iterable[Finding]]
    Options: type[Any] = NoOptions


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
    """An adapter as cheaply seen: its configuration, the headers of its tensors, the names of the files beside them.

    `weights` names the file that `tensors` are from, or "". `pickle` names a pickle that holds the weights instead; it
    is not opened. `foreign` is the reader of the layout where it is another tool's, "" for PEFT's, mlx-lm's and names
    that may be anybody's. `base` is the base's config.json, None if no base was given; `base_modules` are the modules
    whose weight the base stores, empty if unknown.
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

    # --- configuration; a value of another type than expected is None here, and a finding of some consumer ---

    def number(self, key: str, default: float | None = None) -> float | None:
        return as_number(self.config.get(key, default))

    def flag(self, key: str) -> bool:
        """Whether a feature is set to anything but nothing."""
        return self.config.get(key) not in (None, False, "", [], {}, "none")

    def names(self, key: str) -> list[str]:
        """The strings of a list."""
        value = self.config.get(key)
        return [v for v in value if isinstance(v, str)] if isinstance(value, list) else []

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
        found = (self.base or {}).get("architectures")
        return found[0] if isinstance(found, list) and found and isinstance(found[0], str) else ""

    def base_number(self, key: str) -> float | None:
        """A number of the base's configuration, or of its text part."""
        base = self.base or {}
        text = base.get("text_config")
        return as_number(base.get(key, text.get(key) if isinstance(text, dict) else None))

    # --- tensors ---

    @cached_property
    def pairs(self) -> dict[str, Pair]:
        """LoRA factors by module, with or without PEFT's prefix."""
        halves: dict[tuple[str, bool], dict[str, TensorInfo]] = {}
        for info in self.tensors:
            if found := _factor(info.name):
                halves.setdefault((found["module"], "lora_embedding_" in info.name), {})[found["half"]] = info
        return {module: Pair(ab.get("A"), ab.get("B"), kind) for (module, kind), ab in sorted(halves.items())}

    @cached_property
    def others(self) -> tuple[TensorInfo, ...]:
        """Tensors that are not LoRA factors."""
        return tuple(info for info in self.tensors if not _factor(info.name))

    # --- PEFT's meaning of ranks and alphas ---

    @cached_property
    def _rules(self) -> dict[str, list[tuple[str, re.Pattern[str], float | None]]]:
        rules = {
            key: [(text, compile_pattern(text), as_number(value)) for text, value in self.pattern(key).items()]
            for key in ("rank_pattern", "alpha_pattern")
        }
        check_work([text for found in rules.values() for text, _, _ in found], self.pairs)
        return rules

    def _by_pattern(self, key: str, module: str, default: float | None) -> float | None:
        for text, rule, value in self._rules[key]:
            if text == module or rule.match(module):
                return value
        return default

    def rank(self, module: str) -> float | None:
        """The rank that the configuration gives a module (PEFT: the first pattern that matches)."""
        return self._by_pattern("rank_pattern", module, self.number("r", 8))

    def alpha(self, module: str) -> float | None:
        return self._by_pattern("alpha_pattern", module, self.number("lora_alpha", 8))

    def scale(self, module: str) -> float | None:
        """The factor on B @ A that PEFT computes; None if the configuration gives none."""
        rank, alpha = self.rank(module), self.alpha(module)
        if rank is None or alpha is None or rank <= 0:
            return None
        return alpha / math.sqrt(rank) if self.flag("use_rslora") else alpha / rank


def as_number(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _factor(name: str) -> re.Match[str] | None:
    return _FACTOR.fullmatch(name) or _EMBEDDING.fullmatch(name)


def words(text: str) -> frozenset[str]:
    """A set of names, written as a text of words."""
    return frozenset(text.split())


def leaf(module: str) -> str:
    """The last part of a module's name."""
    return module.rpartition(".")[2]


def example(names: Sequence[str]) -> str:
    """Some names as a person reads them."""
    return f"{names[0]!r:.160}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


# --- facts that several consumers share -----------------------------------------------------------------------------


def not_a_peft_folder(subject: Subject) -> tuple[str, str] | None:
    """What is wrong and what to do, if the input is no PEFT folder at all."""
    if subject.foreign:
        return f"an adapter in the layout {subject.foreign}: its names and scales are its own", (
            "convert it, and export the result: `lrconvert export FILE -o DIR --to peft-lora`"
        )
    if subject.layout == "lrconvert":
        return "a compact lrconvert file: no server loads one", (
            "export it first: `lrconvert export FILE -o DIR --to peft-lora`"
        )
    if subject.layout == "mlx":
        return "an mlx-lm adapter: its names, shapes and configuration are its own", "convert it to PEFT's layout first"
    if CONFIG_NAME not in subject.files:
        return f"there is no {CONFIG_NAME}", (
            f"give a folder that holds {CONFIG_NAME} and {PEFT_WEIGHTS}; without the first, alpha is unknown"
        )
    return None


def rescaled(subject: Subject, theirs: Callable[[str, int], float]) -> str:
    """The modules whose scale a consumer computes otherwise than PEFT, as text; "" if there is none.

    `theirs(module, rank)` is what the consumer multiplies B @ A by.
    """
    wrong = []
    for module, pair in subject.pairs.items():
        right = subject.scale(module)
        if right is None or pair.rank is None or pair.rank != subject.rank(module):
            continue  # a contradiction is a finding of its own
        used = theirs(module, pair.rank)
        if not math.isclose(used, right, rel_tol=1e-6):
            wrong.append((module, right, used))
    if not wrong:
        return ""
    module, right, used = wrong[0]
    return f"{len(wrong)} of {len(subject.pairs)} modules, {module!r:.120} by {used:g} instead of {right:g}"


def ranks_at_odds(subject: Subject) -> list[str]:
    """Modules whose factors have another rank than the configuration says."""
    odd = [m for m, pair in subject.pairs.items() if pair.rank and subject.rank(m) not in (None, pair.rank)]
    # PEFT stores the factors of all experts of a stack as one, of rank r * experts.
    return [m for m in odd if all((subject.pairs[m].rank or 0) % rank for rank in _stack_ranks(subject, m))]


def _stack_ranks(subject: Subject, module: str) -> list[int]:
    """The ranks that one expert may have, if target_parameters adapts a stack in `module`. Patterns go by the names of
    parameters, and which of several a pair of factors is for does not show here."""
    while module.endswith(".base_layer"):
        module = module.removesuffix(".base_layer")
    names = [name.rpartition(".") for name in subject.names("target_parameters")]
    held = [leaf for holder, _, leaf in names if not holder or f".{module}".endswith(f".{holder}")]
    ranks = {subject.rank(f"{module}.{leaf}") for leaf in held}
    return [int(rank) for rank in ranks if rank is not None and rank >= 1 and rank == int(rank)]


def incomplete(subject: Subject) -> list[str]:
    """Modules with one factor only, or with factors that do not fit."""
    return [module for module, pair in subject.pairs.items() if pair.rank is None]


def not_floats(subject: Subject) -> list[str]:
    """Factors of an integer type: codes of some quantization, which no LoRA loader undoes."""
    halves = [half for pair in subject.pairs.values() for half in (pair.a, pair.b) if half is not None]
    return [info.name for info in halves if not info.dtype.startswith(("F", "BF"))]


def outside_base(subject: Subject) -> tuple[list[str], list[str]]:
    """(modules that the base lacks, modules that it has under a longer name), as far as the base's names are known.

    A base saved from the bare model lacks the prefix that the adapter's names have; that is no difference. Only names
    with a layer number are judged: tied and renamed heads are stored in too many ways.
    """
    lacking, shorter = [], []
    if subject.base_modules:
        tails = {found.group() for name in subject.base_modules if (found := _NUMBERED.search(name))}
        for module in subject.pairs:
            found = _NUMBERED.search(module)
            if not found or module in subject.base_modules:
                continue
            if found.group() not in tails:
                lacking.append(module)
            elif any(name.endswith(f".{module}") for name in subject.base_modules):
                shorter.append(module)
    return lacking, shorter


def changes_base(subject: Subject) -> bool:
    """Whether the initialization moved part of the base's weights into the factors (PiSSA, OLoRA, CorDA, LoftQ)."""
    init = subject.config.get("init_lora_weights")
    return isinstance(init, str) and init.lower() not in ("gaussian", "eva", "orthogonal", "mica", "lora_ga", "true")


# --- looking at a path ----------------------------------------------------------------------------------------------


# Readers of what the consumers have rules of their own for, or that names alone do not tell from PEFT's tensors.
_OWN_RULES = ("peft", "peft_miss", "peft_vblora", "mlx", "raw")
_GGUF = "gguf"


def look(path: Path, said: ReadOptions | None = None) -> Subject:
    """The `Subject` at `path`: a folder, or a file. Only headers and small JSON files are read. `said.layout` counts
    before the content.

    Raises E-LAYOUT if nothing there could be an adapter, E-OPTION for a layout or an alpha that is not for it, and the
    container's errors for broken files.
    """
    said = said or ReadOptions()
    about_base = _look_at_base(said.base) if said.base is not None else {}
    layout = said.layout
    if layout is None and readers.named(_GGUF).recognises(path):
        layout = _GGUF
    if layout == _GGUF and path.is_file():
        subject = Subject("bare", weights=path.name, **about_base)
    else:
        subject = _look(path, about_base)
    if subject.layout == "lrconvert":
        loading.refuse_said(said, path)
        return subject
    if layout is None:
        layout = subject.layout if subject.layout != "bare" else _told(subject)
    if layout is None:
        loading.refuse_said(said)
        return subject
    readers.check_alpha(readers.named(layout), said.alpha, path)
    if layout == "mlx":
        return replace(subject, layout="mlx")
    return subject if layout in _OWN_RULES else replace(subject, foreign=layout)


def _told(subject: Subject) -> str | None:
    """The layout that the names of bare tensors tell."""
    names = [info.name for info in subject.tensors]
    return next((reader.id for reader in readers.all_readers() if reader.knows(names)), None)


def _look(path: Path, about_base: dict[str, Any]) -> Subject:
    if path.is_dir():
        return _look_at_folder(path, about_base)
    if not path.exists():
        raise UnknownLayoutError("there is no such file or folder", path=path)
    if file.is_lrconvert(path):
        return Subject("lrconvert", **about_base)
    if path.name in (PEFT_WEIGHTS, MLX_WEIGHTS, *PEFT_PICKLES) and (path.parent / CONFIG_NAME).exists():
        return _look_at_folder(path.parent, about_base)
    return Subject("bare", tensors=_headers(path), weights=path.name, **about_base)


def _headers(path: Path) -> tuple[TensorInfo, ...]:
    with ContainerFile(path) as opened:
        return opened.tensors


def _look_at_folder(path: Path, about_base: dict[str, Any]) -> Subject:
    try:
        files = frozenset(p.name for p in path.iterdir())
    except OSError as error:
        raise FileKindError(f"cannot be listed: {error.strerror}", path=path) from None
    config = read_json(path / CONFIG_NAME) if CONFIG_NAME in files else {}
    of_mlx = "peft_type" not in config and (
        bool({"fine_tune_type", "lora_parameters"} & set(config))
        or (bool({MLX_WEIGHTS, "adapters.npz"} & files) and PEFT_WEIGHTS not in files)
    )
    if not config and not any(name.endswith((".safetensors", ".npz", ".bin", ".pt")) for name in files):
        raise UnknownLayoutError("the folder holds neither an adapter_config.json nor weights", path=path)
    weights = MLX_WEIGHTS if of_mlx else PEFT_WEIGHTS
    present = weights in files
    return Subject(
        "mlx" if of_mlx else "peft" if CONFIG_NAME in files else "bare",
        config,
        _headers(path / weights) if present else (),
        weights if present else "",
        "" if present else next((name for name in PEFT_PICKLES if name in files), ""),
        files,
        read_json(path / "added_tokens.json") if "added_tokens.json" in files else {},
        **about_base,
    )


def _look_at_base(base: Path) -> dict[str, Any]:
    config = read_json(base / "config.json")
    modules: frozenset[str] = frozenset()
    # A quantized base stores other tensors under other names.
    if not config.get("quantization_config") and any((base / n).exists() for n in (INDEX_NAME, SINGLE_NAME)):
        with open_checkpoint(base) as checkpoint:
            modules = frozenset(name.removesuffix(".weight") for name in checkpoint.tensors if name.endswith(".weight"))
    return {"base": config, "base_modules": modules}


def check(path: Path, consumers: Iterable[str], said: ReadOptions, options: Mapping[str, Any]) -> tuple[Finding, ...]:
    """See `lrconvert.api.check`."""
    used = chosen(consumers)
    fields = [{f.name for f in dataclasses.fields(consumer.Options)} for consumer in used]
    if unknown := sorted(set(options) - set().union(*fields)):
        raise OptionError(f"none of these consumers has the option {unknown[0]!r}")
    settings = [
        c.Options(**{k: v for k, v in options.items() if k in names}) for c, names in zip(used, fields, strict=True)
    ]
    try:
        subject = look(path, said)
        return tuple(f for c, setting in zip(used, settings, strict=True) for f in c.examine(subject, setting))
    except LrcError as error:
        raise error.at(path) from None


# --- the registry ---------------------------------------------------------------------------------------------------


def ids() -> list[str]:
    """Names for `--for`, from the file names of this folder."""
    return registry.names("lrconvert.formats.compat")


def get(consumer_id: str) -> Consumer:
    """The consumer of that id. Raises E-OPTION for an unknown one."""
    if consumer_id not in ids():
        raise OptionError(f"there is no consumer {consumer_id!r}", fix=f"known: {', '.join(ids())}, all")
    found: Consumer = registry.load("lrconvert.formats.compat", consumer_id, "CONSUMER")
    return found


def chosen(names: Iterable[str]) -> list[Consumer]:
    """The consumers of these ids, each once; "all" stands for every one."""
    wanted = [known for name in names for known in (ids() if name == "all" else [name])]
    return [get(name) for name in dict.fromkeys(wanted)]
