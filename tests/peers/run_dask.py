"""Dask: a batch on a cluster of this machine while its workers are killed, in an environment of its own.

    run_dask.py ADAPTERS OUT LOG KILLS

Prints a JSON object: how many outcomes of each state, how many workers were killed, and of the jobs that began more
than once how many were in flight at a worker that was killed (`again`), which were not (`unexplained`), and which had
an outcome before (`late`), but for those of a worker that was killed (`unheard`): a scheduler that has not heard yet
that an outcome arrived computes it anew. Every worker logs what it begins and ends (`log_jobs.py`), and the batch each
outcome.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from runner import library, prefer

prefer(library("dask"))
HERE = Path(__file__).resolve().parent
LAST = 800  # adapters, after which no worker is killed any more


def kill(cluster: Any, log: Path, count: int, killed: list[int], held: list[int], is_over: threading.Event) -> None:
    """Kill random workers that are at work, each when a random number of adapters is done. One that has not begun to
    work is left alone: who kills it while it starts stops the one that would start another."""
    draw = random.Random()
    moments = sorted(draw.sample(range(LAST), count))
    while len(killed) < count and not is_over.wait(0.05):
        lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
        begun = {int(line[2]) for line in lines if line[0] == "begins"}
        there = [nanny for nanny in cluster.workers.values() if nanny.pid in begun - {*killed}]
        if there and sum(line[0] == "lands" for line in lines) >= moments[len(killed)]:
            nanny = draw.choice(there)
            pid, known = nanny.pid, cluster.scheduler.workers.get(nanny.worker_address)
            held.append(0 if known is None else len(known.has_what))
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)


def main() -> None:
    adapters, out, log, kills = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    os.environ["LOG_JOBS"] = str(log)
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    os.environ["DASK_DISTRIBUTED__WORKER__PRELOAD"] = json.dumps([str(HERE / "log_jobs.py")])
    # Else the cluster gives up a worker that is killed again while it is started anew.
    os.environ["DASK_DISTRIBUTED__DEPLOY__LOST_WORKER_TIMEOUT"] = "1 hour"
    from dask.distributed import LocalCluster

    from lrconvert import convert_many

    def land(outcome: Any) -> None:
        with log.open("a") as file:
            file.write(f"lands {Path(outcome.source).name} 0\n")

    killed: list[int] = []
    held: list[int] = []  # outcomes that the scheduler believed to lie at a worker when it was killed
    is_over = threading.Event()
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, host="127.0.0.1") as cluster:
        hunter = threading.Thread(target=kill, args=(cluster, log, kills, killed, held, is_over))
        hunter.start()
        start = time.monotonic()
        try:
            done = convert_many(
                adapters, out, "bone", rank=2, bits=16, scheduler=cluster.scheduler_address, on_outcome=land
            )
        finally:
            is_over.set()
            hunter.join()
    seconds = round(time.monotonic() - start, 1)
    counts = {"counts": dict(done.counts), "killed": len(killed), "held": sum(held), "seconds": seconds}
    print(json.dumps({**counts, **repeats(log, killed)}))


def repeats(log: Path, killed: list[int]) -> dict[str, Any]:
    """What the log says of jobs that began more than once."""
    begun: dict[str, int] = {}
    landed: set[str] = set()
    told: dict[str, Any] = {"again": 0, "unheard": 0, "unexplained": [], "late": []}
    for what, name, pid in (line.split() for line in log.read_text().splitlines()):
        if what == "lands":
            landed.add(name)
        elif what == "begins":
            if name in landed:
                told["unheard"] += begun[name] in killed
                told["late"] += [name] if begun[name] not in killed else []
            elif name in begun and begun[name] in killed:
                told["again"] += 1
            elif name in begun:
                told["unexplained"].append(name)
            begun[name] = int(pid)
    return told


if __name__ == "__main__":
    main()
