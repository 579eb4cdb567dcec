"""The pages in formats/: the schema fits the files, the tables equal the code, and a second reader, written from the
pages alone, decodes the same factors. The worked example and the table of errors are generated:

    python tests/test_formats.py        writes both anew
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from conftest import ADAPTERS, FIXTURES, ROOT, random_lora
from hypothesis import given, settings
from hypothesis import strategies as st

from lrconvert import canonical, errors, file, limits, packing, validation
from lrconvert import manifest as manifest_module
from lrconvert.adapter import TRANSPOSED, CompactAdapter, ExtraTensor, LoraAdapter, Provenance, Target, View
from lrconvert.fingerprint import fingerprint
from lrconvert.methods import base as methods
from lrconvert.methods import lowrank
from lrconvert.readers.base import load

FORMATS = ROOT / "formats"
PAGES = sorted(FORMATS.rglob("*.md"))
SPEC = FORMATS / "lrconvert-v1.md"
SCHEMA = json.loads((FORMATS / "manifest-v1.schema.json").read_text())
CASES = [(m.id, n) for m in methods.all_methods() for n in range(len(m.examples))]


# --- the second reader: written from formats/, shares no code with lrconvert ----------------------------------------


def open_file(data: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Manifest and tensors of a file, its framing, digests and spelling checked (sections 2, 3, 4, 10)."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    text = header.pop("__metadata__")["lrconvert"]
    manifest = json.loads(text)
    assert text == json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    wide = {"F16": 2, "U8": 1}
    names = sorted(header, key=lambda name: (-wide[header[name]["dtype"]], name.encode()))
    tensors, entries, at = {}, {}, 0
    for name in names:
        dtype, (numel,) = header[name]["dtype"], header[name]["shape"]
        entries[name] = {"dtype": dtype, "shape": [numel], "data_offsets": [at, at + wide[dtype] * numel]}
        tensors[name] = data[8 + length + at :][: wide[dtype] * numel]
        at += wide[dtype] * numel
        parts = (name.encode(), dtype.encode(), struct.pack("<Q", numel))
        digest = b"".join(struct.pack("<Q", len(part)) + part for part in parts) + tensors[name]
        assert hashlib.sha256(digest).hexdigest() == manifest["digests"]["tensors"][name]
    spelled = json.dumps({"__metadata__": {"lrconvert": text}, **entries}, separators=(",", ":"), ensure_ascii=False)
    assert data[8 : 8 + length] == spelled.encode() + b" " * (-len(spelled.encode()) % 8)
    assert len(data) == 8 + length + at and set(manifest["digests"]["tensors"]) == set(names)
    listed = b"".join(n.encode() + b"\0" + bytes.fromhex(d) for n, d in sorted(manifest["digests"]["tensors"].items()))
    emptied = json.dumps({**manifest, "digests": {}}, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert hashlib.sha256(listed + emptied.encode()).hexdigest() == manifest["digests"]["content"]
    return manifest, tensors


def list_targets(manifest: Mapping[str, Any]) -> list[tuple[str, list[int], str]]:
    """(name, shape, view) in target order (section 6)."""
    found = []
    for entry in manifest["targets"]:
        if "name" in entry:
            found.append((entry["name"], entry["shape"], entry.get("view", "matrix")))
            continue
        for first, last in zip(entry["ranges"][::2], entry["ranges"][1::2], strict=True):
            for number in range(first, last + 1):
                for member in entry["members"]:
                    name = f"{entry['prefix']}{number}{member['suffix']}"
                    found.append((name, member["shape"], member.get("view", "matrix")))
    return sorted(found, key=lambda t: (t[0].encode(), t[1], t[2]))


def out_in(shape: Sequence[int], view: str) -> tuple[int, int]:
    kind, *numbers = view.split(":")
    if kind == "transposed":
        return shape[1], shape[0]
    if kind == "rows":
        return int(numbers[1]) - int(numbers[0]), shape[1]
    if kind == "expert":
        return shape[1], shape[2]
    return shape[0], int(np.prod(shape[1:]))


def unpack(data: bytes, width: int, count: int) -> list[int]:
    """`count` integers of `width` bits (section 9.1)."""
    bits = int.from_bytes(data, "little")
    assert bits >> (count * width) == 0
    return [(bits >> (width * n)) & ((1 << width) - 1) for n in range(count)]


def decode_code(data: bytes, width: int, count: int) -> np.ndarray:
    return np.array([2 * c + 1 - 2**width for c in unpack(data, width, count)], np.float32)


def decode_index(data: bytes, limit: int, count: int) -> list[int]:
    width = 1
    while 2**width < limit:
        width += 1
    values = unpack(data, width, count)
    assert all(value < limit for value in values)
    return values


def decode_half(data: bytes, exponent: int) -> np.ndarray:
    return (np.frombuffer(data, "<f2").astype(np.float64) * 2.0**exponent).astype(np.float32)


def exponents_of(manifest: Mapping[str, Any]) -> Iterator[int]:
    return iter(
        struct.unpack(f"{len(manifest['method']['exponents']) // 2}b", bytes.fromhex(manifest["method"]["exponents"]))
    )


Factors = list[tuple[np.ndarray, np.ndarray]]


def expand_lowrank(manifest: Mapping[str, Any], tensors: Mapping[str, bytes]) -> Factors:
    """formats/methods/lowrank.md"""
    config, exponents = manifest["method"]["config"], exponents_of(manifest)
    shapes = [out_in(shape, view) for _, shape, view in list_targets(manifest)]
    levels, group = config["levels"], config["group_size"]
    flat = decode_index(tensors["counts"], config["max_count"] + 1, len(shapes) * len(levels))
    counts = [flat[n * len(levels) :][: len(levels)] for n in range(len(shapes))]
    numbers: dict[int, Iterator[float]] = {}
    for level, q in enumerate(levels):
        if q == 16:
            numbers[q] = iter(decode_half(tensors["half"], next(exponents)))
        else:
            total = sum(row[level] * sum(shape) for row, shape in zip(counts, shapes, strict=True))
            numbers[q] = iter(decode_code(tensors[f"codes.{q}"], q, total))
    scales = iter(decode_half(tensors["scales"], next(exponents)) if "scales" in tensors else ())

    def take(q: int, length: int) -> list[float]:
        return [next(numbers[q]) for _ in range(length)]

    def scaled(row: list[float], q: int) -> list[np.float32]:
        if q == 16:
            return [np.float32(value) for value in row]
        size = group or len(row)
        own = [next(scales) for _ in range(0, len(row), size)]
        return [np.float32(value) * own[n // size] for n, value in enumerate(row)]

    factors = []
    for (out, inner), row in zip(shapes, counts, strict=True):
        a, b = np.zeros((sum(row), inner), np.float32), np.zeros((out, sum(row)), np.float32)
        component = 0
        for q, count in zip(levels, row, strict=True):
            for _ in range(count):
                left, right = take(q, inner), take(q, out)
                a[component], b[:, component] = scaled(left, q), scaled(right, q)
                component += 1
        factors.append((a, b))
    assert next(scales, None) is None and all(next(rest, None) is None for rest in numbers.values())
    return factors


def numbers_of(data: bytes, bits: int, count: int) -> np.ndarray:
    """`count` unsigned integers of `bits` bits, least significant bit first."""
    whole = int.from_bytes(data, "little")
    assert len(data) == -(-count * bits // 8)
    return np.array([(whole >> (bits * n)) & ((1 << bits) - 1) for n in range(count)], np.int64)


def expand_vblora(manifest: Mapping[str, Any], tensors: Mapping[str, bytes]) -> Factors:
    """formats/methods/vblora.md, one row at a time."""
    config = manifest["method"]["config"]
    h, b, k = config["num_vectors"], config["vector_length"], config["top_k"]
    exponents = [n - 256 if n > 127 else n for n in bytes.fromhex(manifest["method"]["exponents"])]

    def halves(name: str) -> np.ndarray:
        return np.frombuffer(tensors[name], "<f2").astype(np.float64) * 2.0 ** exponents.pop(0)

    shapes = [out_in(shape, view) for _, shape, view in list_targets(manifest)]
    ranks = [config["rank"]] * len(shapes)
    if not config["uniform"]:
        ranks = numbers_of(tensors["ranks"], max(1, config["rank"].bit_length()), len(shapes)).tolist()
    passes = [1] * config["rows"]
    if config["passes"] > 1:
        width = max(1, (config["passes"] - 1).bit_length())
        passes = (numbers_of(tensors["passes"], width, config["rows"]) + 1).tolist()
    if config["bits"] == 16:
        bank = halves("bank").reshape(h, b)
    else:
        codes = numbers_of(tensors["bank"], config["bits"], h * b).reshape(h, b)
        bank = (2.0 * codes + 1 - 2 ** config["bits"]) * halves("scales")[:, None]
    sizes = [n for (out, inner), rank in zip(shapes, ranks, strict=True) for n in [inner] * rank + [out] * rank]
    total = sum(p * -(-n // b) for n, p in zip(sizes, passes, strict=True))
    indices = numbers_of(tensors["indices"], max(1, (h - 1).bit_length()), total * k).reshape(total, k)
    weights = np.zeros((total, 0))
    if k > 1:
        m = config["weight_bits"]
        weights = numbers_of(tensors["weights"], m, total * (k - 1)).reshape(total, k - 1) / 2.0 ** (m + 1)
    gains = iter(halves("gains").tolist()) if config["gains"] else None
    code, rows = 0, []
    for n, turns in zip(sizes, passes, strict=True):
        row = None
        for _ in range(turns):
            pieces = []
            for _ in range(-(-n // b)):
                first = 1.0
                for weight in weights[code]:
                    first = first - weight
                piece = bank[indices[code, 0]] * first
                for s in range(1, k):
                    piece = piece + bank[indices[code, s]] * weights[code, s - 1]
                pieces.append(piece)
                code += 1
            value = np.concatenate(pieces)[:n]
            value = value if gains is None else value * next(gains)
            row = value if row is None else row + value
        rows.append(row.astype(np.float32))
    assert code == total and not exponents and (gains is None or next(gains, None) is None)
    factors, at = [], 0
    for (out, inner), rank in zip(shapes, ranks, strict=True):
        a = np.array(rows[at : at + rank], np.float32).reshape(rank, inner)
        right = np.array(rows[at + rank : at + 2 * rank], np.float32).reshape(rank, out)
        factors.append((a, right.T))
        at += 2 * rank
    return factors


SECOND: dict[str, Callable[[Mapping[str, Any], Mapping[str, bytes]], Factors]] = {
    "lowrank": expand_lowrank,
    "vblora": expand_vblora,
}


def check_second_reader(data: bytes, compact: CompactAdapter) -> None:
    """The second reader finds in `data` what `compact` has: targets, factors, extras, base names."""
    manifest, tensors = open_file(data)
    targets = list_targets(manifest)
    assert targets == [(t.name, list(t.shape), t.view.text) for t in compact.targets]
    factors = SECOND[compact.method](manifest, tensors)
    for (target, a, b), (name, shape, view), (a2, b2) in zip(
        methods.expand_all(compact), targets, factors, strict=True
    ):
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
    assert digest.hexdigest() == manifest["base"]["names"]


# --- files to check -------------------------------------------------------------------------------------------------

EXTRAS = (ExtraTensor("score.bias", "F32", (2,), bytes(range(8))), ExtraTensor("t", "BF16", (), b"\1\2"))


def fitted(method: methods.Method, lora: LoraAdapter, options: Mapping[str, Any]) -> CompactAdapter:
    """`lora` in the form `method` by its own plan and fit."""
    context = methods.FitContext()
    wanted = dict(options)
    size, ratio = wanted.pop("target_size", None), wanted.pop("target_ratio", None)
    targets = lora.shapes()
    compact = CompactAdapter(method.id, None, targets, {}, lora.extras, lora.provenance, fingerprint(targets))
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


def encoded(compact: CompactAdapter) -> bytes:
    return b"".join(file.encode(compact))


@pytest.mark.parametrize(("method", "example"), CASES)
def test_two_readers_agree(method, example):
    compact = made(method, example)
    check_second_reader(encoded(compact), compact)


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
    check_second_reader(encoded(compact), compact)


SHAPES = {
    "matrix": (3, 4),
    "transposed": (4, 3),
    "conv:2:1": (3, 2, 2),
    "conv:1x2:1": (3, 2, 1, 2),
    "rows:1:4": (5, 4),
    "rows:2:5": (5, 4),
    "expert:0": (2, 3, 4),
    "expert:1": (2, 3, 4),
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
    config = lowrank.Config((1,), ((1,),) * len(targets))
    tensors = {
        spec.name: np.array(
            [random.randrange(2) for _ in range(spec.numel)], np.uint8 if spec.kind == "code" else np.float32
        )
        for spec in methods.get("lowrank").specs(config, targets)
    }
    compact = CompactAdapter("lowrank", config, targets, tensors, base=fingerprint(targets))
    check_second_reader(encoded(compact), compact)


# --- the worked example ---------------------------------------------------------------------------------------------

BEGIN, END = "<!-- generated: begin -->\n", "<!-- generated: end -->"


def example() -> CompactAdapter:
    """Small enough to follow by hand, with every part that a file can have."""
    targets = (
        Target("h.0.attn.weight", (4, 3), TRANSPOSED),
        Target("h.1.attn.weight", (4, 3), TRANSPOSED),
        Target("head.weight", (2, 5)),
    )
    config = lowrank.Config((16, 2), ((1, 2), (0, 1), (1, 0)), group_size=3)
    tensors = {
        "half": np.array([1, -2, 0.5, 0, 0.25, -1, 3, 0.125, 1.5, -0.75, 2, 0, 1, -0.5], np.float32),
        "codes.2": np.array([0, 1, 2, 3, 3, 2, 1, 3, 0, 3, 0, 1, 1, 2, 2, 2, 1, 0, 0, 3, 3], np.uint8),
        "scales": np.array([0.5, 0.25, 1, 0.125, 0.75, 1.5, 0.0625, 0.1875, 1.25], np.float32),
    }
    extra = ExtraTensor("score.bias", "F32", (2,), np.array([0.5, -1], "<f4").tobytes())
    came = Provenance(base_model="org/base", task_type="SEQ_CLS", fields={"source_format": "peft"})
    return CompactAdapter("lowrank", config, targets, tensors, (extra,), came, fingerprint(targets))


def example_text() -> str:
    """The generated part of the worked example."""
    compact = example()
    data = encoded(compact)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    manifest = json.loads(header["__metadata__"].pop("lrconvert"))
    rows = []
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            raw = data[8 + length + begin : 8 + length + end].hex(" ")
            rows.append(f"| `{name}` | {entry['dtype']} | {begin}-{end} | `{raw}` |")
    factors = {t.name: {"A": a.tolist(), "B": b.tolist()} for t, a, b in methods.expand_all(compact)}
    lines = "\n".join(
        f"{json.dumps(name)}: {json.dumps(f)}" + "," * (name != "head.weight") for name, f in factors.items()
    )
    return (
        f"The whole file, {len(data)} bytes, in base64:\n\n```base64\n{_wrap(base64.b64encode(data).decode())}\n```\n\n"
        f"It begins with the header length {length} (`{data[:8].hex(' ')}`). The manifest, here with white space:\n\n"
        f"```json\n{_pretty(manifest)}\n```\n\n"
        "The tensors, at their offsets after the header:\n\n| name | dtype | bytes | data |\n|---|---|---|---|\n"
        + "\n".join(rows)
        + f"\n\nThe factors that a reader MUST obtain:\n\n```json\n{{\n{lines}\n}}\n```\n"
    )


def _wrap(text: str, width: int = 100) -> str:
    return "\n".join(text[n : n + width] for n in range(0, len(text), width))


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


def test_the_worked_example_is_what_the_code_writes():
    assert generated(SPEC) == example_text(), "run: python tests/test_formats.py"


def test_the_worked_example_decodes_from_the_page_alone(tmp_path):
    page = SPEC.read_text()
    data = base64.b64decode(re.search(r"```base64\n(.*?)```", page, re.DOTALL)[1])
    shown, factors = (json.loads(block) for block in re.findall(r"```json\n(.*?)```", generated(SPEC), re.DOTALL))
    manifest, tensors = open_file(data)
    assert manifest == shown
    for (name, shape, view), (a, b) in zip(list_targets(manifest), expand_lowrank(manifest, tensors), strict=True):
        assert factors[name] == {"A": a.tolist(), "B": b.tolist()}
        assert (b.shape[0], a.shape[1]) == out_in(shape, view)
    (tmp_path / "example.lrc").write_bytes(data)
    check_second_reader(data, file.read(tmp_path / "example.lrc"))


# --- rules of the payload -------------------------------------------------------------------------------------------


def damaged(name: str, change: Callable[[bytearray], None], exponents: str = "") -> bytes:
    """The worked example with other bytes in a tensor, or other exponents, all digests made right."""
    manifest, tensors = open_file(encoded(example()))
    data = bytearray(tensors[name])
    change(data)
    tensors[name] = bytes(data)
    manifest["method"]["exponents"] = exponents or manifest["method"]["exponents"]
    order = sorted(tensors, key=lambda n: (n not in ("half", "scales"), n))
    entries, at = {}, 0
    for n in order:
        dtype, size = ("F16", 2) if n in ("half", "scales") else ("U8", 1)
        numel = len(tensors[n]) // size
        entries[n] = {"dtype": dtype, "shape": [numel], "data_offsets": [at, at + len(tensors[n])]}
        at += len(tensors[n])
        digest = b"".join(
            struct.pack("<Q", len(part)) + part for part in (n.encode(), dtype.encode(), struct.pack("<Q", numel))
        )
        manifest["digests"]["tensors"][n] = hashlib.sha256(digest + tensors[n]).hexdigest()
    listed = b"".join(n.encode() + b"\0" + bytes.fromhex(d) for n, d in sorted(manifest["digests"]["tensors"].items()))

    def spell(value: Any) -> str:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    content = hashlib.sha256(listed + spell({**manifest, "digests": {}}).encode())
    manifest["digests"]["content"] = content.hexdigest()
    header = {"__metadata__": {"lrconvert": spell(manifest)}, **entries}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(tensors[n] for n in order)


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


def test_the_undamaged_example_is_sound():
    assert damaged("half", lambda data: None) == encoded(example())


@pytest.mark.parametrize("case", PAYLOADS)
def test_payload_rules(case, tmp_path):
    name, change, exponents, code = PAYLOADS[case]
    path = tmp_path / "x.lrc"
    path.write_bytes(damaged(name, change, exponents))
    assert {finding.code for finding in validation.validate(path).findings} == {code}


def test_messages_do_not_move_the_cursor():
    for hostile in ("a\x1b[2Jb", "a\u202eb", "a\rb"):
        shown = str(errors.BaseError(f"no {hostile}", fix=f"try {hostile}", path=hostile))
        assert shown.isprintable() and "a\\" in shown


# --- the schema -----------------------------------------------------------------------------------------------------

VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def manifest_of(compact: CompactAdapter) -> dict[str, Any]:
    return open_file(encoded(compact))[0]


def test_the_schema_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize(("method", "example"), CASES)
def test_the_schema_accepts_every_file(method, example):
    VALIDATOR.validate(manifest_of(made(method, example)))


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
        inner: Any = result
        for key in path[:-1]:
            inner = inner[key]
        if isinstance(inner, list):
            inner[:] = [bad]
        else:
            inner[path[-1]] = bad
        yield f"{path} = {bad}", result


@pytest.mark.parametrize("method", methods.module_names())
def test_the_schema_rejects_mutants(method, tmp_path):
    """... and is never stricter than the reader: what it rejects, the reader refuses too."""
    from test_file import resign

    data = encoded(made(method, 0))
    path = tmp_path / "x.lrc"
    for what, mutant in mutants(manifest_of(made(method, 0))):
        assert not VALIDATOR.is_valid(mutant), what
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
    assert generated(FORMATS / "errors.md") == error_table(), "run: python tests/test_formats.py"
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
    own, page = limits.OWN, SPEC.read_text()
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
        text = (ROOT / "tests" / f"{module}.py").read_text()
        assert f"def {function}(" in text, f"{module}::{function}"
        assert not case or f'"{case}"' in text, f"{module}::{function}[{case}]"
    assert re.findall(r"^\| (H\d\d) ", page, re.MULTILINE) == [f"H{n:02}" for n in range(1, 37)]


def test_the_method_in_contributing_works(tmp_path, monkeypatch):
    """The sketch is a whole method: it makes files that are read, checked and expanded."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    room: dict[str, Any] = {"__name__": "rankone"}
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], room)
    method = room["METHOD"]
    monkeypatch.setattr(methods, "get", lambda method_id: method)
    compact = fitted(method, source(0), {})
    (tmp_path / "x.lrc").write_bytes(encoded(compact))
    assert validation.validate(tmp_path / "x.lrc").ok
    for pair, (_, a, b) in zip(source(0).targets, methods.expand_all(file.read(tmp_path / "x.lrc")), strict=True):
        assert np.isclose(np.linalg.norm(b @ a, 2), canonical.singular_values(pair)[0], rtol=1e-3)
    with pytest.raises(errors.BudgetError, match="smallest possible file has"):
        fitted(method, source(0), {"target_size": 100})


def test_links_between_pages_lead_somewhere():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert "://" in link or (page.parent / link).exists(), f"{page.name}: {link}"


def write_generated() -> None:
    for page, text in ((SPEC, example_text()), (FORMATS / "errors.md", error_table())):
        before, rest = page.read_text().split(BEGIN)
        page.write_text(before + BEGIN + text + END + rest.split(END)[1])


if __name__ == "__main__":
    write_generated()
