"""What the long run attacks: files of each kind that a stranger can give, and what must hold of every one of them.

A surface has seeds (folders), a mutation that gets past its digests, and a check, which raises for a find: an error of
ours is none. The checks are those of `fuzz_file` where it has them.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from fuzz_file import FIXTURES, check_container, check_file
from mutate import Folder, Mutator, signed_container, valid
from safetensors import deserialize

sys.path.append(str(FIXTURES.parent / "tests"))

import crashes  # isort: skip
import hostile
import hostile_fleets

from lrconvert import Fleet, api
from lrconvert.core.errors import LrcError
from lrconvert.formats.fleet import records
from lrconvert.formats.readers import base as readers
from lrconvert.io import strictjson
from lrconvert.io.checkpoint import INDEX_NAME, JOURNAL, open_checkpoint
from lrconvert.io.container import encode_header
from lrconvert.lora import statistics_file
from lrconvert.lora.adapter import LoraAdapter
from lrconvert.lora.coded import stream
from lrconvert.lora.coded.models import COUNT
from lrconvert.lora.input_statistics import Input, InputStatistics, Moment
from lrconvert.merge.in_place.recover import recover
from lrconvert.merge.signed_json import sign
from lrconvert.testing import faults, layouts, samples
from lrconvert.testing.json_trees import spell, tree
from lrconvert.testing.raw_files import OneTensor, RawFile

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass
class Surface:
    """`seeds` are folders; `mutate(mutator, folder, other)` changes one; `check(place, folder)` gets an empty place on
    the disk."""

    seeds: list[Folder]
    check: Callable[[Path, Folder], None]
    mutate: Callable[[Mutator, Folder, Folder], Folder] = lambda mutator, files, other: mutator.folder(
        files, other, sorted(files)
    )


def write(place: Path, files: Mapping[str, bytes]) -> Path:
    """Write the folder; names may have folders in front."""
    for name, data in files.items():
        path = place / name
        if "/" in name:
            path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return place


# --- containers and our own files -----------------------------------------------------------------------------------


def _container() -> Surface:
    def check(place: Path, files: Folder) -> None:
        check_container(write(place, files) / "x", files["x"])

    seeds = [{"x": data} for case in hostile.cases() for data in case.files.values() if data[8:9] == b"{"]
    floats = np.arange(6, dtype="<f4").reshape(2, 3)
    seeds.append({"x": layouts.safetensors_file({"a": floats, "b": floats[:, 0]}, {"format": "pt"})})
    kinds = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "U8": 1, "BOOL": 1, "F8_E4M3": 1}
    seeds.append({"x": valid({kind.lower(): (kind, [2], bytes(2 * size)) for kind, size in kinds.items()})})
    return Surface([seed for seed in seeds if len(seed["x"]) < 1 << 14], check)


def _own() -> Surface:
    """Files of ours of every method and version, their manifest or tensors changed and signed anew."""

    def check(place: Path, files: Folder) -> None:
        check_file(write(place, files) / "x.lrc", files["x.lrc"])

    golden = [path.read_bytes() for path in sorted((FIXTURES / "golden").rglob("*.lrc"))]
    return Surface([{"x.lrc": data} for data in golden if len(data) < 1 << 15], check, _misspelled)


def _misspelled(mutator: Mutator, files: Folder, other: Folder) -> Folder:
    """Signed files with other values, and in some of version 2 the bytes of the packed manifest changed."""
    if mutator.random.random() < 0.3:
        with contextlib.suppress(Exception):  # nothing that can be signed
            raw = RawFile.of(files["x.lrc"])
            if isinstance(raw, OneTensor):
                return {"x.lrc": raw.sign().file(mutator.bytes(raw.spelled()))}
    return _signed("x.lrc", "lrconvert")(mutator, files, other)


def _fleets() -> Surface:
    """Fleets, their head, their root and their records signed anew: every member is refused, or is the file of its
    digest; what `validate` says of them never raises but for the head."""

    def check(place: Path, files: Folder) -> None:
        with contextlib.suppress(LrcError), Fleet(write(place, files)) as fleet:
            for result in fleet.validate():
                assert result.ok or result.findings
            for name in fleet:
                with contextlib.suppress(LrcError):
                    assert sha256(fleet.read_bytes(name)).hexdigest() == fleet.member(name).digest
                    assert fleet[name].targets

    golden = FIXTURES / "golden" / "fleet-v1" / "0"
    seeds = [{path.name: path.read_bytes() for path in golden.iterdir()}]
    return Surface([*seeds, *(files for *_, files in hostile_fleets.fleets())], check, _signed_fleet)


def _signed_fleet(mutator: Mutator, files: Folder, other: Folder) -> Folder:
    """A changed fleet whose checks and digests are those of what changed, where these can be told."""
    made = mutator.folder(files, other, sorted(files))
    with contextlib.suppress(Exception):
        for name in made:
            if name.startswith("members-"):
                made[name] = _checked_records(made[name])
        head = json.loads(made["fleet.json"])
        for run in head["runs"]:
            node = made[f"index-{run['number']}"]
            run |= {"bytes": len(node), "digest": sha256(node[len(node) - run["root"] :]).hexdigest()}
        head["bytes"] = len(made[f"members-{head['generation']}"])
        head.pop("digest", None)
        head["digest"] = sha256(hostile_fleets.spelled(head)).hexdigest()
        made["fleet.json"] = hostile_fleets.spelled(head)
    return made


def _checked_records(data: bytes) -> bytes:
    """A data file whose records, as far as they can be told, have the checks of their bytes."""
    made, at = bytearray(data), len(records.MAGIC)
    while at < len(made):
        _, body, start = records.head_of(made[at : at + 12])
        stop = at + start + body
        made[stop : stop + records.CHECK_BYTES] = records.check_of(bytes(made[at:stop]))
        at = stop + records.CHECK_BYTES
    return bytes(made)


def _coded() -> Surface:
    """Streams of coded integers, with their rows: refused, or encoded to the same bytes."""

    def check(place: Path, files: Folder) -> None:
        data = files["rows"]
        rows = [
            (data[at] % COUNT, 1 + int.from_bytes(data[at + 1 : at + 4], "little")) for at in range(0, len(data), 4)
        ]
        with contextlib.suppress(LrcError):
            assert stream.encode(stream.decode(files["codes"], rows), rows) == files["codes"]

    seeds, rng = [], np.random.default_rng(0)
    for models, count in (((0, 5), 300), ((10, 19, 63), 40), ((14,), 5000), ((12,), 120_000)):
        rows = [(k, count) for k in models]
        sigma = np.repeat([2 ** ((k - 10) / 4) for k in models], count)
        numbers = np.rint(rng.standard_normal(len(sigma)) * sigma * rng.choice([1, 50], len(sigma), p=[0.99, 0.01]))
        spelled_rows = b"".join(bytes([k]) + (n - 1).to_bytes(3, "little") for k, n in rows)
        seeds.append({"rows": spelled_rows, "codes": stream.encode(numbers.astype(np.int32), rows)})
    return Surface(seeds, check)


def _statistics() -> Surface:
    """Statistics, likewise, every moment of them read."""

    def check(place: Path, files: Folder) -> None:
        with contextlib.suppress(LrcError):
            found = statistics_file.read(write(place, files) / "x.safetensors")
            try:
                for n in range(len(found.inputs)):
                    assert np.isfinite(found.load(n).squares).all()
            finally:
                _close(found)

    moments = [
        Moment(9, matrix=np.eye(3, dtype="<f4")),
        Moment(9, diagonal=np.ones(4, "<f4")),
        Moment(9, diagonal=np.ones(4, "<f4"), rows=np.ones((2, 4), "<f4")),
    ]
    inputs = tuple(
        Input((f"m.{n}.weight",), n if n == 1 else None, moment.width, 9) for n, moment in enumerate(moments)
    )
    whole = InputStatistics(inputs, moments.__getitem__, "", "", 9, ("llama",))
    with tempfile.TemporaryDirectory() as folder:
        statistics_file.write(whole, Path(folder) / "x")
        data = (Path(folder) / "x").read_bytes()
    return Surface([{"x.safetensors": data}], check, _signed("x.safetensors", statistics_file.METADATA_KEY))


def _close(found: InputStatistics) -> None:
    """Close the file that the loader of moments keeps open."""
    for cell in found.load.__wrapped__.__closure__:  # type: ignore[attr-defined]
        if isinstance(cell.cell_contents, statistics_file._Opened):
            cell.cell_contents.file.close()


def _signed(name: str, key: str) -> Callable[[Mutator, Folder, Folder], Folder]:
    def mutate(mutator: Mutator, files: Folder, other: Folder) -> Folder:
        def inside(manifest: Any, tensors: Any) -> Any:
            if mutator.random.random() < 0.3:
                mutator.tensors(tensors)
                return manifest
            manifest.pop("digests", None)
            return json.loads(spell(mutator.tree(tree(manifest))))

        if mutator.random.random() < 0.75:
            with contextlib.suppress(Exception):  # nothing that can be signed
                changed = signed_container(files[name], key, inside)
                for _ in range(mutator.random.randrange(2)):
                    changed = signed_container(changed, key, inside)
                return {name: changed}
        return mutator.folder(files, other, [name])

    return mutate


# --- adapters of other tools ----------------------------------------------------------------------------------------


def _base(shapes: Mapping[str, tuple[int, ...]]) -> Folder:
    size = sum(2 * math.prod(shape) for shape in shapes.values())
    header = encode_header([(name, "F16", shape) for name, shape in shapes.items()], {})
    return {"base/model.safetensors": header + bytes(size), "base/config.json": b'{"model_type":"llama"}'}


def _reader(sample: samples.Sample, more: list[Folder], options: dict[str, Any]) -> Surface:
    """Refused; or targets of finite numbers, in shapes that fit, with finite scales."""
    based = bool(sample.base)

    def check(place: Path, files: Folder) -> None:
        where = write(place, files)
        given = dict(options, base=where / "base") if based else options
        with contextlib.suppress(LrcError):
            lora = readers.load(where / "lora", readers.ReadOptions(**given))
            if isinstance(lora, LoraAdapter):
                assert lora.targets
                for pair in lora.targets:
                    assert math.isfinite(pair.scale)
                    assert (pair.B.shape[0], pair.A.shape[1]) == pair.target.matrix_shape
                    assert np.isfinite(pair.A).all() and np.isfinite(pair.B).all()

    def mutate(mutator: Mutator, files: Folder, other: Folder) -> Folder:
        names = [n for n in files if not n.startswith("base/") or mutator.random.random() < 0.05]
        return mutator.folder(files, other, names or sorted(files))

    extra = _base(sample.base) if based else {}
    seeds = [{f"lora/{n}": data for n, data in files.items()} | extra for files in (sample.files, *more)]
    return Surface(seeds, check, mutate)


def _more(reader: str) -> list[Folder]:
    """The other forms of a layout."""
    pairs = [layouts.Known(m, samples.floats(2, 8), samples.floats(6, 2), 3.0) for m in layouts.TEXT]
    unet = [layouts.Known(m, samples.floats(2, 8), samples.floats(6, 2), 3.0) for m in layouts.UNET]
    if reader == "diffusers":
        return [layouts.diffusers(unet, form=form) for form in ("lora", "linear", "processor")]
    if reader == "kohya":
        return [layouts.kohya(unet, "lora_te1")]
    if reader == "raw":
        return [layouts.raw(pairs, ".weight")]
    if reader == "lora_vit":
        return [layouts.lora_vit(pairs, turned=True)]
    if reader != "peft":
        return []
    folders = [hostile_files for case in hostile.cases() if CONFIG in (hostile_files := case.files)]
    for folder in sorted((FIXTURES / "adapters").iterdir()):
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        if sum(map(len, files.values())) < 1 << 16:
            folders.append(files)
    return folders


def _gguf() -> Surface:
    return _reader(samples.SAMPLES["gguf"](), [], {})


def _npz() -> Surface:
    """What is inside of a zip, changed, and the zip put together again."""
    pairs = [layouts.Known(m, samples.floats(2, 8), samples.floats(6, 2), 3.0) for m in layouts.TEXT]
    sample = samples.Sample(layouts.mlx(pairs, npz=True), {})
    surface = _reader(sample, [], {})
    name = "lora/adapters.npz"

    def mutate(mutator: Mutator, files: Folder, other: Folder) -> Folder:
        if mutator.random.random() < 0.3:
            return mutator.folder(files, other, sorted(files))
        try:
            with zipfile.ZipFile(io.BytesIO(files[name])) as archive:
                entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
            changed = mutator.random.choice(sorted(entries))
            if mutator.random.random() < 0.3:
                entries[mutator.text(changed)] = entries.pop(changed)
            else:
                entries[changed] = mutator.bytes(entries[changed])
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w", mutator.random.choice((0, 0, zipfile.ZIP_DEFLATED))) as archive:
                for entry, data in entries.items():
                    archive.writestr(zipfile.ZipInfo(entry), data)
            return files | {name: buffer.getvalue()}
        except Exception:  # no zip any more
            return mutator.folder(files, other, [name])

    return Surface(surface.seeds, surface.check, mutate)


def _pickle() -> Surface:
    """Pickles that are allowed, in torch's zip, with its tensors-only loader."""
    import torch

    lora = {"q_proj.lora_A.weight": torch.ones(2, 8), "q_proj.lora_B.weight": torch.ones(6, 2)}
    warnings.simplefilter("ignore")  # torch warns of every odd pickle
    seeds = []
    for state in (lora, {"state_dict": lora, "r": 2, "alpha": 4.0}, {"model": lora}):
        for new in (True, False):
            buffer = io.BytesIO()
            torch.save(state, buffer, _use_new_zipfile_serialization=new)
            seeds.append({"lora.pt": buffer.getvalue()})
    sample = samples.Sample(seeds[0], {})
    return _reader(sample, seeds[1:], {"allow_pickle": True, "alpha": 4.0})


# --- bases ----------------------------------------------------------------------------------------------------------


def _index() -> Surface:
    def check(place: Path, files: Folder) -> None:
        with contextlib.suppress(LrcError), open_checkpoint(write(place, files)) as checkpoint:
            for info in checkpoint.tensors.values():
                assert len(checkpoint.read(info)) == info.nbytes

    shards = {f"m-{n}.safetensors": layouts.safetensors_file({f"w.{n}": np.ones(3, "<f4")}) for n in range(2)}
    index = {"metadata": {"total_size": 24}, "weight_map": {f"w.{n}": f"m-{n}.safetensors" for n in range(2)}}
    seeds = [{INDEX_NAME: json.dumps(index).encode(), **shards}]
    seeds += [case.files for case in hostile.cases() if INDEX_NAME in case.files]
    return Surface(seeds, check)


def _json() -> Surface:
    """Text that strict JSON takes is what the library takes for the same value, and is spelled in one way."""

    def check(place: Path, files: Folder) -> None:
        with contextlib.suppress(LrcError):
            value = strictjson.parse(files["x"], depth=16, floats=True)
            assert json.loads(files["x"]) == value
        with contextlib.suppress(LrcError):
            value = strictjson.parse_canonical(files["x"], depth=8)
            assert strictjson.dump_canonical(value) == files["x"]

    texts = [data for case in hostile.cases() for data in case.files.values() if data[:1] == b"{" and len(data) < 4096]
    return Surface([{"x": text} for text in (*texts, b'[1,"a\\u00e9",{"a":[true,null]},-2]')], check)


# --- records and journals -------------------------------------------------------------------------------------------


def _whole(folder: Path) -> Folder:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _tensors(files: Folder) -> dict[str, Any]:
    """What the weight files of a model hold."""
    weights = (data for name, data in files.items() if name.endswith(".safetensors"))
    return {name: (i["dtype"], i["shape"], bytes(i["data"])) for data in weights for name, i in deserialize(data)}


@contextlib.contextmanager
def _scenes() -> Iterator[list[crashes.Scene]]:
    with tempfile.TemporaryDirectory() as folder, faults.installed(faults.Quick()):
        yield [crashes.scene(Path(folder), kind) for kind in crashes.KINDS]


def _resigned(mutator: Mutator, data: bytes) -> bytes:
    """A signed object changed and signed again; now and then not."""
    if mutator.random.random() < 0.1:
        return mutator.file(data)
    try:
        return sign(json.loads(mutator.json(data)))
    except Exception:
        return mutator.file(data)


def _outside(place: Path) -> None:
    """What lies beside the model is as it was."""
    assert (place / "outside").read_bytes() == b"not ours"


def _record() -> Surface:
    """The record of a merge, with what it lists of digests of its own files made right: undone into a new folder it is
    refused, or gives the base's tensors; how headers and small files are spelled is what the record says."""
    with _scenes() as scenes:
        seeds = [_whole(scene.merged) for scene in scenes]
        bases = [_tensors(_whole(scene.base)) for scene in scenes]

    def check(place: Path, files: Folder) -> None:
        write(place, {"outside": b"not ours"} | {f"model/{name}": data for name, data in files.items()})
        with faults.installed(faults.Quick()):
            try:
                report = api.unmerge(place / "model", place / "back")
            except LrcError:
                assert not (place / "back").exists()
            else:
                back = _tensors(_whole(place / "back"))
                assert report.verified and back in bases, sorted(back)
        _outside(place)

    def mutate(mutator: Mutator, files: Folder, other: Folder) -> Folder:
        (name,) = (n for n in files if n.endswith("/record.json"))
        if mutator.random.random() < 0.7:
            return files | {name: _resigned(mutator, files[name])}
        kept = sorted(n for n in files if ".lrconvert/" in n and n != name)
        changed = mutator.folder(files, other, kept)
        with contextlib.suppress(Exception):
            import hashlib

            value = json.loads(files[name])
            folder = name.removesuffix("record.json")
            for stored in value["stored"]:
                value["stored"][stored] = hashlib.sha256(changed[folder + stored]).hexdigest()
            changed[name] = sign(value)
        return changed

    return Surface(seeds, check, mutate)


def _journal() -> Surface:
    """A model between two states, its journal changed and signed anew: `recover` refuses it, or makes one state of it,
    and touches nothing else."""
    seeds, states = [], []
    with _scenes() as scenes, tempfile.TemporaryDirectory() as folder:
        for scene in scenes:
            for way, (before, after, act) in scene.acts().items():
                work = Path(folder) / f"{scene.name}-{way}"
                work.mkdir()
                shutil.copytree(before, work / "model")
                with faults.installed(faults.Recorder(work)) as disk:
                    act(work / "model")
                ready = [n for n, call in enumerate(disk.calls) if "ready.json" in str(call[-1])]
                for number, moment in enumerate((ready[0] + 2, (ready[0] + len(disk.calls)) // 2)):
                    left = work / str(number)
                    disk.after_power_loss(moment, Random(0), left)
                    if (left / "model" / JOURNAL).exists():
                        seeds.append(_whole(left / "model"))
                states += [_weights(_whole(before)), _weights(_whole(after))]

    def check(place: Path, files: Folder) -> None:
        write(place, {"outside": b"not ours"} | {f"model/{name}": data for name, data in files.items()})
        with faults.installed(faults.Quick()), contextlib.suppress(LrcError):
            recover(place / "model")
        _outside(place)

    def mutate(mutator: Mutator, files: Folder, other: Folder) -> Folder:
        names = sorted(n for n in files if n.startswith(".lrconvert/"))
        signed = [n for n in names if n.endswith((".json", ".jsonl"))]
        if mutator.random.random() < 0.7:
            name = mutator.random.choice(signed)
            lines = files[name].split(b"\n")
            n = mutator.random.randrange(len(lines))
            lines[n] = _resigned(mutator, lines[n])
            return files | {name: b"\n".join(lines)}
        return mutator.folder(files, other, names)

    return Surface(seeds, check, mutate)


def _weights(files: Folder) -> Folder:
    return {name: data for name, data in files.items() if "/" not in name}


def _resume() -> Surface:
    """The journal of a merge into a new folder that was broken off, its lines changed and signed anew: the same merge
    goes on, and the model is that of an unbroken run."""
    with _scenes() as scenes, tempfile.TemporaryDirectory() as folder:
        scene = scenes[0]
        base, whole = _whole(scene.base), _whole(scene.merged)
        out = Path(folder) / "out"
        made = crashes.calls_of(lambda: api.merge(scene.base, [scene.adapter], Path(folder) / "all"))
        with faults.installed(faults.Faulty(len(made) - 6, 28)), contextlib.suppress(LrcError):
            api.merge(scene.base, [scene.adapter], out, resume=True)
        seed = _whole(Path(folder) / ".out.partial")
        adapter = scene.adapter

    def check(place: Path, files: Folder) -> None:
        write(place, {f"base/{n}": d for n, d in base.items()} | {f".out.partial/{n}": d for n, d in files.items()})
        with faults.installed(faults.Quick()):
            try:
                api.merge(place / "base", [adapter], place / "out", resume=True)
            except LrcError:
                assert not (place / "out").exists()
            else:
                assert _weights(_whole(place / "out")) == _weights(whole)

    def mutate(mutator: Mutator, files: Folder, other: Folder) -> Folder:
        names = sorted(n for n in files if "/" not in n)
        name = mutator.random.choice(names)
        if not name.endswith("l") or mutator.random.random() < 0.2:
            return mutator.folder(files, other, sorted(files))
        lines = files[name].split(b"\n")
        n = mutator.random.randrange(len(lines))
        lines[n] = _resigned(mutator, lines[n])
        return files | {name: b"\n".join(lines)}

    return Surface([seed], check, mutate)


# --- what programs would say ----------------------------------------------------------------------------------------


def _check() -> Surface:
    """Every consumer of `check` on folders of PEFT's: an error of ours, or findings in one line each."""

    def check(place: Path, files: Folder) -> None:
        with contextlib.suppress(LrcError):
            for finding in api.check(write(place, files)):
                assert str(finding).isprintable()

    seeds = [folder for folder in (samples.SAMPLES["peft"]().files, *_more("peft")) if WEIGHTS in folder]
    return Surface(seeds, check)


NEED_TORCH = ("pickle", "record", "journal", "resume", "reader nola")
SURFACES: dict[str, Callable[[], Surface]] = {
    "container": _container,
    "own files": _own,
    "coded": _coded,
    "fleet": _fleets,
    "statistics": _statistics,
    "json": _json,
    "index": _index,
    "gguf": _gguf,
    "npz": _npz,
    "pickle": _pickle,
    "record": _record,
    "journal": _journal,
    "resume": _resume,
    "check": _check,
}
for _id in samples.SAMPLES:
    if _id != "gguf":
        SURFACES[f"reader {_id}"] = lambda _id=_id: _of_reader(_id)  # type: ignore[misc]


def _of_reader(reader: str) -> Surface:
    sample = samples.SAMPLES[reader]()
    return _reader(sample, _more(reader), {"alpha": sample.alpha})
