"""The base class of granularities, and masks for units of several weights."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from pruneflow.distributed import is_sharded
from pruneflow.errors import expect
from pruneflow.pruning.distribution import Groups
from pruneflow.pruning.masks import MaskSet
from pruneflow.pruning.threshold import Scores
from pruneflow.structure.costs import Costs
from pruneflow.structure.running import Example


class Scoring(Protocol):
    """Makes the function that computes the scores of a tensor."""

    def __call__(
        self,
        name: str,
        *,
        keep: Tensor | None = None,
        protect: Callable[[Tensor], Tensor] | None = None,
    ) -> Scores:
        """The scores of the tensor `name`: -inf where `keep` is zero, then passed to `protect`."""


@dataclass(frozen=True)
class Competition:
    """The tensors that compete in one round.

    Args:
        tensors: Qualified name -> live weights to prune.
        groups: The tensors that compete with each other, and the sparsity of each group.
        scores: Makes the score function of each tensor.
        before: The present masks, zero = pruned; a tensor without one is dense.
        costs: Cost per weight of each tensor; 1 if targets count weights.
        by_cost: Whether targets count costs instead of weights.
    """

    tensors: Mapping[str, Tensor]
    groups: Groups
    scores: Scoring
    before: Mapping[str, Tensor]
    costs: Costs
    by_cost: bool


def target_cost(sparsity: float, costs: Costs, tensors: Mapping[str, Tensor]) -> float:
    """Cost to prune to reach a sparsity, less a tolerance for rounding in sums of costs."""
    return sparsity * total_cost(costs, tensors) * (1 - 1e-12)


def total_cost(costs: Costs, tensors: Mapping[str, Tensor]) -> float:
    """Cost of all weights."""
    return sum(costs[name] * tensor.numel() for name, tensor in tensors.items())


def pruned_cost(masks: Mapping[str, Tensor], costs: Mapping[str, float]) -> float:
    """Cost of the pruned weights; tensors without a cost do not count."""
    return sum(costs[n] * MaskSet({n: mask}).pruned for n, mask in masks.items() if n in costs)


class Granularity:
    """The base class of granularities: what is removed together.

    A subclass is a frozen dataclass that implements `masks`, and overrides other methods where it
    differs.
    """

    @property
    def needs_example(self) -> bool:
        """Whether `bind` needs an example input."""
        return False

    def bind(
        self, model: nn.Module, names: Collection[str], example: Example | None
    ) -> Granularity:
        """The granularity for the tensors `names` of a model."""
        return self

    @property
    def coupled(self) -> tuple[str, ...]:
        """Names of other tensors, without scores, that lose entries with the pruned ones."""
        return ()

    def writers(self, name: str) -> tuple[str, ...]:
        """Names of the tensors to prune with which the tensor `name` loses entries."""
        return ()

    def check(self, tensors: Mapping[str, Tensor], groups: Groups, costs: Costs) -> None:
        """Check, before training, that the tensors can be pruned to the sparsities of the groups.

        Raises:
            ValueError: Names the tensors or the sparsity.
        """

    def masks(self, competition: Competition) -> dict[str, Tensor]:
        """The masks of all tensors that lose entries, with or without scores.

        Raises:
            ValueError: If a sparsity is out of range or below the present one.
        """
        raise NotImplementedError


def check_not_sharded(granularity: Granularity, tensors: Mapping[str, Tensor]) -> None:
    """Check that no tensor is sharded.

    Raises:
        ValueError: Names the granularity.
    """
    expect(
        not any(is_sharded(tensor) for tensor in tensors.values()),
        "granularity",
        "be Weights() or NM(...) for sharded weights",
        granularity,
        "shards do not hold whole channels or blocks",
    )


class Units(Protocol):
    """Groups of weights that are kept or pruned together."""

    relative: bool
    """Whether scores are divided by the mean score of their tensor."""
    step: int
    """Maximum number of units that one step prunes."""

    def sums(self, entries: Callable[[str], Tensor]) -> Tensor:
        """Sum of `entries(name)` over the weights of each unit, in float64."""

    def kept(self, order: Tensor, count: int) -> Tensor:
        """Whether each unit is kept if the first `count` in `order` are to be pruned."""

    def to_masks(self, kept: Tensor) -> dict[str, Tensor]:
        """The masks of all tensors, on the CPU, given which units are kept."""


def lowest_first(scores: Tensor) -> Tensor:
    """The order in which units are pruned: the lowest score first, ties in order of index."""
    return scores.argsort(stable=True)


def unit_masks(
    units: Units,
    competition: Competition,
    names: Sequence[str],
    sparsity: float,
    pruning_order: Callable[[Tensor], Tensor] = lowest_first,
) -> dict[str, Tensor]:
    """Masks that prune the fewest units, by mean score, that reach the sparsity.

    Args:
        units: The units.
        competition: The tensors, their scores, costs and present masks.
        names: Names of the tensors that are scored and counted.
        sparsity: Fraction of the cost of all their weights to prune.
        pruning_order: Scores of the units -> order in which they are pruned.

    Returns:
        Masks of all tensors that lose entries.

    Raises:
        ValueError: If scores are not finite, or the sparsity is below the present one or cannot be
            reached.
    """
    tensors = {name: competition.tensors[name].detach() for name in names}
    before, costs = competition.before, competition.costs

    def remaining(name: str) -> Tensor:
        mask = before.get(name)
        if mask is None:
            return torch.ones_like(tensors[name], dtype=torch.float32)
        return (mask != 0).to(torch.float32)

    def remaining_scores(name: str) -> Tensor:
        mask = remaining(name)
        scores = competition.scores(name)() * mask  # at least float32
        if not units.relative or not scores.any():
            return scores
        return scores * (mask.sum() / scores.abs().sum())

    counts = units.sums(remaining)
    sums = units.sums(remaining_scores)
    if sums.isnan().any():
        raise ValueError(
            "`importance` must return finite scores, got NaN or infinity; nothing was changed"
        )
    pruned = counts == 0
    order = pruning_order(torch.where(pruned, -torch.inf, sums / counts))
    order = torch.cat([order[pruned[order]], order[~pruned[order]]])

    def masks(count: int) -> dict[str, Tensor]:
        found = units.to_masks(units.kept(order, count) & ~pruned)
        for name in found.keys() & before.keys():
            found[name] &= (before[name] != 0).cpu()
        return found

    def cost(count: int) -> float:
        return pruned_cost(masks(count), costs)

    total, target = total_cost(costs, tensors), target_cost(sparsity, costs, tensors)
    present = int(pruned.sum())
    # A round may prune up to one step more than its target.
    largest = units.sums(lambda name: torch.full_like(tensors[name], costs[name])).max()
    if cost(present) - target > units.step * float(largest):
        raise ValueError(
            f"`sparsity` must be at least the present one, {cost(present) / total:.6g}, got "
            f"{sparsity!r}; pruned weights stay pruned"
        )
    count = bisect_left(range(len(order) + 1), target, lo=present, key=cost)
    if count > len(order):
        raise too_sparse(cost(len(order)) / total, sparsity)
    return masks(count)


def too_sparse(maximum: float, sparsity: float) -> ValueError:
    """The error for a sparsity above the maximum of a model's channels."""
    return ValueError(
        f"`sparsity` must be at most {maximum:.6g}, which leaves one channel in each layer, got "
        f"{sparsity!r}; lower it"
    )
