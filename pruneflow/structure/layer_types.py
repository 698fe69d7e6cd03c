"""Which types of layers have weights to prune, and along which dimension they multiply."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


@dataclass(frozen=True)
class LayerType:
    """What is known of a type of layer; see `register_layer`."""

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
    # By name, since their packages need not be installed, or take long to import.
    "torchvision.ops.deform_conv.DeformConv2d": LayerType(("weight",), 1),
    "transformers.pytorch_utils.Conv1D": LayerType(("weight",), 0),
}


def register_layer(
    layer: type[nn.Module], weights: str | tuple[str, ...] = "weight", *, input_dim: int = 1
) -> None:
    """Make the weights of a type of layer prunable by default, and those of its subclasses.

    Args:
        layer: The type.
        weights: Names of its weights, or globs over them, such as `("up_proj", "down_proj")`.
        input_dim: The dimension of the weights along which the layer multiplies and adds up, which
            is where `NM` counts: 1 for `x @ weight.T`, as in `nn.Linear`, 0 for `x @ weight`, and 1
            for experts of a mixture, `(experts, inputs, outputs)`.

    Raises:
        TypeError: If `layer` is no type of module, or `weights` are no names.

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
    if not (isinstance(layer, type) and issubclass(layer, nn.Module)):
        raise TypeError(
            f"`layer` must be a type of module, got {layer!r}; give the class, not an instance"
        )
    names = (weights,) if isinstance(weights, str) else weights
    if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"`weights` must be the name of a parameter or a tuple of them, got {weights!r}; give "
            "'weight', say"
        )
    _TYPES[layer] = LayerType(tuple(names), input_dim)


def is_weight(module: nn.Module, attribute: str) -> bool:
    """Whether a parameter of a module is known to be a weight that it multiplies with."""
    known = _type_of(module)
    return known is not None and any(fnmatchcase(attribute, glob) for glob in known.weights)


def input_dim(module: nn.Module, attribute: str) -> int | None:
    """The dimension of a weight along which its layer multiplies; None if that is not known."""
    known = _type_of(module)
    return known.input_dim if known is not None and is_weight(module, attribute) else None


def _type_of(module: nn.Module) -> LayerType | None:
    for kind in type(module).__mro__:
        known = _TYPES.get(kind) or _TYPES.get(f"{kind.__module__}.{kind.__qualname__}")
        if known is not None:
            return known
    return None
