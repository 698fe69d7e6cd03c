"""Unit: what is removed together, if not each weight: N of M, blocks or whole channels."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from pruneflow.channels.coupling import Coupling, find_coupling
from pruneflow.layer_types import input_dim
from pruneflow.parameters import Slot, locate, named_modules
from pruneflow.running import Example
from pruneflow.schedules import whole_number
from pruneflow.units import Blocks, CoupledChannels, Units


@dataclass(frozen=True)
class NM:
    """Keep the `n` most important of each `m` neighbouring weights along the input.

    2 of 4 is what NVIDIA's sparse tensor cores compute with. Rounds below the sparsity 1 - n/m,
    which is the most there can be, prune from what is not among the `n` of its group. What was
    pruned before stays pruned, so that a group that has less than `n` left keeps those, and the
    last round ends a little above 1 - n/m.

    Args:
        n: How many of a group stay at least.
        m: Size of a group; the number of input channels or features has to be a multiple of it.
        dims: Qualified name -> the dimension of that weight along which its layer multiplies, where
            it is not 1. A Pruner knows it of PyTorch's layers and of those that `register_layer`
            was told of.

    Raises:
        ValueError: If not 0 < n < m.

    Example:
        >>> from pruneflow import compute_masks, magnitude
        >>> weights = {"weight": torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.1, 0.4, 0.3, 0.2]])}
        >>> compute_masks(weights, 0.5, importance=magnitude, granularity=NM(2, 4))["weight"]
        tensor([[ True,  True, False, False, False,  True,  True, False]])

    References:
        Mishra et al. 2021, https://arxiv.org/abs/2104.08378.
    """

    n: int
    m: int
    dims: Mapping[str, int] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        n, m = whole_number(self.n), whole_number(self.m)
        if n is None or m is None or not 0 < n < m:
            raise ValueError(
                f"`n` and `m` must be whole numbers, 0 < n < m, got {self}; NM(2, 4) is usual"
            )
        object.__setattr__(self, "n", n)
        object.__setattr__(self, "m", m)

    @property
    def most(self) -> float:
        """The sparsity at which all groups keep `n`."""
        return 1 - self.n / self.m

    def bind(self, slots: Mapping[str, Slot]) -> NM:
        """The same with the dimensions along which these layers multiply.

        Raises:
            ValueError: Naming the tensors of layers of which that is not known.
        """
        dims = {name: input_dim(slot.module, slot.attribute) for name, slot in slots.items()}
        dims |= self.dims
        unknown = [
            f"{name} ({type(slots[name].module).__name__})" for name in slots if dims[name] is None
        ]
        if unknown:
            raise ValueError(
                f"`granularity` {self} must know along which dimension a layer multiplies, got "
                f"{', '.join(unknown)}; call `register_layer(type, name, input_dim=...)`, or "
                "`exclude` them"
            )
        return replace(self, dims={name: dim for name, dim in dims.items() if dim is not None})

    def check(self, shapes: Mapping[str, torch.Size], sparsity: float) -> None:
        """Refuse tensors without whole groups, and what would take more than m - n of a group.

        Raises:
            ValueError: Naming the tensors, or the sparsity.
        """
        uneven = [
            f"{name} {tuple(shape)}" for name, shape in shapes.items() if self._uneven(name, shape)
        ]
        if uneven:
            raise ValueError(
                f"`granularity` {self} is expected to get weights with a multiple of {self.m} "
                f"inputs, but {', '.join(uneven)} came; `exclude` them"
            )
        if sparsity > self.most:
            raise ValueError(
                f"`sparsity` is expected to be at most {self.most:.6g} with {self}, but "
                f"{sparsity!r} came; lower it, or keep fewer of each {self.m}"
            )

    def protect(self, name: str, scores: Tensor) -> Tensor:
        """Raise the `n` highest scores of each group, of equal ones the last, to infinity.

        A score of -inf, which marks what is pruned already, is left alone.

        Raises:
            ValueError: If scores of a shard do not hold whole groups.
        """
        if self._uneven(name, scores.shape):
            raise ValueError(
                f"`granularity` {self} must find whole groups in each shard, got {name} with "
                f"{tuple(scores.shape)} in one process; `exclude` it, or take another number of "
                "processes"
            )
        dim = self.dims.get(name, 1)
        groups = scores.movedim(dim, -1).unflatten(-1, (-1, self.m))
        best = groups.argsort(dim=-1, stable=True)[..., self.m - self.n :]
        protected = groups.scatter(-1, best, torch.inf).where(groups > -torch.inf, groups)
        result: Tensor = protected.flatten(-2).movedim(-1, dim)
        return result

    def _uneven(self, name: str, shape: torch.Size) -> bool:
        dim = self.dims.get(name, 1)
        return len(shape) < 2 or len(shape) <= dim or shape[dim] % self.m != 0


@dataclass(frozen=True)
class Block:
    """Keep or remove blocks of a weight seen as a matrix, outputs x everything else.

    Rounds remove the blocks with the lowest mean score, as few as reach the target. As with single
    weights, nothing keeps the last one: a tensor with low scores may lose all of them to a high
    target, and with scope `"layer"` one that is a single block goes at any target. The report names
    what nothing is left of; `exclude` such tensors, or take smaller blocks.

    Args:
        rows: Rows of a block; at the edges of a matrix blocks may be smaller.
        columns: Columns of a block; None for whole rows, which are filters.

    Raises:
        ValueError: If a size is less than 1.

    Example:
        >>> from pruneflow import compute_masks, magnitude
        >>> weights = {"weight": torch.tensor([[4.0, 1.0, 0.0, 5.0], [1.0, 1.0, 1.0, 1.0]])}
        >>> compute_masks(weights, 0.5, importance=magnitude, granularity=Block(1, 2))["weight"]
        tensor([[ True,  True,  True,  True],
                [False, False, False, False]])
    """

    rows: int = 1
    columns: int | None = None

    def __post_init__(self) -> None:
        rows, columns = whole_number(self.rows), whole_number(self.columns)
        if (rows or 0) < 1 or (self.columns is not None and (columns or 0) < 1):
            raise ValueError(
                f"`rows` and `columns` must be whole numbers of at least 1, got {self}; give "
                "columns=None for whole rows"
            )
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "columns", columns)

    def units(self, shapes: Mapping[str, torch.Size]) -> Units:
        """The blocks of tensors of these shapes."""
        return Blocks(self.rows, self.columns, shapes)


@dataclass(frozen=True, eq=False)
class Channels:
    """Keep or remove whole channels, with all that belongs to them, so that they can be cut out.

    A channel is the filters that write it (several where a residual sum adds them up), what batch
    norm does with it, and the weights that read it. Its score is the mean over all those weights,
    of convolutions and Linear, relative to the mean of their tensor: layers differ in scale. Rounds
    remove the channels with the lowest scores, as few as reach the target: the fraction of the
    weights (or of their cost) that is gone. Every layer keeps one channel, and where it keeps more
    than 16 of a multiple of 16, a multiple of 16, as `deploy.shrink` does. With scope `"layer"` all
    layers lose the same fraction of channels.

    What writes to layers that look at all channels, such as LayerNorm or attention, stays whole, as
    do the outputs of layers that are excluded; an excluded layer that reads a channel which is
    removed no longer does.

    Args:
        example_input: What the model takes, to follow the channels through its forward pass: a
            tensor, a tuple of positional arguments or a dict of keyword arguments. None for the
            `example_input_array` of a LightningModule.

    Example:
        >>> from pruneflow import Pruner
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> _ = model[0].weight.data[1].zero_()
        >>> pruner = Pruner(model, granularity=Channels(torch.zeros(1, 4)), optimizers=[])
        >>> pruner.prune_to(0.3)["0.bias"]
        tensor([ True, False,  True])

    References:
        Li et al. 2017, https://arxiv.org/abs/1608.08710; Fang et al. 2023 (DepGraph),
        https://arxiv.org/abs/2301.12900.
    """

    example_input: Example | None = field(default=None, repr=False)

    def couple(self, model: nn.Module, names: Collection[str]) -> CoupledChannels:
        """Find the channels of a model that the pruning of some of its weights can remove.

        Args:
            model: The model; it is left as it is.
            names: Qualified names of the weights to prune.

        Raises:
            ValueError: If there is no example input, torch.fx cannot trace the model, or no channel
                can be removed.
        """
        if self.example_input is None:
            raise ValueError(
                "`example_input` must be what the model takes, got None; give "
                "Channels(example_input), or set `self.example_input_array` in the LightningModule"
            )
        coupling = _by_plain_names(find_coupling(model, self.example_input), model)
        shapes = {name: slot.parameter.shape for name, slot in locate(model).items()}
        return CoupledChannels(coupling, shapes, names)


def _by_plain_names(coupling: Coupling, model: nn.Module) -> Coupling:
    """The coupling by canonical names, as wrappers within the model put others into its graph."""
    pairs = zip(model.named_modules(), named_modules(model), strict=True)
    plain = {path: name for (path, _), (name, _) in pairs}

    def renamed(member: tuple[str, int]) -> tuple[str, int]:
        owner, _, attribute = member[0].rpartition(".")
        return f"{plain.get(owner, owner)}.{attribute}".lstrip("."), member[1]

    members = {renamed(member): unit for member, unit in coupling.members.items()}
    return replace(coupling, members=members, writes=frozenset(map(renamed, coupling.writes)))


Granularity = NM | Block | Channels
