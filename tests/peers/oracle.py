"""Ask the peers: ``python tests/peers/oracle.py [PEER ...]`` prints for each whether it ran, and how many of the
synthetic adapters it treats as `check` says."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))

from peers import cases, make
from peers.cases import Case
from peers.runner import norm

import lrconvert
from lrconvert.formats.compat.shared.subject import Subject, look

BASE = HERE.parent.parent / "fixtures" / "bases" / "tiny-llama"
Answer = dict[str, Any]


def ask(peer: str, jobs: Sequence[tuple[Path, dict[str, Any]]], base: Path = BASE) -> list[Answer]:
    """What a peer does with each folder, in its own process."""
    done = subprocess.run(
        [sys.executable, str(HERE / f"run_{peer}.py"), str(base)],
        input=json.dumps([[str(folder), options] for folder, options in jobs]),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    if done.returncode:
        raise RuntimeError(f"{peer} did not run: {done.stderr[-2000:]}")
    found: list[Answer] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def truth(folder: Path, adapter: cases.Adapter) -> dict[str, float]:
    """||scale * B @ A|| of every module that is not zero, by the rules of the tool that wrote the folder; infinite
    where the folder contradicts itself: nothing is right there."""
    subject = look(folder)
    stored = {name.removeprefix(cases.PREFIX): value for name, value in adapter.tensors.items()}
    found = {}
    for name in stored:
        found |= _of_half(stored, name, subject)
    return {module: value for module, value in found.items() if value}


_HALVES = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.style.weight", ".lora_B.style.weight"),
    (".lora_embedding_A", ".lora_embedding_B"),
    (".lora_a", ".lora_b"),
)


def _of_half(stored: dict[str, Any], name: str, subject: Subject) -> dict[str, float]:
    for ends in _HALVES:
        for end, other in (ends, ends[::-1]):
            if name.endswith(end):
                module = name.removesuffix(end)
                if module + other not in stored:
                    return {_full(module): math.inf}
                a, b = stored[module + ends[0]], stored[module + ends[1]]
                if end in (".lora_a", ".lora_b"):
                    return {module: norm(subject.config["lora_parameters"].get("scale", 0.0), b.T, a.T)}
                scale, fits = subject.scale(module), subject.rank(module) == a.shape[0]
                return {_full(module): norm(scale or 0.0, b, a) if fits else math.inf}
    return {}


def _full(module: str) -> str:
    return f"model.{module}" if module.startswith("layers.") else module


def verdict(answer: Answer, right: dict[str, float], adapter: cases.Adapter) -> str:
    """ "refuses", "wrong" or "right": what the peer did, compared with what it should have done."""
    if answer["outcome"] == "refuses":
        return "refuses"
    got = answer["norms"]
    same = set(got) == set(right) and all(math.isclose(got[m], right[m], rel_tol=1e-3) for m in right)
    known = tuple(end for ends in _HALVES for end in ends)
    others = [name for name in adapter.tensors if not name.endswith((*known, ".m"))]
    return "right" if same and len(others) <= len(answer.get("saved", ())) else "wrong"


def told(folder: Path, consumer: str, options: dict[str, Any]) -> str:
    """The same by `check`, with the base given."""
    known = {k: v for k, v in options.items() if not (k == "max_lora_rank" and consumer not in ("vllm", "sglang"))}
    known = {k: v for k, v in known.items() if not (k == "peft_version" and consumer != "peft")}
    found = {f.severity for f in lrconvert.check(folder, (consumer,), base=BASE, **known)}
    return next((s for s in ("refuses", "wrong") if s in found), "right")


def cases_of(peer: str) -> list[Case]:
    listed = cases.MLX_CASES if peer == "mlx" else cases.PEFT_CASES
    return [c for c in listed if peer not in c.unrun | c.unseen]


def disagreements(peer: str) -> tuple[int, list[str]]:
    """(cases asked, one line for each in which the peer does otherwise than `check` says)."""
    asked = cases_of(peer)
    with tempfile.TemporaryDirectory() as scratch:
        adapters = [c.build() for c in asked]
        folders = [a.write(Path(scratch) / c.name) for a, c in zip(adapters, asked, strict=True)]
        answers = ask(peer, [(folder, c.options) for folder, c in zip(folders, asked, strict=True)])
        lines = []
        for c, adapter, folder, answer in zip(asked, adapters, folders, answers, strict=True):
            does = verdict(answer, truth(folder, adapter), adapter)
            says = told(folder, peer, c.options)
            if does != says:
                lines.append(f"{c.name}: check says {says}, {peer} does {does} {answer.get('why', '')}".strip())
    return len(asked), lines


def main(names: list[str]) -> int:
    failed = 0
    for peer in names or make.loaders():
        if make.environment(peer) is None:
            print(f"{peer} {make.version(peer)}: skipped, no environment (python tests/peers/make.py {peer})")
            continue
        count, lines = disagreements(peer)
        failed += bool(lines)
        print(f"{peer} {make.version(peer)}: ran, {count - len(lines)} of {count} adapters as check says")
        for line in lines:
            print(f"  {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
