"""The tensors that a PEFT file carries beside its LoRAs: whole modules, biases, embeddings, trained tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from lrconvert.core.dtypes import FLOATS, STORAGE, Stored, decode, round_to
from lrconvert.core.errors import (
    ConfigError,
    IndexRangeError,
    PairError,
    TensorUnknownError,
    UnsupportedLoraError,
)
from lrconvert.formats.readers.peft.config import Settings
from lrconvert.formats.readers.shared.weights import Weights, load_extra, load_finite
from lrconvert.io.container import TensorInfo
from lrconvert.lora.adapter import ExtraTensor

_SHARED = "shared"  # the embedding of encoder-decoders, which both sides hold in modules of their own, too


def read_extras(others: Mapping[str, Sequence[TensorInfo]], weights: Weights) -> Iterator[ExtraTensor]:
    """Yield whole tensors, byte for byte. PEFT may store one twice, under its own name and as modules_to_save: raises
    E-TENSOR if the two differ."""
    for name, infos in others.items():
        first, *rest = (load_extra(name, info, weights) for info in infos)
        for info, extra in zip(infos[1:], rest, strict=True):
            if extra != first:
                raise TensorUnknownError(f"tensors {infos[0].name!r} and {info.name!r} mean the same, but differ")
        yield first


def read_tokens(
    tokens: Mapping[str, TensorInfo], whole: Mapping[str, ExtraTensor], settings: Settings, weights: Weights
) -> Iterator[ExtraTensor]:
    """Yield trained rows of embeddings, in rising order, and which rows they are.

    Where the file also holds the whole embedding (`whole`, by name), as after a resize, the rows are put into it.
    Raises E-CONFIG, E-PAIR, E-INDEX, E-LORA-FEATURE.
    """
    if settings.tokens and not tokens:
        raise ConfigError("trainable_token_indices is set, but the file holds no trained rows")
    for module, info in tokens.items():
        name = f"{module}.weight"
        indices = np.asarray(_rows(module, tokens, settings, weights), np.int64)
        order = np.argsort(indices, kind="stable")
        if len(set(indices.tolist())) < indices.size:
            raise IndexRangeError(f"{module}: trainable_token_indices names a row twice")
        if len(info.shape) != 2 or info.shape[0] != indices.size:
            raise PairError(
                f"{module}: {info.name!r} is {list(info.shape)}, the configuration names {indices.size} rows"
            )
        rows = load_finite(weights, info)
        rows = Stored(rows.dtype, rows.array[order])
        if name in whole and module.rpartition(".")[2] == _SHARED:
            raise UnsupportedLoraError(
                f"{module}: new tokens were trained on a resized model with an encoder and a decoder, and PEFT gives "
                "them to this module and the head, but not to the embeddings of encoder and decoder",
                fix="merge it with PEFT (merge_and_unload), or train the whole embedding (modules_to_save)",
            )
        if name in whole:
            yield _with_rows(whole[name], rows, indices[order])
            continue
        yield ExtraTensor(name, rows.dtype, rows.shape, rows.array.tobytes(), "rows")
        yield ExtraTensor(name, "I64", (indices.size,), indices[order].astype("<i8").tobytes(), "row_indices")


def _rows(module: str, tokens: Mapping[str, TensorInfo], settings: Settings, weights: Weights) -> tuple[int, ...]:
    """Return the rows of an embedding that were trained, by PEFT's rule: a module's path ends with the name in the
    configuration; a plain list is for the input embedding. A tied output head, which the configuration does not name,
    has the same rows, to the bit."""
    named = {other: rows for other in tokens for name, rows in settings.tokens.items() if other.endswith(name)}
    if module in named:
        return named[module]
    stored = weights.read(tokens[module])
    for other, rows in named.items():
        if weights.read(tokens[other]) == stored:
            return rows
    raise ConfigError(f"{module}: rows were trained, but trainable_token_indices does not say which")


def _with_rows(whole: ExtraTensor, rows: Stored, indices: np.ndarray) -> ExtraTensor:
    """Return a whole embedding with trained rows in it, in the dtype of the whole, as PEFT puts them there."""
    array = np.frombuffer(whole.data, STORAGE[whole.dtype]).reshape(whole.shape).copy()
    if array.ndim != 2 or array.shape[1] != rows.shape[1] or indices[-1] >= array.shape[0]:
        raise IndexRangeError(f"{whole.name}: row {indices[-1]} of {list(rows.shape)} is outside {list(whole.shape)}")
    if rows.dtype == whole.dtype:
        array[indices] = rows.array
    elif whole.dtype in FLOATS:
        array[indices] = round_to(decode(rows.array, rows.dtype), whole.dtype)
    else:
        raise TensorUnknownError(f"{whole.name}: the rows are {rows.dtype}, the whole is {whole.dtype}")
    return ExtraTensor(whole.name, whole.dtype, whole.shape, array.tobytes())
