"""Masks from any `torch.nn.utils.prune.BasePruningMethod`, with the semantics of PyTorch.

A class (or a `functools.partial` of one) with a parameter `amount` follows the schedule: each round
passes the number of weights or channels to prune. An instance, or a class without `amount`, keeps
its own amount, and each round applies it to the remaining weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from pruneflow.distributed import is_sharded
from pruneflow.errors import expect
from pruneflow.pruning.distribution import Scope
from pruneflow.pruning.granularity import Granularity, Weights
from pruneflow.pruning.importance import Context, Importance, check_finite
from pruneflow.pruning.masks import MaskSet
from pruneflow.pruning.schedules import check_fraction, pruned_count
from pruneflow.pruning.selection import MaskRule, Prune
from pruneflow.structure.costs import CostFunction, Costs

if TYPE_CHECKING:
    from typing_extensions import TypeIs

TorchMethod = prune.BasePruningMethod | Callable[..., prune.BasePruningMethod]


@dataclass(frozen=True)
class TorchPruning:
    """Compute masks with a method of `torch.nn.utils.prune`, as `PruningContainer` combines them.

    Args:
        importance: A `BasePruningMethod` class, a partial of one, or an instance.
        scope: `"layer"`, or `"global"` for unstructured methods, which concatenates the tensors, as
            `prune.global_unstructured` does.

    Raises:
        ValueError: If the method does not support `scope`.

    Example:
        >>> from pruneflow import Context
        >>> weights = {"weight": torch.tensor([[4.0, -1.0], [-3.0, 2.0]])}
        >>> rule = TorchPruning(prune.L1Unstructured, scope="layer")
        >>> rule.masks(weights, {}, 0.5, Context(round=1))["weight"]
        tensor([[ True, False],
                [ True, False]])
    """

    importance: TorchMethod
    scope: Scope

    grows = False
    needs = None
    costs = None
    needs_example = False
    coupled = ()

    def __post_init__(self) -> None:
        cls: Any = _class(self.importance) or type(self.importance)
        unstructured = cls.PRUNING_TYPE == "unstructured"
        expect(
            self.scope == "layer" or (self.scope == "global" and unstructured),
            "scope",
            f"be 'layer' for {cls.__name__} ({cls.PRUNING_TYPE}), or 'global' for an unstructured "
            "method",
            repr(self.scope),
            "use one of these",
        )

    @property
    def takes_target(self) -> bool:
        """Whether the schedule sets the sparsity; an instance keeps its own amount.

        Example:
            >>> methods = prune.L1Unstructured, prune.L1Unstructured(0.2)
            >>> [TorchPruning(method, "layer").takes_target for method in methods]
            [True, False]
        """
        cls = _class(self.importance)
        if isinstance(self.importance, partial) and "amount" in self.importance.keywords:
            return False
        return cls is not None and "amount" in inspect.signature(cls).parameters

    def writers(self, name: str) -> tuple[str, ...]:
        """An empty tuple: no tensor loses entries with another."""
        return ()

    def bind(self, model: nn.Module, names: Collection[str], example: object) -> TorchPruning:
        """The rule itself, which does not depend on the model."""
        return self

    def check(self, tensors: Mapping[str, Tensor], target: float | None) -> None:
        """Check that no tensor is sharded.

        Raises:
            ValueError: Names the method.
        """
        expect(
            not any(is_sharded(tensor) for tensor in tensors.values()),
            "importance",
            "be a function for sharded weights, which torch.nn.utils.prune does not support",
            self.importance,
            "try magnitude",
        )

    def pruned_fraction(self, masks: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> float:
        """Fraction of the weights that is pruned."""
        return MaskSet(masks).sparsity

    @torch.no_grad()
    def masks(
        self,
        tensors: Mapping[str, Tensor],
        before: Mapping[str, Tensor],
        target: float | None,
        context: Context,
    ) -> MaskSet:
        """The masks after a round.

        Args:
            tensors: Qualified name -> live weights.
            before: The present masks, zero = pruned; a tensor without one is dense.
            target: Cumulative sparsity to reach, in [0, 1): of the weights for an unstructured
                method, of the channels along its `dim` for a structured one. Not used if the method
                keeps its own amount.
            context: Not used.

        Raises:
            ValueError: If weights are not finite, or `target` is below the present sparsity.
        """
        check_finite(tensors)
        target = check_fraction("sparsity", target) if self.takes_target else None
        present = {
            name: before[name] != 0 if name in before else torch.ones_like(tensor, dtype=torch.bool)
            for name, tensor in tensors.items()
        }
        if self.scope == "layer":
            return MaskSet(
                {
                    name: _apply(self.importance, name, tensor.detach(), present[name], target)
                    for name, tensor in tensors.items()
                }
            )
        joined = torch.cat([tensor.detach().reshape(-1) for tensor in tensors.values()])
        joined_masks = torch.cat([present[name].reshape(-1) for name in tensors])
        mask = _apply(self.importance, "", joined, joined_masks, target)
        parts = mask.split([tensor.numel() for tensor in tensors.values()])
        return MaskSet(
            {
                name: part.reshape(tensor.shape)
                for (name, tensor), part in zip(tensors.items(), parts, strict=True)
            }
        )


def rule_for(
    importance: Importance | TorchMethod,
    scope: Scope = "global",
    granularity: Granularity | None = None,
    costs: Costs | CostFunction | Mapping[str, float] | None = None,
) -> MaskRule:
    """The mask rule for an importance or a method of `torch.nn.utils.prune`.

    Raises:
        TypeError: If an argument has the wrong type, such as a class instead of an instance.
        ValueError: If the arguments do not go together.
    """
    expect(
        granularity is None or isinstance(granularity, Granularity),
        "granularity",
        "be Weights(), NM(2, 4), Block(1, 16) or Channels(example_input)",
        granularity,
        "try Weights()",
        error=TypeError,
    )
    if _is_torch_method(importance):
        expect(
            costs is None and granularity in (None, Weights()),
            "importance",
            "be a function if `granularity` or `costs` is given",
            f"{importance!r}, a method of torch.nn.utils.prune",
            "try magnitude",
        )
        return TorchPruning(importance, scope)
    expect(
        callable(importance) and not isinstance(importance, type),
        "importance",
        "be a function such as magnitude, or a method of torch.nn.utils.prune",
        importance,
        f"try {importance.__name__}()" if isinstance(importance, type) else "try magnitude",
        error=TypeError,
    )
    if costs is not None and not callable(costs):
        costs = Costs(costs)
    return Prune(importance, scope, granularity or Weights(), costs)


def _is_torch_method(importance: object) -> TypeIs[TorchMethod]:
    return isinstance(importance, prune.BasePruningMethod) or _class(importance) is not None


def _apply(
    method: TorchMethod, name: str, tensor: Tensor, before: Tensor, sparsity: float | None
) -> Tensor:
    if not isinstance(method, prune.BasePruningMethod):
        method = method() if sparsity is None else _with_amount(method, before, sparsity)
    # A container applies its last method to the remaining weights, as PyTorch does when a tensor is
    # pruned again. It requires methods with the name of their tensor.
    method._tensor_name = name
    container = prune.PruningContainer(method)
    mask: Tensor = container.compute_mask(tensor, before.to(tensor.dtype))
    return mask.bool()


def _with_amount(
    method: Callable[..., prune.BasePruningMethod], before: Tensor, sparsity: float
) -> prune.BasePruningMethod:
    probe = method(amount=0)
    if probe.PRUNING_TYPE == "structured":  # type: ignore[attr-defined]  # set by subclasses
        dim = probe.dim  # type: ignore[attr-defined]  # all structured methods of PyTorch have it
        others = [axis for axis in range(before.dim()) if axis != dim % before.dim()]
        units = before.any(dim=others) if others else before
    else:
        units = before
    pruned = int((~units).sum())
    count = pruned_count(sparsity, units.numel())
    expect(
        count >= pruned,
        "sparsity",
        f"be at least the present one, {pruned / max(1, units.numel()):.6g}",
        repr(sparsity),
        "pruned weights stay pruned",
    )
    return method(amount=count - pruned)


def _class(importance: object) -> type[prune.BasePruningMethod] | None:
    cls: Any = importance.func if isinstance(importance, partial) else importance
    is_method = isinstance(cls, type) and issubclass(cls, prune.BasePruningMethod)
    return cls if is_method else None
