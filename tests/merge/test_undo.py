"""Undoing merges: every byte of the base comes back, or nothing is touched and the reason is named."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ADAPTERS, BASES, random_lora
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import cast_base, extra, load_all, one_target, random_base, save_base, tree

from lrconvert import api
from lrconvert.api import merge, unmerge, verify
from lrconvert.core.dtypes import FLOATS, STORAGE, Stored, round_to
from lrconvert.core.errors import DigestError, FingerprintError, LrcError, OutputExistsError, UndoError, UndoOrderError
from lrconvert.io import durable
from lrconvert.lora.adapter import LoraAdapter, Target, View
from lrconvert.merge import Scaled, compute
from lrconvert.merge.arithmetic import exact
from lrconvert.merge.signed_json import sign
from lrconvert.merge.undo import residual
from lrconvert.merge.undo.open_record import RECORD_NAME, OpenRecord, numbered
from lrconvert.testing import mutations
from lrconvert.testing.container_versions import raw_version_1

DTYPES = ("F32", "BF16", "F16", "F64")


# --- codes ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_codes_hold_any_bits(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(FLOATS))
    kind = STORAGE[dtype]
    count = data.draw(st.integers(1, 50))
    pattern = st.lists(st.integers(0, 2 ** (8 * kind.itemsize) - 1), min_size=count, max_size=count)
    base = np.array(data.draw(pattern), f"<u{kind.itemsize}").view(kind)
    near = np.array(data.draw(st.lists(st.integers(-3, 3), min_size=count, max_size=count)))
    far = np.array(data.draw(pattern), f"<u{kind.itemsize}").view(kind)
    close = (base.view(f"<i{kind.itemsize}") + near.astype(f"<i{kind.itemsize}")).view(kind)
    for guess in (far, close, base):
        restored = residual.decode_residual(residual.encode_residual(base, guess), guess)
        assert restored.tobytes() == base.tobytes() and restored.dtype == base.dtype
        assert residual.decode_xor(residual.encode_xor(base, guess), guess).tobytes() == base.tobytes()


def test_codes_are_small() -> None:
    """bf16 weights and an update of 8 %: under 5 % of the bytes, as the note on the format says."""
    rng = np.random.default_rng(0)
    w = round_to(rng.standard_normal((512, 1024)) * 0.02, "BF16")
    left, right = rng.standard_normal((512, 8)), rng.standard_normal((8, 1024))
    update = exact.Update([exact.Term(0.02 * 0.08 / 8**0.5, left.astype("<f4"), right.astype("<f4"))])
    merged, _ = update.add(w, "BF16")
    guess, _ = update.negated().add(merged, "BF16")
    assert 0.02 < np.mean(w != guess) < 0.12  # subtracting is not an inverse
    assert len(residual.encode_residual(w.reshape(-1), guess.reshape(-1))) < 0.05 * w.nbytes


@pytest.mark.parametrize("cut", (0, 5, 23, -1))
def test_damaged_codes_are_refused(cut: int) -> None:
    base = np.arange(40, dtype="<u2")
    data = residual.encode_residual(base, base + np.uint16(1))
    with pytest.raises(UndoError):
        residual.decode_residual(data[:cut], base)
    with pytest.raises(UndoError):
        residual.decode_xor(residual.encode_xor(base, base + np.uint16(1)), base[:-1])


# --- the law --------------------------------------------------------------------------------------------------------

MODELS = [
    ("llama-plain", "tiny-llama"),
    ("llama-dora", "tiny-llama"),
    ("llama-patterns", "tiny-llama"),
    ("llama-rslora", "tiny-llama"),
    ("llama-lmhead", "tiny-llama"),
    ("llama-tied-bf16", "tiny-llama-bf16"),
    ("gpt2-conv1d", "tiny-gpt2"),
    ("gpt2-conv1d", "tiny-gpt2-hub"),
    ("bert-classifier", "tiny-bert"),
    ("vit-query-value", "tiny-vit"),
]


@pytest.mark.medium
@pytest.mark.parametrize(("adapter", "base"), MODELS)
@pytest.mark.parametrize("dtype", ("F32", "BF16", "F16"))
def test_every_byte_comes_back(adapter: str, base: str, dtype: str, tmp_path: Path) -> None:
    folder = cast_base(BASES / base, tmp_path / "base", dtype)
    before = tree(folder)
    merged = api.merge(folder, ADAPTERS / adapter, tmp_path / "out")
    assert merged.can_undo and tree(folder) == before
    assert api.verify(tmp_path / "out", folder, ADAPTERS / adapter).ok
    report = api.unmerge(tmp_path / "out", tmp_path / "back")
    assert report.verified and not report.warnings and report.remaining == 0
    assert tree(tmp_path / "back") == before
    api.unmerge(tmp_path / "out")
    assert tree(tmp_path / "out") == before and not (tmp_path / "out" / ".lrconvert").exists()


VIEWS = {
    "matrix": (Target("w", (40, 24)), DTYPES),
    "transposed": (Target("w", (40, 24), View("transposed")), DTYPES),
    "conv": (Target("w", (16, 4, 3, 2), View("conv:3x2:2")), DTYPES),
    "conv3d": (Target("w", (16, 4, 1, 3, 2), View("conv:1x3x2:1")), ("F32", "BF16")),
    "rows": (Target("w", (40, 24), View("rows:8:20")), DTYPES),
    "expert": (Target("w", (3, 10, 12), View("expert:1")), DTYPES),
    "expert_transposed": (Target("w", (3, 10, 12), View("expert_transposed:2")), DTYPES),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_views_come_back(view: str, dtype: str, tmp_path: Path) -> None:
    lora = LoraAdapter((one_target(VIEWS[view][0], scale=0.01),))
    base = random_base(tmp_path / "base", lora, dtype)
    merge(base, [lora], tmp_path / "out")
    unmerge(tmp_path / "out", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(base)


def test_blocks_and_sparse_updates_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of few rows; updates of few rows or columns, whose codes hold only those."""
    monkeypatch.setattr(compute, "BLOCK_BYTES", 8 * 64 * 7)
    rng = np.random.default_rng(0)
    pair = one_target(Target("w", (100, 64)), scale=1e-3)
    a, b = pair.A.copy(), np.zeros_like(pair.B)
    b[rng.choice(100, 5, replace=False)] = rng.standard_normal((5, 3))
    rows = LoraAdapter((type(pair)(pair.target, pair.a, Stored("F32", b), pair.scale),))
    a[:, rng.choice(64, 60, replace=False)] = 0
    cols = LoraAdapter((type(pair)(pair.target, Stored("F32", a), pair.b, pair.scale),))
    base = random_base(tmp_path / "base", rows, "BF16")
    sizes = {}
    for name, lora in (("rows", rows), ("cols", cols), ("whole", LoraAdapter((pair,)))):
        merge(base, [lora], tmp_path / name)
        with OpenRecord(next(iter(numbered(tmp_path / name).values()))) as opened:
            (tensor,) = [t for t in opened.record.tensors if t.codes]
            sizes[name] = sum(code.nbytes for code in tensor.codes)
            assert name == "rows" or len(tensor.codes) > 10
        unmerge(tmp_path / name, tmp_path / f"back-{name}")
        assert tree(tmp_path / f"back-{name}") == tree(base)
    assert sizes["rows"] < sizes["whole"] and sizes["cols"] < sizes["whole"]


def test_weights_at_the_end_of_the_range_come_back(tmp_path: Path) -> None:
    """What no subtraction restores: weights that vanish beside the update, zeros of both signs, the largest number,
    infinities and NaN that are not touched."""
    top = np.finfo(np.float16).max
    values = np.array([[1e-7, -1e-7, 0.0, -0.0, top, -top], [3.0, np.inf, np.nan, 1.0, 2.0**-24, 5.0]], np.float16)
    b = np.array([[1.0], [0.0]], np.float32)
    a = np.array([[100.0, -100.0, 1.0, 1.0, -8.0, 8.0]], np.float32)
    pair = one_target(Target("w", (2, 6)))
    lora = LoraAdapter((type(pair)(pair.target, Stored("F32", a), Stored("F32", b), 1.0),))
    base = save_base(tmp_path / "base", [{"w": Stored("F16", values)}])
    merge(base, [lora], tmp_path / "out")
    unmerge(tmp_path / "out", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(base)


def test_several_scaled_adapters_and_other_shards(tmp_path: Path) -> None:
    one, two = (random_lora(((48, 32), (32, 40)), seed=n, scale=0.3) for n in (1, 2))
    base = random_base(tmp_path / "base", one, "BF16", shards=2)
    inputs = [Scaled(one, 0.25, "one"), Scaled(two, -1.5, "two")]
    merge(base, inputs, tmp_path / "out", shard_bytes=2575)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) == 3
    assert verify(tmp_path / "out", base, inputs).ok
    assert not verify(tmp_path / "out", base, [one, two]).ok
    unmerge(tmp_path / "out", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(base)
    merge(base, inputs, tmp_path / "single", shard_bytes=10**9)
    assert {p.name for p in (tmp_path / "single").glob("*.safetensors*")} == {"model.safetensors"}
    unmerge(tmp_path / "single", tmp_path / "again")
    assert tree(tmp_path / "again") == tree(base)
    assert load_all(tmp_path / "out") == load_all(tmp_path / "single")


def test_shards_load_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    api.merge(BASES / "tiny-llama", ADAPTERS / "llama-plain", tmp_path / "out", shard_bytes=40_000)
    api.merge(BASES / "tiny-llama", ADAPTERS / "llama-plain", tmp_path / "whole", undo=False)
    models = [transformers.AutoModelForCausalLM.from_pretrained(tmp_path / n).state_dict() for n in ("out", "whole")]
    assert all((models[0][n] == models[1][n]).all() for n in models[1])


def test_heads_and_replaced_tensors_come_back(tmp_path: Path) -> None:
    """A replaced tensor of another shape, a replaced one of the same, an added one."""
    lora = api.load_lora(ADAPTERS / "bert-classifier")
    report = merge(BASES / "tiny-bert", [lora], tmp_path / "out")
    assert report.added or report.placed
    done = unmerge(tmp_path / "out", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(BASES / "tiny-bert")
    assert set(done.removed) == set(report.added)
    pair = one_target(Target("model.layers.0.w.weight", (4, 8)))
    names = ("model.embed_tokens.weight", "lm_head.weight")
    stored = {n: Stored("BF16", round_to(np.ones((6, 8)), "BF16")) for n in names}
    stored["model.layers.0.w.weight"] = Stored("BF16", round_to(np.eye(4, 8), "BF16"))
    base = save_base(tmp_path / "base", [stored], {"vocab_size": 6, "tie_word_embeddings": False})
    extras = tuple(extra(n, np.full((9, 8), 0.5), "BF16") for n in names)
    grown = merge(base, [LoraAdapter((pair,), extras)], tmp_path / "grown")
    assert grown.config == {"vocab_size": 9}
    unmerge(tmp_path / "grown", tmp_path / "shrunk")
    assert tree(tmp_path / "shrunk") == tree(base)


# --- stacks ---------------------------------------------------------------------------------------------------------


def test_merges_on_merges_undo_in_turn(tmp_path: Path) -> None:
    one, two = (random_lora(((48, 32), (32, 40)), seed=n, scale=0.3) for n in (1, 2))
    base = random_base(tmp_path / "base", one, "BF16")
    merge(base, [one], tmp_path / "first")
    merge(tmp_path / "first", [two], tmp_path / "second")
    assert sorted(numbered(tmp_path / "second")) == [1, 2]
    with pytest.raises(UndoOrderError, match="Undo merge 2 first"):
        unmerge(tmp_path / "second", tmp_path / "out", number=1)
    with pytest.raises(UndoError, match="no record of a merge 3"):
        unmerge(tmp_path / "second", tmp_path / "out", number=3)
    assert not (tmp_path / "out").exists()
    done = unmerge(tmp_path / "second", tmp_path / "out", number=2)
    assert done.remaining == 1
    files = {p.relative_to(tmp_path / "first"): p.read_bytes() for p in (tmp_path / "first").rglob("*") if p.is_file()}
    restored = {p.relative_to(tmp_path / "out"): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert restored == files  # the record of the first merge too
    unmerge(tmp_path / "out")
    assert tree(tmp_path / "out") == tree(base)


def test_a_compact_file_for_the_first_base_goes_on_top(tmp_path: Path) -> None:
    """Its base is the one below; another base is refused, also after all was computed."""
    base = BASES / "tiny-llama"
    made = api.convert(api.load_lora(ADAPTERS / "llama-plain"), "lowrank", bits=14, base=base)
    api.merge(base, ADAPTERS / "llama-rslora", tmp_path / "first")
    api.merge(tmp_path / "first", made.compact, tmp_path / "second")
    api.unmerge(tmp_path / "second")
    with pytest.raises(UndoOrderError, match="number=1"):  # it might be the same command, repeated after a kill
        api.unmerge(tmp_path / "second")
    api.unmerge(tmp_path / "second", number=1)
    assert tree(tmp_path / "second") == tree(base)
    other = cast_base(base, tmp_path / "other", "F16")
    with pytest.raises(FingerprintError):
        api.merge(other, made.compact, tmp_path / "third")
    with pytest.raises(FingerprintError):
        api.merge(other, made.compact, tmp_path / "third", dry_run=True)
    assert not (tmp_path / "third").exists()


def test_a_record_with_a_file_of_container_version_1_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a program of that time left it: what stands in the record is read, in whatever version."""
    base = BASES / "tiny-llama"
    made = api.convert(api.load_lora(ADAPTERS / "llama-plain"), "sbora", base=base).compact
    with monkeypatch.context() as patch:
        patch.setattr("lrconvert.formats.lrc.file.encode", lambda compact: iter([raw_version_1(compact).file()]))
        api.merge(base, made, tmp_path / "out")
    (stored,) = (tmp_path / "out").rglob("adapter-*.lrc")
    assert b"__metadata__" in stored.read_bytes()[:30]
    assert verify(tmp_path / "out", base, [made]).ok
    api.unmerge(tmp_path / "out")
    assert tree(tmp_path / "out") == tree(base)


# --- without a record -----------------------------------------------------------------------------------------------


def test_the_index_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that is broken off while it is written is not taken for a model."""
    written: list[str] = []
    real = durable.StagedDirectory.create

    def create(folder: durable.StagedDirectory, name: str) -> object:
        written.append(name)
        return real(folder, name)

    monkeypatch.setattr(durable.StagedDirectory, "create", create)
    lora = random_lora(((48, 32), (32, 40)))
    merge(random_base(tmp_path / "base", lora, shards=2), [lora], tmp_path / "out")
    assert written[-2:] == ["config.json", "model.safetensors.index.json"]
    written.clear()
    unmerge(tmp_path / "out", tmp_path / "back")
    assert written[-2:] == ["config.json", "model.safetensors.index.json"]


def test_without_undo_the_base_is_needed(tmp_path: Path) -> None:
    base, out = BASES / "tiny-llama", tmp_path / "out"
    report = api.merge(base, ADAPTERS / "llama-plain", out, undo=False)
    assert not report.can_undo and not list(out.rglob("undo.bin"))
    with pytest.raises(UndoError, match="undo=False"):
        api.unmerge(out, tmp_path / "back")
    other = cast_base(base, tmp_path / "other", "F16")
    with pytest.raises(FingerprintError):
        api.unmerge(out, tmp_path / "back", from_base=other)
    assert not (tmp_path / "back").exists()
    assert api.unmerge(out, tmp_path / "back", from_base=base).verified
    assert tree(tmp_path / "back") == tree(base)


def test_without_a_record_nothing_is_verified(tmp_path: Path) -> None:
    base, out = BASES / "tiny-llama", tmp_path / "out"
    api.merge(base, ADAPTERS / "llama-plain", out)
    shutil.rmtree(out / ".lrconvert")
    with pytest.raises(UndoError, match="from_base="):
        api.unmerge(out, tmp_path / "back")
    report = api.unmerge(out, tmp_path / "back", from_base=base)
    assert not report.verified and report.warnings
    assert tree(tmp_path / "back") == tree(base)
    with pytest.raises(LrcError, match="E-BASE"):
        api.unmerge(out, tmp_path / "wrong", from_base=BASES / "tiny-bert")


# --- changed models and records -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small merge with every kind of code: residuals, XOR (DoRA), stored bytes (a head that is replaced)."""
    folder = tmp_path_factory.mktemp("merged")
    lora = LoraAdapter((one_target(Target("w", (12, 16)), scale=0.01),), (extra("score.weight", np.ones((3, 4))),))
    stored = {
        "w": Stored("BF16", round_to(np.random.default_rng(0).standard_normal((12, 16)), "BF16")),
        "score.weight": Stored("F32", np.zeros((2, 4), "<f4")),
        "norm": Stored("F32", np.ones(5, "<f4")),
    }
    config = {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}
    base = save_base(folder / "base", [stored], config)
    merge(base, [lora], folder / "out")
    return folder


def copied(merged: Path, to: Path) -> Path:
    shutil.copytree(merged / "out", to)
    return to


def test_the_fixture_is_undone(merged: Path, tmp_path: Path) -> None:
    unmerge(merged / "out", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(merged / "base")


@pytest.mark.medium
def test_every_flipped_byte_is_found(merged: Path, tmp_path: Path) -> None:
    """Of the record and of the weights; in the header of the weights it is found or does no harm, as the base's own
    comes from the record."""
    out = copied(merged, tmp_path / "out")
    for path in sorted(p for p in out.rglob("*") if (p.is_file() and p.parent != out) or p.suffix == ".safetensors"):
        data = path.read_bytes()
        header = 8 + int.from_bytes(data[:8], "little") if path.parent == out else 0
        for at in range(len(data)):
            path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            try:
                unmerge(out, tmp_path / "back")
            except LrcError:
                continue
            assert at < header and tree(tmp_path / "back") == tree(merged / "base"), (path.name, at)
            shutil.rmtree(tmp_path / "back")
        path.write_bytes(data)
    assert not (tmp_path / "back").exists()
    unmerge(out, tmp_path / "back")


@settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@pytest.mark.medium
def test_records_of_strangers(merged: Path, data: st.DataObject) -> None:
    """One thing changed in a record and signed anew: our own error, or the base all the same."""
    place = next((merged / "out").rglob(RECORD_NAME))
    text = place.read_bytes()
    changed = data.draw(mutations(text)).data
    with contextlib.suppress(ValueError, TypeError, RecursionError, UnicodeError):
        changed = sign(json.loads(changed))
    with tempfile.TemporaryDirectory() as folder:
        out, back = Path(folder) / "out", Path(folder) / "back"
        shutil.copytree(merged / "out", out)
        (out / place.relative_to(merged / "out")).write_bytes(changed)
        try:
            report = unmerge(out, back)
        except LrcError:
            assert not back.exists()
        else:
            assert report.verified  # names of files are what the record says, bytes are not
            assert sorted(tree(back).values()) == sorted(tree(merged / "base").values())


def change_weight(out: Path) -> None:
    path = out / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


def drop_codes(out: Path) -> None:
    next(out.rglob("undo.bin")).unlink()


def add_tensor(out: Path) -> None:
    stored = load_all(out) | {"more": Stored("F32", np.ones(2, "<f4"))}
    (out / "model.safetensors").unlink()
    moved = save_base(out.parent / "new", [stored])
    shutil.move(moved / "model.safetensors", out)


def newer(out: Path) -> None:
    path = next(out.rglob(RECORD_NAME))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 3}))


def link_codes(out: Path) -> None:
    path = next(out.rglob("undo.bin"))
    path.rename(out.parent / "elsewhere")
    path.symlink_to(out.parent / "elsewhere")


def header_lies(out: Path) -> None:
    """The kept header of a weight file states another length than it has, and all digests are made right."""
    header, place = next(out.rglob("0.header")), next(out.rglob(RECORD_NAME))
    header.write_bytes((len(header.read_bytes()) - 9).to_bytes(8, "little") + header.read_bytes()[8:])
    value = json.loads(place.read_bytes())
    value["stored"]["base/0.header"] = hashlib.sha256(header.read_bytes()).hexdigest()
    place.write_bytes(sign(value))


def twice(out: Path) -> None:
    (place,) = (out / ".lrconvert").iterdir()
    shutil.copytree(place, place.parent / "merge-1-000000000000")


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a weight": (change_weight, "E-DIGEST"),
    "codes gone": (drop_codes, "E-UNDO"),
    "a tensor more": (add_tensor, "E-UNDO"),
    "a newer record": (newer, "E-VER"),
    "a header of another length": (header_lies, "E-UNDO"),
    "codes are a link": (link_codes, "E-UNDO"),
    "two records of one number": (twice, "E-UNDO"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_changed_since_is_refused(what: str, merged: Path, tmp_path: Path) -> None:
    out = copied(merged, tmp_path / "out")
    CHANGES[what][0](out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    for place in (tmp_path / "back", None):
        with pytest.raises(LrcError) as caught:
            unmerge(out, place)
        assert caught.value.code == CHANGES[what][1] and str(out) in str(caught.value)
    assert not (tmp_path / "back").exists()
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_other_files_stay_as_they_are(merged: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(merged / "base", base)
    for name in ("tokenizer.json", "notes.txt", "gone.txt"):
        (base / name).write_text(name)
    lora = LoraAdapter((one_target(Target("w", (12, 16)), scale=0.01),))
    merge(base, [lora], tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("changed")
    (tmp_path / "out" / "new.txt").write_text("new")
    (tmp_path / "out" / "gone.txt").unlink()
    report = unmerge(tmp_path / "out", tmp_path / "back")
    assert [w.split()[0] for w in report.warnings] == ["new.txt", "notes.txt", "gone.txt"]
    assert (tmp_path / "back" / "notes.txt").read_text() == "changed"
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "tokenizer.json"
    with pytest.raises(OutputExistsError):
        unmerge(tmp_path / "out", tmp_path / "back")
    with pytest.raises(DigestError):
        change_weight(tmp_path / "out")
        unmerge(tmp_path / "out", tmp_path / "back", overwrite=True)
    assert (tmp_path / "back" / "new.txt").exists()


# --- verify ---------------------------------------------------------------------------------------------------------


def test_verify_names_what_differs(merged: Path, tmp_path: Path) -> None:
    lora = LoraAdapter((one_target(Target("w", (12, 16)), scale=0.01),), (extra("score.weight", np.ones((3, 4))),))
    out = copied(merged, tmp_path / "out")
    assert verify(out, merged / "base", [lora]).ok
    stored = load_all(out)
    stored["norm"].array[2] = 3
    del stored["score.weight"]
    stored["more"] = Stored("F32", np.ones(2, "<f4"))
    wrong = save_base(tmp_path / "wrong", [stored], {"model_type": "llama"})
    report = verify(wrong, merged / "base", [lora])
    names = [d.name for d in report.differences]
    assert names == ["score.weight", "more", "config.json: architectures", "config.json: id2label", "norm"] or (
        names[:2] == ["score.weight", "more"] and names[-1] == "norm"
    )
    assert report.differences[-1].elements == 1
