"""Whole channels, with everything that computes and reads them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from pruneflow.errors import expect
from pruneflow.pruning.distribution import Groups
from pruneflow.pruning.granularity.units import (
    Competition,
    Granularity,
    check_not_sharded,
    lowest_first,
    pruned_cost,
    target_cost,
    too_sparse,
    total_cost,
    unit_masks,
)
from pruneflow.structure.channels.coupling import Coupling, find_coupling
from pruneflow.structure.channels.flow import LANES
from pruneflow.structure.costs import Costs
from pruneflow.structure.parameters import locate, named_modules
from pruneflow.structure.running import Example


@dataclass(frozen=True, eq=False)
class Channels(Granularity):
    """Structured pruning: keep or prune whole channels, which `deploy.shrink` can then remove.

    A channel includes the filters that compute it (several if a residual connection adds them), its
    batch norm parameters and the weights that read it. Its score is the mean score of its weights
    in convolutions and Linear layers, relative to the mean of their tensor, as layers differ in
    scale. A round prunes the fewest channels, by score, that reach the target, a fraction of the
    weights (or of their cost). Every layer keeps at least one channel. A layer whose number of
    channels is a multiple of 16 keeps a multiple of 16 or fewer than 16, as `deploy.shrink` does.
    With scope `"layer"`, all layers lose the same fraction of their channels.

    Layers that feed a layer which mixes all channels, such as LayerNorm or attention, keep all
    channels, and so do excluded layers; but excluded layers lose the inputs that are pruned.

    Args:
        example_input: An input batch, to trace the channels through the forward pass: a tensor, a
            tuple of positional arguments or a dict of keyword arguments. None for the
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

    @property
    def needs_example(self) -> bool:
        """Whether `bind` needs an example input."""
        return self.example_input is None

    def bind(
        self, model: nn.Module, names: Collection[str], example: Example | None = None
    ) -> CoupledChannels:
        """Find the channels of a model that can be pruned.

        Args:
            model: The model; it is not changed.
            names: Qualified names of the weights to prune.
            example: An input batch, used if `example_input` is None.

        Raises:
            ValueError: If there is no example input, torch.fx cannot trace the model, or no channel
                can be pruned.
        """
        check_not_sharded(self, dict(model.named_parameters()))
        example = example if self.example_input is None else self.example_input
        if example is None:
            raise ValueError(
                "`example_input` must be an input batch of the model, got None; use "
                "Channels(example_input), or set `self.example_input_array` in the LightningModule"
            )
        coupling = _by_plain_names(find_coupling(model, example), model)
        shapes = {name: slot.parameter.shape for name, slot in locate(model).items()}
        return CoupledChannels(coupling, shapes, names, Channels(example))


def _by_plain_names(coupling: Coupling, model: nn.Module) -> Coupling:
    """The coupling with canonical names, since wrappers in the model change those of its graph."""
    pairs = zip(model.named_modules(), named_modules(model), strict=True)
    plain = {path: name for (path, _), (name, _) in pairs}

    def renamed(member: tuple[str, int]) -> tuple[str, int]:
        owner, _, attribute = member[0].rpartition(".")
        return f"{plain.get(owner, owner)}.{attribute}".lstrip("."), member[1]

    members = {renamed(member): unit for member, unit in coupling.members.items()}
    return replace(coupling, members=members, writes=frozenset(map(renamed, coupling.writes)))


class CoupledChannels(Granularity):
    """The channels of a model that can be pruned.

    Args:
        coupling: Which entries belong to which channel.
        shapes: Shapes of all parameters of the model.
        names: Names of the weights to prune.
        channels: The granularity whose `bind` found them.

    Raises:
        ValueError: If no channel can be pruned.
    """

    relative = True

    def __init__(
        self,
        coupling: Coupling,
        shapes: Mapping[str, torch.Size],
        names: Collection[str],
        channels: Channels,
    ) -> None:
        self._channels = channels
        free = torch.ones(coupling.units, dtype=torch.bool)
        for name, dim in coupling.writes:
            if len(shapes[name]) > 1 and name not in names:
                unit = coupling.members[name, dim]
                free[unit[unit >= 0]] = False
        expect(
            bool(free.any()),
            "include` and `exclude",
            "leave channels to prune",
            "a selection in which every channel is also computed by an excluded layer",
            "include those layers",
        )
        number = torch.cat([free.cumsum(0) - 1, torch.tensor([-1])])  # unit -1 is the last entry
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
        self._scored = tuple(name for name in self._shapes if name in names)
        self._families = coupling.families[free].unique(return_inverse=True)[1]
        sizes = self._families.bincount()
        self._in_vectors = (sizes > LANES) & (sizes % LANES == 0)
        self.step = LANES if self._in_vectors.any() else 1

    def __repr__(self) -> str:
        return repr(self._channels)

    def bind(
        self, model: nn.Module, names: Collection[str], example: Example | None = None
    ) -> CoupledChannels:
        """Find the channels of a model again."""
        return self._channels.bind(model, names, example)

    @property
    def coupled(self) -> tuple[str, ...]:
        """Names of the other parameters that lose entries, such as batch norm's and biases."""
        return tuple(name for name in self._shapes if name not in self._scored)

    def writers(self, name: str) -> tuple[str, ...]:
        """Names of the weights to prune that compute the channels of a tensor."""
        own = [unit for (tensor, _), unit in self._units.items() if tensor == name]
        channels = torch.cat([torch.tensor([-1]), *own]).unique()[1:]
        return tuple(
            tensor
            for (tensor, dim), unit in self._units.items()
            if tensor in self._scored
            and (tensor, dim) in self._writes
            and torch.isin(unit, channels).any()
        )

    def check(self, tensors: Mapping[str, Tensor], groups: Groups, costs: Costs) -> None:
        """Check that scope and sparsity suit channels.

        Raises:
            ValueError: If the scope is not global or per layer, or the sparsity would prune all
                channels of a layer.
        """
        sparsity = groups[0][1]
        uniform = all(len(names) == 1 and each == sparsity for names, each in groups)
        expect(
            len(groups) == 1 or uniform,
            "scope",
            "be 'global' or 'layer' for channels, which belong to several layers",
            "other groups of tensors",
            "try 'layer'",
        )
        order = torch.arange(len(self._families))
        maximum = pruned_cost(self.to_masks(self.kept(order, len(order))), costs)
        if target_cost(sparsity, costs, tensors) > maximum:
            raise too_sparse(maximum / total_cost(costs, tensors), sparsity)

    def masks(self, competition: Competition) -> dict[str, Tensor]:
        """The masks of all tensors that lose entries."""
        names, sparsity = list(competition.tensors), competition.groups[0][1]
        pruning_order = self._uniform_order if len(competition.groups) > 1 else lowest_first
        present = {
            name: competition.before[name] != 0
            if name in competition.before
            else torch.ones_like(tensor, dtype=torch.bool)
            for name, tensor in competition.tensors.items()
        }
        return present | unit_masks(self, competition, names, sparsity, pruning_order)

    def sums(self, entries: Callable[[str], Tensor]) -> Tensor:
        """Sum over the weights to prune that compute or read each channel."""
        sums = torch.zeros(len(self._families), dtype=torch.float64)
        for name in self._scored:
            values = entries(name).to(torch.float64)
            for dim in range(values.dim()):
                unit = self._units.get((name, dim))
                if unit is not None:
                    rows = values.movedim(dim, 0).reshape(len(unit), -1).sum(1).cpu()
                    sums.index_add_(0, unit[unit >= 0], rows[unit >= 0])
        return sums

    def _uniform_order(self, scores: Tensor) -> Tensor:
        """The order, lowest first, in which all layers lose the same fraction of their channels."""
        order = scores.argsort(stable=True)
        rank = self._rank_in_family(order)
        sizes = self._families.bincount()[self._families]
        return order[((sizes - rank) / sizes)[order].argsort(stable=True)]

    def kept(self, order: Tensor, count: int) -> Tensor:
        """At least one channel of each family, rounded up to whole vectors."""
        left = self._families[order[count:]].bincount(minlength=len(self._in_vectors))
        rounded = (left + LANES - 1) // LANES * LANES
        left = torch.where((left > LANES) & self._in_vectors, rounded, left).clamp(min=1)
        return self._rank_in_family(order) < left[self._families]

    def to_masks(self, kept: Tensor) -> dict[str, Tensor]:
        """The masks of all tensors."""
        kept = torch.cat([kept, torch.tensor([True])])  # unit -1 is the last entry
        masks = {name: torch.ones(shape, dtype=torch.bool) for name, shape in self._shapes.items()}
        for (name, dim), unit in self._units.items():
            if name in masks:
                masks[name].movedim(dim, -1).logical_and_(kept[unit])
        return masks

    def _rank_in_family(self, order: Tensor) -> Tensor:
        """Number of units of the same family that come after each unit in `order`."""
        families = self._families[order].flip(0)
        by_family = families.argsort(stable=True)
        first = families.bincount().cumsum(0) - families.bincount()
        rank = torch.empty_like(order)
        rank[order.flip(0)[by_family]] = torch.arange(len(order)) - first[families[by_family]]
        return rank
