"""Which layer types have weights to prune, and their input dimension."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pruneflow.errors import expect


@dataclass(frozen=True)
class LayerType:
    """The weights of a layer type; see `register_layer`."""

    weights: tuple[str, ...]
    input_dim: int


_TYPES: dict[type[nn.Module] | str, LayerType] = {
    _ConvNd: LayerType(("weight",), 1),
    _ConvTransposeNd: LayerType(("weight",), 0),
    nn.Linear: LayerType(("weight",), 1),
    nn.Bilinear: LayerType(("weight",), 1),
    nn.RNNBase: LayerType(("weight_*",), 1),
    nn.RNNCellBase: LayerType(("weight_*",), 1),
    nn.MultiheadAttention: LayerType(("*_proj_weight",), 1),
    # By name, as these packages may not be installed or are slow to import.
    "torchvision.ops.deform_conv.DeformConv2d": LayerType(("weight",), 1),
    "transformers.pytorch_utils.Conv1D": LayerType(("weight",), 0),
}


def register_layer(
    layer: type[nn.Module], weights: str | tuple[str, ...] = "weight", *, input_dim: int = 1
) -> None:
    """Make the weights of a layer type, and of its subclasses, prunable by default.

    Args:
        layer: The type.
        weights: Names of its weights, or globs over them, such as `("up_proj", "down_proj")`.
        input_dim: The input dimension of the weights, which the layer sums over and `NM` groups
            along: 1 for `x @ weight.T`, as in `nn.Linear`, 0 for `x @ weight`, and 1 for a mixture
            of experts with weights `(experts, inputs, outputs)`.

    Raises:
        TypeError: If `layer` is not a module type, or `weights` are not names.

    Example:
        >>> import torch; from pruneflow import sparsity_report
        >>> class Conv1D(nn.Module):
        ...     def __init__(self, inputs, outputs):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(torch.randn(inputs, outputs))
        >>> register_layer(Conv1D, input_dim=0)
        >>> [layer.name for layer in sparsity_report(nn.Sequential(Conv1D(4, 8))).layers]
        ['0.weight']
    """
    is_type = isinstance(layer, type) and issubclass(layer, nn.Module)
    remedy = "give the class, not an instance"
    expect(is_type, "layer", "be a module type", repr(layer), remedy, error=TypeError)
    names = (weights,) if isinstance(weights, str) else weights
    expect(
        isinstance(names, tuple | list) and all(isinstance(name, str) for name in names),
        "weights",
        "be the name of a parameter or a tuple of names",
        repr(weights),
        "try 'weight'",
        error=TypeError,
    )
    _TYPES[layer] = LayerType(tuple(names), input_dim)


def is_weight(module: nn.Module, attribute: str) -> bool:
    """Whether a parameter is a weight of a known layer type."""
    known = _type_of(module)
    return known is not None and any(fnmatchcase(attribute, glob) for glob in known.weights)


def input_dim(module: nn.Module, attribute: str) -> int | None:
    """The input dimension of a weight; None if the layer type is unknown."""
    known = _type_of(module)
    return known.input_dim if known is not None and is_weight(module, attribute) else None


def _type_of(module: nn.Module) -> LayerType | None:
    for kind in type(module).__mro__:
        known = _TYPES.get(kind) or _TYPES.get(f"{kind.__module__}.{kind.__qualname__}")
        if known is not None:
            return known
    return None
