"""Scores and a sparsity -> masks."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.distributed import get_rank

from pruneflow.distributed import assemble, gather, is_sharded, own
from pruneflow.pruning.distribution import Scope, resolve_scope
from pruneflow.pruning.granularity.blocks import Block
from pruneflow.pruning.granularity.channels import CoupledChannels
from pruneflow.pruning.granularity.nm import NM
from pruneflow.pruning.granularity.units import unit_masks
from pruneflow.pruning.importance import Context, Importance, check_finite, gradients_of, scores_of
from pruneflow.pruning.masks import MaskSet, and_more
from pruneflow.pruning.plan import pruned_count
from pruneflow.pruning.schedules import plain_number
from pruneflow.pruning.threshold import Scores, find_threshold, keep_masks, keep_parts, one_process

# Of the powers 0, 0.15, 0.25, 0.35, 0.5 and 0.75 the one that left ResNet-18 the most accurate with
# 5 % or 10 % of its multiply-adds: recipes/results/resnet18_cifar10_compute_aware. From 0.5 on the
# first layers die.
_POWER = 0.25


@torch.no_grad()
def compute_masks(
    tensors: Mapping[str, Tensor],
    sparsity: float,
    *,
    importance: Importance,
    scope: Scope = "global",
    masks: Mapping[str, Tensor] | None = None,
    round: int = 1,
    gradients: Mapping[str, Tensor | None] | None = None,
    granularity: NM | Block | CoupledChannels | None = None,
    costs: Mapping[str, float] | None = None,
) -> MaskSet:
    """Masks that keep the most important weights, exactly `round(sparsity * n)` pruned per group.

    The count is of all n weights of a group, never of what remains. With `costs`, or blocks or
    channels for a granularity, as few go as reach the fraction `sparsity` of all costs. Pruned
    weights stay pruned; of equal scores, the lowest (tensor order, flat index) goes first. Scores
    are computed tensor by tensor and never held together.

    Sharded weights (`DTensor`s) stay where they are and get the masks that the whole ones would;
    every process has to call this. An elementwise importance is called with pieces of shards, any
    other with the `DTensor`, and returns scores of its shape, as a `DTensor` or a plain tensor.

    Args:
        tensors: Qualified name -> live weights, of any shape; need not belong to a module.
        sparsity: Cumulative sparsity to reach, in [0, 1).
        importance: Scores, higher = keep.
        scope: What competes together; see `resolve_scope`.
        masks: The masks so far, of any dtype, zero = pruned; None for none.
        round: The round, for importances that depend on it.
        gradients: Qualified name -> gradient of the loss, for importances that need them.
        granularity: What is removed together; None for each weight by itself.
        costs: Qualified name -> what each weight of the tensor costs, such as `multiply_adds`
            finds; None counts weights. What competes are then scores over the fourth root of the
            cost, of blocks as of weights; channels compete by their scores alone.

    Returns:
        A mask for every tensor; for channels, for all that lose entries with them.

    Raises:
        ValueError: If `sparsity` is out of range or below what is already pruned, or weights are
            not finite, or scores are NaN or of another shape than their weights, or gradients are
            needed that are not there, or costs are missing or not positive.

    Example:
        >>> from pruneflow import magnitude
        >>> weights = {"a": torch.tensor([4.0, -1.0]), "b": torch.tensor([-3.0, 2.0])}
        >>> masks = compute_masks(weights, 0.5, importance=magnitude)
        >>> masks["a"], masks["b"]
        (tensor([ True, False]), tensor([ True, False]))
    """
    before = masks or {}
    context = Context(round, gradients_of(importance, gradients or {}, tensors))
    check_finite(tensors)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    price = check_costs(costs, tensors)

    def scores(name: str, *masking: Any) -> Callable[[], Tensor]:
        tensor = tensors[name].detach()
        return scores_of(importance, name, context, tensor, price[name] ** _POWER, *masking)

    if isinstance(granularity, Block | CoupledChannels):
        check_units(tensors, granularity, scope)
        channels = isinstance(granularity, CoupledChannels)  # which go through all layers
        new = {
            name: before[name] != 0 if name in before else torch.ones_like(tensor, dtype=torch.bool)
            for name, tensor in tensors.items()
        }
        for group in [list(tensors)] if channels else resolve_scope(scope, list(tensors)):
            new |= unit_masks(
                granularity.units({name: shapes[name] for name in group}),
                {name: tensors[name].detach() for name in group},
                sparsity,
                score=lambda name: scores(name)(),
                costs=price,
                before=before,
                scope=scope,
            )
        return MaskSet(new)

    protect = {}
    if granularity is not None:
        granularity.check(shapes, sparsity)
        protect = {name: partial(granularity.protect, name) for name in tensors}
    new = {}
    for group in resolve_scope(scope, list(tensors)):
        new |= _weight_masks(
            {name: tensors[name] for name in group},
            sparsity,
            [scores(name, before.get(name), protect.get(name)) for name in group],
            before,
            None if costs is None else price,
            all_but_protected=granularity is not None and sparsity == granularity.most,
        )
    return MaskSet({name: new[name] for name in tensors})


def _weight_masks(
    tensors: Mapping[str, Tensor],
    sparsity: float,
    scores: Sequence[Scores],
    before: Mapping[str, Tensor],
    costs: Mapping[str, float] | None,
    *,
    all_but_protected: bool,
) -> dict[str, Tensor]:
    """Masks of tensors that compete weight by weight.

    With `all_but_protected`, whatever has no infinite score goes.
    """
    sharded = any(is_sharded(tensor) for tensor in tensors.values())
    join = gather if sharded else one_process
    price = costs or dict.fromkeys(tensors, 1.0)
    sizes = {name: tensor.numel() for name, tensor in tensors.items()}
    total = sum(price[name] * size for name, size in sizes.items()) or 1.0

    def pruned(masks: Mapping[str, Tensor]) -> dict[str, int]:
        """Of each tensor how many weights, in all processes."""
        here = [int((masks[name] == 0).sum()) if name in masks else 0 for name in tensors]
        return dict(zip(tensors, join(torch.tensor([here])).sum(0).tolist(), strict=True))

    def removed(counts: Mapping[str, int]) -> float:
        return sum(price[name] * count for name, count in counts.items()) / total

    def parts(count: int) -> Iterator[Tensor]:
        threshold = find_threshold(scores, count, join)
        if sharded:
            return keep_parts(scores, threshold, gather, get_rank())
        return keep_masks(scores, threshold)

    present = pruned({name: own(before[name], tensors[name]) for name in tensors if name in before})
    gone, count = sum(present.values()), pruned_count(sparsity, sum(sizes.values()))
    # By cost one weight more than asked for may be gone.
    overshot = removed(present) - sparsity > max(price.values()) / total
    if count < gone if costs is None else overshot:
        raise ValueError(
            f"`sparsity` is expected to be at least the present one, {removed(present):.6g}, but "
            f"{sparsity!r} came for {next(iter(tensors))!r}{and_more(list(tensors))}; pruned "
            "weights stay pruned, so ask for more, or start from the dense model"
        )
    try:
        if all_but_protected:
            free = [int((score() < math.inf).sum()) for score in scores]
            count = int(join(torch.tensor([free])).sum())
        elif costs is not None:
            count = bisect_left(
                range(sum(sizes.values()) + 1),
                sparsity * (1 - 1e-12),  # which sums of costs may miss by rounding
                lo=gone,
                key=lambda count: removed(pruned(dict(zip(tensors, parts(count), strict=True)))),
            )
        return {
            name: assemble(part, tensors[name])
            for name, part in zip(tensors, parts(count), strict=True)
        }
    except ValueError as error:
        found = [join(score().isnan().any().view(1)).any() for score in scores]
        nan = [repr(name) for name, any_nan in zip(tensors, found, strict=True) if any_nan]
        raise ValueError(
            "`importance` is expected to return numbers, but NaN came for "
            f"{', '.join(nan)}; nothing was changed"
        ) from error


def check_costs(costs: Mapping[str, float] | None, names: Iterable[str]) -> dict[str, float]:
    """The cost of each weight of these tensors; 1 for None.

    Raises:
        ValueError: Naming the tensors without a finite cost above 0.
    """
    if costs is None:
        return dict.fromkeys(names, 1.0)
    numbers = {name: plain_number(costs.get(name)) for name in names}
    missing = [
        n for n, c in numbers.items() if not (isinstance(c, Real) and 0 < float(c) < math.inf)
    ]
    if missing:
        raise ValueError(
            "`costs` are expected to say what a weight of each tensor costs, a number above 0, but "
            f"do not for {', '.join(missing)}; add them, or `exclude` the tensors"
        )
    return {name: float(cost) for name, cost in numbers.items()}


def check_units(tensors: Mapping[str, Tensor], granularity: object, scope: Scope) -> None:
    """Refuse what blocks and channels cannot do.

    Raises:
        ValueError: If tensors are sharded, or channels are to compete in named groups.
    """
    if not isinstance(granularity, Block | CoupledChannels):
        return
    if any(is_sharded(tensor) for tensor in tensors.values()):
        raise ValueError(
            f"`granularity` is expected to be None or NM for sharded weights, but {granularity!r} "
            "came; shards do not hold whole channels or blocks"
        )
    if isinstance(granularity, CoupledChannels) and scope not in ("global", "layer"):
        raise ValueError(
            "`scope` is expected to be 'global' or 'layer' for channels, which go through several "
            f"layers, but {scope!r} came"
        )
