"""Mask rules: what a round does to turn scores and a sparsity into masks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pruneflow.distributed import decide
from pruneflow.errors import expect
from pruneflow.pruning.distribution import Scope, groups_of, resolve_scope, together, uniform
from pruneflow.pruning.evidence import Evidence
from pruneflow.pruning.granularity import Granularity, Weights
from pruneflow.pruning.granularity.units import Competition, pruned_cost, total_cost
from pruneflow.pruning.importance import (
    Context,
    Importance,
    check_evidence,
    check_finite,
    magnitude,
    needs_of,
    score_function,
)
from pruneflow.pruning.masks import MaskSet
from pruneflow.pruning.schedules import check_fraction
from pruneflow.structure.costs import CostFunction, Costs
from pruneflow.structure.running import Example


class MaskRule(Protocol):
    """How a round computes masks: from scores, or with a method of `torch.nn.utils.prune`."""

    @property
    def importance(self) -> Any:
        """The importance, or the method of `torch.nn.utils.prune`."""

    @property
    def takes_target(self) -> bool:
        """Whether the schedule sets the sparsity; False for methods with an amount of their own."""

    @property
    def grows(self) -> bool:
        """Whether it may keep weights that were pruned before."""

    @property
    def needs(self) -> Evidence | None:
        """The evidence that it needs, if any."""

    @property
    def costs(self) -> Costs | CostFunction | None:
        """The costs that targets count, or the function that `bind` calls; None for weights."""

    @property
    def needs_example(self) -> bool:
        """Whether `bind` needs an example input."""

    @property
    def coupled(self) -> tuple[str, ...]:
        """Names of other tensors that lose entries with the pruned ones."""

    def writers(self, name: str) -> tuple[str, ...]:
        """Names of the tensors to prune with which the tensor `name` loses entries."""

    def bind(self, model: nn.Module, names: Collection[str], example: Example | None) -> MaskRule:
        """The rule for the tensors `names` of a model."""

    def check(self, tensors: Mapping[str, Tensor], target: float | None) -> None:
        """Check, before training, that the tensors can be pruned to the target, if it is known."""

    def pruned_fraction(self, masks: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> float:
        """Pruned fraction of the weights or costs that targets count."""

    def masks(
        self,
        tensors: Mapping[str, Tensor],
        before: Mapping[str, Tensor],
        target: float | None,
        context: Context,
    ) -> MaskSet:
        """The masks after a round; `before` are the present ones, zero = pruned."""


@dataclass(frozen=True)
class Prune:
    """Prune the weights with the lowest scores.

    Args:
        importance: The importance; the highest scores are kept.
        scope: Which tensors compete with each other; see `resolve_scope`.
        granularity: What is removed together.
        costs: Costs that targets count instead of weights: a function such as `multiply_adds`,
            which `bind` calls, or its result.
    """

    importance: Importance = magnitude
    scope: Scope = "global"
    granularity: Granularity = Weights()  # noqa: RUF009  # frozen
    costs: Costs | CostFunction | None = None

    takes_target = True
    grows = False

    def __post_init__(self) -> None:
        needs_of(self.importance)  # raises for an invalid `needs`
        distribution = resolve_scope(self.scope)
        one_sparsity = distribution in (together, uniform) or isinstance(self.scope, Mapping)
        expect(
            self.costs is None or one_sparsity,
            "costs",
            f"be None with scope {self.scope!r}, which distributes weights",
            "costs",
            "use scope='global' or 'layer'",
        )
        if self.costs is not None and not callable(self.costs):
            object.__setattr__(self, "costs", Costs(self.costs))

    @property
    def needs(self) -> Evidence | None:
        """The evidence that the importance needs."""
        return needs_of(self.importance)

    @property
    def needs_example(self) -> bool:
        """Whether `bind` needs an example input, for the granularity or the costs."""
        return self.granularity.needs_example or callable(self.costs)

    @property
    def coupled(self) -> tuple[str, ...]:
        """Names of other tensors that lose entries with the pruned ones."""
        return self.granularity.coupled

    def writers(self, name: str) -> tuple[str, ...]:
        """Names of the tensors to prune with which the tensor `name` loses entries."""
        return self.granularity.writers(name)

    def bind(self, model: nn.Module, names: Collection[str], example: Example | None) -> Prune:
        """The rule for the tensors `names` of a model."""
        costs = self.costs
        if callable(costs):
            measure, own = costs, getattr(self.granularity, "example_input", None)
            batch = example if own is None else own
            if batch is None:
                raise ValueError(
                    "`example_input` must be an input batch of the model if `costs` is a "
                    f"function, got None with {measure!r}; give it, or the result of the function, "
                    "such as costs=multiply_adds(model, example_input)"
                )
            measured = Costs(measure(model, batch))  # in all processes, as the model may be sharded
            costs = decide(lambda: measured, [])  # latencies differ between processes
        return replace(self, granularity=self.granularity.bind(model, names, example), costs=costs)

    def check(self, tensors: Mapping[str, Tensor], target: float | None) -> None:
        """Check that the tensors can be pruned to the target.

        Raises:
            ValueError: Names the argument.
        """
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        check_target = getattr(resolve_scope(self.scope), "check_target", None)
        if target is not None and check_target is not None:
            check_target(shapes, target)
        groups = groups_of(self.scope, shapes, target or 0.0)
        self.granularity.check(tensors, groups, self._costs_of(tensors))

    def pruned_fraction(self, masks: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> float:
        """Pruned fraction of the weights or costs that targets count."""
        costs = self._costs_of(tensors)
        return pruned_cost(masks, costs) / (total_cost(costs, tensors) or 1.0)

    @torch.no_grad()
    def masks(
        self,
        tensors: Mapping[str, Tensor],
        before: Mapping[str, Tensor],
        target: float | None,
        context: Context,
    ) -> MaskSet:
        """The masks after a round to the target; see `compute_masks`."""
        check_finite(tensors)
        costs = self._costs_of(tensors)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        if self.needs:
            check_evidence(context.evidence, shapes)

        def scores(name: str, **masking: Any) -> Any:
            scale = costs[name] ** costs.power
            tensor = tensors[name].detach()
            return score_function(self.importance, name, context, tensor, scale, **masking)

        groups = groups_of(self.scope, shapes, check_fraction("sparsity", target))
        self.granularity.check(tensors, groups, costs)
        by_cost = self.costs is not None
        competition = Competition(tensors, groups, scores, before, costs, by_cost)
        return MaskSet(self.granularity.masks(competition))

    def _costs_of(self, names: Collection[str]) -> Costs:
        if self.costs is None:
            return Costs(dict.fromkeys(names, 1.0))
        assert isinstance(self.costs, Costs)  # after `bind`
        return self.costs.of(names)


def compute_masks(
    tensors: Mapping[str, Tensor],
    sparsity: float,
    *,
    importance: Importance,
    scope: Scope = "global",
    masks: Mapping[str, Tensor] | None = None,
    round: int = 1,
    evidence: Mapping[str, Tensor] | None = None,
    granularity: Granularity | None = None,
    costs: Mapping[str, float] | None = None,
    gradients: Mapping[str, Tensor] | None = None,
) -> MaskSet:
    """Masks that prune the lowest scores, exactly `round(sparsity * n)` of the n in each group.

    The sparsity is a fraction of all weights, not of the remaining ones. With `costs`, blocks or
    channels, the fewest are pruned that reach the fraction `sparsity` of the total cost. Pruned
    weights stay pruned. Ties are pruned in order of tensor and flat index. Scores are computed
    tensor by tensor and not held in memory together.

    Sharded weights (`DTensor`s) are not gathered and get the same masks; all processes must call
    this. An elementwise importance is called with pieces of shards; any other is called with the
    `DTensor` and returns scores of its shape, as a `DTensor` or a plain tensor.

    Args:
        tensors: Qualified name -> live weights, of any shape; need not belong to a module.
        sparsity: Cumulative sparsity to reach, in [0, 1).
        importance: The importance; the highest scores are kept.
        scope: Which tensors compete with each other; see `resolve_scope`.
        masks: The present masks, of any dtype, zero = pruned; None for a dense model.
        round: The round, for importances that depend on it.
        evidence: Qualified name -> evidence for the importance, such as gradients.
        granularity: What is removed together: `Weights()` (the default), `NM`, `Block`, or the
            result of `Channels.bind`.
        costs: Qualified name -> cost of each weight of the tensor, such as the result of
            `multiply_adds`; None counts weights. See `Costs` for how they affect scores.
        gradients: The former name of `evidence`.

    Returns:
        A mask for every tensor; for channels, also for other tensors that lose entries.

    Raises:
        ValueError: If `sparsity` is out of range or below the present one, weights are not finite,
            scores are NaN or of another shape than the weights, evidence is missing, or costs are
            missing or not positive.

    Example:
        >>> weights = {"a": torch.tensor([4.0, -1.0]), "b": torch.tensor([-3.0, 2.0])}
        >>> masks = compute_masks(weights, 0.5, importance=magnitude)
        >>> masks["a"], masks["b"]
        (tensor([ True, False]), tensor([ True, False]))
    """
    rule = Prune(
        importance, scope, granularity or Weights(), None if costs is None else Costs(costs)
    )
    found = gradients if evidence is None else evidence
    context = Context(round) if found is None else Context(round, found)
    return rule.masks(tensors, masks or {}, sparsity, context)
