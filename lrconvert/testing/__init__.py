"""Hypothesis strategies for the formats, for our tests and those of programs that use the library.

    from hypothesis import given
    from lrconvert import testing

    @given(testing.lrconvert_files())
    def test_reader(data): ...

`safetensors_files`, `lrconvert_files`, `manifests`, `peft_configs`, `peft_folders`, `layout_folders` and
`shard_indexes` draw valid material: bytes, JSON values, or folders as ``{name: bytes}``. `mutations` breaks one thing
in any of it, and `gguf_mutations` in GGUF files, of which it knows the numbers. hypothesis is loaded when the first of
them is called; it comes with ``pip install 'lrconvert[test]'``.
"""

from lrconvert.testing.containers import safetensors_files
from lrconvert.testing.gguf import gguf_file, gguf_mutations
from lrconvert.testing.indexes import shard_indexes
from lrconvert.testing.layouts import WRITERS, Known, layout_folders
from lrconvert.testing.manifests import lrconvert_files, manifests
from lrconvert.testing.mutations import Mutation, folder_mutations, mutations
from lrconvert.testing.peft import peft_configs, peft_folders
from lrconvert.testing.raw_files import RawFile, header_and_data, with_header

__all__ = [
    "WRITERS",
    "Known",
    "Mutation",
    "RawFile",
    "folder_mutations",
    "gguf_file",
    "gguf_mutations",
    "header_and_data",
    "layout_folders",
    "lrconvert_files",
    "manifests",
    "mutations",
    "peft_configs",
    "peft_folders",
    "safetensors_files",
    "shard_indexes",
    "with_header",
]
