"""Convert models and checkpoints pruned by ModelPruning or `torch.nn.utils.prune`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from pruneflow.errors import expect
from pruneflow.structure.parameters import Slot

# The order in which PyTorch's layers register their parameters, except recurrent ones.
_ORDER = (
    *("weight", "weight_ih", "weight_hh"),
    *("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
    *("bias", "bias_ih", "bias_hh", "in_proj_bias", "bias_k", "bias_v"),
)


def fold(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Convert a `state_dict` to plain keys: `weight_orig` and `weight_mask` become `weight`.

    Pruned weights become exactly +0.0. Load the result into the plain model and train with
    `from_zeros=True` to keep them pruned. Lightning's ModelPruning prunes biases by default, so
    include them: `include=["*.weight", "*.bias"]`. All other entries are left unchanged, such as
    those of a plain model or a buffer whose name happens to end in `_mask`.

    Args:
        state_dict: The `state_dict` of a model under `torch.nn.utils.prune`, or the "state_dict" of
            a Lightning checkpoint. It is not modified.

    Raises:
        ValueError: If it is a whole checkpoint, or a mask and its weight differ in shape.

    Example:
        >>> layer = prune.l1_unstructured(nn.Linear(4, 2), "weight", amount=0.75)
        >>> list(layer.state_dict())
        ['bias', 'weight_orig', 'weight_mask']
        >>> nn.Linear(4, 2).load_state_dict(fold(layer.state_dict()))
        <All keys matched successfully>
    """
    expect(
        not isinstance(state_dict.get("state_dict"), Mapping),
        "state_dict",
        "hold the tensors of a model",
        "a checkpoint",
        "give checkpoint['state_dict']",
    )
    names = {
        name
        for name in (key.removesuffix("_orig") for key in state_dict)
        if name not in state_dict and f"{name}_mask" in state_dict
    }
    folded = copy.copy(state_dict)  # keeps `_metadata`, the versions of the modules
    folded.clear()
    for key, value in state_dict.items():
        name, _, part = key.rpartition("_")
        if name not in names or part not in ("orig", "mask"):
            folded[key] = value
        elif part == "orig":
            folded[name] = _masked(name, value.detach(), state_dict[f"{name}_mask"])
    return folded


@torch.no_grad()
def fold_model(model: nn.Module) -> None:
    """Make masks of `torch.nn.utils.prune` permanent, in place.

    Parameters stay the same objects, so optimizers still hold them, and get their original names
    back, and in PyTorch's own layers their order. Pruned weights become exactly +0.0; train with
    `from_zeros=True` to keep them pruned.

    Example:
        >>> layer = prune.l1_unstructured(nn.Linear(4, 2), "weight", amount=0.75)
        >>> fold_model(layer)
        >>> list(layer.state_dict()), int((layer.weight == 0).sum())
        (['weight', 'bias'], 6)
    """
    for module in model.modules():
        names = [name.removesuffix("_orig") for name in module._parameters]
        names = [name for name in names if Slot(module, name).reparametrized]
        for name in names:
            mask = module.get_buffer(f"{name}_mask")
            prune.remove(module, name)
            # A negative weight times 0 is -0.0, and NaN or infinity times 0 is NaN.
            module.get_parameter(name).masked_fill_(mask == 0, 0)
        if names:
            for name in _order(module):
                module._parameters[name] = module._parameters.pop(name)


def _masked(name: str, weight: Tensor, mask: Tensor) -> Tensor:
    expect(
        weight.shape == mask.shape,
        "state_dict",
        "hold a mask of the same shape for each weight",
        f"{tuple(mask.shape)} for {name!r} of shape {tuple(weight.shape)}",
        "take both from the same model",
    )
    return (weight * mask.to(weight.dtype)).masked_fill(mask == 0, 0)


def _order(module: nn.Module) -> list[str]:
    names = list(module._parameters)
    if isinstance(module, nn.RNNBase):
        return [name for name in module._flat_weights_names if name in names]
    known = set(names) <= set(_ORDER)
    return sorted(names, key=_ORDER.index) if known else names
