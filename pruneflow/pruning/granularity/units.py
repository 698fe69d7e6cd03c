"""Groups of weights that stay or go together, and which of them go."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from pruneflow.pruning.schedules import check_fraction


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
        raise ValueError(too_much(removed(len(order)) / total, sparsity))
    return masks(count)


def cost_of(masks: Mapping[str, Tensor], costs: Mapping[str, float]) -> float:
    """What the pruned weights under some masks cost; tensors without costs do not count."""
    return sum(costs[name] * int((~mask).sum()) for name, mask in masks.items() if name in costs)


def too_much(most: float, sparsity: float) -> str:
    """What is said of a target above `most`."""
    return (
        f"`sparsity` is expected to be at most {most:.6g}, where one channel of each layer is left,"
        f" but {sparsity!r} came; ask for less"
    )
