"""The lrconvert file: one safetensors file whose only metadata is a canonical JSON manifest.

Normative text: ``formats/lrconvert-v1.md``. The same content always gives the same bytes, and a reader accepts no other
spelling. `examine` is the one reading path: `read` stops at its first finding, `validate` collects them all.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from lrconvert import packing, strictjson
from lrconvert.adapter import BaseFingerprint, CompactAdapter, ExtraTensor, Provenance, Target, View
from lrconvert.container import ContainerFile, TensorInfo, encode_header, parse_header, tensor_digest
from lrconvert.dtypes import STORAGE, Array, itemsize
from lrconvert.durable import atomic_file
from lrconvert.errors import (
    CanonicalError,
    DigestError,
    DtypeError,
    IndexRangeError,
    JsonSyntaxError,
    LimitError,
    LrcError,
    MissingFieldError,
    ShapeError,
    TensorNameError,
    UnknownFieldError,
    VersionError,
)
from lrconvert.fingerprint import names_digest
from lrconvert.limits import MAX_DIM, MAX_EXPAND_BYTES, MAX_INT, OWN
from lrconvert.methods import base as methods
from lrconvert.methods.base import Method
from lrconvert.packing import TensorSpec

FORMAT = "lrconvert"
VERSION = 1
METADATA_KEY = "lrconvert"
MANIFEST_BYTES = 1 << 20
EXTRA_PREFIX = "extra."
Report = Callable[[str, LrcError], None]  # (level, finding); levels: structure, semantics, values, base

# In-memory upgrades of older manifests: UPGRADES[n] turns a version n manifest into version n + 1.
UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}

_INTEGER_SEGMENT = re.compile(r"(?:(?<=\.)|^)(0|[1-9][0-9]{0,8})(?=\.|$)")
_HEX64 = re.compile(r"[0-9a-f]{64}")
_FIELD = re.compile(r"[a-z][a-z0-9_]{0,62}")


# --- sizes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """Bytes of a file: `total` on disk = `adapter` + `extras`; `adapter` = `payload` + `overhead`.

    `payload` is the method's tensors; `overhead` header, manifest and padding without the extras' share; `extras`
    everything that carrying extra tensors adds.
    """

    total: int
    payload: int
    extras: int

    @property
    def adapter(self) -> int:
        return self.total - self.extras

    @property
    def overhead(self) -> int:
        return self.adapter - self.payload


def sizes(compact: CompactAdapter) -> Sizes:
    """The exact sizes of the file that `compact` will be written to. Its tensors need not be there yet."""
    specs = _all_specs(compact)
    payload = sum(s.nbytes for s in specs)
    without = len(_blank_header(replace(compact, extras=()), specs)) + payload
    total = len(_blank_header(compact, specs)) + payload + sum(len(e.data) for e in compact.extras)
    return Sizes(total, payload, total - without)


def _blank_header(compact: CompactAdapter, specs: Sequence[TensorSpec]) -> bytes:
    """The header as long as it will be, with zeros for digests and exponents."""
    blank = {name: "0" * 64 for name, _, _ in _entries(specs, compact.extras)}
    return _header(compact, specs, _Digests("0" * 64, blank), "00" * sum(s.kind == "half" for s in specs))


def _header(compact: CompactAdapter, specs: Sequence[TensorSpec], digests: _Digests, exponents: str) -> bytes:
    text = _manifest_text(compact, digests, exponents)
    if len(text.encode()) > MANIFEST_BYTES:
        raise LimitError(f"the manifest has {len(text.encode())} bytes; at most {MANIFEST_BYTES} are allowed")
    return encode_header(_entries(specs, compact.extras), {METADATA_KEY: text})


# --- manifest out ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Digests:
    content: str
    tensors: Mapping[str, str]


def _all_specs(compact: CompactAdapter) -> list[TensorSpec]:
    """Layout and payload tensors of a compact adapter, in the order of their declaration."""
    method = methods.get(compact.method)
    header = method.header(compact.config)
    return [*method.layout_specs(header, compact.targets), *method.specs(compact.config, compact.targets)]


def _entries(specs: Sequence[TensorSpec], extras: Sequence[ExtraTensor]) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of every stored tensor in file order: wider dtypes first, then by name."""
    entries: list[tuple[str, str, tuple[int, ...]]] = [(s.name, s.dtype, s.stored_shape) for s in specs]
    entries += [(f"{EXTRA_PREFIX}{i}", "U8", (len(extra.data),)) for i, extra in enumerate(extras)]
    return sorted(entries, key=lambda entry: (-itemsize(entry[1]), entry[0]))


def group_targets(targets: Sequence[Target]) -> list[dict[str, Any]]:
    """The manifest's target list. Names are cut at their first integer segment into prefix, number, suffix; targets
    with one prefix and one set of numbers share an entry, whose members differ in suffix, shape and view.

    A function of the set of targets alone: entries and members sorted, ranges ascending, maximal and inclusive.
    """
    numbers: dict[tuple[str, str, tuple[int, ...], str], list[int]] = {}
    entries: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    for target in targets:
        found = _INTEGER_SEGMENT.search(target.name)
        if found:
            key = (target.name[: found.start()], target.name[found.end() :], target.shape, target.view.text)
            numbers.setdefault(key, []).append(int(found[0]))
        else:
            entry = {"name": target.name, **_shape_and_view(target.shape, target.view.text)}
            entries.append(((target.name, (), target.shape, target.view.text), entry))
    groups: dict[tuple[str, tuple[int, ...]], list[dict[str, Any]]] = {}
    for (prefix, suffix, shape, view), found_numbers in sorted(numbers.items()):
        member = {"suffix": suffix, **_shape_and_view(shape, view)}
        groups.setdefault((prefix, tuple(_ranges(found_numbers))), []).append(member)
    for (prefix, ranges), members in groups.items():
        entries.append(((prefix, ranges), {"prefix": prefix, "ranges": list(ranges), "members": members}))
    return [entry for _, entry in sorted(entries, key=lambda e: e[0])]


def _shape_and_view(shape: tuple[int, ...], view: str) -> dict[str, Any]:
    return {"shape": list(shape)} if view == "matrix" else {"shape": list(shape), "view": view}


def _ranges(numbers: Sequence[int]) -> list[int]:
    """First and last of each maximal run of the sorted numbers: [0, 3, 7, 7]."""
    ranges: list[int] = []
    for n in sorted(numbers):
        if ranges and ranges[-1] == n - 1:
            ranges[-1] = n
        else:
            ranges += [n, n]
    return ranges


def _manifest(compact: CompactAdapter, digests: _Digests | None, exponents: str) -> dict[str, Any]:
    method = methods.get(compact.method)
    base = {"names": compact.base.names}
    if compact.base.content:
        base["content"] = compact.base.content
    came = compact.provenance
    named = {
        "source": came.source,
        "base_model": came.base_model,
        "revision": came.revision,
        "task_type": came.task_type,
    }
    provenance: dict[str, Any] = {key: value for key, value in named.items() if value}
    if came.fields:
        provenance["fields"] = dict(came.fields)
    return {
        "format": FORMAT,
        "version": VERSION,
        "requires": [],
        "method": {
            "id": method.id,
            "version": method.version,
            "config": method.header(compact.config),
            "exponents": exponents,
        },
        "targets": group_targets(compact.targets),
        "extras": [{"name": e.name, "dtype": e.dtype, "shape": list(e.shape)} for e in compact.extras],
        "base": base,
        "provenance": provenance,
        "digests": {} if digests is None else {"content": digests.content, "tensors": dict(digests.tensors)},
    }


def _manifest_text(compact: CompactAdapter, digests: _Digests, exponents: str) -> str:
    return strictjson.dump_canonical(_manifest(compact, digests, exponents)).decode("utf-8")


def content_digest(tensors: Mapping[str, str], manifest: Mapping[str, Any]) -> str:
    """sha256 over the sorted tensor digests and the canonical manifest with empty ``digests``: the file's true name."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode() + b"\0" + bytes.fromhex(value))
    digest.update(strictjson.dump_canonical({**manifest, "digests": {}}))
    return digest.hexdigest()


# --- writing --------------------------------------------------------------------------------------------------------


def encode(compact: CompactAdapter) -> Iterator[bytes]:
    """The bytes of the file, in pieces. The same content gives the same bytes on every machine.

    Whatever `read` would refuse is refused here, with the same codes, before the first piece.
    """
    check(compact)
    method = methods.get(compact.method)
    specs = _all_specs(compact)
    arrays = {**method.layout(compact.config), **compact.tensors}
    unknown = set(arrays) - {s.name for s in specs}
    if unknown:
        raise UnknownFieldError(f"the method {method.id} does not declare the tensors {', '.join(sorted(unknown))}")
    absent = [s.name for s in specs if s.name not in arrays]
    if absent:
        raise MissingFieldError(f"the adapter lacks the tensor {absent[0]!r}", fix="fit it first; a dry run does not")
    data: dict[str, bytes] = {f"{EXTRA_PREFIX}{i}": extra.data for i, extra in enumerate(compact.extras)}
    exponents = ""
    for spec in specs:
        stored, exponent = packing.encode(spec, arrays[spec.name])
        data[spec.name] = stored.tobytes()
        if spec.kind == "half":
            exponents += (exponent & 0xFF).to_bytes(1, "little").hex()
    method.check(compact.config, compact.targets, compact.tensors)
    entries = _entries(specs, compact.extras)
    digests = {name: tensor_digest(name, dtype, shape, [data[name]]) for name, dtype, shape in entries}
    content = content_digest(digests, _manifest(compact, None, exponents))
    yield _header(compact, specs, _Digests(content, digests), exponents)
    for name, _, _ in entries:
        yield data[name]


def check(compact: CompactAdapter) -> None:
    """Refuse what a reader would refuse of the file of `compact`, all but the contents of its payload tensors, which
    need not be there yet. The reader's own functions decide, and what they find must be what was given."""
    text = strictjson.dump_canonical(_manifest(compact, None, ""))
    manifest = strictjson.parse_canonical(text, depth=OWN.json_depth)
    parsed = {key: parse(manifest[key]) for key, parse in _SECTIONS.items()}
    if parsed["targets"] != tuple(compact.targets):
        raise CanonicalError("the targets are not sorted")
    _check_names_digest(parsed["base"], parsed["targets"])
    for declared, extra in zip(parsed["extras"], compact.extras, strict=True):
        _check_extra_bytes(declared, len(extra.data))
    _check_config(compact, manifest["method"]["config"])
    specs = _all_specs(compact)
    header = _blank_header(compact, specs)
    data_bytes = sum(s.nbytes for s in specs) + sum(len(e.data) for e in compact.extras)
    if len(header) + data_bytes > OWN.file_bytes:
        raise LimitError(f"the file would have {len(header) + data_bytes} bytes; at most {OWN.file_bytes} are allowed")
    parse_header(header[8:], data_bytes, OWN, Path())


def _check_config(compact: CompactAdapter, header: dict[str, Any]) -> None:
    """The configuration must be the one that its header and layout tensors lead back to."""
    method = methods.get(compact.method)
    stored = method.layout(compact.config)
    layout = {}
    for spec in method.layout_specs(header, compact.targets):
        layout[spec.name] = packing.decode(spec, *packing.encode(spec, stored[spec.name]))
    if method.config(header, layout, compact.targets) != compact.config:
        raise CanonicalError(f"the configuration of {method.id} is not the one that its file would give back")
    _checked_specs(method, compact.config, compact.targets)


def write(compact: CompactAdapter, path: Path, *, overwrite: bool = False) -> Sizes:
    """Write the file atomically and durably; returns its sizes. Raises E-OUT-EXISTS, E-OUT-PATH, E-IO-WRITE."""
    pieces = encode(compact)
    first = next(pieces)  # every check of the content happens before anything is created
    with atomic_file(path, overwrite=overwrite) as out:
        out.write(first)
        for piece in pieces:
            out.write(piece)
    return sizes(compact)


# --- manifest in ----------------------------------------------------------------------------------------------------


def _object(value: Any, what: str, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
    """`value` as an object with exactly these fields. Raises E-JSON-SYNTAX, E-MISSING, E-UNKNOWN."""
    if not isinstance(value, dict):
        raise JsonSyntaxError(f"{what} is not an object")
    missing = [key for key in required if key not in value]
    if missing:
        raise MissingFieldError(f"{what} lacks the field {missing[0]!r}")
    unknown = sorted(set(value) - set(required) - set(optional))
    if unknown:
        raise UnknownFieldError(f"{what} has the unknown field {unknown[0]!r}")
    return value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise JsonSyntaxError(f"{what} is not a string")
    if len(value.encode()) > OWN.string_bytes:
        raise LimitError(f"{what} has more than {OWN.string_bytes} bytes")
    return value


def _name(value: Any, what: str) -> str:
    text = _text(value, what)
    if not text:
        raise TensorNameError(f"{what} is empty")
    return text


def _hex(value: Any, what: str) -> str:
    if not isinstance(value, str) or not _HEX64.fullmatch(value):
        raise DigestError(f"{what} is not 64 lower-case hexadecimal digits")
    return value


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise JsonSyntaxError(f"{what} is not a list")
    return value


def _shape(value: Any, what: str) -> tuple[int, ...]:
    """A shape of 1 to 4 dimensions, 1 to MAX_DIM each."""
    items = _list(value, what)
    if not 1 <= len(items) <= OWN.ndim or any(type(n) is not int or not 1 <= n <= MAX_DIM for n in items):
        raise ShapeError(f"{what} is {items!s:.60}; 1 to {OWN.ndim} dimensions of 1 to {MAX_DIM} are allowed")
    return tuple(items)


def _targets(value: Any) -> tuple[Target, ...]:
    """The expanded target list. Counts before it expands; refuses any grouping but the canonical one."""
    groups = _list(value, "targets")
    count = 0
    for group in groups:
        if isinstance(group, dict) and "name" in group:
            _object(group, "a target entry", ["name", "shape"], ["view"])
            count += 1
            continue
        _object(group, "a target entry", ["prefix", "ranges", "members"])
        ranges = _list(group["ranges"], "ranges")
        if len(ranges) % 2 or any(type(n) is not int or not 0 <= n < 10**9 for n in ranges):
            raise JsonSyntaxError("the ranges of a target entry are not pairs of integers")
        numbers = sum(max(b - a + 1, 0) for a, b in zip(ranges[::2], ranges[1::2], strict=True))
        count += numbers * len(_list(group["members"], "members"))
        if count > OWN.tensors:
            break
    if count > OWN.tensors:
        raise LimitError(f"the file declares more than {OWN.tensors} targets")
    targets = []
    for group in groups:
        if "name" in group:
            targets.append(_target(group["name"], group))
            continue
        prefix = _text(group["prefix"], "a target prefix")
        for member in group["members"]:
            suffix = _text(_object(member, "a member", ["suffix", "shape"], ["view"])["suffix"], "a target suffix")
            for first, last in zip(group["ranges"][::2], group["ranges"][1::2], strict=True):
                targets += [_target(f"{prefix}{n}{suffix}", member) for n in range(first, last + 1)]
    targets.sort()
    if not targets:
        raise MissingFieldError("the file has no targets")
    for one, two in pairwise(targets):
        whole = {"matrix", "transposed", "conv"} & {one.view.kind, two.view.kind}
        if one.name == two.name and (whole or one.shape != two.shape or one.view == two.view):
            raise IndexRangeError(f"the target {one.name!r} is declared twice")
    if group_targets(targets) != groups:
        raise CanonicalError("the target list is not grouped and sorted in the one canonical way")
    return tuple(targets)


def _target(name: Any, fields: Mapping[str, Any]) -> Target:
    """A target of this name from the fields shape and view."""
    shape = _shape(fields["shape"], "the shape of a target")
    view = View(_text(fields.get("view", "matrix"), "a view"))
    view.matrix_shape(shape)
    return Target(_name(name, "a target name"), shape, view)


def _extras(value: Any) -> tuple[ExtraTensor, ...]:
    """Declared extras, still without data."""
    found = []
    for entry in _list(value, "extras"):
        item = _object(entry, "an extra", ["name", "dtype", "shape"])
        dtype = _text(item["dtype"], "the dtype of an extra")
        shape = tuple(item["shape"]) if item["shape"] == [] else _shape(item["shape"], "the shape of an extra")
        itemsize(dtype)
        found.append(ExtraTensor(_name(item["name"], "the name of an extra"), dtype, shape, b""))
    if [e.name for e in found] != sorted({e.name for e in found}):
        raise CanonicalError("the extras are not sorted by name, or one is named twice")
    return tuple(found)


def _extra_bytes(extra: ExtraTensor) -> int:
    return itemsize(extra.dtype) * math.prod(extra.shape)


def _check_extra_bytes(declared: ExtraTensor, found: int) -> None:
    if found != _extra_bytes(declared):
        raise ShapeError(f"the extra {declared.name!r:.80} has {found} bytes, declared {_extra_bytes(declared)}")


def _base(value: Any) -> BaseFingerprint:
    item = _object(value, "base", ["names"], ["content"])
    content = _hex(item["content"], "base.content") if "content" in item else ""
    return BaseFingerprint(_hex(item["names"], "base.names"), content)


def _check_names_digest(base: BaseFingerprint, targets: Sequence[Target]) -> None:
    if base.names != names_digest(targets):
        raise DigestError("base.names is not the digest of the names and shapes of the targets")


def _provenance(value: Any) -> Provenance:
    item = _object(value, "provenance", [], ["source", "base_model", "revision", "task_type", "fields"])
    texts = {key: _text(item[key], f"provenance.{key}") for key in item if key != "fields"}
    fields = item.get("fields", {})
    if not isinstance(fields, dict) or ("fields" in item and not fields) or "" in texts.values():
        raise CanonicalError("provenance holds an empty field or fields that are no object")
    if "source" in texts:
        _hex(texts["source"], "provenance.source")
    for key, text in fields.items():
        if not _FIELD.fullmatch(key):
            raise TensorNameError(f"the provenance field {key!r} is not of [a-z][a-z0-9_]*")
        _text(text, f"provenance.fields.{key}")
    return Provenance(fields=fields, **texts)


def _check_version(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest at the current version, upgraded in memory. Raises E-VER."""
    if manifest.get("format") != FORMAT:
        raise VersionError("the manifest does not say format lrconvert")
    version = manifest.get("version")
    if type(version) is not int or version < min([VERSION, *UPGRADES]):
        raise VersionError(f"the container version {version!r:.40} is none")
    if version > VERSION:
        raise VersionError(f"the container version {version} is newer than {VERSION}", fix="update lrconvert")
    for step in range(version, VERSION):
        manifest = UPGRADES[step](manifest)
    requires = manifest.get("requires")
    if requires != []:
        raise VersionError(f"the file requires features that are not known: {requires!r:.80}", fix="update lrconvert")
    return manifest


def _method(value: Any) -> tuple[Method, dict[str, Any], list[int]]:
    """(method, header, exponents of the half tensors)."""
    item = _object(value, "method", ["id", "version", "config", "exponents"])
    method = methods.get(_text(item["id"], "method.id"))
    if type(item["version"]) is not int or item["version"] != method.version:
        raise VersionError(
            f"method {method.id} has version {item['version']!r:.20} in the file, this program knows {method.version}",
            fix="update lrconvert",
        )
    if not isinstance(item["config"], dict):
        raise JsonSyntaxError("method.config is not an object")
    text = _text(item["exponents"], "method.exponents")
    if not re.fullmatch(r"(?:[0-9a-f]{2})*", text):
        raise JsonSyntaxError("method.exponents is not pairs of lower-case hexadecimal digits")
    exponents = [n - 256 if n > 127 else n for n in bytes.fromhex(text)]
    low, high = packing.EXPONENT_RANGE
    if any(not low <= n <= high for n in exponents):
        raise LimitError(f"an exponent is outside {low} to {high}")
    return method, item["config"], exponents


# The sections of a manifest that stand for themselves; on the rest see `_examine`.
_SECTIONS: dict[str, Callable[[Any], Any]] = {
    "targets": _targets,
    "extras": _extras,
    "base": _base,
    "provenance": _provenance,
    "method": _method,
}


# --- reading --------------------------------------------------------------------------------------------------------


def _raise(level: str, finding: LrcError) -> None:
    raise finding


def read(path: Path) -> CompactAdapter:
    """A compact adapter from its file, fully checked. Raises the first finding of `examine`."""
    compact = examine(path, _raise)
    assert compact is not None  # `_raise` raised otherwise
    return compact


def is_lrconvert(path: Path) -> bool:
    """Whether `path` is a safetensors file that carries our manifest (valid or not)."""
    try:
        with ContainerFile(path) as file:
            return METADATA_KEY in file.metadata
    except LrcError:
        return False


def examine(path: Path, report: Report) -> CompactAdapter | None:
    """Read and check a file; every finding goes to `report` with its level. None if it cannot be read at all."""

    def found(level: str, error: LrcError) -> None:
        report(level, error.at(path))

    try:
        file = ContainerFile(path, OWN)
    except LrcError as error:
        found("structure", error)
        return None
    with file:
        return _examine(file, found)


def _examine(file: ContainerFile, report: Report) -> CompactAdapter | None:
    sound = True

    def attempt(level: str, step: Callable[..., Any], *arguments: Any) -> Any:
        """The step's value; on a finding report it, remember that the file is unsound, and go on with None."""
        nonlocal sound
        try:
            return step(*arguments)
        except LrcError as error:
            sound = False
            report(level, error)
            return None

    manifest = attempt("structure", _read_manifest, file)
    if manifest is None:
        return None
    known = [*_SECTIONS, "format", "version", "requires", "digests"]
    attempt("structure", _object, manifest, "the manifest", known)
    parsed = {key: attempt("structure", parse, manifest[key]) for key, parse in _SECTIONS.items() if key in manifest}
    digests = attempt("structure", _object, manifest.get("digests"), "digests", ["content", "tensors"]) or {}
    declared = attempt("structure", _digest_table, digests.get("tensors")) or {}

    stored = {info.name: bytes(file.read(info)) for info in file.tensors}
    for info in file.tensors:
        attempt("semantics", _check_digest, info, stored[info.name], declared.get(info.name))
    for name in sorted(set(declared) - set(stored)):
        attempt("semantics", _fail, MissingFieldError(f"the digest of {name!r:.80} belongs to no tensor"))
    attempt("semantics", _check_content, digests, declared, manifest)
    if any(parsed.get(key) is None for key in _SECTIONS):
        return None

    method, header, exponents = parsed["method"]
    targets, extras = parsed["targets"], parsed["extras"]
    attempt("semantics", _check_names_digest, parsed["base"], targets)
    reader = _TensorReader(file, stored, exponents)
    config = attempt("semantics", _read_config, method, header, targets, reader)
    if config is None:
        return None
    tensors = {}
    for spec in attempt("semantics", _checked_specs, method, config, targets) or ():
        if attempt("semantics", reader.has, spec):
            tensors[spec.name] = attempt("values", reader.decode, spec)
    full = tuple(attempt("semantics", reader.extra, i, extra) for i, extra in enumerate(extras))
    attempt("semantics", reader.check_nothing_left)
    if not sound:
        return None
    attempt("values", method.check, config, targets, tensors)
    compact = CompactAdapter(method.id, config, targets, tensors, full, parsed["provenance"], parsed["base"])
    stated = _Digests(digests["content"], declared)
    attempt("structure", _check_canonical, file, compact, stated, manifest["method"]["exponents"])
    attempt("structure", file.check_unchanged)
    return compact if sound else None


def _digest_table(value: Any) -> dict[str, Any]:
    """``digests.tensors`` as an object; its values are checked one by one."""
    if not isinstance(value, dict):
        raise JsonSyntaxError("digests.tensors is not an object")
    return value


def _fail(error: LrcError) -> None:
    raise error


def _read_manifest(file: ContainerFile) -> dict[str, Any]:
    """The manifest, version-checked. Raises E-MISSING, E-UNKNOWN, E-LIMIT, E-VER and the JSON errors."""
    if METADATA_KEY not in file.metadata:
        raise MissingFieldError(
            "the file has no lrconvert manifest", fix="this is not an lrconvert file; try `inspect`"
        )
    if len(file.metadata) != 1:
        raise UnknownFieldError("the file has metadata besides the manifest")
    text = file.metadata[METADATA_KEY].encode()
    if len(text) > MANIFEST_BYTES:
        raise LimitError(f"the manifest has {len(text)} bytes; at most {MANIFEST_BYTES} are read")
    manifest = strictjson.parse_canonical(text, depth=OWN.json_depth)
    if not isinstance(manifest, dict):
        raise JsonSyntaxError("the manifest is not an object")
    return _check_version(manifest)


def _check_digest(info: TensorInfo, data: bytes, declared: Any) -> None:
    if declared is None:
        raise MissingFieldError(f"tensor {info.name!r} has no digest")
    if tensor_digest(info.name, info.dtype, info.shape, [data]) != _hex(declared, f"the digest of {info.name!r}"):
        raise DigestError(f"tensor {info.name!r} does not match its digest", fix="the file is damaged; get it again")


def _check_content(digests: dict[str, Any], declared: dict[str, Any], manifest: dict[str, Any]) -> None:
    content = _hex(digests.get("content"), "digests.content")
    tensors = {name: _hex(value, f"the digest of {name!r:.80}") for name, value in declared.items()}
    if manifest["version"] == VERSION and content_digest(tensors, manifest) != content:
        raise DigestError("the manifest does not match the content digest", fix="the file is damaged; get it again")


def _read_config(method: Method, header: dict[str, Any], targets: Sequence[Target], reader: _TensorReader) -> Any:
    layout = {}
    for spec in method.layout_specs(header, targets):
        reader.has(spec)
        layout[spec.name] = reader.decode(spec)
    return method.config(header, layout, targets)


def _checked_specs(method: Method, config: Any, targets: Sequence[Target]) -> tuple[TensorSpec, ...]:
    """The payload specs, after the cap on what the file expands to (E-LIMIT)."""
    expanded = 0
    for target, rank in zip(targets, method.ranks(config, targets), strict=True):
        expanded += 4 * rank * sum(target.matrix_shape)
    if expanded > MAX_EXPAND_BYTES:
        raise LimitError(f"the file expands to {expanded} bytes of factors; at most {MAX_EXPAND_BYTES} are allowed")
    specs = method.specs(config, targets)
    if sum(s.nbytes for s in specs) > MAX_INT:
        raise LimitError("the declared payload is too large")
    return specs


def _check_canonical(file: ContainerFile, compact: CompactAdapter, digests: _Digests, exponents: str) -> None:
    """The header must be the one that the writer makes (E-CANON): order, spelling, padding, everything."""
    if _header(compact, _all_specs(compact), digests, exponents) != file.header_bytes:
        raise CanonicalError("the header is not the canonical one of its content")


class _TensorReader:
    """Stored tensors, taken out one by one against their specs; what is left over at the end is unknown."""

    def __init__(self, file: ContainerFile, data: Mapping[str, bytes], exponents: Sequence[int]) -> None:
        self._infos = dict(file.by_name)
        self._data = data
        self._exponents = list(exponents)

    def has(self, spec: TensorSpec) -> bool:
        """True; raises E-MISSING, E-DTYPE or E-SHAPE if the tensor is not there as its spec says."""
        info = self._infos.get(spec.name)
        if info is None:
            raise MissingFieldError(f"the tensor {spec.name!r} is missing")
        if info.dtype != spec.dtype:
            raise DtypeError(f"tensor {spec.name!r} is {info.dtype}, its method stores {spec.dtype}")
        if info.shape != spec.stored_shape:
            raise ShapeError(
                f"tensor {spec.name!r} has shape {list(info.shape)}, its method stores {list(spec.stored_shape)}"
            )
        return True

    def decode(self, spec: TensorSpec) -> Array:
        del self._infos[spec.name]
        exponent = 0
        if spec.kind == "half":
            if not self._exponents:
                raise MissingFieldError(f"tensor {spec.name!r} has no exponent")
            exponent = self._exponents.pop(0)
        return packing.decode(spec, np.frombuffer(self._data[spec.name], STORAGE[spec.dtype]), exponent)

    def extra(self, number: int, declared: ExtraTensor) -> ExtraTensor:
        name = f"{EXTRA_PREFIX}{number}"
        info = self._infos.pop(name, None)
        if info is None:
            raise MissingFieldError(f"the tensor {name!r} of the extra {declared.name!r} is missing")
        if info.dtype != "U8" or len(info.shape) != 1:
            raise ShapeError(f"tensor {name!r} is {info.dtype} {list(info.shape)}; an extra is stored as plain U8")
        _check_extra_bytes(declared, info.nbytes)
        return replace(declared, data=self._data[name])

    def check_nothing_left(self) -> None:
        if self._infos:
            raise UnknownFieldError(f"the file holds the unknown tensor {sorted(self._infos)[0]!r}")
        if self._exponents:
            raise UnknownFieldError("the manifest has more exponents than half tensors")
