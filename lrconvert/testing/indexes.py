"""Model folders in shards: an index and the files that it names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lrconvert.io.checkpoint import INDEX_NAME
from lrconvert.testing import lazy
from lrconvert.testing.raw_files import spelled, with_header

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy


def shard_indexes() -> SearchStrategy[dict[str, bytes]]:
    """Return folders, ``{name: bytes}``: a shard index, two or three shards of one-byte tensors, and a config.json."""
    st = lazy.st

    @st.composite
    def folders(draw: DrawFn) -> dict[str, bytes]:
        count = draw(st.integers(2, 3))
        shards: dict[str, list[str]] = {f"model-{n:05}-of-{count:05}.safetensors": [] for n in range(1, count + 1)}
        for n, names in enumerate(shards.values()):
            names += [f"h.{n}.{suffix}" for suffix in draw(st.sets(st.sampled_from("abc"), min_size=1))]
        weight_map = {name: shard for shard, names in shards.items() for name in names}
        index: dict[str, Any] = {"metadata": {"total_size": len(weight_map)}, "weight_map": weight_map}
        if draw(st.booleans()):
            del index["metadata"]
        folder = {"config.json": spelled({"model_type": "llama"}), INDEX_NAME: spelled(index)}
        for shard, names in shards.items():
            entries = {t: {"dtype": "U8", "shape": [1], "data_offsets": [n, n + 1]} for n, t in enumerate(names)}
            folder[shard] = with_header(entries, bytes(range(len(names))))
        return folder

    return folders()
