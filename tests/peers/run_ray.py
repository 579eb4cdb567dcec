"""Ray: the recipe of docs/guides/batches.md, in an environment of its own.

    run_ray.py ADAPTERS OUT

Prints a JSON object: how many outcomes of each state.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter

from runner import library, prefer

prefer(library("ray"))


def main() -> None:
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    os.environ |= {
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    import ray

    from lrconvert import batch_jobs, convert_one

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20)
    convert = ray.remote(max_retries=3)(convert_one)
    counts: Counter[str] = Counter()
    waiting: list[object] = []
    for job in batch_jobs(sys.argv[1], sys.argv[2], "bone", rank=2, bits=16):
        if len(waiting) >= 8:
            (ready,), waiting = ray.wait(waiting)
            counts[ray.get(ready).state] += 1
        waiting.append(convert.remote(job))
    counts.update(outcome.state for outcome in ray.get(waiting))
    ray.shutdown()
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
