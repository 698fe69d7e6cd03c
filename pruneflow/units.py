"""Groups of weights that stay or go together, and which of them go."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping
from typing import Protocol

import torch
from torch import Tensor

from pruneflow.channels.coupling import Coupling
from pruneflow.channels.flow import LANES
from pruneflow.schedules import check_fraction


class Units(Protocol):
    """Groups of weights that stay or go together."""

    relative: bool
    """Whether scores count relative to the mean of their tensor."""
    step: int
    """How many may go at once."""

    def sums(self, entries: Callable[[str], Tensor]) -> Tensor:
        """Per unit the sum, in float64, over its weights; `entries` gives those of a tensor."""

    def order(self, scores: Tensor, scope: object) -> Tensor:
        """The units in the order in which they go."""

    def kept(self, order: Tensor, count: int) -> Tensor:
        """Per unit whether it stays when the first `count` in `order` are to go."""

    def masks(self, kept: Tensor) -> dict[str, Tensor]:
        """The masks of all tensors, on the CPU."""


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
            raise ValueError(_too_much(most / total, sparsity))

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


class Blocks:
    """The blocks of some tensors.

    Args:
        rows: Of a block.
        columns: Of a block; None for whole rows.
        shapes: Of the tensors.
    """

    relative = False
    step = 1

    def __init__(self, rows: int, columns: int | None, shapes: Mapping[str, torch.Size]) -> None:
        self._shapes = shapes
        self._block: dict[str, Tensor] = {}
        count = 0
        for name, shape in shapes.items():
            height, width = shape[:1].numel(), shape[1:].numel()
            wide = width if columns is None else columns
            row, column = torch.arange(height) // rows, torch.arange(width) // wide
            self._block[name] = count + row[:, None] * -(-width // wide) + column
            count += -(-height // rows) * -(-width // wide)
        self._count = count

    def sums(self, entries: Callable[[str], Tensor]) -> Tensor:
        """Per block the sum over its weights."""
        sums = torch.zeros(self._count, dtype=torch.float64)
        for name, block in self._block.items():
            values = entries(name).to("cpu", torch.float64)
            sums.index_add_(0, block.flatten(), values.flatten())
        return sums

    def order(self, scores: Tensor, scope: object) -> Tensor:
        """Lowest score first."""
        return scores.argsort(stable=True)

    def kept(self, order: Tensor, count: int) -> Tensor:
        """All but the first `count`."""
        kept = torch.ones(self._count, dtype=torch.bool)
        kept[order[:count]] = False
        return kept

    def masks(self, kept: Tensor) -> dict[str, Tensor]:
        """The masks of all tensors."""
        return {name: kept[self._block[name]].reshape(s) for name, s in self._shapes.items()}


def unit_masks(
    units: Units,
    tensors: Mapping[str, Tensor],
    sparsity: float,
    *,
    score: Callable[[str], Tensor],
    costs: Mapping[str, float],
    before: Mapping[str, Tensor],
    scope: object,
) -> dict[str, Tensor]:
    """Masks that remove the units with the lowest mean score, as few as reach the target.

    Args:
        units: What goes together.
        tensors: Qualified name -> the weights that are scored and counted.
        sparsity: Fraction of the cost of all those weights to reach, in [0, 1).
        score: Computes the scores of the tensor of that name, of its shape.
        costs: Per name the cost of one weight.
        before: The masks so far, zero = pruned; what is missing is dense.
        scope: `"layer"` to let every layer lose the same fraction of channels.

    Returns:
        Masks of all tensors that lose entries.

    Raises:
        ValueError: If scores are NaN, or `sparsity` is less than what is gone already or more than
            can be.
    """
    check_fraction("sparsity", sparsity)

    def alive(name: str) -> Tensor:
        mask = before.get(name)
        if mask is None:
            return torch.ones_like(tensors[name], dtype=torch.float32)
        return (mask != 0).to(torch.float32)

    def of_the_living(name: str) -> Tensor:
        living = alive(name)
        scores = score(name) * living  # at least in float32
        if not units.relative or not scores.any():
            return scores
        return scores * (living.sum() / scores.abs().sum())

    left = units.sums(alive)
    scores = units.sums(of_the_living)
    if scores.isnan().any():
        raise ValueError(
            "`importance` is expected to return finite numbers, but NaN or infinity came; nothing "
            "was changed"
        )
    gone = left == 0
    order = units.order(torch.where(gone, -torch.inf, scores / left), scope)
    order = torch.cat([order[gone[order]], order[~gone[order]]])

    def masks(count: int) -> dict[str, Tensor]:
        found = units.masks(units.kept(order, count) & ~gone)
        for name in found.keys() & before.keys():
            found[name] &= (before[name] != 0).cpu()
        return found

    def removed(count: int) -> float:
        return cost_of(masks(count), costs)

    total = sum(costs[name] * tensor.numel() for name, tensor in tensors.items())
    goal = sparsity * total * (1 - 1e-12)  # which sums of costs may miss by rounding
    present = int(gone.sum())
    # One step more than asked for may be gone.
    largest = units.sums(lambda name: torch.full_like(tensors[name], costs[name])).max()
    if removed(present) - goal > units.step * float(largest):
        raise ValueError(
            f"`sparsity` is expected to be at least the present one, {removed(present) / total:.6g}"
            f", but {sparsity!r} came; pruned weights stay pruned"
        )
    count = bisect_left(range(len(order) + 1), goal, lo=present, key=removed)
    if count > len(order):
        raise ValueError(_too_much(removed(len(order)) / total, sparsity))
    return masks(count)


def cost_of(masks: Mapping[str, Tensor], costs: Mapping[str, float]) -> float:
    """What the pruned weights under some masks cost; tensors without costs do not count."""
    return sum(costs[name] * int((~mask).sum()) for name, mask in masks.items() if name in costs)


def _too_much(most: float, sparsity: float) -> str:
    return (
        f"`sparsity` is expected to be at most {most:.6g}, where one channel of each layer is left,"
        f" but {sparsity!r} came; ask for less"
    )
