"""Merging into a base: every number against PEFT and rational arithmetic, and byte for byte where nothing changes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ADAPTERS, BASES, random_lora
from models import cast_base, load_all, one_target, peft_merged, random_base, save_base, tree

from lrconvert import api
from lrconvert.api import merge
from lrconvert.core import errors
from lrconvert.core.dtypes import Stored, decode, round_to
from lrconvert.io.checkpoint import open_checkpoint
from lrconvert.io.container import ContainerFile, encode_header
from lrconvert.lora import base_names
from lrconvert.lora.adapter import LoraAdapter, Target, View
from lrconvert.merge import MergeReport, compute
from lrconvert.merge.arithmetic import exact, rational

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

DTYPES = ("F32", "BF16", "F16")
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's


# --- the numbers ----------------------------------------------------------------------------------------------------


PEFT_CASES = [
    *(("tiny-llama", adapter, "F32", True) for adapter in ("llama-patterns", "llama-bf16")),
    *(("tiny-llama", "llama-plain", dtype, wide) for dtype in ("BF16", "F16") for wide in (True, False)),
    *(("tiny-gpt2", "gpt2-conv1d", dtype, dtype == "F32") for dtype in DTYPES),
]


@pytest.mark.parametrize(("base", "adapter", "dtype", "wide"), PEFT_CASES)
def test_never_further_from_exact_than_peft(tmp_path: Path, base: str, adapter: str, dtype: str, wide: bool) -> None:
    """`wide`: PEFT keeps the adapter in float32, as is its default; else in the base's dtype."""
    source = cast_base(BASES / base, tmp_path / "base", dtype)
    api.merge(source, ADAPTERS / adapter, tmp_path / "out")
    expected = peft_merged("CausalLM", source, ADAPTERS / adapter, wide=wide).state_dict()
    weights, after = load_all(source), load_all(tmp_path / "out")
    with open_checkpoint(source) as checkpoint:
        lora = base_names.resolve(api.load_lora(ADAPTERS / adapter), checkpoint)
    better = 0
    for pair in lora.targets:
        name, stored_transposed = pair.target.name, pair.target.view.kind == "transposed"
        w, merged = (x[name].decode().astype(np.float64) for x in (weights, after))
        other = expected[name].double().numpy()
        left, right = (pair.A.T, pair.B.T) if stored_transposed else (pair.B, pair.A)
        nearly = w + np.longdouble(pair.scale) * (left.astype(np.longdouble) @ right.astype(np.longdouble))
        assert (np.abs(merged - nearly) <= np.abs(other - nearly) + np.abs(nearly) * 2.0**-50).all()
        update = exact.Update([exact.Term(pair.scale, left, right)])
        differing = np.argwhere(merged != other)
        for row, col in differing[:: max(1, len(differing) // 50)]:  # and without any rounding, where it matters
            goal = Fraction(w[row, col]) + update.exact(row, col)
            assert abs(Fraction(merged[row, col]) - goal) <= abs(Fraction(other[row, col]) - goal)
        better += len(differing)
    assert better > 1000 or (wide and dtype != "F32")  # where PEFT rounds twice there is something to be better at


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_element_is_the_nearest(tmp_path: Path, dtype: str) -> None:
    """All elements of a small sharded base, against rational arithmetic."""
    lora = random_lora(((12, 16), (16, 20), (9, 5)), rank=3, scale=16 / 8**0.5)
    base = random_base(tmp_path / "base", lora, dtype, shards=2)
    report = merge(base, [lora], tmp_path / "out")
    before, after = load_all(base), load_all(tmp_path / "out")
    for pair in lora.targets:
        update = exact.Update([exact.Term(pair.scale, pair.B, pair.A)])
        w, merged = before[pair.target.name].decode(), after[pair.target.name].array
        for row, col in np.ndindex(*w.shape):
            goal = rational.round_fraction(Fraction(float(w[row, col])) + update.exact(row, col), dtype)
            assert merged.view(f"u{merged.dtype.itemsize}")[row, col] == goal
    assert report.stats.elements == 12 * 16 + 16 * 20 + 9 * 5
    assert report.stats.changed + report.stats.unmoved == report.stats.elements


def test_several_adapters_are_one_sum(tmp_path: Path) -> None:
    """Rounded once: the order does not matter, and opposite adapters cancel to the last bit."""
    one, two = (random_lora(((12, 16), (16, 20)), seed=n, scale=0.3) for n in (1, 2))
    base = random_base(tmp_path / "base", one, "BF16")
    merge(base, [one, two], tmp_path / "ab")
    merge(base, [two, one], tmp_path / "ba")
    assert tree(tmp_path / "ab") == tree(tmp_path / "ba")
    before, after = load_all(base), load_all(tmp_path / "ab")
    for pair, other in zip(one.targets, two.targets, strict=True):
        terms = [exact.Term(p.scale, p.B, p.A) for p in (pair, other)]
        expected, _ = exact.Update(terms).add(before[pair.target.name].array, "BF16")
        assert np.array_equal(after[pair.target.name].array, expected)
    minus = replace(one, targets=tuple(replace(p, scale=-p.scale) for p in one.targets))
    with pytest.raises(errors.NoEffectError, match="zero everywhere"):
        merge(base, [one, minus], tmp_path / "none")
    merge(base, [one, minus], tmp_path / "none", allow_no_op=True)
    assert tree(tmp_path / "none") == tree(base)


VIEWS = [
    ("matrix", (6, 10)),
    ("transposed", (6, 10)),
    ("rows:2:5", (6, 10)),
    ("expert:1", (3, 4, 10)),
    ("conv:3x3:1", (4, 2, 3, 3)),
    ("conv:3:2", (4, 5, 3)),
    ("conv:2x3x2:1", (4, 2, 2, 3, 2)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("view", "shape"), VIEWS)
def test_views(tmp_path: Path, view: str, shape: tuple[int, ...], dtype: str) -> None:
    """Small integers, so that float64 is exact; the config's family keeps the square question out of it."""
    pair = one_target(Target("w.weight", shape, View(view)), whole=True)
    w = np.random.default_rng(5).integers(-9, 9, shape) / 4
    base = save_base(tmp_path / "base", [{"w.weight": Stored(dtype, round_to(w, dtype))}])
    report = merge(base, [LoraAdapter((pair,))], tmp_path / "out")
    change = pair.scale * (pair.B.astype(np.float64) @ pair.A.astype(np.float64))
    expected = w.copy()
    if view == "transposed":
        expected += change.T
    elif view.startswith("rows"):
        expected[2:5] += change
    elif view.startswith("expert"):
        expected[1] += change
    else:
        expected += change.reshape(shape)
    after = load_all(tmp_path / "out")["w.weight"]
    assert np.array_equal(after.array, round_to(expected, dtype))
    assert report.stats.elements == w.size
    assert report.tensors[0].updates == 1


def test_slices_that_overlap_are_summed_before_rounding(tmp_path: Path) -> None:
    shape = (6, 10)
    whole = LoraAdapter((one_target(Target("w.weight", shape), seed=1, whole=True),))
    slices = LoraAdapter(
        tuple(
            one_target(Target("w.weight", shape, View(f"rows:{a}:{b}")), seed=a, whole=True)
            for a, b in ((0, 2), (1, 5))
        )
    )
    w = np.full(shape, 1.0)
    base = save_base(tmp_path / "base", [{"w.weight": Stored("BF16", round_to(w, "BF16"))}])
    report = merge(base, [whole, slices], tmp_path / "out")
    for pair, rows in zip([*whole.targets, *slices.targets], (slice(0, 6), slice(0, 2), slice(1, 5)), strict=True):
        w[rows] += pair.scale * (pair.B.astype(np.float64) @ pair.A.astype(np.float64))
    assert np.array_equal(load_all(tmp_path / "out")["w.weight"].array, round_to(w, "BF16"))
    assert report.tensors[0].updates == 3


def test_views_that_do_not_go_together(tmp_path: Path) -> None:
    w = Stored("F32", np.ones((4, 5, 3), np.float32))
    base = save_base(tmp_path / "base", [{"w.weight": w}])
    adapters = [LoraAdapter((one_target(Target("w.weight", (4, 5, 3), View(v))),)) for v in ("expert:1", "conv:3:1")]
    with pytest.raises(errors.BaseError, match="do not go together"):
        merge(base, adapters, tmp_path / "out")


def test_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes however many rows are computed at a time."""
    lora = random_lora(((50, 16), (16, 90)), rank=3)
    base = random_base(tmp_path / "base", lora, "F16")
    merge(base, [lora], tmp_path / "one")
    monkeypatch.setattr(compute, "rows_per_block", lambda cols: 7)
    merge(base, [lora], tmp_path / "many")
    assert tree(tmp_path / "one") == tree(tmp_path / "many")


def test_compact_adapters_merge_as_they_expand(tmp_path: Path) -> None:
    from lrconvert.methods import base as methods

    lora = random_lora(((24, 16), (16, 40)), rank=4)
    base = random_base(tmp_path / "base", lora, "BF16")
    compact = api.convert(lora, "lowrank", bits=4).compact
    api.write(compact, tmp_path / "small.lrc.safetensors")
    api.merge(base, tmp_path / "small.lrc.safetensors", tmp_path / "out")
    before, after = load_all(base), load_all(tmp_path / "out")
    for target, a, b in methods.expand_all(compact):
        expected, _ = exact.Update([exact.Term(1.0, b, a)]).add(before[target.name].array, "BF16")
        assert np.array_equal(after[target.name].array, expected)


def test_contents_of_the_base_are_checked(tmp_path: Path) -> None:
    """A file that was made with a base at hand names its contents; how they are sharded does not matter."""
    lora = random_lora(((24, 16), (16, 40)))
    base = random_base(tmp_path / "base", lora)
    compact = api.convert(lora, "lowrank", bits=4, base=base).compact
    stored = load_all(base)
    merge(save_base(tmp_path / "sharded", [{n: v} for n, v in stored.items()]), [compact], tmp_path / "one")
    merge(base, [compact], tmp_path / "two")
    assert load_all(tmp_path / "one") == load_all(tmp_path / "two")
    other = random_base(tmp_path / "other", lora, seed=1)
    with pytest.raises(errors.FingerprintError, match=r"E-FPR: .*other contents"):
        merge(other, [compact], tmp_path / "out")


# --- what must not change -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ("tiny-llama", "tiny-llama-bf16", "tiny-gpt2-hub", "tiny-bert", "tiny-vit"))
def test_no_op_is_a_copy(tmp_path: Path, base: str) -> None:
    with open_checkpoint(BASES / base) as checkpoint:
        info = next(i for i in checkpoint.tensors.values() if len(i.shape) == 2 and i.shape[0] != i.shape[1])
    lora = LoraAdapter((one_target(Target(info.name, info.shape), scale=0.0),))
    with pytest.raises(errors.NoEffectError):
        merge(BASES / base, [lora], tmp_path / "out")
    report = merge(BASES / base, [lora], tmp_path / "out", allow_no_op=True)
    assert tree(tmp_path / "out") == tree(BASES / base)
    assert report.stats.changed == 0 and report.total_bytes == sum(map(len, tree(BASES / base).values()))


def test_untouched_bytes_are_copied(tmp_path: Path) -> None:
    """Tensors without a target, headers, the index and every other file: the base's, byte for byte."""
    api.merge(BASES / "tiny-llama", ADAPTERS / "llama-plain", tmp_path / "out")
    before, after = load_all(BASES / "tiny-llama"), load_all(tmp_path / "out")
    updated = {p.target.name for p in api.load_lora(ADAPTERS / "llama-plain").targets}
    assert before.keys() == after.keys() and updated
    for name in before:
        assert (before[name] != after[name]) == (name in updated)
    for name, data in tree(BASES / "tiny-llama").items():
        if name.endswith(".safetensors"):
            length = 8 + int.from_bytes(data[:8], "little")
            assert (tmp_path / "out" / name).read_bytes()[:length] == data[:length]
        else:
            assert (tmp_path / "out" / name).read_bytes() == data


def test_other_files(tmp_path: Path) -> None:
    """Code, templates and tokenizers are copied; weights in other formats, hidden folders and links out are named."""
    lora = random_lora(((12, 16),))
    base = random_base(tmp_path / "base", lora)
    copied = ["modeling_x.py", "tokenizer.model", "additional_chat_templates/a.jinja", ".gitattributes", "README.md"]
    left_out = [
        *("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack", "model.onnx"),
        *("consolidated.safetensors", "original/consolidated.00.pth", "q4.gguf", "link.txt"),
    ]
    for name in [*copied, *left_out[:-1], ".git/config", ".cache/x/y"]:
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(name)
    (tmp_path / "outside.txt").write_text("secret")
    (base / "link.txt").symlink_to(tmp_path / "outside.txt")
    report = merge(base, [lora], tmp_path / "out")
    assert tree(tmp_path / "out").keys() == {*copied, "model.safetensors", "config.json"}
    assert report.left_out == tuple(sorted([*left_out, ".git/", ".cache/"]))
    assert dict(report.files) == {name: len(data) for name, data in tree(tmp_path / "out").items()}


def test_hub_cache_links_become_files(tmp_path: Path) -> None:
    lora = random_lora(((12, 16),))
    plain = random_base(tmp_path / "plain", lora, shards=2)
    repository = tmp_path / "models--a--b"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for n, path in enumerate(sorted(plain.iterdir())):
        shutil.copy(path, blobs / f"blob{n}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob{n}")
    merge(plain, [lora], tmp_path / "one")
    merge(snapshot, [lora], tmp_path / "two")
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert not any(p.is_symlink() for p in (tmp_path / "two").iterdir())


# --- no effect, and failures ----------------------------------------------------------------------------------------


def test_no_effect_has_three_reasons(tmp_path: Path) -> None:
    lora = random_lora(((12, 16),))
    base = random_base(tmp_path / "base", lora, "BF16")
    pair = lora.targets[0]
    tiny = replace(lora, targets=(replace(pair, scale=1e-9),))
    zero = replace(lora, targets=(replace(pair, b=Stored("F32", np.zeros((12, 4), np.float32))),))
    # Zero, but not by a look at the factors: what B reads, A leaves out.
    a, b = np.zeros((2, 16), np.float32), np.zeros((12, 2), np.float32)
    a[0], b[:, 1] = 1, 1
    hidden = replace(lora, targets=(replace(pair, a=Stored("F32", a), b=Stored("F32", b)),))
    for adapters, what in (
        ([], "no target and no other tensor"),
        ([LoraAdapter(())], "no target and no other tensor"),
        ([zero], "the update is zero everywhere"),
        ([hidden], "the update is zero everywhere"),
        ([tiny], "no element moved: all 192 nonzero updates are below the resolution of BF16"),
    ):
        with pytest.raises(errors.NoEffectError, match=f"E-NO-EFFECT: .*{what}.*allow_no_op=True"):
            merge(base, adapters, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        merge(base, adapters, tmp_path / "copy", allow_no_op=True, overwrite=True)
        assert tree(tmp_path / "copy") == tree(base)


class Stop(Exception):
    pass


def failing_merges(tmp_path: Path) -> list[tuple[str, type[BaseException], Any]]:
    lora = random_lora(((12, 16), (16, 20)))
    base = random_base(tmp_path / "base", lora, "F16", shards=2)
    last = lora.targets[1]
    huge = replace(lora, targets=(lora.targets[0], replace(last, scale=1e9)))
    nan = shutil.copytree(base, tmp_path / "nan")
    with ContainerFile(nan / "model-00002-of-00002.safetensors") as file:
        start = file.by_name[last.target.name].start
    data = bytearray((nan / "model-00002-of-00002.safetensors").read_bytes())
    data[start : start + 2] = np.float16(np.nan).tobytes()
    (nan / "model-00002-of-00002.safetensors").write_bytes(data)

    def stop(kind: type[BaseException]) -> Any:
        def progress(fraction: float, text: str) -> None:
            if fraction > 0.6:
                raise kind

        return progress

    return [
        ("overflow", errors.MergeOverflowError, lambda out, **k: merge(base, [huge], out, **k)),
        ("nan", errors.ValueRangeError, lambda out, **k: merge(nan, [lora], out, **k)),
        ("stop", Stop, lambda out, **k: merge(base, [lora], out, progress=stop(Stop), **k)),
        (
            "interrupt",
            KeyboardInterrupt,
            lambda out, **k: merge(base, [lora], out, progress=stop(KeyboardInterrupt), **k),
        ),
    ]


@pytest.mark.parametrize("old", (False, True))
def test_failures_leave_nothing(tmp_path: Path, old: bool) -> None:
    for name, error, run in failing_merges(tmp_path):
        place = tmp_path / f"place-{name}"
        place.mkdir()
        if old:
            save_base(place / "out", [{"w": Stored("F32", np.ones(1, np.float32))}])
        before = tree(place)
        with pytest.raises(error) as caught:
            run(place / "out", overwrite=old)
        if isinstance(caught.value, errors.LrcError):
            assert "tensor 'layers.1.proj.weight': element [" in str(caught.value)
        assert tree(place) == before and len(list(place.iterdir())) == old


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = random_lora(((12, 16), (16, 20)))
    base = random_base(tmp_path / "base", lora)
    real = os.write

    def write(descriptor: int, data: bytes) -> int:
        if len(data) > 1000:
            raise OSError(28, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(errors.FileWriteError, match=r"E-IO-WRITE: .*out/model.safetensors: .*No space left"):
        merge(base, [lora], tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_outputs_that_are_refused(tmp_path: Path) -> None:
    lora = random_lora(((12, 16),))
    base = random_base(tmp_path / "base", lora)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    for out, overwrite, error, what in (
        ("base", True, errors.OutputPathError, "is also the input"),
        ("base/out", False, errors.OutputPathError, "lies inside the input"),
        ("no/out", False, errors.OutputPathError, "does not exist"),
        ("other", False, errors.OutputExistsError, "overwrite=True"),
        ("other", True, errors.OutputPathError, "not a model folder"),
    ):
        with pytest.raises(error, match=what):
            merge(base, [lora], tmp_path / out, overwrite=overwrite)
    merge(base, [lora], tmp_path / "out")
    with pytest.raises(errors.OutputExistsError):
        merge(base, [lora], tmp_path / "out")
    first = tree(tmp_path / "out")
    (tmp_path / "out" / "stale.json").write_text("{}")
    merge(base, [lora], tmp_path / "out", overwrite=True)
    assert tree(tmp_path / "out") == first


def test_missing_target_names_what_is_near(tmp_path: Path) -> None:
    lora = random_lora(((12, 16),))
    base = random_base(tmp_path / "base", lora)
    wrong = replace(lora, targets=(replace(lora.targets[0], target=Target("layers.9.proj.weight", (12, 16))),))
    with pytest.raises(errors.BaseError, match=r"'layers.9.proj.weight' is not in the base.*layers.0.proj.weight"):
        merge(base, [wrong], tmp_path / "out")


def test_quantized_bases_are_refused(tmp_path: Path) -> None:
    lora = random_lora(((12, 16),))
    base = save_base(tmp_path / "i8", [{"layers.0.proj.weight": Stored("I8", np.ones((12, 16), np.int8))}])
    with pytest.raises(errors.QuantizedBaseError, match=r"E-BASE-QUANT: .*is stored as I8. Use the unquantized parent"):
        merge(base, [lora], tmp_path / "out")
    base = random_base(tmp_path / "q", lora)
    (base / "config.json").write_text('{"quantization_config": {"bits": 4}}')
    with pytest.raises(errors.QuantizedBaseError):
        merge(base, [lora], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- planning and reporting -----------------------------------------------------------------------------------------


def test_report_and_progress(tmp_path: Path) -> None:
    lora = random_lora(((12, 16), (16, 20)), scale=0.01)
    base = random_base(tmp_path / "base", lora, "BF16", shards=2)
    seen: list[tuple[float, str]] = []
    report = merge(base, [lora, lora], tmp_path / "out", progress=lambda f, text: seen.append((f, text)))
    assert isinstance(report, MergeReport) and not report.dry_run
    assert [(t.name, t.dtype, t.shape, t.updates) for t in report.tensors] == [
        ("layers.0.proj.weight", "BF16", (12, 16), 2),
        ("layers.1.proj.weight", "BF16", (16, 20), 2),
    ]
    before, after = load_all(base), load_all(tmp_path / "out")
    for pair, row in zip(lora.targets, report.tensors, strict=True):
        w, merged = (decode(x[row.name].array, "BF16").astype(np.float64) for x in (before, after))
        goal = w + 2 * pair.scale * (pair.B.astype(np.float64) @ pair.A.astype(np.float64))
        errors = np.abs(merged - goal)
        assert row.stats.changed == np.count_nonzero(merged != w)
        assert row.stats.unmoved == np.count_nonzero((merged == w) & (goal != w))
        assert row.stats.max_error == pytest.approx(errors.max(), rel=1e-4)
        assert row.stats.mean_error == pytest.approx(errors.mean(), rel=1e-4)
    fractions = [f for f, _ in seen]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0


def test_merging_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        api.merge(BASES / "tiny-bert", ADAPTERS / "bert-classifier", tmp_path / name)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_base(tmp_path: Path) -> None:
    """A tensor of 1 GB in bf16: at most 512 MB above the interpreter."""
    rows, cols = 65536, 8192
    header = encode_header([("layers.0.proj.weight", "BF16", (rows, cols))], {"format": "pt"})
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "llama"}')
    with (base / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 2 * rows * cols)  # a sparse file
    program = f"""
import sys
from pathlib import Path
import numpy as np
from lrconvert.lora.adapter import *
from lrconvert.core.dtypes import Stored
from lrconvert.api import merge
rng = np.random.default_rng(0)
a = Stored("F32", rng.standard_normal((4, {cols})).astype("f4"))
b = Stored("F32", rng.standard_normal(({rows}, 4)).astype("f4"))
lora = LoraAdapter((LoraTarget(Target("layers.0.proj.weight", ({rows}, {cols})), a, b, 1.0),))
def peak():  # not getrusage, which in a child starts with the peak of the process that started it
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
before = peak()
merge(Path(sys.argv[1]) / "base", [lora], Path(sys.argv[1]) / "out")
print((peak() - before) // 1000)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 512
