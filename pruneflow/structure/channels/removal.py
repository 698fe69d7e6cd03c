"""Remove channels that are all zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.optim import LBFGS, Optimizer
from torch.utils._pytree import tree_leaves

from pruneflow.errors import expect
from pruneflow.structure.channels.analysis import check_same, outputs, plain
from pruneflow.structure.channels.coupling import Coupling, find_coupling
from pruneflow.structure.channels.rules import NORMS, laid_out_as
from pruneflow.structure.running import Example


@torch.no_grad()
def remove_channels(
    model: nn.Module, example_input: Example, optimizers: Sequence[Optimizer] = ()
) -> int:
    """Remove channels that structured pruning has set to zero from a model, in place.

    A channel is removed if all weights and biases that compute it, the weight and bias of its batch
    norm, and all weights that read it are zero; each layer keeps at least one. The outputs do not
    change, and training continues as it would with masks: gradients and optimizer state are cut as
    well. Parameters stay the same objects, so optimizers still hold them.

    In factored optimizer state, as Adafactor's, the remaining entries are unchanged, although they
    are means that include removed channels.

    Args:
        model: The model, without masks or hooks on its parameters.
        example_input: An input batch on the device of the model.
        optimizers: All optimizers of the model that have a state, such as momentum.

    Returns:
        The number of channels removed.

    Raises:
        ValueError: If `find_coupling` does not support the model, its parameters have hooks, or
            optimizer state does not have the shape of its parameters. Nothing is changed.
        RuntimeError: If the smaller model gives different outputs for `example_input`. The model is
            restored.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> for entries in (model[0].weight[1], model[0].bias[1], model[2].weight[:, 1]):
        ...     _ = entries.data.zero_()
        >>> remove_channels(model, torch.zeros(1, 4), [optimizer])
        1
        >>> model
        Sequential(
          (0): Linear(in_features=4, out_features=2, bias=True)
          (1): ReLU()
          (2): Linear(in_features=2, out_features=2, bias=True)
        )
    """
    model = plain(model)
    coupling = find_coupling(model, example_input)
    dead = _dead(model, coupling)
    kept: dict[str, dict[int, Tensor]] = {}
    for (name, dim), unit in coupling.members.items():
        goes = dead[unit] & (unit >= 0)
        if goes.any():
            kept.setdefault(name, {})[dim] = (~goes).nonzero().flatten()
    cut = _Cut(model, kept)
    states = [cut.states(optimizer) for optimizer in optimizers]
    expected = outputs(model, example_input)
    before = _swap(cut.attributes())
    try:
        check_same(expected, model, "removal of channels")
    except BaseException:
        _swap(before)
        raise
    cut.keep_parameters()
    for optimizer, state in zip(optimizers, states, strict=True):
        for parameter, values in state.items():
            optimizer.state[parameter] = values
    return int(dead.sum())


def _dead(model: nn.Module, coupling: Coupling) -> Tensor:
    """Whether each unit can be removed: all its weights are zero, and its family has others."""
    alive = torch.zeros(coupling.units, dtype=torch.bool)
    parameters = dict(model.named_parameters())
    for (name, dim), unit in coupling.members.items():
        path, _, attribute = name.rpartition(".")
        layer = isinstance(model.get_submodule(path), (*NORMS, _ConvNd, nn.Linear))
        if layer and attribute in ("weight", "bias") and name in parameters:
            rows = parameters[name].movedim(dim, 0)
            some = (rows != 0).reshape(len(rows), -1).any(1).cpu()
            alive[unit[some & (unit >= 0)]] = True
    left = torch.zeros(int(coupling.families.max()) + 1, dtype=torch.int64)
    left.index_add_(0, coupling.families, alive.to(torch.int64))
    for family in (left == 0).nonzero():
        alive[(coupling.families == family).nonzero()[0]] = True
    return ~alive


class _Cut:
    """The smaller tensors of a model, computed before anything is changed.

    Args:
        model: The model.
        kept: Qualified name of a tensor -> dimension -> indices to keep.
    """

    def __init__(self, model: nn.Module, kept: Mapping[str, Mapping[int, Tensor]]) -> None:
        self._model = model
        present = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        hooked = [n for n in kept if isinstance(present[n], nn.Parameter) and _hooks(present[n])]
        expect(
            not hooked,
            "model",
            "have no hooks on its parameters",
            f"hooks on {', '.join(hooked)}",
            "remove masks and other hooks first",
        )
        self._tensors: dict[str, Tensor] = {}
        # Parameter -> its name, the indices to keep, and a parameter with only these.
        self._new: dict[nn.Parameter, tuple[str, Mapping[int, Tensor], nn.Parameter]] = {}
        for name, indices in kept.items():
            old = present[name]
            self._tensors[name] = _entries(old, indices)
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(self._tensors[name], old.requires_grad)
                new.grad = None if old.grad is None else _entries(old.grad, indices)
                self._tensors[name], self._new[old] = new, (name, indices, new)

    def attributes(self) -> dict[tuple[nn.Module, str], Any]:
        """The new attributes of layers: tensors and numbers of channels."""
        values: dict[tuple[nn.Module, str], Any] = {}
        for name, tensor in self._tensors.items():
            owner, _, attribute = name.rpartition(".")
            module = self._model.get_submodule(owner)
            values[module, attribute] = tensor
            for size, number in _sizes(module, attribute, tensor).items():
                values[module, size] = number
        return values

    def states(self, optimizer: Optimizer) -> dict[nn.Parameter, dict[str, Any]]:
        """The optimizer state for the smaller parameters.

        Raises:
            ValueError: If it does not have the shape of the parameters.
        """
        cut = [p for group in optimizer.param_groups for p in group["params"] if p in self._new]
        kind = type(optimizer).__name__
        expect(
            not (cut and isinstance(optimizer, LBFGS)),
            "optimizers",
            "have a separate state for each parameter",
            kind,
            "leave it out, and create a new one after removing channels",
        )
        states = {}
        for old in cut:
            name, indices, _ = self._new[old]
            if old in optimizer.state:
                states[old] = dict(optimizer.state[old])
            for key, value in states.get(old, {}).items():
                if any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
                    expect(
                        _matches(value, old),
                        "optimizers",
                        "hold tensors of the shape of their parameters, or scalars",
                        f"another shape for {key!r} of {name} in {kind}",
                        "create a new optimizer after removing channels",
                    )
                    states[old][key] = _entries(value, indices, old)
        return states

    def keep_parameters(self) -> None:
        """Put the original parameters back, with the entries to keep."""
        for old, (name, _, new) in self._new.items():
            old.grad = None
            # Through another dtype: otherwise autograd expects the old shape while a graph with the
            # old tensor is alive.
            wide = torch.float32 if old.dtype == torch.float64 else torch.float64
            old.data = torch.empty(0, dtype=wide, device=old.device)
            old.data, old.grad = new.data, new.grad
            owner, _, attribute = name.rpartition(".")
            setattr(self._model.get_submodule(owner), attribute, old)


def _entries(tensor: Tensor, kept: Mapping[int, Tensor], parameter: Tensor | None = None) -> Tensor:
    """The entries to keep, in the same memory format.

    With a `parameter`, dimensions whose size differs from the parameter's are not cut, such as
    those of size 1 in optimizer state.
    """
    result = tensor.detach()
    for dim, indices in kept.items():
        if parameter is None or tensor.shape[dim : dim + 1] == parameter.shape[dim : dim + 1]:
            result = result.index_select(dim, indices.to(tensor.device))
    return laid_out_as(result, tensor)


def _matches(value: Any, parameter: Tensor) -> bool:
    """Whether optimizer state has, in each dimension, the size of the parameter or 1."""
    if not isinstance(value, Tensor):
        return False
    if value.numel() == 1:
        return True
    pairs = zip(value.shape, parameter.shape, strict=False)
    return value.dim() == parameter.dim() and all(length in (1, size) for length, size in pairs)


def _sizes(module: nn.Module, attribute: str, tensor: Tensor) -> dict[str, int]:
    """The attributes of a layer that hold numbers of channels, read from one of its tensors."""
    if isinstance(module, nn.Linear) and attribute == "weight":
        return {"in_features": tensor.shape[1], "out_features": tensor.shape[0]}
    if isinstance(module, _ConvNd) and attribute == "weight":
        dim = 1 if isinstance(module, _ConvTransposeNd) else 0
        filters, inputs = tensor.shape[dim], tensor.shape[1 - dim]
        # Groups are removed as a whole.
        groups = module.groups * filters // module.out_channels if module.groups > 1 else 1
        return {"in_channels": inputs * groups, "out_channels": filters, "groups": groups}
    if isinstance(module, NORMS):
        return {"num_features": len(tensor)}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": len(tensor)}
    return {}


def _swap(attributes: Mapping[tuple[nn.Module, str], Any]) -> dict[tuple[nn.Module, str], Any]:
    """Set attributes of modules and return the old ones."""
    before = {(module, name): getattr(module, name) for module, name in attributes}
    for (module, name), value in attributes.items():
        setattr(module, name, value)
    return before


def _hooks(parameter: Tensor) -> bool:
    hooks = ("_backward_hooks", "_post_accumulate_grad_hooks")
    return any(getattr(parameter, name, None) for name in hooks)
