"""Whole channels, with all that writes and reads them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from pruneflow.pruning.granularity.units import Units, cost_of, too_much
from pruneflow.structure.channels.coupling import Coupling, find_coupling
from pruneflow.structure.channels.flow import LANES
from pruneflow.structure.parameters import locate, named_modules
from pruneflow.structure.running import Example


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


class CoupledChannels:
    """The channels of one model that can be removed.

    Args:
        coupling: Which entries belong to which channel.
        shapes: Of all parameters of the model.
        names: Of the weights to prune.

    Raises:
        ValueError: If no channel can be removed.
    """

    relative = True

    def __init__(
        self, coupling: Coupling, shapes: Mapping[str, torch.Size], names: Collection[str]
    ) -> None:
        free = torch.ones(coupling.units, dtype=torch.bool)
        for name, dim in coupling.writes:
            if len(shapes[name]) > 1 and name not in names:
                unit = coupling.members[name, dim]
                free[unit[unit >= 0]] = False
        if not free.any():
            raise ValueError(
                "`include` and `exclude` are expected to leave channels to remove, but every "
                "channel is also written by a layer that is left out; include those layers"
            )
        number = torch.cat([free.cumsum(0) - 1, torch.tensor([-1])])  # the last is that of -1
        number[:-1][~free] = -1
        self._units = {
            key: number[unit] for key, unit in coupling.members.items() if key[0] in shapes
        }
        self._writes = coupling.writes
        self._shapes = {
            name: shapes[name]
            for name in shapes
            if any(key[0] == name and (unit >= 0).any() for key, unit in self._units.items())
        }
        self._all_shapes = shapes
        self._scored = tuple(name for name in self._shapes if name in names)
        self._families = coupling.families[free].unique(return_inverse=True)[1]
        sizes = self._families.bincount()
        self._in_vectors = (sizes > LANES) & (sizes % LANES == 0)
        self.step = LANES if self._in_vectors.any() else 1

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all parameters that lose entries, batch norm's and biases among them."""
        return tuple(self._shapes)

    def writers(self, name: str) -> tuple[str, ...]:
        """Names of the weights to prune that write the channels which a tensor holds or reads."""
        own = [unit for (tensor, _), unit in self._units.items() if tensor == name]
        channels = torch.cat([torch.tensor([-1]), *own]).unique()[1:]
        return tuple(
            tensor
            for (tensor, dim), unit in self._units.items()
            if tensor in self._scored
            and (tensor, dim) in self._writes
            and torch.isin(unit, channels).any()
        )

    def check(self, costs: Mapping[str, float], sparsity: float) -> None:
        """Refuse a target for which layers would have to lose all their channels.

        Args:
            costs: Of each weight, per tensor to prune.
            sparsity: The target.

        Raises:
            ValueError: Saying how much can go.
        """
        order = torch.arange(len(self._families))
        most = cost_of(self.masks(self.kept(order, len(order))), costs)
        total = sum(cost * self._all_shapes[name].numel() for name, cost in costs.items())
        if sparsity * total * (1 - 1e-12) > most:
            raise ValueError(too_much(most / total, sparsity))

    def units(self, shapes: Mapping[str, torch.Size]) -> Units:
        """The channels, which go through tensors of these shapes and others."""
        return self

    def sums(self, entries: Callable[[str], Tensor]) -> Tensor:
        """Per channel the sum over the weights to prune that write or read it."""
        sums = torch.zeros(len(self._families), dtype=torch.float64)
        for name in self._scored:
            values = entries(name).to(torch.float64)
            for dim in range(values.dim()):
                unit = self._units.get((name, dim))
                if unit is not None:
                    rows = values.movedim(dim, 0).reshape(len(unit), -1).sum(1).cpu()
                    sums.index_add_(0, unit[unit >= 0], rows[unit >= 0])
        return sums

    def order(self, scores: Tensor, scope: object) -> Tensor:
        """Lowest score first; with scope `"layer"` lowest fraction of the layer's channels."""
        order = scores.argsort(stable=True)
        if scope == "layer":
            better = self._better(order)
            sizes = self._families.bincount()[self._families]
            order = order[((sizes - better) / sizes)[order].argsort(stable=True)]
        return order

    def kept(self, order: Tensor, count: int) -> Tensor:
        """At least one of each layer, and rounded up to whole vectors."""
        left = self._families[order[count:]].bincount(minlength=len(self._in_vectors))
        rounded = (left + LANES - 1) // LANES * LANES
        left = torch.where((left > LANES) & self._in_vectors, rounded, left).clamp(min=1)
        return self._better(order) < left[self._families]

    def masks(self, kept: Tensor) -> dict[str, Tensor]:
        """The masks of all tensors."""
        kept = torch.cat([kept, torch.tensor([True])])  # the last is that of -1
        masks = {name: torch.ones(shape, dtype=torch.bool) for name, shape in self._shapes.items()}
        for (name, dim), unit in self._units.items():
            if name in masks:
                masks[name].movedim(dim, -1).logical_and_(kept[unit])
        return masks

    def _better(self, order: Tensor) -> Tensor:
        """Per unit how many of its family come after it in `order`."""
        families = self._families[order].flip(0)
        place = families.argsort(stable=True)
        first = families.bincount().cumsum(0) - families.bincount()
        better = torch.empty_like(order)
        better[order.flip(0)[place]] = torch.arange(len(order)) - first[families[place]]
        return better
