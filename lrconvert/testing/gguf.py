"""GGUF files written without any check, with a list of the places of their numbers, and those numbers made wrong."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lrconvert.testing import lazy
from lrconvert.testing.mutations import Mutation, mutations

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

Field = str | float | int | Sequence[int]
ALIGNMENT = 32
_KINDS = {str: 8, float: 6, int: 4}  # of fields; 9 is an array
_BAD = {
    "<I": (0, 1, 2, 5, 9, 12, 13, 30, 2**31, 2**32 - 1),
    "<Q": (0, 1, 3, 33, 2**16, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1),
}


@dataclass(frozen=True)
class Spot:
    """A number of the frame of a file: what it is, its offset, and its form in `struct`."""

    kind: str
    at: int
    form: str


class _Writer:
    def __init__(self) -> None:
        self.data = bytearray()
        self.spots: list[Spot] = []

    def number(self, kind: str, form: str, value: int) -> None:
        self.spots.append(Spot(kind, len(self.data), form))
        self.data += struct.pack(form, value)

    def text(self, value: str) -> None:
        encoded = value.encode()
        self.number("length of a text", "<Q", len(encoded))
        self.data += encoded

    def field(self, key: str, value: Field) -> None:
        self.text(key)
        kind = next((kind for form, kind in _KINDS.items() if isinstance(value, form)), 9)
        self.number("type of a field", "<I", kind)
        if isinstance(value, str):
            self.text(value)
        elif isinstance(value, (float, int)):
            self.data += struct.pack("<f" if kind == 6 else "<I", value)
        else:
            self.number("type of an array", "<I", 4)
            self.number("length of an array", "<Q", len(value))
            self.data += struct.pack(f"<{len(value)}I", *value)


def gguf_file(
    fields: Mapping[str, Field], tensors: Mapping[str, tuple[int, Sequence[int], bytes]], version: int = 3
) -> tuple[bytes, tuple[Spot, ...]]:
    """Return (file, the places of its numbers). `tensors`: name -> (ggml's type, shape as numpy has it, data)."""
    out = _Writer()
    out.data += b"GGUF"
    out.number("version", "<I", version)
    out.number("count of tensors", "<Q", len(tensors))
    out.number("count of fields", "<Q", len(fields))
    for key, value in fields.items():
        out.field(key, value)
    offset = 0
    for name, (kind, shape, data) in tensors.items():
        out.text(name)
        out.number("count of dimensions", "<I", len(shape))
        for n in reversed(shape):
            out.number("dimension", "<Q", n)
        out.number("type of a tensor", "<I", kind)
        out.number("offset", "<Q", offset)
        offset += len(data) + -len(data) % ALIGNMENT
    out.data += bytes(-len(out.data) % ALIGNMENT)
    for _, _, data in tensors.values():
        out.data += data + bytes(-len(data) % ALIGNMENT)
    return bytes(out.data), tuple(out.spots)


def gguf_mutations(data: bytes, spots: Sequence[Spot]) -> SearchStrategy[Mutation]:
    """Return files with one number of the frame made wrong, or any byte."""
    st = lazy.st

    def wrong(spot: Spot, value: int, step: int) -> Mutation:
        size = struct.calcsize(spot.form)
        old = struct.unpack_from(spot.form, data, spot.at)[0]
        new = value if step == 0 else max(0, min(old + step, 256**size - 1))
        packed = struct.pack(spot.form, new)
        return Mutation(spot.kind, f"byte {spot.at}: {old} -> {new}", data[: spot.at] + packed + data[spot.at + size :])

    numbers = st.sampled_from(list(spots)).flatmap(
        lambda spot: st.builds(
            wrong, st.just(spot), st.sampled_from(_BAD[spot.form]), st.sampled_from([0, 0, 0, -1, 1, 32, -32])
        )
    )
    return st.one_of(numbers, numbers, mutations(data))
