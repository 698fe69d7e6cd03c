"""Let any `torch.nn.utils.prune.BasePruningMethod` choose the masks, with torch's own semantics.

A class (or a `functools.partial` of one) that takes `amount` is driven by the schedule: each round
gives it the number of weights or channels still to prune. An instance keeps its own amount, as does
a class that takes none, and is applied once a round to what the rounds before have left.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils import prune

from pruneflow.distributed import is_sharded
from pruneflow.pruning.distribution import Scope
from pruneflow.pruning.importance import check_finite
from pruneflow.pruning.masks import MaskSet
from pruneflow.pruning.plan import pruned_count

if TYPE_CHECKING:
    from typing_extensions import TypeIs

TorchMethod = prune.BasePruningMethod | Callable[..., prune.BasePruningMethod]


def is_torch_method(importance: object) -> TypeIs[TorchMethod]:
    """Whether `importance` is a torch pruning method: an instance, a class or a partial of one."""
    return isinstance(importance, prune.BasePruningMethod) or _class(importance) is not None


def keeps_own_amount(method: TorchMethod) -> bool:
    """Whether `method` decides by itself how much a round removes.

    Example:
        >>> keeps_own_amount(prune.L1Unstructured), keeps_own_amount(prune.L1Unstructured(0.2))
        (False, True)
    """
    cls = _class(method)
    if isinstance(method, partial) and "amount" in method.keywords:
        return True
    return cls is None or "amount" not in inspect.signature(cls).parameters


def check_scope(method: TorchMethod, scope: Scope) -> None:
    """Refuse a scope that torch has not for `method`.

    Raises:
        ValueError: If `scope` is neither `"layer"` nor, for an unstructured method, `"global"`.
    """
    cls: Any = _class(method) or type(method)
    if scope != "layer" and (scope != "global" or cls.PRUNING_TYPE != "unstructured"):
        raise ValueError(
            f"`scope` is expected to be 'layer' for {cls.__name__} ({cls.PRUNING_TYPE}), or "
            f"'global' for an unstructured method, but {scope!r} came; torch.nn.utils.prune has no "
            "other scopes"
        )


def check_alone(method: TorchMethod, tensors: Mapping[str, Tensor], *others: object) -> None:
    """Refuse sharded tensors, and `granularity` or `costs` beside a method that has its own.

    Raises:
        ValueError: If a tensor is sharded, or any of `others` is not None.
    """
    if any(other is not None for other in others):
        raise ValueError(
            "`importance` is expected to be a function where `granularity` or `costs` are given, "
            f"but {method!r} came, which has its own; give magnitude, say"
        )
    if any(is_sharded(tensor) for tensor in tensors.values()):
        raise ValueError(
            "`importance` is expected to be a function for sharded weights, which "
            f"torch.nn.utils.prune does not know, but {method!r} came; give magnitude, for example"
        )


@torch.no_grad()
def torch_masks(
    tensors: Mapping[str, Tensor],
    sparsity: float | None,
    *,
    method: TorchMethod,
    scope: Scope = "layer",
    masks: Mapping[str, Tensor] | None = None,
) -> MaskSet:
    """Masks chosen by a torch pruning method, as `PruningContainer` composes them over rounds.

    Args:
        tensors: Qualified name -> live weights; with scope `"global"` they are joined in one
            vector, as `prune.global_unstructured` does.
        sparsity: Cumulative sparsity to reach, in [0, 1): of the weights for an unstructured
            method, of the channels along its `dim` for a structured one. None for a method that
            keeps its own amount.
        method: A `BasePruningMethod` class, a partial of one, or an instance.
        scope: `"layer"`, or `"global"` for unstructured methods.
        masks: The masks so far; None for none.

    Raises:
        ValueError: If `scope` does not go with the method, or weights are not finite.

    Example:
        >>> weights = {"weight": torch.tensor([[4.0, -1.0], [-3.0, 2.0]])}
        >>> torch_masks(weights, 0.5, method=prune.L1Unstructured)["weight"]
        tensor([[ True, False],
                [ True, False]])
    """
    check_scope(method, scope)
    check_finite(tensors)
    before = {name: torch.ones_like(tensor, dtype=torch.bool) for name, tensor in tensors.items()}
    before.update(masks or {})
    if scope == "layer":
        return MaskSet(
            {
                name: _apply(method, name, tensor.detach(), before[name], sparsity)
                for name, tensor in tensors.items()
            }
        )
    joined = torch.cat([tensor.detach().reshape(-1) for tensor in tensors.values()])
    held = torch.cat([before[name].reshape(-1) for name in tensors])
    mask = _apply(method, "", joined, held, sparsity)
    parts = mask.split([tensor.numel() for tensor in tensors.values()])
    return MaskSet(
        {
            name: part.reshape(tensor.shape)
            for (name, tensor), part in zip(tensors.items(), parts, strict=True)
        }
    )


def _apply(
    method: TorchMethod, name: str, tensor: Tensor, before: Tensor, sparsity: float | None
) -> Tensor:
    if not isinstance(method, prune.BasePruningMethod):
        method = method() if sparsity is None else _still_to_prune(method, before, sparsity)
    # A container applies its last method to what earlier ones left, exactly as torch does when a
    # tensor is pruned again; it insists on methods that know the name of their tensor.
    method._tensor_name = name
    container = prune.PruningContainer(method)
    mask: Tensor = container.compute_mask(tensor, before.to(tensor.dtype))
    return mask.bool()


def _still_to_prune(
    method: Callable[..., prune.BasePruningMethod], before: Tensor, sparsity: float
) -> prune.BasePruningMethod:
    probe = method(amount=0)
    if probe.PRUNING_TYPE == "structured":  # type: ignore[attr-defined]  # set by subclasses
        dim = probe.dim  # type: ignore[attr-defined]  # every structured method of torch has it
        others = [axis for axis in range(before.dim()) if axis != dim % before.dim()]
        units = before.any(dim=others) if others else before
    else:
        units = before
    pruned = int((~units).sum())
    count = pruned_count(sparsity, units.numel())
    if count < pruned:
        raise ValueError(
            f"`sparsity` is expected to be at least the present one, {pruned / units.numel():.6g}, "
            f"but {sparsity!r} came; pruned weights stay pruned"
        )
    return method(amount=count - pruned)


def _class(importance: object) -> type[prune.BasePruningMethod] | None:
    cls: Any = importance.func if isinstance(importance, partial) else importance
    is_method = isinstance(cls, type) and issubclass(cls, prune.BasePruningMethod)
    return cls if is_method else None
