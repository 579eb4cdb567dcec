"""Layouts of other tools with one thing wrong: refused by an error of ours, or read as what the file says.

What it says is worked out here from the plain tensors, by other code than the readers', or is what the valid file said.
"""

from __future__ import annotations

import io
import json
import math
import re
import struct
import tracemalloc
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_files
from hypothesis import note
from hypothesis import strategies as st
from test_fuzz import SLOW, container_tensors, fuzz, mutated

from lrconvert import api, testing
from lrconvert.core import errors
from lrconvert.core.limits import MIB
from lrconvert.lora.adapter import LoraAdapter
from lrconvert.testing import layouts
from lrconvert.testing.gguf import gguf_file, gguf_mutations

Plain = tuple[str, list[int], bytes]  # dtype, shape, data
Meaning = dict[str, tuple[Plain, Plain, float]]
ALPHA = 6.0
_FORMS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b", "U8": "<B"}


def number(plain: Plain) -> float:
    dtype, _, data = plain
    if dtype == "BF16":
        dtype, data = "F32", b"\0\0" + data
    return float(struct.unpack(_FORMS[dtype], data)[0])


def grouped(tensors: Mapping[str, Plain], parts: Mapping[str, str]) -> dict[str, dict[str, Plain]]:
    """{module: {part: tensor}} of names that match a pattern of `parts` with the module as its first group."""
    modules: dict[str, dict[str, Plain]] = {}
    for name, plain in tensors.items():
        for pattern, part in parts.items():
            if match := re.fullmatch(pattern, name):
                modules.setdefault(match[1], {})[part] = plain
                break
    return modules


def flat(plain: Plain) -> Plain:
    """As a matrix: of a convolution, the first dimension and all others."""
    dtype, shape, data = plain
    return dtype, [shape[0], math.prod(shape[1:])], data


def transposed(plain: Plain) -> Plain:
    dtype, shape, data = plain
    size = len(data) // math.prod(shape)
    turned = np.frombuffer(data, f"V{size}").reshape(shape).T
    return dtype, shape[::-1], np.ascontiguousarray(turned).tobytes()


def alphas(modules: Mapping[str, dict[str, Plain]], default: float | None = None) -> Meaning:
    meaning = {}
    for module, parts in modules.items():
        a, b = flat(parts["A"]), flat(parts["B"])
        rank = a[1][0]
        alpha = number(parts["alpha"]) if "alpha" in parts else rank if default is None else default
        meaning[f"{module}.weight"] = (a, b, alpha / rank)
    return meaning


def expected(layout: str, files: Mapping[str, bytes]) -> Meaning:
    weights = next(data for name, data in files.items() if name != "adapter_config.json")
    if layout == "mlx npz":
        with np.load(io.BytesIO(weights), allow_pickle=False) as stored:
            tensors = {
                name: (f"F{8 * value.dtype.itemsize}", list(value.shape), np.ascontiguousarray(value).tobytes())
                for name, value in stored.items()
            }
    else:
        tensors = dict(container_tensors(weights))
    if layout == "kohya":
        parts = {r"(.+)\.lora_(?:down|A)\.weight": "A", r"(.+)\.lora_(?:up|B)\.weight": "B", r"(.+)\.alpha": "alpha"}
        return alphas(grouped(tensors, parts))
    if layout == "diffusers":
        # An adapter may have a name of its own, even that of a factor.
        parts = {r"(.+?)\.lora_A(?:\.[^.]+)?\.weight": "A", r"(.+?)\.lora_B(?:\.[^.]+)?\.weight": "B"}
        return alphas(grouped(tensors, {**parts, r"(.+?)(?:_lora|\.lora)?\.alpha": "alpha"}))
    if layout == "raw":
        parts = {r"(.+)\.lora_A(?:(?:\.[^.]+)?\.weight)?": "A", r"(.+)\.lora_B(?:(?:\.[^.]+)?\.weight)?": "B"}
        return alphas(grouped(tensors, parts), default=ALPHA)
    if layout == "cloneofsimo":
        return alphas(grouped(tensors, {r"(.+:\d+):down": "A", r"(.+:\d+):up": "B"}))
    config = json.loads(files["adapter_config.json"])
    modules = grouped(tensors, {r"(.+)\.lora_a": "A", r"(.+)\.lora_b": "B"})
    scale = float(config["lora_parameters"]["scale"])
    return {f"{m}.weight": (transposed(p["A"]), transposed(p["B"]), scale) for m, p in modules.items()}


def meaning(lora: LoraAdapter) -> Meaning:
    pairs = {}
    for pair in lora.targets:
        a, b = ((s.dtype, list(s.shape), s.array.tobytes()) for s in (pair.a, pair.b))
        pairs[pair.target.name] = (a, b, pair.scale)
    return pairs


def loaded(path: Path, **options: Any) -> LoraAdapter | None:
    """The adapter, or None if it is refused by an error of ours; memory stays small whatever the numbers claim."""
    tracemalloc.start()
    try:
        return api.load_lora(path, **options)
    except errors.LrcError as error:
        assert str(error).isprintable()
        return None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2 * MIB


@pytest.fixture(autouse=True, scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Modules are imported, and tables of names made, at the first use: that memory is no adapter's."""
    for layout, (write, modules, _) in layouts.WRITERS.items():
        one = layouts.Known(modules[0], np.ones((1, 1), "<f4"), np.ones((1, 1), "<f4"), 1.0)
        folder = write_files(tmp_path_factory.mktemp("first") / "x", write([one]))
        api.load_lora(folder, alpha=ALPHA if layout == "raw" else None)


@pytest.mark.medium
@pytest.mark.parametrize("examples", [60, SLOW])
@pytest.mark.parametrize("layout", [name for name in layouts.WRITERS if name != "gguf"])
def test_layouts(layout: str, examples: int, tmp_path: Path) -> None:
    """Refused; or factors and scales are those that the file spells out."""
    folder = tmp_path / "x"

    def check(data: st.DataObject) -> None:
        _, good = data.draw(testing.layout_folders(layout))
        weights = next(name for name in good if name != "adapter_config.json")
        for files in (good, mutated(data, good, weights)):
            lora = loaded(write_files(folder, files), alpha=ALPHA if layout == "raw" else None)
            if lora is None:
                assert files is not good
            else:
                assert meaning(lora) == expected(layout, files)

    fuzz(examples, check)


# Numbers whose change gives another adapter that a GGUF file can say: it has no sizes beside them.
_MEANS_ANOTHER = ("dimension", "type of a tensor")


@pytest.mark.medium
@pytest.mark.parametrize("examples", [200, SLOW])
def test_gguf(examples: int, tmp_path: Path) -> None:
    """A wrong number of the frame is refused, or is of no consequence; a wrong byte is refused or is data; memory stays
    small whatever the numbers claim."""
    path = tmp_path / "x.gguf"

    def check(data: st.DataObject) -> None:
        pairs = data.draw(layouts.known_loras(("blk.3.attn_v", "blk.4.ffn_up"), one_rank=True))
        good, spots = gguf_file(*layouts.gguf_parts(pairs))
        path.write_bytes(good)
        valid = meaning(api.load_lora(path))
        assert set(valid) == {f"{pair.module}.weight" for pair in pairs}
        bad = data.draw(gguf_mutations(good, spots))
        note(f"{bad.kind} at {bad.where}")
        path.write_bytes(bad.data)
        lora = loaded(path)
        if lora is None:
            return
        if bad.kind in {spot.kind for spot in spots} - set(_MEANS_ANOTHER):
            assert meaning(lora) == valid
        else:
            assert len(lora.targets) <= len(valid)

    fuzz(examples, check)


@pytest.mark.parametrize("examples", [80, SLOW])
def test_npz_headers(examples: int, tmp_path: Path) -> None:
    """A header with one thing wrong is refused, or numpy reads the same from it."""
    path = tmp_path / "adapters.npz"
    plain = {"descr": "<f4", "fortran_order": False, "shape": (5, 2)}
    other: list[Any] = ["<f2", ">f4", "|O", "V4", "<c8", None, True, 1, (), (2, 5), (10,), (5, 2, 1), (5,), (-1,)]
    other.append((1 << 40, 2))
    arrays = {"m.lora_a": np.arange(10, dtype="<f4").reshape(5, 2), "m.lora_b": np.ones((2, 3), "<f4")}
    good = layouts.npz_file(arrays)

    def check(data: st.DataObject) -> None:
        changed: dict[str, Any] = dict(plain)
        key = data.draw(st.sampled_from([*plain, "more"]))
        changed[key] = data.draw(st.sampled_from(other))
        if data.draw(st.booleans()):
            changed.pop(data.draw(st.sampled_from(sorted(changed))))
        bad = layouts.npz_header(good, "m.lora_a", repr(changed))
        note(repr(changed))
        path.write_bytes(bad)
        lora = loaded(path, alpha=2.0, layout="mlx")
        if lora is None:
            return
        with np.load(io.BytesIO(bad), allow_pickle=False) as stored:
            assert np.array_equal(lora.targets[0].A, stored["m.lora_a"].T)

    fuzz(examples, check)


@pytest.mark.parametrize("examples", [100, SLOW])
def test_bytes_of_a_npz(examples: int, tmp_path: Path) -> None:
    """Any byte of the zip: refused, or the arrays are those that Python's own zip module finds, checksums and all."""
    path = tmp_path / "adapters.npz"
    pair = layouts.Known("m", np.ones((1, 2), "<f4"), np.ones((2, 1), "<f4"), 1.0)
    good = layouts.mlx([pair], npz=True)["adapters.npz"]

    def check(data: st.DataObject) -> None:
        bad = data.draw(testing.mutations(good))
        note(f"{bad.kind} at {bad.where}")
        path.write_bytes(bad.data)
        lora = loaded(path, alpha=2.0, layout="mlx")
        if lora is None:
            return
        with zipfile.ZipFile(io.BytesIO(bad.data)) as archive:
            assert archive.testzip() is None
            assert 2 * len(lora.targets) == len(archive.namelist())

    fuzz(examples, check)
