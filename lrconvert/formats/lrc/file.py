"""The lrconvert file: written in the newest container version, read in any.

Normative text: ``formats/lrconvert-v3.md``; of older versions ``-v2.md`` and ``-v1.md``. The same content always gives
the same bytes, and a reader accepts no other spelling. `examine` is the one reading path: `read` stops at its first
finding, `validate` collects them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lrconvert.core import errors
from lrconvert.core.dtypes import STORAGE, Array
from lrconvert.core.errors import LrcError
from lrconvert.core.limits import MAX_EXPAND_BYTES, MAX_INT, OWN
from lrconvert.core.wording import spelled
from lrconvert.formats.lrc import manifest as manifests
from lrconvert.formats.lrc import one_tensor
from lrconvert.formats.lrc.contents import Contents
from lrconvert.formats.lrc.manifest import Manifest
from lrconvert.formats.lrc.v1 import METADATA_KEY, V1
from lrconvert.io import fields
from lrconvert.io.container import ContainerBytes, ContainerFile, parse_header
from lrconvert.lora import packing
from lrconvert.lora.adapter import BaseFingerprint, CompactAdapter, ExtraTensor, Target
from lrconvert.lora.fingerprint import names_digest
from lrconvert.lora.packing import TensorSpec
from lrconvert.methods import base as methods
from lrconvert.methods.base import Method

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
    return sizer(compact)(compact.config)


def sizer(compact: CompactAdapter) -> Callable[[Any], Sizes]:
    """Return `sizes` of `compact` with another config: what all configs share is spelled once, which a search over
    them, on many targets, would spend most of its time on."""
    extras = [len(extra.data) for extra in compact.extras]
    forms = [(compact, extras), (replace(compact, extras=()), [])][: 2 if extras else 1]
    frames = [(len(one_tensor.packed_others(manifests.frame(adapter))), data) for adapter, data in forms]

    def of(config: Any) -> Sizes:
        specs = _all_specs(compact.method, config, compact.targets)
        payload = sum(s.nbytes for s in specs)
        entry = manifests.method_entry(compact.method, config, _no_exponents(specs))
        more = one_tensor.method_bytes(entry) + payload
        totals = [
            len(one_tensor.header(frame + more, data)) + one_tensor.LEAD_BYTES + frame + more + sum(data)
            for frame, data in frames
        ]
        return Sizes(totals[0], payload, totals[0] - totals[-1])

    return of


def _no_exponents(specs: Sequence[TensorSpec]) -> str:
    """Exponents as long as they will be."""
    return "00" * sum(s.kind == "half" for s in specs)


# --- what is stored ---------------------------------------------------------------------------------------------------


def _all_specs(name: str, config: Any, targets: Sequence[Target]) -> list[TensorSpec]:
    """Layout and payload tensors of a compact adapter, in the order of their declaration."""
    method = methods.get(name)
    return [*method.layout_specs(method.header(config), targets), *method.specs(config, targets)]


# --- writing --------------------------------------------------------------------------------------------------------


def encode(compact: CompactAdapter) -> Iterator[bytes]:
    """Yield the bytes of the file, in pieces. The same content gives the same bytes on every machine.

    Whatever `read` would refuse is refused here, with the same codes, before the first piece.
    """
    made = parts(compact)
    yield from one_tensor.encode(made.manifest, [data for _, data in made.payload], made.extras)


@dataclass(frozen=True)
class Parts:
    """A file as what it is made of: `manifest` as a JSON value, (name, bytes) of each tensor of the `payload` in the
    order of their declaration, and the bytes of its `extras`."""

    manifest: dict[str, Any]
    payload: Sequence[tuple[str, bytes]]
    extras: Sequence[bytes]


def parts(compact: CompactAdapter) -> Parts:
    """Return what the file is made of. Raises what `read` would raise for it."""
    check(compact)
    method = methods.get(compact.method)
    specs = _all_specs(compact.method, compact.config, compact.targets)
    arrays = {**method.layout(compact.config), **compact.tensors}
    undeclared = ", ".join(sorted(set(arrays) - {s.name for s in specs}))
    if undeclared:
        raise errors.UnknownFieldError(f"the method {method.id} does not declare the tensors {undeclared}")
    absent = [s.name for s in specs if s.name not in arrays]
    if absent:
        raise errors.MissingFieldError(
            f"the adapter lacks the tensor {absent[0]!r}", fix="fit it first; a dry run does not"
        )
    exponents, payload = "", []
    for spec in specs:
        stored, exponent = packing.encode(spec, arrays[spec.name])
        payload.append((spec.name, stored.tobytes()))
        if spec.kind == "half":
            exponents += (exponent & 0xFF).to_bytes(1, "little").hex()
    method.check(compact.config, compact.targets, compact.tensors)
    return Parts(manifests.build(compact, exponents), payload, [extra.data for extra in compact.extras])


def check(compact: CompactAdapter) -> None:
    """Raise what a reader would raise for the file of `compact`, all but the contents of its payload tensors, which
    need not be fitted yet. The reader's own functions decide, and what they read must be what was written."""
    manifest, _ = one_tensor.unpack(one_tensor.pack(manifests.build(compact, "")), 0)
    required = manifests.check_requires(manifest["requires"])
    parsed = {key: parse(manifest[key], required) for key, parse in manifests.SECTIONS.items()}
    if parsed["targets"] != tuple(compact.targets):
        raise errors.CanonicalError("the targets are not sorted")
    if compact.base.names != names_digest(compact.targets):
        raise errors.DigestError("the names of the base are not the digest of the names and shapes of the targets")
    for declared, extra in zip(parsed["extras"], compact.extras, strict=True):
        manifests.check_extra_bytes(declared, len(extra.data))
        _check_row_indices(extra)
    _check_config(compact, manifest["method"]["config"])
    specs = _all_specs(compact.method, compact.config, compact.targets)
    extras = [len(extra.data) for extra in compact.extras]
    nbytes = len(one_tensor.pack(manifests.build(compact, _no_exponents(specs)))) + sum(s.nbytes for s in specs)
    header, data_bytes = one_tensor.header(nbytes, extras), one_tensor.LEAD_BYTES + nbytes + sum(extras)
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
    return _sound(examine(path, _raise))


def read_bytes(data: bytes, shown: Path) -> CompactAdapter:
    """Read a compact adapter from the bytes of its file, which messages call `shown`, as `read` does."""
    return _sound(examine_bytes(data, shown, _raise))


def version_of(data: bytes, shown: Path) -> int:
    """Return the container version of a file that was read."""
    with ContainerBytes(data, shown, OWN) as opened:
        info = opened.by_name.get(one_tensor.TENSOR)
        return 1 if info is None else opened.read(info, 0, 1)[0]


def parts_of(compact: CompactAdapter, data: bytes) -> Parts:
    """Return what a file is made of that was read as `compact` from the bytes `data`. One of an older container version
    is what writing it anew makes of it."""
    with ContainerBytes(data, Path(), OWN) as opened:
        contents = _opened(opened)
        if not isinstance(contents, one_tensor.OneTensor) or contents.version != one_tensor.VERSION:
            return parts(compact)
        specs = _all_specs(compact.method, compact.config, compact.targets)
        payload = [(spec.name, contents.take(spec)) for spec in specs]
        return Parts(contents.manifest, payload, [contents.extra(n) for n in range(len(compact.extras))])


def _sound(compact: CompactAdapter | None) -> CompactAdapter:
    assert compact is not None  # `_raise` raised otherwise
    return compact


def is_lrconvert(path: Path) -> bool:
    """Return true if `path` is a safetensors file that carries our manifest (valid or not)."""
    try:
        with ContainerFile(path) as file:
            return METADATA_KEY in file.metadata or one_tensor.TENSOR in file.by_name
    except LrcError:
        return False


def examine(path: Path, report: Report) -> CompactAdapter | None:
    """Read and check a file; every finding goes to `report` with its level. None if it cannot be read at all."""
    return _examined(lambda: ContainerFile(path, OWN), path, report)


def examine_bytes(data: bytes, shown: Path, report: Report) -> CompactAdapter | None:
    """Read and check the bytes of a file, which messages call `shown`, as `examine` does."""
    return _examined(lambda: ContainerBytes(data, shown, OWN), shown, report)


def _examined(opened: Callable[[], ContainerFile], path: Path, report: Report) -> CompactAdapter | None:
    try:
        file = opened()
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

    contents: Contents | None = attempt("structure", _opened, file)
    if contents is None:
        return None
    manifest = contents.manifest
    required = attempt("structure", manifests.check_requires, manifest.get("requires"), contents.features)
    if required is None:
        return None
    attempt("structure", fields.read, Manifest, manifest, "the manifest")
    parsed = {
        key: attempt("structure", parse, manifest[key], required)
        for key, parse in manifests.SECTIONS.items()
        if key in manifest
    }
    for level, step in contents.checks():
        attempt(level, step)
    if any(parsed.get(key) is None for key in manifests.SECTIONS):
        return None

    method, header, exponents = parsed["method"]
    targets, extras = parsed["targets"], parsed["extras"]
    base = BaseFingerprint(names_digest(targets), parsed["base"])
    attempt("semantics", contents.check_names, base.names)
    reader = _TensorReader(contents, exponents)
    config = attempt("semantics", _read_config, method, header, targets, reader)
    if config is None:
        return None
    attempt("semantics", _check_needs, method, config, base)
    tensors = {}
    specs = attempt("semantics", _checked_specs, method, config, targets)
    if specs is None:  # without them nothing tells which tensors belong here
        return None
    for spec in specs:
        stored = attempt("semantics", contents.take, spec)
        if stored is not None:
            tensors[spec.name] = attempt("values", reader.decode, spec, stored)
    full = tuple(attempt("semantics", _extra, contents, i, extra) for i, extra in enumerate(extras))
    attempt("semantics", contents.check_nothing_left)
    attempt("semantics", reader.check_nothing_left)
    if not sound:
        return None
    attempt("values", method.check, config, targets, tensors)
    name = methods.name_of(method.id, method.version)
    compact = CompactAdapter(name, config, targets, tensors, full, parsed["provenance"], base)
    attempt("structure", contents.check_canonical, manifests.build(compact, manifest["method"]["exponents"]))
    attempt("structure", file.check_unchanged)
    return compact if sound else None


def _opened(file: ContainerFile) -> Contents:
    is_one = one_tensor.TENSOR in file.by_name and METADATA_KEY not in file.metadata
    return one_tensor.OneTensor(file) if is_one else V1(file)


def _extra(contents: Contents, number: int, declared: ExtraTensor) -> ExtraTensor:
    data = contents.extra(number)
    manifests.check_extra_bytes(declared, len(data))
    extra = replace(declared, data=data)
    _check_row_indices(extra)
    return extra


def _check_row_indices(extra: ExtraTensor) -> None:
    if extra.use == "row_indices":
        rows = np.frombuffer(extra.data, "<i8")
        if rows[0] < 0 or bool((np.diff(rows) <= 0).any()):
            raise errors.IndexRangeError(f"the row indices of {extra.name!r:.80} do not rise from 0 or more")


def _check_needs(method: Method, config: Any, base: BaseFingerprint) -> None:
    if method.needs_base(config) and not base.content:
        what = "base.content is missing: the updates depend on the weights of the base"
        raise errors.MissingFieldError(what, fix=f"convert with {spelled('base', ...)}")


def _read_config(method: Method, header: dict[str, Any], targets: Sequence[Target], reader: _TensorReader) -> Any:
    layout = {}
    for spec in method.layout_specs(header, targets):
        layout[spec.name] = reader.decode(spec, reader.contents.take(spec))
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


class _TensorReader:
    """Stored tensors as numbers; those of kind half take an exponent each, in the order of their declaration."""

    def __init__(self, contents: Contents, exponents: Sequence[int]) -> None:
        self.contents = contents
        self._exponents = list(exponents)

    def decode(self, spec: TensorSpec, stored: bytes) -> Array:
        exponent = 0
        if spec.kind == "half":
            if not self._exponents:
                raise errors.MissingFieldError(f"tensor {spec.name!r} has no exponent")
            exponent = self._exponents.pop(0)
        return packing.decode(spec, np.frombuffer(stored, STORAGE[spec.dtype]), exponent)

    def check_nothing_left(self) -> None:
        if self._exponents:
            raise errors.UnknownFieldError("the manifest has more exponents than half tensors")
