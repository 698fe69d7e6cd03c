"""Single weights: the exact number with the lowest scores is pruned."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.distributed import get_rank

from pruneflow.distributed import from_local_parts, gather, is_sharded, local_part
from pruneflow.pruning.granularity.units import (
    Competition,
    Granularity,
    target_cost,
    total_cost,
)
from pruneflow.pruning.masks import and_more
from pruneflow.pruning.threshold import (
    NaNScoresError,
    find_cost_threshold,
    find_threshold,
    keep_masks,
    local_keep_masks,
    one_process,
)

Protect = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Weights(Granularity):
    """Unstructured pruning: keep or prune each weight by itself.

    Of n weights that compete, exactly `round(sparsity * n)` are pruned; with `costs`, the fewest
    that reach that fraction of the total cost.

    Example:
        >>> from pruneflow import compute_masks, magnitude
        >>> weights = {"weight": torch.tensor([[4.0, 1.0, 0.0, 5.0]])}
        >>> compute_masks(weights, 0.5, importance=magnitude, granularity=Weights())["weight"]
        tensor([[ True, False, False,  True]])
    """

    def masks(self, competition: Competition) -> dict[str, Tensor]:
        """The masks of the tensors."""
        return threshold_masks(competition)


def threshold_masks(
    competition: Competition, protect: Protect | None = None, max_sparsity: float = 1.0
) -> dict[str, Tensor]:
    """Masks that prune the weights with the lowest scores in each group.

    Args:
        competition: The tensors that compete.
        protect: Sets the scores of weights that must be kept to infinity.
        max_sparsity: The sparsity at which everything that is not protected is pruned.

    Raises:
        ValueError: If a sparsity is below the present one, or scores are NaN.
    """
    tensors, before = competition.tensors, competition.before
    sharded = any(is_sharded(tensor) for tensor in tensors.values())
    join = gather if sharded else one_process
    counts = [
        int((local_part(before[name], tensor) == 0).sum()) if name in before else 0
        for name, tensor in tensors.items()
    ]
    pruned = dict(zip(tensors, join(torch.tensor([counts])).sum(0).tolist(), strict=True))
    scores = {
        name: competition.scores(
            name, keep=before.get(name), protect=protect and partial(protect, name)
        )
        for name in tensors
    }
    targets = (_target_costs if competition.by_cost else _target_counts)(competition, pruned)
    masks: dict[str, Tensor] = {}
    for (names, sparsity), target in zip(competition.groups, targets, strict=True):
        group = [scores[name] for name in names]
        try:
            if sparsity == max_sparsity:
                unprotected = sum(int((score() < math.inf).sum()) for score in group)
                threshold = find_threshold(
                    group, int(join(torch.tensor([unprotected])).sum()), join
                )
            elif competition.by_cost:
                costs = [competition.costs[name] for name in names]
                threshold = find_cost_threshold(group, costs, target, join)
            else:
                threshold = find_threshold(group, int(target), join)
        except NaNScoresError as error:
            nan = join(torch.tensor([[bool(score().isnan().any()) for score in group]])).any(0)
            listed = ", ".join(repr(name) for name, any_ in zip(names, nan, strict=True) if any_)
            raise ValueError(
                f"`importance` must return finite scores, got NaN for {listed}; nothing was changed"
            ) from error
        kept = (
            local_keep_masks(group, threshold, gather, get_rank())
            if sharded
            else keep_masks(group, threshold)
        )
        for name, part in zip(names, kept, strict=True):
            masks[name] = from_local_parts(part, tensors[name])
    return {name: masks[name] for name in tensors}


def _target_counts(competition: Competition, pruned: Mapping[str, int]) -> list[int]:
    """Number of weights to prune in each group.

    Raises:
        ValueError: If it is less than what is already pruned.
    """
    groups = competition.groups
    sizes = [sum(competition.tensors[name].numel() for name in names) for names, _ in groups]
    present = [sum(pruned[name] for name in names) for names, _ in groups]
    counts = [round(sparsity * size) for (_, sparsity), size in zip(groups, sizes, strict=True)]
    _avoid_regrowth(counts, present)
    for (names, sparsity), count, before, size in zip(groups, counts, present, sizes, strict=True):
        if count < before:
            raise _below_present(names, before / size, sparsity)
    return counts


def _target_costs(competition: Competition, pruned: Mapping[str, int]) -> list[float]:
    """Cost to prune in each group.

    Raises:
        ValueError: If it is less than what is already pruned.
    """
    costs, targets = competition.costs, []
    for names, sparsity in competition.groups:
        tensors = {name: competition.tensors[name] for name in names}
        targets.append(target_cost(sparsity, costs, tensors))
        present = sum(costs[name] * pruned[name] for name in names)
        # A round may prune up to one weight more than its target.
        if present - targets[-1] > max(costs[name] for name in names):
            raise _below_present(names, present / total_cost(costs, tensors), sparsity)
    return targets


def _avoid_regrowth(counts: list[int], present: Sequence[int]) -> None:
    """Where a group has one pruned weight more than its count, prune one fewer in another group.

    Counts are rounded to a fixed total, so the count of a group may fall by one as the total grows.
    """
    ahead = [i for i, count in enumerate(counts) if present[i] - count == 1]
    behind = [i for i, count in enumerate(counts) if count > present[i]]
    for i, j in zip(ahead, behind, strict=False):
        counts[i], counts[j] = counts[i] + 1, counts[j] - 1


def _below_present(names: Sequence[str], present: float, sparsity: float) -> ValueError:
    return ValueError(
        f"`sparsity` must be at least the present one, {present:.6g}, got {sparsity!r} for "
        f"{names[0]!r}{and_more(names)}; pruned weights stay pruned, so raise it, or start from "
        "the dense model"
    )
