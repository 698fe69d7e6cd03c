"""Detect weights that the forward pass recomputes, so that pruned entries would not stay zero."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from pruneflow.distributed import is_sharded
from pruneflow.errors import expect
from pruneflow.structure.layer_types import input_dim, is_weight
from pruneflow.structure.parameters import NORMS, Pattern, Slot, locate, matching, named_modules

_MULTIPLIES = ("conv", "linear", "matmul", "mm", "mv", "dot", "einsum")  # parts of function names
_BATCH = 97  # samples; a prime, so that no activation has the shape of a weight


def check_computed(model: nn.Module, exclude: Sequence[Pattern]) -> None:
    """Check that no weight is computed from other parameters, as it would silently stay dense.

    Raises:
        ValueError: Names each such weight and its parameters.
    """
    slots = locate(model)
    excluded = {name for pattern in exclude for name in matching(pattern, slots)}
    trained = [n for n, s in slots.items() if s.parameter.requires_grad and n not in excluded]
    computed = []
    for prefix, module in named_modules(model):
        hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, NORMS)]
        for attribute in (*getattr(module, "parametrizations", ()), *(h.name for h in hooks)):
            path = f"{prefix}." if prefix else ""
            prefixes = (f"{path}parametrizations.{attribute}.", f"{path}{attribute}_")
            sources = [name for name in trained if name.startswith(prefixes)]
            if is_weight(module, attribute) and sources:
                computed.append(f"{path}{attribute} (from {', '.join(sources)})")
    expect(
        not computed,
        "include",
        "name the parameters to prune where a weight is computed from others",
        "; ".join(computed),
        "include those whose zeros carry over to the weight, as in weight_norm and spectral_norm, "
        "or `exclude` them",
    )


def check_zeros_stay(slots: Mapping[str, Slot]) -> None:
    """Check that zeros in the weights are still zero when their layer multiplies by them.

    They are not under weight standardisation, for example, which subtracts the mean. A copy of each
    layer with a custom `forward` is run with every other weight set to zero, to see what it
    multiplies by. A layer that cannot be run by itself passes.

    Args:
        slots: Qualified name -> slot of a weight to prune.

    Raises:
        ValueError: Names the weights whose zeros are lost.

    Example:
        >>> class Standardised(nn.Linear):
        ...     def forward(self, x):
        ...         return nn.functional.linear(x, self.weight - self.weight.mean(), self.bias)
        >>> check_zeros_stay(locate(nn.Linear(4, 4)))
        >>> try:
        ...     check_zeros_stay(locate(Standardised(4, 4)))
        ... except ValueError as error:
        ...     print(str(error).partition("got ")[2].partition(";")[0])
        weight (Standardised)
    """
    lost = [
        f"{name} ({type(slot.module).__name__})"
        for name, slot in slots.items()
        if not is_sharded(slot.parameter) and _has_own_forward(slot.module) and _loses_zeros(slot)
    ]
    expect(
        not lost,
        "include",
        "leave out weights that `forward` recomputes from the parameter so that zeros are lost, as "
        "weight standardisation does",
        ", ".join(lost),
        "`exclude` them, or multiply the result by `weight != 0` in `forward`",
    )


def _has_own_forward(layer: nn.Module) -> bool:
    functions = (layer.forward, getattr(layer, "_conv_forward", layer.forward))
    custom = any(not function.__module__.startswith("torch.") for function in functions)
    return custom or isinstance(layer, ParametrizationList)


@torch.no_grad()
def _loses_zeros(slot: Slot) -> bool:
    try:
        layer = copy.deepcopy(slot.module).eval()
        weight = layer.get_parameter(slot.attribute)
        example = _example(layer, slot.attribute, weight)
        weight.masked_fill_(_checkered(weight.shape).to(weight.device), 0)
        left = int(weight.count_nonzero())
        with torch.random.fork_rng(), _Multipliers(weight.shape) as multipliers:
            result = layer.forward(*example)  # not layer(...), which would run hooks
    except Exception:  # the layer's own code, which may need another input
        return False
    if not example and result.shape == weight.shape:
        multipliers.nonzeros.append(int(result.count_nonzero()))
    return any(nonzeros > left for nonzeros in multipliers.nonzeros)


def _checkered(shape: torch.Size) -> Tensor:
    """Every other entry along each dimension, so that no row or column is all zero."""
    board = torch.zeros(shape, dtype=torch.bool)
    for dim, size in enumerate(reversed(shape)):
        board ^= (torch.arange(size) % 2 == 0).view(-1, *[1] * dim)
    return board


def _example(layer: nn.Module, attribute: str, weight: Tensor) -> tuple[Tensor, ...]:
    """An input for a layer; a parametrization takes none and returns the weight."""
    if isinstance(layer, ParametrizationList):
        return ()
    if isinstance(layer, _ConvNd):
        sizes = [d * (k - 1) + 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return (weight.new_ones(_BATCH, layer.in_channels, *sizes),)
    dim = input_dim(layer, attribute)
    return (weight.new_ones(_BATCH, weight.shape[0 if dim is None else dim]),)


class _Multipliers(TorchFunctionMode):
    """Counts the nonzeros of tensors of a given shape passed to convolutions and products.

    Args:
        shape: The shape, with its dimensions in any order.
    """

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.sizes = sorted(shape)
        self.nonzeros: list[int] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(name in getattr(func, "__name__", "") for name in _MULTIPLIES):
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, Tensor) and sorted(value.shape) == self.sizes:
                    self.nonzeros.append(int(value.count_nonzero()))
        return func(*args, **(kwargs or {}))
