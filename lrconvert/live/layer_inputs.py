"""Inputs that the layers of a live model multiply their weights with, and which tokens of them are real."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrconvert.core.errors import DataError
from lrconvert.live.load_model import is_encoder_decoder

Batch = Mapping[str, Any]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MASKS = ("attention_mask", "decoder_attention_mask")


# --- batches --------------------------------------------------------------------------------------------------------


def token_count(batch: Batch) -> int:
    """Return the number of real tokens of a batch; of rows where it has no tokens (images)."""
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    if _is_mask(mask):
        return int(mask.bool().sum())
    if isinstance(ids, Tensor):
        return ids.numel()
    return max((len(v) for v in batch.values() if isinstance(v, Tensor)), default=0)


def on_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """Return a batch with its tensors on `device`."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def add_digest(hasher: hashlib._Hash, batch: Batch) -> None:
    """Add a batch to a digest: every tensor by name, dtype, shape and bytes."""
    for name in sorted(batch):
        value = batch[name]
        if isinstance(value, Tensor):
            array = value.detach().cpu().contiguous()
            hasher.update(f"{name} {array.dtype} {tuple(array.shape)}\n".encode())
            hasher.update(array.reshape(-1).view(torch.uint8).numpy().tobytes())


def masks_of(model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
    """Return the masks of real tokens, (batch, length) each, that hide any. Raises E-DATA where that is undecided."""
    masks = [batch[name].bool() for name in _MASKS if _is_mask(batch.get(name))]
    labels = batch.get("labels")
    if is_encoder_decoder(model) and "decoder_attention_mask" not in batch and labels is not None and labels.dim() == 2:
        masks.append(labels != -100)
    for one in masks:
        for other in masks:
            if one.shape == other.shape and not bool((one == other).all()):
                raise DataError(
                    "the two attention masks of a batch have one shape and differ: whose padding a layer sees is "
                    "undecided",
                    fix="pad encoder and decoder to different lengths",
                )
    return tuple(mask for mask in masks if not bool(mask.all()))


def _is_mask(value: Any) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.dim() == 2


# --- inputs of layers -----------------------------------------------------------------------------------------------


def rows_of(layer: nn.Module, x: Tensor, masks: Iterable[Tensor]) -> Tensor:
    """Return what a layer multiplies its weight with, as rows without padding, (tokens, in); for an embedding the
    tokens."""
    if isinstance(layer, CONVOLUTIONS):
        return patches(layer, x)
    return real_rows(x, masks, 0 if isinstance(layer, nn.Embedding) else 1)


def real_rows(x: Tensor, masks: Iterable[Tensor], trailing: int) -> Tensor:
    """Return x as rows without those of padding: (tokens, ...) with the `trailing` dimensions of one token kept."""
    leading = x.shape[: x.dim() - trailing]
    rows = x.reshape(-1, *x.shape[x.dim() - trailing :])
    for mask in masks:
        if leading == mask.shape or leading == (mask.numel(),):
            return rows[mask.reshape(-1).to(rows.device)]
    return rows


def patches(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """Return what a convolution multiplies its unfolded kernels with: (patches, in/G * K * L), of all groups."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    if isinstance(layer, nn.Conv3d):
        return _patches_3d(layer, x.float())
    if isinstance(layer, nn.Conv1d):
        x, kernel, stride, dilation = x[:, :, None], (1, *kernel), (1, *stride), (1, *dilation)
    columns = F.unfold(x.float(), kernel, dilation, 0, stride)  # (batch, in * K * L, places)
    per_group = columns.reshape(len(x), layer.groups, -1, columns.shape[2])
    return per_group.movedim(2, 3).flatten(0, 2)


def _patches_3d(layer: nn.Conv3d, x: Tensor) -> Tensor:
    """The patches of a padded input (batch, in, frames, height, width), which `F.unfold` does not take."""
    for axis, (kernel, stride, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
    ):
        x = x.unfold(2 + axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    per_group = torch.unflatten(x, 1, (layer.groups, -1))  # (batch, G, in/G, places in three, kernel in three)
    return per_group.movedim(2, 5).flatten(5).flatten(0, 4)


# --- layers ---------------------------------------------------------------------------------------------------------


def is_known_layer(module: nn.Module) -> bool:
    """Return whether a layer is of a kind whose inputs can be counted, and which takes updates."""
    kinds = (nn.Linear, nn.Embedding, *CONVOLUTIONS)
    return isinstance(module, kinds) or type(module).__name__ == "Conv1D"


def known_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers whose inputs can be counted, by the names of their weights."""
    modules = {path.removesuffix(".base_layer"): m for path, m in model.named_modules() if is_known_layer(m)}
    return {f"{path}.weight".replace(".base_layer.", "."): module for path, module in modules.items()}


def expert_stacks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that hold stacks of experts (experts, out, in), by the names of the stacks."""
    return {
        f"{path}.{leaf}": module
        for path, module in model.named_modules()
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and "expert" in path.lower()
    }
