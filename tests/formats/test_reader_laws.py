"""Laws of every reader over `lrconvert.testing.samples`. A reader without one fails, by its name."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from conftest import dense
from test_base_names import make_base

from lrconvert import cli
from lrconvert.core import errors
from lrconvert.core.dtypes import Array
from lrconvert.formats import readers
from lrconvert.formats.readers.base import Reader, all_readers, ids, load, named
from lrconvert.formats.readers.shared.folders import CONFIG_NAME
from lrconvert.formats.readers.shared.options import ReadOptions
from lrconvert.formats.readers.shared.weights import open_weights
from lrconvert.lora.adapter import LoraAdapter
from lrconvert.methods import base as methods
from lrconvert.testing import layouts, samples
from lrconvert.testing.gguf import gguf_file
from lrconvert.testing.layouts import Known, safetensors_file
from lrconvert.testing.samples import Sample


def sample_of(reader_id: str) -> Sample:
    if reader_id not in samples.SAMPLES:
        pytest.fail(f"the reader {reader_id!r} has no sample in lrconvert/testing/samples.py")
    return samples.SAMPLES[reader_id]()


@dataclass(frozen=True)
class Case:
    """A reader and its sample on the disk; `options` are what a user must say."""

    reader: Reader
    sample: Sample
    folder: Path
    options: dict[str, Any]

    def load(self, folder: Path | None = None, **changes: Any) -> Any:
        return load(folder or self.folder, ReadOptions(**{**self.options, **changes}))

    def rewritten(self, tensors: dict[str, Array]) -> Path:
        """The folder with these tensors in its file of weights, whose metadata stay."""
        (file,) = self.folder.glob("*.safetensors")
        with safetensors.safe_open(file, "np") as opened:
            metadata = opened.metadata() or {}
        file.write_bytes(safetensors_file(tensors, metadata))
        return self.folder


@pytest.fixture(params=ids())
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    sample = sample_of(request.param)
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name, data in sample.files.items():
        (folder / name).write_bytes(data)
    options: dict[str, Any] = {} if sample.alpha is None else {"alpha": sample.alpha}
    if sample.base:
        options["base"] = make_base(tmp_path / "base", sample.base, {})
    return Case(named(request.param), sample, folder, options)


def test_a_reader_without_a_sample_fails_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(samples.SAMPLES) == set(ids())
    (tmp_path / "nobody.py").write_text("READER = None\n")
    monkeypatch.setattr(readers, "__path__", [*readers.__path__, str(tmp_path)])
    assert "nobody" in ids()
    with pytest.raises(pytest.fail.Exception, match="'nobody' has no sample"):
        sample_of("nobody")


def test_a_reader_has_the_name_of_its_module(case: Case) -> None:
    assert case.reader.id in ids() and case.reader.title
    assert [reader.id for reader in all_readers()] == ids()


def test_it_is_recognised_by_this_reader_alone(case: Case) -> None:
    claims = [reader.id for reader in all_readers() if reader.recognises(case.folder)]
    if not claims:
        (file,) = case.folder.iterdir()
        claims = [reader.id for reader in all_readers() if reader.recognises(file)]
    if not claims:
        with open_weights(file, ReadOptions()) as weights:
            names = [info.name for info in weights.tensors]
        claims = [reader.id for reader in all_readers() if reader.knows(names)]
    assert claims == [case.reader.id]


def test_the_update_is_known(case: Case) -> None:
    """A is (r, in), B (out, r); targets are sorted; the source has a digest."""
    adapter = case.load()
    if isinstance(adapter, LoraAdapter):
        targets = list(adapter.shapes())
        updates = {pair.target.name: dense(pair) for pair in adapter.targets}
        for pair in adapter.targets:
            assert pair.a.shape == (pair.rank, pair.target.in_features)
            assert pair.b.shape == (pair.target.out_features, pair.rank)
    else:
        targets = list(adapter.targets)
        updates = {target.name: b.astype(np.float64) @ a for target, a, b in methods.expand_all(adapter)}
    assert targets == sorted(targets) and updates.keys() == case.sample.updates.keys()
    for name, update in case.sample.updates.items():
        np.testing.assert_allclose(updates[name], update, rtol=1e-6, atol=1e-7)
    assert len(adapter.provenance.source) == 64 and adapter.provenance.fields["source_format"]


def test_from_names_the_reader(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    """`--from` on the command line, and of the weights alone where no configuration is needed."""
    words = [word for name, value in case.options.items() for word in (f"--{name}", str(value))]
    cli.cli(["inspect", str(case.folder), "--json", "--from", case.reader.id, *words], standalone_mode=False)
    shown = json.loads(capsys.readouterr().out)
    assert [target["name"] for target in shown["targets"]] == sorted(case.sample.updates)
    if CONFIG_NAME not in case.sample.files:
        (file,) = case.folder.iterdir()
        assert case.load(file, layout=case.reader.id) == case.load()


def test_an_alpha_is_taken_or_refused(case: Case) -> None:
    if not case.reader.takes_alpha:
        with pytest.raises(errors.OptionError, match="does not take an alpha"):
            case.load(alpha=2.0)
    elif case.sample.alpha is not None:
        once, twice = case.load(), case.load(alpha=2 * case.sample.alpha)
        assert [pair.scale for pair in twice.targets] == [2 * pair.scale for pair in once.targets]
        with pytest.raises(errors.ConfigError, match="alpha="):
            case.load(alpha=None)


def test_another_reader_refuses_it_with_an_error_of_ours(case: Case) -> None:
    for other in set(ids()) - {case.reader.id}:
        try:
            case.load(layout=other, alpha=None)
        except errors.LrcError as error:
            assert str(error).isprintable()


@pytest.mark.medium
def test_a_tensor_of_another_shape_is_read_or_refused(case: Case) -> None:
    """Each tensor in turn with dimensions more, fewer or exchanged, also both of a pair: nothing but errors of ours."""
    files = list(case.folder.glob("*.safetensors"))
    if not files:
        pytest.skip("its tensors are in a file of another kind")
    tensors = safetensors.numpy.load_file(files[0])
    shapes = {
        name: [(*s, 1), (1, *s), s[::-1], (array.size,), (*s[:-1], 1, s[-1]), (*s[:-2], 1, *s[-2:])]
        for name, array in tensors.items()
        if len(s := array.shape) > 1
    }
    changes = [{name: shape} for name, each in shapes.items() for shape in each]
    changes += [
        {one: shape, other: more}
        for one, each in shapes.items()
        for other, others in shapes.items()
        if one < other
        for shape in each
        for more in others
    ]
    for change in changes:
        try:
            case.load(case.rewritten({n: a.reshape(change.get(n, a.shape)) for n, a in tensors.items()}))
        except errors.LrcError as error:
            assert str(error).isprintable()


def test_a_file_that_was_cut_off_is_refused(case: Case) -> None:
    file = max(case.folder.iterdir(), key=lambda path: path.name != CONFIG_NAME)
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(errors.LrcError) as caught:
        case.load()
    assert case.folder.name in str(caught.value)


def test_every_tensor_counts(case: Case) -> None:
    """One more is carried along, named in a warning, or refused by name; one less is missed, or changes the adapter;
    NaN is refused by name."""
    files = list(case.folder.glob("*.safetensors"))
    if not files:
        pytest.skip("no safetensors file")
    whole, tensors = case.load(), safetensors.numpy.load_file(files[0])
    prefix = layouts.PEFT_PREFIX if any(name.startswith(layouts.PEFT_PREFIX) for name in tensors) else ""
    try:
        adapter = case.load(case.rewritten({**tensors, f"{prefix}unheard.of": np.ones(3, np.float32)}))
    except errors.LrcError as error:
        assert "unheard.of" in str(error)
    else:
        assert any(extra.name == "unheard.of" for extra in adapter.extras)
    for name in tensors:
        fewer = case.rewritten({key: value for key, value in tensors.items() if key != name})
        try:
            assert case.load(fewer) != whole
        except errors.LrcError as error:
            assert str(error).isprintable()
        if tensors[name].dtype.kind == "f":
            try:
                case.load(case.rewritten({**tensors, name: np.full_like(tensors[name], np.nan)}))
            except errors.LrcError as error:
                assert error.code in ("E-VALUE", "E-DIGEST")
            else:
                assert name in [extra.name for extra in whole.extras]


# --- what a file states ---------------------------------------------------------------------------------------------


def said(case: Case, before: Any, words: str) -> bool:
    """Whether a setting that was added is refused by name, changes a scale, or is named in a warning."""
    try:
        adapter = case.load()
    except errors.LrcError as error:
        return words in str(error)
    if any(words in line for line in adapter.warnings):
        return True
    return isinstance(adapter, LoraAdapter) and [p.scale for p in adapter.targets] != [p.scale for p in before.targets]


def test_a_stated_setting_is_used_or_named(case: Case) -> None:
    """Among the metadata of the file, in the configuration, and among the fields of a GGUF file."""
    before = case.load()
    for name in ("unheard_of", "lora_alpha", "scaling"):
        for path in case.folder.iterdir():
            stored = path.read_bytes()
            if path.suffix == ".safetensors":
                tensors = safetensors.numpy.load(stored)
                with safetensors.safe_open(path, "np") as file:
                    metadata = file.metadata() or {}
                path.write_bytes(safetensors_file(tensors, {**metadata, name: "7"}))
            elif path.name == CONFIG_NAME:
                config = json.loads(stored)
                if name in config:
                    continue
                path.write_text(json.dumps({**config, name: 7}))
            elif path.suffix == ".gguf":
                fields, described = layouts.gguf_parts(
                    [Known("blk.3.attn_v", np.ones((2, 8), "<f4"), np.ones((6, 2), "<f4"), 3.0)]
                )
                path.write_bytes(gguf_file({**fields, f"adapter.lora.{name}": 7.0}, described)[0])
            assert said(case, before, name), (path.name, name)
            path.write_bytes(stored)


def test_an_alpha_beside_the_factors_is_used_or_named(case: Case) -> None:
    """Of each module, under the name that most layouts give it, and under a name that says a factor."""
    files = list(case.folder.glob("*.safetensors"))
    if not files:
        pytest.skip("no safetensors file")
    before, tensors = case.load(), safetensors.numpy.load_file(files[0])
    stems = {re.split(r"\.lora|\.miss_|\.vblora_|:|_[ab]_|_(?:alpha|beta|A)_", name)[0] for name in tensors}
    for name in ("alpha", "scaling"):
        added = {f"{stem}.{name}": np.full(1, 7, np.float32) for stem in stems if "<" not in stem}
        case.rewritten({**tensors, **added})
        assert said(case, before, name), name


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_forward_module", "module"])
def test_wrappers_are_taken_out_of_names_with_a_warning(wrapper: str, case: Case) -> None:
    """In front of every name: the same adapter, and a warning that names the wrapper."""
    files = list(case.folder.glob("*.safetensors"))
    if not files or case.reader.id == "cloneofsimo":
        pytest.skip("no names with dots")
    whole, tensors = case.load(), safetensors.numpy.load_file(files[0])
    wrapped = case.load(case.rewritten({f"{wrapper}.{name}": value for name, value in tensors.items()}))
    same = ("targets", "extras") if isinstance(whole, LoraAdapter) else ("targets", "extras", "config")
    assert all(getattr(wrapped, field) == getattr(whole, field) for field in same)
    assert any(line.startswith(f"{wrapper} is taken out") for line in wrapped.warnings)
    name = next(iter(tensors))
    with pytest.raises(errors.TensorUnknownError, match="mean the same"):
        case.load(case.rewritten({**tensors, f"_orig_mod.{name}": tensors[name]}))
