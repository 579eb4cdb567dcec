"""Every cap in one place, each with its reason. Nothing is allocated before its size was checked against these.

Two profiles (decision: strict for our own files, roomy for what other tools write): `OWN` and `FOREIGN`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

MAX_INT = 2**53 - 1  # the largest integer that every JSON reader keeps exact
MAX_DIM = 2**31 - 1  # the largest dimension an int32 kernel can index
MAX_RANK = 4096  # above any LoRA seen; a rank beyond it is a full matrix in disguise
MAX_EXPAND_BYTES = 64 * GIB  # factors in float32 that a compact file may ask for when it is expanded
MAX_DRAWN = 1 << 38  # seeded numbers of one file: 70B with k = 512 takes 2^37, an hour or two on two cores
MAX_CODED = 1 << 30  # entropy-coded numbers of one tensor: 70B with rank 64 on all linear layers has 0.8 times as many
MAX_VECTORS = 1 << 20  # rows of a vector bank
MAX_SHARDS = 10_000
MAX_LISTED = 100_000  # files of one adapter's folder at a URL, listed to tell which of them are needed
MAX_FETCHED = 64 * GIB  # bytes of one adapter that is fetched from a URL: far above any; a model is not meant
MAX_PATTERN_LENGTH = 1_000  # characters of one rank_pattern / alpha_pattern key
MAX_PATTERNS = 4_096
MAX_PATTERN_STEPS = 1 << 31  # of matching all patterns to all modules: a few seconds; real adapters take millions
# Of one JSON text; a header of 2^20 tensors has 5, 9 and 3 of them each. A few seconds of parsing at most.
MAX_JSON = {"strings": 6 << 20, "values": 10 << 20, "objects and lists": 13 << 18}
MAX_CONFIG_BYTES = 4 * MIB  # adapter_config.json, config.json
MAX_INDEX_BYTES = 256 * MIB  # model.safetensors.index.json of 2^20 tensors
BLOCK_BYTES = 16 * MIB  # one block of a merge, in the dtype it is computed in
MAX_RATIONAL = 1 << 20  # elements of one merge that only rational arithmetic can round: a minute; real files have none


@dataclass(frozen=True)
class Limits:
    """Caps of one container profile. Sizes in bytes."""

    header_bytes: int
    json_depth: int
    string_bytes: int
    tensors: int
    name_bytes: int
    ndim: int
    dim: int  # of a stored tensor; the shapes in a manifest are bounded by MAX_DIM
    file_bytes: int
    least_dim: int = 1


OWN = Limits(
    header_bytes=8 * MIB,
    json_depth=8,
    string_bytes=4 * KIB,
    tensors=65_536,
    name_bytes=255,
    ndim=4,
    dim=16 * GIB,  # all tensors lie flat: the size of the file is the bound
    file_bytes=16 * GIB,
)
FOREIGN = Limits(
    header_bytes=100_000_000,  # safetensors' own cap
    json_depth=16,
    string_bytes=32 * MIB,  # kohya keeps whole tag tables in one metadata string
    tensors=1 << 20,
    name_bytes=4 * KIB,
    ndim=8,
    dim=MAX_DIM,
    file_bytes=1 << 44,
)
ADAPTER = replace(FOREIGN, least_dim=0)  # DeepSpeed's ZeRO-3 leaves empty tensors in them, which are told apart
