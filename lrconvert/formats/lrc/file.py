"""The lrconvert file: one safetensors file whose only metadata is a canonical JSON manifest.

Normative text: ``formats/lrconvert-v1.md``. The same content always gives the same bytes, and a reader accepts no other
spelling. `examine` is the one reading path: `read` stops at its first finding, `validate` collects them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lrconvert.core import errors
from lrconvert.core.dtypes import STORAGE, Array, itemsize
from lrconvert.core.errors import LrcError
from lrconvert.core.limits import MAX_EXPAND_BYTES, MAX_INT, OWN
from lrconvert.formats.lrc import manifest as manifests
from lrconvert.formats.lrc.manifest import MANIFEST_BYTES, Digests, Manifest
from lrconvert.io import fields, strictjson
from lrconvert.io.container import ContainerFile, TensorInfo, carries, encode_header, parse_header, tensor_digest
from lrconvert.io.fields import Hex
from lrconvert.lora import packing
from lrconvert.lora.adapter import BaseFingerprint, CompactAdapter, ExtraTensor, Target
from lrconvert.lora.fingerprint import content_digest, names_digest
from lrconvert.lora.packing import TensorSpec
from lrconvert.methods import base as methods
from lrconvert.methods.base import Method

METADATA_KEY = "lrconvert"
EXTRA_PREFIX = "extra."
Report = Callable[[str, LrcError], None]  # (level, finding); levels: structure, semantics, values, base


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
    """Return the exact sizes of the file that `compact` will be written to. Its tensors need not be fitted yet."""
    specs = _all_specs(compact)
    payload = sum(s.nbytes for s in specs)
    without = len(_blank_header(replace(compact, extras=()), specs)) + payload
    total = len(_blank_header(compact, specs)) + payload + sum(len(e.data) for e in compact.extras)
    return Sizes(total, payload, total - without)


def _blank_header(compact: CompactAdapter, specs: Sequence[TensorSpec]) -> bytes:
    """The header as long as it will be, with zeros for digests and exponents."""
    blank = {name: "0" * 64 for name, _, _ in _entries(specs, compact.extras)}
    return _header(compact, specs, Digests("0" * 64, blank), "00" * sum(s.kind == "half" for s in specs))


def _header(compact: CompactAdapter, specs: Sequence[TensorSpec], digests: Digests, exponents: str) -> bytes:
    text = strictjson.dump_canonical(manifests.build(compact, digests, exponents))
    if len(text) > MANIFEST_BYTES:
        raise errors.LimitError(f"the manifest has {len(text)} bytes; at most {MANIFEST_BYTES} are allowed")
    return encode_header(_entries(specs, compact.extras), {METADATA_KEY: text.decode()})


# --- what is stored ---------------------------------------------------------------------------------------------------


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


# --- writing --------------------------------------------------------------------------------------------------------


def encode(compact: CompactAdapter) -> Iterator[bytes]:
    """Yield the bytes of the file, in pieces. The same content gives the same bytes on every machine.

    Whatever `read` would refuse is refused here, with the same codes, before the first piece.
    """
    check(compact)
    method = methods.get(compact.method)
    specs = _all_specs(compact)
    arrays = {**method.layout(compact.config), **compact.tensors}
    undeclared = ", ".join(sorted(set(arrays) - {s.name for s in specs}))
    if undeclared:
        raise errors.UnknownFieldError(f"the method {method.id} does not declare the tensors {undeclared}")
    absent = [s.name for s in specs if s.name not in arrays]
    if absent:
        raise errors.MissingFieldError(
            f"the adapter lacks the tensor {absent[0]!r}", fix="fit it first; a dry run does not"
        )
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
    content = content_digest(digests, manifests.build(compact, None, exponents))
    yield _header(compact, specs, Digests(content, digests), exponents)
    for name, _, _ in entries:
        yield data[name]


def check(compact: CompactAdapter) -> None:
    """Raise what a reader would raise for the file of `compact`, all but the contents of its payload tensors, which
    need not be fitted yet. The reader's own functions decide, and what they read must be what was written."""
    text = strictjson.dump_canonical(manifests.build(compact, None, ""))
    manifest = strictjson.parse_canonical(text, depth=OWN.json_depth)
    parsed = {key: parse(manifest[key]) for key, parse in manifests.SECTIONS.items()}
    if parsed["targets"] != tuple(compact.targets):
        raise errors.CanonicalError("the targets are not sorted")
    _check_names_digest(parsed["base"], parsed["targets"])
    for declared, extra in zip(parsed["extras"], compact.extras, strict=True):
        manifests.check_extra_bytes(declared, len(extra.data))
        _check_row_indices(extra)
    _check_config(compact, manifest["method"]["config"])
    specs = _all_specs(compact)
    header = _blank_header(compact, specs)
    data_bytes = sum(s.nbytes for s in specs) + sum(len(e.data) for e in compact.extras)
    if len(header) + data_bytes > OWN.file_bytes:
        raise errors.LimitError(
            f"the file would have {len(header) + data_bytes} bytes; at most {OWN.file_bytes} are allowed"
        )
    parse_header(header[8:], data_bytes, OWN, Path())


def _check_config(compact: CompactAdapter, header: dict[str, Any]) -> None:
    """The configuration must be the one that its header and layout tensors lead back to."""
    method = methods.get(compact.method)
    stored = method.layout(compact.config)
    layout = {}
    for spec in method.layout_specs(header, compact.targets):
        layout[spec.name] = packing.decode(spec, *packing.encode(spec, stored[spec.name]))
    if method.config(header, layout, compact.targets) != compact.config:
        raise errors.CanonicalError(f"the configuration of {method.id} is not the one that its file would give back")
    _check_needs(method, compact.config, compact.base)
    _checked_specs(method, compact.config, compact.targets)


def write(compact: CompactAdapter, path: Path, *, overwrite: bool = False) -> Sizes:
    """Write the file atomically and durably; returns its sizes. Raises E-OUT-EXISTS, E-OUT-PATH, E-IO-WRITE."""
    from lrconvert.io.durable import atomic_file  # reading needs nothing that writes

    pieces = encode(compact)
    first = next(pieces)  # every check of the content happens before anything is created
    with atomic_file(path, overwrite=overwrite) as out:
        out.write(first)
        for piece in pieces:
            out.write(piece)
    return sizes(compact)


# --- reading --------------------------------------------------------------------------------------------------------


def _raise(level: str, finding: LrcError) -> None:
    raise finding


def read(path: Path) -> CompactAdapter:
    """Read a compact adapter from its file, fully checked. Raises the first finding of `examine`."""
    compact = examine(path, _raise)
    assert compact is not None  # `_raise` raised otherwise
    return compact


def is_lrconvert(path: Path) -> bool:
    """Return true if `path` is a safetensors file that carries our manifest (valid or not)."""
    return carries(path, METADATA_KEY)


def examine(path: Path, report: Report) -> CompactAdapter | None:
    """Read and check a file; every finding goes to `report` with its level. None if it cannot be read at all."""
    try:
        file = ContainerFile(path, OWN)
    except LrcError as error:
        report("structure", error.at(path))
        return None
    with file:
        return _examine(file, lambda level, error: report(level, error.at(path)))


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

    stated = attempt("structure", _read_manifest, file)
    manifest = None if stated is None else attempt("structure", manifests.upgraded, stated)
    if manifest is None:
        return None
    attempt("structure", fields.read, Manifest, manifest, "the manifest")
    parsed = {
        key: attempt("structure", parse, manifest[key]) for key, parse in manifests.SECTIONS.items() if key in manifest
    }
    digests = attempt("structure", fields.read, _StatedDigests, manifest.get("digests"), "digests")
    digests = digests or _StatedDigests(None, {})
    declared = digests.tensors

    stored = {info.name: bytes(file.read(info)) for info in file.tensors}
    for info in file.tensors:
        attempt("semantics", _check_digest, info, stored[info.name], declared.get(info.name))
    for name in sorted(set(declared) - set(stored)):
        attempt("semantics", _fail, errors.MissingFieldError(f"the digest of {name!r:.80} belongs to no tensor"))
    attempt("semantics", _check_content, digests, stated)
    if any(parsed.get(key) is None for key in manifests.SECTIONS):
        return None

    method, header, exponents = parsed["method"]
    targets, extras = parsed["targets"], parsed["extras"]
    attempt("semantics", _check_names_digest, parsed["base"], targets)
    reader = _TensorReader(file, stored, exponents)
    config = attempt("semantics", _read_config, method, header, targets, reader)
    if config is None:
        return None
    attempt("semantics", _check_needs, method, config, parsed["base"])
    tensors = {}
    specs = attempt("semantics", _checked_specs, method, config, targets)
    if specs is None:  # without them nothing tells which tensors belong here
        return None
    for spec in specs:
        if attempt("semantics", reader.has, spec):
            tensors[spec.name] = attempt("values", reader.decode, spec)
    full = tuple(attempt("semantics", reader.extra, i, extra) for i, extra in enumerate(extras))
    attempt("semantics", reader.check_nothing_left)
    if not sound:
        return None
    attempt("values", method.check, config, targets, tensors)
    name = methods.name_of(method.id, method.version)
    compact = CompactAdapter(name, config, targets, tensors, full, parsed["provenance"], parsed["base"])
    if stated["version"] == manifests.VERSION:
        written = Digests(digests.content, declared), manifest["method"]["exponents"]
        attempt("structure", _check_canonical, file, compact, *written)
    attempt("structure", file.check_unchanged)
    return compact if sound else None


def _check_row_indices(extra: ExtraTensor) -> None:
    if extra.use == "row_indices":
        rows = np.frombuffer(extra.data, "<i8")
        if rows[0] < 0 or bool((np.diff(rows) <= 0).any()):
            raise errors.IndexRangeError(f"the row indices of {extra.name!r:.80} do not rise from 0 or more")


def _check_names_digest(base: BaseFingerprint, targets: Sequence[Target]) -> None:
    if base.names != names_digest(targets):
        raise errors.DigestError("base.names is not the digest of the names and shapes of the targets")


def _check_needs(method: Method, config: Any, base: BaseFingerprint) -> None:
    if method.needs_base(config) and not base.content:
        what = "base.content is missing: the updates depend on the weights of the base"
        raise errors.MissingFieldError(what, fix="convert with --base")


@dataclass(frozen=True)
class _StatedDigests:
    """Digests as they stand in a manifest, each still to be checked."""

    content: Any
    tensors: dict[str, Any]


def _fail(error: LrcError) -> None:
    raise error


def _read_manifest(file: ContainerFile) -> dict[str, Any]:
    """Return the manifest as it stands in the file. Raises E-MISSING, E-UNKNOWN, E-LIMIT and the JSON errors."""
    if METADATA_KEY not in file.metadata:
        what = "the file has no lrconvert manifest"
        raise errors.MissingFieldError(what, fix="this is not an lrconvert file; try `inspect`")
    if len(file.metadata) != 1:
        raise errors.UnknownFieldError("the file has metadata besides the manifest")
    text = file.metadata[METADATA_KEY].encode()
    if len(text) > MANIFEST_BYTES:
        raise errors.LimitError(f"the manifest has {len(text)} bytes; at most {MANIFEST_BYTES} are read")
    manifest = strictjson.parse_canonical(text, depth=OWN.json_depth)
    if not isinstance(manifest, dict):
        raise errors.JsonSyntaxError("the manifest is not an object")
    return manifest


def _check_digest(info: TensorInfo, data: bytes, declared: Any) -> None:
    if declared is None:
        raise errors.MissingFieldError(f"tensor {info.name!r} has no digest")
    stated = fields.read(Hex, declared, f"digests.tensors[{info.name!r}]")
    if tensor_digest(info.name, info.dtype, info.shape, [data]) != stated:
        what = f"tensor {info.name!r} does not match its digest"
        raise errors.DigestError(what, fix="the file is damaged; get it again")


def _check_content(digests: _StatedDigests, manifest: dict[str, Any]) -> None:
    """Raise E-DIGEST unless the content digest is that of the file as it is, before any upgrade."""
    stated = fields.read(Digests, vars(digests), "digests")
    if content_digest(stated.tensors, manifest) != stated.content:
        what = "the manifest does not match the content digest"
        raise errors.DigestError(what, fix="the file is damaged; get it again")


def _read_config(method: Method, header: dict[str, Any], targets: Sequence[Target], reader: _TensorReader) -> Any:
    layout = {}
    for spec in method.layout_specs(header, targets):
        reader.has(spec)
        layout[spec.name] = reader.decode(spec)
    return method.config(header, layout, targets)


def _checked_specs(method: Method, config: Any, targets: Sequence[Target]) -> tuple[TensorSpec, ...]:
    """The payload specs, after the cap on what the file expands to (E-LIMIT)."""
    ranks = method.ranks(config, targets)
    expanded = sum(4 * rank * sum(target.matrix_shape) for target, rank in zip(targets, ranks, strict=True))
    if expanded > MAX_EXPAND_BYTES:
        raise errors.LimitError(
            f"the file expands to {expanded} bytes of factors; at most {MAX_EXPAND_BYTES} are allowed"
        )
    specs = method.specs(config, targets)
    if sum(s.nbytes for s in specs) > MAX_INT:
        raise errors.LimitError("the declared payload is too large")
    return specs


def _check_canonical(file: ContainerFile, compact: CompactAdapter, digests: Digests, exponents: str) -> None:
    """The header must be the one that the writer makes (E-CANON): order, spelling, padding, everything."""
    if _header(compact, _all_specs(compact), digests, exponents) != file.header_bytes:
        raise errors.CanonicalError("the header is not the canonical one of its content")


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
            raise errors.MissingFieldError(f"the tensor {spec.name!r} is missing")
        if info.dtype != spec.dtype:
            raise errors.DtypeError(f"tensor {spec.name!r} is {info.dtype}, its method stores {spec.dtype}")
        if info.shape != spec.stored_shape:
            raise errors.ShapeError(
                f"tensor {spec.name!r} has shape {list(info.shape)}, its method stores {list(spec.stored_shape)}"
            )
        return True

    def decode(self, spec: TensorSpec) -> Array:
        del self._infos[spec.name]
        exponent = 0
        if spec.kind == "half":
            if not self._exponents:
                raise errors.MissingFieldError(f"tensor {spec.name!r} has no exponent")
            exponent = self._exponents.pop(0)
        return packing.decode(spec, np.frombuffer(self._data[spec.name], STORAGE[spec.dtype]), exponent)

    def extra(self, number: int, declared: ExtraTensor) -> ExtraTensor:
        name = f"{EXTRA_PREFIX}{number}"
        info = self._infos.pop(name, None)
        if info is None:
            raise errors.MissingFieldError(f"the tensor {name!r} of the extra {declared.name!r} is missing")
        if info.dtype != "U8" or len(info.shape) != 1:
            raise errors.ShapeError(
                f"tensor {name!r} is {info.dtype} {list(info.shape)}; an extra is stored as plain U8"
            )
        manifests.check_extra_bytes(declared, info.nbytes)
        extra = replace(declared, data=self._data[name])
        _check_row_indices(extra)
        return extra

    def check_nothing_left(self) -> None:
        if self._infos:
            raise errors.UnknownFieldError(f"the file holds the unknown tensor {sorted(self._infos)[0]!r}")
        if self._exponents:
            raise errors.UnknownFieldError("the manifest has more exponents than half tensors")
