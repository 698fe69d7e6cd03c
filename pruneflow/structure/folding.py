"""Take over what Lightning's ModelPruning or `torch.nn.utils.prune` has pruned."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from pruneflow.structure.parameters import Slot

# The order in which PyTorch's layers register their parameters; the recurrent ones know their own.
_ORDER = (
    *("weight", "weight_ih", "weight_hh"),
    *("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
    *("bias", "bias_ih", "bias_hh", "in_proj_bias", "bias_k", "bias_v"),
)


def fold(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Give a `state_dict` the plain model's keys: `weight_orig` and `weight_mask` become `weight`.

    Pruned weights become exactly +0.0. Load it into the plain model and train with
    `from_zeros=True` to hold them, those that `include` selects: ModelPruning prunes biases as well
    unless told otherwise, so name them, `include=["*.weight", "*.bias"]`. What is no such pair
    stays: a model already folded, or a buffer that happens to end in `_mask`.

    Args:
        state_dict: That of a model under `torch.nn.utils.prune`, or what a Lightning checkpoint has
            under "state_dict". It is left as it is.

    Raises:
        ValueError: If a whole checkpoint came, or a mask has another shape than its weight.

    Example:
        >>> layer = prune.l1_unstructured(nn.Linear(4, 2), "weight", amount=0.75)
        >>> list(layer.state_dict())
        ['bias', 'weight_orig', 'weight_mask']
        >>> nn.Linear(4, 2).load_state_dict(fold(layer.state_dict()))
        <All keys matched successfully>
    """
    if isinstance(state_dict.get("state_dict"), Mapping):
        raise ValueError(
            "`state_dict` is expected to hold the tensors of a model, but a checkpoint came; give "
            "checkpoint['state_dict']"
        )
    names = {
        name
        for name in (key.removesuffix("_orig") for key in state_dict)
        if name not in state_dict and f"{name}_mask" in state_dict
    }
    folded = copy.copy(state_dict)  # with the modules' versions, which are its `_metadata`
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
    """Make a model under `torch.nn.utils.prune` plain, in place.

    Parameters remain the same objects, so that optimizers keep holding them, and get back their
    names and, in PyTorch's own layers, their order. Pruned weights become exactly +0.0; train with
    `from_zeros=True` to hold them.

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
            # A negative weight times 0 is -0.0, and what is not finite stays so.
            module.get_parameter(name).masked_fill_(mask == 0, 0)
        if names:
            for name in _order(module):
                module._parameters[name] = module._parameters.pop(name)


def _masked(name: str, weight: Tensor, mask: Tensor) -> Tensor:
    if weight.shape != mask.shape:
        raise ValueError(
            f"`state_dict` is expected to hold a mask of the shape of its weight, but of {name!r} "
            f"they are {tuple(mask.shape)} and {tuple(weight.shape)}; take both from one model"
        )
    return (weight * mask.to(weight.dtype)).masked_fill(mask == 0, 0)


def _order(module: nn.Module) -> list[str]:
    names = list(module._parameters)
    if isinstance(module, nn.RNNBase):
        return [name for name in module._flat_weights_names if name in names]
    known = set(names) <= set(_ORDER)
    return sorted(names, key=_ORDER.index) if known else names
