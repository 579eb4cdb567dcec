"""The pages in formats/: the schema fits the files, the tables equal the code, and a second reader, written from the
pages alone, decodes the same factors. The worked example and the table of errors are generated:

    python tests/formats/test_formats.py        writes both anew
"""

from __future__ import annotations

import base64
import copy
import hashlib
import importlib
import json
import math
import pkgutil
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import second_readers
from conftest import ADAPTERS, FIXTURES, ROOT, random_lora
from hypothesis import given, settings
from hypothesis import strategies as st
from models import wanted_base
from second_readers.container import manifest_of_3, open_file, packed, packed_3, value_at, words
from second_readers.parts import list_targets, out_in

from lrconvert.core import errors, limits
from lrconvert.formats.lrc import file, validation
from lrconvert.formats.lrc import manifest as manifest_module
from lrconvert.formats.lrc import packed as manifest_packed
from lrconvert.formats.readers.base import load
from lrconvert.io.checkpoint import open_checkpoint
from lrconvert.lora import packing
from lrconvert.lora.adapter import TRANSPOSED, CompactAdapter, ExtraTensor, LoraAdapter, Provenance, Target, View
from lrconvert.lora.base_weights import BaseWeights
from lrconvert.lora.coded import stream
from lrconvert.lora.fingerprint import fingerprint
from lrconvert.methods import base as methods
from lrconvert.methods.bone import form as bone
from lrconvert.methods.lowrank import form as lowrank
from lrconvert.methods.lowrank import v1 as lowrank_v1
from lrconvert.methods.nola import Config as NolaConfig
from lrconvert.methods.nola import v1 as nola_v1
from lrconvert.methods.sbora import form as sbora
from lrconvert.methods.vblora import form as vblora
from lrconvert.testing.container_versions import VERSIONS, encoded, versions
from lrconvert.testing.raw_files import RawFile

FORMATS = ROOT / "formats"
PAGES = sorted(FORMATS.rglob("*.md"))
SPECS = {version: FORMATS / f"lrconvert-v{version}.md" for version in VERSIONS}
SCHEMAS = {  # version 3 has the manifest of version 2
    version: json.loads((FORMATS / f"manifest-v{min(version, 2)}.schema.json").read_text()) for version in VERSIONS
}
CASES = [(m.id, n) for m in methods.all_methods() for n in range(len(m.examples))]


# --- the second reader: written from formats/, as are its methods in second_readers/; shares no code with lrconvert --


SECOND = {
    module.name: importlib.import_module(f"second_readers.{module.name}")
    for module in pkgutil.iter_modules(second_readers.__path__)
    if module.name not in ("container", "parts", "coded", "undo", "fleet")
}


def second_reader(compact: CompactAdapter) -> Any:
    """The module that reads all versions of a method."""
    return SECOND[compact.method.partition(".")[0]]


def check_second_reader(data: bytes, compact: CompactAdapter) -> None:
    """The second reader finds in `data` what `compact` has: targets, factors, extras, base names."""
    manifest, tensors = open_file(data)
    targets = list_targets(manifest)
    assert targets == [(t.name, list(t.shape), t.view.text) for t in compact.targets]
    factors = second_reader(compact).expand(manifest, tensors)
    form = methods.get(compact.method)
    numbers = methods.values(form, compact)
    for which, (target, (name, shape, view)) in enumerate(zip(compact.targets, targets, strict=True)):
        a2, b2 = factors[which]
        a, b = form.expand(compact.config, compact.targets, numbers, which, np)
        if form.needs_base(compact.config):
            weight = np.random.default_rng(which).standard_normal(target.matrix_shape)
            ours = form.rows_on(compact.config, compact.targets, which, (a, b), weight, 0)
            assert np.array_equal(ours, second_reader(compact).update_on(manifest, factors[which], weight))
        assert target.name == name and out_in(shape, view) == target.matrix_shape
        for ours, theirs in ((a, a2), (b, b2)):
            assert theirs.dtype == np.float32 and theirs.shape == ours.shape
            assert np.array_equal(ours, theirs)
    for number, (entry, extra) in enumerate(zip(manifest["extras"], compact.extras, strict=True)):
        assert (entry["name"], entry["dtype"], tuple(entry["shape"])) == (extra.name, extra.dtype, extra.shape)
        assert tensors[f"extra.{number}"] == extra.data
    digest = hashlib.sha256()
    for name, shape in sorted({(name, tuple(shape)) for name, shape, _ in targets}):
        digest.update(struct.pack("<Q", len(name.encode())) + name.encode())
        digest.update(struct.pack(f"<{1 + len(shape)}Q", len(shape), *shape))
    assert digest.hexdigest() == compact.base.names == manifest["base"].get("names", compact.base.names)


# --- files to check -------------------------------------------------------------------------------------------------

EXTRAS = (ExtraTensor("score.bias", "F32", (2,), bytes(range(8))), ExtraTensor("t", "BF16", (), b"\1\2"))


def fitted(method: methods.Method, lora: LoraAdapter, options: Mapping[str, Any]) -> CompactAdapter:
    """`lora` in the form `method` by its own plan and fit."""
    wanted = dict(options)
    size, ratio = wanted.pop("target_size", None), wanted.pop("target_ratio", None)
    targets = lora.shapes()
    compact = CompactAdapter(method.id, None, targets, {}, lora.extras, lora.provenance, fingerprint(targets))
    with ExitStack() as stack:
        weights = None
        for folder in wanted_base(method.id, options, lora).values():
            checkpoint = stack.enter_context(open_checkpoint(folder))
            weights = BaseWeights(lora, checkpoint, checkpoint.content_digest())
            compact = replace(compact, base=replace(compact.base, content=weights.content))
        context = methods.FitContext(base=weights)
        budget = None
        if size or ratio:
            budget = methods.Budget(
                int(size or lora.half_bytes / ratio), lambda config: file.sizes(replace(compact, config=config)).adapter
            )
        config = method.plan(lora, method.Options(**wanted), budget, context)
        return replace(compact, config=config, tensors=method.fit(lora, config, context))


def source(turn: int) -> LoraAdapter:
    """Even and odd shapes, some transposed; every other one with extras and provenance."""
    straight = random_lora([(48, 32), (20, 36), (32, 48)], rank=5, seed=turn)
    turned = random_lora([(32, 64)], rank=5, seed=turn + 1, view=TRANSPOSED).targets[0]
    renamed = replace(turned, target=replace(turned.target, name="turned.weight"))
    whole = replace(straight, targets=(*straight.targets, renamed))
    if turn % 2:
        return whole
    named = Provenance("ab" * 32, 'org/größe "x" \\y', "main", "CAUSAL_LM", {"source_format": "peft"})
    return replace(whole, extras=EXTRAS, provenance=named)


_FILES: dict[tuple[str, int], CompactAdapter] = {}


def made(method: str, example: int) -> CompactAdapter:
    key = (method, example)
    if key not in _FILES:
        form = methods.get(method)
        _FILES[key] = fitted(form, source(example), form.examples[example])
    return _FILES[key]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("method", "example"), CASES)
def test_two_readers_agree(method, example, version):
    compact = made(method, example)
    check_second_reader(encoded(compact, version), compact)


def test_the_tables_on_the_page_are_the_codes():
    assert words() == (list(manifest_packed.WORDS), list(manifest_packed.PARTS))


def test_every_method_has_a_second_reader():
    assert set(SECOND) == set(methods.module_names())


@pytest.mark.parametrize(
    "path", sorted((FIXTURES / "golden").glob("*/*/*.lrc")), ids=lambda p: f"{p.parent.name}-{p.stem}"
)
def test_two_readers_agree_on_golden_files(path):
    check_second_reader(path.read_bytes(), file.read(path))


@pytest.mark.parametrize("name", sorted(p.name for p in ADAPTERS.iterdir() if p.name.startswith("llama-p")))
def test_two_readers_agree_on_adapters(name):
    lora = load(ADAPTERS / name)
    compact = fitted(methods.get("lowrank"), lora, {"target_ratio": 10})
    check_second_reader(encoded(compact, VERSIONS[-1]), compact)


# Configs and numbers drawn at random: what no fit would make, but a file may hold.

WIDTHS = (16, 8, 4, 3, 2, 1)
UNEVEN = ((12, 7), (4, 129), (1, 1), (257, 3), (60, 40), (127, 2), (28, 9))  # (out, in)


def draw_lowrank(rng: np.random.Generator, targets: Sequence[Target]) -> Any:
    """Without the length, which follows from the numbers."""
    counts = [int(rng.integers(min(t.matrix_shape) + 1)) * int(rng.integers(2)) for t in targets]
    counts[2] = 1
    models = rng.integers(64, size=(sum(counts), 2))
    return lowrank.Config(tuple(counts), tuple(map(tuple, models.tolist())), 0)


def draw_coded(rng: np.random.Generator, rows: Sequence[tuple[int, int]]) -> np.ndarray:
    """Integers of about the deviations of their models, some far larger."""
    sigma = np.concatenate([np.full(count, 2 ** ((model - 10) / 4)) for model, count in rows])
    wild = np.where(rng.random(len(sigma)) < 0.01, 50, 1)
    return np.clip(np.rint(rng.standard_normal(len(sigma)) * sigma * wild), 1 - 2**20, 2**20 - 1).astype(np.int32)


def draw_lowrank_v1(rng: np.random.Generator, targets: Sequence[Target]) -> Any:
    levels, counts = draw_counts(rng, [min(t.matrix_shape) for t in targets])
    header = {"levels": levels, "max_count": int(counts.max()), "group_size": int(rng.choice([0, 1, 5]))}
    if levels == [16]:
        header["group_size"] = 0
    scaled = counts[:, [q < 16 for q in levels]].any(1)
    if max((max(t.matrix_shape) for t, some in zip(targets, scaled, strict=True) if some), default=0) <= 5:
        header["group_size"] = 0
    return lowrank_v1.METHOD.config(header, {"counts": counts}, targets)


def draw_counts(rng: np.random.Generator, most: Sequence[int]) -> tuple[list[int], np.ndarray]:
    """Widths in use, and for each target how many of each, `most` of them together."""
    counts = np.zeros((len(most), len(WIDTHS)), np.uint32)
    used = rng.permutation(len(WIDTHS))[: rng.integers(1, len(WIDTHS) + 1)]
    for row, limit in zip(counts, most, strict=True):
        for level in rng.choice(used, rng.integers(limit + 1) if rng.random() < 0.7 else 0):
            row[level] += 1
    counts[0, used[0]] = max(counts[0, used[0]], counts[0].sum() < most[0])
    kept = counts.any(0)
    return [q for q, some in zip(WIDTHS, kept, strict=True) if some], counts[:, kept]


def draw_sbora(rng: np.random.Generator, targets: Sequence[Target]) -> Any:
    by_rows = [bool(n) for n in rng.integers(2, size=len(targets))]
    if rng.random() < 0.5:
        by_rows = by_rows[:1] * len(targets)
    levels, counts = draw_counts(rng, [t.matrix_shape[not v] for t, v in zip(targets, by_rows, strict=True)])
    return sbora.settled(levels, counts.tolist(), by_rows)


def draw_bone(rng: np.random.Generator, targets: Sequence[Target]) -> Any:
    bits, mini = int(rng.choice((32, *WIDTHS))), int(rng.choice([0, 0, 1, 4]))
    shapes = [t.matrix_shape for t in targets]
    turned = [bool(n) and not mini for n in rng.integers(2, size=len(targets))]
    ranks = [int(rng.integers(shape[not v] + 1)) for shape, v in zip(shapes, turned, strict=True)]
    ranks = [0 if mini and shape[0] % mini else rank for shape, rank in zip(shapes, ranks, strict=True)]
    ranks[4] = max(1, ranks[4])
    if rng.random() < 0.2 and mini < 2:
        ranks = [1] * len(targets)
    group = int(rng.choice([0, 3, 50]))
    bat = not mini and rng.random() < 0.3
    if bat:
        turned, common = [False] * len(targets), [math.gcd(*shape) for shape in shapes]
        ranks = [int(rng.choice([r for r in range(n + 1) if not r or n % r == 0])) for n in common]
        ranks[4] = max(1, ranks[4])
    return bone.complete(targets, ranks, turned, bits=bits, mini_rank=mini, group_size=group, bat=bat)


def draw_seed(rng: np.random.Generator) -> int:
    return int(rng.choice([0, 7, 2**40 + 1, 2**63])) * 2 - int(rng.integers(2)) & 2**64 - 1


def draw_nola(rng: np.random.Generator, targets: Sequence[Target]) -> Any:
    plain = draw_lowrank(rng, targets)
    return NolaConfig(plain.counts, plain.models, plain.length, seed=draw_seed(rng))


def draw_nola_v1(rng: np.random.Generator, targets: Sequence[Target]) -> Any:
    family = str(rng.choice(["hadamard", "dense"]))
    kind = "sign" if family == "hadamard" else str(rng.choice(["u8", "u24", "sign"]))
    form = nola_v1.Form(family, kind, int(rng.choice(WIDTHS)), draw_seed(rng), bool(rng.integers(2)))
    most = int(rng.integers(1, 5))
    ranks = [min(most, *t.matrix_shape) for t in targets]
    if rng.random() < 0.5:
        ranks[1:] = [int(rng.integers(rank + 1)) for rank in ranks[1:]]
    largest = int(rng.choice([1, 5, 100, 1000] if family == "hadamard" else [1, 5, 30]))
    uneven = rng.random() < 0.5
    counts = [
        tuple(min(d, int(rng.integers(1, largest + 1)) if uneven else largest) for d in nola_v1.lengths(t, rank))
        for t, rank in zip(targets, ranks, strict=True)
    ]
    return nola_v1.complete(form, targets, ranks, counts)


def draw_vblora(rng: np.random.Generator, targets: Sequence[Target]) -> Any:
    k = int(rng.integers(1, 4))
    wide = bool(rng.integers(2)) and k > 1
    form = vblora.Form(int(rng.integers(1, 9)), int(rng.integers(k, 40)), k, int(rng.choice([32, 16, 8, 4])))
    form = replace(form, weight_bits=0 if k == 1 else 32 if wide else 5, gains=bool(rng.integers(2)))
    ranks = [int(rng.integers(min(t.matrix_shape) % 7 + 1)) for t in targets]
    ranks[2] = 1
    if rng.random() < 0.3:
        ranks = [1] * len(targets)
    passes = rng.integers(1, 4, 2 * sum(ranks)).tolist() if form.gains and rng.random() < 0.5 else ()
    return vblora.complete(form, targets, ranks, passes)


def draw_places(rng: np.random.Generator, config: Any, targets: Sequence[Target]) -> np.ndarray:
    """`indices` of SBoRA: places rise within a width, none appears twice."""
    indices: list[int] = []
    for target, row, by_rows in zip(targets, config.counts, config.by_rows, strict=True):
        places = rng.permutation(target.matrix_shape[not by_rows]).tolist()
        for count in row:
            indices += sorted(places[:count])
            places = places[count:]
    return np.array(indices, np.uint32)


DRAWN: dict[str, Callable[[np.random.Generator, Sequence[Target]], Any]] = {
    "lowrank": draw_lowrank,
    "lowrank.v1": draw_lowrank_v1,
    "vblora": draw_vblora,
    "sbora": draw_sbora,
    "bone": draw_bone,
    "nola": draw_nola,
    "nola.v1": draw_nola_v1,
}


def drawn(method: str, seed: int) -> CompactAdapter:
    rng = np.random.default_rng([sorted(DRAWN).index(method), seed])
    targets = tuple(sorted(Target(f"t.{n}.w", shape) for n, shape in enumerate(UNEVEN)))
    config = DRAWN[method](rng, targets)
    tensors = {}
    for spec in methods.get(method).specs(config, targets):
        if spec.kind == "coded":
            tensors[spec.name] = draw_coded(rng, spec.rows)
            config = replace(config, length=len(stream.encode(tensors[spec.name], spec.rows)))
        elif spec.kind in ("code", "index"):
            limit, dtype = (1 << spec.bits, np.uint8) if spec.kind == "code" else (spec.limit, np.uint32)
            tensors[spec.name] = rng.integers(limit, size=spec.shape).astype(dtype)
        else:
            numbers = (rng.standard_normal(spec.shape) * 2.0 ** rng.integers(-110, 30)).astype(np.float32)
            tensors[spec.name] = packing.round_half(numbers) if spec.kind == "half" else numbers
    if method == "sbora":
        tensors["indices"] = draw_places(rng, config, targets)
    if method == "vblora":
        tensors = tidied(rng, config.form, tensors)
    base = replace(fingerprint(targets), content="5b" * 32 if methods.get(method).needs_base(config) else "")
    return CompactAdapter(method, config, targets, tensors, base=base)


def tidied(rng: np.random.Generator, form: Any, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Codes of VB-LoRA as a file may spell them, scales not negative."""
    count, k = tensors["indices"].shape
    indices = np.argsort(rng.random((count, form.num_vectors)), axis=1)[:, :k]
    if k > 1:
        small = -np.sort(-rng.random((count, k - 1)) / (k + 1), axis=1)
        small = small.astype(np.float32) if form.exact_weights else np.floor(small * form.denominator)
        rest = np.inf if form.exact_weights else form.denominator - small.sum(1, keepdims=True)
        indices, units = vblora.canonical_codes(indices, np.concatenate([np.zeros((count, 1)) + rest, small], 1))
        tensors = tensors | {"weights": units[:, 1:].astype(np.float32 if form.exact_weights else np.uint32)}
    if "scales" in tensors:
        tensors = tensors | {"scales": np.abs(tensors["scales"])}
    return tensors | {"indices": indices.astype(np.uint32)}


@pytest.mark.medium
@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("method", DRAWN)
def test_two_readers_agree_on_drawn_files(method, seed, tmp_path):
    compact = drawn(method, seed)
    data = encoded(compact, versions(compact)[seed % len(versions(compact))])
    (tmp_path / "x.lrc").write_bytes(data)
    check_second_reader(data, file.read(tmp_path / "x.lrc"))


SHAPES = {
    "matrix": (3, 4),
    "transposed": (4, 3),
    "conv:2:1": (3, 2, 2),
    "conv:1x2:1": (3, 2, 1, 2),
    "rows:1:4": (5, 4),
    "rows:2:5": (5, 4),
    "expert:0": (2, 3, 4),
    "expert:1": (2, 3, 4),
    "expert_transposed:0": (2, 4, 3),
    "expert_transposed:1": (2, 4, 3),
}
segments = st.sampled_from(["0", "1", "2", "10", "007", "h", "w", "é", "1a", "-1", ""])
names = st.lists(segments, min_size=1, max_size=4).map(".".join).filter(bool)


@given(st.sets(st.tuples(names, st.sampled_from(sorted(SHAPES))), min_size=1, max_size=30), st.randoms())
@settings(deadline=None)
def test_two_readers_agree_on_targets(items, random):
    """Any names and views: 1-bit factors of rank 1, every target with its own numbers."""
    whole = {}
    for name, view in sorted(items):  # at most one target on a parameter here
        whole.setdefault(name, view)
    targets = tuple(sorted(Target(name, SHAPES[view], View(view)) for name, view in whole.items()))
    config = lowrank_v1.Config((1,), ((1,),) * len(targets))
    tensors = {
        spec.name: np.array(
            [random.randrange(2) for _ in range(spec.numel)], np.uint8 if spec.kind == "code" else np.float32
        )
        for spec in lowrank_v1.METHOD.specs(config, targets)
    }
    compact = CompactAdapter("lowrank.v1", config, targets, tensors, base=fingerprint(targets))
    check_second_reader(encoded(compact, VERSIONS[-1]), compact)


# --- the worked example ---------------------------------------------------------------------------------------------

BEGIN, END = "<!-- generated: begin -->\n", "<!-- generated: end -->"


def example() -> CompactAdapter:
    """Small enough to follow by hand, with every part that a file can have."""
    targets = (
        Target("h.0.attn.weight", (4, 3), TRANSPOSED),
        Target("h.1.attn.weight", (4, 3), TRANSPOSED),
        Target("head.weight", (2, 5)),
    )
    config = lowrank_v1.Config((16, 2), ((1, 2), (0, 1), (1, 0)), group_size=3)
    tensors = {
        "half": np.array([1, -2, 0.5, 0, 0.25, -1, 3, 0.125, 1.5, -0.75, 2, 0, 1, -0.5], np.float32),
        "codes.2": np.array([0, 1, 2, 3, 3, 2, 1, 3, 0, 3, 0, 1, 1, 2, 2, 2, 1, 0, 0, 3, 3], np.uint8),
        "scales": np.array([0.5, 0.25, 1, 0.125, 0.75, 1.5, 0.0625, 0.1875, 1.25], np.float32),
    }
    extra = ExtraTensor("score.bias", "F32", (2,), np.array([0.5, -1], "<f4").tobytes())
    came = Provenance(base_model="org/base", task_type="SEQ_CLS", fields={"source_format": "peft"})
    return CompactAdapter("lowrank.v1", config, targets, tensors, (extra,), came, fingerprint(targets))


def example_text(version: int) -> str:
    """The generated part of the page of a container version: the worked example."""
    data = encoded(example(), version)
    manifest, tensors = open_file(data)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    rows = []
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        raw = data[8 + length + begin : 8 + length + end].hex(" ")
        if name == "lrconvert":
            raw = tensors[name].hex(" ")
            begin = end - len(tensors[name])
        rows.append(f"| `{name}` | {entry['dtype']} | {begin}-{end} | `{raw}` |")
    factors = {t.name: {"A": a.tolist(), "B": b.tolist()} for t, a, b in methods.expand_all(example())}
    lines = "\n".join(
        f"{json.dumps(name)}: {json.dumps(f)}" + "," * (name != "head.weight") for name, f in factors.items()
    )
    whole = (
        f"The whole file, {len(data)} bytes, in base64:\n\n```base64\n{_wrap(base64.b64encode(data).decode())}\n```\n\n"
    )
    begins = f"It begins with the header length {length} (`{data[:8].hex(' ')}`). "
    shown = f"The manifest, here with white space:\n\n```json\n{_pretty(manifest)}\n```\n\n"
    table = "| name | dtype | bytes | data |\n|---|---|---|---|\n" + "\n".join(rows)
    meant = f"\n\nThe factors that a reader MUST obtain:\n\n```json\n{{\n{lines}\n}}\n```\n"
    if version == 1:
        return f"{whole}{begins}{shown}The tensors, at their offsets after the header:\n\n{table}{meant}"
    stored = packed(manifest) if version == 2 else packed_3(manifest)
    return (
        f"{whole}{begins}{shown}Packed, {len(stored)} bytes:\n\n"
        f"```hex\n{_wrap(stored.hex(' '), 96)}\n```\n\n"
        f"The other data, at their offsets after the header:\n\n{table}{meant}"
    )


def _wrap(text: str, width: int = 100) -> str:
    return "\n".join(text[n : n + width].rstrip() for n in range(0, len(text), width))


def _pretty(manifest: Mapping[str, Any]) -> str:
    """One line per field, and per entry of a list that has several."""
    lines = []
    for key, value in sorted(manifest.items()):
        text = json.dumps(value, sort_keys=True)
        if len(text) > 90 and isinstance(value, dict):
            text = (
                "{\n"
                + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v, sort_keys=True)}" for k, v in sorted(value.items()))
                + "}"
            )
            text = text.replace('": {"', '": {\n    "').replace('", "', '",\n    "') if key == "digests" else text
        if len(text) > 90 and isinstance(value, list):
            text = "[\n" + ",\n".join(f"  {json.dumps(v, sort_keys=True)}" for v in value) + "]"
        lines.append(f"{json.dumps(key)}: {text}")
    return "{" + ",\n".join(lines) + "}"


def generated(page: Path) -> str:
    return page.read_text().split(BEGIN)[1].split(END)[0]


@pytest.mark.parametrize("version", SPECS)
def test_the_worked_example_is_what_the_code_writes(version):
    assert generated(SPECS[version]) == example_text(version), "run: python tests/formats/test_formats.py"


@pytest.mark.parametrize("version", SPECS)
def test_the_worked_example_decodes_from_the_page_alone(version, tmp_path):
    page = generated(SPECS[version])
    data = base64.b64decode(re.search(r"```base64\n(.*?)```", page, re.DOTALL)[1])
    shown, factors = (json.loads(block) for block in re.findall(r"```json\n(.*?)```", page, re.DOTALL))
    manifest, tensors = open_file(data)
    assert manifest == shown
    for dump in re.findall(r"```hex\n(.*?)```", page, re.DOTALL):
        read = manifest_of_3 if version == 3 else value_at
        assert read(bytes.fromhex(dump), 0) == (manifest, len(bytes.fromhex(dump)))
    expanded = SECOND["lowrank"].expand(manifest, tensors)
    for (name, shape, view), (a, b) in zip(list_targets(manifest), expanded, strict=True):
        assert factors[name] == {"A": a.tolist(), "B": b.tolist()}
        assert (b.shape[0], a.shape[1]) == out_in(shape, view)
    (tmp_path / "example.lrc").write_bytes(data)
    check_second_reader(data, file.read(tmp_path / "example.lrc"))


# --- rules of the payload -------------------------------------------------------------------------------------------


def damaged(name: str, change: Callable[[bytearray], None], exponents: str = "", version: int = VERSIONS[-1]) -> bytes:
    """The worked example with other bytes in a tensor, or other exponents, all digests made right."""
    raw = RawFile.of(encoded(example(), version))
    where, begin, end = name, 0, None
    if version > 1:  # where all tensors stand in one
        specs = lowrank_v1.METHOD.layout_specs(raw.manifest["method"]["config"], example().targets)
        for spec in (*specs, *lowrank_v1.METHOD.specs(example().config, example().targets)):
            where, begin, end = "lrconvert", end or 0, (end or 0) + spec.nbytes
            if spec.name == name:
                break
    dtype, shape, whole = raw.tensors[where]
    data = bytearray(whole[begin:end])
    change(data)
    raw.tensors[where] = dtype, shape, whole[:begin] + data + whole[len(whole) if end is None else end :]
    raw.manifest["method"]["exponents"] = exponents or raw.manifest["method"]["exponents"]
    return raw.sign().file()


def put(at: int, value: int) -> Callable[[bytearray], None]:
    return lambda data: data.__setitem__(at, value)


def halve(data: bytearray) -> None:
    """Every fp16 number by two: with the exponent raised by one, the same values in another spelling."""
    data[1::2] = bytes(byte - 4 for byte in data[1::2])


PAYLOADS = {
    "NaN": ("half", put(1, 0x7E), "", "E-VALUE"),
    "infinity": ("scales", lambda data: data.__setitem__(slice(0, 2), b"\0\x7c"), "", "E-VALUE"),
    "negative zero": ("half", put(7, 0x80), "", "E-CANON"),
    "exponent too high": ("scales", halve, "f3f3", "E-CANON"),
    "exponent missing": ("half", lambda data: None, "f3", "E-MISSING"),
    "fill bits": ("codes.2", put(5, 0x83), "", "E-CANON"),
    "index too large": ("counts", put(0, 0x4B), "", "E-INDEX"),
    "rank above the shape": ("counts", put(0, 0x4A), "", "E-LIMIT"),
}


@pytest.mark.parametrize("version", VERSIONS)
def test_the_undamaged_example_is_sound(version):
    assert damaged("half", lambda data: None, version=version) == encoded(example(), version)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", PAYLOADS)
def test_payload_rules(case, version, tmp_path):
    name, change, exponents, code = PAYLOADS[case]
    path = tmp_path / "x.lrc"
    path.write_bytes(damaged(name, change, exponents, version))
    assert {finding.code for finding in validation.validate(path).findings} == {code}


def test_messages_do_not_move_the_cursor():
    for hostile in ("a\x1b[2Jb", "a\u202eb", "a\rb"):
        shown = str(errors.BaseError(f"no {hostile}", fix=f"try {hostile}", path=hostile))
        assert shown.isprintable() and "a\\" in shown


# --- the schema -----------------------------------------------------------------------------------------------------

VALIDATORS = {version: jsonschema.Draft202012Validator(schema) for version, schema in SCHEMAS.items()}


def manifest_of(compact: CompactAdapter, version: int = VERSIONS[-1]) -> dict[str, Any]:
    return open_file(encoded(compact, version))[0]


@pytest.mark.parametrize("version", SCHEMAS)
def test_the_schema_is_a_schema(version):
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[version])


@pytest.mark.parametrize("version", SCHEMAS)
@pytest.mark.parametrize(("method", "example"), CASES)
def test_the_schema_accepts_every_file(method, example, version):
    VALIDATORS[version].validate(manifest_of(made(method, example), version))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to every value in `value`."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def changed(manifest: dict[str, Any], path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> dict[str, Any]:
    """A copy in which `change(container, key)` was applied at `path`."""
    result = copy.deepcopy(manifest)
    inner = result
    for key in path[:-1]:
        inner = inner[key]
    change(inner, path[-1])
    return result


OPTIONAL = {("base", "content"), ("provenance", "source"), ("provenance", "base_model"), ("provenance", "revision")}
OPTIONAL |= {("provenance", "task_type"), ("provenance", "fields")}
OPEN = {("method", "config"), ("provenance", "fields"), ("digests", "tensors")}  # objects whose fields vary


def mutants(manifest: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Manifests that no file may have: a field lost, a field too many, a value of another type or out of bounds."""
    for path in places(manifest):
        if not path:
            continue
        here = manifest
        for key in path:
            here = here[key]
        for bad in (None, 0.5, {"a": {}}):
            yield f"{path} = {bad}", changed(manifest, path, lambda at, key, bad=bad: at.__setitem__(key, bad))
        if isinstance(here, dict) and path not in OPEN:
            yield f"{path} + zz", changed(manifest, path, lambda at, key: at[key].__setitem__("zz", "1"))
        named = isinstance(path[-1], str) and path[:-1] not in OPEN
        if named and path not in OPTIONAL and path[-1] != "view":
            yield f"{path} lost", changed(manifest, path, lambda at, key: at.__delitem__(key))
    for path, bad in {
        ("format",): "LRCONVERT",
        ("version",): 2,
        ("requires",): ["x"],
        ("targets",): [],
        ("targets", 0): {"name": "x", "shape": []},
        ("targets", -1): {"name": "x", "shape": [2, 2], "view": "matrix"},
        ("targets", 1): {"name": "x", "shape": [2, 2], "view": "rows:2:01"},
        ("targets", 2): {"name": "x", "shape": [1 << 31, 2]},
        ("targets", 3): {"name": "x", "shape": [2, True]},
        ("base", "names"): "AB" * 32,
        ("base", "content"): "",
        ("digests", "content"): "0" * 63,
        ("digests", "tensors"): {},
        ("method", "id"): "../x",
        ("method", "version"): 0,
        ("method", "exponents"): "0",
        ("method", "config"): {"Größe": 1},
        ("provenance", "fields"): {},
        ("provenance", "source"): "",
        ("provenance", "revision"): "a\nb",
    }.items():
        result = copy.deepcopy(manifest)
        if path[0] not in result:  # version 2 has fewer fields
            continue
        inner: Any = result
        for key in path[:-1]:
            inner = inner[key]
        if isinstance(inner, list):
            inner[:] = [bad]
        else:
            inner[path[-1]] = bad
        yield f"{path} = {bad}", result


@pytest.mark.medium
@pytest.mark.parametrize("version", SCHEMAS)
@pytest.mark.parametrize("method", methods.module_names())
def test_the_schema_rejects_mutants(method, version, tmp_path):
    """... and is never stricter than the reader: what it rejects, the reader refuses too."""
    from test_file import resign

    data = encoded(made(method, 0), version)
    path = tmp_path / "x.lrc"
    for what, mutant in mutants(manifest_of(made(method, 0), version)):
        assert not VALIDATORS[version].is_valid(mutant), what
        try:
            path.write_bytes(resign(data, lambda _, mutant=mutant: mutant))
        except errors.LrcError:
            continue  # has no canonical spelling
        assert not validation.validate(path).ok, what


# --- the pages ------------------------------------------------------------------------------------------------------


def error_table() -> str:
    rows = ["| Code | Exception | Meaning |", "|---|---|---|"]
    for error in errors.all_errors():
        meaning = " ".join((error.__doc__ or "").replace("``", "`").split())
        rows.append(f"| `{error.code}` | `{error.__name__}` | {meaning} |")
    return "\n".join(rows) + "\n"


def test_the_table_of_errors_is_the_module():
    assert generated(FORMATS / "errors.md") == error_table(), "run: python tests/formats/test_formats.py"
    codes = [error.code for error in errors.all_errors()]
    assert len(set(codes)) == len(codes) and all(re.fullmatch(r"E(-[A-Z]+)+", code) for code in codes)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(FORMATS)))
def test_every_code_on_a_page_exists(page):
    known = {error.code for error in errors.all_errors()} | {errors.LrcError.code}
    assert set(re.findall(r"\bE(?:-[A-Z]+)+\b", page.read_text())) <= known


@pytest.mark.parametrize("method", methods.module_names())
def test_every_method_has_a_page_that_names_what_it_writes(method):
    form, page = methods.get(method), (FORMATS / "methods" / f"{method}.md").read_text()
    assert f"`{method}`" in page and f"version {form.version}" in page.lower()
    for number in range(len(form.examples)):
        compact = made(method, number)
        header = form.header(compact.config)
        specs = [*form.layout_specs(header, compact.targets), *form.specs(compact.config, compact.targets)]
        assert {name for name in [*header, *(s.name for s in specs)] if f"`{name}`" not in page} == set()


def test_the_limits_on_the_page_are_the_codes():
    own, page = limits.OWN, SPECS[1].read_text()
    stated = {
        own.header_bytes, own.json_depth, own.string_bytes, own.tensors, own.name_bytes, own.ndim, own.file_bytes,
        limits.MAX_DIM, limits.MAX_EXPAND_BYTES, limits.MAX_INT, manifest_module.MANIFEST_BYTES,
        *packing.EXPONENT_RANGE,
    }  # fmt: skip
    section = page.split("## 11.")[1].split("## 12.")[0]
    assert stated <= {
        int(n.replace(",", "").replace("\N{MINUS SIGN}", "-"))
        for n in re.findall("[-\N{MINUS SIGN}]?[0-9][0-9,]*", section)
    }


def test_tests_named_on_the_threats_page_exist():
    page = (FORMATS / "threats.md").read_text()
    named = re.findall(r"`(test_\w+)::(test_\w+)(?:\[([^\]]+)\])?`", page)
    assert len(named) > 30
    for module, function, case in named:
        own = (p for p in (ROOT / "tests").rglob(f"{module}.py") if ".envs" not in p.parts)
        text = next(own).read_text()
        assert f"def {function}(" in text, f"{module}::{function}"
        assert not case or f'"{case}"' in text, f"{module}::{function}[{case}]"
    assert re.findall(r"^\| (H\d\d) ", page, re.MULTILINE) == [f"H{n:02}" for n in range(1, 38)]


def test_links_between_pages_lead_somewhere():
    for page in [*PAGES, *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert "://" in link or (page.parent / link).exists(), f"{page.name}: {link}"


def write_generated() -> None:
    pages = ((page, example_text(version)) for version, page in SPECS.items())
    for page, text in (*pages, (FORMATS / "errors.md", error_table())):
        before, rest = page.read_text().split(BEGIN)
        page.write_text(before + BEGIN + text + END + rest.split(END)[1])


if __name__ == "__main__":
    write_generated()
