"""Remove channels that pruning has zeroed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.optim import LBFGS, Optimizer
from torch.utils._pytree import tree_leaves

from pruneflow.structure.channels.analysis import check_same, outputs, plain
from pruneflow.structure.channels.coupling import Coupling, find_coupling
from pruneflow.structure.channels.rules import NORMS, laid_out_as
from pruneflow.structure.running import Example


@torch.no_grad()
def remove_channels(
    model: nn.Module, example_input: Example, optimizers: Sequence[Optimizer] = ()
) -> int:
    """Remove channels that structured pruning has zeroed from the layers of a model, in place.

    A channel goes if every weight and bias that writes it, batch norm's weight and bias, and every
    weight that reads it are zero; the last one of a layer stays. So what the model computes does
    not change, and training goes on as under masks: gradients and the state of the optimizers go
    along. Parameters stay the same objects, so that whatever trains them goes on to do so.

    Of Adafactor's state, and other factored ones, entries of removed channels go and the rest stays
    as it is, although it holds means over more channels than there are now.

    Args:
        model: The model, plain: without masks or hooks on its parameters.
        example_input: A batch of what the model takes, on its device.
        optimizers: All that train the model and have a state, such as momentum.

    Returns:
        How many channels were removed.

    Raises:
        ValueError: If `find_coupling` refuses the model, hooks are on its parameters, or the state
            of an optimizer does not have the shape of its parameters. Nothing has changed then.
        RuntimeError: If the smaller model does not compute the same for `example_input`. It has
            been put back.

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
    """Per unit whether it can go: nothing writes or reads it, and others of its family stay."""
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
    """The smaller tensors of a model; nothing changes before they are put in their places.

    Args:
        model: The model.
        kept: Per qualified name of a tensor and dimension the indices that stay.
    """

    def __init__(self, model: nn.Module, kept: Mapping[str, Mapping[int, Tensor]]) -> None:
        self._model = model
        present = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        hooked = [n for n in kept if isinstance(present[n], nn.Parameter) and _hooks(present[n])]
        if hooked:
            raise ValueError(
                "`model` is expected to have no hooks on its parameters, which would not come "
                f"along, but {', '.join(hooked)} have; remove masks and other hooks first"
            )
        self._tensors: dict[str, Tensor] = {}
        # Parameter -> its name, the indices that stay, and a parameter with these alone.
        self._new: dict[nn.Parameter, tuple[str, Mapping[int, Tensor], nn.Parameter]] = {}
        for name, indices in kept.items():
            old = present[name]
            self._tensors[name] = _entries(old, indices)
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(self._tensors[name], old.requires_grad)
                new.grad = None if old.grad is None else _entries(old.grad, indices)
                self._tensors[name], self._new[old] = new, (name, indices, new)

    def attributes(self) -> dict[tuple[nn.Module, str], Any]:
        """The new values of attributes of layers: tensors, and how many channels there are."""
        values: dict[tuple[nn.Module, str], Any] = {}
        for name, tensor in self._tensors.items():
            owner, _, attribute = name.rpartition(".")
            module = self._model.get_submodule(owner)
            values[module, attribute] = tensor
            for size, number in _sizes(module, attribute, tensor).items():
                values[module, size] = number
        return values

    def states(self, optimizer: Optimizer) -> dict[nn.Parameter, dict[str, Any]]:
        """The optimizer's state of the parameters as they will be.

        Raises:
            ValueError: If it is not of their shape.
        """
        own = [p for group in optimizer.param_groups for p in group["params"] if p in self._new]
        kind = type(optimizer).__name__
        if own and isinstance(optimizer, LBFGS):
            raise ValueError(
                f"`optimizers` are expected to hold their state per parameter, but {kind} joins "
                "all; leave it out, and make a new one after channels were removed"
            )
        states = {}
        for old in own:
            name, indices, _ = self._new[old]
            if old in optimizer.state:
                states[old] = dict(optimizer.state[old])
            for key, value in states.get(old, {}).items():
                if any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
                    if not _follows(value, old):
                        raise ValueError(
                            "`optimizers` are expected to hold tensors of the shape of their "
                            f"parameters, or single numbers, but {kind} has another as {key!r} of "
                            f"{name}; make a new optimizer after channels were removed"
                        )
                    states[old][key] = _entries(value, indices, old)
        return states

    def keep_parameters(self) -> None:
        """Put the parameters back into their places, with the entries that stay."""
        for old, (name, _, new) in self._new.items():
            old.grad = None
            # By way of another dtype, or autograd would go by the old shape as long as a graph of
            # the old one is alive.
            wide = torch.float32 if old.dtype == torch.float64 else torch.float64
            old.data = torch.empty(0, dtype=wide, device=old.device)
            old.data, old.grad = new.data, new.grad
            owner, _, attribute = name.rpartition(".")
            setattr(self._model.get_submodule(owner), attribute, old)


def _entries(tensor: Tensor, kept: Mapping[int, Tensor], parameter: Tensor | None = None) -> Tensor:
    """The entries that stay, in the memory layout there was, as channels_last.

    Where a state of an optimizer has one entry for all those of its parameter, it stays.
    """
    result = tensor.detach()
    for dim, indices in kept.items():
        if parameter is None or tensor.shape[dim : dim + 1] == parameter.shape[dim : dim + 1]:
            result = result.index_select(dim, indices.to(tensor.device))
    return laid_out_as(result, tensor)


def _follows(value: Any, parameter: Tensor) -> bool:
    """Whether a state has an entry for each of the parameter's, along some of its dimensions."""
    if not isinstance(value, Tensor):
        return False
    if value.numel() == 1:
        return True
    pairs = zip(value.shape, parameter.shape, strict=False)
    return value.dim() == parameter.dim() and all(own in (1, size) for own, size in pairs)


def _sizes(module: nn.Module, attribute: str, tensor: Tensor) -> dict[str, int]:
    """The numbers of channels a layer notes, read from a tensor of it."""
    if isinstance(module, nn.Linear) and attribute == "weight":
        return {"in_features": tensor.shape[1], "out_features": tensor.shape[0]}
    if isinstance(module, _ConvNd) and attribute == "weight":
        dim = 1 if isinstance(module, _ConvTransposeNd) else 0
        filters, inputs = tensor.shape[dim], tensor.shape[1 - dim]
        # Groups stay or go whole.
        groups = module.groups * filters // module.out_channels if module.groups > 1 else 1
        return {"in_channels": inputs * groups, "out_channels": filters, "groups": groups}
    if isinstance(module, NORMS):
        return {"num_features": len(tensor)}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": len(tensor)}
    return {}


def _swap(attributes: Mapping[tuple[nn.Module, str], Any]) -> dict[tuple[nn.Module, str], Any]:
    """Give modules these attributes; returns what they were."""
    before = {(module, name): getattr(module, name) for module, name in attributes}
    for (module, name), value in attributes.items():
        setattr(module, name, value)
    return before


def _hooks(parameter: Tensor) -> bool:
    hooks = ("_backward_hooks", "_post_accumulate_grad_hooks")
    return any(getattr(parameter, name, None) for name in hooks)
