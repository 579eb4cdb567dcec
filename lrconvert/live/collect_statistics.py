"""Collecting input statistics: a forward pass of a live model, with its layers' inputs summed up on the way.

Layers that are given the same tensor share one sum. Only real tokens count. Exact second moments are summed in float64;
of wide inputs a linear sketch is kept, ``Y = M Omega`` with random signs Omega (in, m), from which a Nystrom
approximation of rank m follows (Tropp et al., "Fixed-rank approximation of a positive-semidefinite matrix from
streaming data", 2017): a sum as well, so that it costs two thin matrix products, and the order of batches and a pause
between them do not matter.
"""

from __future__ import annotations

import hashlib
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lrconvert.core.dtypes import F32, Array
from lrconvert.core.errors import DataError, StatisticsError, ValueRangeError
from lrconvert.lora import renamings, statistics_file
from lrconvert.lora.input_statistics import Input, InputStatistics, Moment

EXACT_WIDTH = 1024  # inputs up to this width keep their whole moment: 4 MB
SKETCH_RANK = 256
_CHUNK = 1 << 24  # numbers that are converted to float32 at once
_MASKS = ("attention_mask", "decoder_attention_mask")

Batch = Mapping[str, Any]
Key = tuple[str, int | None]  # a parameter, and which expert of it


@dataclass(frozen=True)
class Settings:
    """How moments are kept: exact up to `exact_width`, sketches of `rank` above; `seed` draws these."""

    exact_width: int = EXACT_WIDTH
    rank: int = SKETCH_RANK
    seed: int = 0


# --- sums -----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Sum:
    """The running sum of one input: `tokens`; `square` (n, n) float64, or `diagonal` (n,) float64 with `sketch` (n, m)
    float32, None for embeddings."""

    width: int
    tokens: int = 0
    square: Tensor | None = None
    diagonal: Tensor | None = None
    sketch: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        found = {"square": self.square, "diagonal": self.diagonal, "sketch": self.sketch}
        return {name: value for name, value in found.items() if value is not None}

    def add(self, x: Tensor, omega: Tensor | None) -> None:
        """Count the rows of x (tokens, n); `omega` (n, m) if this is a sketch."""
        self.tokens += len(x)
        step = max(1, _CHUNK // self.width)
        for start in range(0, len(x), step):
            some = x[start : start + step].float()
            if omega is None:
                self.square = _plus(self.square, (some.T @ some).double())
                continue
            self.diagonal = _plus(self.diagonal, (some * some).sum(0).double())
            self.sketch = _plus(self.sketch, some.T @ (some @ omega))

    def count(self, ids: Tensor) -> None:
        """Count tokens: the input of an embedding is a unit vector."""
        self.tokens += ids.numel()
        self.diagonal = _plus(self.diagonal, torch.bincount(ids.reshape(-1), minlength=self.width).double())

    def moment(self, omega: Tensor | None) -> Moment:
        """The mean. Raises E-VALUE if there are values that are no numbers."""
        if not all(bool(value.isfinite().all()) for value in self.tensors().values()):
            raise ValueRangeError("an activation is NaN or infinite", fix="try float32, or other data")
        scale = 1.0 / max(1, self.tokens)
        if self.square is not None:
            return Moment(self.tokens, matrix=_single(self.square * scale))
        assert self.diagonal is not None
        diagonal = _single(self.diagonal * scale)
        if self.sketch is None or omega is None:
            return Moment(self.tokens, diagonal=diagonal)
        rows = _nystrom(self.sketch.double() * scale, omega.double())
        return Moment(self.tokens, diagonal=diagonal, rows=_single(rows))


def _plus(total: Tensor | None, value: Tensor) -> Tensor:
    return value if total is None else total.add_(value)


def _single(x: Tensor) -> F32:
    found: F32 = x.float().cpu().numpy()
    return found


def _nystrom(y: Tensor, omega: Tensor) -> Tensor:
    """R (m, n) with ``R^T R = Y (Omega^T Y)^+ Y^T`` for Y = M Omega (n, m), float64; it does not exceed M. A shift by
    what float32 sums may be off keeps the root real."""
    shift = float(y.norm()) * 2.0**-22 / omega.shape[0] ** 0.5
    y = y + shift * omega
    core = omega.T @ y
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    known = values > 2.0**-22 * values.amax()
    root = vectors[:, known] / values[known].sqrt()
    found: Tensor = (y @ root).T.contiguous()
    return found


# --- what a model is given ------------------------------------------------------------------------------------------


def masks_of(batch: Batch, is_encoder_decoder: bool) -> tuple[Tensor, ...]:
    """Which tokens are real, (batch, length) each. Raises E-DATA where that is undecided."""
    found = [batch[name].bool() for name in _MASKS if _is_mask(batch.get(name))]
    labels = batch.get("labels")
    if is_encoder_decoder and "decoder_attention_mask" not in batch and labels is not None and labels.dim() == 2:
        found.append(labels != -100)
    for one in found:
        for other in found:
            if one.shape == other.shape and not bool((one == other).all()):
                raise DataError(
                    "the two attention masks of a batch have one shape and differ: whose padding a layer sees is "
                    "undecided",
                    fix="pad encoder and decoder to different lengths",
                )
    return tuple(mask for mask in found if not bool(mask.all()))


def _is_mask(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2


def _real(x: Tensor, masks: Iterable[Tensor], trailing: int) -> Tensor:
    """x as rows, without those of padding: (tokens, ...) with the `trailing` dimensions of one token kept."""
    leading = x.shape[: x.dim() - trailing]
    rows = x.reshape(-1, *x.shape[x.dim() - trailing :])
    for mask in masks:
        if leading == mask.shape or leading == (mask.numel(),):
            return rows[mask.reshape(-1).to(rows.device)]
    return rows


def rows_of(layer: nn.Module, x: Tensor, masks: Iterable[Tensor]) -> Tensor:
    """What a layer multiplies its weight with, as rows: (tokens, in), without padding; for an embedding the tokens."""
    if isinstance(layer, nn.Embedding):
        return _real(x, masks, 0)
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        return patches(layer, x)
    return _real(x, masks, 1)


def patches(layer: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """What a convolution multiplies its unfolded kernels with: (patches, in/G * K * L), of all groups."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    if isinstance(layer, nn.Conv1d):
        x, kernel, stride, dilation = x[:, :, None], (1, *kernel), (1, *stride), (1, *dilation)
    columns = F.unfold(x.float(), kernel, dilation, 0, stride)  # (batch, in * K * L, places)
    per_group = columns.reshape(len(x), layer.groups, -1, columns.shape[2])
    return per_group.movedim(2, 3).flatten(0, 2)


# --- collecting -----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Seen:
    """A tensor that a layer was given in the present forward pass, and who counts it."""

    tensor: weakref.ref[Tensor]
    version: int
    leader: Key


@dataclass(eq=False)
class Collector:
    """The sums of a model's inputs. Batches may be added in any number of sittings: `sums` and `leaders` are all that
    there is to keep."""

    settings: Settings = Settings()
    leaders: dict[Key, Key] = field(default_factory=dict)  # of each parameter, whose sum its input is in
    sums: dict[Key, Sum] = field(default_factory=dict)
    _omegas: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict)
    masks: tuple[Tensor, ...] = ()  # of the present forward pass
    _seen: dict[int, _Seen] = field(default_factory=dict)
    _new: set[Key] = field(default_factory=set)

    def omega(self, width: int, device: torch.device) -> Tensor | None:
        """The random signs (width, m) of a sketch; None if the width is kept exactly."""
        if width <= max(self.settings.exact_width, self.settings.rank):  # a sketch as wide as its input saves nothing
            return None
        if (width, device) not in self._omegas:
            rng = np.random.default_rng((self.settings.seed, width))
            signs = rng.integers(0, 2, (width, self.settings.rank), np.int8).astype(np.float32) * 2 - 1
            self._omegas[width, device] = torch.from_numpy(signs).to(device)
        return self._omegas[width, device]

    def run(self, model: nn.Module, batch: Batch) -> None:
        """One forward pass; the model must be `watched`."""
        config: Any = getattr(model, "config", None)
        self.masks = masks_of(batch, bool(getattr(config, "is_encoder_decoder", False)))
        self._seen, self._new = {}, set()
        with torch.no_grad():
            model(**batch)
        self._seen = {}

    def _count(self, key: Key, x: Tensor) -> Sum | None:
        """The sum that takes x for a parameter; None if another one takes this very tensor. Raises E-STATS if layers
        that were given one tensor are now given two."""
        seen = self._seen.get(id(x))
        known = seen is not None and seen.tensor() is x and seen.version == x._version
        leader = self.leaders.get(key)
        if leader is None:
            # Only an input that began in this very pass has no tokens that the newcomer did not get.
            leader = seen.leader if seen is not None and known and seen.leader in self._new else key
            self.leaders[key] = leader
            if leader == key:
                self._new.add(key)
        if leader == key:
            self._seen[id(x)] = _Seen(weakref.ref(x), x._version, key)
            return self.sums.setdefault(key, Sum(0))
        if seen is None or not known or seen.leader != leader:
            raise StatisticsError(
                f"{key[0]!r} and {leader[0]!r} shared their input at first and do not now",
                fix="collect them one after the other, with --include",
            )
        return None

    def matrix(self, key: Key, x: Tensor, rows: Tensor | None = None) -> None:
        """Count the input x (..., n) of a linear layer; `rows`: those of real tokens, if it is known which they are."""
        total = self._count(key, x)
        if total is not None:
            self._add(total, _real(x, self.masks, 1) if rows is None else rows)

    def _add(self, total: Sum, rows: Tensor) -> None:
        total.width = rows.shape[-1]
        if len(rows):
            total.add(rows, self.omega(total.width, rows.device))

    def layer(self, key: Key, layer: nn.Module, x: Tensor) -> None:
        """Count the input of a layer of any known kind."""
        if isinstance(layer, nn.Embedding):
            total = self._count(key, x)
            if total is not None:
                total.width = layer.num_embeddings
                total.count(rows_of(layer, x, self.masks))
        elif isinstance(layer, (nn.Conv1d, nn.Conv2d)):
            # Unfolded inputs depend on the layer's kernel: never shared.
            self.leaders[key] = key
            step = max(1, _CHUNK // max(1, x[0].numel() * int(np.prod(layer.kernel_size))))
            for start in range(0, len(x), step):
                self._add(self.sums.setdefault(key, Sum(0)), patches(layer, x[start : start + step]))
        else:
            self.matrix(key, x)

    def inputs(self) -> Iterator[tuple[Input, Moment]]:
        """What was collected, by name."""
        members: dict[Key, list[Key]] = {}
        for key, leader in self.leaders.items():
            members.setdefault(leader, []).append(key)
        groups = [(sorted(keys, key=_order), self.sums[leader]) for leader, keys in members.items()]
        for keys, total in sorted(groups, key=lambda group: _order(group[0][0])):
            if total.tokens == 0:
                continue
            device = next(iter(total.tensors().values())).device
            sketched = self.omega(total.width, device) if total.sketch is not None else None
            names = tuple(name for name, _ in keys)
            yield Input(names, keys[0][1], total.width, total.tokens), total.moment(sketched)


def _order(key: Key) -> tuple[str, int]:
    """By name, then by expert; also how half-done work spells a key."""
    return key[0], -1 if key[1] is None else key[1]


# --- watching a model -----------------------------------------------------------------------------------------------


@contextmanager
def watched(model: nn.Module, collector: Collector, wanted: Iterable[str] | None = None) -> Iterator[tuple[str, ...]]:
    """While the context lasts the model is in evaluation mode, and each forward pass that `collector` runs counts the
    inputs of its layers: all, or those whose parameters are `wanted`. Gives their names. Raises E-STATS for none.
    """
    chosen = None if wanted is None else set(wanted)
    layers = {name: layer for name, layer in known_layers(model).items() if chosen is None or name in chosen}
    stacks = {name: module for name, module in expert_stacks(model).items() if chosen is None or name in chosen}
    if not layers and not stacks:
        raise StatisticsError(
            "no layer of the model is asked for", fix="see the names with `inspect`, or leave out --include"
        )
    training = [module for module in model.modules() if module.training]
    with ExitStack() as stack:
        model.eval()
        stack.callback(_train, training)
        for name, layer in layers.items():
            stack.enter_context(_hooked(layer, name, collector))
        if stacks:
            stack.enter_context(_one_by_one(model))
            for module in dict.fromkeys(stacks.values()):
                names = {
                    leaf: name
                    for name, owner in stacks.items()
                    if owner is module
                    for leaf in [name.rpartition(".")[2]]
                }
                stack.enter_context(_experts_hooked(module, names, collector))
        yield (*layers, *stacks)


def _train(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        module.training = True


def known_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers whose inputs can be counted, by the names of their weights."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        name = f"{path.removesuffix('.base_layer')}.weight"
        if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d)) or type(module).__name__ == "Conv1D":
            found[name.replace(".base_layer.", ".")] = module
    return found


def expert_stacks(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that hold stacks of experts (experts, out, in), by the names of the stacks."""
    found = {}
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and "expert" in path.lower():
                found[f"{path}.{leaf}"] = module
    return found


@contextmanager
def _hooked(layer: nn.Module, name: str, collector: Collector) -> Iterator[None]:
    def look(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        collector.layer((name, None), module, given[0] if given else next(iter(named.values())))

    handle = layer.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _one_by_one(model: nn.Module) -> Iterator[None]:
    """Experts computed one after the other, each by matrix products of its own, which can be watched."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    before = [(c, c._experts_implementation) for c in configs.values() if hasattr(c, "_experts_implementation")]
    for config, _ in before:
        config._experts_implementation = "eager"
    try:
        yield
    finally:
        for config, value in before:
            config._experts_implementation = value


_PRODUCTS = (F.linear, torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__)


class _ProductsOfExperts(TorchFunctionMode):
    """Counts the inputs of products with an entry of a stack."""

    def __init__(self, stacks: Mapping[str, Tensor], collector: Collector, routed: Tensor | None) -> None:
        super().__init__()
        self.stacks, self.collector, self.routed = stacks, collector, routed

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if len(args) > 1 and func in _PRODUCTS:
            x, weight = args[0], args[1]
            for name, stack in self.stacks.items():
                place = _entry(weight, stack)
                if place is not None:
                    self.collector.matrix((name, place), x, self._real(x, place))
                elif func is torch.bmm and weight is stack:  # all tokens for all experts, zero where not routed
                    for place, some in enumerate(x):
                        self.collector.matrix((name, place), some, some[some.any(1)])
        return func(*args, **(kwargs or {}))

    def _real(self, x: Tensor, place: int) -> Tensor:
        """x without the rows of padding, where the experts' module said which tokens go to which expert."""
        masks = self.collector.masks
        if self.routed is None or not masks:
            return x
        tokens = torch.where((self.routed == place).T)[1]  # by rank among a token's experts, then by token
        for mask in masks:
            if mask.numel() == len(self.routed) and len(tokens) == len(x):
                return x[mask.reshape(-1).to(x.device)[tokens]]
        return x


def _entry(weight: Any, stack: Tensor) -> int | None:
    """Which entry of a stack a weight is a view of, or None."""
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.device != stack.device:
        return None
    if weight.untyped_storage().data_ptr() != stack.untyped_storage().data_ptr():
        return None
    place = (weight.storage_offset() - stack.storage_offset()) // stack.stride(0)
    return place if 0 <= place < len(stack) and sorted(weight.shape) == sorted(stack.shape[1:]) else None


@contextmanager
def _experts_hooked(module: nn.Module, names: Mapping[str, str], collector: Collector) -> Iterator[None]:
    """`names`: of the module's stacks, by their attribute."""
    modes: list[_ProductsOfExperts] = []

    def enter(owner: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        values = [*given, *named.values()]
        routed = next((v for v in values if isinstance(v, Tensor) and v.dim() == 2 and not v.is_floating_point()), None)
        stacks = {name: getattr(owner, leaf) for leaf, name in names.items()}
        mode = _ProductsOfExperts(stacks, collector, routed)
        mode.__enter__()  # type: ignore[no-untyped-call]
        modes.append(mode)

    def leave(owner: nn.Module, given: Any, output: Any) -> None:
        modes.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    handles = (module.register_forward_pre_hook(enter, with_kwargs=True),)
    handles += (module.register_forward_hook(leave, always_call=True),)  # type: ignore[assignment]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- from batches to statistics -------------------------------------------------------------------------------------


def collect(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    settings: Settings = Settings(),
    wanted: Iterable[str] | None = None,
    content: str = "",
    partial: Path | None = None,
    every: float = 600.0,
    progress: Callable[[int], None] = lambda tokens: None,
) -> InputStatistics:
    """The statistics of a model's inputs over `batches` (model inputs each): of all its layers, or of those whose
    parameters are `wanted`. `content`: the digest of its base.

    With a path `partial` the sums are kept there every so many seconds, and work that was kept goes on where it was:
    the result is that of a run without a pause. The file stays: whoever has put the result away removes it. `progress`
    is told how many tokens a batch had. Raises E-STATS, E-DATA, E-VALUE.
    """
    collector = Collector(settings)
    device = next(iter(model.parameters())).device
    hasher, tokens, done = hashlib.sha256(), 0, 0
    kept = _kept(partial, settings, content)
    last = time.monotonic()
    with watched(model, collector, wanted) as names:
        about = {
            "settings": asdict(settings),
            "content": content,
            "names": hashlib.sha256("\n".join(names).encode()).hexdigest(),
        }
        for number, batch in enumerate(batches):
            add_digest(hasher, batch)
            if kept is not None and number < kept[0]["batches"]:
                if number + 1 == kept[0]["batches"]:
                    tokens = _resume(collector, kept, {**about, "data": hasher.hexdigest()}, device, partial)
            else:
                collector.run(model, {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
                tokens += token_count(batch)
            done = number + 1
            progress(token_count(batch))
            if partial is not None and time.monotonic() - last > every:
                _keep(collector, {**about, "data": hasher.hexdigest(), "batches": done, "tokens": tokens}, partial)
                last = time.monotonic()
    if kept is not None and done < kept[0]["batches"]:
        raise _other_work(partial)
    found = list(collector.inputs())
    if not found:
        raise DataError("no token reached a layer", fix="is the data empty?")
    moments = [moment for _, moment in found]
    return InputStatistics(
        tuple(some for some, _ in found), moments.__getitem__, content, hasher.hexdigest(), tokens, families_of(model)
    )


def families_of(model: nn.Module) -> tuple[str, ...]:
    """The model types that a live model's configuration names."""
    config: Any = getattr(model, "config", None)
    return tuple(dict.fromkeys(renamings.families(config.to_dict() if hasattr(config, "to_dict") else {})))


def token_count(batch: Batch) -> int:
    """Real tokens of a batch; rows where it has no tokens (images)."""
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return int(mask.bool().sum())
    if isinstance(ids, Tensor):
        return ids.numel()
    return max((len(v) for v in batch.values() if isinstance(v, Tensor)), default=0)


def add_digest(hasher: hashlib._Hash, batch: Batch) -> None:
    """Add a batch: every tensor by name, dtype, shape and bytes."""
    for name in sorted(batch):
        value = batch[name]
        if isinstance(value, Tensor):
            array = value.detach().cpu().contiguous()
            hasher.update(f"{name} {array.dtype} {tuple(array.shape)}\n".encode())
            hasher.update(array.reshape(-1).view(torch.uint8).numpy().tobytes())


_Kept = tuple[dict[str, Any], dict[str, Array]]


def _keep(collector: Collector, about: Mapping[str, Any], path: Path) -> None:
    keys = sorted(collector.sums, key=_order)
    numbers = {key: n for n, key in enumerate(keys)}
    sums = [[*_order(key), collector.sums[key].width, collector.sums[key].tokens] for key in keys]
    leaders = [
        [*_order(key), numbers[leader]]
        for key, leader in sorted(collector.leaders.items(), key=lambda kv: _order(kv[0]))
    ]
    dtypes = {torch.float64: "F64", torch.float32: "F32"}
    arrays = [
        (f"{name}.{numbers[key]}", dtypes[value.dtype], value.cpu().numpy())
        for key in keys
        for name, value in collector.sums[key].tensors().items()
    ]
    statistics_file.write_partial(path, {**about, "sums": sums, "leaders": leaders}, arrays)


def _kept(path: Path | None, settings: Settings, content: str) -> _Kept | None:
    """Earlier work, if there is any. Raises E-STATS if it is not of the same kind."""
    if path is None or not path.exists():
        return None
    kept = statistics_file.read_partial(path)
    fields = kept[0]
    if fields.get("settings") != asdict(settings) or fields.get("content") != content:
        raise _other_work(path)
    if type(fields.get("batches")) is not int:
        raise _other_work(path)
    return kept


def _other_work(path: Path | None) -> StatisticsError:
    return StatisticsError(
        "this half-done work is of another base, other data or other options",
        fix="remove the file to start anew, or give what it was begun with",
        path=path,
    )


def _resume(
    collector: Collector, kept: _Kept, about: Mapping[str, Any], device: torch.device, path: Path | None
) -> int:
    """Take up kept sums; returns the tokens they are of. Raises E-STATS if the batches until here were other ones, or
    the sums are not those of our own program."""
    fields, arrays = kept
    if any(fields.get(name) != value for name, value in about.items()):
        raise _other_work(path)
    try:
        return _take_up(collector, fields, arrays, device)
    except (KeyError, IndexError, TypeError, ValueError):
        raise _other_work(path) from None


def _take_up(collector: Collector, fields: Mapping[str, Any], arrays: Mapping[str, Array], device: torch.device) -> int:
    keys: list[Key] = []
    for n, (name, expert, width, tokens) in enumerate(fields["sums"]):
        parts = {
            p: torch.from_numpy(arrays[f"{p}.{n}"].copy()).to(device)
            for p in ("square", "diagonal", "sketch")
            if f"{p}.{n}" in arrays
        }
        keys.append((name, None if expert < 0 else expert))
        collector.sums[keys[-1]] = Sum(width, tokens, **parts)
    for name, expert, leader in fields["leaders"]:
        collector.leaders[name, None if expert < 0 else expert] = keys[leader]
    return int(fields["tokens"])
