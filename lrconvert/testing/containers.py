"""Safetensors files that every reader accepts: any dtype, any order of names and data, odd lengths of the header."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lrconvert.core.dtypes import STORAGE
from lrconvert.testing import lazy
from lrconvert.testing.raw_files import spelled, with_header

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

_CHARACTERS = "abcXYZ019._-/ é\N{CJK UNIFIED IDEOGRAPH-4E2D}"  # printable ones, in and beyond ASCII


def safetensors_files(*, max_tensors: int = 4) -> SearchStrategy[bytes]:
    """Return the bytes of small valid files."""
    st = lazy.st
    names = st.text(_CHARACTERS, min_size=1, max_size=8).filter(lambda name: name != "__metadata__")

    @st.composite
    def files(draw: DrawFn) -> bytes:
        header: dict[str, Any] = {}
        data = b""
        for name in draw(st.lists(names, unique=True, max_size=max_tensors)):
            dtype = draw(st.sampled_from(sorted(STORAGE)))
            shape = draw(st.lists(st.integers(1, 3), max_size=3))
            size = STORAGE[dtype].itemsize * math.prod(shape)
            tensor = (
                bytes(n % 2 for n in range(size)) if dtype == "BOOL" else draw(st.binary(min_size=size, max_size=size))
            )
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + size]}
            data += tensor
        items = draw(st.permutations(list(header.items())))
        metadata = draw(st.none() | st.dictionaries(st.text(max_size=4), st.text(max_size=6), max_size=2))
        if metadata is not None:
            items = [("__metadata__", metadata), *items]
        return with_header(spelled(dict(items)) + b" " * draw(st.integers(0, 8)), data)

    return files()
