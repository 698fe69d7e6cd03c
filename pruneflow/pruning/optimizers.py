"""What optimizers hold of pruned weights, and what they remember of them after a prune."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import (
    ASGD,
    LBFGS,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)

from pruneflow.errors import expect

# Each treats weights of the same value, gradient and state alike, and keeps a weight at +0.0 whose
# gradient and state are zero. Subclasses may do anything.
_ELEMENTWISE = frozenset(
    {SGD, Adam, AdamW, NAdam, RAdam, Adamax, RMSprop, Adagrad, Adadelta, ASGD, Rprop}
)
OptimizerState = Literal["keep", "zero_pruned", "reset"]
_WRAPPED = ("optimizer", "_optimizer", "base_optimizer", "optim")  # where wrappers keep theirs


def check_optimizer_state(policy: str) -> None:
    """Refuse an unknown policy.

    Raises:
        ValueError: Naming `optimizer_state`.
    """
    policies = get_args(OptimizerState)
    remedy = "'zero_pruned' is the default"
    expect(
        policy in policies,
        "optimizer_state",
        f"be one of {', '.join(map(repr, policies))}",
        repr(policy),
        remedy,
    )


def plain_optimizers(optimizers: Sequence[Any]) -> list[Optimizer]:
    """The optimizers of PyTorch inside of wrappers such as those of Accelerate and Lightning.

    Raises:
        TypeError: If one neither is nor wraps an optimizer of PyTorch, whose steps can be followed.
    """
    expect(
        isinstance(optimizers, Sequence),
        "optimizers",
        "be a list of optimizers",
        optimizers,
        "put it in brackets",
        error=TypeError,
    )
    return [_plain(optimizer) for optimizer in optimizers]


def _plain(optimizer: Any) -> Optimizer:
    inner, seen = optimizer, [optimizer]
    while not hasattr(inner, "_optimizer_step_post_hooks"):  # made by Optimizer.__init__
        within = (getattr(inner, name, None) for name in _WRAPPED)
        inner = next((w for w in within if not any(w is s for s in (None, *seen))), None)
        seen.append(inner)
        if inner is None:
            raise TypeError(
                "`optimizers` must be PyTorch's optimizers or wrappers around them, got "
                f"{optimizer!r}, which has no step hooks; give the optimizer that it wraps"
            )
    found: Optimizer = inner
    return found


def keeps_zeros(optimizer: Optimizer) -> bool:
    """Whether a step leaves weights of +0.0 alone that have neither gradient nor state.

    Known of the elementwise optimizers of `torch.optim`, unless others have hooks on their steps
    beside the one before and the one after of who asks.
    """
    return (
        type(optimizer) in _ELEMENTWISE
        and len(optimizer._optimizer_step_pre_hooks) == 1
        and len(optimizer._optimizer_step_post_hooks) == 1
        and not torch.compiler.is_compiling()
    )


def state_of(optimizer: Optimizer, parameter: Tensor) -> list[Tensor]:
    """What an optimizer remembers of each weight of a parameter: tensors of its shape."""
    state = optimizer.state.get(parameter, {})  # indexing would make an entry
    values = (value for value in state.values() if isinstance(value, Tensor))
    return [value for value in values if value.shape == parameter.shape]


@torch.no_grad()
def mask_optimizer_state(
    policy: OptimizerState, optimizers: Sequence[Optimizer], masks: Sequence[tuple[Tensor, Tensor]]
) -> None:
    """Settle, after a prune, what optimizers remember: momentum, moments, steps.

    `"zero_pruned"` zeroes it where a weight is pruned: what has no gradient any more should have no
    momentum either, and what survives goes on undisturbed. `"reset"` forgets all of it, as if
    training began here, and `"keep"` leaves it alone. LBFGS keeps one vector for all parameters,
    hence is reset unless kept.

    Args:
        policy: `"keep"`, `"zero_pruned"` or `"reset"`.
        optimizers: The optimizers.
        masks: Pairs (parameter, bool mask of its shape, True = keep).

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        >>> weight.sum().backward(); optimizer.step()
        >>> mask = torch.tensor([True, False])
        >>> mask_optimizer_state("zero_pruned", [optimizer], [(weight, mask)])
        >>> optimizer.state[weight]["momentum_buffer"]
        tensor([1., 0.])
    """
    if policy == "keep":
        return
    for optimizer in optimizers:
        if policy == "reset" or isinstance(optimizer, LBFGS):
            optimizer.state.clear()
        for parameter, mask in masks:
            # `in` first: the state is a defaultdict, and asking for an entry would make one.
            if parameter in optimizer.state:
                for value in optimizer.state[parameter].values():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        value.masked_fill_(~mask, 0)


def check_optimized(
    parameters: Mapping[str, nn.Parameter],
    optimizers: Sequence[Optimizer],
    leaving_out: Callable[[Sequence[str]], Sequence[str]],
) -> None:
    """Refuse optimizers that do not train every one of these tensors that is trainable.

    Args:
        parameters: The tensors.
        optimizers: The optimizers.
        leaving_out: From the names of some to those that have to be excluded to leave them out,
            which are others where they lose entries along with these.

    Raises:
        ValueError: Naming the tensors, or the optimizer that updates a share of them alone.
    """
    for optimizer in optimizers:
        # By name: torch has it only where torch.distributed was built.
        expect(
            type(optimizer).__name__ != "ZeroRedundancyOptimizer",
            "optimizers",
            "update every tensor to prune in each process",
            "ZeroRedundancyOptimizer, which updates some of them",
            "use the plain optimizer, or shard the parameters with `fully_shard`",
        )
    optimized = {
        id(parameter)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    missing = [n for n, p in parameters.items() if p.requires_grad and id(p) not in optimized]
    if missing:
        exclude = leaving_out(missing)
        coupled = f"{', '.join(exclude)}, whose channels these tensors hold or read"
        them = "them" if exclude == missing else coupled
        raise ValueError(
            f"`optimizers` must hold every tensor to prune, got none that holds "
            f"{', '.join(missing)}; add them to an optimizer, freeze them (`requires_grad=False`), "
            f"or `exclude` {them}"
        )
