"""Checkpoints of training frameworks that hold an adapter in shards or in an order of their own: what each is, and
which program of that framework makes an adapter of it that is read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lrconvert.core.errors import UnknownLayoutError

_MOST = 10_000  # entries of a folder that are looked at
_BRIDGE = "export it with Megatron-Bridge (AutoBridge.export_adapter_ckpt) and convert the folder that it writes"
_NEMO = (
    "export it with NeMo (llm.peft.export_lora; of NeMo 1 scripts/checkpoint_converters/lora_converters) as a "
    "Hugging Face adapter and convert that"
)
_SWIFT = "export it with ms-swift (`megatron export` with adapter_load, with to_hf, without merge_lora)"
_GATHER = (
    "make whole weights with the checkpoint's zero_to_fp32.py, or save it again with "
    "stage3_gather_16bit_weights_on_model_save"
)
_FSDP = "save it again with FULL_STATE_DICT, or join it with `accelerate merge-weights`"
# (names, all of which are in the folder, what it is, what to do). The first that fits wins.
_FOLDERS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    ((r"run_config\.yaml", r".*\.distcp"), "a checkpoint of Megatron-Bridge, in shards", _BRIDGE),
    ((r"iter_\d+", r"args\.json"), "a checkpoint of ms-swift's Megatron, in shards", _SWIFT),
    ((r"iter_\d+",), "a folder of checkpoints of Megatron, in shards", _BRIDGE),
    (("context", "weights"), "a checkpoint of NeMo 2, in shards", _NEMO),
    (("adapter_metadata\\.json", r".*\.distcp"), "the weights of a checkpoint of NeMo 2, in shards", _NEMO),
    (("model_config\\.yaml", r"model_weights(\.ckpt)?"), "an unpacked .nemo archive", _NEMO),
    ((r"(zero_pp_rank_\d+_)?mp_rank_\d+_(model|optim)_states\.pt",), "a checkpoint of DeepSpeed, in shards", _GATHER),
    ((r"global_step\d+",), "a checkpoint of DeepSpeed, in shards", _GATHER),
    (("zero_to_fp32\\.py",), "a checkpoint of DeepSpeed, in shards", _GATHER),
    ((r"(pytorch_model|model)_fsdp_\d+",), "a checkpoint of FSDP, in shards", _FSDP),
    (("\\.metadata", r".*\.distcp"), "a distributed checkpoint of torch, in shards", _FSDP),
)
_STATE = re.compile(
    r"(optimizer|scheduler|lr_scheduler|scaler|training_args|trainer_state|rng_state(_\d+)?|random_states_\d+)"
    r"\.(pt|pth|bin|ckpt)"
)


def is_state(name: str) -> bool:
    """Return whether a file holds the state of a training, not weights, by its name."""
    return _STATE.fullmatch(name) is not None


def refused(path: Path) -> UnknownLayoutError | None:
    """Return the error that says what a checkpoint is and which converter makes an adapter of it; None for another
    path. Looks at names alone, and never raises."""
    if path.suffix == ".nemo":
        what = "is an archive of NeMo, whose fused layers keep their rows in its order"
        return UnknownLayoutError(what, fix=_NEMO, path=path)
    names = _names(path)
    for wanted, what, fix in _FOLDERS:
        if names and all(any(re.fullmatch(pattern, name) for name in names) for pattern in wanted):
            return UnknownLayoutError(f"is {what}", fix=fix, path=path)
    return None


def _names(path: Path) -> Sequence[str]:
    try:
        if not path.is_dir():
            return ()
        return [entry.name for _, entry in zip(range(_MOST), path.iterdir(), strict=False)]
    except OSError:
        return ()
