"""The tensors of a fine-tuned model beside those of its base, by headers alone: names, shapes, ties, views."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lrconvert.core.dtypes import FLOATS
from lrconvert.core.errors import BaseError, JsonSyntaxError
from lrconvert.core.wording import spelled
from lrconvert.io.checkpoint import Checkpoint
from lrconvert.io.container import TensorInfo
from lrconvert.lora import base_names
from lrconvert.lora.adapter import MATRIX, TRANSPOSED, Target, View
from lrconvert.lora.base_names import NameIndex

SMALL = 8  # the shorter side of a matrix that low rank makes no smaller
_EMBEDDING_WORDS = ("embed", "wte", "wpe")
_HEADS = ("embed_out", "lm_head")


@dataclass(frozen=True)
class Matched:
    """A tensor of the fine-tuned model and the one of the base that it was, under the base's `name`."""

    name: str
    tuned: TensorInfo
    base: TensorInfo

    @property
    def is_resized(self) -> bool:
        return self.tuned.shape != self.base.shape


@dataclass(frozen=True)
class Matching:
    """All tensors of two models: `pairs` of real numbers; `added`, which the base does not have; `absent`, names that
    only the base has; `tied` and `left_out`, names of the fine-tuned model that repeat another one, or that are no real
    numbers or not asked for."""

    pairs: tuple[Matched, ...]
    added: tuple[TensorInfo, ...]
    absent: tuple[str, ...]
    tied: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of both models that are read once."""
        return sum(pair.tuned.nbytes + pair.base.nbytes for pair in self.pairs)


def match(tuned: Checkpoint, base: Checkpoint, keeps: Callable[[str], bool]) -> Matching:
    """Return the tensors of two models side by side, those whose name in the base `keeps` chooses.

    Names may differ by a leading segment and by renamings of transformers. Raises E-BASE for a name that may be several
    of the base's, for other shapes, and where hardly a name agrees.
    """
    index = NameIndex.of(base)
    pairs: dict[str, Matched] = {}
    added, left_out, unplaced = [], [], []
    for name, info in tuned.tensors.items():
        place = index.find(name)
        if place is None:
            unplaced.append(info)
        elif not keeps(place) or info.dtype not in FLOATS or base.tensors[place].dtype not in FLOATS:
            left_out.append(place)
        elif place in pairs:
            what = f"{pairs[place].tuned.name!r} and {name!r} both mean the base's {place!r}"
            raise BaseError(what, path=tuned.root)
        else:
            pairs[place] = Matched(place, info, base.tensors[place])
    if not pairs and not left_out:
        example = next(iter(tuned.tensors), "")
        what = f"no tensor of the fine-tuned model is one of the base's, {example!r:.100} for one"
        raise BaseError(what, fix="is this the base that it was trained from?", path=tuned.root)
    tied = _drop_copies(pairs, tuned, base)
    for info in unplaced:
        source = base_names.tied_source(info.name, base)
        if source is None:
            if keeps(info.name):
                added.append(info)
            else:
                left_out.append(info.name)
        elif source in pairs and _same(tuned, info, pairs[source].tuned):
            tied.append(info.name)
        elif keeps(info.name):
            pairs[info.name] = Matched(info.name, info, base.tensors[source])
    absent = _absent(pairs, left_out, tied, tuned, base, keeps)
    every = tuple(pairs[name] for name in sorted(pairs))
    for pair in every:
        _check_shapes(pair, base)
    return Matching(every, tuple(added), tuple(absent), tuple(tied), tuple(left_out))


def _drop_copies(pairs: dict[str, Matched], tuned: Checkpoint, base: Checkpoint) -> list[str]:
    """Remove the output head that a base ties to its embedding and both models store twice; return its name."""
    names = [name for name in pairs if name.endswith(base_names.HEADS)]
    sources = [name for name in pairs if name.endswith(base_names.EMBEDDINGS) and name.count(".") <= 3]
    dropped = []
    for name in names:
        if len(sources) != 1 or not base_names.ties_embeddings(base.config):
            continue
        head, own = pairs[name], pairs[sources[0]]
        if _same(base, head.base, own.base) and _same(tuned, head.tuned, own.tuned):
            del pairs[name]
            dropped.append(name)
    return dropped


def _absent(
    pairs: dict[str, Matched],
    left_out: list[str],
    tied: list[str],
    tuned: Checkpoint,
    base: Checkpoint,
    keeps: Callable[[str], bool],
) -> list[str]:
    """Return the names of the base that the fine-tuned model has no values for. A head that it ties to its embedding
    gets that one's values, unless the base ties them, too."""
    absent = []
    for name, info in base.tensors.items():
        if name in pairs or name in left_out or name in tied or not keeps(name):
            continue
        source = base_names.tied_source(name, tuned)
        if source is None:
            absent.append(name)
        elif base_names.ties_embeddings(base.config):
            tied.append(name)
        else:
            pairs[name] = Matched(name, tuned.tensors[source], info)
    return absent


def _check_shapes(pair: Matched, base: Checkpoint) -> None:
    """Raise E-BASE for another shape, but for one with other rows: an embedding or a head that was resized."""
    one, other = pair.tuned.shape, pair.base.shape
    if one != other and not (len(one) == len(other) > 0 and one[1:] == other[1:]):
        what = f"{pair.name!r} is {list(one)} in the fine-tuned model, {list(other)} in the base"
        fix = f"is this its base? {spelled('exclude', ...)} leaves a tensor as the base has it"
        raise BaseError(what, fix=fix, path=base.root)


def _same(checkpoint: Checkpoint, one: TensorInfo, other: TensorInfo) -> bool:
    """Return whether two tensors of a model have the same bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    step = 1 << 22
    return one is other or all(
        checkpoint.read(one, start, min(step, one.nbytes - start))
        == checkpoint.read(other, start, min(step, one.nbytes - start))
        for start in range(0, one.nbytes, step)
    )


# --- views ----------------------------------------------------------------------------------------------------------


def targets(name: str, shape: tuple[int, ...], base: Checkpoint) -> tuple[Target, ...]:
    """Return the matrices in a parameter of the base, each of a layer or of an expert; none for what low rank makes no
    smaller, or that is no matrix. Raises E-BASE-QUANT and what asking the base's class does."""
    try:
        views = _views(name, shape, base)
        slices = tuple(Target(name, shape, view) for view in views)
        return tuple(target for target in slices if min(target.matrix_shape) > SMALL)
    except JsonSyntaxError:  # a kernel of more dimensions than views have
        return ()


def _views(name: str, shape: tuple[int, ...], base: Checkpoint) -> tuple[View, ...]:
    if len(shape) == 2:
        is_conv1d = base_names.may_be_transposed(base.config) and base_names.is_stored_transposed(name, base.config)
        return (TRANSPOSED if is_embedding(name) or is_conv1d else MATRIX,)
    if len(shape) == 3 and ("experts" in name.split(".") or not name.endswith(".weight")):
        kind = "expert_transposed" if base_names.is_stored_transposed(name, base.config) else "expert"
        return tuple(View(f"{kind}:{number}") for number in range(shape[0]))
    if len(shape) > 2:
        return (View(f"conv:{'x'.join(map(str, shape[2:]))}:1"),)
    return ()


def is_embedding(name: str) -> bool:
    """Return whether a parameter is the table of an embedding, by the name of its module: stored (words, features)."""
    module = name.removesuffix(".weight").rpartition(".")[2]
    is_named = any(word in module for word in _EMBEDDING_WORDS) or f".{name}".endswith(".shared.weight")
    return name.endswith(".weight") and is_named and module not in _HEADS
