"""Merging into a base, taking it out again and confirming it, beside a plain copy and the programs that merge too.

    python benchmarks/merge.py                       measures what is missing, on a base of 4 GB in bf16
    python benchmarks/merge.py --small               the same on 1 GB, with a quarter of everything
    python benchmarks/merge.py --large               the same on 16 GB
    python benchmarks/merge.py --busy                beside other work: processor time alone counts then
    python benchmarks/merge.py --budget-minutes 10   starts no cell after that
    python benchmarks/merge.py --render              writes the table of docs/benchmarks.md

The base is shaped like Llama-3-8B with fewer layers, random; the LoRA has rank 16 on all linear layers and the output
head, its update some 8 % of the size of the weights. The yardstick is what anyone does who copies a model with care:
`cp`, then `sha256sum` of both.

Every command is a process of its own, timed whole, imports included; what it reads is in the page cache where it fits,
and nothing waits to be written. Each syncs as it does: lrconvert returns when its output is on the disk, the others
before. sha256sum may do without the processor's instructions for it, which OpenSSL and Python use; so a copy that is
synced, and hashed with those, is measured too: processor time, that of all threads with their system calls, stands
beside its. Memory is the peak resident size above that after the imports. A run under a minute is done three times, the
median counts; one that other processes took part of a core from is repeated.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cells
import numpy as np
from decoders import LLAMA_8B

sys.path.insert(0, str(cells.ROOT / "tests"))

from peers import make

from lrconvert.core.dtypes import round_to
from lrconvert.io.checkpoint import open_checkpoint
from lrconvert.io.container import encode_header

PEERS = cells.ROOT / "tests" / "peers"
HIDDEN, VOCABULARY, RANK = LLAMA_8B.hidden, LLAMA_8B.words, 16
SHAPES = LLAMA_8B.matrices
SHA256 = "cp, sync, OpenSSL's sha256 of both"
SHARD_BYTES = 2_000_000_000
RUNS, SHORT = 3, 60.0  # runs of a command that takes less than so many seconds
QUIET = 0.15  # cores that others may use while a command is timed
PATIENCE = 5  # runs that are thrown away for that


@dataclass(frozen=True)
class Size:
    """A base of `nbytes`, as far as whole layers go."""

    name: str
    nbytes: int
    vocabulary: int = VOCABULARY

    @property
    def layers(self) -> int:
        per_layer = 2 * sum(out * inner for out, inner in SHAPES.values())
        return (self.nbytes - 4 * self.vocabulary * HIDDEN) // per_layer


SMALL, MIDDLE, LARGE = Size("1 GB", 10**9, VOCABULARY // 4), Size("4 GB", 4 * 10**9), Size("16 GB", 16 * 10**9)


# --- what is merged -------------------------------------------------------------------------------------------------


def shapes(size: Size) -> dict[str, tuple[int, ...]]:
    """Return the tensors of the base, in the order of its files."""
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (size.vocabulary, HIDDEN)}
    for layer in range(size.layers):
        prefix = f"model.layers.{layer}"
        tensors |= {f"{prefix}.{name}.weight": shape for name, shape in SHAPES.items()}
        tensors |= {f"{prefix}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    return tensors | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (size.vocabulary, HIDDEN)}


def cut(tensors: dict[str, tuple[int, ...]]) -> list[list[str]]:
    """Return the names of the tensors of each file."""
    shards: list[list[str]] = [[]]
    free = SHARD_BYTES
    for name, shape in tensors.items():
        free -= 2 * int(np.prod(shape))
        if free < 0 and shards[-1]:
            shards.append([])
            free = SHARD_BYTES - 2 * int(np.prod(shape))
        shards[-1].append(name)
    return shards


def make_base(folder: Path, size: Size) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    tensors = shapes(size)
    shards = cut(tensors)
    names = [f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
    for file, keys in zip(names, shards, strict=True):
        with (folder / file).open("wb") as out:
            out.write(encode_header([(key, "BF16", tensors[key]) for key in keys], {"format": "pt"}))
            for key in keys:
                width = tensors[key][-1]
                rows = int(np.prod(tensors[key])) // width
                for top in range(0, rows, 1024):
                    values = rng.standard_normal((min(1024, rows - top), width), np.float32) * np.float32(0.02)
                    out.write(round_to(values if rows > 1 else 1 + values, "BF16").tobytes())
    weight_map = {key: file for file, keys in zip(names, shards, strict=True) for key in keys}
    total = sum(2 * int(np.prod(shape)) for shape in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        **replace(LLAMA_8B, layers=size.layers, words=size.vocabulary).config,
        "head_dim": 128,
        "rms_norm_eps": 1e-05,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def make_adapter(folder: Path, size: Size) -> None:
    """B A has elements of size 0.02 * 0.01 * sqrt(16), twice that with alpha: 0.0016."""
    from safetensors.numpy import save_file

    folder.mkdir()
    rng = np.random.default_rng(1)
    tensors = {}
    for name, shape in shapes(size).items():
        if "norm" not in name and "embed" not in name:
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{prefix}.lora_A.weight"] = rng.standard_normal((RANK, shape[1]), np.float32) * np.float32(0.02)
            tensors[f"{prefix}.lora_B.weight"] = rng.standard_normal((shape[0], RANK), np.float32) * np.float32(0.01)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(cells.peft_config(RANK, 2 * RANK, [*SHAPES, "lm_head"]))


# --- running --------------------------------------------------------------------------------------------------------

_CHILD = (
    cells.PEAK
    + """
imports, work, report = sys.argv[1:4]
sys.argv[1:] = sys.argv[4:]
arguments = sys.argv[1:]
exec(imports)
idle = peak()
exec(work)
pathlib.Path(report).write_text(json.dumps({"idle_kib": idle, "peak_kib": peak()}))
"""
)


@dataclass(frozen=True)
class Command:
    """A program to time: Python statements, of which the `imports` do not count as memory, or with `shell` a line of
    it. `creates` is removed before each run."""

    arguments: Sequence[Path | str] = ()
    imports: str = ""
    work: str = ""
    shell: str = ""
    creates: Sequence[Path] = ()
    path: Sequence[Path] = ()

    def words(self, report: Path) -> list[str]:
        arguments = [str(argument) for argument in self.arguments]
        if self.shell:
            return ["sh", "-c", self.shell, "sh", *arguments]
        return [sys.executable, "-c", _CHILD, self.imports, self.work, str(report), *arguments]


@dataclass(frozen=True)
class Run:
    """One run: seconds, those of the processor, memory, what it printed, and how many cores others had meanwhile."""

    seconds: float
    cpu: float
    report: dict[str, int]
    printed: str
    others: float


def busy() -> float:
    """Return the processor seconds that this machine has spent since it started."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def ours() -> float:
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def once(command: Command, folder: Path, read: Sequence[Path], *, quiet: bool) -> Run:
    """Run it once, from the same start: no output, nothing to be written, inputs in the page cache."""
    for path in command.creates:
        shutil.rmtree(path, ignore_errors=True)
    os.sync()
    for path in read:
        warm(path)
    if quiet:
        await_quiet()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # what is installed is compiled
    environment["PYTHONPATH"] = os.pathsep.join(map(str, command.path))
    report = folder / "report.json"
    report.unlink(missing_ok=True)
    before, mine, start = busy(), ours(), time.perf_counter()
    done = subprocess.run(command.words(report), capture_output=True, text=True, check=False, env=environment)
    seconds = time.perf_counter() - start
    cpu = ours() - mine
    others = (busy() - before - cpu) / seconds
    if done.returncode:
        raise RuntimeError(f"{done.stderr.strip()[-1500:]}")
    memory = json.loads(report.read_text()) if report.exists() else {}
    return Run(seconds, cpu, memory, done.stdout, others)


def warm(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def await_quiet() -> None:
    """Wait up to five minutes until other processes leave the machine alone."""
    for _ in range(100):
        start = busy()
        time.sleep(3)
        if (busy() - start) / 3 < QUIET:
            return


def timed(
    command: Command, folder: Path, read: Sequence[Path], nbytes: int, *, quiet: bool
) -> tuple[dict[str, Any], str]:
    """Return the median run as a row, and what it printed; with `quiet` when others leave the machine alone."""
    runs: list[Run] = []
    spoiled: list[Run] = []
    while len(runs) < RUNS:
        run = once(command, folder, read, quiet=quiet)
        if quiet and run.others > QUIET and len(spoiled) < PATIENCE:
            spoiled.append(run)
            continue
        runs.append(run)
        if run.seconds >= SHORT:
            break
    middle = sorted(runs, key=lambda run: run.seconds if quiet else run.cpu)[(len(runs) - 1) // 2]
    row: dict[str, Any] = {
        "seconds": round(middle.seconds, 2),
        "gb_per_second": round(nbytes / middle.seconds / 1e9, 3),
        "cpu": round(middle.cpu, 2),
        "runs": [round(run.seconds if quiet else run.cpu, 2) for run in runs],
        "others": round(statistics.mean(run.others for run in runs), 2),
    }
    if middle.report:
        row["peak_mib"] = round((max(run.report["peak_kib"] - run.report["idle_kib"] for run in runs)) / 1024)
        row["idle_mib"] = round(middle.report["idle_kib"] / 1024)
    return row, middle.printed


# --- cells ----------------------------------------------------------------------------------------------------------

_HASH = "import hashlib, sys; [hashlib.file_digest(open(path, 'rb'), 'sha256') for path in sys.argv[1:]]"
_CLI = "import lrconvert.api, lrconvert.cli"
_CALL = "lrconvert.cli.cli.main(args=arguments, standalone_mode=False)"
_PEFT_IMPORTS = "import peft, torch, transformers\nfrom transformers import AutoModelForCausalLM"
_PEFT = """
base, adapter, out = arguments
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


@dataclass
class Bench:
    """One base, its adapter, and what the commands make of them, in a folder that goes away."""

    size: Size
    folder: Path
    quiet: bool = True

    def __post_init__(self) -> None:
        names = ("base", "adapter", "merged", "copy", "other")
        self.base, self.adapter, self.merged, self.copy, self.other = (self.folder / name for name in names)

    def prepare(self) -> None:
        if not self.base.exists():
            make_base(self.base, self.size)
            make_adapter(self.adapter, self.size)

    @property
    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in self.base.glob("*.safetensors"))

    def time(self, command: Command, *read: Path) -> tuple[dict[str, Any], str]:
        self.prepare()
        row, printed = timed(command, self.folder, read, self.nbytes, quiet=self.quiet)
        return {"base_bytes": self.nbytes, **row}, printed

    def need_merged(self) -> None:
        self.prepare()
        if not any(self.merged.glob(".lrconvert/*")):
            once(self.merge_command(), self.folder, (), quiet=self.quiet)

    # --- the yardstick ---

    def plain_copy(self, line: str) -> dict[str, Any]:
        self.prepare()
        arguments = [self.base, self.copy, sys.executable, _HASH]
        row, _ = self.time(Command(arguments, shell=f'cp -r "$1" "$2" && {line}', creates=[self.copy]), self.base)
        shutil.rmtree(self.copy)
        return row

    # --- ours ---

    def merge_command(self, *options: str, to: Path | None = None) -> Command:
        out = to or self.merged
        words = ["merge-into-base", self.base, self.adapter, "-o", out, "--json", *options]
        return Command(words, _CLI, _CALL, creates=[out], path=[cells.ROOT])

    def merge(self) -> dict[str, Any]:
        row, printed = self.time(self.merge_command(), self.base)
        report = json.loads(printed)
        share = report["record_bytes"] / report["touched_bytes"]
        return {**row, "record_bytes": report["record_bytes"], "record_share": round(share, 4)}

    def merge_without(self) -> dict[str, Any]:
        row, _ = self.time(self.merge_command("--no-undo", to=self.copy), self.base)
        shutil.rmtree(self.copy)
        return row

    def unmerge(self) -> dict[str, Any]:
        self.need_merged()
        words = ["unmerge", self.merged, "-o", self.copy, "--json"]
        row, _ = self.time(Command(words, _CLI, _CALL, creates=[self.copy], path=[cells.ROOT]), self.merged)
        exact = digests(self.copy) == digests(self.base)
        shutil.rmtree(self.copy)
        return {**row, "exact": exact}

    def verify(self) -> dict[str, Any]:
        self.need_merged()
        words = ["verify", self.merged, "--base", self.base, "--adapter", self.adapter, "--json"]
        row, printed = self.time(Command(words, _CLI, _CALL, path=[cells.ROOT]), self.base, self.merged)
        return {**row, "ok": json.loads(printed)["ok"]}

    # --- others ---

    def against(self, command: Command) -> dict[str, Any]:
        """Time another program, and see how many weights of one matrix it gives as we do."""
        self.need_merged()
        row, _ = self.time(command, self.base)
        row["same"] = round(same(self.other, self.merged), 4)
        for path in command.creates:
            shutil.rmtree(path, ignore_errors=True)
        return row

    def peft(self) -> dict[str, Any]:
        arguments = [self.base, self.adapter, self.other]
        return self.against(Command(arguments, _PEFT_IMPORTS, _PEFT, creates=[self.other]))

    def axolotl(self) -> dict[str, Any]:
        arguments = [self.base, self.adapter, self.other]
        work = "run_axolotl.merge(*arguments)"
        return self.against(Command(arguments, "import run_axolotl", work, creates=[self.other], path=[PEERS]))

    def mergekit(self) -> dict[str, Any]:
        """Its way: PEFT merges into a cache, which is then passed through."""
        lib = make.environment("mergekit")
        assert lib is not None
        self.prepare()
        config, scratch = self.folder / "mergekit.json", self.folder / "scratch"
        recipe = {
            "merge_method": "passthrough",
            "models": [{"model": f"{self.base}+{self.adapter}"}],
            "dtype": "bfloat16",
        }
        config.write_text(json.dumps(recipe))  # JSON is YAML
        arguments = [config, self.other, "--lora-merge-cache", scratch, "--lora-merge-dtype", "bfloat16"]
        arguments += ["--no-copy-tokenizer", "--no-write-model-card", "--quiet"]
        work = "mergekit.scripts.run_yaml.main(args=arguments, standalone_mode=False)"
        creates = [self.other, scratch]
        return self.against(
            Command(arguments, "import mergekit.scripts.run_yaml", work, creates=creates, path=[lib / "lib"])
        )

    def cells(self) -> dict[str, Callable[[], dict[str, Any]]]:
        return {
            "cp, sha256sum of both": lambda: self.plain_copy('sha256sum "$1"/* "$2"/*'),
            SHA256: lambda: self.plain_copy('sync "$2"/* && "$3" -c "$4" "$1"/* "$2"/*'),
            "merge-into-base": self.merge,
            "merge-into-base --no-undo": self.merge_without,
            "unmerge": self.unmerge,
            "verify": self.verify,
            "peft merge_and_unload, save_pretrained": self.peft,
            "axolotl merge_lora_sharded_efficient": self.axolotl,
            "mergekit-yaml passthrough": self.mergekit,
        }


def digests(folder: Path) -> dict[str, str]:
    sums = {}
    for path in sorted(folder.glob("*.safetensors*")):
        with path.open("rb") as file:
            sums[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def same(theirs: Path, ours: Path) -> float:
    """Return the share of the weights of one matrix that have the same bits."""
    name = "model.layers.0.self_attn.q_proj.weight"
    with open_checkpoint(theirs) as one, open_checkpoint(ours) as other:
        first, second = (c.file_of(c.tensors[name]).load(c.tensors[name]).array for c in (one, other))
    return float(np.mean(first.view("u2") == second.view("u2")))


def all_cells(size: Size, folder: Path, minutes: float, *, quiet: bool) -> Iterator[cells.Cell]:
    start = time.monotonic()
    for name, run in Bench(size, folder, quiet).cells().items():
        if time.monotonic() - start > 60 * minutes:
            print(f"{minutes:g} minutes are over; the rest is left for another run")
            return
        peer = name.split()[0].partition("-")[0]
        if peer in make.peers() and make.environment(peer) is None:
            print(f"{name}: not installed (python tests/peers/make.py {peer})")
            continue
        yield f"{size.name}: {name}", run


# --- the table ------------------------------------------------------------------------------------------------------


def table() -> str:
    done = cells.read("merge")
    rows = []
    for size in (SMALL, MIDDLE, LARGE):
        names = [f"{size.name}: {name}" for name in Bench(size, Path()).cells()]
        if not any(name in done for name in names):
            continue
        copy, hashed = (done.get(name, {}) for name in (names[0], f"{size.name}: {SHA256}"))
        rows += [line(name, done[name], copy.get("seconds"), hashed.get("cpu")) for name in names if name in done]
    head = ["base: command", "time", "GB/s", "speed", "processor", "against OpenSSL's", "peak memory", ""]
    return cells.markdown(head, rows)


def line(name: str, cell: dict[str, Any], seconds: float | None, cpu: float | None) -> list[Any]:
    """Return a row; of a machine that others used, the time says nothing."""
    is_quiet = cell["others"] <= QUIET
    times = [f"{cell['seconds']:.1f} s", f"{cell['gb_per_second']:.2f}"] if is_quiet else ["", ""]
    speed = f"{seconds / cell['seconds']:.2f}x" if seconds and is_quiet else ""
    spent = f"{cell['cpu']:.1f} s" if "cpu" in cell else ""
    share = f"{cell['cpu'] / cpu:.1f}x" if cpu and "cpu" in cell else ""
    memory = f"{cell['peak_mib']} MiB" if "peak_mib" in cell else ""
    return [name, *times, speed, spent, share, memory, remark(cell)]


def remark(cell: dict[str, Any]) -> str:
    if "record_share" in cell:
        return f"record {cell['record_share']:.1%} of the touched bytes"
    if "exact" in cell:
        return "every byte as in the base" if cell["exact"] else "NOT the bytes of the base"
    if "ok" in cell:
        return "every bit as computed again" if cell["ok"] else "NOT confirmed"
    return f"{cell['same']:.2%} of weights as ours" if "same" in cell else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a pattern that cell names must contain")
    parser.add_argument("--again", action="store_true", help="measure cells that are there, too")
    parser.add_argument("--render", action="store_true", help="write the table and measure nothing")
    parser.add_argument("--small", action="store_true", help="a base of 1 GB; needs 3 GB of disk")
    parser.add_argument("--busy", action="store_true", help="do not wait until others leave the machine alone")
    parser.add_argument("--large", action="store_true", help="a base of 16 GB; needs 70 GB of disk")
    parser.add_argument("--budget-minutes", type=float, default=float("inf"), help="start no cell after that")
    arguments = parser.parse_args()
    if arguments.render:
        cells.render("merge", table())
        return
    with tempfile.TemporaryDirectory() as folder:
        size = LARGE if arguments.large else SMALL if arguments.small else MIDDLE
        chosen = all_cells(size, Path(folder), arguments.budget_minutes, quiet=not arguments.busy)
        cells.measure("merge", chosen, only=arguments.only, again=arguments.again)


if __name__ == "__main__":
    main()
