"""A coverage-guided fuzz target over every reader of files, for atheris; without it, a replay of the corpus.

    python tests/fuzz/fuzz_file.py --replay [PATH ...]         no atheris needed: the seeds, or these files
    python tests/fuzz/fuzz_file.py CORPUS -max_total_time=600  atheris; finds are kept in the folder CORPUS

See README.md in this folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import safetensors

FIXTURES = Path(__file__).resolve().parent.parent.parent / "fixtures"
sys.path.append(str(FIXTURES))

atheris: ModuleType | None
try:
    import atheris
except ImportError:
    atheris = None

with atheris.instrument_imports(include=["lrconvert"]) if atheris else contextlib.nullcontext():
    from lrconvert.core.errors import LrcError
    from lrconvert.formats.lrc import file, validation
    from lrconvert.formats.readers import base as readers
    from lrconvert.io.checkpoint import INDEX_NAME, open_checkpoint
    from lrconvert.io.container import ContainerFile
    from lrconvert.lora.adapter import LoraAdapter
    from lrconvert.methods import base as methods
    from lrconvert.testing import layouts
    from lrconvert.testing.container_versions import encoded, version_of
    from lrconvert.testing.raw_files import RawFile, spelled

    import hostile  # isort: skip

    methods.all_methods(), readers.all_readers()  # these are imported by name, when they are first needed

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"

# Two files in one input: a tag, the length of the first, the first, the second.
LORA, BASE, SIGN = b"LORA", b"BASE", b"SIGN"
# Files that tell themselves by their first bytes.
GGUF, ZIP = b"GGUF", b"PK\3\4"


def joined(tag: bytes, first: bytes, second: bytes) -> bytes:
    return tag + len(first).to_bytes(4, "little") + first + second


def parted(data: bytes) -> tuple[bytes, bytes]:
    """The two files of an input, however long the first claims to be."""
    size = int.from_bytes(data[4:8], "little")
    return data[8 : 8 + size], data[8 + size :]


def _folder() -> Path:
    """A folder in memory where the system has one."""
    shared = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="lrconvert-fuzz-", dir=shared if os.access(shared, os.W_OK) else None))


# --- what must hold -------------------------------------------------------------------------------------------------


def check_container(path: Path, data: bytes) -> None:
    """Refused by an error of ours, or the safetensors library finds the same tensors."""
    try:
        with ContainerFile(path) as opened:
            ours = {t.name: (t.dtype, list(t.shape), bytes(opened.read(t))) for t in opened.tensors}
    except LrcError as error:
        assert str(error).isprintable()
        return
    theirs = {n: (i["dtype"], i["shape"], bytes(i["data"])) for n, i in safetensors.deserialize(data)}
    assert ours == theirs


def check_file(path: Path, data: bytes) -> None:
    """Refused, by `read` and `validate` alike, or the writer gives the same bytes and every factor can be had."""
    findings = validation.validate(path).findings
    try:
        compact = file.read(path)
    except LrcError as error:
        assert error.code in {f.code for f in findings}
        return
    assert not findings and encoded(compact, version_of(data)) == data
    for target, a, b in methods.without_base(compact):
        assert (b.shape[0], a.shape[1]) == target.matrix_shape


class Target:
    """Runs one input. Files are written to a folder of its own, which `close` removes."""

    def __init__(self) -> None:
        self.root = _folder()

    def close(self) -> None:
        for path in self.root.iterdir():
            path.unlink()
        self.root.rmdir()

    def __call__(self, data: bytes) -> None:
        if data[:4] == LORA:
            self.lora(*parted(data))
        elif data[:4] == BASE:
            self.base(*parted(data))
        elif data[:4] == SIGN:
            self.signed(*parted(data))
        elif data[:4] in (GGUF, ZIP):
            self.weights("x.gguf" if data[:4] == GGUF else "x.npz", data)
        else:
            path = self._put("x.lrc", data)
            check_container(path, data)
            check_file(path, data)

    def _put(self, name: str, data: bytes) -> Path:
        path = self.root / name
        path.write_bytes(data)
        return path

    def signed(self, manifest: bytes, source: bytes) -> None:
        """The lrconvert file `source` with another manifest and right digests, which guard all that lies behind."""
        try:
            raw = RawFile.of(source)
            raw.manifest = json.loads(manifest)
            data = raw.sign().file()
        except (LrcError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            return  # nothing that can be signed
        check_file(self._put("x.lrc", data), data)

    def lora(self, config: bytes, weights: bytes) -> None:
        """A PEFT folder: refused, or it has targets and finite scales."""
        self._put(CONFIG_NAME, config)
        self._put(WEIGHTS_NAME, weights)
        with contextlib.suppress(LrcError):
            lora = readers.load(self.root)
            assert lora.targets and all(abs(p.scale) < float("inf") for p in lora.targets)

    def weights(self, name: str, data: bytes) -> None:
        """A GGUF or npz file by itself: refused, or it has targets of finite numbers in shapes that fit."""
        path = self._put(name, data)
        try:
            with contextlib.suppress(LrcError):
                lora = readers.load(path, readers.ReadOptions(alpha=None if name == "x.gguf" else 1.0))
                assert isinstance(lora, LoraAdapter) and lora.targets
                for pair in lora.targets:
                    assert (pair.B.shape[0], pair.A.shape[1]) == pair.target.matrix_shape
                    assert np.isfinite(pair.A).all() and np.isfinite(pair.B).all()
        finally:
            path.unlink()

    def base(self, index: bytes, shard: bytes) -> None:
        """An index with one shard, m.safetensors: refused, or every tensor can be read."""
        self._put(INDEX_NAME, index)
        self._put("m.safetensors", shard)
        with contextlib.suppress(LrcError), open_checkpoint(self.root) as checkpoint:
            for info in checkpoint.tensors.values():
                assert len(checkpoint.read(info)) == info.nbytes


# --- seeds ----------------------------------------------------------------------------------------------------------


def seeds() -> Iterator[tuple[str, bytes]]:
    """(name, input) from the golden files, those of fixtures/hostile.py, and the small adapters."""
    for path in sorted((FIXTURES / "golden").rglob("*.lrc")):
        data, name = path.read_bytes(), f"{path.parent.parent.name}-{path.parent.name}-{path.name}"
        yield name, data
        yield f"signed-{name}", joined(SIGN, spelled(RawFile.of(data).manifest, sort=True), data)
    yield from small_weights()
    folders = {case.path: case.files for case in hostile.cases()}
    for name in ("vit-plain", "bert-classifier"):
        folders[name] = {path.name: path.read_bytes() for path in (FIXTURES / "adapters" / name).iterdir()}
    for name, files in folders.items():
        if "" in files:
            yield f"hostile-{name}", files[""]
        elif CONFIG_NAME in files and WEIGHTS_NAME in files:
            yield name, joined(LORA, files[CONFIG_NAME], files[WEIGHTS_NAME])
        elif INDEX_NAME in files:
            yield name, joined(BASE, files[INDEX_NAME], files.get("m.safetensors", b""))


def small_weights() -> Iterator[tuple[str, bytes]]:
    """A GGUF file and npz files, stored and deflated."""
    rng = np.random.default_rng(0)
    halves = [rng.standard_normal(shape).astype("<f2") for shape in ((2, 5), (3, 2))]
    for module in ("blk.0.attn_v", "token_embd"):
        a, b = (halves[0].T, halves[1]) if module == "token_embd" else halves
        known = layouts.Known(module, np.ascontiguousarray(a), b, 4.0)
        yield f"{module}.gguf", layouts.gguf([known])["lora.gguf"]
    tensors = {"m.q.lora_a": halves[0].T.copy(), "m.q.lora_b": halves[1].T.copy()}
    for compress in (False, True):
        yield f"mlx-{compress}.npz", layouts.npz_file(tensors, compress)


def replay(paths: list[Path]) -> int:
    """Run the seeds, or the files at `paths` (folders: all in them). Returns how many; the first failure is raised."""
    given = [p for path in paths for p in (sorted(path.iterdir()) if path.is_dir() else [path])]
    inputs = [(str(p), p.read_bytes()) for p in given] if paths else list(seeds())
    target = Target()
    try:
        for name, data in inputs:
            try:
                target(data)
            except BaseException as error:
                error.add_note(f"input: {name}")
                raise
    finally:
        target.close()
    return len(inputs)


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--replay"]:
        print(f"{replay([Path(a) for a in arguments[1:]])} inputs, no failure")
        return
    if atheris is None:
        sys.exit("atheris is not installed; --replay runs without it")
    corpus = next((Path(a) for a in arguments if not a.startswith("-")), None)
    if corpus is None:
        sys.exit("give a folder for the corpus: it is filled with the seeds, then with what is found")
    corpus.mkdir(exist_ok=True)
    for name, data in seeds():
        (corpus / name).write_bytes(data)
    target = Target()
    atheris.Setup([sys.argv[0], *arguments], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
